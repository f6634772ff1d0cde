"""What a run tells while it runs: `log.jsonl`, TensorBoard, optionally Weights & Biases, and a bar on the screen.

Only rank 0 writes. A resumed run continues its files: lines of steps that will be done again are cut off first.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import write_text
from common.train import distributed


class Log:
    """Appends a JSON object a line to `folder/log.jsonl`, and its numbers to TensorBoard under `{kind}/{name}`.

    `curves` are further TensorBoard folders: {folder: {a tag of ours: the tag there}}.
    """

    def __init__(
        self,
        folder: Path,
        from_step: int,
        evaluation_due: bool,
        curves: Mapping[Path, Mapping[str, str]],
        wandb_config: dict[str, Any] | None,
    ) -> None:
        """A run that goes on from `from_step`, with the evaluation of that step if `evaluation_due`."""
        self.active, self.wandb = distributed.is_main(), None
        self.path = folder / "log.jsonl"
        if not self.active:
            return
        _cut(self.path, from_step, evaluation_due)
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second, and --help does without

        self.excepthook, threading.excepthook = threading.excepthook, self._heard
        names = {folder / "tensorboard": None, **curves}
        try:
            self.boards = [(SummaryWriter(str(path), purge_step=from_step + 1), tags) for path, tags in names.items()]
        except OSError as error:
            raise UserError(f"{', '.join(map(str, names))} cannot be written ({error.strerror})") from error
        if wandb_config is not None:
            self.wandb = _start_wandb(folder, wandb_config)

    def _heard(self, error: Any) -> None:
        """A failing disk in a thread of TensorBoard: its next call raises that once more, to us."""
        if not (issubclass(error.exc_type, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
            self.excepthook(error)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """`kind` is train or val. NaN and infinities, which JSON does not know, become null."""
        if not self.active:
            return
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = json.dumps({"kind": kind, "step": step, **known, "time": round(time.time(), 3)})
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            for board, tags in self.boards:
                for tag, value in numbers.items():
                    if tags is None or tag in tags:
                        board.add_scalar(tag if tags is None else tags[tag], value, step)
        except OSError as error:
            raise self._full(error) from error
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Brings to the disk what a killed process would take with it: log.jsonl is written line by line."""
        try:
            for board, _ in self.boards if self.active else ():
                board.flush()
        except OSError as error:
            raise self._full(error) from error

    def close(self) -> None:
        try:
            for board, _ in self.boards if self.active else ():
                board.close()
        except OSError as error:
            raise self._full(error) from error
        if self.active:
            threading.excepthook = self.excepthook
        if self.wandb is not None:
            self.wandb.finish()

    def _full(self, error: OSError) -> UserError:
        places = ", ".join([str(self.path), *(board.log_dir for board, _ in self.boards)])
        return UserError(f"one of {places} cannot be written ({error.strerror})")


def _cut(path: Path, from_step: int, evaluation_due: bool) -> None:
    """Keeps the whole lines of steps up to `from_step`: a killed run may have logged on after its last checkpoint."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut short by a kill
            break
        if line.endswith("\n") and entry["step"] <= from_step - (entry["kind"] == "val" and evaluation_due):
            kept.append(line)
    if path.exists():
        write_text(path, "".join(kept))


def _start_wandb(folder: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the wandb package: pip install wandb, or leave the flag out") from error
    # With the folder's name as id, a resumed run goes on with its curves.
    return wandb.init(
        project=folder.parent.name, id=folder.name, resume="allow", dir=str(folder.absolute()), config=config
    )


def bar(title: str, total: int, done: int = 0) -> "tqdm[Any]":
    """A progress bar on a terminal's standard error; silent elsewhere and on every process but the first."""
    hidden = None if distributed.is_main() else True
    return tqdm(None, title, total, initial=done, disable=hidden, dynamic_ncols=True, leave=False, file=sys.stderr)


def say(text: str) -> None:
    """A line for the user, from one process, above any bar."""
    if distributed.is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
