"""What a trained model is asked for: its accuracy (--eval), what is on pictures (--predict), a file (--export)."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from common import dist
from common.amp import Precision
from common.determinism import make_deterministic
from common.earlier import check_classes, find_checkpoint, model_to_ask, trained_model
from common.errors import UserError
from common.experiment import Experiment, Options, check_numbers, keep_resized, read_data
from common.export import export
from common.log import say
from common.metrics import write_tables
from common.predict import Predictor, find_images, write_predictions
from common.provenance import device_name
from common.records import write_record
from common.session import Session, explain_machine, loading_of, make_folder, on_device
from common.train import tell_results

# Options that would do nothing.
IN_VAIN = {
    "predict": ("cache_resized",),
    "export": ("compile", "deterministic", "amp_backend", "cache_resized", "top", "out"),
}


def check_asked(experiment: Experiment, options: Options) -> None:
    """Refuses an option that would do nothing, before any work is done."""
    for mode in (mode for mode in IN_VAIN if getattr(options, mode)):
        for name in IN_VAIN[mode]:
            if getattr(options, name) != getattr(Options, name):
                raise UserError(f"{experiment.flag(name)} does nothing with {experiment.flag(mode)}: leave it out")


def evaluate(
    experiment: Experiment,
    recipe: Any,
    options: Options,
    overrides: dict[str, Any],
    chosen: dict[str, Any],
    device: torch.device,
) -> None:
    """Measures the checkpoint on val and test, and leaves a record in a folder of its own."""
    checkpoint = find_checkpoint(experiment, recipe, options, overrides)
    path, recipe, info, _ = checkpoint
    options, precision = _for_evaluation(experiment, recipe, options, device, chosen.keys() | overrides.keys())
    data = keep_resized(experiment, read_data(experiment, recipe, options), options)
    check_classes(path, info["classes"] if info else experiment.classes_of(path), data)
    model = trained_model(experiment, checkpoint, len(data.classes))
    folder = make_folder(experiment, recipe, options)
    weights = checkpoint.weights()
    session = Session(experiment, folder, recipe, options, overrides, recipe.seed, data, weights, device, precision)
    say(
        f"{path}: {data.test.name} {data.test.split}, {len(data.test):,} images, {options.precision}, "
        f"{device_name(device)}"
    )
    with explain_machine(experiment, recipe, options):
        tested, predictions = session.measure(on_device(model, device, options), data.test)
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
    check_numbers(experiment, recipe, options)
    options = experiment.options(recipe, options, device, given)
    if options.amp_backend == "apex":  # it rewrites a model together with its optimizer
        raise UserError(f"{experiment.flag('amp_backend')} apex is for training: leave it out here")
    if options.deterministic:
        make_deterministic()
    return options, experiment.precision(recipe, options, device)


def predict(
    experiment: Experiment,
    recipe: Any,
    options: Options,
    overrides: dict[str, Any],
    chosen: dict[str, Any],
    device: torch.device,
) -> None:
    """Names what is on the images."""
    paths = find_images(options.predict or [])
    checkpoint = find_checkpoint(experiment, recipe, options, overrides)
    given = chosen.keys() | overrides.keys()
    options, precision = _for_evaluation(experiment, checkpoint.recipe, options, device, given)
    model, classes, transform = model_to_ask(experiment, checkpoint, options)
    say(f"model: {checkpoint.path}")
    if dist.is_main():
        loading = loading_of(experiment, checkpoint.recipe, options)
        with explain_machine(experiment, checkpoint.recipe, options):
            ready = on_device(model, device, options)
            ranked = Predictor(ready, transform, classes, device, precision, loading)(paths, options.top)
        write_predictions(paths, ranked, classes, options.out)


def write_export(experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any]) -> None:
    """Writes the model to the file that --export names."""
    checkpoint = find_checkpoint(experiment, recipe, options, overrides)
    model, classes, transform = model_to_ask(experiment, checkpoint, options)
    say(f"model: {checkpoint.path}")
    if dist.is_main():
        export(model, transform, classes, checkpoint.weights(), Path(str(options.export)))
