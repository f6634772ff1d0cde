"""The three entry points, small and on demo data, inside this process."""

import atexit
import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scripts import ROOT, Outcome, run_script

from common.data import write_demo
from common.data.demo import MARKER
from common.train import Training
from faults.cases import FFVT, GFT, GLSIM
from glsim.train_utils.demo import write_demo as write_splits

METHOD = str(ROOT / "glsim" / "configs" / "methods" / "glsim.yaml")
SMALL: dict[str, tuple[str, ...]] = {
    GFT: ("--demo", "--limit", "72", "--epochs", "2", "--batch-size", "16", "--log-every", "1"),
    FFVT: (
        *("--demo", "--name", "fault", "--dataset", "CUB", "--feature_fusion", "--log-every", "1"),
        *("--limit", "71", "--num_steps", "8", "--train_batch_size", "16", "--eval_every", "4"),
    ),
    GLSIM: ("--demo", "--cfg_method", METHOD, "--limit", "72", "--epochs", "2", "--eval_freq", "1", "--log_freq", "1"),
}
WORKERS = {GFT: "--workers", FFVT: "--workers", GLSIM: "--cpu_workers"}
# Where the demo's data lie below the folder of all demo data.
DATA = {GFT: "food-101", FFVT: "CUB", GLSIM: "CUB"}


def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fault-shared-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def demo_data() -> Path:
    """The digits of all three, written once a process."""
    folder = _temporary()
    write_demo("food101", folder)
    write_splits(folder / "CUB")
    return folder


def home(folder: Path, own_data: bool = False) -> Path:
    """`folder`, made a place to run in: its demo data are there, as a copy of its own where they are to be broken."""
    (folder / "runs").mkdir(parents=True)
    place = folder / "runs" / "demo-data"
    if own_data:
        shutil.copytree(demo_data(), place)
    else:
        place.symlink_to(demo_data())
    return folder


def changed(data: Path) -> None:
    """Makes demo data that were changed pass for whole: they would be written anew."""
    marker = json.loads((data / MARKER).read_text(encoding="utf-8"))
    marker["files"] = {file: (data / file).stat().st_size for file in marker["files"] if (data / file).exists()}
    (data / MARKER).write_text(json.dumps(marker), encoding="utf-8")


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(entry: str, folder: Path, *words: str | Path, workers: int = 0) -> Outcome:
    """The program in `folder`, a `home`; later words win over the usual ones."""
    with working_in(folder):
        usual = (*SMALL[entry], WORKERS[entry], str(workers), "--output", str(folder / "runs"))
        return run_script(entry, *usual, *words)


def done(outcome: Outcome) -> Path:
    """The folder of a run that ended well."""
    assert outcome.status == 0, outcome.err
    return outcome.folder


def sentence(outcome: Outcome) -> str:
    """What a program said that ended in one sentence."""
    assert outcome.status == 1, (outcome.out, outcome.err)
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    return lines[0]


@functools.cache
def trained(entry: str) -> Path:
    """A finished run, once a process; not to be changed."""
    return done(run(entry, home(_temporary())))


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Runs in this block get SIGTERM once they have taken so many steps."""
    report = Training._report

    def reporting(self: Training) -> str:
        if self.trainer.step == step:
            signal.raise_signal(signal.SIGTERM)
        return report(self)

    with mock.patch.object(Training, "_report", reporting):
        yield


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.pt", weights_only=True)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert one.shape == other.shape, path
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other) if tensor.numel()]
        assert not bits or torch.equal(*bits), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            assert_equal(value, other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_equal(first, second, f"{path}.{number}")
    else:
        assert one == other, f"{path}: {one} {other}"


def assert_same_training(folder: Path, reference: Path) -> None:
    """Weights, optimizer and everything else that later steps depend on."""
    for name in ("model", "optimizer", "scheduler", "precision", "transient", "step", "skipped"):
        assert_equal(state(folder)[name], state(reference)[name], name)


def assert_same_run(folder: Path, reference: Path) -> None:
    """The training, what was logged of it, and the figures at the end."""
    assert_same_training(folder, reference)
    assert_equal(state(folder)["history"], state(reference)["history"], "history")
    traces = [
        [{name: value for name, value in line.items() if name not in ("time", "images_per_s")} for line in log(path)]
        for path in (folder, reference)
    ]
    assert_equal(traces[0], traces[1], "log")
    assert_equal(record(folder)["results"], record(reference)["results"], "results")
