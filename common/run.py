"""The main of the 21 scripts: one experiment, from the command line to record.json."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from common.cli import Flags, Options, parse
from common.data import Data, facts, prepare, write_demo
from common.data.batches import seed_everything, shuffled
from common.data.resized import check_resized
from common.predict import answer, asked, of_data
from common.train.checkpoint import make_state
from common.train.distributed import explained, main_first, start
from common.train.loop import Objective, cross_entropy, evaluation_due, fit, plan_batches, training
from common.train.model import check_classes, place, starting_model, trained_model
from common.train.precision import Precision
from common.train.record import altered, finish, introduce, measure, other_data, write_record
from common.train.run_folder import Run, check_data, choose_seed, find_checkpoint, new_folder, resume


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
    data_root, model, model_kwargs and released. `data(recipe)` gives the splits with their transforms,
    `build(recipe, num_classes)` the model, `optimize(recipe, parameters)` a torch optimizer and scheduler (stepped once
    an "epoch" or a "step"). `dataset` is the name that common.data knows, `demo` the recipe fields that `--demo`
    changes.
    """
    script = Path(inspect.getfile(recipe_class)).name
    with explained(script):
        doc = inspect.getdoc(sys.modules[recipe_class.__module__]) or ""
        recipe, options, given = parse(recipe_class, Options, doc, argv)
        name, device = script.removesuffix(".py"), start(options)
        run = Run(name, script, Path(options.output) / name, recipe, options, given, Flags(), device, row=name)
        if options.demo:
            small = {"data_root": str(Path(options.output) / "demo-data"), "weights": "none", **demo}
            run.recipe = dataclasses.replace(recipe, **{**small, **run.typed})
        checkpoint = find_checkpoint(run) if asked(options) else None  # with the recipe that it says
        if options.resume:
            resume(run)  # its folder, recipe, options and seed
        recipe, options, run.batch_size = run.recipe, run.options, run.recipe.batch_size
        run.precision = Precision(options.precision, run.device, options.amp_backend)
        bare = partial(build, dataclasses.replace(recipe, weights="none"))

        def read() -> Data:
            with main_first():
                fetch(dataset, recipe.data_root, options)
                found = data(recipe).limited(options.limit)
            check_resized(found)
            return found

        if checkpoint is not None and not options.eval:
            answer(run, checkpoint, bare, lambda: of_data(read()))
            return
        run.data = read()
        run.excluded += [] if options.demo else [*altered(recipe), *other_data(run, facts(dataset).counts)]
        if checkpoint is not None:
            check_classes(checkpoint, run.data)
            model = place(run, trained_model(run, bare, checkpoint, run.data.classes))
            write_record(run, model, "evaluated", *measure(run, model))
            return
        check_data(run)
        choose_seed(run)
        plan = plan_batches(run, shuffled(len(run.data.train), run.seed))
        seed_everything(run.seed)
        build_it = bare if run.resumed else partial(build, recipe)
        model = place(run, starting_model(run, partial(build_it, len(run.data.classes)), recipe.weights))
        new_folder(run)
        optimizer, scheduler = optimize(recipe, [p for p in model.parameters() if p.requires_grad])
        state = make_state(run, model, optimizer, scheduler)
        steps, every = recipe.epochs * plan.steps_per_epoch, plan.steps_per_epoch
        with training(run, state, evaluation_due(state, steps, every)) as stop:
            introduce(run, plan, steps, optimizer)
            how: dict[str, Any] = dict(objective=objective, clip_grad=clip_grad, schedule_per=schedule_per)
            fit(run, state, plan, stop, steps=steps, evaluate_every=every, **how)
            finish(run, state, stop)


def fetch(dataset: str, data_root: str, options: Options) -> None:
    """The data set where it is missing; with --demo its digits."""
    if options.demo:
        write_demo(dataset, data_root)
    else:
        prepare(dataset, data_root, options.download)
