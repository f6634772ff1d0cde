"""Shared by all tests: one thread a process (several run side by side), the demo data, scripts run in this process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import io
import json
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Outcome:
    """How a script ended: exit status, what it printed, the folder of its run if it made one."""

    status: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        line = next(line for line in self.out.splitlines() if line.startswith("run folder: "))
        return Path(line.removeprefix("run folder: "))

    @property
    def record(self) -> dict[str, Any]:
        line = next(line for line in self.out.splitlines() if line.startswith("record: "))
        return json.loads(Path(line.removeprefix("record: ")).read_text(encoding="utf-8"))


def run_script(name: str, *words: str | Path) -> Outcome:
    """Runs a top-level script as `python name words...` would, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [name, *map(str, words)]
    status = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = before
    return Outcome(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An --output folder whose demo data are there already, for every run that may share it."""
    from common.data import write_demo

    output = tmp_path_factory.mktemp("runs")
    for name in ("aircraft", "coco", "food101"):
        write_demo(name, output / "demo-data")
    return output
