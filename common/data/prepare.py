"""Making sure that a data set is there, by a download that leaves nothing half-written where it is not."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.datasets import CIFAR10, CIFAR100, FGVCAircraft, Food101

from common.data.archive import unpack
from common.data.published import published
from common.data.readers import READERS
from common.data.tree import Tree
from common.download import download as download_file
from common.errors import UserError
from common.files import one_at_a_time

COCO_HOST = "http://images.cocodataset.org"


@dataclass(frozen=True)
class _Archive:
    """An archive of a data set: where it is, its md5 where one is known, the folder in it, where that goes."""

    url: str
    md5: str | None
    folder: str
    target: Path
    provides: tuple[str, ...] = ("",)  # what has to be in the target afterwards

    @property
    def missing(self) -> bool:
        return any(_absent(self.target / path) for path in self.provides)


# Annotations first: the smallest archive shows soonest whether the way to the server is open.
_COCO: dict[str, tuple[str, ...]] = {
    "annotations/annotations_trainval2017.zip": ("instances_train2017.json", "instances_val2017.json"),
    "zips/val2017.zip": ("",),
    "zips/train2017.zip": ("",),
}
# Where torchvision knows an archive: its class, and the folder that the archive unpacks to.
_TORCHVISION: dict[str, tuple[Any, str]] = {
    "air": (FGVCAircraft, "fgvc-aircraft-2013b"),
    "aircraft": (FGVCAircraft, "fgvc-aircraft-2013b"),
    "cifar10": (CIFAR10, CIFAR10.base_folder),
    "cifar100": (CIFAR100, CIFAR100.base_folder),
    "food101": (Food101, "food-101"),
}


def prepare(name: str, root: str | Path, download: bool = True) -> None:
    """Makes sure that a data set is complete below `root`; where it is, nothing is fetched or written.

    Several processes may call this at once: one works, the others wait for it.

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
    for archive in _archives(tree):
        _fetch(archive)
    # What was there before and is wrong is the user's to remove: nothing of it is overwritten. What was missing may
    # have been fetched by another process meanwhile.
    problem = _problem(tree)
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


def _archives(tree: Tree) -> list[_Archive]:
    name = tree.published.name
    if name == "coco":
        folders = ("annotations", "val2017", "train2017")
        return [
            _Archive(f"{COCO_HOST}/{path}", None, folder, tree.path / folder, provides)
            for folder, (path, provides) in zip(folders, _COCO.items(), strict=True)
        ]
    source, folder = _TORCHVISION[name]
    if issubclass(source, CIFAR10):
        return [_Archive(source.url, source.tgz_md5, folder, tree.path)]
    return [_Archive(source._URL, getattr(source, "_MD5", None), folder, tree.path)]


def _fetch(archive: _Archive) -> None:
    """Downloads and unpacks what is missing, or waits for the process that does."""
    if not archive.missing:
        return
    file = archive.target.parent / archive.url.rpartition("/")[2]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(file):
            if archive.missing:
                by_hand = file.exists()
                download_file(archive.url, file, md5=archive.md5)
                unpack(file, archive.folder, archive.target, keep=by_hand)
                if not by_hand:
                    file.unlink()
    except OSError as error:
        raise UserError(
            f"{archive.target} cannot be written ({error.strerror}); make room or name another folder with --data-root."
        ) from error
