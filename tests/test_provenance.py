"""common.provenance: what makes a run count, and what is known of the code and machine it ran on."""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from common import provenance
from common.data.images import Data, Images, random_split
from common.data.published import published
from common.provenance import (
    data_differences,
    device_name,
    parameter_counts,
    peak_memory,
    versions,
)


def images(name: str, split: str, count: int) -> Images:
    numbers = range(count)
    return Images(name, split, [f"{split} {i}" for i in numbers], [f"/{i}.jpg" for i in numbers], [0] * count, ["a"])


def food101(train: int, test: int, fraction: float = 0.8) -> Data:
    return Data(*random_split(images("food101", "train", train), fraction, seed=42), images("food101", "test", test))


def coco(train: int, val: int) -> Data:
    whole = images("coco", "val2017", val)
    return Data(images("coco", "train2017", train), whole, whole.with_transform(None))


@pytest.mark.parametrize(
    ("data", "differences"),
    [
        (food101(75_750, 25_250), []),
        (food101(75_750, 25_250, fraction=0.5), []),
        (food101(75_749, 25_250), ["data: food101 train has 75,749 images, published 75,750"]),
        (food101(75_750, 25_251), ["data: food101 test has 25,251 images, published 25,250"]),
        (coco(117_266, 4_952), []),
        (
            coco(118_287, 5_000),
            [
                "data: coco train2017 has 118,287 images, published 117,266",
                "data: coco val2017 has 5,000 images, published 4,952",
            ],
        ),
        (
            Data(*(images("aircraft", *part) for part in (("train", 3_334), ("val", 3_333), ("test", 3_333)))),
            [],
        ),
        (
            Data(*(images("aircraft", *part) for part in (("trainval", 6_667), ("test", 10), ("test", 10)))),
            ["data: aircraft test has 10 images, published 3,333"],
        ),
    ],
)
def test_splits_are_measured_against_the_published_ones(data: Data, differences: list[str]) -> None:
    counts = published(data.test.name).counts
    assert sorted(data_differences(data, counts)) == sorted(differences)
    assert data_differences(data, {}) == []


def test_parameters_are_counted_once_each() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert parameter_counts(model) == {"total": 15 + 6 + 8, "trained": 29}
    model[0].requires_grad_(False)
    model.append(model[2])  # a shared layer is one layer
    assert parameter_counts(model) == {"total": 29, "trained": 14}


def test_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["timm"] == timm.__version__
    assert found["scikit-learn"] == metadata.version("scikit-learn")
    assert all(found.values())
    known = metadata.version

    def without_pillow(name: str) -> str:
        if name == "pillow":  # pillow-simd takes its place
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(provenance.metadata, "version", without_pillow)
    assert versions() == found | {"pillow": "unknown"}


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_this_code_and_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    source = tmp_path / "project" / "common" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text("first\n")
    assert provenance._commit(source) == "not a git checkout"

    project = tmp_path / "project"
    git(project, "init", "--quiet")
    (project / "README").write_text("a project whose environment holds a copy of our code\n")
    git(project, "add", "README")
    git(project, "commit", "--quiet", "-m", "theirs")
    assert provenance._commit(source) == "not a git checkout"

    git(project, "add", "common")
    git(project, "commit", "--quiet", "-m", "ours")
    head = git(project, "rev-parse", "--short=12", "HEAD")
    assert provenance._commit(source) == head
    source.write_text("second\n")
    assert provenance._commit(source) == f"{head}-dirty"

    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._commit(source) == "not a git checkout"


def test_device_and_memory_of_this_machine() -> None:
    cpu = torch.device("cpu")
    assert device_name(cpu).startswith("cpu: ")
    assert device_name(cpu).endswith(f", {torch.get_num_threads()} threads")
    assert 50 * 2**20 < peak_memory(cpu) < 2**40  # bytes: a process that has imported torch
    status = Path("/proc/self/status")
    if status.exists():  # Linux's own account of the same
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        assert peak_memory(cpu) == pytest.approx(int(line.split()[1]) * 1024, rel=0.01)
