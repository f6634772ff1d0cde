"""record.json: what was measured, where the figures come from, and why they may not count."""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common.data.batches import Plan
from common.files import write_text
from common.train import distributed
from common.train.checkpoint import State
from common.train.log import say
from common.train.loop import StopRequest, evaluate, loading, out_of_memory_explained, speed
from common.train.metrics import Predictions, write_tables
from common.train.model import has_batch_norm
from common.train.run_folder import Run, fingerprints, make_folder
from common.weights import load_checkpoint
from results import row_line

SCHEMA = 1
STARTED = datetime.now(timezone.utc)
LIBRARIES = ("torchvision", "timm", "numpy", "pillow", "scikit-learn")
# Fields of a recipe that say where things lie or which of the equal runs this is, not what the experiment is.
NEUTRAL = {"data_root", "seed", "released"}


def finish(run: Run, state: State, stop: StopRequest) -> dict[str, Any]:
    """Tests the last and the best weights; writes tables and record.json, with which the run is finished."""
    assert state.best is not None  # the last step always evaluates
    last = state.history[-1]
    tested, predictions = evaluate(run, state.model, run.data.test)
    stop.check()
    results = {"last": {**last, "test": tested}, "best": {**state.best, "test": tested}}
    if state.best["step"] != last["step"]:
        load_checkpoint(state.model, run.folder / "best.safetensors")
        results["best"]["test"], predictions = evaluate(run, state.model, run.data.test)
        stop.check()
    trained = {
        "speed": {"train_images_per_s": round(speed(state), 2)},
        "wall_seconds": round(state.wall_seconds + time.perf_counter() - state.clock, 1),  # of the tests too
        "skipped_updates": state.skipped,
    }
    return write_record(run, state.model, "finished", results, predictions, trained)


def introduce(run: Run, plan: Plan, steps: int, optimizer: Optimizer) -> None:
    """What is about to be trained, for the eyes."""
    data = run.data
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group["lr"])  # a warm-up begins lower
    say(
        f"{run.row or run.program} ({run.side}): {data.train.name}, train {data.train.split} {len(data.train):,}, "
        f"select on {data.val.split} {len(data.val):,}, report {data.test.split} {len(data.test):,} ({data.selection})"
    )
    say(
        f"batch {plan.batch_size} = {plan.size} processes x {plan.accumulate} micro-batches x "
        f"{plan.batch_size // (plan.size * plan.accumulate)}, lr {rate:g}, {steps:,} steps, seed {run.seed}, "
        f"{run.options.precision}, {device_name(run.device)}"
    )
    say(f"starting weights: {run.weights['source']}")
    say(f"run folder: {run.folder}")


def measure(run: Run, model: nn.Module) -> tuple[dict[str, Any], Predictions]:
    """Results of a checkpoint on val and test, in a new folder; the predictions are those of test."""
    make_folder(run)
    data = run.data
    where = f"{data.test.name} {data.test.split}, {len(data.test):,} images"
    say(f"{run.weights['source']}: {where}, {run.options.precision}, {device_name(run.device)}")
    with out_of_memory_explained(run):
        tested, predictions = evaluate(run, model, data.test)
        validated = tested if data.selection == "test-selected" else evaluate(run, model, data.val)[0]
    return {"checkpoint": {"val": validated, "test": tested}}, predictions


