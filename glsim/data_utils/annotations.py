"""The original annotation files of GLSim's data sets: which image is of which class, for training or for the test.

Not the readers of common.data: GLSim names the folder of a data set itself, splits Aircraft and Cars otherwise and
knows further data sets. Class ids count from 0; images are relative to the folder of the images, the `dir` of the csv
files. All functions raise UserError where a file is missing, damaged or contradictory.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets import Flowers102

from common.data.dataset_folder import DatasetFolder
from common.data.facts import Facts, facts
from common.errors import UserError

Row = tuple[int, str]  # class id, image


class Annotations(NamedTuple):
    """What the files of a data set say, in their order."""

    train_val: list[Row]
    test: list[Row]
    names: dict[int, str]  # of the classes that have images
    num_train: int | None = None  # so many of train_val, foremost, are officially for training; none: no such split


def _published(name: str, title: str, classes: int, source: str) -> Facts:
    return Facts(name, title, folder=name, classes=classes, counts={}, source=source)


PUBLISHED: dict[str, Facts] = {
    "aircraft": facts("aircraft"),
    "cars": facts("car"),
    "cotton": facts("cotton"),
    "cub": facts("cub"),
    "dafb": _published("dafb", "DAFB", 3263, "https://github.com/arkel23/animesion"),
    "dogs": facts("dog"),
    "flowers": _published("flowers", "Oxford Flowers", 102, "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
    "food": facts("food101"),
    "imagenet": _published("imagenet", "ImageNet", 1000, "https://image-net.org"),
    "inat17": facts("inat2017"),
    "moe": _published(
        "moe", "Moeimouto", 173, "https://www.kaggle.com/datasets/mylesoneill/tagged-anime-illustrations"
    ),
    "nabirds": _published("nabirds", "NABirds", 555, "https://dl.allaboutbirds.org/nabirds"),
    "ncfm": _published("ncfm", "NCFM", 8, "https://www.kaggle.com/c/the-nature-conservancy-fisheries-monitoring"),
    "pets": _published("pets", "Oxford-IIIT Pet", 37, "https://www.robots.ox.ac.uk/~vgg/data/pets/"),
    "sketch": _published("sketch", "ImageNet-Sketch", 1000, "https://github.com/HaohanWang/ImageNet-Sketch"),
    "soy": facts("soyloc"),
    "vegfru": _published("vegfru", "VegFru", 292, "https://github.com/ustc-vim/vegfru"),
}


class Source:
    """OLD: what the functions below call, on DatasetFolder; goes with them.

    Attributes:
        images: the folder of the images, relative to `path`.
    """

    def __init__(self, dataset_name: str, root: str | Path, images: str) -> None:
        self.published = replace(PUBLISHED[dataset_name], folder=".", also=())
        self.folder = DatasetFolder(self.published, root, flag="--dataset_root_path")
        self.path, self.images = self.folder.path, images

    def damaged(self, where: Path, problem: str) -> UserError:
        return self.folder.wrong(where, problem)

    def names(self, relative: str, what: str) -> set[str]:
        if not (self.path / relative).is_dir():
            raise self.folder.wrong(relative, f"is not there, {what}")
        return set(os.listdir(self.path / relative))

    def pairs(self, file: str, what: str, form: str) -> list[tuple[int, str, str]]:
        return [(line, *pair) for line, pair in enumerate(self.folder.pairs(file), 1)]

    def mat(self, file: str, what: str, *variables: str) -> list[list[Any]]:
        return self.folder.mat(file, *variables)

    def json(self, file: str, what: str) -> Any:
        return self.folder.json(file)

    def label(self, file: str, place: str, image: str, value: object, classes: int) -> int:
        return DatasetFolder(replace(self.published, classes=classes), self.path).label(file, image, value)

    def require_unique(self, file: str, values: Iterable[Any], what: str) -> None:
        self.folder.require_unique(file, values)

    def require_images(self, file: str, folder: str, images: Sequence[str]) -> None:
        self.folder.require_images([f"{folder}/{image}" for image in images])


def _birds(tree: Source) -> Annotations:
    """CUB and NABirds, in the order of images.txt. NABirds uses 555 of its 1,011 classes: those are numbered."""
    path_of = _by_id(tree, "images.txt", "image-id path")
    name_of = _by_id(tree, "classes.txt", "class-id name")
    class_of = _by_id(tree, "image_class_labels.txt", "image-id class-id", path_of, set(name_of))
    part_of = _by_id(tree, "train_test_split.txt", "image-id 1 or 0", path_of, {"0", "1"})
    # By length first: "817" comes before "1010".
    used = sorted(set(class_of.values()), key=lambda class_id: (len(class_id), class_id))
    number = {class_id: position for position, class_id in enumerate(used)}
    rows: dict[str, list[Row]] = {"0": [], "1": []}
    for image_id, path in path_of.items():
        rows[part_of[image_id]].append((number[class_of[image_id]], path))
    return Annotations(rows["1"], rows["0"], {number[class_id]: name_of[class_id] for class_id in used})


def _by_id(
    tree: Source, file: str, form: str, path_of: dict[str, str] | None = None, allowed: set[str] | None = None
) -> dict[str, str]:
    """A list of `id value` lines, with the ids of `path_of`, and `allowed` values, where these are given."""
    pairs = tree.pairs(file, "an annotation file", form)
    tree.require_unique(file, (id_ for _, id_, _ in pairs), "the id")
    values = {id_: value for _, id_, value in pairs}
    odd = [] if path_of is None else sorted(path_of.keys() ^ values.keys())
    if odd:
        raise tree.damaged(tree.path / file, f"and images.txt do not list the same {len(odd):,} images ({odd[0]})")
    for id_, value in values.items():
        if allowed is not None and value not in allowed:
            raise tree.damaged(tree.path / file, f"gives the image {id_} {value!r} where `{form}` is expected")
    return values


def _aircraft(tree: Source) -> Annotations:
    """In the order of the official lists; the variants are numbered by their sorted names."""
    lists = [
        tree.pairs(f"data/images_variant_{part}.txt", f"the list of {part} images", "image-id variant")
        for part in ("trainval", "test")
    ]
    names = sorted({variant for pairs in lists for _, _, variant in pairs})
    number = {name: class_id for class_id, name in enumerate(names)}
    train_val, test = ([(number[variant], f"{image_id}.jpg") for _, image_id, variant in pairs] for pairs in lists)
    return Annotations(train_val, test, dict(enumerate(names)))


def _cars(tree: Source) -> Annotations:
    """In the order of cars_annos.mat; an entry of it begins with the path and ends with class and test flag."""
    file = "cars_annos.mat"
    annotations, names = tree.mat(file, "the annotation file", "annotations", "class_names")
    rows: dict[Any, list[Row]] = {0: [], 1: []}
    for position, entry in enumerate(annotations):
        path, *_, label, is_test = entry.values() if isinstance(entry, dict) and len(entry) > 2 else (None,) * 3
        if not isinstance(path, str) or not isinstance(is_test, int) or is_test not in rows:
            raise tree.damaged(tree.path / file, f"has no path, class and test flag in entry {position} of annotations")
        rows[is_test].append((tree.label(file, f"entry {position}", path, label, len(names)), path.rpartition("/")[2]))
    return Annotations(rows[0], rows[1], dict(enumerate(names)))


def _dogs(tree: Source) -> Annotations:
    """In the order of the .mat lists; classes are named by their folders."""
    lists: list[list[Row]] = []
    names: dict[int, str] = {}
    for file in ("train_list.mat", "test_list.mat"):
        images, labels = tree.mat(file, "an annotation file", "annotation_list", "labels")
        if len(images) != len(labels) or not _strings(images):
            raise tree.damaged(tree.path / file, "has no annotation_list of paths with a label for each")
        numbers = [
            tree.label(file, f"entry {position}", *pair, tree.published.classes)
            for position, pair in enumerate(zip(images, labels, strict=True))
        ]
        lists.append([(number, f"{image}.jpg") for number, image in zip(numbers, images, strict=True)])
        names |= {number: image.partition("/")[0] for number, image in zip(numbers, images, strict=True)}
    return Annotations(lists[0], lists[1], names)


def _pets(tree: Source) -> Annotations:
    """In the order of the lists, lines `image class-id ...`; a class is what its images' names begin with."""
    lists: list[list[Row]] = []
    names: dict[int, str] = {}
    for part in ("trainval", "test"):
        file = f"annotations/{part}.txt"
        pairs = tree.pairs(file, f"the list of {part} images", "image class-id species breed-id")
        rows = [
            (tree.label(file, f"line {line}", image, rest.split()[0], tree.published.classes), image)
            for line, image, rest in pairs
        ]
        lists.append([(number, f"{image}.jpg") for number, image in rows])
        names |= {number: image.rpartition("_")[0] for number, image in rows}
    return Annotations(lists[0], lists[1], names)


