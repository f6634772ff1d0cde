"""Making sure that a data set is there, by a download that leaves nothing half-written where it is not."""

import http.client
import os
import shutil
import tarfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.datasets import CIFAR10, CIFAR100, FGVCAircraft, Food101

from common.data.archive import check_zip, unpack_zip
from common.data.published import published
from common.data.readers import READERS
from common.data.tree import Tree
from common.download import download as download_file
from common.errors import UserError

COCO_HOST = "http://images.cocodataset.org"


@dataclass(frozen=True)
class _Archive:
    """One zip file of COCO: where it is, the folder it unpacks to, and what has to be there afterwards."""

    url: str
    folder: str
    provides: tuple[str, ...]


# Annotations first: the smallest archive shows soonest whether the way to the server is open.
_COCO_ARCHIVES = (
    _Archive(
        "annotations/annotations_trainval2017.zip",
        "annotations",
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
    ),
    _Archive("zips/val2017.zip", "val2017", ("val2017",)),
    _Archive("zips/train2017.zip", "train2017", ("train2017",)),
)


# torchvision's own downloads: the class, and the folder that its archive unpacks to.
_TORCHVISION: dict[str, tuple[Any, str]] = {
    "air": (FGVCAircraft, "fgvc-aircraft-2013b"),
    "aircraft": (FGVCAircraft, "fgvc-aircraft-2013b"),
    "cifar10": (CIFAR10, CIFAR10.base_folder),
    "cifar100": (CIFAR100, CIFAR100.base_folder),
    "food101": (Food101, "food-101"),
}


def prepare(name: str, root: str | Path, download: bool = True) -> None:
    """Makes sure that a data set is complete below `root`; where it is, nothing is fetched or written.

    Only one process may call this at a time; the others wait for it.

    Args:
        name: one of `common.data.published.DATA_SETS`.
        root: data root; the data set gets its own folder in it.
        download: False forbids the network.

    Raises:
        UserError: a data set that can be downloaded is damaged; or it is missing and `download` is False, the
            network or the disk fails, or what was downloaded is damaged.
    """
    facts = published(name)
    if not facts.downloads:  # its reader will say what is missing: to read it here too would take as long again
        return
    tree = Tree(facts, root)
    problem = _problem(tree)
    if problem is None:
        return
    if not download:
        raise problem
    fetched = _prepare_coco(tree) if facts.name == "coco" else _prepare_with_torchvision(tree)
    # What was there before and is wrong is the user's to remove: nothing of it is overwritten.
    problem = _problem(tree) if fetched else problem
    if problem is not None:
        raise problem


def _problem(tree: Tree) -> UserError | None:
    """What the data set's own reader has against the tree."""
    try:
        for split in tree.published.counts:
            READERS[tree.published.name](tree.root, split)
    except UserError as error:
        return error
    return None


def _absent(path: Path) -> bool:
    """Whether there is no such file, or an empty folder."""
    return not path.exists() or (path.is_dir() and not os.listdir(path))


def _prepare_with_torchvision(tree: Tree) -> bool:
    """Downloads a data set that torchvision knows; returns whether anything was fetched."""
    if not _absent(tree.path):
        return False
    name = tree.published.name
    # In a folder of its own: torchvision takes whatever an interrupted download left behind for complete.
    temporary = tree.root / f".download-{name}-{uuid.uuid4().hex}"
    source, folder = _TORCHVISION[name]
    try:
        temporary.mkdir(parents=True)
        source(temporary, download=True)
        tree.path.parent.mkdir(parents=True, exist_ok=True)
        (temporary / folder).rename(tree.path)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        tarfile.TarError,
        http.client.HTTPException,
    ) as error:
        url = source.url if issubclass(source, CIFAR10) else source._URL
        reason = " ".join(str(getattr(error, "reason", "") or error or type(error).__name__).split())
        raise UserError(
            f"{url} could not be downloaded and unpacked to {tree.path} ({reason}); try again, or "
            f"get it by hand from {tree.published.source} and unpack it below {tree.root}."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _prepare_coco(tree: Tree) -> bool:
    """Downloads those of COCO's archives whose content is missing; returns whether there were any."""
    missing = [archive for archive in _COCO_ARCHIVES if any(_absent(tree.path / path) for path in archive.provides)]
    for archive in missing:
        url = f"{COCO_HOST}/{archive.url}"
        file = tree.path / Path(archive.url).name
        download_file(url, file)
        check_zip(file, archive.folder)
        unpack_zip(file, archive.folder, tree.path)
        file.unlink()
    return bool(missing)
