"""Running the top-level scripts, inside the tests' process or as programs of their own, and what came of it."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRACED = {"PYTHONFAULTHANDLER": "1"}  # environment of programs that say where they stand when they are aborted


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


def finish(process: "subprocess.Popen[str]", seconds: float = 120) -> Outcome:
    """What came of `process`, whose output is piped; where it does not end in time, the stacks of all that it started.

    Its environment is to have `TRACED`.
    """
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in [*_descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        out, err = process.communicate(timeout=30)
        raise AssertionError(f"{process.args} has not ended within {seconds:g} s\n{out}\n{err}") from None
    return Outcome(process.returncode, out, err)


def run_program(words: Sequence[str], cwd: Path, environment: Mapping[str, str] = os.environ) -> Outcome:
    """Runs a program, which may start others, and waits for it."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=cwd, env={**environment, **TRACED}, stdout=pipe, stderr=pipe, text=True)
    return finish(process, 240)


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield from _descendants(child)
            yield child
