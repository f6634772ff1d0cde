"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read by torchvision: the images of a split are one array."""

import io
import pickle
import pickletools
from collections import Counter
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

_Read = tuple[np.ndarray, list[int], list[str]]  # images (N, 32, 32, 3), labels, classes


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
    parts = [file for file, _ in (source.train_list if split == "train" else source.test_list)]
    if is_finished(tree.path):
        data, labels, classes = _read_demo(tree, parts, source.meta["filename"], source.meta["key"])
    else:
        data, labels, classes = _read_published(tree, source, split, files)
    ids = [f"{split}/{position:05d}" for position in range(len(data))]
    paths = [f"{tree.path}/{id_}" for id_ in ids]
    return Images(name, split, ids, paths, labels, classes, decode=_Pixels(data))


def _read_published(tree: Tree, source: type[CIFAR10], split: str, files: dict[str, str]) -> _Read:
    """torchvision unpickles files whose MD5 is the published one, and no others."""
    try:
        read = source(tree.path.parent, train=split == "train")
    except RuntimeError:
        for file, md5 in files.items():
            if not check_integrity(tree.path / file, md5):
                raise tree.damaged(tree.path / file, "is not the published file (its MD5 is another)") from None
        raise
    except OSError as error:
        raise tree.damaged(tree.path, f"has a file that cannot be read ({error.strerror})") from error
    return read.data, read.targets, read.classes


# The demo's files, which no MD5 vouches for: read without letting a pickle call anything.


def _read_demo(tree: Tree, parts: list[str], meta: str, key: str) -> _Read:
    classes = _unpickle(tree, meta).get(key)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise tree.damaged(tree.path / meta, "has no list of class names")
    labels: list[int] = []
    arrays: list[np.ndarray] = []
    for part in parts:
        content = _unpickle(tree, part)
        array = content.get("data")
        own = content.get(key.replace("label_names", "labels"))
        pixels = array.pixels() if isinstance(array, _Array) else None
        if pixels is None or not isinstance(own, list) or len(own) != len(pixels):
            raise tree.damaged(tree.path / part, "has no images of 32 x 32 pixels with a label each")
        for position, label in enumerate(own):
            if type(label) is not int or not 0 <= label < len(classes):
                raise tree.damaged(
                    tree.path / part,
                    f"gives the image {position} the label {label!r} where one of 0 to {len(classes) - 1} is expected",
                )
        labels += own
        arrays.append(pixels)
    return np.concatenate(arrays), labels, classes


class _Array:
    """Stands for every NumPy name in a pickle, so that no state of a file reaches NumPy's own."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> np.ndarray | None:
        """(N, 32, 32, 3), uint8; None unless it is such an array."""
        match self.state:
            case (_, (int(), 3072), _Array(arguments=("u1", *_)), False, bytes(content)) if len(content) % 3072 == 0:
                planes = np.frombuffer(content, np.uint8).reshape(-1, 3, 32, 32)
                pixels: np.ndarray = planes.transpose(0, 2, 3, 1)
                return pixels
        return None


_ARRAY_NAMES = {"numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct"}


class _Unpickler(pickle.Unpickler):
    """Refuses every name but those of arrays: unpickling may call whatever a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module.replace('_core', 'core')}.{name}" in _ARRAY_NAMES:
            return _Array
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
# All that the demo's files are made of. Not PUT: its number is that of a place in a table, which would be made.
_OPCODES = {
    *("PROTO", "FRAME", "MARK", "STOP", "MEMOIZE", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT"),
    *("BININT1", "BININT2", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "EMPTY_LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "STACK_GLOBAL", "REDUCE", "BUILD", *_TUPLES),
}


def _unpickle(tree: Tree, relative: str) -> dict[Any, Any]:
    content = tree.content(relative, "a file of the data set")
    try:
        names = Counter(opcode.name for opcode, _, _ in pickletools.genops(content))
        # Tuples inside each other a million deep are more than the interpreter's stack holds.
        if names.keys() - _OPCODES or sum(names[name] for name in _TUPLES) > 20:
            raise pickle.UnpicklingError("not what an array and lists are made of")
        found = _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise tree.damaged(tree.path / relative, "is no file of the demo data") from error
    if not isinstance(found, dict):
        raise tree.damaged(tree.path / relative, "is no file of the demo data")
    return found
