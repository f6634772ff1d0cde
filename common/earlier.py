"""What an earlier run left, for one that goes on with it, evaluates it, or asks its model: found, checked, loaded."""

import dataclasses
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from common import dist
from common.building import built_for
from common.data import Data
from common.errors import UserError
from common.experiment import NEWEST, Experiment, Options, make_model, read_data
from common.folders import newest, open_run, run_of_launch
from common.log import say
from common.predict import describe_model, describe_transform, restore_transform
from common.recipe import check_value
from common.session import Session
from common.weights import file_of, load_checkpoint, sha256_of

# Options that a resumed run keeps: they are in its figures.
KEPT = ("limit", "precision", "amp_backend", "accumulate", "deterministic", "compile")


def check_kept(chosen: dict[str, Any], info: dict[str, Any], folder: Path) -> None:
    """A UserError for an option of KEPT that was now `chosen` otherwise than when the run was started."""
    for name in KEPT:
        then = info["options"].get(name, getattr(Options, name))  # runs of an earlier version lack later options
        if chosen.get(name, then) != then:
            flag = f"--{name.replace('_', '-')}"
            started = f"with {flag} {then}" if then else f"without {flag}"
            again = flag if chosen[name] is True else f"{flag} {chosen[name]}"
            raise UserError(f"{folder} was started {started}: resume it without {again}")


def check_data(folder: Path, then: dict[str, Any], now: dict[str, Any], place: str) -> None:
    """A UserError where the run in `folder` was started on splits of other fingerprints."""
    for name, split in then.items():
        if split != now[name]:
            sizes = [f"{part['count']:,} images of {part['classes']} classes" for part in (split, now[name])]
            raise UserError(
                f"{folder} was started on other images or labels than {place} holds now ({name}: {sizes[0]} then, "
                f"{sizes[1]} now): start a new run"
            )


def check_classes(path: Path, trained: list[str] | None, data: Data) -> None:
    """A UserError where a checkpoint that says its classes was `trained` for others than the data have."""
    if trained is None or trained == data.classes:
        return
    both = enumerate(zip_longest(trained, data.classes))
    number, names = next((number, names) for number, names in both if names[0] != names[1])
    then, now = ("nothing" if name is None else repr(name) for name in names)
    raise UserError(
        f"{path} was trained for {len(trained)} classes, {data.test.name} has {len(data.classes)}, and class {number} "
        f"is {then} there and {now} here: use the data set and class list it was trained with"
    )


def started_before(experiment: Experiment, recipe: Any, options: Options, launches: set[str]) -> Path | None:
    """The run that these processes trained before torchrun started them again (--max-restarts); rank 0 looks."""
    found = run_of_launch(options.output, experiment.folder(recipe), launches) if dist.is_main() else None
    return dist.broadcast(found)


def resumable(experiment: Experiment, recipe: Any, options: Options) -> tuple[Path, dict[str, Any]]:
    if options.resume == NEWEST:
        path = str(newest(options.output, experiment.folder(recipe), having="last.pt", lacking="record.json"))
    else:
        path = str(options.resume)
    folder, info = _open(experiment, path)
    if (folder / "record.json").exists():
        raise UserError(f"{folder} is finished: see its record.json, or start a new run")
    return folder, info


def _open(experiment: Experiment, path: str) -> tuple[Path, dict[str, Any]]:
    """`open_run`, with recipe and options of the types that the program has them in."""
    folder, info = open_run(path, experiment.name)
    file = folder / "model.json"
    recipe_class: type[Any] = experiment.recipe_class
    for part, known in (("recipe", recipe_class), ("overrides", recipe_class), ("options", Options)):
        unknown = info[part].keys() - {field.name for field in dataclasses.fields(known)}
        if unknown:
            raise UserError(f"{file} has the {part} field {min(unknown)}, which this script does not know")
        info[part] = {name: check_value(file, name, value, known) for name, value in info[part].items()}
    return folder, info


def model_info(session: Session, model: nn.Module) -> dict[str, Any]:
    """What `model.json` says: enough to resume, to evaluate, and to predict without the script."""
    recipe, data = session.recipe, session.data
    return {
        "script": session.experiment.name,
        "side": session.side,
        "demo": session.options.demo,
        "seed": session.seed,
        "overrides": session.overrides,
        "options": {name: getattr(session.options, name) for name in KEPT},
        "recipe": dataclasses.asdict(recipe),
        "weights": session.weights,
        "data": {name: getattr(data, name).fingerprint() for name in ("train", "val", "test")},
        "architecture": describe_model(model, len(data.classes), session.experiment.model_arguments(recipe)),
        "classes": data.classes,
        "preprocessing": describe_transform(data.test.transform),
    }


class Checkpoint(NamedTuple):
    """What --eval or --checkpoint names."""

    path: Path  # of a run's folder or a file
    recipe: Any  # that goes with it
    info: dict[str, Any] | None  # its `model.json`, if it is ours
    described: bool  # whether it says itself what model it is of

    def weights(self) -> dict[str, Any]:
        """What is said of them in what comes of them."""
        return {"source": str(self.path), "sha256": sha256_of(file_of(self.path))}


def find_checkpoint(experiment: Experiment, recipe: Any, options: Options, overrides: dict[str, Any]) -> Checkpoint:
    """The checkpoint that the options name, or that of the newest run."""
    name = options.eval or options.checkpoint
    path = Path(name or newest(options.output, experiment.folder(recipe), having="best.safetensors"))
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a run's folder, a .safetensors file or a released checkpoint")
    folder = path if path.is_dir() else path.parent
    if not (folder / "model.json").is_file():
        if path.is_dir():
            raise UserError(f"{path} is not the folder of a run: it has no model.json")
        said = experiment.said_by(path)
        return Checkpoint(path, experiment.recipe_of(recipe, options, said, overrides), None, bool(said))
    _, info = _open(experiment, str(folder))
    return Checkpoint(path, experiment.recipe_of(recipe, options, info["recipe"], overrides), info, True)


def trained_model(experiment: Experiment, checkpoint: Checkpoint, num_classes: int) -> nn.Module:
    """The model of the checkpoint's recipe, with its weights."""
    path, recipe, _, described = checkpoint
    description = path / "model.json" if path.is_dir() else path
    bounded = built_for(file_of(path), description) if described else nullcontext()
    model, _ = make_model(experiment, recipe, num_classes, load=False, bounded=bounded)
    dropped = load_checkpoint(model, path)
    if any(key.endswith("ema_grad") for key in dropped) and not recipe.released:
        say(f"note: {path} was written by the released GFT code: add --released to compute what that code computes")
    return model


def model_to_ask(experiment: Experiment, checkpoint: Checkpoint, options: Options) -> tuple[nn.Module, list[str], Any]:
    """The model, its class names, and the transform of what it sees."""
    path, recipe, info, _ = checkpoint
    if info is None:  # a bare file says neither class names nor preprocessing: the data set and the script do
        classes, transform = _classes_and_transform(experiment, recipe, options, path)
    else:
        classes, transform = info["classes"], restore_transform(info["preprocessing"])
    return trained_model(experiment, checkpoint, len(classes)), classes, transform


def _classes_and_transform(
    experiment: Experiment, recipe: Any, options: Options, checkpoint: Path
) -> tuple[list[str], Any]:
    try:
        data = read_data(experiment, recipe, options)
    except UserError as error:
        found = experiment.without_data(recipe, checkpoint, str(error))
        if found is None:
            raise
        return found
    check_classes(checkpoint, experiment.classes_of(checkpoint), data)
    return data.classes, data.test.transform
