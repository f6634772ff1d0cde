"""Tiny data sets in the real layouts, without the network: scikit-learn's handwritten digits as JPEG files.

1,797 real images of 8 x 8 pixels (UCI "Optical Recognition of Handwritten Digits", test part), enlarged to
32 x 32. The real readers read them, so that a demo run takes the same path as a real one.
"""

import errno
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.data.published import published
from common.data.tree import Tree
from common.errors import UserError

# Raised whenever a tree of the same name gets other content: older ones are then written anew.
DEMO_FORMAT = 2
MARKER = "demo.json"
SIZE = 32  # pixels
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# Of every 18 images of a class: how many go to train, val and test. About 1,300 / 200 / 300 images in all.
_TRAIN, _VAL, _CYCLE = 13, 2, 18

# COCO's ids have gaps; these do as well.
_CATEGORY_IDS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
_UNLABELLED_EVERY = 20  # one in so many COCO images has no annotation

Digit = tuple[Image.Image, int]


def write_demo(name: str, root: str | Path) -> None:
    """Writes the demo data of one data set below `root`, in its real layout.

    - aircraft: about 1,300 train, 200 val, 300 test images
    - food101: about 1,500 train, 300 test images
    - coco: the same, one in twenty of them without annotations

    A finished tree is left alone; one of another format version or with files missing is written anew. The
    tree is written beside its place and renamed, so that several processes may call this at once.

    Raises:
        UserError: other data is at that place (it is never overwritten), or the folder cannot be written.
    """
    tree = Tree(published(name), root)
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
        _WRITERS[name](temporary)
        sizes = {
            file.relative_to(temporary).as_posix(): file.stat().st_size
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        (temporary / MARKER).write_text(json.dumps({"format": DEMO_FORMAT, "files": sizes}), encoding="utf-8")
        _put_in_place(temporary, tree.path)
    except OSError as error:
        raise UserError(f"The demo data cannot be written to {tree.path} ({error.strerror}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_finished(folder: Path) -> bool:
    """Whether a folder is a demo tree of this version, with every file at its full size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["format"] != DEMO_FORMAT:
            return False
        return all((folder / file).stat().st_size == size for file, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


def _digits() -> dict[str, list[Digit]]:
    """The images and digits of train, val and test; each digit is spread evenly over the three."""
    from sklearn.datasets import load_digits  # here: it takes a second to import, and readers do not need it

    bunch = load_digits()
    parts: dict[str, list[Digit]] = {"train": [], "val": [], "test": []}
    seen: Counter[int] = Counter()
    for grey, target in zip(bunch.images, bunch.target, strict=True):  # grey: (8, 8), levels 0..16
        digit = int(target)
        pixels = np.round(grey * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
        turn = seen[digit] % _CYCLE
        seen[digit] += 1
        part = "train" if turn < _TRAIN else "val" if turn < _TRAIN + _VAL else "test"
        parts[part].append((image, digit))
    return parts


def _save(image: Image.Image, file: Path) -> None:
    image.save(file, quality=95)


def _write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_aircraft(folder: Path) -> None:
    """data/images/<7 digits>.jpg, data/variants.txt, data/images_variant_{train,val,trainval,test}.txt."""
    data = folder / "data"
    (data / "images").mkdir(parents=True)
    _write_lines(data / "variants.txt", sorted(CLASSES))
    number = 0
    lists: dict[str, list[str]] = {}
    for part, digits in _digits().items():
        lists[part] = []
        for image, digit in digits:
            number += 1
            # Spread over the seven digits: the real ids are not in the order of the lists either.
            image_id = f"{number * 7_919 % 9_999_991:07d}"
            _save(image, data / "images" / f"{image_id}.jpg")
            lists[part].append(f"{image_id} {CLASSES[digit]}")
    lists["trainval"] = lists["train"] + lists["val"]
    for part, lines in lists.items():
        _write_lines(data / f"images_variant_{part}.txt", lines)


def _write_food101(folder: Path) -> None:
    """images/<class>/<id>.jpg, meta/{train,test}.{json,txt}, meta/classes.txt, meta/labels.txt."""
    parts = _digits()
    classes = sorted(CLASSES)
    (folder / "meta").mkdir(parents=True)
    for name in classes:
        (folder / "images" / name).mkdir(parents=True)
    number = 0
    for split, digits in (("train", parts["train"] + parts["val"]), ("test", parts["test"])):
        listed: dict[str, list[str]] = {name: [] for name in classes}
        for image, digit in digits:
            number += 1
            image_id = f"{CLASSES[digit]}/{100_000 + number}"
            _save(image, folder / "images" / f"{image_id}.jpg")
            listed[CLASSES[digit]].append(image_id)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed), encoding="utf-8")
        _write_lines(folder / "meta" / f"{split}.txt", [id_ for ids in listed.values() for id_ in ids])
    _write_lines(folder / "meta/classes.txt", classes)
    _write_lines(folder / "meta/labels.txt", [name.capitalize() for name in classes])


def _write_coco(folder: Path) -> None:
    """annotations/instances_{train,val}2017.json, {train,val}2017/<12 digits>.jpg."""
    parts = _digits()
    (folder / "annotations").mkdir(parents=True)
    number = 0
    for split, digits in (("train2017", parts["train"] + parts["val"]), ("val2017", parts["test"])):
        (folder / split).mkdir()
        images: list[dict[str, Any]] = []
        labels: dict[int, int] = {}
        for position, (image, digit) in enumerate(digits):
            number += 1
            image_id = number * 7_919 % 581_929
            file_name = f"{image_id:012d}.jpg"
            _save(image, folder / split / file_name)
            images.append({"id": image_id, "file_name": file_name, "width": SIZE, "height": SIZE})
            if (position + 1) % _UNLABELLED_EVERY:
                labels[image_id] = digit
        content = {
            "info": {
                "description": "handwritten digits in the layout of COCO 2017",
                "version": str(DEMO_FORMAT),
            },
            "licenses": [],
            "images": images,
            "annotations": _annotations(labels),
            # Not in the order of their ids, so that a reader has to sort them.
            "categories": [
                {"id": _CATEGORY_IDS[digit], "name": CLASSES[digit], "supercategory": "digit"}
                for digit in (7, 2, 9, 0, 4, 1, 8, 5, 3, 6)
            ],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _annotations(labels: dict[int, int]) -> list[dict[str, Any]]:
    """The digit itself as the first annotation of each image, then decoys of other categories.

    Only the place in the file tells them apart: decoys have smaller ids and often larger boxes, images come
    in another order than in the list of images, and the annotations of one image are not side by side.
    """
    first = [(image_id, digit, SIZE // 2) for image_id, digit in reversed(labels.items())]
    second = [(image_id, (digit + 3) % 10, SIZE) for image_id, digit in labels.items()]
    third = [(image_id, (digit + 7) % 10, SIZE // 4) for image_id, digit in labels.items() if digit % 2]
    half = len(first) // 2
    # The first half of the images is complete before the second half begins.
    done = {image_id for image_id, _, _ in first[:half]}
    order = first[:half] + [box for box in second if box[0] in done] + first[half:]
    order += [box for box in second if box[0] not in done] + third
    return [
        {
            "id": 900_000 - position,
            "image_id": image_id,
            "category_id": _CATEGORY_IDS[digit],
            "bbox": [0, 0, side, side],
            "area": side * side,
            "iscrowd": 0,
            "segmentation": [[0, 0, side, 0, side, side, 0, side]],
        }
        for position, (image_id, digit, side) in enumerate(order)
    ]


_WRITERS: dict[str, Callable[[Path], None]] = {
    "aircraft": _write_aircraft,
    "coco": _write_coco,
    "food101": _write_food101,
}
