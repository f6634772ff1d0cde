"""benchmarks.data: what it measures is what it says, and ways that differ are found."""

from pathlib import Path

import pytest
from torchvision import transforms as T

from benchmarks import photographs
from benchmarks.data import SIZES, WAYS, measure, show, start_coco, write_coco
from benchmarks.photographs import photograph, write_photographs
from common.data.kept import Keep

TRANSFORM = T.Compose([T.Resize((30, 30)), T.RandomHorizontalFlip(), T.ToTensor()])


def test_every_way_is_measured(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_photographs(root / "class", (48, 36), 2)
    seconds = measure(root, TRANSFORM, 2, tmp_path)
    assert [*seconds] == [*WAYS]
    assert min(seconds.values()) > 0
    assert [path.name for path in tmp_path.iterdir()] == [root.name]
    assert show("a name", {"floor": 0.5, "ours": 0.25, "first": 0.5, "kept": 0.125}).split() == [
        *("a", "name", "2.0", "4.0", "0.500", "2.0", "8.0", "2.00")
    ]


def test_ways_that_lead_to_other_pixels_are_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photographs(tmp_path / "class", (48, 36), 1)
    wrong = photograph((30, 30), 5)
    monkeypatch.setattr(Keep, "__call__", lambda self, path: wrong)
    with pytest.raises(SystemExit, match="the ways lead to different pixels"):
        measure(tmp_path, TRANSFORM, 1, tmp_path / "scratch")


def test_the_photographs_are_as_large_as_they_say(tmp_path: Path) -> None:
    for width, height in SIZES:
        (file,) = write_photographs(tmp_path / str(width), (width, height), 1)
        assert 2 < file.stat().st_size * 8 / (width * height) < 3


def test_many_photographs_are_few_different_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "DIFFERENT", 2)
    first, second, third = (path.read_bytes() for path in write_photographs(tmp_path, (48, 36), 3))
    assert first == third != second


def test_coco_of_any_size(tmp_path: Path) -> None:
    file = write_coco(tmp_path, images=40, unlabelled=3, boxes=200)
    found = start_coco(str(tmp_path))
    assert found["images"] == 37
    assert found["seconds"] > 0
    assert file.with_name("instances_train2017.index.json").is_file()
