"""Aircraft, Food-101, COCO, CIFAR: against torchvision and pycocotools, by hand; missing and damaged files."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from tiny_trees import (
    AIRCRAFT_LISTS,
    coco_annotations,
    cut,
    overwrite,
    remove,
    sentence,
    write_aircraft,
    write_coco,
    write_food,
)
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100, FGVCAircraft, Food101
from torchvision.transforms import v2

from common import data as readers
from common.data import aircraft, coco, facts, food101
from common.errors import UserError

WRITERS = {"food101": write_food, "aircraft": write_aircraft, "coco": write_coco}


def test_food_by_hand(tmp_path: Path) -> None:
    folder = write_food(tmp_path)
    images = food101(tmp_path, "train")
    assert images.classes == ["apple_pie", "ramen", "waffles"]
    assert images.ids == ["waffles/3", "waffles/1", "apple_pie/3", "apple_pie/1", "ramen/3", "ramen/1"]
    assert images.labels == [2, 2, 0, 0, 1, 1]
    assert images.paths == [folder / "images" / f"{id_}.jpg" for id_ in images.ids]
    assert (images.name, images.split) == ("food101", "train")


def test_aircraft_by_hand(tmp_path: Path) -> None:
    data = write_aircraft(tmp_path)
    for split, text in AIRCRAFT_LISTS.items():
        images = aircraft(tmp_path, split)
        assert images.classes == ["707-320", "Cessna 172"]
        rows = [line.split(" ", 1) for line in text.splitlines()]
        assert [[id_, images.classes[label]] for id_, label in zip(images.ids, images.labels, strict=True)] == rows
        assert images.paths == [data / "images" / f"{id_}.jpg" for id_ in images.ids]
    (data / "variants.txt").write_text("Cessna 172\n707-320\n")
    assert aircraft(tmp_path, "train").labels == [0, 1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_food_equals_torchvision(demo_root: Path, split: str) -> None:
    images, reference = food101(demo_root, split), Food101(demo_root, split=split)
    assert images.classes == reference.classes
    assert images.labels == reference._labels
    assert images.paths == [Path(path) for path in reference._image_files]
    (mine, label), (theirs, same) = images[5], reference[5]
    assert (label, mine.tobytes()) == (same, theirs.tobytes())


@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_aircraft_equals_torchvision(demo_root: Path, split: str) -> None:
    images, reference = aircraft(demo_root, split), FGVCAircraft(demo_root, split=split, annotation_level="variant")
    assert images.classes == reference.classes
    assert images.labels == reference._labels
    assert images.paths == [Path(path) for path in reference._image_files]
    (mine, label), (theirs, same) = images[5], reference[5]
    assert (label, mine.tobytes()) == (same, theirs.tobytes())


# COCO


def test_coco_by_hand(tmp_path: Path) -> None:
    write_coco(tmp_path)
    images = coco(tmp_path, "val2017")
    assert images.classes == ["bicycle", "cat", "toothbrush"]
    assert (images.ids, images.labels) == (["900", "5", "31", "8"], [0, 2, 2, 0])
    assert images.paths == [tmp_path / "coco/val2017" / f"{int(id_):012d}.jpg" for id_ in images.ids]


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_coco_equals_pycocotools(demo_root: Path, split: str) -> None:
    """The first annotation listed for an image, categories by sorted id."""
    api = COCO(str(demo_root / f"coco/annotations/instances_{split}.json"))
    number = {category: label for label, category in enumerate(sorted(api.getCatIds()))}
    rows = []
    for image in api.imgs:
        boxes = api.getAnnIds(imgIds=image)
        if boxes:
            label = number[api.loadAnns(boxes[0])[0]["category_id"]]
            rows.append((str(image), api.loadImgs(image)[0]["file_name"], label))
    images = coco(demo_root, split)
    assert list(zip(images.ids, [path.name for path in images.paths], images.labels, strict=True)) == rows
    assert 250 < len(rows) < len(api.imgs)


def test_the_index_is_used_while_the_file_is_the_same(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path)
    first = coco(tmp_path, "val2017")
    stat = annotations.stat()
    annotations.write_text("x" * stat.st_size)
    os.utime(annotations, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = coco(tmp_path, "val2017")
    assert second.fingerprint() == first.fingerprint()
    assert (second.ids, second.paths, second.classes) == (first.ids, first.paths, first.classes)
    content = coco_annotations()
    content["annotations"].reverse()
    annotations.write_text(json.dumps(content))  # the same size
    os.utime(annotations, ns=(0, stat.st_mtime_ns + 1))
    assert coco(tmp_path, "val2017").labels == [2, 0, 2, 2]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}'])
def test_a_damaged_index_is_built_anew(tmp_path: Path, damage: str) -> None:
    index = write_coco(tmp_path).with_name("instances_val2017.index.json")
    expected = coco(tmp_path, "val2017")
    content = index.read_text()
    index.write_text(damage)
    assert coco(tmp_path, "val2017").labels == expected.labels
    assert index.read_text() == content


def test_a_folder_that_cannot_be_written_costs_the_index_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = write_coco(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", fail)
    assert len(coco(tmp_path, "val2017")) == 4
    assert {path.name for path in annotations.parent.iterdir()} == {f"instances_{s}2017.json" for s in ("train", "val")}


# CIFAR


def publish_cifar(source: type[CIFAR10], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes files of the published form with a few random images, and has torchvision take them for the published."""
    random = np.random.default_rng(0)
    key = source.meta["key"]
    folder.mkdir(parents=True)
    for part in ("train_list", "test_list"):
        listed = []
        for file, _ in getattr(source, part):
            images = random.integers(0, 256, (4, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": images, key.replace("label_names", "labels"): [3, 0, 1, 9]})
            (folder / file).write_bytes(content)
            listed.append([file, hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(source, part, listed)
    content = pickle.dumps({key: [f"class {number}" for number in range(10)]})
    (folder / source.meta["filename"]).write_bytes(content)
    monkeypatch.setitem(source.meta, "md5", hashlib.md5(content).hexdigest())


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100])
@pytest.mark.parametrize("beside", [True, False])
def test_cifar_equals_torchvision(
    source: type[CIFAR10], beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torchvision puts it, at the data root."""
    name = source.__name__.lower()
    root = tmp_path if beside else tmp_path / name
    publish_cifar(source, root / source.base_folder, monkeypatch)
    for split in ("train", "test"):
        images, reference = getattr(readers, name)(tmp_path, split), source(root, train=split == "train")
        assert (images.classes, images.labels) == (reference.classes, reference.targets)
        assert images.ids[3] == f"{split}/00003"
        for (mine, label), (theirs, same) in zip(images, reference, strict=True):
            assert (label, mine.mode, mine.tobytes()) == (same, theirs.mode, theirs.tobytes())


def test_cifar_of_another_checksum_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    publish_cifar(CIFAR10, folder, monkeypatch)

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "called"),)

    (folder / "test_batch").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError) as caught:
        readers.cifar10(tmp_path, "test")
    sentence(caught.value, folder, "MD5", "www.cs.toronto.edu", "--data-root")
    assert not (tmp_path / "called").exists()


def test_cifar_in_workers(demo_root: Path) -> None:
    images = readers.cifar100(demo_root, "test")
    part = images.subset([7, 3]).with_transform(v2.PILToTensor())
    pixels, labels = next(iter(DataLoader(pickle.loads(pickle.dumps(part)), batch_size=2, num_workers=1)))
    assert labels.tolist() == [images.labels[7], images.labels[3]]
    for index, original in enumerate((7, 3)):
        assert (pixels[index].permute(1, 2, 0).numpy() == np.asarray(images[original][0])).all()


# Nothing there, or something wrong


def test_a_relative_root_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_food(tmp_path)
    monkeypatch.chdir(tmp_path)
    images = food101(".", "train")
    monkeypatch.chdir("/")
    assert images[0][0].size == (8, 6)


@pytest.mark.parametrize("name", WRITERS)
def test_an_unknown_split_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        getattr(readers, name)(tmp_path, "validation")
    sentence(caught.value, "'validation'", ", ".join(facts(name).counts))


LIST, INSTANCES = "images_variant_train.txt", "annotations/instances_train2017.json"
DAMAGE: list[tuple[str, Any, str, str]] = [  # data set, what is done, file that the sentence names, what it says
    ("food101", remove("."), "meta/train.json", "is not there"),
    ("food101", overwrite("meta/train.json", ""), "meta/train.json", "is empty"),
    ("food101", overwrite("meta/train.json", '{"waffles": ["waffles/3", "waf'), "meta/train.json", "cut short"),
    ("food101", overwrite("meta/train.json", b"\xff\xd8"), "meta/train.json", "cannot be read"),
    ("food101", overwrite("meta/train.json", '{"a": ["../../../etc/passwd"]}'), "images/../../../etc", "not lie below"),
    ("food101", remove("images"), "images/waffles/3.jpg", "(6 of 6 listed images are missing)"),
    ("food101", remove("images/ramen/1.jpg"), "images/ramen/1.jpg", "(1 of 6 listed images are missing)"),
    ("aircraft", remove("variants.txt"), "variants.txt", "is not there"),
    ("aircraft", overwrite("variants.txt", "707-320\nCessna"), LIST, "Cessna"),
    ("aircraft", overwrite(LIST, "0000003 Cessna 172\n"), LIST, "707-320"),
    ("aircraft", overwrite(LIST, "0000003\n"), LIST, "'0000003'"),
    ("aircraft", overwrite(LIST, "0000003 Cessna 172\n0000003 707-320\n"), LIST, "0000003 2 times"),
    ("aircraft", remove("images/0000001.jpg"), "images/0000001.jpg", "(1 of 2 listed images are missing)"),
    ("coco", remove(INSTANCES), INSTANCES, "is not there"),
    ("coco", cut(INSTANCES, 20), INSTANCES, "cut short"),
    ("coco", remove("train2017/000000000005.jpg"), "train2017/000000000005.jpg", "(1 of 4 listed images are missing)"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damage_is_one_sentence(tmp_path: Path, number: int) -> None:
    name, damage, file, part = DAMAGE[number]
    folder = WRITERS[name](tmp_path) if name != "coco" else write_coco(tmp_path).parents[1]
    damage(folder)
    with pytest.raises(UserError) as caught:
        getattr(readers, name)(tmp_path, "train2017" if name == "coco" else "train")
    sentence(caught.value, folder / file, part, facts(name).source, "--data-root")


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