def _flowers(tree: Source) -> Annotations:
    """In the order of setid.mat: training, then validation; both together are train_val."""
    (labels,) = tree.mat("imagelabels.mat", "the list of labels", "labels")
    parts = tree.mat("setid.mat", "the list of splits", "trnid", "valid", "tstid")
    rows: list[list[Row]] = []
    for part in parts:
        for image_id in part:
            if not isinstance(image_id, int) or not 1 <= image_id <= len(labels):
                raise tree.damaged(
                    tree.path / "setid.mat", f"has the image {image_id!r}, which imagelabels.mat has not"
                )
        files = [(image_id - 1, f"image_{image_id:05d}.jpg") for image_id in part]
        classes = tree.published.classes
        rows.append(
            [(tree.label("imagelabels.mat", f"entry {at}", file, labels[at], classes), file) for at, file in files]
        )
    train, val, test = rows
    names = getattr(Flowers102, "classes", map(str, range(1, 103)))  # torchvision knows them from 0.22 on
    return Annotations(train + val, test, dict(enumerate(names)), len(train))


def _food(tree: Source) -> Annotations:
    """In the order of the .json lists, {class: [class/image, ...]}; the classes are numbered by their sorted names."""
    files = ("meta/train.json", "meta/test.json")
    lists = [tree.json(file, "an annotation file") for file in files]
    for file, content in zip(files, lists, strict=True):
        if not isinstance(content, dict) or not all(map(_strings, content.values())):
            raise tree.damaged(tree.path / file, "is not an object of class names and lists of images")
    names = sorted({name for content in lists for name in content})
    number = {name: class_id for class_id, name in enumerate(names)}
    train_val, test = (
        [(number[name], f"{image}.jpg") for name, images in content.items() for image in images] for content in lists
    )
    return Annotations(train_val, test, dict(enumerate(names)))


