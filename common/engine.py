"""Fit and evaluate, counted in optimizer steps; knows nothing of models, files or papers.

B samples of a micro-batch, C classes, k = min(5, C).

All randomness of a step (dropout, stochastic depth, mixing) is drawn from generators seeded by (seed, step,
micro-batch, rank), and that of a sample by its place in the epoch (common.data.loader). Training resumed at a step
therefore equals training that was never interrupted, bit for bit where the arithmetic itself is deterministic, and no
generator state has to be saved.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from common import dist
from common.amp import Precision
from common.data.images import Images
from common.data.loader import Batch, Plan, evaluation_batches, seed_everything, training_batches
from common.errors import UserError
from common.metrics import Predictions
from common.optimizers import fuse, load_state, state_of
from common.placement import memory_format
from common.undo import Undo

Objective = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]  # (model, images, labels) -> mean loss, logits
PATIENCE = 10  # updates in a row skipped for a non-finite gradient before the run stops


def logits_of(output: Any) -> Tensor:
    """The logits (B, C), which come first where a model returns more."""
    logits: Tensor = output[0] if isinstance(output, tuple) else output
    return logits


def ranking(logits: Tensor, top: int) -> Tensor:
    """The `top` best classes (B, top) of logits (B, C), best first; of equals the lower number, as `argmax` has it.

    `topk` leaves the order of equals open, and half precision has many.
    """
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :top]


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The default objective: mean cross-entropy of the logits, and the logits (B, C)."""
    logits = model(images)
    return F.cross_entropy(logits.float(), labels), logits


@dataclass
class Loading:
    """How batches are brought: worker processes, samples per evaluation batch, unreadable images to tolerate."""

    workers: int = 0
    eval_batch_size: int = 32
    skip_bad_images: int = 0
    pin_memory: bool = True
    unreadable: dict[str, dict[int, str]] = field(default_factory=dict)  # split -> index -> why

    # The split that was evaluated last, and its batches, whose workers wait for the next evaluation.
    kept: tuple[Images, Iterable[Batch]] | None = field(default=None, repr=False)

    def evaluation(self, images: Images, pinned: bool) -> Iterator[Batch]:
        """The batches of this process's share of `images`."""
        if self.kept is None or self.kept[0] is not images:
            self.close()
            share = dist.rank(), dist.size()
            self.kept = images, evaluation_batches(images, self.eval_batch_size, *share, self.workers, pinned)
        return iter(self.kept[1])

    def close(self) -> None:
        """Ends workers that wait."""
        self.kept = None

    def note(self, split: str, batch: Batch) -> None:
        """Counts unreadable images; one more than allowed is a UserError with the path."""
        for index, why in batch.unreadable:
            self.unreadable.setdefault(split, {})[index] = why
            if sum(map(len, self.unreadable.values())) > self.skip_bad_images:
                raise UserError(why)

    def check_together(self) -> None:
        """`note`'s limit over all processes; each has seen its own share alone."""
        seen = {(split, index): why for split, part in self.unreadable.items() for index, why in part.items()}
        together: dict[tuple[str, int], str] = {}
        for part in dist.gather(seen):
            together |= part
        if len(together) > self.skip_bad_images:
            raise UserError(next(iter(together.values())))


