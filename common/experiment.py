"""What a program decides and what a user may choose: the experiment, its options, its data and its model."""

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from common import dist
from common.amp import Precision
from common.data import Data, Images, prepare, write_demo
from common.data.kept import Cache
from common.data.loader import Order, Plan, shuffled
from common.data.published import published
from common.engine import Objective, cross_entropy
from common.errors import UserError, brief
from common.log import Listener, say
from common.metrics import Predictions
from common.npz import missing_npz
from common.provenance import alterations, has_batch_norm
from common.recipe import OPTIONAL_VALUE
from common.weights import BEST, explain_offline, load_weights, pretrained_report

NEWEST = "the newest"  # what --resume means without a folder


@dataclass
class Options:
    """What every script understands beside its recipe."""

    output: str = "runs"  # a run's files go to OUTPUT/<program>/<time>-<id>/
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of forward and backward
    amp_backend: Literal["native", "apex"] = "native"  # apex: where apex.amp is installed, for fp16
    accumulate: int = 1  # micro-batches an optimizer step is made of; the batch size stays, the memory falls
    deterministic: bool = False  # equal bit for bit when run again, also on a GPU; slower there
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool = False  # torch.compile the model: faster once the first minutes of compiling are over
    workers: int | None = None  # data-loading processes per training process; none: 4, or the cores if they are fewer
    cache_resized: str | None = None  # keep images as resized in this folder: the same pixels, sooner from epoch 2 on
    pin_memory: bool = True  # page-locked memory on the way to a GPU
    eval_batch_size: int | None = None  # images per process in evaluation; none: the training batch size
    log_every: int = 50  # optimizer steps between two lines of log.jsonl
    save_every: int | None = None  # optimizer steps between two saves of last.pt, beside one at each evaluation
    resume: str | None = field(default=None, metadata={OPTIONAL_VALUE: NEWEST})  # go on with an interrupted run [DIR]
    eval: str | None = None  # no training: evaluate a run's folder, our .safetensors or a released checkpoint
    predict: list[str] | None = None  # no training: name what is on these images (files, folders)
    export: str | None = None  # no training: write the model to this .onnx or .pt2 file, class names beside it
    checkpoint: str | None = None  # the model for --predict and --export, as for --eval; none: the newest run's best
    top: int = 5  # guesses an image for --predict
    out: str | None = None  # also write the predictions to a .csv or .json file
    download: bool = True  # fetch the data set where it is missing and its authors allow it
    dist_timeout: float = 1800  # seconds that a process waits for the others; longer for downloads
    skip_bad_images: int = 0  # go on past up to N unreadable images; the record lists them
    limit: int | None = None  # use only the first N images of each split: a trial that never counts as a result
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)
    demo: bool = False  # a small model on handwritten digits in this data set's layout: no download, a minute on a CPU