def _strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _inat17(tree: Source) -> Annotations:
    """In the order of `images`, joined with their annotations; categories are numbered by their ids."""
    lists: list[list[Row]] = []
    names: dict[int, str] = {}
    for file in ("train2017.json", "val2017.json"):
        content = tree.json(file, "an annotation file")
        categories = sorted((entry["id"], entry["name"]) for entry in content["categories"])
        number = {category: class_id for class_id, (category, _) in enumerate(categories)}
        category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        listed = [(entry["id"], entry["file_name"]) for entry in content["images"]]
        for image, _ in listed:
            if category_of.get(image) not in number:
                raise tree.damaged(tree.path / file, f"has no annotation of a known category for image {image}")
        rows = ((number[category_of[image]], name) for image, name in listed)
        lists.append([(class_id, name.removeprefix(f"{tree.images}/")) for class_id, name in rows])
        names |= {class_id: name for class_id, (_, name) in enumerate(categories)}
    return Annotations(lists[0], lists[1], names)


def _leaves(tree: Source) -> Annotations:
    """Cotton and Soy, whose files are named {class}_{number}_{train|test}.png, by class and number."""
    rows: dict[str, list[tuple[int, int, str]]] = {"train": [], "test": []}
    for file in tree.names(tree.images, "the folder of the images"):
        if match := re.fullmatch(r"(\d+)_(\d+)_(train|test)\.png", file):
            class_id = tree.label(tree.images, "its name", file, match[1], tree.published.classes)
            rows[match[3]].append((class_id, int(match[2]), file))
    if not rows["train"] or not rows["test"]:
        raise tree.damaged(tree.path / tree.images, "has not both images of the form 1_2_train.png and 1_2_test.png")
    train_val, test = ([(class_id, file) for class_id, _, file in sorted(part)] for part in rows.values())
    return Annotations(train_val, test, {number: str(number + 1) for number in range(tree.published.classes)})


# The data sets that say themselves what is for the test; the other PUBLISHED ones have a folder of images a class.
READERS: dict[str, Callable[[Source], Annotations]] = {
    "aircraft": _aircraft,
    "cars": _cars,
    "cotton": _leaves,
    "cub": _birds,
    "dogs": _dogs,
    "flowers": _flowers,
    "food": _food,
    "inat17": _inat17,
    "nabirds": _birds,
    "pets": _pets,
    "soy": _leaves,
}


def read_annotations(dataset_name: str, root: str | Path, images: str) -> Annotations:
    """What the files in `root` say of one of READERS; every image is listed once, and in the folder `images` there."""
    tree = Source(dataset_name, root, images)
    tree.names(".", "the folder of the data set")
    annotations = READERS[dataset_name](tree)
    listed = [image for _, image in annotations.train_val + annotations.test]
    if not annotations.train_val or not annotations.test:
        raise tree.damaged(tree.path, "has annotation files that list no image for training, or none for the test")
    tree.require_unique(".", listed, "the image")
    tree.names(images, "the folder of the images")
    tree.require_images(".", images, listed)
    used = {class_id for class_id, _ in annotations.train_val + annotations.test}
    return annotations._replace(names={class_id: annotations.names[class_id] for class_id in sorted(used)})