@dataclass
class Trainer:
    """One training run between two optimizer steps.

    `scheduler` is a torch scheduler, stepped once an update or once an epoch (`schedule_per`), or a timm scheduler,
    which is told both. `steps` is the total number of updates.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any
    precision: Precision
    images: Images
    plan: Plan
    steps: int
    device: torch.device
    loading: Loading
    seed: int = 0
    objective: Objective = cross_entropy
    clip_grad: float | None = None
    schedule_per: str = "epoch"
    step: int = 0  # updates done
    skipped: int = 0  # of these, for a non-finite gradient
    # loss sum, correct, samples since the last report
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def __post_init__(self) -> None:
        self.model, self.optimizer = self.precision.prepare(self.model, self.optimizer)
        if self.precision.apex is None:
            fuse(self.optimizer)
        self.wrapped = wrap(self.model, self.device)
        self.undo = Undo(self.model)
        self.memory_format = memory_format(self.model, self.device)
        self.spare: Batch | None = None  # the last batch with an image in it
        self.rate = float(self.optimizer.param_groups[0]["lr"])  # of the present update, first parameter group
        self.sums = torch.zeros(3, dtype=torch.float64, device=_double(self.device))
        # Updates skipped since the last report, those skipped in a row up to now, and the longest such row.
        self.bad = torch.zeros(3, dtype=torch.long, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on. State a process has to itself (GFT's EMA) is kept for each rank."""
        transient: dict[str, Tensor] = getattr(self.model, "training_state", dict)()
        self._read()
        return {
            "model": self.model.state_dict(),
            "optimizer": state_of(self.optimizer),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
            "precision": self.precision.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "unreadable": dist.gather(self.loading.unreadable),
            "window": self.window,
            "transient": dist.gather({name: value.cpu() for name, value in transient.items()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_state(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.precision.load_state_dict(state["precision"])
        for part in state["unreadable"]:
            for split, found in part.items():
                self.loading.unreadable.setdefault(split, {}).update(found)
        self.step, self.skipped, self.window = state["step"], state["skipped"], list(state["window"])
        transient = state["transient"][dist.rank()] if dist.rank() < len(state["transient"]) else {}
        if transient:
            if not all(isinstance(value, Tensor) for value in transient.values()):
                raise TypeError("its training state holds something else than tensors")
            values = {name: value.to(self.device) for name, value in transient.items()}
            self.model.load_training_state(values)  # type: ignore[operator]

    def run(self) -> Iterator[int]:
        """Trains from the present step to the last; yields the number of updates done after each one."""
        pinned = self.device.type == "cuda" and self.loading.pin_memory
        steps = range(self.step, self.steps)
        batches = training_batches(self.images, self.plan, self.seed, steps, self.loading.workers, pinned)
        for step in steps:
            self.model.train()
            self.rate = float(self.optimizer.param_groups[0]["lr"])
            self._update(step, batches)
            self.step = step + 1
            self._advance_schedule()
            yield self.step

    def report(self) -> dict[str, float]:
        """Sum of losses, correct and counted samples over all processes since the last report.

        UserError after PATIENCE skipped updates in a row: now and then one is what fp16's loss scaling costs.
        """
        longest = self._read()
        self.loading.check_together()
        loss, correct, samples = (float(total) for total in np.sum(dist.gather(self.window), axis=0))
        self.window = [0.0, 0.0, 0.0]
        if longest >= PATIENCE:
            cause = "static loss scale" if self.precision.loss_scale else "learning rate"
            raise UserError(
                f"{longest} updates in a row were skipped because loss or gradients were not finite "
                f"(step {self.step}): lower the {cause}, or train in fp32"
            )
        return {"loss": loss, "correct": correct, "samples": samples}

    def _update(self, step: int, batches: Iterator[Batch]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.undo.remember()
        for micro in range(self.plan.accumulate):
            batch = next(batches)
            self.loading.note(self.images.split, batch)
            weight = self.plan.weight(step, micro) * batch.readable
            if batch.images is None:
                # Every process has to take part in every step: with the batch before, which then counts nothing.
                if self.spare is None:
                    raise UserError(f"no image of the first batch could be read: {batch.unreadable[0][1]}")
                batch = self.spare
            self.spare = batch
            seed_everything(self.seed, step, micro, self.plan.rank)
            assert batch.images is not None
            assert batch.labels is not None
            images = batch.images.to(self.device, non_blocking=True, memory_format=self.memory_format)
            labels = batch.labels.to(self.device, non_blocking=True)
            last = micro == self.plan.accumulate - 1
            quiet = (
                self.wrapped.no_sync()
                if not last and isinstance(self.wrapped, DistributedDataParallel)
                else nullcontext()
            )
            with quiet:
                with self.precision.autocast():
                    loss, logits = self.objective(self.wrapped, images, labels)
                self.precision.backward(loss * weight, self.optimizer)
            if weight > 0:
                self._count(loss.detach(), logits.detach(), labels)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        skipped = self.precision.step(self.optimizer, parameters, self.clip_grad)
        self.undo.undo(skipped)  # a NaN in running statistics would stay for good
        skipped = skipped.to(self.bad)
        total, row, longest = self.bad.unbind()
        row = (row + 1) * skipped
        self.bad = torch.stack([total + skipped, row, torch.maximum(longest, row)])

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        finite = logits.isfinite().all(-1)  # argmax takes NaN for the largest
        correct = ((logits.argmax(-1) == labels) & finite).sum()
        values = (loss * len(labels), correct, torch.full_like(correct, len(labels)))
        self.sums += torch.stack([value.to(self.sums) for value in values])

    def _read(self) -> int:
        """Brings the sums from the device, which nothing else waits for (but optimizers that are not fused, to skip).

        Returns the longest row of skipped updates.
        """
        self.window = [old + new for old, new in zip(self.window, self.sums.tolist(), strict=True)]
        skipped, _, longest = self.bad.tolist()
        self.sums.zero_()
        self.skipped += skipped
        self.bad[:1].zero_()
        return int(longest)

    def _advance_schedule(self) -> None:
        epoch_done = self.step % self.plan.steps_per_epoch == 0
        if self.scheduler is None:
            return
        if hasattr(self.scheduler, "step_update"):  # timm
            self.scheduler.step_update(self.step)
            if epoch_done:
                self.scheduler.step(self.step // self.plan.steps_per_epoch)
        elif self.schedule_per == "step" or epoch_done:
            with warnings.catch_warnings():
                # Of a first update that loss scaling has skipped, torch believes that it comes later.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.scheduler.step()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel where there are several processes; parameters without a gradient are not its business."""
    if dist.size() == 1:
        return model
    if device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[device.index], gradient_as_bucket_view=True)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Images,
    device: torch.device,
    precision: Precision,
    loading: Loading,
    progress: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Predictions:
    """Predictions for every sample of `images`, each counted once however many processes share the work.

    UserError where logits are not finite: they have no best class.
    `model` is the bare module, not the wrapped one: processes may hold a different number of batches.
    """
    dist.share_buffers(model)
    training = model.training
    model.eval()
    pinned, layout = device.type == "cuda" and loading.pin_memory, memory_format(model, device)
    index: list[int] = []
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    unreadable: set[int] = set()
    for batch in progress(loading.evaluation(images, pinned)):
        loading.note(images.split, batch)
        unreadable.update(number for number, _ in batch.unreadable)
        if batch.images is None or batch.labels is None:
            continue
        with precision.autocast():
            inputs = batch.images.to(device, non_blocking=True, memory_format=layout)
            logits = logits_of(model(inputs)).float()  # (B, C)
        if logits.shape[1] != len(images.classes):
            raise UserError(f"the model names {logits.shape[1]} classes, {images.split} has {len(images.classes)}")
        labels = batch.labels.to(device, non_blocking=True)
        loss = F.cross_entropy(logits, labels, reduction="none").where(logits.isfinite().all(-1), math.nan)
        columns.append((labels, ranking(logits, 5), loss))
        index.extend(batch.indices)
    model.train(training)
    merged = _gathered(index, columns, images, unreadable)
    _check_finite(merged, images, precision)
    return merged


def _gathered(
    index: list[int], columns: list[tuple[Tensor, Tensor, Tensor]], images: Images, unreadable: set[int]
) -> Predictions:
    width = min(5, len(images.classes))
    empty = (torch.empty(0, dtype=torch.long), torch.empty(0, width, dtype=torch.long), torch.empty(0))
    parts = [empty, *((labels.cpu(), ranked.cpu(), loss.cpu()) for labels, ranked, loss in columns)]
    label, ranked, loss = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    mine = Predictions(np.asarray(index, dtype=np.int64), label, ranked, loss.astype(np.float64))
    return Predictions.merge(dist.gather(mine), len(images), set().union(*dist.gather(unreadable)))


def _check_finite(predictions: Predictions, images: Images, precision: Precision) -> None:
    bad = predictions.index[~np.isfinite(predictions.loss)]
    if len(bad):
        kind = precision.precision
        overflow = "" if kind == "fp32" else f", or {kind} overflows: fp32 does not, in which a run has to be started"
        raise UserError(
            f"{images.split}: the model's output is not finite for {len(bad)} of {len(predictions.index)} images, the "
            f"first of them {images.ids[bad[0]]}: its training has diverged, or its file is damaged{overflow}"
        )


def _double(device: torch.device) -> torch.device:
    """Where float64 sums live: MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


def means(sums: dict[str, float]) -> dict[str, float]:
    """Loss and accuracy of the sums of `Trainer.report`; NaN where no image could be read."""
    samples = sums["samples"] or math.nan
    return {"loss": sums["loss"] / samples, "accuracy": sums["correct"] / samples}


class Stopwatch:
    """Images per second of training alone: paused while anything else happens."""

    def __init__(self, images: int = 0, seconds: float = 0.0) -> None:
        self.images, self.seconds = images, seconds
        self.started = time.perf_counter()

    def restart(self) -> None:
        self.started = time.perf_counter()

    def lap(self, images: int) -> None:
        now = time.perf_counter()
        self.seconds, self.images, self.started = self.seconds + now - self.started, self.images + images, now

    def rate(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0
