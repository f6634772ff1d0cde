"""One experiment end to end: data, model, training, test, record. The scripts call `run`.

`run` reads the command line and trains (anew or resumed), evaluates a checkpoint, or names what is on pictures.
"""

import dataclasses
import errno
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim import Optimizer

from common import dist
from common.amp import Precision
from common.data import Data
from common.data.loader import Plan, seed_everything
from common.determinism import make_deterministic, settings_kept
from common.earlier import (
    check_classes,
    check_data,
    check_kept,
    find_checkpoint,
    model_info,
    model_to_ask,
    resumable,
    started_before,
    trained_model,
)
from common.engine import Objective, Trainer, cross_entropy
from common.errors import UserError, brief
from common.experiment import Experiment, Options, checkpoint_gradients, keep_resized, make_model, read_data
from common.export import check_export, export
from common.files import write_text
from common.folders import (
    Lock,
    check_same_experiment,
    mark_launch,
    new_folder,
)
from common.log import say
from common.lost import ProcessLost
from common.metrics import write_tables
from common.placement import compilation_explained, compile_model, place
from common.predict import (
    Predictor,
    check_out,
    find_images,
    write_predictions,
)
from common.provenance import device_name
from common.recipe import parse
from common.records import write_record
from common.session import Session, loading_of
from common.train import Training, plan_batches, tell_results

REPEAT_AFTER = 3.0  # seconds until another process than the first says what is wrong


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

    `recipe_class` is a dataclass with at least epochs (or steps, and evaluate_every in steps), batch_size (global:
    processes divide it), seed, weights, data_root, model, model_kwargs and released. `data(recipe)` gives the splits
    with their transforms, `build(recipe, num_classes)` the model, `optimize(recipe, parameters)` a torch optimizer and
    scheduler (stepped once an "epoch" or a "step"). `dataset` is the name that common.data knows, `demo` the recipe
    fields that `--demo` changes.
    """
    start(Experiment(recipe_class, data, build, optimize, dataset, demo, schedule_per, objective, clip_grad), argv=argv)


def start(experiment: Experiment, argv: list[str] | None = None) -> None:
    """`run` for an experiment that overrides methods of Experiment."""
    recipe_class: type[Any] = experiment.recipe_class
    title = experiment.script
    configure = experiment.configure if experiment.has_configuration else None
    try:
        recipe, options, overrides, chosen = parse(
            recipe_class,
            Options,
            experiment.description,
            argv,
            experiment.names,
            experiment.separator,
            configure,
            experiment.no_flags,
        )
        with settings_kept(), dist.losses_explained(lambda: ""), _long_names_explained():
            _dispatch(experiment, recipe, options, overrides, chosen)
    except UserError as error:
        if not isinstance(error, ProcessLost):
            dist.leave_word(str(error))
        first = error.first if isinstance(error, ProcessLost) else dist.is_main()
        if not first:  # what all processes find, one says: its launcher ends the others meanwhile
            time.sleep(REPEAT_AFTER)
        print(f"{title}: error: {error}", file=sys.stderr, flush=True)
        _leave(1)
    except KeyboardInterrupt:
        dist.leave_word("it was interrupted")
        print(f"{title}: interrupted; a training run goes on from its last save with --resume", file=sys.stderr)
        _leave(130)
    except Exception as error:
        if not dist.active():
            raise
        dist.leave_word(" ".join(f"{type(error).__name__}: {error}".split()))
        traceback.print_exc()  # and away: taking leave of the group would wait for the others, and they for this one
        _leave(1)
    dist.stop()


@contextmanager
def _long_names_explained() -> Iterator[None]:
    """Of a path that is too long for the system even the question whether it exists is an error, for whatever flag."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{error.filename} is too long a name for the file system: choose a shorter one") from error


@contextmanager
def _explain_machine(experiment: Experiment, recipe: Any, options: Options) -> Iterator[None]:
    """A GPU that is too small for the batch; a machine that cannot compile the model."""
    try:
        with compilation_explained(experiment.flag("compile")) if options.compile else nullcontext():
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


