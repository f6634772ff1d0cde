"""The demo data: real layouts, sensible splits, written once, never over other data."""

import itertools
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tiny_trees import sentence, write_food

from common import data as readers
from common.data import air, aircraft, coco, write_demo
from common.data.demo import CLASSES, FORMAT, MARKER, SIZE, is_finished
from common.data.facts import data_sets
from common.errors import UserError

SPLITS = {name: tuple(facts.counts) for name, facts in data_sets().items()} | {
    "air": ("train", "test"),
    "aircraft": ("train", "val", "test"),
}


def digit_of(class_name: str) -> int:
    """The digit that a class of any demo data set is named after: "seven", "008.seven", "8" (labels from 1)."""
    word = class_name.replace(".", " ").replace("-", " ").split()[-1]
    return int(word) - 1 if word.isdecimal() else CLASSES.index(word)


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_large_enough_balanced_and_disjoint(demo_root: Path, name: str) -> None:
    sets = [getattr(readers, name)(demo_root, split) for split in SPLITS[name]]
    assert 1290 <= len(sets[0]) <= 1510
    assert 270 <= len(sets[-1]) <= 300
    for images in sets:
        assert sorted(map(digit_of, images.classes)) == list(range(10))
        counts = Counter(images.labels).values()
        assert len(counts) == 10
        assert max(counts) <= 1.25 * min(counts)
    assert sum(len(images) for images in sets) == len({id_ for images in sets for id_ in images.ids})


def test_all_digits_are_used_once(demo_root: Path) -> None:
    for name in set(data_sets()) - {"aircraft", "coco"}:
        assert sum(len(getattr(readers, name)(demo_root, split)) for split in SPLITS[name]) == 1797
    assert sum(len(aircraft(demo_root, split)) for split in ("trainval", "test")) == 1797
    assert set(aircraft(demo_root, "trainval").ids) == {
        id_ for split in ("train", "val") for id_ in aircraft(demo_root, split).ids
    }


@pytest.mark.parametrize("name", SPLITS)
def test_pictures_show_the_digit_of_their_label(demo_root: Path, name: str) -> None:
    """Shrunk to 8 x 8 again, each picture is nearest to an original digit of its own class."""
    bunch = load_digits()
    originals = bunch.data * (255 / 16)  # (1797, 64)
    images = getattr(readers, name)(demo_root, SPLITS[name][-1])
    for index in range(0, len(images), 23):
        image, label = images[index]
        assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
        pixels = np.asarray(image.resize((8, 8)).convert("L"), dtype=float).reshape(1, 64)
        nearest = int(((originals - pixels) ** 2).sum(1).argmin())
        assert digit_of(images.classes[label]) == bunch.target[nearest]


@pytest.mark.parametrize("split", SPLITS["coco"])
def test_coco_tests_every_part_of_the_label_rule(demo_root: Path, split: str) -> None:
    content = json.loads((demo_root / f"coco/annotations/instances_{split}.json").read_text())
    category_ids = [category["id"] for category in content["categories"]]
    assert category_ids != sorted(category_ids)
    assert sorted(category_ids) != list(range(1, 11))
    boxes: dict[int, list[dict[str, int]]] = {}
    for box in content["annotations"]:
        boxes.setdefault(box["image_id"], []).append(box)
    assert all(len({box["category_id"] for box in of_image}) == len(of_image) >= 2 for of_image in boxes.values())
    assert all(of_image[0]["id"] == max(box["id"] for box in of_image) for of_image in boxes.values())
    assert all(of_image[0]["area"] < max(box["area"] for box in of_image) for of_image in boxes.values())
    order = [box["image_id"] for box in content["annotations"]]
    assert sum(a == b for a, b in itertools.pairwise(order)) < 5
    without = {image["id"] for image in content["images"]} - set(boxes)
    assert len(without) > 10
    assert list(boxes) != [image["id"] for image in content["images"] if image["id"] in boxes]
    files = set(os.listdir(demo_root / "coco" / split))
    assert files == {image["file_name"] for image in content["images"]}
    images = coco(demo_root, split)
    assert set(images.ids) == {str(id_) for id_ in boxes}
    assert images.classes == CLASSES


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_folder_is_left_alone_and_content_is_reproducible(demo_root: Path, tmp_path: Path) -> None:
    write_demo("food101", tmp_path)
    first = content(tmp_path / "food-101")
    write_demo("FOOD101", tmp_path)
    assert content(tmp_path / "food-101") == first
    of_all = content(demo_root / "food-101")
    assert {name: data for name, (_, data) in first.items()} == {name: data for name, (_, data) in of_all.items()}


@pytest.mark.parametrize("damage", ["file missing", "file cut", "older format", "marker cut"])
def test_an_unfinished_folder_is_written_anew(tmp_path: Path, damage: str) -> None:
    write_demo("cotton", tmp_path)
    folder = tmp_path / "cotton"
    image, marker = min((folder / "images").iterdir()), folder / MARKER
    if damage == "file missing":
        image.unlink()
    elif damage == "file cut":
        image.write_bytes(image.read_bytes()[:100])
    elif damage == "older format":
        marker.write_text(marker.read_text().replace(f'"format": {FORMAT}', '"format": 0'))
    else:
        marker.write_text(marker.read_text()[:50])
    assert not is_finished(folder)
    write_demo("cotton", tmp_path)
    assert is_finished(folder)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["cotton"]


def test_other_data_is_never_overwritten(tmp_path: Path) -> None:
    folder = write_food(tmp_path)
    before = content(folder)
    with pytest.raises(UserError) as caught:
        write_demo("food101", tmp_path)
    sentence(caught.value, folder, "holds other data", "--data-root")
    assert content(folder) == before


def test_the_real_archive_is_never_hidden_by_a_demo(tmp_path: Path) -> None:
    write_demo("aircraft", tmp_path)
    write_demo("air", tmp_path)  # the same files will do
    assert not (tmp_path / "air").exists()
    assert len(air(tmp_path, "test")) > 250
    (tmp_path / "fgvc-aircraft-2013b" / MARKER).unlink()
    with pytest.raises(UserError) as caught:
        write_demo("air", tmp_path)
    sentence(caught.value, tmp_path / "fgvc-aircraft-2013b", "holds other data")


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # a fresh interpreter would spend seconds on imports
    processes = [context.Process(target=write_demo, args=("aircraft", tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert is_finished(tmp_path / "fgvc-aircraft-2013b")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        write_demo("food101", tmp_path / "file")
    sentence(caught.value, tmp_path / "file")


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_demo("imagenet", tmp_path)
    sentence(caught.value, "'imagenet'", ", ".join(sorted(data_sets())))
