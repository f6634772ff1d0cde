"""Files that survive: written beside their final name, flushed to the disk, then renamed.

A crash, a kill or a full disk leaves the file that stood there before, whole.
"""

import csv
import io
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary file and renames it to `path`; a failing disk is a UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
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
    _sync_folder(path.parent)


def _disk_fault(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`: torch.save answers a failing write with a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


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


def keep_earlier(path: Path) -> Path | None:
    """Gives a file that stands at `path` a number (name.1.bin), for another to take its place; returns where it is."""
    if not path.exists():
        return None
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    return kept


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """`write_text` of a table; the first row is its heading."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())
