"""What a script decides and what a user may choose: the experiment, its options, its data and its model."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from common import dist
from common.data import Data, Images, prepare, write_demo
from common.engine import Objective
from common.errors import UserError
from common.provenance import has_batch_norm
from common.recipe import OPTIONAL_VALUE
from common.weights import explain_offline, load_weights, pretrained_report

NEWEST = "the newest"  # what --resume means without a folder


@dataclass
class Options:
    """What every script understands beside its recipe."""

    output: str = "runs"  # a run's files go to OUTPUT/<script>/<time>-<id>/
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of forward and backward
    amp_backend: Literal["native", "apex"] = "native"  # apex: where apex.amp is installed, for fp16
    accumulate: int = 1  # micro-batches an optimizer step is made of; the batch size stays, the memory falls
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
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
    dist_timeout: float = 1800  # seconds that a process waits for the others; longer for downloads
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


def read_data(experiment: Experiment, recipe: Any, options: Options) -> Data:
    """The splits of the experiment, fetched or written first where they are missing, cut where --limit says so."""
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


def make_model(experiment: Experiment, recipe: Any, num_classes: int, load: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its starting weights, or (`load` false) bare for a checkpoint to fill; and what was loaded."""
    source = recipe.weights if load else "none"
    if source not in ("pretrained", "none") and not Path(source).is_file():
        raise UserError(
            f"--weights {source}: expected pretrained, none, or an existing .npz, .safetensors or .pth file"
        )
    pretrained = source == "pretrained"
    # Rank 0 downloads first, the others find the file in the cache.
    with dist.main_first(), explain_offline(recipe.model, pretrained), _explain_kwargs(recipe):
        model = experiment.build(
            dataclasses.replace(recipe, weights="pretrained" if pretrained else "none"), num_classes
        )
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


def checkpoint_gradients(model: nn.Module) -> None:
    """Turns --grad-checkpointing on; UserError where the model has no such thing, or where it would change it."""
    if has_batch_norm(model):  # recomputation would update its statistics twice
        raise UserError(
            f"--grad-checkpointing: {type(model).__name__} has BatchNorm, which it would change; use --accumulate"
        )
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError(f"--grad-checkpointing: {type(model).__name__} does not support it; use --accumulate")
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except AssertionError as error:  # timm's way to say no
        raise UserError(
            f"--grad-checkpointing: {type(model).__name__} does not support it; use --accumulate"
        ) from error
