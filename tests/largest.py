"""The largest tensor that a computation makes: what must never be formed is seen by its size."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def largest(compute: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """Return the number of elements of the largest tensor that `compute(*inputs)` makes."""
    with Largest() as seen:
        compute(*inputs)
    return seen.size