def write_record(
    run: Run,
    model: nn.Module,
    status: str,
    results: dict[str, Any],
    predictions: Predictions,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tables, record.json, and the result for the eyes. `predictions` are those of the last of `results`."""
    record = describe(run, model, status, results) | (more or {})
    if distributed.is_main():
        write_tables(run.folder, list(results)[-1], predictions, run.data.classes)
        text = json.dumps(record, indent=2, ensure_ascii=False)
        write_text(run.folder / "record.json", text + "\n")
        tell(run, record)
    return record


def describe(run: Run, model: nn.Module, status: str, results: dict[str, Any]) -> dict[str, Any]:
    """What the record of a run says (read by results/)."""
    options, data, size = run.options, run.data, distributed.size()
    excluded = [*run.excluded, *(["demo"] if options.demo else [])]
    if not options.demo and options.accumulate > 1 and (has_batch_norm(model) or hasattr(model, "training_state")):
        excluded.append(f"altered: accumulate 1 -> {options.accumulate}")  # they see how a batch is cut
    return {
        "schema": SCHEMA,
        "row": run.row,
        "script": run.script,
        "side": run.side,
        "status": status,
        "excluded": excluded,
        "recipe": dataclasses.asdict(run.recipe),
        "overrides": run.typed,
        "options": dataclasses.asdict(options),
        "seed": run.recipe.seed if status == "evaluated" else run.seed,
        "data": {"name": data.test.name, **fingerprints(data)},
        "weights": run.weights,
        "versions": versions(),
        "device": device_name(run.device),
        "host": platform.node(),
        "processes": size,
        "arithmetic": arithmetic(run),
        "precision": options.precision,
        "amp_backend": options.amp_backend,
        "selection": {
            "split": data.val.split,
            "rule": f"highest top-1 accuracy on {data.val.split}; the earliest on a tie",
            "kind": data.selection,
        },
        "results": results,
        "parameters": {
            "total": sum(parameter.numel() for parameter in model.parameters()),
            "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        },
        "peak_memory_bytes": max(distributed.gather(peak_memory(run.device))),
        "started": STARTED.isoformat(timespec="seconds"),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def tell(run: Run, record: dict[str, Any]) -> None:
    """Last and best on the reported split, where the record is, and the paper's row."""
    for name, entry in record["results"].items():
        test = entry["test"]
        deviation = "" if test["class_std"] is None else f" ± {test['class_std']:.2%}"
        chosen = f" (epoch {entry['epoch']:g}, {record['selection']['kind']})" if "epoch" in entry else ""
        say(
            f"{name}: {test['split']} accuracy {test['top1']:.2%} ({test['correct']}/{test['total']}), weighted "
            f"precision {test['precision_weighted']:.4f}, recall {test['recall_weighted']:.4f}, "
            f"F1 {test['f1_weighted']:.4f}, per class {test['class_mean']:.2%}{deviation}{chosen}"
        )
    say(f"record: {run.folder / 'record.json'}")
    say(row_line(record))


def altered(recipe: Any) -> list[str]:
    """Fields of a recipe that are not as published: `altered: epochs 30 -> 2`. Such a run never counts."""
    published, used = dataclasses.asdict(type(recipe)()), dataclasses.asdict(recipe)
    names = [name for name in published if name not in NEUTRAL and used[name] != published[name]]
    return [f"altered: {name} {published[name]} -> {used[name]}" for name in names]


def other_data(run: Run, counts: Mapping[str, int]) -> list[str]:
    """Splits whose size is not the published one of `counts`; parts of a split are measured together."""
    if run.options.limit is not None:
        return ["limited data"]
    data, sizes = run.data, dict[str, int]()
    for images in {images.split: images for images in (data.train, data.val, data.test)}.values():
        whole = images.split.partition(" (")[0]  # "train (80 %, seed 42)" is a part of "train"
        sizes[whole] = sizes.get(whole, 0) + len(images)
    return [
        f"data: {data.test.name} {split} has {count:,} images, published {counts[split]:,}"
        for split, count in sizes.items()
        if split in counts and count != counts[split]
    ]


def versions() -> dict[str, str]:
    """Python, the libraries that take part in the arithmetic, and the commit of this code if it is a git checkout."""
    # torch's own word names its CUDA too ("2.9.0+cu128"), its metadata do not.
    found = {"python": platform.python_version(), "code": _commit(), "torch": str(torch.__version__)}
    return found | {name: metadata.version(name) for name in LIBRARIES}


def _commit() -> str:
    """The commit of this file, if git keeps it: a copy installed into some other repository is not of its commit."""
    file = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """Bytes: the CUDA allocator's peak on this device, elsewhere the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def arithmetic(run: Run) -> dict[str, Any]:
    """The settings that equal figures depend on; the workers, which bring the data, are none of them."""
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "tf32_in_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_in_cudnn": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "workers": loading(run)[0],
    }
