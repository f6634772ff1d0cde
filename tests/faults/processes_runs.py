"""Small runs of the entry points on several processes, started by torchrun, by two of it, or as srun starts them."""

import functools
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from scripts import ROOT, Outcome
from test_dist import free_port, torchrun_environments

from faults import processes_breaker
from faults.cases import FFVT, GFT, GLSIM
from faults.inside import METHOD, home, log, record

BATCH = 12  # images a step over all processes
IMAGES = 67  # a prime number; with the last batch of 7 every share changes its size, which GFT's average goes by
STEPS = 12  # two epochs
TIMEOUT = 15  # seconds of --dist-timeout for runs that are to hang
PATIENCE = 280.0  # seconds for anything, on a machine with other work; pytest ends a test after 300
MINUTE = 60.0  # in which all processes end when one of them does


@dataclass(frozen=True)
class Program:
    """An entry point with a run of STEPS steps, two evaluations and a save at every second step.

    No dropout: of that each process draws its own.
    """

    words: tuple[str, ...]
    batch: str  # the flag
    per_process: bool  # whether it counts the images of one process
    folder: str  # of its runs

    def command(self, size: int) -> list[str]:
        return [*self.words, self.batch, str(BATCH // size if self.per_process else BATCH)]


COMMON = ("--demo", "--limit", str(IMAGES), "--output", "runs", "--save-every", "2")
PLAIN_GFT = ("patch_size=4", "embed_dim=64", "depth=9", "num_heads=4", "drop_path_rate=0")
PROGRAMS = {
    GFT: Program(
        (*COMMON, "--epochs", "2", "--workers", "0", "--log-every", "1", "--model-kwargs", *PLAIN_GFT),
        *("--batch-size", False, "gft_food101"),
    ),
    FFVT: Program(
        (
            *(*COMMON, "--name", "k", "--dataset", "CUB", "--feature_fusion", "--num_steps", "12"),
            *("--eval_every", "6", "--warmup_steps", "3", "--workers", "0", "--log_every", "1"),
        ),
        *("--train_batch_size", True, "ffvt-k"),
    ),
    GLSIM: Program(
        (
            *(*COMMON, "--cfg_method", METHOD, "--epochs", "2", "--eval_freq", "1", "--warmup_steps", "3"),
            *("--cpu_workers", "0", "--log_freq", "1"),
        ),
        *("--batch_size", True, "glsim"),
    ),
}


class Launch:
    """Processes that were started together in `place`, with all that they print; `with` ends what is left of them."""

    def __init__(self, place: Path, files: Sequence[tuple[Path, Path]], processes: Sequence["Started"]) -> None:
        """`files`: where output and errors of each process go."""
        self.place, self.files, self.processes = place, files, processes

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for number in Path("/proc").glob("[0-9]*"):  # torchrun's own children outlive it
            if _works_in(number, self.place):
                os.kill(int(number.name), signal.SIGKILL)

    def end(self, seconds: float = PATIENCE, without: Sequence[int] = ()) -> list[Outcome]:
        """How all processes ended, the last within a minute of the first; those `without` are not waited for."""
        expected = {number for number in range(len(self.processes)) if number not in without}
        begun = time.monotonic()
        first = None
        while running := {number for number in expected if self.processes[number].poll() is None}:
            now = time.monotonic()
            if first is None and running != expected:
                first = now
            late = now - begun > seconds or (first is not None and now - first > MINUTE)
            assert not late, f"{running} go on: {self._outcomes()}"
            time.sleep(0.02)
        return self._outcomes()

    def _outcomes(self) -> list[Outcome]:
        ended = [process.poll() for process in self.processes]
        texts = [[file.read_text(encoding="utf-8") for file in pair] for pair in self.files]
        return [Outcome(-1000 if code is None else code, *pair) for code, pair in zip(ended, texts, strict=True)]

    def wait_for_step(self, step: int) -> None:
        """Until the log of the run has reached `step`."""
        deadline = time.monotonic() + PATIENCE
        while not any(line.count("\n") >= step for line in self._logs()):
            late = time.monotonic() > deadline or self.processes[0].poll() is not None
            assert not late, self._outcomes()
            time.sleep(0.02)

    def _logs(self) -> list[str]:
        return [path.read_text(encoding="utf-8") for path in self.place.glob("runs/*/*/log.jsonl")]


def _works_in(process: Path, place: Path) -> bool:
    try:
        return (process / "cwd").resolve() == place.resolve()
    except OSError:  # it has just ended
        return False


class Forked:
    """A process of `plain`, with what Launch needs of a subprocess.Popen."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


Started = subprocess.Popen[bytes] | Forked
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
ENVIRONMENT = {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}


def _files(place: Path, count: int) -> list[tuple[Path, Path]]:
    """New ones at each launch; they lie beside the folder that the processes work in."""
    folder = Path(tempfile.mkdtemp(prefix="said-", dir=place.parent))
    return [(folder / f"out-{number}", folder / f"err-{number}") for number in range(count)]


def _launchers(place: Path, commands: Sequence[Sequence[str]]) -> Launch:
    files, processes = _files(place, len(commands)), []
    for words, (out, err) in zip(commands, files, strict=True):
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        with open(out, "wb") as one, open(err, "wb") as other:
            process = subprocess.Popen(command, cwd=place, env=os.environ | ENVIRONMENT, stdout=one, stderr=other)
        processes.append(process)
    return Launch(place, files, processes)


def torchrun(
    entry: str, place: Path, size: int, words: Sequence[str], broken: str = "", options: Sequence[str] = ()
) -> Launch:
    """`options` are torchrun's; `broken` as processes_breaker has it."""
    how = ["--standalone", *options, "--nproc_per_node", str(size)]
    return _launchers(place, [[*how, *_program(entry, broken), *words]])


def two_nodes(entry: str, place: Path, words: Sequence[str], broken: str = "", options: Sequence[str] = ()) -> Launch:
    """Two launchers of one process each, which meet on loopback."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two"]
    node = ["--nnodes", "2", *meeting, *options, "--nproc_per_node", "1", *_program(entry, broken), *words]
    return _launchers(place, [node, node])


def _program(entry: str, broken: str) -> list[str]:
    return [*(["-m", "faults.processes_breaker", broken] if broken else []), str(ROOT / entry)]


def plain(entry: str, place: Path, size: int, words: Sequence[str], broken: str = "") -> Launch:
    """As srun starts them: no launcher ends the others when one ends.

    They are forks of a process that has imported everything, which saves most of the time that they take.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.processes_breaker"])
    files, processes = _files(place, size), []
    environments = torchrun_environments(size) if size > 1 else [{}]
    for environment, pair in zip(environments, files, strict=True):
        become = (environment, place, pair, broken, [str(ROOT / entry), *words])
        process = context.Process(target=processes_breaker.become, args=become)
        with mock.patch.dict(os.environ, ENVIRONMENT):
            process.start()
        processes.append(Forked(process))
    return Launch(place, files, processes)


@functools.cache
def reference(entry: str, size: int, more: tuple[str, ...] = ()) -> Path:
    """The run's folder of a run that was left alone; made once a process, and removed with it."""
    base = Path(tempfile.mkdtemp(prefix="processes-"))
    multiprocessing.util.Finalize(None, shutil.rmtree, (base,), exitpriority=0)
    place = home(base / "home")
    with plain(entry, place, size, [*PROGRAMS[entry].command(size), *more]) as launch:
        assert_done(launch.end())
    return run_folder(entry, place)


def run_folder(entry: str, place: Path) -> Path:
    """Of the one run there."""
    (folder,) = (place / "runs" / PROGRAMS[entry].folder).glob("*/")
    return folder


def assert_done(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.status == 0, outcome


def differences(folder: Path, like: Path) -> Iterator[float]:
    """Of the losses of every step and evaluation; AssertionError where steps, rates or counts are not the same."""
    found, expected = log(folder), log(like)
    assert [(line["kind"], line["step"], line.get("lr")) for line in found] == [
        (line["kind"], line["step"], line.get("lr")) for line in expected
    ]
    for one, other in zip(found, expected, strict=True):
        yield abs(one["loss"] - other["loss"])
        assert (one.get("correct"), one.get("total")) == (other.get("correct"), other.get("total"))
    results = [record(path)["results"] for path in (folder, like)]
    for which in ("last", "best"):
        one, other = (result[which]["test"] for result in results)
        assert (one["correct"], one["total"]) == (other["correct"], other["total"])
        assert one["total"] == IMAGES
        yield abs(one["loss"] - other["loss"])
