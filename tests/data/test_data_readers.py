"""Aircraft and Food-101: against torchvision's own data sets and plain loops; every kind of missing or damaged file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_trees import AIRCRAFT_LISTS, empty_folder, overwrite, remove, sentence, write_aircraft, write_food
from torchvision.datasets import FGVCAircraft, Food101

from common.data import Images, aircraft, food101
from common.errors import UserError


def test_food_by_hand(tmp_path: Path) -> None:
    folder = write_food(tmp_path)
    images = food101(tmp_path, "train")
    assert images.classes == ["apple_pie", "ramen", "waffles"]
    assert images.ids == ["waffles/3", "waffles/1", "apple_pie/3", "apple_pie/1", "ramen/3", "ramen/1"]
    assert images.labels == [2, 2, 0, 0, 1, 1]
    assert images.paths == [folder / "images" / f"{id_}.jpg" for id_ in images.ids]
    assert (images.name, images.split) == ("food101", "train")
    assert food101(tmp_path, "test").ids == ["waffles/2", "apple_pie/2", "ramen/2"]


def test_aircraft_by_hand(tmp_path: Path) -> None:
    data = write_aircraft(tmp_path)
    for split, text in AIRCRAFT_LISTS.items():
        images = aircraft(tmp_path, split)
        assert images.classes == ["707-320", "Cessna 172"]
        rows = [line.split(" ", 1) for line in text.splitlines()]
        assert [[id_, images.classes[label]] for id_, label in zip(images.ids, images.labels, strict=True)] == rows
        assert images.paths == [data / "images" / f"{id_}.jpg" for id_ in images.ids]
        assert (images.name, images.split) == ("aircraft", split)


def test_variants_keep_the_order_of_the_file(tmp_path: Path) -> None:
    data = write_aircraft(tmp_path)
    (data / "variants.txt").write_text("Cessna 172\n707-320\n")
    assert aircraft(tmp_path, "train").classes == ["Cessna 172", "707-320"]
    assert aircraft(tmp_path, "train").labels == [0, 1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_food_equals_torchvision(demo_root: Path, split: str) -> None:
    images, reference = food101(demo_root, split), Food101(demo_root, split=split)
    assert images.classes == reference.classes
    assert images.labels == reference._labels
    assert images.paths == [Path(path) for path in reference._image_files]
    for index in (0, len(images) // 2, len(images) - 1):
        (mine, label), (theirs, same) = images[index], reference[index]
        assert (label, mine.tobytes()) == (same, theirs.tobytes())


@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_aircraft_equals_torchvision(demo_root: Path, split: str) -> None:
    images, reference = aircraft(demo_root, split), FGVCAircraft(demo_root, split=split, annotation_level="variant")
    assert images.classes == reference.classes
    assert images.labels == reference._labels
    assert images.paths == [Path(path) for path in reference._image_files]
    (mine, label), (theirs, same) = images[5], reference[5]
    assert (label, mine.tobytes()) == (same, theirs.tobytes())


def test_a_relative_root_and_a_string_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_food(tmp_path)
    monkeypatch.chdir(tmp_path)
    images = food101(".", "train")
    monkeypatch.chdir("/")
    assert images[0][0].size == (8, 6)


@pytest.mark.parametrize("reader", [aircraft, food101])
def test_an_unknown_split_is_named(tmp_path: Path, reader: Callable[[Path, str], Images]) -> None:
    with pytest.raises(UserError) as caught:
        reader(tmp_path, "validation")
    sentence(caught.value, "'validation'", "train, ")


# Nothing there: what was looked for, where, where to get it.


@pytest.mark.parametrize(
    ("reader", "folder", "host"),
    [
        (aircraft, "fgvc-aircraft-2013b", "www.robots.ox.ac.uk"),
        (food101, "food-101", "data.vision.ee.ethz.ch"),
    ],
)
@pytest.mark.parametrize("state", ["no root", "no folder", "empty folder", "a file"])
def test_no_data(tmp_path: Path, reader: Callable[[Path, str], Images], folder: str, host: str, state: str) -> None:
    root = tmp_path / "data"
    if state != "no root":
        root.mkdir()
    if state == "empty folder":
        (root / folder).mkdir()
    if state == "a file":
        (root / folder).touch()
    with pytest.raises(UserError) as caught:
        reader(root, "train")
    sentence(caught.value, root / folder, host, "--data-root", "--no-download")


FOOD_DAMAGE = {
    "meta missing": (remove("meta"), "meta/train.json", "is not there"),
    "list missing": (remove("meta/train.json"), "meta/train.json", "is not there"),
    "list empty": (overwrite("meta/train.json", ""), "meta/train.json", "is empty"),
    "list cut short": (overwrite("meta/train.json", '{"waffles": ["waffles/3", "waf'), "meta/train.json", "cut short"),
    "list of another kind": (overwrite("meta/train.json", "[1, 2]"), "meta/train.json", "not an object"),
    "list binary": (lambda folder: (folder / "meta/train.json").write_bytes(b"\xff\xd8"), "meta/train.json", "text"),
    "list nested": (overwrite("meta/train.json", "[" * 200_000), "meta/train.json", "cut short"),
    "class empty": (overwrite("meta/train.json", '{"ramen": []}'), "meta/train.json", "'ramen'"),
    "class of numbers": (overwrite("meta/train.json", '{"ramen": [1]}'), "meta/train.json", "lists 1 under"),
    "class of others": (overwrite("meta/train.json", '{"ramen": ["waffles/1"]}'), "meta/train.json", "'ramen/...'"),
    "image twice": (overwrite("meta/train.json", '{"ramen": ["ramen/1", "ramen/1"]}'), "meta/train.json", "2 times"),
    "class lost": (
        overwrite("meta/train.json", json.dumps({"ramen": ["ramen/1"], "waffles": ["waffles/1"]})),
        "meta/train.json",
        "'apple_pie'",
    ),
    "images missing": (remove("images"), "images", "is not there"),
    "images empty": (empty_folder("images"), "images", "is empty"),
    "class folder missing": (remove("images/ramen"), "images/ramen", "is not there"),
    "class folder empty": (empty_folder("images/ramen"), "images/ramen", "is empty"),
    "image missing": (remove("images/waffles/3.jpg"), "images/waffles", "lacks 1 of the 2 listed images"),
}


@pytest.mark.parametrize("kind", FOOD_DAMAGE)
def test_damaged_food(tmp_path: Path, kind: str) -> None:
    damage, relative, part = FOOD_DAMAGE[kind]
    folder = write_food(tmp_path)
    damage(folder)
    with pytest.raises(UserError) as caught:
        food101(tmp_path, "train")
    sentence(caught.value, folder / relative, part, "data.vision.ee.ethz.ch", "--data-root")


LIST = "images_variant_train.txt"
AIRCRAFT_DAMAGE = {
    "variants missing": (remove("variants.txt"), "variants.txt", "is not there"),
    "variants empty": (overwrite("variants.txt", "\n"), "variants.txt", "is empty"),
    "variant twice": (overwrite("variants.txt", "707-320\nCessna 172\n707-320\n"), "variants.txt", "707-320 2 times"),
    "variants cut short": (overwrite("variants.txt", "707-320\nCessna"), LIST, "line 1"),
    "variant without images": (overwrite("variants.txt", "707-320\nCessna 172\nTu-154\n"), LIST, "'Tu-154'"),
    "list missing": (remove(LIST), LIST, "is not there"),
    "list empty": (overwrite(LIST, ""), LIST, "is empty"),
    "list cut at a line": (overwrite(LIST, "0000003 Cessna 172\n"), LIST, "'707-320'"),
    "list cut in a line": (overwrite(LIST, "0000003 Cessna 172\n0000001 707-"), LIST, "line 2"),
    "list without variants": (overwrite(LIST, "0000003\n"), LIST, "line 1"),
    "image twice": (overwrite(LIST, "0000003 Cessna 172\n0000003 707-320\n"), LIST, "0000003 2 times"),
    "images missing": (remove("images"), "images", "is not there"),
    "images empty": (empty_folder("images"), "images", "is empty"),
    "image missing": (remove("images/0000001.jpg"), "images", "lacks 1 of the 2 listed images"),
    "data missing": (remove("."), "", "is empty"),
}


@pytest.mark.parametrize("kind", AIRCRAFT_DAMAGE)
def test_damaged_aircraft(tmp_path: Path, kind: str) -> None:
    damage, relative, part = AIRCRAFT_DAMAGE[kind]
    data = write_aircraft(tmp_path)
    damage(data)
    with pytest.raises(UserError) as caught:
        aircraft(tmp_path, "train")
    sentence(caught.value, data / relative if relative else data.parent, part, "www.robots.ox.ac.uk", "--data-root")


def test_food_without_classes_txt_will_do(tmp_path: Path) -> None:
    (write_food(tmp_path) / "meta/classes.txt").unlink()
    assert len(food101(tmp_path, "train")) == 6


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_list_that_may_not_be_read(tmp_path: Path) -> None:
    folder = write_food(tmp_path)
    (folder / "meta/train.json").chmod(0)
    with pytest.raises(UserError) as caught:
        food101(tmp_path, "train")
    sentence(caught.value, folder / "meta/train.json", "cannot be read")


def test_files_are_found_by_listing_folders_only(demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 images must not cost 1,000 questions to the file system."""
    calls = 0
    real = os.stat

    def counting(*arguments: object, **options: object) -> os.stat_result:
        nonlocal calls
        calls += 1
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", counting)
    food101(demo_root, "train")
    aircraft(demo_root, "train")
    assert calls < 100
