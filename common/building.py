"""Models that a file from anywhere describes: built no larger than the weights that are to fill them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from common.errors import UserError

FREE_NUMBERS = 1 << 20  # that a model may make beside its parameters: tables of positions, masks


@contextmanager
def built_for(weights: Path, description: Path) -> Iterator[None]:
    """A model is built inside, as the file `description` says, which the file `weights` is to fill.

    UserError where that is not possible, and as soon as the model gets more numbers than the weights have bytes.
    """
    limit = weights.stat().st_size + FREE_NUMBERS
    parameters = 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters
        parameters += 0 if parameter is None else parameter.numel()
        _check(parameters, limit)

    hook = register_module_parameter_registration_hook(count)
    try:
        with _SmallTensors(limit):
            yield
    except UserError:
        raise
    except Exception as error:  # a description that was edited can make the libraries raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{description} describes no model that can be built here ({reason})") from error
    finally:
        hook.remove()


class _SmallTensors(TorchFunctionMode):
    """Refuses to make a tensor of more than so many numbers, before any memory is taken."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            numbers = [n for value in (*args, *kwargs.values()) for n in (value if _is_shape(value) else (value,))]
            sizes = [abs(n) for n in numbers if type(n) is int]
            _check(max(math.prod(sizes), *sizes, 0), self.limit)
        return function(*args, **kwargs)


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _check(count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"it needs {count:,} numbers or more, and its weights have {limit - FREE_NUMBERS:,} bytes")
