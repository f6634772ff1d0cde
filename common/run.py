"""One experiment end to end: data, model, training, test, record. The scripts call `run`.

`run` reads the command line and trains (anew or resumed), evaluates a checkpoint, or names what is on pictures.
"""

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim import Optimizer

from common import dist
from common.amp import Precision
from common.data import Data, Images, prepare, write_demo
from common.data.loader import seed_everything
from common.engine import Objective, Trainer, cross_entropy
from common.errors import UserError
from common.files import write_text
from common.folders import check_same_experiment, new_folder, newest, open_run
from common.log import say
from common.metrics import write_tables
from common.predict import (
    Predictor,
    check_out,
    describe_model,
    describe_transform,
    find_images,
    restore_transform,
    write_predictions,
)
from common.provenance import device_name
from common.recipe import OPTIONAL_VALUE, parse
from common.records import write_record
from common.train import Session, Training, plan_batches, tell_results
from common.weights import explain_offline, load_checkpoint, load_weights, pretrained_report, sha256_of

NEWEST = "the newest"  # what --resume means without a folder


@dataclass
class Options:
    """What every script understands beside its recipe."""

    output: str = "runs"  # a run's files go to OUTPUT/<script>/<time>-<id>/
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of forward and backward
    amp_backend: Literal["native", "apex"] = "native"  # apex: where apex.amp is installed, for fp16
    accumulate: int = 1  # micro-batches an optimizer step is made of; the batch size stays, the memory falls
    grad_checkpointing: bool = (
        False  # recompute activations in the backward pass: less memory, about 1.3 times the time
    )
    workers: int | None = None  # data-loading processes per training process; none: 4, or the cores if they are fewer
    eval_batch_size: int | None = None  # images per process in evaluation; none: the training batch size
    log_every: int = 50  # optimizer steps between two lines of log.jsonl
    save_every: int | None = None  # optimizer steps between two saves of last.pt, beside one at each evaluation
    resume: str | None = field(default=None, metadata={OPTIONAL_VALUE: NEWEST})  # go on with an interrupted run [DIR]
    eval: str | None = None  # no training: evaluate a run's folder, our .safetensors or a released .pth
    predict: list[str] | None = None  # no training: name what is on these images (files, folders)
    checkpoint: str | None = None  # the model for --predict, as for --eval; none: the newest run's best
    top: int = 5  # guesses an image for --predict
    out: str | None = None  # also write the predictions to a .csv or .json file
    download: bool = True  # fetch the data set where it is missing and its authors allow it
    dist_timeout: float = 1800  # seconds that a process waits for the others (raise it where rank 0 downloads for long)
    skip_bad_images: int = 0  # go on past up to N unreadable images; the record lists them
    limit: int | None = None  # use only the first N images of each split: a trial that never counts as a result
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)
    demo: bool = False  # a small model on handwritten digits in this data set's layout: no download, a minute on a CPU


@dataclass(frozen=True)
class Experiment:
    """What a script decides; see `run`."""

    recipe_class: type
    data: Callable[[Any], Data]
    build: Callable[[Any, int], nn.Module]
    optimize: Callable[[Any, Iterable[nn.Parameter]], tuple[Optimizer, Any]]
    dataset: str
    demo: dict[str, Any]
    schedule_per: str
    objective: Objective
    clip_grad: float | None

    @property
    def script(self) -> Path:
        return Path(inspect.getfile(self.recipe_class))

    @property
    def row(self) -> str:
        """Names the row of a paper's table: the script's own name."""
        return self.script.stem


def run(
    recipe_class: type[Any],
    data: Callable[[Any], Data],
    build: Callable[[Any, int], nn.Module],
    optimize: Callable[[Any, Iterable[nn.Parameter]], tuple[Optimizer, Any]],
    *,
    dataset: str,
    demo: dict[str, Any],
    schedule_per: str = "epoch",
    objective: Objective = cross_entropy,
    clip_grad: float | None = None,
    argv: list[str] | None = None,
) -> None:
    """Runs the experiment that a script describes, as the command line asks; ends in a record or in one sentence.

    `recipe_class` is a dataclass with at least epochs, batch_size (global: processes divide it), seed, weights,
    data_root and released. `data(recipe)` gives the splits with their transforms, `build(recipe, num_classes)` the
    model, `optimize(recipe, parameters)` a torch optimizer and scheduler (stepped once an "epoch" or a "step").
    `dataset` is the name that common.data knows, `demo` the recipe fields that `--demo` changes.
    """
    script = Path(inspect.getfile(recipe_class))
    experiment = Experiment(recipe_class, data, build, optimize, dataset, demo, schedule_per, objective, clip_grad)
    recipe, options, overrides = parse(
        recipe_class, Options, inspect.getdoc(sys.modules[recipe_class.__module__]) or "", argv
    )
    try:
        _dispatch(experiment, recipe, options, overrides)
    except UserError as error:
        print(f"{script.name}: error: {error}", file=sys.stderr, flush=True)
        _leave(1)
    except torch.OutOfMemoryError:
        per_process = recipe.batch_size // (dist.size() * options.accumulate)
        print(
            f"{script.name}: error: out of GPU memory with {per_process} images at a time in {options.precision}: "
            f"halve them with --accumulate {2 * options.accumulate} (the batch of {recipe.batch_size} stays), "
            "use --precision bf16, or --grad-checkpointing; --batch-size changes the experiment",
            file=sys.stderr,
        )
        _leave(1)
    except KeyboardInterrupt:
        print(f"{script.name}: interrupted; a training run goes on from its last save with --resume", file=sys.stderr)
        _leave(130)
    finally:
        dist.stop()


