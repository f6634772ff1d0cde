"""Files that survive a crash: written beside their final name, flushed to the disk, then renamed."""

import csv
import glob
import io
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary file and renames it to `path`.

    A crash, a kill or a full disk leaves the file that stood there before, whole. UserError where the disk fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        fault = error if isinstance(error, OSError) else error.__context__  # torch.save wraps the OSError
        if not isinstance(fault, OSError):
            raise
        raise UserError(
            f"{path} could not be written ({fault.strerror or fault}): the file that stood there before is unchanged; "
            "make room there, or choose another place"
        ) from error
    finally:
        with suppress(OSError):  # a read-only file system refuses even to look
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # makes the rename durable; not every system lets a folder be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replaces the file by one with this text (UTF-8, line ends as given)."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """`write_text` of a table; the first row is its heading."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def make_ready(path: Path, ours: bool) -> None:
    """Makes the folder of a file that is about to be written. One that is there is kept, unless it is `ours`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror}): choose another place") from error
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a killed process
        leftover.unlink(missing_ok=True)
    if not ours and (kept := keep_earlier(path)):
        print(f"{path} of an earlier run is kept as {kept}", flush=True)


def keep_earlier(path: Path) -> Path | None:
    """Gives a file at `path`, which is about to be replaced, a second name (name.1.bin), and returns that.

    Until it is replaced it has both names, so that called again, as after a kill, this finds the same one.
    """
    number = 0
    while path.exists():
        number += 1
        kept = path.with_suffix(f".{number}{path.suffix}")
        try:
            os.link(path, kept)
        except FileExistsError:
            if not kept.samefile(path):
                continue
        except OSError as error:
            raise UserError(f"{path} of an earlier run cannot be kept ({error.strerror}): move it away") from error
        return kept
    return None