@dataclass(frozen=True)
class Experiment:
    """What a program decides; the fields are the arguments of `common.run.run`.

    The methods say how the 21 scripts behave. A program with a published command line overrides those that differ.
    """

    recipe_class: type
    data: Callable[[Any], Data]
    build: Callable[[Any, int], nn.Module]
    optimize: Callable[..., tuple[Optimizer, Any]]  # (recipe, parameters), unless `optimizer` is overridden
    dataset: str
    demo: dict[str, Any]
    schedule_per: str = "epoch"
    objective: Objective = cross_entropy
    clip_grad: float | None = None
    separator: str = "-"  # between the words of a flag in --help and messages; both are understood
    # Recipe fields and options that this program calls otherwise: the name here -> its own.
    names: Mapping[str, str] = field(default_factory=dict)
    has_configuration: bool = False  # whether `configure` reads files that the recipe names
    no_flags: Mapping[str, str] = field(default_factory=dict)  # names that are no flags, and what to say of them
    has_pretrained: bool = True  # whether `build` can fetch weights itself, which the word "pretrained" asks for
    places: tuple[str, ...] = ("data_root",)  # recipe fields that a resumed run may have otherwise
    may_be_zero: frozenset[str] = frozenset({"seed", "weight_decay"})  # numbers of the recipe that need not be positive

    @property
    def script(self) -> str:
        """The program's file, from the root of this repository."""
        return Path(inspect.getfile(self.recipe_class)).name

    @property
    def name(self) -> str:
        """What model.json calls the program."""
        return self.script.removesuffix(".py")

    @property
    def description(self) -> str:
        """The head of --help: the docstring of the program."""
        return inspect.getdoc(sys.modules[self.recipe_class.__module__]) or ""

    def configure(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """The recipe fields that configuration files named in `overrides`, the command line, say."""
        return {}

    def mode(self, recipe: Any, options: Options) -> Options:
        """The options with --eval where the program has other words for it."""
        return options

    def folder(self, recipe: Any) -> str:
        """Runs go to OUTPUT/<folder>/<time>-<id>/."""
        return self.name

    def row(self, recipe: Any) -> str | None:
        """The row of a paper's table that this recipe reproduces."""
        return self.name

    def data_set(self, recipe: Any) -> str:
        """The name that common.data has for the data set."""
        return self.dataset

    def demo_changes(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """The recipe fields that `--demo` changes, but for those given on the command line.

        These are `overrides`; what a demo cannot use may be taken out of them.
        """
        return self.demo

    def demo_recipe(self, recipe: Any, options: Options, overrides: dict[str, Any]) -> Any:
        weights = self.names.get("weights", "weights")
        changes: dict[str, Any] = {"data_root": str(Path(options.output) / "demo-data"), weights: "none"}
        return dataclasses.replace(recipe, **(changes | self.demo_changes(overrides) | overrides))

    def counts(self, recipe: Any) -> Mapping[str, int]:
        """Images of each split as published, as far as that is known."""
        return published(self.data_set(recipe)).counts

    def prepare_data(self, recipe: Any, options: Options) -> None:
        """Fetches the data set where it is missing, or writes the demo's."""
        if options.demo:
            write_demo(self.data_set(recipe), recipe.data_root)
        else:
            prepare(self.data_set(recipe), recipe.data_root, download=options.download)

    def fetch_weights(self, recipe: Any) -> None:
        """Downloads starting weights that are a file of `recipe.weights`, where they are missing."""

    def global_batch_size(self, recipe: Any) -> int:
        """Images per optimizer step, over all processes."""
        return int(recipe.batch_size)

    def steps(self, recipe: Any, plan: Plan) -> int:
        """Optimizer steps of the whole training."""
        return int(getattr(recipe, "steps", None) or recipe.epochs * plan.steps_per_epoch)

    def evaluate_every(self, recipe: Any, plan: Plan) -> int:
        """Optimizer steps between two evaluations."""
        return getattr(recipe, "evaluate_every", None) or plan.steps_per_epoch

    def optimizer(self, recipe: Any, model: nn.Module, plan: Plan) -> tuple[Optimizer, Any]:
        """The optimizer and its schedule."""
        return self.optimize(recipe, [parameter for parameter in model.parameters() if parameter.requires_grad])

    def objective_of(self, recipe: Any, num_classes: int) -> Objective:
        """What is minimised."""
        return self.objective

    def options(self, recipe: Any, options: Options, device: torch.device, chosen: Collection[str]) -> Options:
        """The options with what the recipe says of them; `chosen` of both were given on this command line.

        Options in `names` have no flag of their own.
        """
        return options

    def precision(self, recipe: Any, options: Options, device: torch.device) -> Precision:
        return Precision(options.precision, device, options.amp_backend)

    def order(self, recipe: Any, count: int, seed: int) -> Order:
        """The order of the training images."""
        return shuffled(count, seed)

    def max_norm(self, recipe: Any) -> float | None:
        """Gradients are clipped to this norm; none: they are not."""
        return self.clip_grad

    def alterations(self, recipe: Any, trained: bool) -> list[str]:
        """How the recipe differs from the published one (`trained`: in training too): such runs never count."""
        return alterations(recipe)

    def advice(self, recipe: Any, options: Options, device: torch.device) -> list[str]:
        """Sentences to be said before training."""
        return []

    def said_by(self, checkpoint: Path) -> dict[str, Any]:
        """The recipe fields that a released checkpoint says."""
        return {}

    def classes_of(self, checkpoint: Path) -> list[str] | None:
        """The class names that a released checkpoint says, where it says any."""
        return None

    def recipe_of(self, recipe: Any, options: Options, said: dict[str, Any], overrides: dict[str, Any]) -> Any:
        """The recipe that goes with a checkpoint or a run, which has `said` these fields."""
        return dataclasses.replace(recipe, **(said | overrides))

    def model_arguments(self, recipe: Any) -> dict[str, Any]:
        """What a timm model is built with, beside the number of classes."""
        arguments: dict[str, Any] = recipe.model_kwargs
        return arguments

    def save_memory(self, recipe: Any, options: Options) -> str:
        """Flags with which less memory is needed, and the experiment stays the same."""
        batch = self.global_batch_size(recipe)
        share = batch // dist.size()
        more = next((k for k in range(options.accumulate + 1, share + 1) if share % k == 0), share)
        return f"{self.flag('accumulate')} {more} (the batch of {batch} stays)"

    def evaluated(self, session: Any, model: nn.Module, predictions: Predictions) -> dict[str, Any]:
        """More entries for the record of --eval, and files; called on every process."""
        return {}

    def without_data(self, recipe: Any, checkpoint: Path, why: str) -> tuple[list[str], Any] | None:
        """Class names and test transform for predictions of a bare checkpoint whose data set is not at hand."""
        return None

    def listener(self, session: Any, step: int) -> Listener:
        """What else follows the session's training that goes on from `step`; made on rank 0 alone."""
        return Listener()

    def flag(self, name: str) -> str:
        """`accumulate` -> `--accumulate`, or the program's own word for it."""
        return "--" + self.names.get(name, name).replace("_", self.separator)

    def given(self, recipe: Any) -> dict[str, Any]:
        """The recipe fields without a default, which every command line has to name."""
        fields = dataclasses.fields(self.recipe_class)
        bare = [f for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        return {f.name: getattr(recipe, f.name) for f in bare}

    def with_weights(self, recipe: Any, source: str) -> Any:
        return dataclasses.replace(recipe, **{self.names.get("weights", "weights"): source})


def check_numbers(experiment: Experiment, recipe: Any, options: Options) -> None:
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


def read_data(experiment: Experiment, recipe: Any, options: Options) -> Data:
    """The splits of the experiment, fetched or written first where they are missing, cut where --limit says so."""
    with dist.main_first():
        experiment.prepare_data(recipe, options)
        data = experiment.data(recipe)
    if options.limit is None:
        return data

    def cut(images: Images) -> Images:
        return images.subset(range(min(options.limit or 0, len(images))))

    return Data(cut(data.train), cut(data.val), cut(data.test))


def keep_resized(experiment: Experiment, data: Data, options: Options) -> Data:
    """The same images, brought as --cache-resized says."""
    if options.cache_resized is None:
        return data
    with dist.main_first():
        cache = Cache(options.cache_resized, experiment.flag("cache_resized"))
        if dist.is_main():
            say(cache.plan(data))
    return cache.of_all(data)


def make_model(
    experiment: Experiment,
    recipe: Any,
    num_classes: int,
    load: bool,
    bounded: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 - it keeps nothing
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its starting weights, or (`load` false) bare for a checkpoint to fill; and what was loaded.

    It is built inside of `bounded`, with nothing else.
    """
    source = recipe.weights if load else "none"
    words = ("pretrained", "none") if experiment.has_pretrained else ("none",)
    if load:
        with dist.main_first():
            experiment.fetch_weights(recipe)
    if source not in words and not (Path(source).is_file() or (Path(source) / BEST).is_file()):
        if source.endswith(".npz"):
            raise missing_npz(source, recipe.model)
        raise UserError(
            f"{experiment.flag('weights')} {source}: expected {', '.join(words)}, or an existing .npz, .safetensors, "
            ".pth or .bin file, or a run's folder"
        )
    pretrained = source == "pretrained"
    offline = explain_offline(recipe.model, pretrained, experiment.flag("weights"))
    # Rank 0 downloads first, the others find the file in the cache.
    with dist.main_first(), offline, _explain_kwargs(recipe), bounded:
        bare = recipe if pretrained else experiment.with_weights(recipe, "none")
        model = experiment.build(bare, num_classes)
    if pretrained:
        return model, pretrained_report(model)
    if source == "none":
        return model, {"source": "none", "sha256": None}
    return model, load_weights(model, source)


@contextmanager
def _explain_kwargs(recipe: Any) -> Iterator[None]:
    """Arguments that the user gave and the model does not take."""
    try:
        yield
    except TypeError as error:
        if not recipe.model_kwargs:
            raise
        raise UserError(f"--model-kwargs {recipe.model_kwargs} do not fit {recipe.model} ({error})") from error


def checkpoint_gradients(model: nn.Module, advice: str) -> None:
    """Turns --grad-checkpointing on; UserError where the model has no such thing, or where it would change it."""
    if has_batch_norm(model):  # recomputation would update its statistics twice
        raise UserError(
            f"--grad-checkpointing: {type(model).__name__} has BatchNorm, which it would change; use {advice}"
        )
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError(f"--grad-checkpointing: {type(model).__name__} does not support it; use {advice}")
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except AssertionError as error:  # timm's way to say no
        raise UserError(f"--grad-checkpointing: {type(model).__name__} does not support it; use {advice}") from error