def _leave(status: int) -> None:
    """Ends this process. Among several, at once: the others wait in a collective, and the launcher ends them."""
    if dist.active():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def _dispatch(
    experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any], chosen: dict[str, Any]
) -> None:
    options = experiment.mode(recipe, options)
    modes = [name for name in ("resume", "eval", "predict", "export") if getattr(options, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} exclude each other")
    check_out(options.out)
    check_export(options.export, chosen)
    launch = dist.detect()
    device = dist.choose_device(options.device, launch)
    dist.start(launch, device, options.dist_timeout)
    if options.demo:
        torch.set_num_threads(1)  # the demo's models are too small for more: threads would wait for each other
        recipe = experiment.demo_recipe(recipe, options, overrides)
    _check_numbers(experiment, recipe, options)
    if options.predict:
        _predict(experiment, recipe, options, overrides, chosen, device)
    elif options.export:
        _export(experiment, recipe, options, overrides)
    elif options.eval:
        _evaluate(experiment, recipe, options, overrides, chosen, device)
    else:
        _train(experiment, recipe, options, overrides, chosen, device)


def _check_numbers(experiment: Experiment, recipe: Any, options: Options) -> None:
    """UserError for a number of recipe or options that nothing can be done with."""
    may_be_zero = experiment.may_be_zero | {"workers", "skip_bad_images"}
    for fields in (recipe, options):
        for name, value in vars(fields).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if isinstance(value, int) and value >= 1 << 63:
                raise UserError(f"{experiment.flag(name)} {brief(value)}: expected less than 2^63")
            if not (value >= 0 if name in may_be_zero else value > 0) or value == math.inf:
                least = "0 or more" if name in may_be_zero else "more than 0"
                raise UserError(f"{experiment.flag(name)} {brief(value)}: expected {least}")


def _train(
    experiment: Experiment,
    recipe: Any,
    options: Options,
    overrides: dict[str, Any],
    chosen: dict[str, Any],
    device: torch.device,
) -> None:
    given = chosen.keys() | overrides.keys()
    launches = {name for name in dist.gather(dist.launch_name()) if name}
    started = started_before(experiment, recipe, options, launches)
    if started is not None:
        if (started / "record.json").exists():
            say(f"{started} was finished before the launcher started this again: nothing is left to do")
            return
        say(f"started again by the launcher: going on with {started}")
        options = dataclasses.replace(options, resume=str(started))
    seed, folder = recipe.seed, None
    if options.resume:
        folder, info = resumable(experiment, recipe, options)
        if experiment.has_configuration:  # what its files said when the run was started holds
            recipe = dataclasses.replace(recipe, **(info["recipe"] | overrides))
        if options.demo:  # what a demo changes may depend on what it was started with
            recipe = experiment.demo_recipe(recipe, options, info["overrides"] | overrides)
        check_same_experiment(folder, info, dataclasses.asdict(recipe), overrides, options.demo, experiment.places)
        check_kept(chosen, info, folder)
        moved = {name: getattr(recipe, name) for name in experiment.places if name in overrides}
        recipe = dataclasses.replace(recipe, **(info["recipe"] | moved))
        overrides, seed = info["overrides"] | moved, info["seed"]
    options = experiment.options(recipe, options, device, given)
    if folder is not None:
        options = dataclasses.replace(options, **info["options"])
    if options.deterministic:
        make_deterministic()
    precision = experiment.precision(recipe, options, device)
    if seed is None:  # the published script sets none: draw one, and keep it in the record
        seed = dist.broadcast(int.from_bytes(os.urandom(4), "little"))
    data = keep_resized(experiment, read_data(experiment, recipe, options), options)
    fingerprints = {name: getattr(data, name).fingerprint() for name in ("train", "val", "test")}
    if folder is not None:
        check_data(folder, info["data"], fingerprints, recipe.data_root)
    order = experiment.order(recipe, len(data.train), seed)
    batch_size = experiment.global_batch_size(recipe)
    plan = plan_batches(experiment, order, len(data.train), batch_size, options.accumulate)
    seed_everything(seed)
    model, weights = make_model(experiment, recipe, len(data.classes), load=folder is None)
    if options.grad_checkpointing:
        checkpoint_gradients(model, experiment.save_memory(recipe, options))
    if dist.size() > 1 and device.type == "cuda":  # else every process would normalise by its own share of the batch
        model = convert_sync_batchnorm(model)
    resume = folder is not None
    if folder is None:
        folder = _new_folder(experiment, recipe, options)
    else:
        weights = info["weights"]
    session = Session(experiment, folder, recipe, options, overrides, seed, data, weights, device, precision)
    if dist.is_main() and not resume:
        write_text(folder / "model.json", json.dumps(model_info(session, model), indent=1))
    with Lock(folder) if dist.is_main() else nullcontext(), _explain_machine(experiment, recipe, options):
        if dist.is_main():
            mark_launch(folder, launches)
        trainer = _trainer(session, _ready(model, device, options), plan)
        _say_plan(session, trainer)
        Training(session, trainer, resume, experiment.evaluate_every(recipe, plan)).run()


def _ready(model: nn.Module, device: torch.device, options: Options) -> nn.Module:
    """The model on the device, compiled where that was asked for."""
    model = place(model, device)
    if options.compile:
        compile_model(model)
    return model


def _trainer(session: Session, model: nn.Module, plan: Plan) -> Trainer:
    experiment, recipe = session.experiment, session.recipe
    optimizer, scheduler = experiment.optimizer(recipe, model, plan)
    return Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        precision=session.precision,
        images=session.data.train,
        plan=plan,
        steps=experiment.steps(recipe, plan),
        device=session.device,
        loading=session.loading,
        seed=session.seed,
        objective=experiment.objective_of(recipe, len(session.data.classes)),
        clip_grad=experiment.max_norm(recipe),
        schedule_per=experiment.schedule_per,
    )


