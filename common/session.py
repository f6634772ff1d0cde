"""One use of a program: what it was asked for, what it measures, and the record that it leaves."""

import dataclasses
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import dist
from common.amp import Precision
from common.data import Data
from common.data.images import Images
from common.data.loader import Batch, workers_explained
from common.determinism import arithmetic
from common.engine import Loading, evaluate
from common.errors import UserError
from common.experiment import Experiment, Options
from common.folders import new_folder
from common.log import watched
from common.metrics import Predictions, summarize
from common.placement import compilation_explained, compile_model, place
from common.provenance import (
    data_differences,
    depends_on_micro_batches,
    device_name,
    parameter_counts,
    peak_memory,
    versions,
)


def loading_of(experiment: Experiment, recipe: Any, options: Options) -> Loading:
    """How images are brought, as the options say."""
    batch = options.eval_batch_size or max(1, experiment.global_batch_size(recipe) // dist.size())
    workers = min(4, os.cpu_count() or 1) if options.workers is None else options.workers
    return Loading(workers, batch, options.skip_bad_images, options.pin_memory)


def on_device(model: nn.Module, device: torch.device, options: Options) -> nn.Module:
    """The model on the device, compiled where that was asked for."""
    model = place(model, device)
    if options.compile:
        compile_model(model)
    return model


def make_folder(experiment: Experiment, recipe: Any, options: Options) -> Path:
    """The folder of this run, which rank 0 makes."""
    made = str(new_folder(options.output, experiment.folder(recipe))) if dist.is_main() else ""
    return Path(dist.broadcast(made))


@contextmanager
def explain_machine(experiment: Experiment, recipe: Any, options: Options) -> Iterator[None]:
    """A GPU that is too small for the batch; a machine that cannot compile the model, or kills data workers."""
    compiled = compilation_explained(experiment.flag("compile")) if options.compile else nullcontext()
    try:
        with compiled, workers_explained(experiment.flag("workers")):
            yield
    except torch.OutOfMemoryError as error:
        share = experiment.global_batch_size(recipe) // dist.size()
        half = "use --precision bf16, or " if options.precision == "fp32" else "or use "
        raise UserError(
            f"out of GPU memory with {share // options.accumulate} images at a time in {options.precision}: take fewer "
            f"with {experiment.save_memory(recipe, options)} (in evaluation {experiment.flag('eval_batch_size')}), "
            f"{half}{experiment.flag('grad_checkpointing')}; "
            f"{experiment.flag('batch_size')} alone changes the experiment"
        ) from error


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
        self.loading = loading_of(self.experiment, self.recipe, self.options)

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

    def measure(
        self, model: nn.Module, images: Images, until: Callable[[Iterator[Batch]], Iterator[Batch]] = iter
    ) -> tuple[dict[str, Any], Predictions]:
        """Metrics of `model` on all of `images`, and what they were counted from; `until` may break it off."""
        share = -(-len(images) // dist.size())
        batches = -(-share // self.loading.eval_batch_size)
        predictions = evaluate(
            model,
            images,
            self.device,
            self.precision,
            self.loading,
            lambda items: until(watched(items, images.split, batches)),
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
            "arithmetic": arithmetic(self.loading.workers),
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
