"""The data sets of GLSim as their authors' archives unpack: annotation files for given rows, and empty images.

Written from the figures recorded of the released readers, or from published csv files, whose rows they are given.
"""

import csv
import io
import json
import os
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

Row = tuple[int, str]  # class id, image
ROOT = Path(__file__).parents[2]
GOLDEN: dict[str, Any] = json.loads((ROOT / "tests/golden/datasets_glsim.json").read_text())


def rows_of(text: str) -> list[Row]:
    header, *rows = csv.reader(io.StringIO(text))
    assert header[0] == "class_id"
    return [(int(class_id), value) for class_id, value in rows]


def text_of(rows: list[Row], value: str = "dir") -> str:
    return f"class_id,{value}\n" + "".join(f"{class_id},{image}\n" for class_id, image in rows)


def touch(folder: Path, *lists: list[Row]) -> None:
    """Empty files, all of them one file with many names: 12,000 take a second."""
    for parent in {(folder / image).parent for _, image in chain(*lists)}:
        parent.mkdir(parents=True, exist_ok=True)
    source = folder / ".empty"
    source.touch()
    for _, image in chain(*lists):
        os.link(source, folder / image)
    source.unlink()


def write_lines(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def mixed(train_val: list[Row], test: list[Row]) -> list[tuple[Row, bool]]:
    """Each row and whether it is for training, by turns: each list keeps its own order."""
    turns = zip_longest([(row, True) for row in train_val], [(row, False) for row in test])
    return [row for row in chain(*turns) if row is not None]


def cells(texts: list[str]) -> np.ndarray:
    """As a MATLAB cell array."""
    array = np.empty((len(texts), 1), dtype=object)
    array[:, 0] = texts
    return array


def write_birds(root: Path, train_val: list[Row], test: list[Row], names: dict[int, str]) -> None:
    """Every list in another order of ids; `names` by the ids of the file, which are those of the rows."""
    touch(root / "images", train_val, test)
    rows = [(position * 7919 % 99991, row, train) for position, (row, train) in enumerate(mixed(train_val, test), 1)]
    write_lines(root / "images.txt", [f"{id_} {image}" for id_, (_, image), _ in rows])
    labels = sorted(f"{id_} {class_id}" for id_, (class_id, _), _ in rows)
    write_lines(root / "image_class_labels.txt", labels)
    write_lines(root / "train_test_split.txt", [f"{id_} {int(train)}" for id_, _, train in reversed(rows)])
    write_lines(root / "classes.txt", [f"{class_id} {name}" for class_id, name in sorted(names.items(), reverse=True)])


def write_cub(root: Path, train_val: list[Row], test: list[Row]) -> None:
    one_based = [[(class_id + 1, image) for class_id, image in rows] for rows in (train_val, test)]
    write_birds(root, *one_based, {class_id: image.partition("/")[0] for class_id, image in chain(*one_based)})


BIRDS = {0: "Birds", 295: "Common Eider", 645: "Some Bird (Male)", 700: "Not Used"}
BIRDS |= {817: "Oak Titmouse", 1010: "Dark-eyed Junco"}


def write_nabirds(root: Path, train_val: list[Row], test: list[Row]) -> None:
    """The classes are the numbers of the folders; two of `BIRDS` have no image."""
    original = [[(int(image.partition("/")[0]), image) for _, image in rows] for rows in (train_val, test)]
    write_birds(root, *original, BIRDS)


def write_aircraft(root: Path, train_val: list[Row], test: list[Row]) -> None:
    touch(root / "data/images", train_val, test)
    for part, rows in (("trainval", train_val), ("test", test)):
        lines = [f"{image.removesuffix('.jpg')} Variant {class_id:03d}" for class_id, image in rows]
        write_lines(root / f"data/images_variant_{part}.txt", lines)


def write_cars(root: Path, train_val: list[Row], test: list[Row]) -> None:
    touch(root / "car_ims", train_val, test)
    rows = mixed(train_val, test)
    fields = [(name, object) for name in ("relative_im_path", "bbox_x1", "bbox_y1", "class", "test")]
    annotations = np.empty((1, len(rows)), dtype=fields)
    for position, ((class_id, image), train) in enumerate(rows):
        annotations[0, position] = (f"car_ims/{image}", 1, 2, class_id + 1, int(not train))
    names = cells([f"Make {number:03d} Sedan 2012" for number in range(196)]).T
    savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": names}, do_compression=True)


def write_dogs(root: Path, train_val: list[Row], test: list[Row]) -> None:
    touch(root / "Images", train_val, test)
    for part, rows in (("train", train_val), ("test", test)):
        variables = {
            "file_list": cells([image for _, image in rows]),
            "annotation_list": cells([image.removesuffix(".jpg") for _, image in rows]),
            "labels": np.array([[class_id + 1] for class_id, _ in rows], dtype=np.uint8),
        }
        savemat(root / f"{part}_list.mat", variables, do_compression=True)


def write_pets(root: Path, train_val: list[Row], test: list[Row]) -> None:
    touch(root / "images", train_val, test)
    for part, rows in (("trainval", train_val), ("test", test)):
        lines = [f"{image.removesuffix('.jpg')} {class_id + 1} 1 9" for class_id, image in rows]
        write_lines(root / f"annotations/{part}.txt", lines)


def write_flowers(root: Path, train_val: list[Row], test: list[Row]) -> None:
    """The first half of train_val is for training, as in the original."""
    touch(root / "jpg", train_val, test)
    numbers = [[int(image[6:11]) for _, image in rows] for rows in (train_val, test)]
    labels = np.ones((1, max(chain(*numbers))), dtype=np.uint8)
    for class_id, image in train_val + test:
        labels[0, int(image[6:11]) - 1] = class_id + 1
    half = len(train_val) // 2
    parts = {"trnid": numbers[0][:half], "valid": numbers[0][half:], "tstid": numbers[1]}
    savemat(root / "imagelabels.mat", {"labels": labels})
    savemat(root / "setid.mat", {name: np.array([part], dtype=np.uint16) for name, part in parts.items()})


def write_food(root: Path, train_val: list[Row], test: list[Row]) -> None:
    touch(root / "images", train_val, test)
    (root / "meta").mkdir()
    for part, rows in (("train", train_val), ("test", test)):
        content: dict[str, list[str]] = {}
        for _, image in rows:
            content.setdefault(image.partition("/")[0], []).append(image.removesuffix(".jpg"))
        (root / f"meta/{part}.json").write_text(json.dumps(content))


def write_inat17(root: Path, train_val: list[Row], test: list[Row]) -> None:
    """5,089 categories; neither they nor the annotations are in the order of their ids."""
    touch(root / "train_val_images", train_val, test)
    for part, rows in (("train", train_val), ("val", test)):
        content = {
            "images": [
                {"id": number, "file_name": f"train_val_images/{image}"} for number, (_, image) in enumerate(rows, 100)
            ],
            "annotations": [
                {"id": number, "image_id": number, "category_id": class_id}
                for number, (class_id, _) in reversed([*enumerate(rows, 100)])
            ],
            "categories": [{"id": number, "name": f"species {number}"} for number in reversed(range(5089))],
        }
        (root / f"{part}2017.json").write_text(json.dumps(content))


def write_cotton(root: Path, train_val: list[Row], test: list[Row]) -> None:
    touch(root / "cotton_square_new", train_val, test)
    (root / "cotton_square_new/Thumbs.db").touch()


def write_soy(root: Path, train_val: list[Row], test: list[Row]) -> None:
    touch(root / "soybean200_square", train_val, test)


WRITERS = {
    **{"aircraft": write_aircraft, "cars": write_cars, "cotton": write_cotton, "cub": write_cub, "dogs": write_dogs},
    **{"flowers": write_flowers, "food": write_food, "inat17": write_inat17, "nabirds": write_nabirds},
    **{"pets": write_pets, "soy": write_soy},
}


def recorded(name: str) -> tuple[list[Row], list[Row]]:
    """The rows of train_val and test that are right: those of the released code, but for the numbers of classes."""
    train_val, test = (rows_of(GOLDEN[name][file]) for file in ("train_val.csv", "test.csv"))
    if name == "flowers":
        train_val, test = ([(class_id - 1, image) for class_id, image in rows] for rows in (train_val, test))
    if name == "nabirds":
        number = {original: position for position, original in enumerate((295, 645, 817, 1010))}
        train_val, test = ([(number[int(image[:4])], image) for _, image in rows] for rows in (train_val, test))
    return train_val, test


def write_recorded(name: str, root: Path) -> None:
    root.mkdir()
    WRITERS[name](root, *recorded(name))
