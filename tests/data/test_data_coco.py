"""COCO as single-label classification: the label rule against pycocotools, the index, every kind of damage."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.coco import COCO
from tiny_trees import coco_annotations, sentence, write_coco

from common.data import coco
from common.errors import UserError


def reference(annotations: Path) -> list[tuple[str, str, int]]:
    """(id, file name, label) by pycocotools: the first annotation listed for an image, categories by sorted id."""
    api = COCO(str(annotations))
    number = {category: label for label, category in enumerate(sorted(api.getCatIds()))}
    rows = []
    for image in api.imgs:
        boxes = api.getAnnIds(imgIds=image)
        if boxes:
            label = number[api.loadAnns(boxes[0])[0]["category_id"]]
            rows.append((str(image), api.loadImgs(image)[0]["file_name"], label))
    return rows


def index_of(annotations: Path) -> Path:
    return annotations.with_name(annotations.name.replace(".json", ".index.json"))


def test_by_hand(tmp_path: Path) -> None:
    write_coco(tmp_path)
    images = coco(tmp_path, "val2017")
    assert images.classes == ["bicycle", "cat", "toothbrush"]
    assert images.ids == ["900", "5", "31", "8"]
    assert images.labels == [0, 2, 2, 0]
    assert images.paths == [tmp_path / "coco/val2017" / f"{int(id_):012d}.jpg" for id_ in images.ids]
    assert (images.name, images.split) == ("coco", "val2017")


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_equals_pycocotools(demo_root: Path, split: str) -> None:
    images = coco(demo_root, split)
    rows = reference(demo_root / f"coco/annotations/instances_{split}.json")
    assert list(zip(images.ids, [path.name for path in images.paths], images.labels, strict=True)) == rows
    assert len(rows) > 250


def test_no_image_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", fail)
    assert len(coco(tmp_path, "val2017")) == 4


# The index


def test_the_index_is_used_while_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = write_coco(tmp_path)
    first = coco(tmp_path, "val2017")
    assert index_of(annotations).exists()
    assert {path.name for path in annotations.parent.iterdir()} == {
        "instances_train2017.json",
        "instances_val2017.json",
        "instances_val2017.index.json",
    }
    # Same size, same time: the annotation file itself is not read again.
    stat = annotations.stat()
    annotations.write_text("x" * stat.st_size)
    os.utime(annotations, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = coco(tmp_path, "val2017")
    assert second.fingerprint() == first.fingerprint()
    assert (second.ids, second.paths, second.classes) == (first.ids, first.paths, first.classes)


def test_the_index_is_built_anew_when_the_file_changes(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path)
    coco(tmp_path, "val2017")
    content = coco_annotations()
    content["annotations"].reverse()
    annotations.write_text(json.dumps(content))  # the same size
    os.utime(annotations, ns=(0, annotations.stat().st_mtime_ns + 1))
    assert coco(tmp_path, "val2017").labels == [2, 0, 2, 2]
    content["annotations"].reverse()
    content["annotations"].pop(0)
    stat = annotations.stat()
    annotations.write_text(json.dumps(content))  # another size, the same time
    os.utime(annotations, ns=(0, stat.st_mtime_ns))
    assert coco(tmp_path, "val2017").labels == [0, 0, 2, 0]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "\udcff", '{"key": 1}', "cut", "fewer labels", "older format", "no list"],
)
def test_a_damaged_index_is_built_anew(tmp_path: Path, damage: str) -> None:
    annotations = write_coco(tmp_path)
    expected = coco(tmp_path, "val2017")
    index = index_of(annotations)
    content = json.loads(index.read_text())
    if damage == "cut":
        text = index.read_text()[:-10]
    elif damage == "fewer labels":
        text = json.dumps(content | {"labels": content["labels"][:-1]})
    elif damage == "older format":
        text = json.dumps(content | {"key": content["key"] | {"format": 0}, "labels": [0, 0, 0, 0]})
    elif damage == "no list":
        text = json.dumps(content | {"unlabelled": None})
    else:
        text = damage
    index.write_text(text, errors="surrogateescape")
    assert coco(tmp_path, "val2017").labels == expected.labels
    assert json.loads(index.read_text()) == content


def test_a_folder_that_cannot_be_written_costs_the_index_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = write_coco(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", fail)
    assert len(coco(tmp_path, "val2017")) == 4
    assert sorted(path.name for path in annotations.parent.iterdir()) == [
        "instances_train2017.json",
        "instances_val2017.json",
    ]


def test_a_second_start_is_quick(tmp_path: Path) -> None:
    """Processor time, since other programs do not change it; at the real size it has to stay below 2 s."""
    count = 3_000
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(count)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1 + i % 80} for i in range(count)],
        "categories": [{"id": i, "name": f"category {i}"} for i in range(1, 81)],
    }
    write_coco(tmp_path, content)
    for image in content["images"]:
        (tmp_path / "coco/val2017" / image["file_name"]).touch()
    first = coco(tmp_path, "val2017")
    start = time.process_time()
    second = coco(tmp_path, "val2017")
    assert time.process_time() - start < 2.0 * count / 118_287 + 0.1
    assert second.fingerprint() == first.fingerprint()


# Damage


def _changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    content = coco_annotations()
    change(content)
    return content


BAD_CONTENT: dict[str, tuple[dict[str, Any] | list[Any], str]] = {
    "a list": ([], "is not an object"),
    "no images": (_changed(lambda c: c.pop("images")), "no list of images"),
    "no annotations": (_changed(lambda c: c.pop("annotations")), "no list of annotations"),
    "no categories": (_changed(lambda c: c.pop("categories")), "no list of categories"),
    "annotations empty": (_changed(lambda c: c["annotations"].clear()), "no list of annotations"),
    "images an object": (_changed(lambda c: c.update(images={"id": 1})), "no list of images"),
    "image without a name": (_changed(lambda c: c["images"][3].pop("file_name")), "no file_name in entry 3 of images"),
    "image id a string": (_changed(lambda c: c["images"][0].update(id="900")), "no id in entry 0 of images"),
    "annotation a number": (_changed(lambda c: c["annotations"].insert(1, 7)), "entry 1 of annotations"),
    "annotation without category": (
        _changed(lambda c: c["annotations"][2].pop("category_id")),
        "no category_id in entry 2 of annotations",
    ),
    "image id twice": (_changed(lambda c: c["images"].append(c["images"][1])), "in images the id 5 2 times"),
    "annotation id twice": (_changed(lambda c: c["annotations"][1].update(id=20)), "in annotations the id 20 2 times"),
    "category id twice": (_changed(lambda c: c["categories"][1].update(id=90)), "in categories the id 90 2 times"),
    "category name twice": (_changed(lambda c: c["categories"][1].update(name="cat")), "name cat 2 times"),
    "half a character": (_changed(lambda c: c["images"][2].update(file_name="\udc80.jpg")), "is cut short or not JSON"),
    "unknown category": (
        _changed(lambda c: c["annotations"][4].update(category_id=3)),
        "annotation 3 with the unknown category_id 3",
    ),
    "unknown image": (
        _changed(lambda c: c["annotations"][0].update(image_id=6)),
        "annotation 20 with the unknown image_id 6",
    ),
}


@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_wrong_content(tmp_path: Path, kind: str) -> None:
    content, part = BAD_CONTENT[kind]
    annotations = write_coco(tmp_path, content)
    with pytest.raises(UserError) as caught:
        coco(tmp_path, "val2017")
    sentence(caught.value, annotations, part, "images.cocodataset.org")
    assert not index_of(annotations).exists()


@pytest.mark.parametrize(
    ("text", "part"), [("", "is empty"), ("not json", "not JSON"), (None, "cut short"), ("[" * 200_000, "cut short")]
)
def test_not_json(tmp_path: Path, text: str | None, part: str) -> None:
    annotations = write_coco(tmp_path)
    annotations.write_text(annotations.read_text()[:-20] if text is None else text)
    with pytest.raises(UserError) as caught:
        coco(tmp_path, "val2017")
    sentence(caught.value, annotations, part)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("missing", ["000000000005.jpg", "000000000077.jpg"])
def test_a_listed_image_is_missing(tmp_path: Path, missing: str, cached: bool) -> None:
    write_coco(tmp_path)
    if cached:
        coco(tmp_path, "val2017")
    (tmp_path / "coco/val2017" / missing).unlink()
    with pytest.raises(UserError) as caught:
        coco(tmp_path, "val2017")
    sentence(caught.value, tmp_path / "coco/val2017", "lacks 1 of the 5 listed images", missing)


@pytest.mark.parametrize("missing", ["", "annotations", "annotations/instances_val2017.json", "val2017"])
def test_missing_parts(tmp_path: Path, missing: str) -> None:
    write_coco(tmp_path)
    path = tmp_path / "coco" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError) as caught:
        coco(tmp_path, "val2017")
    sentence(caught.value, path, "is not there", "images.cocodataset.org", "--data-root", "--no-download")


def test_an_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        coco(tmp_path, "test2017")
    sentence(caught.value, "train2017, val2017", "'test2017'")
