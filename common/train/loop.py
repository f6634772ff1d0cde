"""The training loop: `fit` is a whole run, `update` one optimizer step, `evaluate` one exact pass over a split.

B images of a micro-batch, C classes, k = min(5, C). Order, augmentation, dropout and mixing are drawn from (seed, step,
place in the epoch), so that a step number says where training stands: a run that goes on from last.pt equals one that
was never interrupted, bit for bit where the arithmetic itself is deterministic.
"""

import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.data.batches import Batch, Order, Plan, Readable, evaluation_batches, seed_everything, training_batches
from common.data.images import Images
from common.errors import UserError
from common.train import distributed
from common.train.checkpoint import State, read_sums, save, save_best
from common.train.distributed import Stopped, wrap
from common.train.log import Log, bar, say
from common.train.metrics import Predictions, summarize
from common.train.model import memory_format
from common.train.run_folder import Run, locked

T = TypeVar("T")
Objective = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]  # (model, images, labels) -> mean loss, logits


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The default objective: mean cross-entropy of the logits, and the logits (B, C)."""
    logits = model(images)
    return F.cross_entropy(logits.float(), labels), logits


def fit(
    run: Run,
    state: State,
    plan: Plan,
    stop: "StopRequest",
    *,
    steps: int,
    evaluate_every: int,
    objective: Objective = cross_entropy,
    clip_grad: float | None = None,
    schedule_per: str = "epoch",
    on_best: Callable[[dict[str, Any]], object] = lambda entry: None,
) -> None:
    """Trains from `state.step` to `steps`; on the way logs, evaluates on data.val, keeps the best weights, saves."""
    model, log_every, save_every = wrap(state.model, run.device), run.options.log_every, run.options.save_every
    batches = training_batches(run.data.train, plan, run.seed, range(state.step, steps), *loading(run))
    val = split_batches(run, run.data.val)
    if state.step == 0:
        save(run, state)  # a run that dies in its first epoch can be resumed too, and a full disk shows at once
    elif state.best is not None and state.best["step"] == state.step:
        keep_best(run, state, on_best)  # the run may have been killed after last.pt and before these were written
    try:
        if evaluation_due(state, steps, evaluate_every):  # stopped between an epoch and its evaluation, or in it
            select(run, state, plan, val, stop, on_best)
        progress = bar("training", steps, state.step)
        while state.step < steps:
            began, rate = time.perf_counter(), state.optimizer.param_groups[0]["lr"]
            update(run, state, model, plan, batches, objective, clip_grad)
            advance_schedule(state.scheduler, state.step, plan.steps_per_epoch, schedule_per)
            reported = state.step % log_every == 0 or state.step % plan.steps_per_epoch == 0 or state.step == steps
            if reported:
                read_sums(state)  # waits for the GPU: what it still has to do is training too
            state.trained_seconds += time.perf_counter() - began
            state.trained_images += plan.global_batch_size(state.step - 1)
            progress.update()
            if reported:
                progress.set_postfix_str(report(run, state, plan, rate))
            stop.check()
            if evaluation_due(state, steps, evaluate_every):
                select(run, state, plan, val, stop, on_best)
            elif save_every and state.step % save_every == 0:
                save(run, state)
        progress.close()
    except Stopped:
        save(run, state)
        raise


def update(
    run: Run,
    state: State,
    model: nn.Module,
    plan: Plan,
    batches: Iterator[Batch],
    objective: Objective,
    clip_grad: float | None,
) -> None:
    """One optimizer step: the global batch, in this process's micro-batches. `model` is that of `wrap`."""
    model.train()
    state.optimizer.zero_grad(set_to_none=True)
    layout = memory_format(state.model, run.device)
    for micro in range(plan.accumulate):
        batch = next(batches)
        seed_everything(run.seed, state.step, micro, plan.rank)
        images = batch.images.to(run.device, non_blocking=True, memory_format=layout)
        labels = batch.labels.to(run.device, non_blocking=True)
        last = micro == plan.accumulate - 1
        weight = plan.weight(state.step, micro)  # the mean over processes becomes that of the global batch
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            with state.precision.autocast():
                loss, logits = objective(model, images, labels)
            state.precision.backward(loss * weight, state.optimizer)
        if weight > 0:
            finite = logits.isfinite().all(-1)  # argmax takes NaN for the largest
            correct = ((logits.argmax(-1) == labels) & finite).sum()
            counted = (loss.detach() * len(labels), correct, torch.full_like(correct, len(labels)))
            state.sums[:3] += torch.stack([value.to(state.sums) for value in counted])
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    skipped = state.precision.step(state.optimizer, parameters, clip_grad)
    if skipped is not None:
        state.sums[3] += skipped
    state.step += 1


