"""Downloads: a file completely or not at all (resumed, checked, renamed into place), and whole data sets."""

import base64
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from common.data.dataset_folder import DatasetFolder
from common.data.facts import Archive, facts
from common.errors import UserError

CHUNK = 1 << 20  # bytes per read
TIMEOUT = 30.0  # seconds without a byte before the connection counts as lost
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)


def digest_of(path: str | Path, algorithm: str) -> str:
    """The hex digest of a file by the hashlib algorithm of that name; the file is read in pieces."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def fetch(url: str, path: str | Path, md5: str | None = None) -> Path:
    """Downloads `url` to the file `path` and returns that; a file already there is not fetched again.

    Bytes arrive in `<path>.part`, which a later call resumes. The file gets its name when its length is the announced
    one and its MD5 is right: `md5` in hex, or else what the server's x-goog-hash says. A connection that breaks is
    taken up again as long as each attempt brings new bytes. One process fetches, others wait for it.

    Raises:
        UserError: the server cannot be reached or refuses, the disk cannot be written, or the MD5 differs (what came
            is then deleted).
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    with locked(path):
        if path.exists():  # by the process that was waited for
            return path
        try:
            headers = _receive(url, part)
        except NETWORK_ERRORS as error:
            reason = f"the server answered {error.code}" if isinstance(error, urllib.error.HTTPError) else error
            raise UserError(
                f"could not download {url} ({reason}): run again with a connection (what has arrived is kept), or "
                f"fetch it by hand and put it at {path}"
            ) from error
        wanted = md5 or _announced_md5(headers)
        found = digest_of(part, "md5") if wanted else None
        if found != wanted:
            part.unlink()
            raise UserError(f"what came from {url} has the MD5 {found}, not {wanted}: it is deleted; run again")
        os.replace(part, path)
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes `path`, whose folder is made. A disk that cannot be written is one sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): make room, or name another folder"
        ) from error


def _receive(url: str, part: Path) -> Message:
    """Appends to `part` until it has the announced length; returns the headers of the last response."""
    answered: Message
    while True:
        before = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "fine-grained-reproductions"} | ({"Range": f"bytes={before}-"} if before else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
                have = before if response.status == 206 else 0  # else the server begins anew
                length = response.headers["Content-Length"]
                total = have + int(length) if length else None
                bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem)
                with bar, open(part, "ab" if have else "wb") as file:
                    while piece := response.read(CHUNK):
                        file.write(piece)
                        bar.update(len(piece))
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut may leave the name without the bytes
                answered = response.headers
                if total is None or part.stat().st_size == total:
                    return answered
        except urllib.error.HTTPError as error:
            if error.code != 416 or not before:
                raise
            # Nothing lies beyond what we have: it is either complete or not this file at all.
            if error.headers.get("Content-Range", "").rpartition("/")[2] == str(before):
                return error.headers
            part.unlink()
            continue
        except NETWORK_ERRORS:
            if not part.exists() or part.stat().st_size <= before:
                raise
        if part.stat().st_size <= before:
            raise ConnectionError(f"the server stopped after {part.stat().st_size} bytes")


def _announced_md5(headers: Message) -> str | None:
    """Hex of what a header `x-goog-hash: crc32c=...,md5=<base64>` says."""
    for item in ",".join(headers.get_all("x-goog-hash") or []).split(","):
        name, _, value = item.strip().partition("=")
        if name == "md5":
            return base64.b64decode(value).hex()
    return None


def prepare(name: str, root: str | Path, download: bool = True) -> None:
    """Fetches what is missing of a data set below `root`, where its authors let it be downloaded.

    Its reader says what is missing otherwise. Several processes may call this at once. UserError as in `fetch`, and
    where an archive is damaged.
    """
    folder = DatasetFolder(facts(name), root)
    for archive in folder.facts.archives if download else ():
        if _is_missing(folder, archive):
            target = folder.path / archive.to
            file = target.parent / archive.url.rpartition("/")[2]
            by_hand = file.exists()
            with locked(target):
                if _is_missing(folder, archive):
                    unpack(fetch(archive.url, file, archive.md5), archive.inside, target)
                    if not by_hand:
                        file.unlink()


def _is_missing(folder: DatasetFolder, archive: Archive) -> bool:
    places = [folder.path / place for place in archive.provides]
    return any(not place.exists() or (place.is_dir() and not os.listdir(place)) for place in places)


def unpack(archive: Path, inside: str, target: Path) -> None:
    """Unpacks a .zip or .tar.gz beside `target`, then renames its folder `inside` to that; what is there is kept.

    UserError where the archive is damaged; nothing is then unpacked.
    """
    temporary = target.with_name(f".unpack-{target.name}")
    print(f"unpacking {archive}", file=sys.stderr, flush=True)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(temporary)  # noqa: S202  # never outside of the folder
        else:
            with tarfile.open(archive) as tarred:
                tarred.extractall(temporary, filter="data")
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted((temporary / inside).iterdir()):
            if not (target / entry.name).exists():
                entry.rename(target / entry.name)
    except DAMAGED as error:
        raise UserError(f"{archive} is damaged ({error}): delete it and run again to download it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
