"""Shared by all tests: one thread a process (several run side by side) and the demo data."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file share its fixtures and so a process (`--dist loadgroup`); fault cases, of one section."""
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        item.add_marker(pytest.mark.xdist_group(getattr(case, "section", str(item.path))))


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An --output folder whose demo data are there already, for every run that may share it."""
    from common.data import write_demo

    output = tmp_path_factory.mktemp("runs")
    for name in ("aircraft", "coco", "food101"):
        write_demo(name, output / "demo-data")
    return output
