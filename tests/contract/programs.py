"""Four programs with a small run each, how they are started, and what they leave."""

import functools
import json
import multiprocessing.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds for anything that takes one, on a machine with much else to do
PATH = os.pathsep.join([str(ROOT / "tests" / "contract" / "startup"), str(ROOT), str(ROOT / "tests")])
ENVIRONMENT = {
    **{"PYTHONPATH": PATH, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"},
    **{"PYTHONFAULTHANDLER": "1"},  # a program that is aborted says where it stands
}


@dataclass(frozen=True)
class Program:
    """A program and a run of it: nine steps on 48 digits, an evaluation after every third, a save at every second.

    All have dropout or stochastic depth but DenseNet, which has BatchNorm; GLSim mixes images and repeats them too.
    """

    file: str
    run: tuple[str, ...]  # what makes it this run
    often: tuple[str, ...]  # how often it reports and saves, and by which processes: a resumed run does not keep them
    named: tuple[str, ...] = ()  # what every command line has to say
    published: tuple[str, ...] = ()  # checkpoints that it writes beside its folder

    def start(self, *more: str | Path) -> list[str]:
        return [*self.named, *self.run, *self.often, *map(str, more)]

    def other(self, *more: str | Path) -> list[str]:
        """Evaluation, prediction, export, resuming: on the same digits."""
        return [*self.named, "--demo", "--output", "runs", *self.often, *map(str, more)]


SMALL = ("--demo", "--limit", "48", "--output", "runs")
SCRIPT = (*SMALL, "--epochs", "3", "--batch-size", "16", "--seed", "1")
OFTEN = ("--log-every", "1", "--save-every", "2", "--workers", "0")
METHOD = str(ROOT / "glsim" / "configs" / "methods" / "glsim.yaml")
PROGRAMS = {
    "gft": Program("gft_food101.py", SCRIPT, OFTEN),
    "densenet": Program("densenet169_food101.py", SCRIPT, OFTEN),
    "ffvt": Program(
        "ffvt/train.py",
        (
            *(*SMALL, "--dataset", "CUB", "--feature_fusion", "--num_steps", "9", "--train_batch_size", "16"),
            *("--eval_every", "3", "--warmup_steps", "3", "--seed", "7"),
        ),
        ("--log_every", "1", "--save_every", "2", "--workers", "0"),
        ("--name=k",),
        ("output/k_checkpoint.bin",),
    ),
    "glsim": Program(
        "glsim/tools/train.py",
        (
            *(*SMALL, "--cfg_method", METHOD, "--epochs", "3", "--eval_freq", "1", "--warmup_steps", "3"),
            *("--hidden_dropout_prob", "0.1", "--cm", "--mu", "--ra", "2", "--seed", "3"),
        ),
        ("--log_freq", "1", "--save_every", "2", "--cpu_workers", "0"),
        (),
        tuple(f"results_train/demo_cub_vit_b16_16_0/vit_b16_{which}.pth" for which in ("best", "last")),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status (less than 0: the signal that killed it), and what it printed."""

    status: int
    out: str
    err: str
    moments: dict[str, Any] | None = None
    group: int = 0  # of its processes

    def sentence(self, *parts: str) -> str:
        """The one sentence on the screen of a program that did not succeed; it names these files and flags."""
        assert self.status == 1, self
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        for part in parts:
            assert part in lines[0], lines[0]
        return lines[0]

    def done(self) -> "Outcome":
        assert (self.status, self.err) == (0, ""), self
        return self

    @property
    def resume(self) -> list[str]:
        """The command that a stopped run says it goes on with, after `python`."""
        (line,) = [line for line in self.out.splitlines() if "--resume" in line]
        command = shlex.split(line[re.search(r"\b(python|torchrun) ", line).start() :])  # type: ignore[union-attr]
        return command[next(number for number, word in enumerate(command) if word.endswith(".py")) :]


class Moment(NamedTuple):
    phase: str = ""
    number: int = 0
    act: str = ""

    def __str__(self) -> str:
        return f"{self.act} at {self.phase} {self.number}"


class Started:
    """A program that was started by the server; `end` waits for it."""

    def __init__(self, words: Sequence[str], said: Path) -> None:
        self.words, self.said = words, said
        self.group = int(_appears(said / "pid"))

    def send(self, name: str) -> None:
        os.kill(self.group, getattr(signal, name))

    def end(self, seconds: float = PATIENCE) -> Outcome:
        try:
            status = int(_appears(self.said / "status", seconds))
        except TimeoutError:
            os.killpg(self.group, signal.SIGABRT)
            _appears(self.said / "status")
            raise AssertionError(f"{shlex.join(self.words)} hung: {self._text('out')}\n{self._text('err')}") from None
        counted = self.said / "moments"
        moments = json.loads(counted.read_text()) if counted.exists() else None
        return Outcome(status, self._text("out"), self._text("err"), moments, self.group)

    def _text(self, name: str) -> str:
        return (self.said / name).read_text(encoding="utf-8")


def _appears(path: Path, seconds: float = PATIENCE) -> str:
    deadline = time.monotonic() + seconds
    while not (path.exists() and (text := path.read_text())):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.005)
    return text


@functools.cache
def _server() -> "subprocess.Popen[bytes]":
    """One for each process of pytest; it ends with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "contract.server"], stdin=subprocess.PIPE, bufsize=0, env=os.environ | ENVIRONMENT
    )


def start(
    words: Sequence[str | Path], cwd: Path, moment: Moment | None = None, environment: dict[str, str] | None = None
) -> Started:
    """A program in a folder; the first word is its file, relative to the repository."""
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    # TensorBoard reads the curves of a run and of its resumption in the order of the seconds in their files' names.
    curves = [path for place in ("runs", "logs") for path in (cwd / place).rglob("events.out.tfevents.*")]
    begun = max((int(path.name.split(".")[3]) for path in curves), default=0)
    time.sleep(max(0.0, begun + 1 - time.time()))
    said = Path(tempfile.mkdtemp(prefix="said-", dir=_scratch()))
    job = {"words": words, "cwd": str(cwd), "environment": environment or {}, "moment": moment, "said": str(said)}
    stdin = _server().stdin
    assert stdin is not None
    stdin.write(json.dumps(job).encode() + b"\n")
    return Started(words, said)


def run(words: Sequence[str | Path], cwd: Path, moment: Moment | None = None) -> Outcome:
    return start(words, cwd, moment).end()


def start_ranks(
    words: Sequence[str | Path], cwd: Path, size: int, moments: dict[int, Moment] | None = None
) -> list[Started]:
    """A program in so many processes, with the environment that torchrun gives each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alike = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(size):
        environment = {name: str(value) for name, value in (alike | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        started.append(start(words, cwd, (moments or {}).get(rank), environment))
    return started


def launch(
    launcher: Sequence[str], words: Sequence[str | Path], cwd: Path, environment: dict[str, str] | None = None
) -> Outcome:
    """`python LAUNCHER... program words...` as a user types it, in processes of its own."""
    command = [sys.executable, *launcher, str(ROOT / words[0]), *map(str, words[1:])]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | ENVIRONMENT | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


# Folders to run in


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="contract-"))
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
    return folder


def new_home(home: Path, name: str, earlier: bool = False) -> Path:
    """A folder to run in, with the demo data of the reference: `--demo` writes them where they are not.

    `earlier`: an earlier run has published checkpoints there.
    """
    if home.parent != _scratch():
        reference(name)
    (home / "runs").mkdir(parents=True)
    if home != (first := _scratch() / f"{name}-reference"):
        (home / "runs" / "demo-data").symlink_to(first / "runs" / "demo-data")
    for file in PROGRAMS[name].published if earlier else ():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(EARLIER)
    return home


EARLIER = b"of an earlier run"


@dataclass(frozen=True)
class Reference:
    """A run that was left alone: its home, what it has printed and written, and its moments."""

    home: Path
    outcome: Outcome
    written: dict[str, Any]
    moments: dict[str, Any]

    @property
    def folder(self) -> Path:
        return run_folder(self.home)

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "record.json").read_text(encoding="utf-8"))


@functools.cache
def reference(name: str) -> Reference:
    """Made once a process of pytest; a run whose moments are counted computes what another does."""
    program = PROGRAMS[name]
    home = new_home(_scratch() / f"{name}-reference", name, True)
    outcome = run([program.file, *program.start()], home).done()
    counted = new_home(_scratch() / f"{name}-counted", name, True)
    moments = run([program.file, *program.start()], counted, Moment()).done().moments
    assert moments is not None
    assert_same(written(counted), written(home))
    return Reference(home, outcome, written(home), moments)


def run_folder(home: Path) -> Path:
    """Of the one run there: OUTPUT/<program>/<time>-<id>."""
    (folder,) = [path for path in (home / "runs").glob("*/*/") if path.parent.name != "demo-data"]
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def state_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.pt", weights_only=True)


# What a run leaves

# Times and speeds differ from run to run; options and arithmetic say how the last part of it was started, `code` of
# which state of the tree it was.
OWN = {
    *("wall_seconds", "trained_seconds", "time", "images_per_s", "cpu_workers", "started", "finished", "speed"),
    *("peak_memory_bytes", "options", "arithmetic", "code"),
}


def written(home: Path) -> dict[str, Any]:
    """All that the one run in `home` has written, by the name of the file: read as the format is read, to its end."""
    folder = run_folder(home)
    found: dict[str, Any] = {}
    for path in sorted(home.rglob("*")):
        if not path.is_file() or (home / "runs" / "demo-data") in path.parents:
            continue
        name = str(path.relative_to(home)).replace(folder.name, "RUN")
        if path.name.startswith("events.out.tfevents"):
            found[f"{Path(name).parent} curves"] = curves_of(path.parent)
        else:
            found[name] = content_of(path)
    return found


def content_of(path: Path) -> Any:
    """Fails where a file is damaged."""
    if path.read_bytes() == EARLIER:
        return EARLIER
    if path.suffix in (".pt", ".pth", ".bin"):
        return torch.load(path, weights_only=True)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return log_of(path.parent)
    return path.read_bytes() if not path.name.startswith(".") else None


def curves_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard reads them. Of a step it may hold the same figure twice, which nobody sees."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if not tag.endswith("images_per_s")]
    return {tag: sorted({(event.step, event.value) for event in reader.Scalars(tag)}) for tag in tags}


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the last bit, but for what is a run's own."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), (where, found.keys() ^ expected.keys())
        for name in expected.keys() - OWN:
            assert_same(found[name], expected[name], f"{where}/{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), (where, found, expected)
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    else:
        assert found == expected, where
