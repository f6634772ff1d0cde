"""Data sets that mean harm: names that lead elsewhere, halves of characters, numbers without end, pipes for files."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ffvt_trees
import numpy as np
import pytest
from tiny_trees import coco_annotations, sentence, write_aircraft, write_coco, write_food

from common.data.demo import is_finished
from common.data.readers import READERS
from common.errors import UserError

OUTSIDE = ["../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..", "a\x1b[2J.jpg"]


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def change_json(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def name_cub(root: Path, name: str) -> str:
    ffvt_trees.write_cub(root)
    line = (root / "CUB/images.txt").read_text().split("\n")[0]
    change(root / "CUB/images.txt", line, f"1 {name}")
    return "images.txt"


def name_aircraft(root: Path, name: str) -> str:
    write_aircraft(root)
    change(root / "fgvc-aircraft-2013b/data/images_variant_train.txt", "0000003", f"{name}/../x")
    return "images_variant_train.txt"


def name_leaves(root: Path, name: str) -> str:
    ffvt_trees.write_leaves(root)
    file = root / "cotton/anno/train.txt"
    change(file, file.read_text().split(" ")[0], name)
    return "train.txt"


def name_coco(root: Path, name: str) -> str:
    content = coco_annotations()
    content["images"][0]["file_name"] = name
    write_coco(root, content)
    return "instances_train2017.json"


def name_inat(root: Path, name: str) -> str:
    ffvt_trees.write_inat(root)
    change_json(root / "INat2017/train2017.json", lambda content: content["images"][0].update(file_name=name))
    return "train2017.json"


def name_food(root: Path, name: str) -> str:
    write_food(root)
    change_json(root / "food-101/meta/train.json", lambda content: content.update(ramen=[f"ramen/../{name}"]))
    return "train.json"


def name_car(root: Path, name: str) -> str:
    folder = ffvt_trees.write_car(root)
    ffvt_trees.write_car_list(folder / "devkit/cars_train_annos.mat", [(name, 1)])
    return "cars_train_annos.mat"


def name_dog(root: Path, name: str) -> str:
    folder = ffvt_trees.write_dog(root)
    ffvt_trees.write_dog_list(folder, "train", [(f"{name}/x/..", 1)])
    return "train_list.mat"


NAMING: dict[str, tuple[str, Callable[[Path, str], str]]] = {
    "aircraft": ("train", name_aircraft),
    "car": ("train", name_car),
    "coco": ("train2017", name_coco),
    "cotton": ("train", name_leaves),
    "cub": ("train", name_cub),
    "dog": ("train", name_dog),
    "food101": ("train", name_food),
    "inat2017": ("train", name_inat),
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("data_set", NAMING)
def test_a_name_that_leads_elsewhere_is_refused_where_it_is_joined(data_set: str, name: str, tmp_path: Path) -> None:
    split, write = NAMING[data_set]
    list_file = write(tmp_path, name)
    with pytest.raises(UserError) as caught:
        READERS[data_set](tmp_path, split)
    sentence(caught.value, f"{list_file} lists ", ", which is no file below")


def test_links_inside_of_a_data_set_are_followed(tmp_path: Path) -> None:
    """Data sets on clusters are folders of links."""
    folder = write_aircraft(tmp_path)
    expected = READERS["aircraft"](tmp_path, "train")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    linked = READERS["aircraft"](tmp_path, "train")
    assert linked.fingerprint() == expected.fingerprint()
    assert linked[0][0].size == (8, 6)


def test_half_a_character_and_endless_numbers_are_no_json(tmp_path: Path) -> None:
    write_food(tmp_path)
    file = tmp_path / "food-101/meta/train.json"
    good = file.read_text()
    (tmp_path / "food-101/images/ramen/😀.jpg").touch()
    file.write_text(good.replace("ramen/1", "ramen/\\ud83d\\ude00"))  # both halves
    assert "ramen/😀" in READERS["food101"](tmp_path, "train").ids
    for bad in ("ramen/\\ud83d", "ramen/\\uDE00"):
        file.write_text(good.replace("ramen/1", bad))
        with pytest.raises(UserError) as caught:
            READERS["food101"](tmp_path, "train")
        sentence(caught.value, file, "is cut short or not JSON")
    file.write_text(good.replace("{", '{"x": ' + "9" * 5000 + ", ", 1))
    with pytest.raises(UserError) as caught:
        READERS["food101"](tmp_path, "train")
    sentence(caught.value, file, "is cut short or not JSON")


def test_the_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    write_food(tmp_path)
    expected = READERS["food101"](tmp_path, "train").fingerprint()
    file = tmp_path / "food-101/meta/train.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert READERS["food101"](tmp_path, "train").fingerprint() == expected


def test_a_pipe_in_place_of_a_list_is_not_waited_for(tmp_path: Path) -> None:
    file = write_food(tmp_path) / "meta/train.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError) as caught:
        READERS["food101"](tmp_path, "train")
    sentence(caught.value, file, "a plain file is expected")


@pytest.mark.parametrize("marker", ["[" * 100_000, '{"format": 1}', "null", '{"format": 1, "files": {"\\u0000": 1}}'])
def test_a_marker_of_the_demo_that_is_none(marker: str, tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(marker)
    assert not is_finished(tmp_path)


# The index of COCO


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [0, 1, 2, 99]},
        {"labels": [0, 1, 2, -1]},
        {"labels": [0, 1, 2, True]},
        {"ids": [1, 1, 2, 3]},
        {"files": ["a", "b", "c", 5]},
        {"classes": ["bicycle", "cat", None]},
        {"unlabelled": [["../x"]]},
        {"ids": [], "files": [], "labels": []},
    ],
)
def test_an_index_that_is_no_index_is_built_anew(changes: dict[str, Any], tmp_path: Path) -> None:
    write_coco(tmp_path)
    expected = READERS["coco"](tmp_path, "val2017").fingerprint()
    index = tmp_path / "coco/annotations/instances_val2017.index.json"
    change_json(index, lambda content: content.update(changes))
    assert READERS["coco"](tmp_path, "val2017").fingerprint() == expected
    assert json.loads(index.read_text())["labels"] != changes.get("labels")


# The demo's CIFAR, for which no MD5 speaks


@pytest.fixture
def cifar(demo_root: Path, tmp_path: Path) -> Path:
    """The test batch, whose size is that of the marker as long as it is padded to it."""
    return Path(shutil.copytree(demo_root / "cifar10", tmp_path / "cifar10")) / "cifar-10-batches-py/test_batch"


def rewrite(file: Path, content: object, protocol: int = 4) -> None:
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    assert len(data) <= file.stat().st_size
    file.write_bytes(data.ljust(file.stat().st_size, b"."))


PIXELS = np.zeros((2, 3072), dtype=np.uint8)
DEEP = b"\x80\x04}(" + b")" + b"\x85" * 100_000 + b"K\x01u."


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"data": PIXELS, "labels": [0, 10]}, "gives the image 1 the label 10 where one of 0 to 9 is expected"),
        ({"data": PIXELS, "labels": [0, -1]}, "gives the image 1 the label -1 where one of 0 to 9 is expected"),
        ({"data": PIXELS, "labels": [0, "1"]}, "gives the image 1 the label '1'"),
        ({"data": PIXELS, "labels": [0]}, "has no images of 32 x 32 pixels with a label each"),
        ({"data": PIXELS.astype(np.int8), "labels": [0, 1]}, "has no images of 32 x 32 pixels"),
        ({"data": PIXELS[:, :3071], "labels": [0, 1]}, "has no images of 32 x 32 pixels"),
        ({"data": PIXELS.astype(object)[:, :20], "labels": [0, 1]}, "has no images of 32 x 32 pixels"),
        ({"labels": [0, 1]}, "has no images of 32 x 32 pixels"),
        ([1, 2], "is no file of the demo data"),
        (DEEP, "is no file of the demo data"),  # its hash would be more than the stack holds
        (b"\x80\x04]r\xff\xff\xff\x7f.", "is no file of the demo data"),  # a table of 2^31 places
    ],
)
def test_a_pickle_of_other_content(cifar: Path, tmp_path: Path, content: object, part: str) -> None:
    rewrite(cifar, content)
    with pytest.raises(UserError) as caught:
        READERS["cifar10"](tmp_path, "test")
    sentence(caught.value, cifar, part)
