"""The data sets of GLSim: csv files with a line `class_id,dir` an image, `dir` below the folder of the images."""

import csv
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import data as readers
from common.data import Data, Images
from common.errors import UserError
from glsim.data_utils.transforms import CIFAR, transforms
from glsim.train_utils.settings import Settings

# split -> the options that name its list, and the folder of its images
OPTIONS = {
    "train_val": ("df_trainval", "folder_train"),
    "train": ("df_train", "folder_train"),
    "val": ("df_val", "folder_val"),
    "test": ("df_test", "folder_test"),
}

_OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)|[\0-\x1f]")


def is_inside(name: str) -> bool:
    """Whether a list may name this file: below a folder, on one line."""
    return _OUTSIDE.search(name) is None


class Listed(NamedTuple):
    file: Path
    images: list[str]
    labels: list[int]


def read(settings: Settings) -> Data:
    """The images of training, validation and test that `settings` name, with their transforms.

    With `train_trainval` training takes train and val together, and the test images choose the best checkpoint too, as
    published. Ids are the `dir` of the csv files. The classes are all ids of these files, 0 to the largest, by their
    names in df_classid_classname; numbers serve as names where that file is missing. CIFAR is read from its own files.

    Raises:
        UserError: a file or image is missing, a file is damaged, or the files contradict each other.
    """
    train_transform, test_transform = transforms(settings)
    train, val, test = _cifar(settings) if settings.dataset_name in CIFAR else _listed(settings)
    return Data(
        train.with_transform(train_transform), val.with_transform(test_transform), test.with_transform(test_transform)
    )


def _cifar(settings: Settings) -> tuple[Images, Images, Images]:
    if not settings.train_trainval:
        raise UserError(f"--train_trainval: {settings.dataset_name} is not split into train and val; leave it out")
    reader = readers.cifar10 if settings.dataset_name == "cifar10" else readers.cifar100
    train, test = (reader(settings.dataset_root_path, split) for split in ("train", "test"))
    return train, test, test


def _listed(settings: Settings) -> tuple[Images, Images, Images]:
    root = Path(settings.dataset_root_path)
    splits = ("train_val", "test") if settings.train_trainval else ("train", "val", "test")
    lists = {split: read_list(root / getattr(settings, OPTIONS[split][0])) for split in splits}
    test = lists["test"]
    learned = [listed for listed in lists.values() if listed is not test]
    classes = _classes(root / settings.df_classid_classname, learned, test)
    listing = functools.cache(_listing)  # each folder once for all lists
    images = []
    for split, listed in lists.items():
        option = OPTIONS[split][1]
        folder = root / getattr(settings, option)
        _require_images(folder, listed, option, listing)
        paths = [f"{folder}/{image}" for image in listed.images]
        images.append(Images(settings.dataset_name, split, listed.images, paths, listed.labels, classes))
    return images[0], images[1], images[-1]


def read_list(file: Path) -> Listed:
    """Reads a list of images, each of which lies below the folder of the images and is listed once."""
    if not file.is_file():
        raise UserError(
            f"{file} is not there: expected a list `class_id,dir` of images; make it with ./prepare_datasets.sh "
            "(./scripts/download.sh says where data sets are), copy the published file there, or name its folder with "
            "--dataset_root_path"
        )
    rows = _rows(file, "dir")
    if not rows:
        raise UserError(f"{file} lists no image; make it again with ./prepare_datasets.sh")
    line_of: dict[str, int] = {}
    for line, _, image in rows:
        if not image or not is_inside(image):
            raise UserError(f"{file}, line {line}: expected an image below the folder of the images, found {image!r}")
        if line_of.setdefault(image, line) != line:
            raise UserError(f"{file} lists {image} in line {line_of[image]} and in line {line}; take one of them out")
    return Listed(file, [image for _, _, image in rows], [class_id for _, class_id, _ in rows])


def read_names(file: Path) -> dict[int, str]:
    """Reads the names of the classes, by their ids."""
    names: dict[int, str] = {}
    for line, class_id, name in _rows(file, "class_name"):
        if class_id in names:
            raise UserError(f"{file}, line {line}: class {class_id} has a name already; take one of them out")
        names[class_id] = name
    return names


def _rows(file: Path, value: str) -> list[tuple[int, int, str]]:
    """Line number, class_id and the column `value` of each row of a csv file; other columns are left alone."""
    rows = []
    try:
        # -sig: some editors put a byte order mark before the first line.
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            if not {"class_id", value} <= set(header):
                raise UserError(f"{file}: expected the header class_id,{value} in line 1, found {','.join(header)!r}")
            id_column, value_column = header.index("class_id"), header.index(value)
            for fields in reader:
                if not fields:
                    continue  # a blank line
                if len(fields) != len(header):
                    raise UserError(
                        f"{file}, line {reader.line_num}: expected the {len(header)} fields of the header, "
                        f"found {len(fields)}"
                    )
                class_id = fields[id_column]
                # Nine digits at most: int() refuses thousands of them.
                if not (class_id.isascii() and class_id.isdecimal() and len(class_id) < 10):
                    raise UserError(
                        f"{file}, line {reader.line_num}: expected a class_id of 0 or more, found {class_id[:40]!r}"
                    )
                rows.append((reader.line_num, int(class_id), fields[value_column]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as csv ({getattr(error, 'strerror', None) or error})") from error
    return rows


def _classes(names_file: Path, learned: list[Listed], test: Listed) -> list[str]:
    """The names of the classes: every id of the lists that are `learned`, which have to be all of the test's."""
    ids = {class_id for listed in learned for class_id in listed.labels}
    files = " and ".join(str(listed.file) for listed in learned)
    unlearned = set(test.labels) - ids
    if unlearned:
        raise UserError(
            f"{_place([test], min(unlearned))} has an image of class {min(unlearned)}, and there are none in {files}: "
            "expected files that belong together; make them again with ./prepare_datasets.sh"
        )
    for number, class_id in enumerate(sorted(ids)):
        if class_id != number:
            raise UserError(
                f"there is an image of class {class_id} and none of class {number} in {files} "
                f"({_place(learned, class_id)}): expected ids from 0 on without gaps; number them anew in all csv files"
            )
    if not names_file.exists():
        return [str(number) for number in range(len(ids))]
    names = read_names(names_file)
    nameless = ids - names.keys()
    if nameless:
        raise UserError(
            f"{names_file} has no name of class {min(nameless)}, and there are images of it in {files}; add it, or "
            "remove the file to do without names"
        )
    return [names[number] for number in range(len(ids))]


def _place(lists: list[Listed], wanted: int) -> str:
    """File and line of the first image of the class."""
    rows = ((listed.file, line, class_id) for listed in lists for line, class_id, _ in _rows(listed.file, "dir"))
    return next(f"{file}, line {line}" for file, line, class_id in rows if class_id == wanted)


def _require_images(folder: Path, listed: Listed, option: str, listing: Callable[[str], frozenset[str]]) -> None:
    """Raises UserError for images that are not there; `listing` spares a question an image, minutes on NFS."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: expected the images of {listed.file}; unpack them there or name their folder, "
            f"relative to {listed.file.parent}, with --{option}"
        )
    absent = []
    for image in listed.images:
        below, _, name = image.rpartition("/")
        if name not in listing(f"{folder}/{below}"):
            absent.append(image)
    if absent:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise UserError(
            f"{folder} lacks {absent[0]}{more} of the {len(listed.images):,} images of {listed.file}; unpack the data "
            f"set again or name another folder with --{option}"
        )


def _listing(folder: str) -> frozenset[str]:
    """The names of everything in a folder; none for what is no folder."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); make it readable") from error
