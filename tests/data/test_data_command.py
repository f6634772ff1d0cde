"""`python -m common.data`: the check against what is published, the resized copy, and the demo command."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ffvt_trees import write_cub
from tiny_trees import sentence, write_aircraft, write_coco, write_food
from torchvision import transforms as T

from common import data as readers
from common.data import Data, facts, food101
from common.data.__main__ import main
from common.data.facts import data_sets
from common.data.resized import check_resized
from common.errors import UserError


def test_published_counts() -> None:
    """As the papers and the official pages have them."""
    counts = {name: (facts.classes, dict(facts.counts)) for name, facts in data_sets().items()}
    assert counts == {
        "food101": (101, {"train": 75_750, "test": 25_250}),
        "aircraft": (100, {"train": 3_334, "val": 3_333, "trainval": 6_667, "test": 3_333}),
        "coco": (80, {"train2017": 117_266, "val2017": 4_952}),
        "cub": (200, {"train": 5_994, "test": 5_794}),
        "dog": (120, {"train": 12_000, "test": 8_580}),
        "car": (196, {"train": 8_144, "test": 8_041}),
        "air": (100, {"train": 6_667, "test": 3_333}),
        "inat2017": (5_089, {"train": 579_184, "val": 95_986}),
        "cotton": (80, {"train": 240, "test": 240}),
        "soyloc": (200, {"train": 600, "test": 600}),
        "cifar10": (10, {"train": 50_000, "test": 10_000}),
        "cifar100": (100, {"train": 50_000, "test": 10_000}),
    }


@pytest.fixture
def food(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny data set, which is what is published."""
    counts, per_class = {"train": 6, "test": 3}, {"train": [2, 2], "test": [1, 1]}
    published = replace(facts("food101"), classes=3, counts=counts, per_class=per_class)
    monkeypatch.setitem(data_sets(), "food101", published)
    return write_food(tmp_path)


def test_a_complete_data_set(food: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "Food101", "--data-root", str(food.parent), "--decode"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Food-101, expected below {food.parent}:\n{facts('food101').tree}")
    assert out.endswith("is complete: all counts are as published.\n")
    rows = [line.split() for line in out.splitlines()]
    assert ["waffles", "2", "train", "1", "test"] in rows
    assert "train: 6 images, 6 published" in out


def test_every_unreadable_image_is_listed(food: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [food / "images/ramen/1.jpg", food / "images/waffles/2.jpg"]  # of either split
    for path in bad:
        path.write_bytes(path.read_bytes()[:-30])
    assert main(["check", "food101", "--data-root", str(food.parent)]) == 0
    assert main(["check", "food101", "--data-root", str(food.parent), "--decode"]) == 1
    out = capsys.readouterr().out
    for path in bad:
        assert f"- {path}: not readable as an image" in out
    assert "not as published (problems: 2)" in out


def test_one_broken_split_does_not_hide_the_other(food: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (food / "meta/test.json").unlink()
    assert main(["check", "food101", "--data-root", str(food.parent)]) == 1
    out = capsys.readouterr().out
    assert "train: 6 images, 6 published" in out
    assert f"- test: Food-101: {food / 'meta/test.json'} is not there" in out


@pytest.mark.parametrize("name", data_sets())
def test_demo_data_is_not_the_published_data(demo_root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name, "--data-root", str(demo_root)]) == 1
    out = capsys.readouterr().out
    assert "This is the demo data" in out
    for split, count in facts(name).counts.items():
        found = len(getattr(readers, name)(demo_root, split))
        assert f"- {split}: {found} images where {count} are published" in out


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "common.data", "check", "aircraft", "--data-root", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert str(tmp_path / "fgvc-aircraft-2013b") in result.stdout
    assert result.stderr == ""


def test_the_demo_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "aircraft", "--data-root", str(tmp_path)]) == 0
    assert (tmp_path / "fgvc-aircraft-2013b/data/variants.txt").exists()
    write_food(tmp_path)
    assert main(["demo", "food101", "--data-root", str(tmp_path)]) == 1
    assert "holds other data" in capsys.readouterr().err


# The resized copy

BICUBIC = T.Resize((5, 5), T.InterpolationMode.BICUBIC)
WRITERS = {"food101": write_food, "aircraft": write_aircraft, "coco": write_coco, "cub": write_cub}


def resize(name: str, root: Path, *more: str) -> int:
    return main(["resize", name, "--size", "5", "--data-root", str(root), "--to", str(root / "small"), *more])


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_pixels_are_those_of_a_run_without_it(name: str, interpolation: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    assert resize(name, tmp_path, "--interpolation", interpolation) == 0
    first = T.Resize((5, 5), T.InterpolationMode(interpolation))
    transform = T.Compose([first, T.RandomCrop((3, 3)), T.ToTensor()])
    for split in facts(name).counts:
        small = tmp_path / "small"
        before, after = (getattr(readers, name)(root, split).with_transform(transform) for root in (tmp_path, small))
        check_resized(Data(after, after, after))
        assert (before.ids, before.labels, before.classes) == (after.ids, after.labels, after.classes)
        assert [p.relative_to(tmp_path) for p in before.paths] == [
            p.relative_to(tmp_path / "small") for p in after.paths
        ]
        for index in range(len(before)):
            assert after.decode(after.path(index)).size == (5, 5)
            torch.manual_seed(index)
            original = before[index][0]
            torch.manual_seed(index)
            assert torch.equal(after[index][0], original)


def test_a_run_that_begins_otherwise_refuses_it(tmp_path: Path) -> None:
    write_food(tmp_path)
    assert resize("food101", tmp_path) == 0
    images = food101(tmp_path / "small", "train")
    good = images.with_transform(T.Compose([BICUBIC, T.ToTensor()]))
    for steps in ([T.Resize((6, 6), BICUBIC.interpolation)], [T.Resize((5, 5))], [T.Resize(5)], [T.ToTensor()]):
        other = images.with_transform(T.Compose(steps))
        for data in (Data(other, good, good), Data(good, good, other)):
            with pytest.raises(UserError) as caught:
                check_resized(data)
            sentence(caught.value, tmp_path / "small/food-101", "[5, 5]", "bicubic", "--data-root")
    original = food101(tmp_path, "train").with_transform(T.ToTensor())
    check_resized(Data(original, original, original))


def test_an_interrupted_copy_is_completed_and_another_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_food(tmp_path) / "images/waffles/2.jpg"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    assert resize("food101", tmp_path) == 1
    assert f"{bad}: not readable" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not there"):
        food101(tmp_path / "small", "train")
    bad.write_bytes(good)
    assert resize("food101", tmp_path) == 0
    assert len(food101(tmp_path / "small", "test")) == 3
    assert resize("food101", tmp_path, "--interpolation", "bilinear") == 1
    assert f"{tmp_path / 'small/food-101'} holds other images" in capsys.readouterr().err
    assert resize("cifar10", tmp_path) == 1