def advance_schedule(scheduler: Any, step: int, steps_per_epoch: int, schedule_per: str) -> None:
    """Sets the learning rate of the next step; `schedule_per` "epoch" or "step" is for torch's schedulers."""
    epoch_done = step % steps_per_epoch == 0
    if hasattr(scheduler, "step_update"):  # timm's, which is told both
        scheduler.step_update(step)
        if epoch_done:
            scheduler.step(step // steps_per_epoch)
    elif scheduler is not None and (schedule_per == "step" or epoch_done):
        scheduler.step()


def report(run: Run, state: State, plan: Plan, rate: float) -> str:
    """Logs the steps since the last report, of which `read_sums` has read the sums; returns them for the bar.

    UserError where their loss is not finite, unless fp16 skips such steps.
    """
    loss, correct, images = state.logged
    if not math.isfinite(loss) and run.options.precision != "fp16":
        raise UserError(f"training has diverged: the loss is not finite at step {state.step}; lower the learning rate")
    state.epoch = [old + new for old, new in zip(state.epoch, state.logged, strict=True)]
    state.logged = [0.0] * 3
    figures = {"loss": loss / images, "accuracy": correct / images, "lr": float(rate)}
    more = {"images_per_s": round(speed(state), 2), "skipped": state.skipped}
    run.log.write("train", state.step, epoch=round(state.step / plan.steps_per_epoch, 4), **figures, **more)
    return f"loss {figures['loss']:.3f}, acc {figures['accuracy']:.1%}, {speed(state):.0f} images/s"


def speed(state: State) -> float:
    """Images per second of training alone."""
    return state.trained_images / state.trained_seconds if state.trained_seconds else 0.0


def evaluation_due(state: State, steps: int, evaluate_every: int) -> bool:
    """Also of a run that was stopped between an epoch and its evaluation, or in it."""
    done = state.history and state.history[-1]["step"] == state.step
    return state.step > 0 and not done and (state.step % evaluate_every == 0 or state.step == steps)


def select(
    run: Run,
    state: State,
    plan: Plan,
    val: Iterable[Batch],
    stop: "StopRequest",
    on_best: Callable[[dict[str, Any]], object],
) -> None:
    """Evaluates on the selection split, and saves; the weights too, if they are the best so far."""
    metrics, _ = evaluate(run, state.model, run.data.val, stop.until_asked(val))
    epoch = round(state.step / plan.steps_per_epoch, 4)
    entry = {"step": state.step, "epoch": epoch, "val": metrics}
    state.history.append(entry)
    run.log.write("val", state.step, epoch=epoch, **{name: value for name, value in metrics.items() if name != "split"})
    better = state.best is None or metrics["correct"] > state.best["val"]["correct"]
    loss, correct, images = state.epoch
    trained = f"train loss {loss / images:.4f} acc {correct / images:.2%} | " if images else ""
    say(
        f"epoch {epoch:g} | {trained}{metrics['split']} loss {metrics['loss']:.4f} acc {metrics['top1']:.2%} "
        f"({metrics['correct']}/{metrics['total']}) | {speed(state):.0f} images/s{' *' if better else ''}"
    )
    state.epoch = [0.0] * 3
    state.best = entry if better else state.best
    save(run, state)
    if better:
        keep_best(run, state, on_best)
    stop.check()


def keep_best(run: Run, state: State, on_best: Callable[[dict[str, Any]], object]) -> None:
    save_best(run, state)
    if distributed.is_main() and state.best is not None:
        on_best(state.best)


@torch.inference_mode()
def evaluate(
    run: Run, model: nn.Module, images: Images, batches: Iterable[Batch] | None = None
) -> tuple[dict[str, Any], Predictions]:
    """Metrics over every image of a split, each counted once on any number of processes; and what they are made from.

    `model` is the bare module, not the wrapped one: processes may hold a different number of batches. `batches` are
    those of `split_batches`. UserError where logits are not finite: they have no best class.
    """
    distributed.share_buffers(model)
    model.eval()
    layout, index = memory_format(model, run.device), []
    columns = [
        (
            torch.empty(0, dtype=torch.long),
            torch.empty(0, min(5, len(images.classes)), dtype=torch.long),
            torch.empty(0),
        )
    ]
    for batch in split_batches(run, images) if batches is None else batches:
        with run.precision.autocast():
            inputs = batch.images.to(run.device, non_blocking=True, memory_format=layout)
            logits = logits_of(model(inputs)).float()  # (B, C)
        if logits.shape[1] != len(images.classes):
            raise UserError(f"the model names {logits.shape[1]} classes, {images.split} has {len(images.classes)}")
        labels = batch.labels.to(run.device, non_blocking=True)
        loss = F.cross_entropy(logits, labels, reduction="none").where(logits.isfinite().all(-1), math.nan)
        columns.append((labels, ranking(logits, 5), loss))
        index.extend(batch.indices)
    label, ranked, losses = (
        torch.cat([part.cpu() for part in column]).numpy() for column in zip(*columns, strict=True)
    )
    mine = Predictions(np.asarray(index, dtype=np.int64), label, ranked, losses.astype(np.float64))
    predictions = Predictions.merge(distributed.gather(mine), len(images))
    bad = predictions.index[~np.isfinite(predictions.loss)]
    if len(bad):
        half = "" if run.options.precision == "fp32" else f", or {run.options.precision} overflows: try fp32"
        raise UserError(
            f"{images.split}: the model's output is not finite for {len(bad)} of {len(images)} images, the first of "
            f"them {images.ids[bad[0]]}: its training has diverged, or its file is damaged{half}"
        )
    return summarize(predictions, len(images.classes), images.split), predictions


def plan_batches(run: Run, order: Order) -> Plan:
    """Which training image this process sees at which step. UserError where the batch cannot be divided."""
    shares = distributed.size() * run.options.accumulate
    if run.batch_size % shares:
        raise UserError(
            f"{run.flag('batch_size')}: the batch of {run.batch_size} cannot be divided by {distributed.size()} "
            f"processes x {run.options.accumulate} micro-batches ({run.flag('accumulate')}): choose numbers that do"
        )
    count, rank, size = len(run.data.train), distributed.rank(), distributed.size()
    return Plan(order, count, run.batch_size, run.options.accumulate, rank, size)


def split_batches(run: Run, images: Images) -> Iterable[Batch]:
    """This process's share of a split; may be gone through again and again."""
    size = run.options.eval_batch_size or max(1, run.batch_size // distributed.size())
    share = distributed.rank(), distributed.size()
    return Readable(evaluation_batches(images, size, *share, *loading(run)))


def loading(run: Run) -> tuple[int, bool]:
    """How many processes read images, and whether batches lie in page-locked memory."""
    workers = min(4, os.cpu_count() or 1) if run.options.workers is None else run.options.workers
    return workers, run.device.type == "cuda" and run.options.pin_memory


def logits_of(output: Any) -> Tensor:
    """The logits (B, C), which come first where a model returns more."""
    logits: Tensor = output[0] if isinstance(output, tuple) else output
    return logits


def ranking(logits: Tensor, top: int) -> Tensor:
    """The `top` best classes (B, top) of logits (B, C), best first; of equals the lower number, as `argmax` has it.

    `topk` leaves the order of equals open, and half precision has many.
    """
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :top]


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning) into a request that is met after the present step.

    In an evaluation it is met after the present batch. A second Ctrl-C interrupts at once.
    """

    signal = 0

    def __init__(self, run: Run, state: State) -> None:
        self.run, self.state = run, state

    def __enter__(self) -> "StopRequest":
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Stopped, on every process, where one of them was asked; all of them have to call this."""
        number = distributed.maximum(self.signal)
        if number:
            words = [f"--{name}={value}" for name, value in required(self.run.recipe).items()]
            words += ["--demo"] if self.run.options.demo else []
            start = ["torchrun", "--nproc_per_node", str(distributed.size())] if distributed.size() > 1 else ["python"]
            command = shlex.join([*start, sys.argv[0], *words, "--resume", str(self.run.folder)])
            name, status = signal.Signals(number).name, 130 if number == signal.SIGINT else 0
            sentence = f"stopped by {name} after step {self.state.step}, everything saved; continue with: {command}"
            raise Stopped(status, sentence)

    def until_asked(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, of which processes may have different numbers; Stopped at their end where one was asked."""
        for item in items:
            if self.signal:
                break
            yield item
        self.check()


def required(recipe: Any) -> dict[str, Any]:
    """The recipe fields without a default, which every command line has to name."""
    missing = dataclasses.MISSING
    bare = [
        field for field in dataclasses.fields(recipe) if (field.default, field.default_factory) == (missing, missing)
    ]
    return {field.name: getattr(recipe, field.name) for field in bare}


@contextmanager
def training(
    run: Run,
    state: State,
    due: bool,
    curves: Mapping[Path, Mapping[str, str]] | None = None,
    less_memory: str | None = None,
) -> Iterator[StopRequest]:
    """While a model is trained: the folder is this run's alone, its log is open, signals are requests to stop.

    `due`: the evaluation of the present step is still to come. `curves` as for Log; `less_memory` as below.
    """
    config = {"script": run.program, "seed": run.seed, **dataclasses.asdict(run.recipe)} if run.options.wandb else None
    with locked(run):
        run.log = Log(run.folder, state.step, due, curves or {}, config)
        try:
            with StopRequest(run, state) as stop, out_of_memory_explained(run, less_memory):
                yield stop
        finally:
            run.log.close()


@contextmanager
def out_of_memory_explained(run: Run, less_memory: str | None = None) -> Iterator[None]:
    """`less_memory` are flags with which less is needed, and the experiment stays the same."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        share = run.batch_size // distributed.size()
        more = next((k for k in range(run.options.accumulate + 1, share + 1) if share % k == 0), share)
        less_memory = less_memory or f"{run.flag('accumulate')} {more} (the batch of {run.batch_size} stays)"
        raise UserError(
            f"out of GPU memory with {share // run.options.accumulate} images at a time in {run.options.precision}: "
            f"take fewer with {less_memory} (in evaluation {run.flag('eval_batch_size')}), or use --precision bf16 or "
            f"{run.flag('grad_checkpointing')}; {run.flag('batch_size')} alone changes the experiment"
        ) from error
