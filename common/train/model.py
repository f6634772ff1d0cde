"""A model with its weights on its device: memory format, gradient checkpointing, torch.compile."""

import functools
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from common.data.images import Data
from common.errors import UserError
from common.train import distributed
from common.train.log import say
from common.train.run_folder import Checkpoint, Run
from common.weights import (
    BEST,
    explain_offline,
    file_of,
    load_checkpoint,
    load_weights,
    missing_npz,
    pretrained_report,
    sha256_of,
)


def starting_model(run: Run, build: Callable[[], nn.Module], source: str, fetches: bool = True) -> nn.Module:
    """The model that `build` gives, with its starting weights; run.weights says where they are from.

    `source` is none, pretrained (which `build` fetches itself, where `fetches`), an .npz, .safetensors, .pth or .bin
    file, or a run's folder.
    """
    source = "none" if run.resumed else source  # its weights are in last.pt
    words = ("pretrained", "none") if fetches else ("none",)
    if source not in words and not (Path(source).is_file() or (Path(source) / BEST).is_file()):
        if source.endswith(".npz"):
            raise missing_npz(source, run.recipe.model)
        raise UserError(
            f"{run.flag('weights')} {source}: expected {', '.join(words)}, or an existing .npz, .safetensors, .pth or "
            ".bin file, or a run's folder"
        )
    # Rank 0 downloads first, the others find the file in the cache.
    with distributed.main_first(), explain_offline(run.recipe.model, source == "pretrained", run.flag("weights")):
        try:
            model = build()
        except TypeError as error:
            if not run.recipe.model_kwargs:
                raise
            arguments = f"{run.flag('model_kwargs')} {run.recipe.model_kwargs}"
            raise UserError(f"{arguments} do not fit {run.recipe.model} ({error})") from error
    if source == "pretrained":
        run.weights = pretrained_report(model)
    elif source != "none":
        run.weights = load_weights(model, source)
    elif not run.weights:
        run.weights = {"source": "none", "sha256": None}
    return model


def trained_model(run: Run, build: Callable[[int], nn.Module], checkpoint: Checkpoint, classes: list[str]) -> nn.Module:
    """The model of the checkpoint's recipe, with its weights, which run.weights names."""
    model = build(len(classes))
    run.weights = {"source": str(checkpoint.path), "sha256": sha256_of(file_of(checkpoint.path))}
    dropped = load_checkpoint(model, checkpoint.path)
    if any(key.endswith("ema_grad") for key in dropped) and not run.recipe.released:
        say(
            f"note: {checkpoint.path} was written by the released GFT code: --released computes what that code computes"
        )
    return model


def check_classes(checkpoint: Checkpoint, data: Data, said: list[str] | None = None) -> None:
    """UserError where a checkpoint was trained for other classes than the data have; `said`: those in a bare file."""
    path, data_set, classes = checkpoint.path, data.test.name, data.classes
    trained = checkpoint.info.get("classes", said)
    if trained is None or trained == classes:
        return
    both = enumerate(zip_longest(trained, classes))
    number, names = next((number, names) for number, names in both if names[0] != names[1])
    then, now = ("nothing" if name is None else repr(name) for name in names)
    raise UserError(
        f"{path} was trained for {len(trained)} classes, {data_set} has {len(classes)}, and class {number} is {then} "
        f"there and {now} here: use the data set and class list it was trained with"
    )


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """How images and filters lie in memory: channels last where a GPU has to convolve, as its tensor cores read them.

    A ViT, whose patch embedding is its only convolution, has nothing of it; nor has a CPU: ResNetV2 is slower so.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return torch.channels_last if device.type == "cuda" and convolutions > 1 else torch.contiguous_format


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def place(run: Run, model: nn.Module) -> nn.Module:
    """The model, which it changes, on the device: on several GPUs with BatchNorm over all of them, where every process
    would normalise by its own share of the batch; with --grad-checkpointing and --compile as asked.
    """
    if distributed.size() > 1 and run.device.type == "cuda":
        model = convert_sync_batchnorm(model)
    if run.options.grad_checkpointing:
        checkpoint_gradients(model, run.flag("grad_checkpointing"))
    model = model.to(run.device, memory_format=memory_format(model, run.device))  # type: ignore[call-overload]
    if run.options.compile:
        compile_model(model)
    return model


def compile_model(model: nn.Module, **how: Any) -> None:
    """Has the model's forward pass, and with it the backward pass, compiled when it is first called.

    Its names and hooks stay as they are. One graph serves every batch size but 1, so that the last batch of an epoch
    costs no compilation. `how` goes to torch.compile.
    """
    plain = type(model).forward
    forward = torch.compile(plain, **how)

    @functools.wraps(plain)
    def of_any_batch(model: nn.Module, *inputs: Any, **more: Any) -> Any:
        for value in (*inputs, *more.values()):
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return forward(model, *inputs, **more)

    model.forward = MethodType(of_any_batch, model)


def checkpoint_gradients(model: nn.Module, flag: str) -> None:
    """UserError where the model has no such thing, or where it would change it."""
    if has_batch_norm(model):
        raise UserError(f"{flag}: {type(model).__name__} has BatchNorm, whose statistics it would count twice")
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:  # the latter is timm's way to say no
        raise UserError(f"{flag}: {type(model).__name__} does not support it") from error
