"""What the demo data are: scikit-learn's handwritten digits, written in the layout of each data set.

1,797 real images of 8 x 8 pixels (UCI "Optical Recognition of Handwritten Digits", test part), enlarged to
32 x 32.
"""

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Raised whenever a tree of the same name gets other content: older ones are then written anew.
DEMO_FORMAT = 2
SIZE = 32  # pixels
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# Of every 18 images of a class: how many go to train, val and test. About 1,300 / 200 / 300 images in all.
_TRAIN, _VAL, _CYCLE = 13, 2, 18

# COCO's ids have gaps; these do as well.
_CATEGORY_IDS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
_UNLABELLED_EVERY = 20  # one in so many COCO images has no annotation

Digit = tuple[Image.Image, int]


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


def _splits() -> Iterator[tuple[str, list[Digit]]]:
    """train and test, for data sets that have no official val: its images belong to train."""
    parts = _digits()
    yield "train", parts["train"] + parts["val"]
    yield "test", parts["test"]


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
    classes = sorted(CLASSES)
    (folder / "meta").mkdir(parents=True)
    for name in classes:
        (folder / "images" / name).mkdir(parents=True)
    number = 0
    for split, digits in _splits():
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
    (folder / "annotations").mkdir(parents=True)
    number = 0
    for split, (_, digits) in zip(("train2017", "val2017"), _splits(), strict=True):
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


def _write_cub(folder: Path) -> None:
    """images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/<class>/<name>.jpg.

    The ids, not the lines, join the lists: each of them has an order of its own.
    """
    classes = [f"{digit + 1:03d}.{name}" for digit, name in enumerate(CLASSES)]
    for name in classes:
        (folder / "images" / name).mkdir(parents=True)
    rows: list[tuple[int, str, int, int]] = []  # image id, path, class id, whether it is for training
    for split, digits in _splits():
        for image, digit in digits:
            image_id = (len(rows) + 1) * 7_919 % 9_973
            path = f"{classes[digit]}/{CLASSES[digit].capitalize()}_{image_id:04d}.jpg"
            _save(image, folder / "images" / path)
            rows.append((image_id, path, digit + 1, int(split == "train")))
    _write_lines(folder / "images.txt", [f"{image_id} {path}" for image_id, path, _, _ in rows])
    _write_lines(
        folder / "image_class_labels.txt", [f"{image_id} {class_id}" for image_id, _, class_id, _ in sorted(rows)]
    )
    _write_lines(folder / "train_test_split.txt", [f"{image_id} {train}" for image_id, _, _, train in reversed(rows)])
    _write_lines(folder / "classes.txt", [f"{class_id} {name}" for class_id, name in enumerate(classes, start=1)])


def _write_dog(folder: Path) -> None:
    """{train,test}_list.mat, Images/<class>/<class>_<number>.jpg."""
    classes = [f"n0208{digit}000-{name}" for digit, name in enumerate(CLASSES)]
    for name in classes:
        (folder / "Images" / name).mkdir(parents=True)
    number = 0
    for split, digits in _splits():
        ids = []
        for image, digit in digits:
            number += 1
            ids.append(f"{classes[digit]}/{classes[digit].partition('-')[0]}_{number}")
            _save(image, folder / "Images" / f"{ids[-1]}.jpg")
        lists = {
            "annotation_list": _cells(ids)[:, None],
            "file_list": _cells([f"{id_}.jpg" for id_ in ids])[:, None],
            "labels": np.array([[digit + 1] for _, digit in digits], dtype=np.float64),
        }
        _save_mat(folder / f"{split}_list.mat", lists)


def _write_car(folder: Path) -> None:
    """devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, cars_{train,test}/."""
    classes = sorted(CLASSES)
    (folder / "devkit").mkdir(parents=True)
    _save_mat(folder / "devkit/cars_meta.mat", {"class_names": _cells(classes)[None]})
    places = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, digits in _splits():
        (folder / f"cars_{split}").mkdir()
        fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        annotations = np.empty((1, len(digits)), dtype=fields)
        for position, (image, digit) in enumerate(digits):
            file = f"{position + 1:05d}.jpg"
            _save(image, folder / f"cars_{split}" / file)
            label = classes.index(CLASSES[digit]) + 1
            annotations[0, position] = (1, 1, SIZE, SIZE, label, file)
        _save_mat(folder / places[split], {"annotations": annotations})


