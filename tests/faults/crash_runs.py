"""Runs that are killed at a moment, resumed, and compared with one that was left alone."""

import functools
import json
import multiprocessing.util
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.checkpoint import load_state
from common.records import read_record
from faults.cases import FFVT, GFT, GLSIM

PATIENCE = 240.0  # seconds for a run that takes one, or for the server to start, on a machine with much else to do
EVALUATE_EVERY = 3  # steps
BEHIND_THE_LAST_BATCH = 100  # operations: a run that is asked to stop there, in its last evaluation, is done
ORPHANS = 20.0  # seconds in which a data worker notices that its run is gone: it looks every 5
EARLIER = b"of an earlier run"
# What differs from run to run, or says how it was started.
OWN = {"wall_seconds", "trained_seconds", "time", "images_per_s", "cpu_workers"}
OWN_OF_RECORD = {*("started", "finished", "wall_seconds", "speed", "peak_memory_bytes", "options", "arithmetic")}


@dataclass(frozen=True)
class Program:
    """An entry point with a run of nine steps and three evaluations, which saves at every second step too.

    The seeds are such that the second evaluation is the best: best files are written twice, and are not the last.
    """

    entry: str
    words: tuple[str, ...]
    named: tuple[str, ...]  # what every command line has to say
    again: tuple[str, ...]  # options that a resumed run does not keep
    workers: str  # the flag for the number of data workers
    folder: str  # of its runs
    published: tuple[str, ...] = ()  # files that it writes beside its folder
    curves: str = ""  # TensorBoard's of the released program

    def start(self, workers: int) -> list[str]:
        return [str(ROOT / self.entry), *self.named, *self.words, *self.again, self.workers, str(workers)]

    def resume(self, folder: Path, workers: int) -> list[str]:
        return [*self.to_resume(folder), *self.again, self.workers, str(workers)]

    def to_resume(self, folder: Path) -> list[str]:
        """What a stopped run tells its user to type, after `python`."""
        return [str(ROOT / self.entry), *self.named, "--demo", "--resume", str(folder)]


SMALL = ("--demo", "--limit", "48", "--output", "runs")
PROGRAMS = {
    GFT: Program(
        GFT,
        (*SMALL, "--epochs", "3", "--batch-size", "16", "--seed", "1"),
        (),
        ("--log-every", "1", "--save-every", "2"),
        "--workers",
        "gft_food101",
    ),
    FFVT: Program(
        FFVT,
        (
            *(*SMALL, "--dataset", "CUB", "--feature_fusion", "--num_steps", "9", "--train_batch_size", "16"),
            *("--eval_every", "3", "--warmup_steps", "3", "--seed", "7"),
        ),
        ("--name=k",),
        ("--log_every", "1", "--save_every", "2"),
        "--workers",
        "ffvt-k",
        ("output/k_checkpoint.bin",),
        "logs/k",
    ),
    GLSIM: Program(
        GLSIM,
        (
            *(*SMALL, "--cfg_method", str(ROOT / "glsim" / "configs" / "methods" / "glsim.yaml"), "--epochs", "3"),
            *("--eval_freq", "1", "--warmup_steps", "3", "--hidden_dropout_prob", "0.1", "--cm", "--mu", "--ra", "2"),
            *("--seed", "3"),
        ),
        (),
        ("--log_freq", "1", "--save_every", "2"),
        "--cpu_workers",
        "glsim",
        tuple(f"results_train/demo_cub_vit_b16_16_0/vit_b16_{which}.pth" for which in ("best", "last")),
    ),
}


