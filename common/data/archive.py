"""Archives of data sets (.zip, .tar.gz, .tgz): unpacked beside their place, renamed when all is there and right."""

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from common.errors import UserError

_CHUNK = 1 << 20  # bytes
_MAX_RATIO, _FREE_BYTES = 100, 64 << 20  # lists of a data set compress ten times; small ones may be mostly spaces
# What the readers raise on damaged input; gzip's own error is an OSError as well.
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError),
    *(NotImplementedError, RuntimeError, ValueError, OverflowError),
)


@dataclass(frozen=True)
class _Member:
    """What both formats say of a file or folder in them."""

    name: str
    size: int
    is_folder: bool
    is_special: bool  # a link, a device, a pipe
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: str, target: Path, keep: bool = False) -> None:
    """Unpacks the top-level `folder` of an archive, which becomes `target`; files that are there already are kept.

    Only plain files and folders are made, with the rights that new ones have here; what lies beside `folder` is left
    out. One process at a time may do this.

    Raises:
        UserError: the archive is damaged (then it is removed, so that the next run fetches it again, but with `keep`,
            which says that the user put it there); a member is a link or a device, would lie elsewhere, is there
            twice, or is far larger than an archive of this size may hold; there is no such folder; or the disk is too
            small or cannot be written. Nothing is then unpacked.
    """
    temporary = target.with_name(f".unpack-{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        room = shutil.disk_usage(target.parent).free
        with _open(archive) as content:
            _unpack_members(archive, _members(content), folder, temporary, room)
            if isinstance(content, tarfile.TarFile) and content.fileobj is not None:
                while content.fileobj.read(_CHUNK):  # gzip compares its checksum at the very end
                    pass
        if not (temporary / folder).is_dir():
            raise UserError(f"{archive} contains no folder {folder}; delete it and run again to download it.")
        _move(temporary / folder, target)
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if keep:
            raise UserError(f"{archive} is damaged ({reason}); delete it and run again to download it.") from error
        archive.unlink(missing_ok=True)
        raise UserError(f"{archive} was damaged ({reason}) and has been removed; run again to download it.") from error
    except OSError as error:
        raise UserError(
            f"{archive} could not be unpacked to {target} ({error.strerror}); make room or name another "
            "folder with --data-root."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(archive: Path) -> AbstractContextManager[Any]:
    return zipfile.ZipFile(archive) if archive.suffix == ".zip" else tarfile.open(archive, "r:gz")


def _members(content: Any) -> Iterator[_Member]:
    if isinstance(content, zipfile.ZipFile):
        for info in content.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where it was made on a system without such things
            # orig_filename: `filename` has been cut at a zero byte and its separators replaced.
            special = kind not in (0, stat.S_IFREG, stat.S_IFDIR)
            yield _Member(info.orig_filename, info.file_size, info.is_dir(), special, partial(content.open, info))
    else:
        for entry in content:
            special = not (entry.isreg() or entry.isdir())
            yield _Member(entry.name, entry.size, entry.isdir(), special, partial(content.extractfile, entry))


def _unpack_members(archive: Path, members: Iterator[_Member], folder: str, temporary: Path, room: int) -> None:
    """Every member is checked before anything of it is read: sizes that a bomb declares are never inflated."""
    most = max(_FREE_BYTES, _MAX_RATIO * archive.stat().st_size)
    files: set[str] = set()
    needed = 0
    temporary.mkdir()
    for member in tqdm(members, desc=f"unpacking {archive.name}", unit=" files"):
        path = _safe_path(archive, member)
        needed += member.size
        if needed > most:
            raise _refusal(archive, member, f"is more than {most:,} bytes together with those before it")
        if needed > room:
            raise UserError(
                f"{archive} needs more than {room:,} bytes unpacked, which is all that {temporary.parent} has left; "
                "make room or name another folder with --data-root."
            )
        if not path.parts or path.parts[0] != folder:
            continue
        if member.is_folder:
            (temporary / path).mkdir(parents=True, exist_ok=True)
            continue
        if str(path).casefold() in files:
            raise _refusal(archive, member, "is there twice, for systems that do not tell a from A at least")
        files.add(str(path).casefold())
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        source = member.open()
        assert source is not None  # a plain file
        with source, open(temporary / path, "xb") as file:
            shutil.copyfileobj(source, file, _CHUNK)  # to the end: zip compares its checksum there


def _safe_path(archive: Path, member: _Member) -> PurePosixPath:
    path = PurePosixPath(member.name.replace("\\", "/"))
    if member.is_special:
        raise _refusal(archive, member, "is a link or a device")
    if path.is_absolute() or ".." in path.parts or "\0" in member.name or ":" in next(iter(path.parts), ""):
        raise _refusal(archive, member, "would lie elsewhere")
    return path


def _refusal(archive: Path, member: _Member, why: str) -> UserError:
    return UserError(
        f"{archive} was not unpacked because its member {member.name!r} {why}; delete the file and get it from its "
        "official source."
    )


def _move(source: Path, target: Path) -> None:
    """Renames a folder; where the target exists, renames into it what is not there yet."""
    if not target.exists():
        source.rename(target)
        return
    for entry in sorted(source.iterdir()):
        if not (target / entry.name).exists():
            entry.rename(target / entry.name)
