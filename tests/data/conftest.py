"""Demo data, written once for all data tests; a test that changes it copies it first."""

import hashlib
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from common.data.demo import write_demo
from common.data.published import DATA_SETS


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    for name in sorted(DATA_SETS):  # air before aircraft, whose folder it would take for its own
        write_demo(name, root)
    return root


@pytest.fixture
def demo_cifar_is_published(demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the demo's files the published ones, so that torchvision takes them."""
    for name, source in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        folder = demo_root / DATA_SETS[name].folder

        def md5(file: str, folder: Path = folder) -> str:
            return hashlib.md5((folder / file).read_bytes()).hexdigest()

        for part in ("train_list", "test_list"):
            monkeypatch.setattr(source, part, [[file, md5(file)] for file, _ in getattr(source, part)])
        monkeypatch.setitem(source.meta, "md5", md5(source.meta["filename"]))
