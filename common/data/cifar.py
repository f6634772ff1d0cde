"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read by torchvision: the images of a split are one array."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from common.data.demo import is_finished
from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree


def cifar10(root: str | Path, split: str) -> Images:
    """Reads one split of CIFAR-10: "train" or "test"; see `_cifar`."""
    return _cifar("cifar10", CIFAR10, root, split)


def cifar100(root: str | Path, split: str) -> Images:
    """Reads one split of CIFAR-100 (its 100 fine classes): "train" or "test"; see `_cifar`."""
    return _cifar("cifar100", CIFAR100, root, split)


@dataclass(frozen=True, eq=False)
class _Pixels:
    """Decodes the path of an image, whose last part is its position."""

    data: np.ndarray  # (N, 32, 32, 3), uint8

    def __call__(self, path: Path) -> Image.Image:
        return Image.fromarray(self.data[int(path.name)])


def _cifar(name: str, source: type[CIFAR10], root: str | Path, split: str) -> Images:
    """Reads one split of either data set.

    Classes and images in the order of the files, ids = split and position ("train/00017"). The images have paths
    of that form, and no files.

    Raises:
        UserError: a file is missing, or is not the published one.
    """
    tree = Tree(DATA_SETS[name], root)
    tree.published.require_split(split)
    present = tree.names(".", "the folder of the data set")
    files = dict([*source.train_list, *source.test_list, [source.meta["filename"], source.meta["md5"]]])
    for file in files:
        if file not in present:
            raise tree.missing("a file of the data set", tree.path / file)
    if is_finished(tree.path):
        for file in files:
            _check_pickle(tree, file)
        source = _of_demo(source)
    try:
        read = source(tree.path.parent, train=split == "train")
    except RuntimeError:
        for file, md5 in files.items():
            if not check_integrity(tree.path / file, md5):
                raise tree.damaged(tree.path / file, "is not the published file (its MD5 is another)") from None
        raise
    except OSError as error:
        raise tree.damaged(tree.path, f"has a file that cannot be read ({error.strerror})") from error
    ids = [f"{split}/{position:05d}" for position in range(len(read.data))]
    paths = [f"{tree.path}/{id_}" for id_ in ids]
    return Images(name, split, ids, paths, read.targets, read.classes, decode=_Pixels(read.data))


def _of_demo(source: type[CIFAR10]) -> type[CIFAR10]:
    """torchvision's reader without the MD5s of the published files, for the demo data."""
    unchecked: dict[str, Any] = {
        "train_list": [[file, None] for file, _ in source.train_list],
        "test_list": [[file, None] for file, _ in source.test_list],
        "meta": source.meta | {"md5": None},
    }
    return type(source.__name__, (source,), unchecked)


_ARRAY_NAMES = {"numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct"}


class _NumPyOnly(pickle.Unpickler):
    """Refuses every name that a pickled array does not need: unpickling may call whatever a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module.replace('_core', 'core')}.{name}" in _ARRAY_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _check_pickle(tree: Tree, relative: str) -> None:
    """Refuses a demo file that is no plain pickle: no MD5 vouches for it when torchvision unpickles it."""
    try:
        with (tree.path / relative).open("rb") as file:
            _NumPyOnly(file, encoding="latin1").load()
    except Exception as error:
        raise tree.damaged(tree.path / relative, "is no file of the demo data") from error