def _save_mat(file: Path, variables: dict[str, np.ndarray]) -> None:
    from scipy.io import savemat  # here: readers do not need it

    savemat(file, variables, do_compression=True)  # as MATLAB does


def _cells(texts: list[str]) -> np.ndarray:
    """A MATLAB cell array of texts, without which savemat would pad them to one length."""
    cells = np.empty(len(texts), dtype=object)
    cells[:] = texts
    return cells


def _write_inat2017(folder: Path) -> None:
    """{train,val}2017.json, train_val_images/<kind>/<species>/<32 hexadecimal digits>.jpg."""
    folders = [f"train_val_images/{'Odd' if digit % 2 else 'Even'}/number {name}" for digit, name in enumerate(CLASSES)]
    for name in folders:
        (folder / name).mkdir(parents=True)
    number = 0
    for split, (_, digits) in zip(("train", "val"), _splits(), strict=True):
        images, annotations = [], []
        for image, digit in digits:
            number += 1
            file = f"{folders[digit]}/{number * 7_919:032x}.jpg"
            _save(image, folder / file)
            images.append({"id": number, "file_name": file, "width": SIZE, "height": SIZE})
            annotations.append({"id": number, "image_id": number, "category_id": digit})
        content = {
            "info": {"description": "handwritten digits in the layout of iNaturalist 2017"},
            "images": images,
            # In another order than the images, so that a reader has to join them.
            "annotations": annotations[::-1],
            "categories": [
                {"id": digit, "name": f"number {CLASSES[digit]}", "supercategory": "Odd" if digit % 2 else "Even"}
                for digit in (7, 2, 9, 0, 4, 1, 8, 5, 3, 6)
            ],
        }
        (folder / f"{split}2017.json").write_text(json.dumps(content), encoding="utf-8")


def _write_leaves(folder: Path) -> None:
    """anno/{train,test}.txt, images/<class>_<number>_{train,test}.png."""
    (folder / "anno").mkdir(parents=True)
    (folder / "images").mkdir()
    for split, digits in _splits():
        lines = []
        for position, (image, digit) in enumerate(digits):
            file = f"{digit + 1}_{position}_{split}.png"
            _save(image, folder / "images" / file)
            lines.append(f"{file} {digit + 1}")
        _write_lines(folder / "anno" / f"{split}.txt", lines)


def _write_cifar(folder: Path, batches: list[str], test: str, meta: str, prefix: str) -> None:
    """Pickled batches of pixels and labels, and the names of the classes; `prefix` is "fine_" in CIFAR-100."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = sorted(CLASSES)
    for split, digits in _splits():
        files = batches if split == "train" else [test]
        for position, file in enumerate(files):
            part = digits[position :: len(files)]
            content = {
                "batch_label": f"{split} batch {position + 1} of {len(files)}",
                # All red values of an image, then all green, then all blue ones.
                "data": np.stack([np.asarray(image).transpose(2, 0, 1).reshape(-1) for image, _ in part]),
                f"{prefix}labels": [classes.index(CLASSES[digit]) for _, digit in part],
            }
            _pickle(folder / file, content)
    _pickle(folder / meta, {f"{prefix}label_names": classes})


def _pickle(file: Path, content: dict[str, Any]) -> None:
    # Protocol 4 on every version: the reader allows the names that NumPy's arrays need there.
    file.write_bytes(pickle.dumps(content, protocol=4))


WRITERS: dict[str, Callable[[Path], None]] = {
    "air": _write_aircraft,
    "aircraft": _write_aircraft,
    "car": _write_car,
    "cifar10": partial(
        _write_cifar,
        batches=[f"data_batch_{number}" for number in range(1, 6)],
        test="test_batch",
        meta="batches.meta",
        prefix="",
    ),
    "cifar100": partial(_write_cifar, batches=["train"], test="test", meta="meta", prefix="fine_"),
    "coco": _write_coco,
    "cotton": _write_leaves,
    "cub": _write_cub,
    "dog": _write_dog,
    "food101": _write_food101,
    "inat2017": _write_inat2017,
    "soyloc": _write_leaves,
}
