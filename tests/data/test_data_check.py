"""`python -m common.data`: the check against the published counts, and the demo command."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ffvt_trees import WRITERS, write_dog
from tiny_trees import write_aircraft, write_coco, write_food

from common.data.__main__ import main
from common.data.published import DATA_SETS
from common.data.readers import READERS

REPOSITORY = Path(__file__).parents[2]


def test_published_counts() -> None:
    counts = {name: (facts.classes, dict(facts.counts)) for name, facts in DATA_SETS.items()}
    assert counts["food101"] == (101, {"train": 75_750, "test": 25_250})
    assert counts["aircraft"] == (100, {"train": 3_334, "val": 3_333, "trainval": 6_667, "test": 3_333})
    assert counts["coco"] == (80, {"train2017": 117_266, "val2017": 4_952})
    assert counts["cub"] == (200, {"train": 5_994, "test": 5_794})
    assert counts["dog"] == (120, {"train": 12_000, "test": 8_580})
    assert counts["car"] == (196, {"train": 8_144, "test": 8_041})
    assert counts["air"] == (100, {"train": 6_667, "test": 3_333})
    assert counts["inat2017"] == (5_089, {"train": 579_184, "val": 95_986})
    assert counts["cotton"] == (80, {"train": 240, "test": 240})
    assert counts["soyloc"] == (200, {"train": 600, "test": 600})
    assert counts["cifar10"] == (10, {"train": 50_000, "test": 10_000})
    assert counts["cifar100"] == (100, {"train": 50_000, "test": 10_000})
    assert set(READERS) == set(DATA_SETS)
    for facts in DATA_SETS.values():
        for split, (low, high) in facts.per_class.items():
            assert low * facts.classes <= facts.counts[split] <= high * facts.classes


@pytest.fixture
def tiny_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the trees of tiny_trees the published ones."""
    for name, classes, counts, per_class in (
        ("food101", 3, {"train": 6, "test": 3}, {"train": (2, 2), "test": (1, 1)}),
        ("aircraft", 2, {"train": 2, "val": 2, "trainval": 4, "test": 2}, {"train": (1, 1)}),
        ("coco", 3, {"train2017": 4, "val2017": 4}, {}),
        ("cub", 3, {"train": 3, "test": 3}, {"train": (1, 1)}),
        ("dog", 3, {"train": 3, "test": 2}, {}),
        ("cotton", 80, {"train": 4, "test": 3}, {}),
        ("soyloc", 80, {"train": 4, "test": 3}, {}),
        ("car", 196, {"train": 3, "test": 2}, {}),
        ("inat2017", 5089, {"train": 3, "val": 2}, {}),
    ):
        changed = replace(DATA_SETS[name], classes=classes, counts=counts, per_class=per_class)
        monkeypatch.setitem(DATA_SETS, name, changed)


@pytest.mark.usefixtures("tiny_is_published")
@pytest.mark.parametrize("name", ["food101", "aircraft", "coco", "cub", "dog", "cotton", "soyloc", "car", "inat2017"])
def test_a_complete_data_set(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (WRITERS | {"food101": write_food, "aircraft": write_aircraft, "coco": write_coco})[name](tmp_path)
    assert main(["check", name, "--data-root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{DATA_SETS[name].title}, expected below {tmp_path}:"
    for line in DATA_SETS[name].tree.splitlines():
        assert f"    {line}" in lines
    assert lines[-1].endswith("is complete: all counts are as published.")


@pytest.mark.usefixtures("tiny_is_published")
def test_tables_of_food(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_food(tmp_path)
    main(["check", "food101", "--data-root", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (["class", "train", "test"], ["apple_pie", "2", "1"], ["ramen", "2", "1"], ["waffles", "2", "1"]):
        assert row in rows
    # split, images found and published, classes found and published, smallest and largest class
    assert ["train", "6", "6", "3", "3", "2", "2"] in rows
    assert ["test", "3", "3", "3", "3", "1", "1"] in rows


@pytest.mark.usefixtures("tiny_is_published")
def test_a_class_without_images_counts_as_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path)
    assert main(["check", "coco", "--data-root", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cat", "0", "0"] in rows
    assert ["val2017", "4", "4", "3", "3", "0", "2"] in rows


@pytest.mark.parametrize("name", DATA_SETS)
def test_demo_data_is_not_the_published_data(demo_root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name, "--data-root", str(demo_root)]) == 1
    out = capsys.readouterr().out
    assert "This is the demo data" in out
    assert out.splitlines()[-1].startswith(f"{DATA_SETS[name].title} at {demo_root}")
    assert "is not as published" in out.splitlines()[-1]
    for split, count in DATA_SETS[name].counts.items():
        assert f"- {split}: {len(READERS[name](demo_root, split)):,} images where {count:,} are published." in out


@pytest.mark.usefixtures("tiny_is_published")
def test_one_broken_split_does_not_hide_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_food(tmp_path)
    (folder / "meta/test.json").unlink()
    assert main(["check", "food101", "--data-root", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["train", "6", "6", "3", "3", "2", "2"] in [line.split() for line in lines]
    assert [line for line in lines if line.startswith("- test: ") and str(folder / "meta/test.json") in line]
    assert lines[-1].endswith("is not as published (differences: 1).")


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "common.data", "check", "aircraft", "--data-root", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert str(tmp_path / "fgvc-aircraft-2013b") in result.stdout
    assert result.stderr == ""


def test_names_in_capitals(demo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("CUB", "INat2017"):
        assert main(["check", name, "--data-root", str(demo_root)]) == 1
        assert f"{DATA_SETS[name.lower()].title} at {demo_root / name} is not as published" in capsys.readouterr().out


def test_both_lists_are_needed_for_either_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write_dog(tmp_path) / "test_list.mat").unlink()
    assert main(["check", "dog", "--data-root", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("- train: ", "- test: ")) and "test_list.mat" in line]) == 2
    assert lines[-1].endswith("is not as published (differences: 2).")


def test_the_demo_command(tmp_path: Path) -> None:
    assert main(["demo", "aircraft", "--data-root", str(tmp_path)]) == 0
    assert (tmp_path / "fgvc-aircraft-2013b/data/variants.txt").exists()


def test_errors_of_the_demo_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_food(tmp_path)
    assert main(["demo", "food101", "--data-root", str(tmp_path)]) == 1
    assert "holds other data" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["check", "imagenet"])
    assert caught.value.code == 2
