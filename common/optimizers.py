"""Optimizers in PyTorch's fused form, and their states, in whatever form and memory layout these were saved.

One kernel updates all parameters, and reads on the device whether it is to skip: nothing waits for a GPU. It rounds
otherwise than the loop over parameters does.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

KINDS = (SGD, Adam, AdamW)  # those with a fused form on every device of DEVICES since torch 2.6
DEVICES = ("cpu", "cuda")
HOW = ("fused", "foreach", "capturable")  # entries of a parameter group that say how, not what, is computed


def fuse(optimizer: Optimizer) -> None:
    """Turns the fused form on, where the optimizer has one for its parameters; others stay as they are.

    As if it had been built with `fused=True`, but for the momentum of SGD, which stands there from the start: torch
    makes it in the first update, leaves it unset where that one is skipped, and refuses a group of which some
    parameters have it and others, unfrozen later, do not.
    """
    groups = optimizer.param_groups
    if type(optimizer) not in KINDS or any(group["differentiable"] or group.get("dampening") for group in groups):
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not all(parameter.is_floating_point() and parameter.device.type in DEVICES for parameter in parameters):
        return
    for group in groups:
        group["fused"], group["foreach"] = True, False
    setattr(optimizer, "_step_supports_amp_scaling", True)  # noqa: B010 - no declared attribute
    for parameter, group in _with_groups(optimizer):
        if group.get("momentum") and optimizer.state[parameter].get("momentum_buffer") is None:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """The state for a checkpoint, which does not say in what form it was computed."""
    state = optimizer.state_dict()
    groups = [{name: value for name, value in group.items() if name not in HOW} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Goes on from a state that was saved fused or not: in the form that the optimizer has now.

    Tensors come to lie in memory as their parameters do, which fused kernels take for granted. ValueError where there
    is an entry for a parameter that no group names, which torch keeps.
    """
    own = [{name: group[name] for name in HOW if name in group} for group in optimizer.param_groups]
    own += [{}] * (len(state["param_groups"]) - len(own))  # a state of another optimizer: torch says so itself
    groups = [group | how for group, how in zip(state["param_groups"], own, strict=False)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    unnamed = [key for key in optimizer.state if not isinstance(key, Tensor)]
    if unnamed:
        raise ValueError(f"optimizer.state has an entry {unnamed[0]} that no parameter group names")
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    if any(group.get("fused") for group in optimizer.param_groups):
        fuse(optimizer)  # a state from before the first update has no momentum


def _with_groups(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group
