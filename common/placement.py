"""How a model lies in memory, on which device, and torch.compile: what makes it fast.

Results stay equal but for rounding, those of training with dropout excepted: compiled code draws other random numbers.
"""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """How images and filters lie in memory: channels last where a GPU has to convolve, as its tensor cores read them.

    A ViT, whose patch embedding is its only convolution, has nothing of it; nor has a CPU: ResNetV2 is slower so.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return torch.channels_last if device.type == "cuda" and convolutions > 1 else torch.contiguous_format


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, which it changes, on the device and in its memory format there."""
    return model.to(device, memory_format=memory_format(model, device))  # type: ignore[call-overload, no-any-return]


def compile_model(model: nn.Module, **how: Any) -> None:
    """Has the model's forward pass, and with it the backward pass, compiled when it is first called.

    The model itself, its names and its hooks stay as they are; a deep copy is compiled too, one that was saved and
    loaded is not. One graph serves every batch size but 1, so that the last batch of an epoch costs no compilation, and
    takes no other kernels. `how` goes to torch.compile.
    """
    plain = type(model).forward
    forward = torch.compile(plain, **how)

    @functools.wraps(plain)
    def of_any_batch(model: nn.Module, *inputs: Any, **more: Any) -> Any:
        for value in (*inputs, *more.values()):
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return forward(model, *inputs, **more)

    model.forward = MethodType(of_any_batch, model)  # of a copy, the copy's


@contextmanager
def compilation_explained(flag: str) -> Iterator[None]:
    """UserError, naming the flag, where torch.compile lacks a compiler on this machine or cannot compile the model."""
    from torch._dynamo.exc import TorchDynamoException  # here: it takes seconds

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).partition("\n\n")[0].split())  # the rest is advice for developers of torch
        lacking = re.search(r"\bC(\+\+)? compiler|triton installation", reason, re.IGNORECASE)
        remedy = "install a C++ compiler (with a GPU also Triton), or " if lacking else ""
        raise UserError(
            f"{flag}: torch {torch.__version__} cannot compile the model here ({reason}): {remedy}leave it out"
        ) from error
