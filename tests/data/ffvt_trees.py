"""The data sets that FFVT adds, as the fixtures of tests/golden/datasets_ffvt.json: a few images in the real layouts.

Written from the figures recorded of the released readers, whose paths and labels they are.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from parity.figures import golden
from PIL import Image
from scipy.io import savemat

GOLDEN = golden("datasets_ffvt")


def save(path: Path, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (12, 10), "orange" if mode.startswith("RGB") else 100).save(path)


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cells(texts: list[str]) -> np.ndarray:
    """As a MATLAB cell array."""
    array = np.empty((len(texts), 1), dtype=object)
    array[:, 0] = texts
    return array


def write_cub(root: Path) -> Path:
    """Six images, the fifth of them grey, for training and testing by turns as recorded."""
    folder = root / "CUB"
    rows = [
        (path, label + 1, int(split == "train")) for split in ("train", "test") for path, label in GOLDEN["cub"][split]
    ]
    rows.sort()
    for number, (path, _, _) in enumerate(rows, start=1):
        save(folder / "images" / path, "L" if number == 5 else "RGB")
    write_lines(folder / "images.txt", *(f"{n} {path}" for n, (path, _, _) in enumerate(rows, start=1)))
    write_lines(folder / "image_class_labels.txt", *(f"{n} {label}" for n, (_, label, _) in enumerate(rows, start=1)))
    write_lines(folder / "train_test_split.txt", *(f"{n} {train}" for n, (_, _, train) in enumerate(rows, start=1)))
    write_lines(folder / "classes.txt", "1 001.Black", "2 002.Laysan", "3 010.Red")
    return folder


def write_dog(root: Path) -> Path:
    folder = root / "dog"
    for split, rows in ((split, GOLDEN["dog"][split]) for split in ("train", "test")):
        for path, _ in rows:
            save(folder / "Images" / path)
        write_dog_list(folder, split, [(path.removesuffix(".jpg"), label + 1) for path, label in rows])
    return folder


def write_dog_list(folder: Path, split: str, rows: list[tuple[Any, Any]], **changes: Any) -> None:
    """A list of (annotation, label); `changes` replaces variables, None takes them away."""
    variables: dict[str, Any] = {
        "file_list": cells([f"{name}.jpg" for name, _ in rows]),
        "annotation_list": cells([name for name, _ in rows]),
        "labels": np.array([[label] for _, label in rows], dtype=np.uint8),
    }
    variables = {name: value for name, value in (variables | changes).items() if value is not None}
    savemat(folder / f"{split}_list.mat", variables, do_compression=True)


def write_car(root: Path) -> Path:
    folder = root / "car"
    (folder / "devkit").mkdir(parents=True)
    names = cells([f"Make {number:03d} Sedan 2012" for number in range(196)])
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names.T}, do_compression=True)
    for split, list_file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        for path, _ in GOLDEN["car"][split]:
            save(folder / f"cars_{split}" / path)
        write_car_list(folder / list_file, [(path, label + 1) for path, label in GOLDEN["car"][split]])
    return folder


def write_car_list(file: Path, rows: list[tuple[Any, Any]], label_field: str = "class") -> None:
    """A list of (file name, label); boxes come first, as in the real one."""
    fields = [(name, object) for name in ("bbox_x1", "bbox_x2", label_field, "fname")]
    annotations = np.empty((1, len(rows)), dtype=fields)
    for position, (name, label) in enumerate(rows):
        annotations[0, position] = (1, 9, label, name)
    savemat(file, {"annotations": annotations}, do_compression=True)


def inat_content(split: str) -> dict[str, Any]:
    """5,089 categories; neither they nor the annotations are in the order of their ids."""
    rows = list(enumerate(GOLDEN["inat2017"][split], start=100))
    return {
        "images": [{"id": id_, "file_name": path, "width": 12, "height": 10} for id_, (path, _) in rows],
        "annotations": [{"id": id_, "image_id": id_, "category_id": label} for id_, (_, label) in reversed(rows)],
        "categories": [{"id": id_, "name": f"species {id_}"} for id_ in reversed(range(5089))],
    }


def write_inat(root: Path) -> Path:
    folder = root / "INat2017"
    for split in ("train", "val"):
        for path, _ in GOLDEN["inat2017"][split]:
            save(folder / path)
        (folder / f"{split}2017.json").write_text(json.dumps(inat_content(split)))
    return folder


def write_leaves(root: Path, name: str = "cotton") -> Path:
    """The first image of each list has an alpha channel."""
    folder = root / name
    for split in ("train", "test"):
        rows = GOLDEN[name][split]
        for position, (path, _) in enumerate(rows):
            save(folder / "images" / path, "RGB" if position else "RGBA")
        write_lines(folder / f"anno/{split}.txt", *(f"{path} {label + 1}" for path, label in rows))
    return folder


def write_soyloc(root: Path) -> Path:
    return write_leaves(root, "soyloc")


VARIANTS = [f"Variant {number:03d}" for number in range(100)]


def write_air(root: Path) -> Path:
    """FFVT's own lists, the variants, and no official list."""
    data = root / "air/data"
    for split in ("train", "test"):
        rows = GOLDEN["air"][split]
        for path, _ in rows:
            save(root / path)
        write_lines(data / f"{split}.txt", *(f"{Path(path).name} {label + 1}" for path, label in rows))
    write_lines(data / "variants.txt", *VARIANTS)
    return data.parent


WRITERS: dict[str, Callable[[Path], Path]] = {
    "air": write_air,
    "car": write_car,
    "cotton": write_leaves,
    "cub": write_cub,
    "dog": write_dog,
    "inat2017": write_inat,
    "soyloc": write_soyloc,
}
