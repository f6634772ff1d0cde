"""Tiny data sets in the real layouts, without the network, so that a demo run takes the same path as a real one.

1,797 real images of handwritten digits, 8 x 8 pixels (UCI "Optical Recognition of Handwritten Digits", test part, from
scikit-learn), enlarged to 32 x 32.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from common.data.cifar import DEMO
from common.data.dataset_folder import DatasetFolder
from common.data.download import locked
from common.data.facts import facts
from common.errors import UserError

MARKER = "demo.json"
FORMAT = 3  # raised whenever a folder of the same name gets other content: older ones are then written anew
SIZE = 32  # pixels
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SORTED = sorted(CLASSES)
ORDER = (7, 2, 9, 0, 4, 1, 8, 5, 3, 6)  # of categories in JSON files: not that of their ids, so that readers must sort

Parts = dict[str, list[tuple[Image.Image, int]]]  # split -> images and digits


def write_demo(name: str, root: str | Path) -> None:
    """Writes the demo data of one data set below `root`, in its real layout.

    - aircraft: about 1,300 train, 200 val, 300 test images; air: the same files
    - coco: about 1,500 train, 300 test images, one in twenty of them without annotations
    - all others: about 1,500 train, 300 test images

    A finished folder is left alone; one of another format, or with files missing, is written anew. It is written
    beside its place and renamed. Several processes may call this at once.

    Raises:
        UserError: other data is at that place (it is never overwritten), or the folder cannot be written.
    """
    folder = DatasetFolder(facts(name), root)
    name, path = folder.facts.name, folder.path
    if is_finished(path):
        return
    temporary = folder.root / f".demo-{name}"
    with locked(temporary):
        if is_finished(path):  # by the process that was waited for
            return
        if path.exists() and os.listdir(path) and not (path / MARKER).exists():
            raise UserError(f"{path} holds other data, which the demo would replace: name another --data-root")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        WRITERS[name](temporary, _digits(official_val=name.startswith("air")))
        files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
        sizes = {file.relative_to(temporary).as_posix(): file.stat().st_size for file in files}
        _write(temporary / MARKER, {"format": FORMAT, "files": sizes})
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)


def is_finished(path: Path) -> bool:
    """Whether a folder is a demo of this format, with every file at its full size."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        sizes = marker["files"] if marker["format"] == FORMAT else {"": -1}
        return all((path / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _digits(official_val: bool) -> Parts:
    """train, val and test; of every 18 images of a digit 13 go to train, 2 to val (else to train too), 3 to test."""
    from sklearn.datasets import load_digits  # here: it takes a second to import, and readers do not need it

    bunch = load_digits()
    parts: Parts = {"train": [], "val": [], "test": []}
    seen = [0] * 10
    for grey, target in zip(bunch.images, bunch.target, strict=True):  # grey: (8, 8), levels 0..16
        pixels = np.round(grey * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
        turn, digit = seen[target] % 18, int(target)
        seen[target] += 1
        parts["train" if turn < 13 else "val" if turn < 15 else "test"].append((image, digit))
    return parts if official_val else {"train": parts["train"] + parts["val"], "test": parts["test"]}


def _save(folder: Path, parts: Parts, place: Callable[[str, int, int, int], str]) -> dict[str, list[tuple[str, int]]]:
    """Saves the images; returns split -> files and digits. `place`: split, number (of all), position, digit -> file."""
    saved: dict[str, list[tuple[str, int]]] = {split: [] for split in parts}
    number = 0
    for split, digits in parts.items():
        for position, (image, digit) in enumerate(digits):
            number += 1
            file = place(split, number, position, digit)
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / file, quality=95)
            saved[split].append((file, digit))
    return saved


def _write(file: Path, content: Any) -> None:
    """Lines, or anything else as JSON, or (.mat) variables of a MATLAB file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".mat":
        savemat(file, content, do_compression=True)  # as MATLAB does
    else:
        file.write_text("\n".join([*content, ""]) if file.suffix == ".txt" else json.dumps(content), encoding="utf-8")


def _aircraft(folder: Path, parts: Parts) -> None:
    # The real ids are not in the order of the lists either.
    saved = _save(folder, parts, lambda _, number, *__: f"data/images/{number * 7_919 % 9_999_991:07d}.jpg")
    saved["trainval"] = saved["train"] + saved["val"]
    for part, rows in saved.items():
        lines = [f"{Path(file).stem} {CLASSES[digit]}" for file, digit in rows]
        _write(folder / f"data/images_variant_{part}.txt", lines)
    _write(folder / "data/variants.txt", SORTED)


def _food101(folder: Path, parts: Parts) -> None:
    saved = _save(folder, parts, lambda _, number, __, digit: f"images/{CLASSES[digit]}/{100_000 + number}.jpg")
    for split, rows in saved.items():
        images = [(CLASSES[digit], f"{CLASSES[digit]}/{Path(file).stem}") for file, digit in rows]
        _write(folder / f"meta/{split}.txt", [id_ for name in SORTED for own, id_ in images if own == name])
        _write(folder / f"meta/{split}.json", {name: [id_ for own, id_ in images if own == name] for name in SORTED})


def _coco(folder: Path, parts: Parts) -> None:
    categories = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]  # with gaps, as COCO's
    parts = {"train2017": parts["train"], "val2017": parts["test"]}
    saved = _save(folder, parts, lambda split, number, *_: f"{split}/{number * 7_919 % 581_929:012d}.jpg")
    for split, rows in saved.items():
        digits = {int(Path(file).stem): digit for file, digit in rows}
        images = [{"id": id_, "file_name": f"{id_:012d}.jpg", "width": SIZE, "height": SIZE} for id_ in digits]
        labels = {
            id_: digit for number, (id_, digit) in enumerate(digits.items(), 1) if number % 20
        }  # the others: none
        # The digit itself comes first of an image's annotations. Only the place in the file tells it from the others:
        # these have smaller ids and often larger boxes, and an image's annotations are not side by side.
        first = [(id_, digit, SIZE // 2) for id_, digit in reversed(labels.items())]
        second = [(id_, (digit + 3) % 10, SIZE) for id_, digit in labels.items()]
        third = [(id_, (digit + 7) % 10, SIZE // 4) for id_, digit in labels.items() if digit % 2]
        half = len(first) // 2
        done = {id_ for id_, _, _ in first[:half]}
        boxes = first[:half] + [box for box in second if box[0] in done] + first[half:]
        boxes += [box for box in second if box[0] not in done] + third
        annotations = [
            dict(id=900_000 - position, image_id=id_, category_id=categories[digit], area=side * side, iscrowd=0)
            | dict(bbox=[0, 0, side, side], segmentation=[[0, 0, side, 0, side, side, 0, side]])
            for position, (id_, digit, side) in enumerate(boxes)
        ]
        named = [{"id": categories[digit], "name": CLASSES[digit], "supercategory": "digit"} for digit in ORDER]
        content = {"images": images, "annotations": annotations, "categories": named}
        _write(folder / f"annotations/instances_{split}.json", content)


def _cub(folder: Path, parts: Parts) -> None:
    """The ids, not the lines, join the lists: each of them has an order of its own."""
    classes = [f"{digit + 1:03d}.{name}" for digit, name in enumerate(CLASSES)]

    def place(_: str, number: int, __: int, digit: int) -> str:
        return f"images/{classes[digit]}/{CLASSES[digit].capitalize()}_{number * 7_919 % 9_973:04d}.jpg"

    saved = _save(folder, parts, place)
    rows = [(int(file[-8:-4]), file, digit, split) for split, files in saved.items() for file, digit in files]
    _write(folder / "images.txt", [f"{id_} {file.removeprefix('images/')}" for id_, file, _, _ in rows])
    _write(folder / "image_class_labels.txt", [f"{id_} {digit + 1}" for id_, _, digit, _ in sorted(rows)])
    _write(folder / "train_test_split.txt", [f"{id_} {int(split == 'train')}" for id_, _, _, split in reversed(rows)])
    _write(folder / "classes.txt", [f"{number} {name}" for number, name in enumerate(classes, start=1)])


def _dog(folder: Path, parts: Parts) -> None:
    def place(_: str, number: int, __: int, digit: int) -> str:
        return f"Images/n0208{digit}000-{CLASSES[digit]}/n0208{digit}000_{number}.jpg"

    for split, rows in _save(folder, parts, place).items():
        files = [file.removeprefix("Images/") for file, _ in rows]
        lists = {"annotation_list": _cells([file.removesuffix(".jpg") for file in files]), "file_list": _cells(files)}
        _write(folder / f"{split}_list.mat", lists | {"labels": np.array([[digit + 1.0] for _, digit in rows])})


def _car(folder: Path, parts: Parts) -> None:
    _write(folder / "devkit/cars_meta.mat", {"class_names": _cells(SORTED).T})
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for split, rows in _save(folder, parts, lambda split, _, at, __: f"cars_{split}/{at + 1:05d}.jpg").items():
        annotations = np.empty((1, len(rows)), dtype=fields)
        for position, (file, digit) in enumerate(rows):
            annotations[0, position] = (1, 1, SIZE, SIZE, SORTED.index(CLASSES[digit]) + 1, Path(file).name)
        place = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        _write(folder / place, {"annotations": annotations})


def _cells(texts: list[str]) -> np.ndarray:
    """A column of MATLAB cells, without which savemat would pad the texts to one length."""
    cells = np.empty((len(texts), 1), dtype=object)
    cells[:, 0] = texts
    return cells


def _inat2017(folder: Path, parts: Parts) -> None:
    kinds = ["Odd" if digit % 2 else "Even" for digit in range(10)]

    def place(_: str, number: int, __: int, digit: int) -> str:
        return f"train_val_images/{kinds[digit]}/number {CLASSES[digit]}/{number * 7_919:032x}.jpg"

    saved = _save(folder, {"train": parts["train"], "val": parts["test"]}, place)
    for split, files in saved.items():
        rows = [(int(Path(file).stem, 16) // 7_919, file, digit) for file, digit in files]
        images = [{"id": id_, "file_name": file, "width": SIZE, "height": SIZE} for id_, file, _ in rows]
        annotations = [{"id": id_, "image_id": id_, "category_id": digit} for id_, _, digit in rows]
        named = [{"id": n, "name": f"number {CLASSES[n]}", "supercategory": kinds[n]} for n in ORDER]
        # Annotations in another order than the images, so that a reader has to join them.
        content = {"images": images, "annotations": annotations[::-1], "categories": named}
        _write(folder / f"{split}2017.json", content)


def _leaves(folder: Path, parts: Parts) -> None:
    saved = _save(folder, parts, lambda split, _, position, digit: f"images/{digit + 1}_{position}_{split}.png")
    for split, rows in saved.items():
        _write(folder / f"anno/{split}.txt", [f"{Path(file).name} {digit + 1}" for file, digit in rows])


def _cifar(folder: Path, parts: Parts, batches: int = 1) -> None:
    for split, part in parts.items():
        files = batches if split == "train" else 1  # as if read from so many, which got the images by turns
        digits = [pair for first in range(files) for pair in part[first::files]]
        data = np.stack([np.asarray(image) for image, _ in digits])
        labels = [SORTED.index(CLASSES[digit]) for _, digit in digits]
        np.savez_compressed(folder / DEMO.format(split), data=data, labels=labels, classes=SORTED)


WRITERS: dict[str, Callable[[Path, Parts], None]] = {
    **dict(
        air=_aircraft, aircraft=_aircraft, car=_car, cifar10=partial(_cifar, batches=5), cifar100=_cifar, coco=_coco
    ),
    **dict(cotton=_leaves, cub=_cub, dog=_dog, food101=_food101, inat2017=_inat2017, soyloc=_leaves),
}
