"""One training run: the loop around the engine that logs, evaluates, selects, saves, stops on request and tests."""

import dataclasses
import os
import platform
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from common import dist
from common.amp import Precision
from common.checkpoint import load_state, save_state, save_weights
from common.data import Data
from common.data.images import Images
from common.data.loader import Order, Plan
from common.engine import Loading, Stopwatch, Trainer, evaluate
from common.errors import UserError
from common.experiment import Experiment, Options
from common.log import Log, bar, say, watched
from common.metrics import Predictions, summarize, write_tables
from common.provenance import (
    data_differences,
    depends_on_micro_batches,
    device_name,
    parameter_counts,
    peak_memory,
    versions,
)
from common.records import write_record
from common.results import row_line
from common.weights import load_checkpoint


@dataclass
class Session:
    """One use of a program: what was asked for, on which data and device, and where its files go."""

    experiment: Experiment
    folder: Path
    recipe: Any
    options: Options
    overrides: dict[str, Any]
    seed: int
    data: Data
    weights: dict[str, Any]
    device: torch.device
    precision: Precision
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        options = self.options
        batch = options.eval_batch_size or max(1, self.experiment.global_batch_size(self.recipe) // dist.size())
        workers = min(4, os.cpu_count() or 1) if options.workers is None else options.workers
        self.loading = Loading(workers, batch, options.skip_bad_images, options.pin_memory)

    @property
    def side(self) -> str:
        return "released" if self.recipe.released else "described"

    @property
    def row(self) -> str | None:
        """The row of a paper's table."""
        return self.experiment.row(self.recipe)

    @property
    def command(self) -> str:
        """What a user types to run the program again, as it was started."""
        start = ["python"] if dist.size() == 1 else ["torchrun", "--nproc_per_node", str(dist.size())]
        given = [f"--{name}={value}" for name, value in self.experiment.given(self.recipe).items()]
        return shlex.join([*start, sys.argv[0], *given, *(["--demo"] if self.options.demo else [])])

    def measure(self, model: nn.Module, images: Images) -> tuple[dict[str, Any], Predictions]:
        """Metrics of `model` on all of `images`, and what they were counted from."""
        share = -(-len(images) // dist.size())
        batches = -(-share // self.loading.eval_batch_size)
        predictions = evaluate(
            model,
            images,
            self.device,
            self.precision,
            self.loading,
            lambda items: watched(items, images.split, batches),
        )
        return summarize(predictions, len(images.classes), images.split), predictions

    def record(
        self, model: nn.Module, status: str, excluded: list[str], results: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """The JSON record of this run (schema: common.records)."""
        options = self.options
        reasons = list(excluded)
        if options.demo:
            reasons.append("demo")
        else:
            changes = self.experiment.alterations(self.recipe, trained=status == "finished")
            reasons += [f"altered: {change}" for change in changes]
            if options.accumulate > 1 and depends_on_micro_batches(model):
                reasons.append(f"altered: accumulate 1 -> {options.accumulate}")
            counts = self.experiment.counts(self.recipe)
            reasons += ["limited data"] if options.limit is not None else data_differences(self.data, counts)
        unreadable = dist.gather(self.loading.unreadable)
        skipped = sorted({why for part in unreadable for split in part.values() for why in split.values()})
        splits = {name: getattr(self.data, name).fingerprint() for name in ("train", "val", "test")}
        rule = f"highest top-1 accuracy on {self.data.val.split}; the earliest on a tie"
        return {
            "schema": 1,
            "row": self.row,
            "script": self.experiment.script,
            "side": self.side,
            "status": status,
            "excluded": reasons,
            "recipe": dataclasses.asdict(self.recipe),
            "overrides": self.overrides,
            "options": dataclasses.asdict(options),
            "seed": self.seed,
            "data": {"name": self.data.test.name, **splits},
            "weights": self.weights,
            "versions": versions(),
            "device": device_name(self.device),
            "host": platform.node(),
            "processes": dist.size(),
            "precision": options.precision,
            "amp_backend": options.amp_backend,
            "selection": {"split": self.data.val.split, "rule": rule, "kind": self.data.selection},
            "results": results,
            "parameters": parameter_counts(model),
            "peak_memory_bytes": max(dist.gather(peak_memory(self.device))),
            "skipped_images": skipped,
            "started": self.started,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **more,
        }


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning) into a request that is met after the present step.

    A second Ctrl-C interrupts at once.
    """

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self.before = {getattr(signal, name): signal.signal(getattr(signal, name), self._note) for name in names}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Training:
    """The run of one model in `session.folder`."""

    def __init__(self, session: Session, trainer: Trainer, resume: bool, evaluate_every: int) -> None:
        """`evaluate_every` counts optimizer steps."""
        self.session, self.trainer, self.model = session, trainer, trainer.model
        self.evaluate_every = evaluate_every
        self.history: list[dict[str, Any]] = []  # one entry an evaluation
        self.best: dict[str, Any] | None = None
        self.wall_seconds = 0.0
        self.watch = Stopwatch()
        self.epoch_sums: dict[str, float] = {}  # of the training since the last evaluation
        self.latest: tuple[dict[str, Any], Predictions] | None = None
        if resume:
            self._restore()
        self.clock = time.perf_counter()
        self.log = self._open_log()
        if resume and self.best is not None and self.best["step"] == self.trainer.step:
            self._save_best()  # the run may have been killed after last.pt and before the best weights were written

    def _open_log(self) -> Log:
        session, step = self.session, self.trainer.step
        config = {"script": session.experiment.name, "seed": session.seed, **dataclasses.asdict(session.recipe)}
        listener = session.experiment.listener(session, step) if dist.is_main() else None
        return Log(session.folder, step, session.options.wandb, config, listener)

    @property
    def epoch(self) -> float:
        """Epochs done, as a fraction."""
        return self.trainer.step / self.trainer.plan.steps_per_epoch

    @property
    def _evaluation_due(self) -> bool:
        step = self.trainer.step
        done = bool(self.history) and self.history[-1]["step"] == step
        return step > 0 and not done and (step % self.evaluate_every == 0 or step == self.trainer.steps)

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the record; SystemExit, with everything saved, when asked to stop before."""
        try:
            if self.trainer.step == 0:
                self._save()  # a run that dies in its first epoch can be resumed too, and a full disk shows at once
            with StopRequest() as stop:
                if self._evaluation_due:  # the run was stopped between an epoch and its evaluation
                    self._evaluate()
                self._loop(stop)
            return self._test()
        finally:
            self.log.close()

    def _loop(self, stop: StopRequest) -> None:
        trainer, options = self.trainer, self.session.options
        per_epoch = trainer.plan.steps_per_epoch
        progress = None
        self.watch.restart()
        for step in trainer.run():
            if progress is None:
                title = f"epoch {(step - 1) // per_epoch + 1}/{-(-trainer.steps // per_epoch)}"
                progress = bar(None, title, per_epoch, initial=(step - 1) % per_epoch)
            progress.update()
            self.watch.lap(trainer.plan.global_batch_size(step - 1))
            epoch_done = step % per_epoch == 0 or step == trainer.steps
            if epoch_done or step % options.log_every == 0:
                progress.set_postfix_str(self._report())
            if epoch_done:
                progress.close()
                progress = None
            number = dist.maximum(stop.signal)
            if number:
                self._save()
                self._say_goodbye(number)
            if self._evaluation_due:
                self._evaluate()
            elif options.save_every and step % options.save_every == 0:
                self._save()
            self.watch.restart()

    def _report(self) -> str:
        """Logs the steps since the last report, adds them to the epoch's sums, and says them for the bar."""
        sums = self.trainer.report()
        self.epoch_sums = {name: self.epoch_sums.get(name, 0.0) + value for name, value in sums.items()}
        figures = {"loss": sums["loss"] / sums["samples"], "accuracy": sums["correct"] / sums["samples"]}
        speed = round(self.watch.rate(), 2)
        more = {"lr": self.trainer.rate, "images_per_s": speed, "skipped": self.trainer.skipped}
        self.log.write("train", self.trainer.step, epoch=round(self.epoch, 4), **figures, **more)
        return f"loss {figures['loss']:.3f}, acc {figures['accuracy']:.1%}, {speed:.0f} images/s"

    def _evaluate(self) -> None:
        """Evaluates on the selection split and saves; the weights too, if they are the best so far."""
        metrics, predictions = self.session.measure(self.model, self.session.data.val)
        self.latest = metrics, predictions
        step = self.trainer.step
        entry = {"step": step, "epoch": round(self.epoch, 4), "val": metrics}
        self.history.append(entry)
        figures = {name: value for name, value in metrics.items() if name != "split"}
        self.log.write("val", step, epoch=entry["epoch"], **figures)
        better = self.best is None or metrics["correct"] > self.best["val"]["correct"]
        if better:
            self.best = entry
        self._tell(metrics, better)
        self._save()
        if better:
            self._save_best()

    def _tell(self, metrics: dict[str, Any], better: bool) -> None:
        """One line an evaluation: training since the last one, the selection split, speed, `*` where it is the best."""
        sums = self.epoch_sums
        trained = ""
        if sums:
            trained = f"train loss {sums['loss'] / sums['samples']:.4f} acc {sums['correct'] / sums['samples']:.2%} | "
        say(
            f"epoch {self.epoch:g}/{self.trainer.steps / self.trainer.plan.steps_per_epoch:g} | {trained}"
            f"{metrics['split']} loss {metrics['loss']:.4f} acc {metrics['top1']:.2%} "
            f"({metrics['correct']}/{metrics['total']}) | {self.watch.rate():.0f} images/s{' *' if better else ''}"
        )
        self.epoch_sums = {}

    def _save(self) -> None:
        now = time.perf_counter()
        self.wall_seconds, self.clock = self.wall_seconds + now - self.clock, now
        state = self.trainer.state_dict()  # on every process: each brings its own share
        state |= {"history": self.history, "best": self.best, "wall_seconds": self.wall_seconds}
        state |= {"processes": dist.size(), "batch_size": self.trainer.plan.batch_size, "epoch_sums": self.epoch_sums}
        state |= {"trained_images": self.watch.images, "trained_seconds": self.watch.seconds}
        if dist.is_main():
            save_state(self.session.folder / "last.pt", state)

    def _save_best(self) -> None:
        if dist.is_main() and self.best is not None:
            path = self.session.folder / "best.safetensors"
            self.log.listener.best(self.model, self.best, first=not path.exists())
            val = self.best["val"]
            name, step = self.session.experiment.name, str(self.best["step"])
            note = {"script": name, "step": step, "val_top1": f"{val['top1']:.6f}"}
            save_weights(path, self.model.state_dict(), note)

    def _restore(self) -> None:
        folder = self.session.folder
        path = folder / "last.pt"
        state = load_state(path)
        try:
            if state["processes"] != dist.size() and any(state["transient"]):
                raise UserError(
                    f"{path} was saved by {state['processes']} processes, each with a moving average of its own: "
                    f"resume with as many, not with {dist.size()}"
                )
            batch_size = self.trainer.plan.batch_size
            if state.get("batch_size", batch_size) != batch_size:  # where a recipe counts images per process
                raise UserError(
                    f"{path} was saved by {state['processes']} processes with a batch of {state['batch_size']} in all: "
                    f"resume with as many, not with {dist.size()}"
                )
            self.trainer.load_state_dict(state)
            self.history, self.best, self.wall_seconds = state["history"], state["best"], state["wall_seconds"]
            self.epoch_sums = state["epoch_sums"]
            self.watch = Stopwatch(state["trained_images"], state["trained_seconds"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} does not fit the model of this recipe ({str(error).splitlines()[0]})") from error
        if dist.is_main():
            for leftover in folder.glob(".*.tmp"):  # of a save that was killed
                leftover.unlink()
        say(f"resumed at step {self.trainer.step} (epoch {self.epoch:g}) from {path}")

    def _say_goodbye(self, number: int) -> None:
        self.log.close()
        say(
            f"stopped by {signal.Signals(number).name} after step {self.trainer.step} (epoch {self.epoch:.2f}), "
            f"everything saved; continue with: {self.session.command} --resume {shlex.quote(str(self.session.folder))}"
        )
        raise SystemExit(130 if number == signal.SIGINT else 0)

    def _test(self) -> dict[str, Any]:
        """Tests the last and the best weights, writes tables and record."""
        session, data = self.session, self.session.data
        assert self.best is not None  # the last step always evaluates
        last = self.history[-1]
        if data.selection == "test-selected" and self.latest is not None:
            tested, predictions = self.latest
        else:
            tested, predictions = session.measure(self.model, data.test)
        results = {"last": {**last, "test": tested}, "best": {**self.best, "test": tested}}
        self.log.listener.last(self.model, last)
        if self.best["step"] != last["step"]:
            load_checkpoint(self.model, session.folder / "best.safetensors")
            results["best"]["test"], predictions = session.measure(self.model, data.test)
        self.wall_seconds += time.perf_counter() - self.clock
        record = session.record(
            self.model,
            "finished",
            [],
            results,
            speed={"train_images_per_s": round(self.watch.rate(), 2)},
            wall_seconds=round(self.wall_seconds, 1),
            skipped_updates=self.trainer.skipped,
        )
        if dist.is_main():
            write_record(session.folder / "record.json", record)
            write_tables(session.folder, "best", predictions, data.classes)
            tell_results(session, record)
        return record


def plan_batches(experiment: Experiment, order: Order, count: int, batch_size: int, accumulate: int) -> Plan:
    """The plan of this process for `count` images; UserError where the processes cannot divide the batch."""
    shares = dist.size() * accumulate
    if batch_size < 1 or batch_size % shares:
        raise UserError(
            f"{experiment.flag('batch_size')}: the batch of {batch_size} cannot be divided by {dist.size()} processes "
            f"x {accumulate} micro-batches ({experiment.flag('accumulate')}); choose numbers that divide it"
        )
    return Plan(order, count, batch_size, accumulate, dist.rank(), dist.size())


def tell_results(session: Session, record: dict[str, Any]) -> None:
    """The result for the eyes: last and best on the reported split, where the record is, and the paper's row."""
    for name, entry in record["results"].items():
        test = entry["test"]
        say(
            f"{name}: {test['split']} accuracy {test['top1']:.2%} ({test['correct']}/{test['total']}), weighted "
            f"precision {test['precision_weighted']:.4f}, recall {test['recall_weighted']:.4f}, "
            f"F1 {test['f1_weighted']:.4f}, per class {test['class_mean']:.2%}"
            + (f" ± {test['class_std']:.2%}" if test["class_std"] is not None else "")
            + (f" (epoch {entry['epoch']:g}, {record['selection']['kind']})" if "epoch" in entry else "")
        )
    say(f"record: {session.folder / 'record.json'}")
    say(row_line(record))
