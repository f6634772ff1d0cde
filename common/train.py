"""One training run: the loop around the engine that logs, evaluates, selects, saves, stops on request and tests."""

import dataclasses
import shlex
import signal
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from common import dist
from common.checkpoint import check_like, check_optimizer_state, load_state, save_state, save_weights
from common.data.loader import Batch, Order, Plan
from common.engine import Stopwatch, Trainer, means
from common.errors import UserError
from common.experiment import Experiment
from common.files import keep_earlier, remove_leftovers
from common.log import Log, bar, say
from common.metrics import Predictions, write_tables
from common.records import write_record
from common.results import row_line
from common.session import Session
from common.weights import load_checkpoint

DRAWS = 3  # raised where the same seed comes to mean other random numbers: an older run cannot go on


class Stopped(Exception):
    """The training was asked to stop by `signal`, and has come to a place where it can."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning) into a request that is met after the present step.

    In an evaluation it is met after the present batch. A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "StopRequest":
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

    def check(self) -> None:
        """Stopped, on every process, where one of them was asked; all of them have to call this."""
        number = dist.maximum(self.signal)
        if number:
            raise Stopped(number)

    def until_asked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, of which processes may have different numbers; Stopped at their end where one was asked."""
        for batch in batches:
            if self.signal:
                break
            yield batch
        self.check()


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
        self.stop = StopRequest()
        if resume:
            self._restore()
        self.clock = time.perf_counter()
        self.log = self._open_log()
        if resume and dist.is_main():
            remove_leftovers(session.folder)
            for path in self.log.listener.files:
                remove_leftovers(path.parent, path.name)

    def _open_log(self) -> Log:
        session, step = self.session, self.trainer.step
        config = {"script": session.experiment.name, "seed": session.seed, **dataclasses.asdict(session.recipe)}
        listener = partial(session.experiment.listener, session, step)
        return Log(session.folder, step, session.options.wandb, config, listener, self._evaluation_due)

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
            with self.stop, dist.losses_explained(lambda: f" after step {self.trainer.step}"):
                if self.trainer.step == 0:
                    self._save()  # a run that dies in its first epoch can be resumed too, and a full disk shows at once
                elif self.best is not None and self.best["step"] == self.trainer.step:
                    self._save_best()  # the run may have been killed after last.pt and before these were written
                self._train()
                return self._test()
        except Stopped as stopped:
            self._say_goodbye(stopped.signal)
        finally:
            self.log.close()
            self.session.loading.close()

    def _train(self) -> None:
        try:
            if self._evaluation_due:  # the run was stopped between an epoch and its evaluation, or in it
                self._evaluate()
            self._loop()
        except Stopped:
            self._save()
            raise

    def _loop(self) -> None:
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
            self.stop.check()
            if self._evaluation_due:
                self._evaluate()
            elif options.save_every and step % options.save_every == 0:
                self._save()
            self.watch.restart()

    def _report(self) -> str:
        """Logs the steps since the last report, adds them to the epoch's sums, and says them for the bar."""
        sums = self.trainer.report()
        self.epoch_sums = {name: self.epoch_sums.get(name, 0.0) + value for name, value in sums.items()}
        figures = means(sums)
        speed = round(self.watch.rate(), 2)
        more = {"lr": self.trainer.rate, "images_per_s": speed, "skipped": self.trainer.skipped}
        self.log.write("train", self.trainer.step, epoch=round(self.epoch, 4), **figures, **more)
        return f"loss {figures['loss']:.3f}, acc {figures['accuracy']:.1%}, {speed:.0f} images/s"

    def _evaluate(self) -> None:
        """Evaluates on the selection split and saves; the weights too, if they are the best so far."""
        metrics, predictions = self.session.measure(self.model, self.session.data.val, self.stop.until_asked)
        self.latest = metrics, predictions
        step = self.trainer.step
        entry = {"step": step, "epoch": round(self.epoch, 4), "val": metrics}
        self.history.append(entry)
        figures = {name: value for name, value in metrics.items() if name != "split"}
        self.log.write("val", step, epoch=entry["epoch"], **figures)
        better = self.best is None or metrics["correct"] > self.best["val"]["correct"]
        if self.best is None:
            # Before the state says that there is a best: from then on such files are this run's own, killed or not.
            self._keep_earlier_files()
        if better:
            self.best = entry
        self._tell(metrics, better)
        self._save()
        if better:
            self._save_best()
        self.stop.check()  # asked behind the last batch: not a step later

    def _tell(self, metrics: dict[str, Any], better: bool) -> None:
        """One line an evaluation: training since the last one, the selection split, speed, `*` where it is the best."""
        sums = self.epoch_sums
        trained = ""
        if sums:
            figures = means(sums)
            trained = f"train loss {figures['loss']:.4f} acc {figures['accuracy']:.2%} | "
        say(
            f"epoch {self.epoch:g}/{self.trainer.steps / self.trainer.plan.steps_per_epoch:g} | {trained}"
            f"{metrics['split']} loss {metrics['loss']:.4f} acc {metrics['top1']:.2%} "
            f"({metrics['correct']}/{metrics['total']}) | {self.watch.rate():.0f} images/s{' *' if better else ''}"
        )
        self.epoch_sums = {}

    def _keep_earlier_files(self) -> None:
        for path in self.log.listener.files:
            if kept := keep_earlier(path):
                say(f"{path} of an earlier run is now {kept}")

    def _save(self) -> None:
        self.log.flush()
        now = time.perf_counter()
        self.wall_seconds, self.clock = self.wall_seconds + now - self.clock, now
        state = self.trainer.state_dict()  # on every process: each brings its own share
        state |= {"history": self.history, "best": self.best, "wall_seconds": self.wall_seconds}
        state |= {"processes": dist.size(), "batch_size": self.trainer.plan.batch_size, "epoch_sums": self.epoch_sums}
        state |= {"draws": DRAWS}
        state |= {"trained_images": self.watch.images, "trained_seconds": self.watch.seconds}
        if dist.is_main():
            save_state(self.session.folder / "last.pt", state)

    def _save_best(self) -> None:
        if dist.is_main() and self.best is not None:
            self.log.listener.best(self.model, self.best)
            val = self.best["val"]
            name, step = self.session.experiment.name, str(self.best["step"])
            note = {"script": name, "step": step, "val_top1": f"{val['top1']:.6f}"}
            save_weights(self.session.folder / "best.safetensors", self.model.state_dict(), note)

    def _restore(self) -> None:
        folder = self.session.folder
        path = folder / "last.pt"
        state = load_state(path)
        if state.get("draws") != DRAWS:
            raise UserError(
                f"{path} was saved by a version of this program that draws other random numbers: start a new run"
            )
        try:
            self._check(state)
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
            reason = " ".join(map(str.strip, str(error).splitlines()[:2]))  # torch names the first misfit in line 2
            raise UserError(f"{path} does not fit the model of this recipe ({reason})") from error
        say(f"resumed at step {self.trainer.step} (epoch {self.epoch:g}) from {path}")

    def _check(self, state: dict[str, Any]) -> None:
        """KeyError or ValueError for a state that is not made as those of this run are."""
        own = self.trainer.state_dict() | dict.fromkeys(("wall_seconds", "trained_seconds"), 0.0)
        own |= {"history": [], "epoch_sums": dict.fromkeys(("loss", "correct", "samples"), 0.0), "trained_images": 0}
        own |= {"processes": 1, "batch_size": 1, "draws": DRAWS}
        check_like(state, own, "the state")
        parameters = [p for group in self.trainer.optimizer.param_groups for p in group["params"]]
        check_optimizer_state(state["optimizer"]["state"], parameters)
        entry: dict[str, Any] = {"step": 0, "epoch": 0.0, "val": {"correct": 0, "total": 0, "top1": 0.0}}
        evaluations: list[Any] = [*state["history"], *([] if state["best"] is None else [state["best"]])]
        for found in evaluations:
            check_like(found, entry, "history")
            if not (found.keys() >= entry.keys() and found["val"].keys() >= entry["val"].keys()):
                raise KeyError("an evaluation")
        if not 0 <= state["step"] <= self.trainer.steps:
            raise ValueError(f"step {state['step']} of {self.trainer.steps}")

    def _say_goodbye(self, number: signal.Signals) -> NoReturn:
        self.log.close()
        say(
            f"stopped by {number.name} after step {self.trainer.step} (epoch {self.epoch:.2f}), "
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
            tested, predictions = session.measure(self.model, data.test, self.stop.until_asked)
        results = {"last": {**last, "test": tested}, "best": {**self.best, "test": tested}}
        self.log.listener.last(self.model, last)
        if self.best["step"] != last["step"]:
            load_checkpoint(self.model, session.folder / "best.safetensors")
            results["best"]["test"], predictions = session.measure(self.model, data.test, self.stop.until_asked)
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
            write_tables(session.folder, "best", predictions, data.classes)
            write_record(session.folder / "record.json", record)  # at last: with it the run is finished
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
