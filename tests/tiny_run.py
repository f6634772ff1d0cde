"""What the loop needs of a run, without a program around it: images in memory, a folder, options."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import Flags, Options
from common.data.batches import Batch, Plan, training_batches
from common.train.checkpoint import State
from common.train.loop import Objective, advance_schedule, cross_entropy, update
from common.train.precision import Precision
from common.train.run_folder import Run

CPU = torch.device("cpu")


class InMemory:
    """Images (N, 3, height, width) and labels (N,) in the place of a data set."""

    split = "memory"

    def __init__(self, images: Tensor, labels: list[int], classes: list[str]) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.ids = [str(number) for number in range(len(labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def make_run(
    images: InMemory, batch_size: int, folder: Path = Path(), precision: Precision | None = None, **options: Any
) -> Run:
    """A run whose log is a list."""
    settings = Options(**({"workers": 0} | options))
    run = Run("tiny", "tiny.py", folder, SimpleNamespace(), settings, {}, Flags(), CPU, seed=3, folder=folder)
    data: Any = SimpleNamespace(train=images, val=images, test=images)
    lines: list[dict[str, Any]] = []
    log: Any = SimpleNamespace(lines=lines, flush=lambda: None)
    log.write = lambda kind, step, **values: lines.append({"kind": kind, "step": step, **values})
    run.data, run.log, run.batch_size = data, log, batch_size
    run.precision = precision or Precision(settings.precision, CPU)
    return run


def steps_of(
    run: Run,
    state: State,
    plan: Plan,
    steps: int,
    objective: Objective = cross_entropy,
    clip_grad: float | None = None,
    schedule_per: str = "step",
    model: nn.Module | None = None,
) -> Iterator[float]:
    """The heart of `fit` with nothing around it; yields the learning rate of each step, after it."""
    batches: Iterator[Batch] = training_batches(run.data.train, plan, run.seed, range(state.step, steps), 0, False)
    while state.step < steps:
        rate = float(state.optimizer.param_groups[0]["lr"])
        update(run, state, model or state.model, plan, batches, objective, clip_grad)
        advance_schedule(state.scheduler, state.step, plan.steps_per_epoch, schedule_per)
        yield rate
