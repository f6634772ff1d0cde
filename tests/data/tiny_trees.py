"""Data sets of a few images in the real layouts, written by plain code (not common.data.demo) for tests to damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import UserError


def sentence(error: UserError, *parts: object) -> str:
    """The error's message, after asserting that it is one line and holds all the parts."""
    text = str(error)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text, f"{part} is not in: {text}"
    return text


def write_image(path: Path, colour: tuple[int, int, int] = (200, 100, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)


def write_food(root: Path) -> Path:
    """Three classes; 2 train images and 1 test image each. The json does not list the classes alphabetically."""
    folder = root / "food-101"
    for split, numbers in (("train", (3, 1)), ("test", (2,))):
        listed = {name: [f"{name}/{number}" for number in numbers] for name in ("waffles", "apple_pie", "ramen")}
        (folder / "meta").mkdir(parents=True, exist_ok=True)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for ids in listed.values():
            for id_ in ids:
                write_image(folder / "images" / f"{id_}.jpg")
    return folder


AIRCRAFT_LISTS = {
    "train": "0000003 Cessna 172\n0000001 707-320\n",
    "val": "0000002 707-320\n0000005 Cessna 172\n",
    "trainval": "0000003 Cessna 172\n0000001 707-320\n0000002 707-320\n0000005 Cessna 172\n",
    "test": "0000004 707-320\n0000006 Cessna 172\n",
}


def write_aircraft(root: Path) -> Path:
    """Two variants, one of them with a space in its name; images 0000001 to 0000006."""
    data = root / "fgvc-aircraft-2013b" / "data"
    for number in range(1, 7):
        write_image(data / "images" / f"{number:07d}.jpg")
    (data / "variants.txt").write_text("707-320\nCessna 172\n")
    for split, text in AIRCRAFT_LISTS.items():
        (data / f"images_variant_{split}.txt").write_text(text)
    return data


def coco_annotations() -> dict[str, Any]:
    """Five images, one (77) without annotations; categories 2, 17, 90 out of order; "cat" has no image."""

    def box(id_: int, image: int, category: int) -> dict[str, Any]:
        side, crowd = float(id_), int(id_ == 30)
        place = {"bbox": [0.0, 0.0, side, side], "segmentation": [[0.0, 0.0, side, 0.0, side, side]]}
        return {"id": id_, "image_id": image, "category_id": category, "area": side * side, "iscrowd": crowd, **place}

    return {
        "images": [{"id": id_, "file_name": f"{id_:012d}.jpg"} for id_ in (900, 5, 77, 31, 8)],
        # First listed: 5 -> 90, 900 -> 2, 8 -> 2 (a crowd box), 31 -> 90; ids and areas would say otherwise.
        "annotations": [
            *(box(20, 5, 90), box(12, 900, 2), box(30, 8, 2), box(40, 5, 2)),
            *(box(3, 900, 90), box(11, 31, 90), box(1, 5, 2), box(9, 8, 90)),
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 2, "name": "bicycle"}, {"id": 17, "name": "cat"}],
    }


def write_coco(root: Path, content: Any = None) -> Path:
    """Both splits with the same content; returns the annotation file of val2017."""
    folder = root / "coco"
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train2017", "val2017"):
        annotations = folder / "annotations" / f"instances_{split}.json"
        annotations.write_text(json.dumps(coco_annotations() if content is None else content))
        for image in coco_annotations()["images"]:
            write_image(folder / split / image["file_name"])
    return annotations


# Damage, as functions of the folder.


def remove(relative: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / relative
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def overwrite(relative: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / relative).write_bytes(data) and None


def cut(relative: str, count: int) -> Callable[[Path], None]:
    """Takes the last bytes away."""

    def damage(folder: Path) -> None:
        path = folder / relative
        path.write_bytes(path.read_bytes()[:-count])

    return damage
