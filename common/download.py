"""One file from the network, completely or not at all: resumed, checked, then renamed into place."""

import base64
import hashlib
import http.client
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import one_at_a_time

CHUNK = 1 << 20  # bytes per read
TIMEOUT = 30.0  # seconds without a byte before the connection counts as lost
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


def digest_of(path: str | Path, algorithm: str) -> str:
    """Return the hex digest of a file by the hashlib algorithm of that name; the file is read in pieces."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def download(url: str, target: str | Path, *, md5: str | None = None, sha256: str | None = None) -> Path:
    """Download `url` to the file `target` and return its path; a file already there is not fetched again.

    Bytes arrive in `<target>.part`, which a later call resumes with a Range request (or starts again where
    the server ignores it). The file gets its name only when its length equals what the server declared and
    its checksum is right: the hex digests given, or else the md5 of an `x-goog-hash` header where the server
    sends one. A connection that breaks is taken up again as long as each attempt brings new bytes. Where several
    processes want the same file, one fetches it and the others wait.

    Raises UserError when the server cannot be reached or refuses, when the disk cannot be written, or when a
    checksum differs (the file that came is then deleted; one that was there before is left alone).
    """
    target = Path(target)
    wanted = {name: value for name, value in (("md5", md5), ("sha256", sha256)) if value}
    if target.exists():
        _check_existing(target, wanted)
        return target
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(part):
            if target.exists():  # by the process that was waited for
                _check_existing(target, wanted)
                return target
            headers = _fetch_all(url, part)
            _check_digests(part, wanted or _digests_in(headers), url)
            os.replace(part, target)
    except (*NETWORK_ERRORS, ValueError) as error:  # ValueError: a redirect to no address, a checksum that is none
        raise UserError(
            f"could not download {url} ({_reason(error)}): run again with a connection (what has arrived is "
            f"kept), or fetch it by hand and put it at {target}"
        ) from error
    except OSError as error:
        raise UserError(
            f"could not write {part} while downloading {url} ({error.strerror or error}): make room there or "
            "choose another folder, then run again"
        ) from error
    return target


def _fetch_all(url: str, part: Path) -> Message:
    """Fetch until `part` has the declared length; return the headers of the last response."""
    while True:
        before = _size(part)
        interruption: BaseException | None = None
        try:
            headers, total = _fetch(url, part)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not before:
                raise
            # Nothing lies beyond what we have: it is either complete or not this file at all.
            headers, total = error.headers, _total_of_range(error.headers)
            if total != before:
                part.unlink()
                continue
        except NETWORK_ERRORS as error:
            interruption, headers, total = error, Message(), None
        after = _size(part)
        if interruption is None and (total is None or after == total):
            return headers
        if total is not None and after > total:
            part.unlink()
            raise ConnectionError(f"{after} bytes came where {total} were announced")
        if after <= before:
            raise interruption or ConnectionError(f"the server stopped after {after} of {total} bytes")


def _fetch(url: str, part: Path) -> tuple[Message, int | None]:
    """Append one response to `part`; return its headers and the declared length of the whole file, if any."""
    have = _size(part)
    headers = {"User-Agent": "fine-grained-reproductions"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT) as response:
        length = _as_int(response.headers.get("Content-Length"))
        if response.status == 206:
            start, total = _range_of(response.headers)
            if start != have:
                part.unlink(missing_ok=True)
                raise ConnectionError(f"the server sent the bytes from {start} where those from {have} were asked for")
            if total is None and length is not None:
                total = have + length
        else:
            have, total = 0, length
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem)
        with bar, open(part, "ab" if have else "wb") as file:
            while (total is None or have <= total) and (piece := response.read(CHUNK)):
                file.write(piece)
                have += len(piece)
                bar.update(len(piece))
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the bytes
        return response.headers, total


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to http and https alone, and from https not to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        secure = ("https",) if req.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(newurl).scheme not in secure:
            raise urllib.error.HTTPError(
                req.full_url, code, f"{msg}: {newurl}, where no redirect may lead", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _range_of(headers: Message) -> tuple[int | None, int | None]:
    """Return a and N of `Content-Range: bytes a-b/N`."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
    return (int(found[1]), _as_int(found[2])) if found else (None, None)


def _total_of_range(headers: Message) -> int | None:
    """Return N of `Content-Range: bytes */N`."""
    return _as_int(headers.get("Content-Range", "").rpartition("/")[2])


def _as_int(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digests_in(headers: Message) -> dict[str, str]:
    """Return {"md5": hex} where the header `x-goog-hash: crc32c=...,md5=<base64>` announces one."""
    announced = ",".join(headers.get_all("x-goog-hash") or [])
    for item in announced.split(","):
        name, _, value = item.strip().partition("=")
        if name == "md5":
            return {"md5": base64.b64decode(value).hex()}
    return {}


def _check_digests(part: Path, wanted: dict[str, str], url: str) -> None:
    for algorithm, value in wanted.items():
        found = digest_of(part, algorithm)
        if found != value.lower():
            part.unlink()
            raise UserError(
                f"what came from {url} has {algorithm} {found} instead of {value}: it was damaged on the way "
                "and has been deleted; run again"
            )


def _check_existing(target: Path, wanted: dict[str, str]) -> None:
    for algorithm, value in wanted.items():
        found = digest_of(target, algorithm)
        if found != value.lower():
            raise UserError(
                f"{target} has {algorithm} {found} instead of {value}: delete it to have it downloaded again"
            )


def _reason(error: Exception) -> str:
    """Why, in one line: urllib's words for a redirect in a circle are three."""
    reason = str(getattr(error, "reason", error))
    if isinstance(error, urllib.error.HTTPError):
        reason = f"the server answered {error.code} {error.reason}"
    return " ".join(reason.split()) or type(error).__name__
