"""Shared by all tests: one thread a process (several run side by side) unless said otherwise, and the demo data."""

import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

LONG = ("contract", "test_export.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first: handed out last, it would be what all processes but one wait for."""
    items.sort(key=lambda item: next((place for place, part in enumerate(LONG) if part in item.path.parts), len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file share its fixtures and so a process; those of the contract, the runs of one program.

    xdist's own `--dist loadgroup` groups nothing under pytest 9.2: it writes the group to an attribute that is gone.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            program = re.search(r"\[(?:.*-)?(gft|densenet|ffvt|glsim)(?:-.*)?\]$", test)
            return program[1] if "/contract/" in file and program else file

    config.option.loadscopereorder = False  # the order of the items, not the files with the most tests first
    return Grouped(config, log)


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An --output folder whose demo data are there already, for every run that may share it."""
    from common.data import write_demo

    output = tmp_path_factory.mktemp("runs")
    for name in ("aircraft", "coco", "food101"):
        write_demo(name, output / "demo-data")
    return output
