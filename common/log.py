"""What a run tells while it runs: `log.jsonl`, TensorBoard, optionally Weights & Biases, and the bar on the screen.

Only rank 0 writes. A resumed run continues its files: lines of steps that will be done again are cut off first.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from tqdm import tqdm

from common import dist
from common.errors import UserError
from common.files import write_text

T = TypeVar("T")


class Listener:
    """Follows a training run on rank 0, beside its own files: a program that writes more overrides what it needs.

    Where its files cannot be written it raises UserError. `files` are those outside of the run's folder, whose names an
    earlier run may have used: Training moves such a file aside before the first call of `best`.
    """

    files: tuple[Path, ...] = ()

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """`kind` is train or val; `values` are those of log.jsonl."""

    def best(self, model: nn.Module, entry: dict[str, Any]) -> None:
        """The model is the best so far; `entry` is that of the evaluation: step, epoch, and the metrics `val`.

        Of a run that was killed it may be called again for the same model.
        """

    def last(self, model: nn.Module, entry: dict[str, Any]) -> None:
        """The training is done and the model as it left it; `entry` is that of its last evaluation."""

    def flush(self) -> None:
        """The run is about to be saved: what was logged up to here will not be logged again."""

    def close(self) -> None:
        """The run ends or is stopped."""


class Log:
    """Appends a JSON object a line to `folder/log.jsonl`, and its numbers to TensorBoard under `{kind}/{name}`."""

    def __init__(
        self,
        folder: Path,
        from_step: int,
        wandb: bool,
        config: dict[str, Any],
        listener: Callable[[], Listener] = Listener,
        evaluation_due: bool = False,
    ) -> None:
        """A run that goes on from `from_step`, with the evaluation of that step if `evaluation_due`."""
        self.active = dist.is_main()
        self.wandb: Any = None
        if not self.active:
            self.listener = Listener()
            return
        self.path = folder / "log.jsonl"
        if self.path.exists():
            _cut(self.path, from_step, evaluation_due)
        # Imported here: it takes a second, and --help, --predict and every other process do without.
        from torch.utils.tensorboard import SummaryWriter

        self.before, threading.excepthook = threading.excepthook, _without_tensorboard(threading.excepthook)
        self.listener = listener()  # here: its curves may meet a full disk too
        with self._explain():
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)
        if wandb:
            self.wandb = _start_wandb(folder, config)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """UserError where the disk fails."""
        if not self.active:
            return
        line = {"kind": kind, "step": step, **_finite(values), "time": round(time.time(), 3)}
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        with self._explain():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for tag, value in numbers.items():
                self.board.add_scalar(tag, value, step)
        self.listener.log(kind, step, values)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Brings to the disk what a killed process would take with it: log.jsonl is written line by line."""
        if self.active:
            with self._explain():
                self.board.flush()
            self.listener.flush()

    @contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} or tensorboard/ beside it cannot be written ({error.strerror})") from error

    def close(self) -> None:
        if self.active:
            try:
                with self._explain():
                    self.board.close()
            finally:
                self.listener.close()
            threading.excepthook = self.before  # not behind an error: that thread may be about to speak
            if self.wandb is not None:
                self.wandb.finish()


def _without_tensorboard(excepthook: Callable[[Any], object]) -> Callable[[Any], object]:
    """`excepthook` without a failing disk in a thread of TensorBoard: its next call raises that once more, to us."""

    def hear(error: Any) -> None:
        if not (issubclass(error.exc_type, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
            excepthook(error)

    return hear


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities, which JSON does not know, become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _cut(path: Path, from_step: int, evaluation_due: bool) -> None:
    """Keeps the whole lines of steps up to `from_step`: a killed run may have logged on after its last checkpoint."""

    def keep(line: str) -> bool:
        try:
            entry = json.loads(line)
            done = entry["step"] <= from_step - (entry["kind"] == "val" and evaluation_due)
            return line.endswith("\n") and done
        except (ValueError, KeyError, TypeError):  # what a power cut made of the last lines
            return False

    with open(path, encoding="utf-8", errors="replace") as file:
        kept = "".join(filter(keep, file))
    write_text(path, kept)


def _start_wandb(folder: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the wandb package: pip install wandb, or leave the flag out") from error
    try:
        # With the folder's name as id, a resumed run goes on with its curves.
        return wandb.init(
            project=folder.parent.name, id=folder.name, resume="allow", dir=str(folder.absolute()), config=config
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline") from error


def bar(items: Iterable[Any] | None, title: str, total: int | None = None, initial: int = 0) -> "tqdm[Any]":
    """A progress bar on a terminal's standard error; silent elsewhere and on every process but the first."""
    return tqdm(
        items,
        desc=title,
        total=total,
        initial=initial,
        disable=None if dist.is_main() else True,
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
    )


def watched(batches: Iterator[T], title: str, total: int) -> Iterator[T]:
    """`batches` with a bar."""
    return iter(bar(batches, title, total))


def say(text: str) -> None:
    """A line for the user, from one process, above any bar."""
    if dist.is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
