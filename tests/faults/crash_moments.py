"""The moments of a run at which it can be killed, counted exactly: the same program has the same ones every time.

A moment is the name of a phase and a number: the n-th operation of torch in all forward passes together, in all
backward passes, optimizer steps or evaluations, or the n-th time that a file reached a part of its saving.
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils._python_dispatch import TorchDispatchMode

import common.files
import common.session
from common.amp import Precision
from common.engine import Trainer

COMPUTING = ("forward pass", "backward pass", "optimizer step", "evaluation")
# Of the saving of a file, in the order in which they come.
SAVING = ("temporary file opened", "half of its bytes", "before the sync", "before the rename", "after the rename")


class Moments:
    """Counts the moments of this process, and sends it `signal` at the `number`-th of `phase` (none: at no time)."""

    def __init__(self, phase: str = "", number: int = 0, signal: int = 0) -> None:
        self.phase, self.number, self.signal = phase, number, signal
        self.process = os.getpid()  # its data workers inherit the counters, and are not meant
        self.counts: Counter[str] = Counter()

    def pass_by(self, phase: str) -> None:
        self.counts[phase] += 1
        if (phase, self.counts[phase]) == (self.phase, self.number) and os.getpid() == self.process:
            os.kill(self.process, self.signal)

    def watch(self) -> None:
        """From now on the moments of this process are passed by."""
        prepare = Trainer.__post_init__

        def prepared(trainer: Trainer) -> None:
            prepare(trainer)
            trainer.objective = self._computing("forward pass", trainer.objective)

        Trainer.__post_init__ = prepared  # type: ignore[method-assign,assignment]
        Precision.backward = self._computing("backward pass", Precision.backward)  # type: ignore[method-assign]
        Precision.step = self._computing("optimizer step", Precision.step)  # type: ignore[method-assign]
        common.session.evaluate = self._computing("evaluation", common.session.evaluate)  # type: ignore[attr-defined]
        _Saves(self.pass_by).watch()
        _hold_curves()

    def _computing(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def computed(*arguments: Any, **named: Any) -> Any:
            with _Operations(lambda: self.pass_by(phase)):
                return function(*arguments, **named)

        return computed


def _hold_curves() -> None:
    """Lets curves come to the disk when they are flushed: so TensorBoard does where TensorFlow is installed."""
    write, flush, close = RecordWriter.write, RecordWriter.flush, RecordWriter.close

    def held(writer: Any) -> list[bytes]:
        return vars(writer).setdefault("held", [])

    def flushed(writer: Any) -> None:
        for data in held(writer):
            write(writer, data)
        held(writer).clear()
        flush(writer)

    def closed(writer: Any) -> None:
        flushed(writer)
        close(writer)

    RecordWriter.write = lambda writer, data: held(writer).append(data)
    RecordWriter.flush, RecordWriter.close = flushed, closed


class _Operations(TorchDispatchMode):
    """Calls `before` before every operation of torch."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self.before = before

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.before()
        return operation(*args, **(kwargs or {}))


class _Saves:
    """Follows what common.files does to write a file."""

    def __init__(self, pass_by: Callable[[str], None]) -> None:
        self.pass_by, self.name = pass_by, ""

    def part(self, number: int) -> None:
        self.pass_by(f"{self.name}: {SAVING[number]}")

    def watch(self) -> None:
        sync, rename, link, sync_folder = os.fsync, os.replace, os.link, common.files._sync_folder

        def synced(handle: int) -> None:
            if self.name:
                self.part(2)
            sync(handle)

        def renamed(source: Any, target: Any) -> None:
            self.part(3)
            rename(source, target)

        def linked(source: Any, target: Any) -> None:
            self.pass_by(f"earlier file: {SAVING[3]}")
            link(source, target)
            self.pass_by(f"earlier file: {SAVING[4]}")

        def synced_folder(folder: Path) -> None:
            self.part(4)
            self.name = ""
            sync_folder(folder)

        common.files.open = self._opened  # type: ignore[attr-defined]
        common.files._sync_folder = synced_folder
        os.fsync, os.replace, os.link = synced, renamed, linked  # type: ignore[assignment]

    def _opened(self, path: Path, mode: str = "r", **named: Any) -> Any:
        file = open(path, mode, **named)  # noqa: SIM115 - the caller's to close
        temporary = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.\d+\.tmp", path.name)
        if temporary is None:
            return file
        self.name = temporary[1]
        self.part(0)
        return _InHalves(file, lambda: self.part(1))


class _InHalves:
    """A file whose writes are done in two halves, of which the first is on the disk when `between` is called."""

    def __init__(self, file: IO[bytes], between: Callable[[], None]) -> None:
        self.file, self.between = file, between

    def write(self, data: Any) -> int:
        middle = len(data) // 2
        self.file.write(data[:middle])
        self.file.flush()
        self.between()
        self.file.write(data[middle:])
        return len(data)

    def __enter__(self) -> "_InHalves":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
