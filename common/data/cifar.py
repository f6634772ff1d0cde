"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read by torchvision: the images of a split are one array."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from common.data.dataset_folder import open_folder
from common.data.images import Images

DEMO = "demo_{}.npz"  # the digits of a split, in place of the pickled batches


@dataclass(frozen=True, eq=False)
class _Pixels:
    """Decodes the path of an image, whose last part is its position."""

    data: np.ndarray  # (N, 32, 32, 3), uint8

    def __call__(self, path: Path) -> Image.Image:
        return Image.fromarray(self.data[int(path.name)])


def cifar10(root: str | Path, split: str) -> Images:
    """Reads one split of CIFAR-10: "train" or "test"; see `_cifar`."""
    return _cifar("cifar10", CIFAR10, root, split)


def cifar100(root: str | Path, split: str) -> Images:
    """Reads one split of CIFAR-100 (its 100 fine classes): "train" or "test"; see `_cifar`."""
    return _cifar("cifar100", CIFAR100, root, split)


def _cifar(name: str, source: type[CIFAR10], root: str | Path, split: str) -> Images:
    """Images and classes in the order of the files, ids = split and position ("train/00017").

    The images have paths of that form, and no files. torchvision unpickles only files whose MD5 is the published one.

    Raises:
        UserError: a file is missing, or is not the published one; or there is no such split.
    """
    folder = open_folder(name, root, split)
    demo = folder.path / DEMO.format(split)
    if demo.exists():
        with np.load(demo, allow_pickle=False) as file:
            data, labels, classes = file["data"], file["labels"].tolist(), file["classes"].tolist()
    else:
        try:
            read = source(folder.path.parent, train=split == "train")
        except RuntimeError as error:
            raise folder.wrong(".", "lacks a file, or has one whose MD5 is not the published one") from error
        data, labels, classes = read.data, read.targets, read.classes
    ids = [f"{split}/{position:05d}" for position in range(len(data))]
    return Images(name, split, ids, [folder.path / id_ for id_ in ids], labels, classes, decode=_Pixels(data))