def _say_plan(session: Session, trainer: Trainer) -> None:
    data, plan, options = session.data, trainer.plan, session.options
    for sentence in session.experiment.advice(session.recipe, options, session.device):
        say(sentence)
    rate = trainer.optimizer.param_groups[0].get("initial_lr", trainer.rate)  # a warm-up begins lower
    say(
        f"{session.row or session.experiment.name} ({session.side}): {data.train.name}, train {data.train.split} "
        f"{len(data.train):,}, select on {data.val.split} {len(data.val):,}, report {data.test.split} "
        f"{len(data.test):,} ({data.selection})"
    )
    say(
        f"batch {plan.batch_size} = {plan.size} processes x {plan.accumulate} micro-batches x "
        f"{plan.batch_size // (plan.size * plan.accumulate)}, lr {rate:g}, {trainer.steps:,} steps, "
        f"seed {session.seed}, {options.precision}, {device_name(session.device)}"
    )
    say(f"starting weights: {session.weights['source']}")
    say(f"run folder: {session.folder}")


def _new_folder(experiment: Experiment, recipe: Any, options: Options) -> Path:
    """The folder of this run, which rank 0 makes."""
    made = str(new_folder(options.output, experiment.folder(recipe))) if dist.is_main() else ""
    return Path(dist.broadcast(made))


def _evaluate(
    experiment: Experiment,
    recipe: Any,
    options: Options,
    overrides: dict[str, Any],
    chosen: dict[str, Any],
    device: torch.device,
) -> None:
    checkpoint = find_checkpoint(experiment, recipe, options, overrides)
    path, recipe, info, _ = checkpoint
    options, precision = _for_evaluation(experiment, recipe, options, device, chosen.keys() | overrides.keys())
    data = keep_resized(experiment, read_data(experiment, recipe, options), options)
    check_classes(path, info["classes"] if info else experiment.classes_of(path), data)
    model = trained_model(experiment, checkpoint, len(data.classes))
    folder = _new_folder(experiment, recipe, options)
    weights = checkpoint.weights()
    session = Session(experiment, folder, recipe, options, overrides, recipe.seed, data, weights, device, precision)
    say(
        f"{path}: {data.test.name} {data.test.split}, {len(data.test):,} images, {options.precision}, "
        f"{device_name(device)}"
    )
    with _explain_machine(experiment, recipe, options):
        tested, predictions = session.measure(_ready(model, device, options), data.test)
        validated = tested if data.selection == "test-selected" else session.measure(model, data.val)[0]
    session.loading.close()
    results = {"checkpoint": {"val": validated, "test": tested}}
    excluded = [] if info is None else ["evaluation of a run that has a record of its own"]
    more = experiment.evaluated(session, model, predictions)
    record = session.record(model, "evaluated", excluded, results, **more)
    if dist.is_main():
        write_tables(folder, "checkpoint", predictions, data.classes)
        write_record(folder / "record.json", record)
        tell_results(session, record)


def _for_evaluation(
    experiment: Experiment, recipe: Any, options: Options, device: torch.device, given: Collection[str]
) -> tuple[Options, Precision]:
    """The options with what the recipe of a checkpoint says of them, and the precision in which its model answers."""
    _check_numbers(experiment, recipe, options)
    options = experiment.options(recipe, options, device, given)
    if options.amp_backend == "apex":  # it rewrites a model together with its optimizer
        raise UserError(f"{experiment.flag('amp_backend')} apex is for training: leave it out here")
    if options.deterministic:
        make_deterministic()
    return options, experiment.precision(recipe, options, device)


def _predict(
    experiment: Experiment,
    recipe: Any,
    options: Options,
    overrides: dict[str, Any],
    chosen: dict[str, Any],
    device: torch.device,
) -> None:
    paths = find_images(options.predict or [])
    checkpoint = find_checkpoint(experiment, recipe, options, overrides)
    given = chosen.keys() | overrides.keys()
    options, precision = _for_evaluation(experiment, checkpoint.recipe, options, device, given)
    model, classes, transform = model_to_ask(experiment, checkpoint, options)
    say(f"model: {checkpoint.path}")
    if dist.is_main():
        loading = loading_of(experiment, checkpoint.recipe, options)
        with _explain_machine(experiment, checkpoint.recipe, options):
            ready = _ready(model, device, options)
            ranked = Predictor(ready, transform, classes, device, precision, loading)(paths, options.top)
        write_predictions(paths, ranked, classes, options.out)


def _export(experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any]) -> None:
    checkpoint = find_checkpoint(experiment, recipe, options, overrides)
    model, classes, transform = model_to_ask(experiment, checkpoint, options)
    say(f"model: {checkpoint.path}")
    if dist.is_main():
        export(model, transform, classes, checkpoint.weights(), Path(str(options.export)))
