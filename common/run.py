"""One experiment end to end: data, model, training, test, record. The scripts call `run`.

`run` reads the command line and trains (anew or resumed); what it asks of a trained model is in common.ask.
"""

import dataclasses
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim import Optimizer

from common import dist
from common.ask import check_asked, evaluate, predict, write_export
from common.data import Data
from common.data.loader import Plan, seed_everything
from common.determinism import make_deterministic, settings_kept
from common.earlier import check_data, check_kept, model_info, resumable, started_before
from common.engine import Objective, Trainer, cross_entropy
from common.errors import UserError
from common.experiment import (
    Experiment,
    Options,
    check_numbers,
    checkpoint_gradients,
    keep_resized,
    make_model,
    read_data,
)
from common.export import check_export
from common.files import write_text
from common.folders import Lock, check_same_experiment, mark_launch
from common.log import say
from common.lost import ProcessLost
from common.predict import check_out
from common.provenance import device_name
from common.recipe import parse
from common.session import Session, explain_machine, make_folder, on_device
from common.train import Training, plan_batches

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
    check_asked(experiment, options)
    check_out(options.out)
    check_export(options.export, chosen)
    launch = dist.detect()
    device = dist.choose_device(options.device, launch)
    dist.start(launch, device, options.dist_timeout)
    if options.demo:
        torch.set_num_threads(1)  # the demo's models are too small for more: threads would wait for each other
        recipe = experiment.demo_recipe(recipe, options, overrides)
    check_numbers(experiment, recipe, options)
    if options.predict:
        predict(experiment, recipe, options, overrides, chosen, device)
    elif options.export:
        write_export(experiment, recipe, options, overrides)
    elif options.eval:
        evaluate(experiment, recipe, options, overrides, chosen, device)
    else:
        _train(experiment, recipe, options, overrides, chosen, device)


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
        folder = make_folder(experiment, recipe, options)
    else:
        weights = info["weights"]
    session = Session(experiment, folder, recipe, options, overrides, seed, data, weights, device, precision)
    if dist.is_main() and not resume:
        write_text(folder / "model.json", json.dumps(model_info(session, model), indent=1))
    with Lock(folder) if dist.is_main() else nullcontext(), explain_machine(experiment, recipe, options):
        if dist.is_main():
            mark_launch(folder, launches)
        trainer = _trainer(session, on_device(model, device, options), plan)
        _say_plan(session, trainer)
        Training(session, trainer, resume, experiment.evaluate_every(recipe, plan)).run()


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