@dataclass(frozen=True)
class Kill:
    """`signal` (its name) at the `number`-th moment of `phase` (crash_moments)."""

    signal: str
    phase: str
    number: int

    def __str__(self) -> str:
        return f"{self.signal} at {self.phase} {self.number}"


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (less than 0: the signal that killed it), what it printed, its process group."""

    status: int
    out: str
    err: str
    group: int


class Server:
    """crash_server, started once a process."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "faults.crash_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # else `select` would not see what a buffer holds
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        )

    def run(self, words: Sequence[str], home: Path, kill: Kill | None, counts: Path | None = None) -> Ended:
        moment = [kill.phase, kill.number, int(getattr(signal, kill.signal))] if kill else []
        job = {"words": list(words), "home": str(home), "moment": moment, "counts": str(counts or "")}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        group = self._answer()
        try:
            status = self._answer()
        except TimeoutError:
            os.killpg(group, signal.SIGKILL)
            self._answer()
            raise AssertionError(f"{shlex.join(words)} hung after {kill}: {(home / 'out').read_text()}") from None
        out, err = ((home / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return Ended(status, out, err, group)

    def _answer(self) -> int:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise TimeoutError
        return int(self.process.stdout.readline())


@functools.cache
def server() -> Server:
    return Server()


@dataclass(frozen=True)
class Reference:
    """A run that was left alone: its home, what it has written, and how often each of its moments comes."""

    home: Path
    written: dict[str, Any]
    counts: dict[str, int]


@functools.cache
def reference(entry: str) -> Reference:
    """Made once a process, and removed with it. A run that is watched for its moments computes what others do."""
    base = Path(tempfile.mkdtemp(prefix="crash-"))
    multiprocessing.util.Finalize(None, shutil.rmtree, (base,), exitpriority=0)
    program = PROGRAMS[entry]
    home = new_home(base / "reference", program, None)
    watched = new_home(base / "watched", program, home)
    for place, counts in ((home, None), (watched, base / "counts.json")):
        ended = server().run(program.start(0), place, None, counts)
        assert ended.status == 0, ended.err
    written = what_was_written(program, home)
    assert_equal(what_was_written(program, watched), written, "watched")
    return Reference(home, written, json.loads((base / "counts.json").read_text()))


def new_home(home: Path, program: Program, other: Path | None) -> Path:
    """A folder to run in, in which an earlier run has left its published files; data are those of the `other` home."""
    (home / "runs").mkdir(parents=True)
    if other is not None:
        (home / "runs" / "demo-data").symlink_to(other / "runs" / "demo-data")
    for name in program.published:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(EARLIER)
    return home


def survive(entry: str, home: Path, kills: Sequence[Kill], workers: int = 0) -> None:
    """Kills a run, and the runs that resume it, at these moments; then resumes it to its end. AssertionError where a
    file is damaged, a run cannot be resumed, or the end is not what it is without kills."""
    program, like = PROGRAMS[entry], reference(entry)
    new_home(home, program, like.home)
    words = program.start(workers)
    for kill in kills:
        ended = server().run(words, home, kill)
        assert_none_alive(ended.group)
        folder = max((home / "runs" / program.folder).glob("*/")).relative_to(home)
        assert_ended_well(program, home, folder, kill, ended)
        if (home / folder / "record.json").exists():
            break
        words = program.resume(folder, workers)
        if not (home / folder / "last.pt").exists():
            refused = server().run(words, home, None)
            assert refused.status == 1, refused
            assert len(refused.err.splitlines()) == 1, refused.err
            assert re.search(r"(model\.json|last\.pt) does not exist: .*(start|run)", refused.err), refused.err
            shutil.rmtree(home / folder)
            words = program.start(workers)
    else:
        ended = server().run(words, home, None)
        assert (ended.status, ended.err) == (0, ""), ended
        assert_none_alive(ended.group)
    assert_equal(what_was_written(program, home), like.written, "")


def assert_ended_well(program: Program, home: Path, folder: Path, kill: Kill, ended: Ended) -> None:
    """The run died or stopped as `kill` lets it, or was done by then; what it has left is whole."""
    done = (home / folder / "record.json").exists()
    if kill.signal == "SIGKILL":
        assert ended.status == -signal.SIGKILL or (done and ended.status == 0), ended
    else:
        stopped = 130 if kill.signal == "SIGINT" else 0
        assert (ended.status, ended.err) == (0 if done else stopped, ""), ended
        assert not list(home.rglob(".*.tmp"))
    if not done and kill.signal != "SIGKILL":
        (sentence,) = [line for line in ended.out.splitlines() if line.startswith(f"stopped by {kill.signal} ")]
        command = shlex.split(sentence.partition("everything saved; continue with: ")[2])
        assert command == ["python", *program.to_resume(folder)], sentence
    if kill.phase == "evaluation" and kill.signal != "SIGKILL":  # met in the evaluation, not after the step behind it
        assert not done or kill.number > reference(program.entry).counts["evaluation"] - BEHIND_THE_LAST_BATCH
        assert load_state(home / folder / "last.pt")["step"] % EVALUATE_EVERY == 0
    for path in [*(home / folder).iterdir(), *(home / name for name in program.published)]:
        assert_whole(path)


def assert_whole(path: Path) -> None:
    """The file can be read to its end, if it is there."""
    if not path.is_file() or path.name.startswith(".") or path.read_bytes() == EARLIER:
        return
    if path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix in (".pt", ".bin", ".pth"):
        load_state(path)
    elif path.name == "record.json":
        read_record(path)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".png":
        Image.open(path).load()
    else:
        assert path.read_bytes().endswith(b"\n"), path


def assert_none_alive(group: int) -> None:
    """No process of the group is left, but for those that only wait to be counted by their parent."""
    deadline = time.monotonic() + ORPHANS
    while alive := [number for number in Path("/proc").glob("[0-9]*") if _lives_in(number, group)]:
        assert time.monotonic() < deadline, [(number / "cmdline").read_text() for number in alive]
        time.sleep(0.05)


def _lives_in(process: Path, group: int) -> bool:
    try:
        state, _, found = (process / "stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(found) == group and state not in "ZX"


def what_was_written(program: Program, home: Path) -> dict[str, Any]:
    """All that the one finished run in `home` has left there; AssertionError where something was left half-written."""
    (folder,) = (home / "runs" / program.folder).glob("*/")
    assert not [path for path in home.rglob(".*") if path.name != ".lock"]
    with safe_open(folder / "best.safetensors", "pt") as file:
        note = file.metadata()
    record = {name: value for name, value in read_record(folder / "record.json").items() if name not in OWN_OF_RECORD}
    return {
        "names": names(folder),
        "last.pt": load_state(folder / "last.pt"),
        "best.safetensors": (load_file(folder / "best.safetensors"), note),
        "record.json": record,
        "log.jsonl": log_of(folder),
        "tables": {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".png")},
        "curves": [curves_of(path) for path in (folder / "tensorboard", home / program.curves) if path != home],
        "published": {
            name: (names((home / name).parent), load_state(home / name), earlier_of(home / name))
            for name in program.published
        },
    }


def earlier_of(path: Path) -> bytes:
    return path.with_suffix(f".1{path.suffix}").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(found: Any, expected: Any, where: str) -> None:
    """Equal to the last bit, but for what is a run's own."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected.keys() - OWN:
            assert_equal(found[name], expected[name], f"{where}: {name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), (where, found, expected)
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{where}: {number}")
    else:
        assert found == expected, where


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def curves_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard reads them. Of a step it may hold the same figure twice, which nobody sees."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if not tag.endswith("images_per_s")]
    return {tag: sorted({(event.step, event.value) for event in reader.Scalars(tag)}) for tag in tags}
