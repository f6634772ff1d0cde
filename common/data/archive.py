"""Zip archives of data sets: read to the last byte before anything is unpacked, renamed when all is there."""

import shutil
import stat
import uuid
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from common.errors import UserError

_CHUNK = 1 << 20  # bytes


def check_zip(archive: Path, folder: str) -> None:
    """Reads a whole zip file and compares the checksum of every member, before anything of it is unpacked.

    Raises:
        UserError: it is damaged (then it is removed, so that the next run fetches it again), or a member
            would be unpacked outside of `folder` or is a link (then it is kept for inspection).
    """
    try:
        with zipfile.ZipFile(archive) as content:
            for member in content.infolist():
                _refuse_member(archive, member, folder)
            for member in tqdm(content.infolist(), desc=f"checking {archive.name}", unit=" files"):
                with content.open(member) as stream:  # reading to the end compares the CRC
                    while stream.read(_CHUNK):
                        pass
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        archive.unlink(missing_ok=True)
        raise UserError(f"{archive} was damaged ({error}) and has been removed; run again to download it.") from error


def _refuse_member(archive: Path, member: zipfile.ZipInfo, folder: str) -> None:
    # orig_filename: `filename` has been cut at a zero byte and its separators replaced.
    path = PurePosixPath(member.orig_filename.replace("\\", "/"))
    outside = path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0] != folder
    if outside or "\0" in member.orig_filename or stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(
            f"{archive} was not unpacked because its member {member.orig_filename!r} is a link or lies "
            f"outside of {folder}/; delete the file and get it from its official source."
        )


def unpack_zip(archive: Path, folder: str, target: Path) -> None:
    """Unpacks the top-level `folder` of a checked zip file to `target`/`folder`.

    Everything is unpacked beside it first and renamed at the end; files that are there already are kept.

    Raises:
        UserError: the archive has no such folder, or the disk is too small or cannot be written.
    """
    temporary = target / f".unpack-{uuid.uuid4().hex}"
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            needed, free = sum(member.file_size for member in members), shutil.disk_usage(target).free
            if needed > free:
                raise UserError(
                    f"{archive} needs {needed:,} bytes unpacked and {target} has {free:,} left; make room or "
                    "name another folder with --data-root."
                )
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit=" files"):
                content.extract(member, temporary)
        if not (temporary / folder).is_dir():
            raise UserError(f"{archive} contains no folder {folder}; delete it and run again to download it.")
        _move(temporary / folder, target / folder)
    except OSError as error:
        raise UserError(
            f"{archive} could not be unpacked to {target} ({error.strerror}); make room or name another "
            "folder with --data-root."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Renames a folder; where the target exists, renames into it what is not there yet."""
    if not target.exists():
        source.rename(target)
        return
    for entry in sorted(source.iterdir()):
        if not (target / entry.name).exists():
            entry.rename(target / entry.name)