def _leave(status: int) -> None:
    """Ends this process. Among several, at once: the others wait in a collective, and the launcher ends them."""
    if dist.active():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def _dispatch(experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any]) -> None:
    modes = [name for name in ("resume", "eval", "predict") if getattr(options, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} exclude each other")
    check_out(options.out)
    for name in ("accumulate", "log_every", "save_every", "eval_batch_size", "limit", "top"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    launch = dist.detect()
    device = dist.choose_device(options.device, launch)
    dist.start(launch, device, options.dist_timeout)
    if options.demo:
        torch.set_num_threads(1)  # the demo's models are too small for more: threads would wait for each other
        changes: dict[str, Any] = {"weights": "none", "data_root": str(Path(options.output) / "demo-data")}
        recipe = dataclasses.replace(recipe, **(changes | experiment.demo | overrides))
    if options.predict:
        _predict(experiment, recipe, options, overrides, device)
    elif options.eval:
        _evaluate(experiment, recipe, options, overrides, device)
    else:
        _train(experiment, recipe, options, overrides, device)


def _train(
    experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any], device: torch.device
) -> None:
    precision = Precision(options.precision, device, options.amp_backend)
    seed, folder = recipe.seed, None
    if options.resume:
        folder, info = _resumable(options, experiment.row)
        check_same_experiment(folder, info, dataclasses.asdict(recipe), overrides, options.demo)
        recipe, overrides, seed = (
            dataclasses.replace(recipe, **info["recipe"]),
            info["overrides"],
            info["seed"],
        )
    if seed is None:  # the published script sets none: draw one, and keep it in the record
        seed = dist.broadcast(int.from_bytes(os.urandom(4), "little"))
    data = _data(experiment, recipe, options)
    if recipe.epochs < 1:
        raise UserError(f"--epochs {recipe.epochs}: at least one is needed")
    plan = plan_batches(data.train, recipe.batch_size, options.accumulate, seed)
    seed_everything(seed)
    model, weights = _model(experiment, recipe, len(data.classes), load=folder is None)
    if options.grad_checkpointing:
        _checkpoint_gradients(model)
    if dist.size() > 1 and device.type == "cuda":  # else every process would normalise by its own share of the batch
        model = convert_sync_batchnorm(model)
    model.to(device)
    resume = folder is not None
    if folder is None:
        folder = Path(dist.broadcast(str(new_folder(options.output, experiment.row)) if dist.is_main() else ""))
    else:
        weights = info["weights"]
    session = Session(experiment.row, folder, recipe, options, overrides, seed, data, weights, device, precision)
    if dist.is_main() and not resume:
        write_text(folder / "model.json", json.dumps(_model_info(session, model), indent=1))
    optimizer, scheduler = experiment.optimize(recipe, [p for p in model.parameters() if p.requires_grad])
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        precision=session.precision,
        images=data.train,
        plan=plan,
        steps=recipe.epochs * plan.steps_per_epoch,
        device=device,
        loading=session.loading,
        seed=seed,
        objective=experiment.objective,
        clip_grad=experiment.clip_grad,
        schedule_per=experiment.schedule_per,
    )
    _say_plan(session, trainer)
    Training(session, trainer, resume).run()


def _say_plan(session: Session, trainer: Trainer) -> None:
    data, plan, options = session.data, trainer.plan, session.options
    say(
        f"{session.row} ({session.side}): {data.train.name}, train {data.train.split} {len(data.train):,}, select on "
        f"{data.val.split} {len(data.val):,}, report {data.test.split} {len(data.test):,} ({data.selection})"
    )
    say(
        f"batch {plan.batch_size} = {plan.size} processes x {plan.accumulate} micro-batches x "
        f"{plan.batch_size // (plan.size * plan.accumulate)}, lr {trainer.rate:g}, {trainer.steps:,} steps, "
        f"seed {session.seed}, {options.precision}, {device_name(session.device)}"
    )
    say(f"run folder: {session.folder}")


def _resumable(options: Options, row: str) -> tuple[Path, dict[str, Any]]:
    if options.resume == NEWEST:
        path = str(newest(options.output, row, having="last.pt", lacking="record.json"))
    else:
        path = str(options.resume)
    folder, info = open_run(path, row)
    if (folder / "record.json").exists():
        raise UserError(f"{folder} is finished: see its record.json, or start a new run")
    return folder, info


