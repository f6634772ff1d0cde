"""Files that survive: written beside their final name, flushed to the disk, then renamed.

A crash, a kill or a full disk leaves the file that stood there before, whole.
"""

import csv
import errno
import glob
import io
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Calls `write(file)` on a temporary file and renames it to `path`; a failing disk is a UserError.

    Not `durable`, it is not waited for the disk: a power cut may leave the file damaged, which who reads it has to see.
    """
    # Processes of other machines and containers, which may have the same number, share the folder.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        fault = _disk_fault(error)
        if fault is None:
            raise
        raise UserError(
            f"{path} could not be written ({fault.strerror or fault}): the file that stood there before is unchanged; "
            "make room there, or choose another place"
        ) from error
    finally:
        with suppress(OSError):  # a read-only file system refuses even to look
            temporary.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)


def _disk_fault(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`: torch.save answers a failing write with a RuntimeError of its own."""
    while isinstance(error, RuntimeError):
        error = error.__context__
    return error if isinstance(error, OSError) else None


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable where the system can: not every one lets a folder be opened or synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces the file by one with this text (UTF-8, line ends as given), or leaves it and raises UserError."""
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Removes what a killed process left behind of writing the file `name` in `folder`, or any file there."""
    for leftover in folder.glob(f".{glob.escape(name) or '*'}.*.tmp"):
        process = leftover.name.split(".")[-2]
        if not (process.isdecimal() and _is_another(int(process))):
            leftover.unlink(missing_ok=True)


def _is_another(process: int) -> bool:
    """Whether that is a process which runs on this machine, and not this one."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return process != os.getpid()


def open_plain(path: str | Path) -> BinaryIO:
    """Opens a file that somebody named; an OSError for what is no plain file.

    A pipe would wait for its other end, and a device may have no end.
    """
    # With O_NONBLOCK nothing is waited for; plain files know no such thing.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, where a plain file is expected")


def keep_earlier(path: Path) -> Path | None:
    """Gives a file at `path`, whose name another is to take, a number (name.1.bin) too; returns where it is kept.

    Until the other is there it has both names. So it is at any time under one of them, and called again, after a kill
    or by another run, this finds the name that it has got.
    """
    number, kept = 1, path.with_suffix(f".1{path.suffix}")
    try:
        while path.exists():
            try:
                _give_name(path, kept)
                return kept
            except FileExistsError:
                if kept.samefile(path):
                    return kept
                number += 1
                kept = path.with_suffix(f".{number}{path.suffix}")
    except FileNotFoundError:  # another run, where files have one name, was first
        pass
    except OSError as error:
        raise UserError(
            f"{path} is there and cannot be renamed to {kept.name} ({error.strerror}): move it, or let its folder be "
            "written"
        ) from error
    return None


def _give_name(path: Path, other: Path) -> None:
    """FileExistsError where there is such a file."""
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if other.exists():  # a file system where files have one name alone
            raise FileExistsError from error
        path.rename(other)


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """`write_text` of a table; the first row is its heading."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """One process after the other goes through the block in which the file `path` is made.

    The lock is a file beside `path`, which goes at the end; one that a kill has left locks nothing. Where the system
    has no such locks nobody waits.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path}: waiting for another process that makes it", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
            if not _is_still(lock, file):  # who had it has removed it: the next to come makes another
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_still(path: Path, file: BinaryIO) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
