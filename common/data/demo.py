"""Tiny data sets in the real layouts, without the network, so that a demo run takes the same path as a real one.

What is in them and how it lies on disk is in `common.data.demo_layouts`.
"""

import errno
import json
import os
import shutil
import uuid
from pathlib import Path

from common.data.demo_layouts import DEMO_FORMAT, WRITERS
from common.data.published import published
from common.data.tree import Tree
from common.errors import UserError
from common.files import open_plain

MARKER = "demo.json"


def write_demo(name: str, root: str | Path) -> None:
    """Writes the demo data of one data set below `root`, in its real layout.

    - aircraft: about 1,300 train, 200 val, 300 test images; air: the same files
    - coco: about 1,500 train, 300 test images, one in twenty of them without annotations
    - all others: about 1,500 train, 300 test images

    A finished tree is left alone; one of another format version or with files missing is written anew. The
    tree is written beside its place and renamed, so that several processes may call this at once.

    Raises:
        UserError: other data is at that place (it is never overwritten), or the folder cannot be written.
    """
    tree = Tree(published(name), root)
    name = tree.published.name
    if is_finished(tree.path):
        return
    temporary = tree.root / f".demo-{name}-{uuid.uuid4().hex}"
    try:
        # At least one file that this module did not write: somebody's data set.
        if tree.path.exists() and os.listdir(tree.path) and not (tree.path / MARKER).exists():
            raise UserError(
                f"The demo data of {tree.published.title} cannot be written because {tree.path} holds other data; "
                "name another folder with --data-root."
            )
        temporary.mkdir(parents=True)
        WRITERS[name](temporary)
        sizes = {
            file.relative_to(temporary).as_posix(): file.stat().st_size
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        (temporary / MARKER).write_text(json.dumps({"format": DEMO_FORMAT, "files": sizes}), encoding="utf-8")
        tree.path.parent.mkdir(parents=True, exist_ok=True)
        _put_in_place(temporary, tree.path)
    except OSError as error:
        raise UserError(f"The demo data cannot be written to {tree.path} ({error.strerror}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_finished(folder: Path) -> bool:
    """Whether a folder is a demo tree of this version, with every file at its full size."""
    try:
        with open_plain(folder / MARKER) as file:
            marker = json.loads(file.read())
        if marker["format"] != DEMO_FORMAT:
            return False
        return all((folder / file).stat().st_size == size for file, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _put_in_place(temporary: Path, target: Path) -> None:
    """Renames a finished tree to its place, moving an outdated one out of the way."""
    for _ in range(10):
        if is_finished(target):
            return  # another process was first
        if target.exists():
            outdated = temporary.with_name(f"{temporary.name}-outdated")
            try:
                target.rename(outdated)
            except FileNotFoundError:
                continue  # another process has just moved it
            shutil.rmtree(outdated, ignore_errors=True)
        try:
            temporary.rename(target)
            return
        except OSError as error:
            # Between the look and the rename another process may have put its own tree there.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    raise UserError(f"The demo data could not be put to {target}, other processes keep changing it; try again.")