def _data(experiment: Experiment, recipe: Any, options: Options) -> Data:
    with dist.main_first():
        if options.demo:
            write_demo(experiment.dataset, recipe.data_root)
        else:
            prepare(experiment.dataset, recipe.data_root, download=options.download)
        data = experiment.data(recipe)
    if options.limit is None:
        return data

    def cut(images: Images) -> Images:
        return images.subset(range(min(options.limit or 0, len(images))))

    return Data(cut(data.train), cut(data.val), cut(data.test))


def _model(experiment: Experiment, recipe: Any, num_classes: int, load: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its starting weights, or (`load` false) bare for a checkpoint to fill; and what was loaded."""
    source = recipe.weights if load else "none"
    if source not in ("pretrained", "none") and not Path(source).is_file():
        raise UserError(
            f"--weights {source}: expected pretrained, none, or an existing .npz, .safetensors or .pth file"
        )
    pretrained = source == "pretrained"
    # Rank 0 downloads first, the others find the file in the cache.
    with dist.main_first(), explain_offline(recipe.model, pretrained):
        model = experiment.build(
            dataclasses.replace(recipe, weights="pretrained" if pretrained else "none"), num_classes
        )
    if pretrained:
        return model, pretrained_report(model)
    if source == "none":
        return model, {"source": "none", "sha256": None}
    return model, load_weights(model, source)


def _checkpoint_gradients(model: nn.Module) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError(f"--grad-checkpointing: {type(model).__name__} does not support it; use --accumulate")
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except AssertionError as error:  # timm's way to say no
        raise UserError(
            f"--grad-checkpointing: {type(model).__name__} does not support it; use --accumulate"
        ) from error


def _model_info(session: Session, model: nn.Module) -> dict[str, Any]:
    """What `model.json` says: enough to resume, to evaluate, and to predict without the script."""
    recipe, data = session.recipe, session.data
    return {
        "script": session.row,
        "side": session.side,
        "demo": session.options.demo,
        "seed": session.seed,
        "overrides": session.overrides,
        "recipe": dataclasses.asdict(recipe),
        "weights": session.weights,
        "architecture": describe_model(model, len(data.classes), recipe.model_kwargs),
        "classes": data.classes,
        "preprocessing": describe_transform(data.test.transform),
    }


def _checkpoint(
    experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any]
) -> tuple[Path, Any, dict[str, Any] | None]:
    """The checkpoint that --eval or --checkpoint names, the recipe that goes with it, its `model.json` if ours."""
    name = options.eval or options.checkpoint or str(newest(options.output, experiment.row, having="best.safetensors"))
    path = Path(name)
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a run's folder, a .safetensors file or a released .pth")
    folder = path if path.is_dir() else path.parent
    if not (folder / "model.json").is_file():
        if path.is_dir():
            raise UserError(f"{path} is not the folder of a run: it has no model.json")
        return path, recipe, None
    _, info = open_run(str(folder), experiment.row)
    return path, dataclasses.replace(recipe, **(info["recipe"] | overrides)), info


def _load(model: nn.Module, path: Path, recipe: Any) -> None:
    dropped = load_checkpoint(model, path)
    if any(key.endswith("ema_grad") for key in dropped) and not recipe.released:
        say(f"note: {path} was written by the released GFT code: add --released to compute what that code computes")


def _evaluate(
    experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any], device: torch.device
) -> None:
    precision = Precision(options.precision, device, options.amp_backend)
    path, recipe, info = _checkpoint(experiment, recipe, options, overrides)
    data = _data(experiment, recipe, options)
    model, _ = _model(experiment, recipe, len(data.classes), load=False)
    _load(model, path, recipe)
    model.to(device)
    folder = Path(dist.broadcast(str(new_folder(options.output, experiment.row)) if dist.is_main() else ""))
    weights = {"source": str(path), "sha256": sha256_of(path / "best.safetensors" if path.is_dir() else path)}
    session = Session(experiment.row, folder, recipe, options, overrides, recipe.seed, data, weights, device, precision)
    tested, predictions = session.measure(model, data.test)
    validated = tested if data.selection == "test-selected" else session.measure(model, data.val)[0]
    results = {"checkpoint": {"val": validated, "test": tested}}
    excluded = [] if info is None else ["evaluation of a run that has a record of its own"]
    record = session.record(model, "evaluated", excluded, results)
    if dist.is_main():
        write_tables(folder, "checkpoint", predictions, data.classes)
        write_record(folder / "record.json", record)
        tell_results(session, record)


def _predict(
    experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any], device: torch.device
) -> None:
    paths = find_images(options.predict or [])
    path, recipe, info = _checkpoint(experiment, recipe, options, overrides)
    if info is None:  # a bare file says neither class names nor preprocessing: the data set and the script do
        data = _data(experiment, recipe, options)
        classes, transform = data.classes, data.test.transform
    else:
        classes, transform = info["classes"], restore_transform(info["preprocessing"])
    model, _ = _model(experiment, recipe, len(classes), load=False)
    _load(model, path, recipe)
    say(f"model: {path}")
    predictor = Predictor(model.to(device), transform, classes, device)
    if dist.is_main():
        write_predictions(paths, predictor(paths, options.top), classes, options.out)
