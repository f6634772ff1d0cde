"""CIFAR-10 and CIFAR-100: against torchvision's own data sets; missing, damaged and hostile files."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_trees import sentence
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2

from common.data import cifar10, cifar100
from common.data.demo import MARKER
from common.data.readers import READERS
from common.errors import UserError

SOURCES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@pytest.mark.usefixtures("demo_cifar_is_published")
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_equals_torchvision(demo_root: Path, name: str, split: str) -> None:
    images = READERS[name](demo_root, split)
    reference = SOURCES[name](demo_root / name, train=split == "train")
    assert images.classes == reference.classes
    assert images.labels == reference.targets
    assert len(images) == len(reference) > 250
    for index in range(len(images)):
        (mine, label), (theirs, same) = images[index], reference[index]
        assert (label, mine.mode, mine.tobytes()) == (same, theirs.mode, theirs.tobytes())
    assert images.ids[17] == f"{split}/00017"


@pytest.mark.usefixtures("demo_cifar_is_published")
def test_files_without_the_marker_of_the_demo(demo_root: Path, tmp_path: Path) -> None:
    """As the published data: also where torchvision puts them, at the data root."""
    folder = tmp_path / "cifar-10-batches-py"
    shutil.copytree(demo_root / "cifar10/cifar-10-batches-py", folder)
    (folder / MARKER).unlink()
    assert cifar10(tmp_path, "test").fingerprint() == cifar10(demo_root, "test").fingerprint()
    with (folder / "data_batch_3").open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError) as caught:
        cifar10(tmp_path, "test")
    sentence(caught.value, folder / "data_batch_3", "is not the published file", "www.cs.toronto.edu", "--data-root")


def test_subsets_and_workers(demo_root: Path) -> None:
    images = cifar100(demo_root, "test")
    part = images.subset([7, 3]).with_transform(v2.PILToTensor())
    for index, original in enumerate((7, 3)):
        assert (part[index][0].permute(1, 2, 0).numpy() == np.asarray(images[original][0])).all()
    again = pickle.loads(pickle.dumps(part))
    pixels, labels = next(iter(DataLoader(again, batch_size=2, num_workers=1)))
    assert labels.tolist() == [images.labels[7], images.labels[3]]
    assert (pixels[1] == part[1][0]).all()


@pytest.fixture
def copied(demo_root: Path, tmp_path: Path) -> Path:
    """A copy of the demo of CIFAR-10, for damage."""
    return Path(shutil.copytree(demo_root / "cifar10", tmp_path / "cifar10")) / "cifar-10-batches-py"


@pytest.mark.parametrize("file", ["data_batch_5", "test_batch", "batches.meta"])
def test_a_missing_file(copied: Path, tmp_path: Path, file: str) -> None:
    (copied / file).unlink()
    with pytest.raises(UserError) as caught:
        cifar10(tmp_path, "train")
    sentence(caught.value, copied / file, "is not there", "www.cs.toronto.edu", "--no-download")


def test_a_cut_file_of_the_demo(copied: Path, tmp_path: Path) -> None:
    os.truncate(copied / "test_batch", 1000)
    with pytest.raises(UserError) as caught:
        cifar10(tmp_path, "train")
    sentence(caught.value, copied, "is not the published file", "www.cs.toronto.edu")


@pytest.mark.usefixtures("demo_cifar_is_published")
def test_a_file_that_cannot_be_read(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / MARKER).unlink()

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(CIFAR10, "_load_meta", fail)
    with pytest.raises(UserError) as caught:
        cifar10(tmp_path, "test")
    sentence(caught.value, copied, "cannot be read (Permission denied)")


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(Path.cwd() / "called"),)


def test_a_demo_marker_does_not_make_a_file_trusted(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle calls what it names: beside a marker anybody can write, only the names that arrays need are allowed."""
    monkeypatch.chdir(tmp_path)
    path = copied / "test_batch"
    size = path.stat().st_size
    path.write_bytes(pickle.dumps(Hostile()).ljust(size, b"."))
    with pytest.raises(UserError) as caught:
        cifar10(tmp_path, "test")
    sentence(caught.value, path, "is no file of the demo data")
    assert not (tmp_path / "called").exists()
