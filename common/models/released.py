"""Renaming between a timm ViT's parameters and those of released checkpoints, there and back.

A released file keeps query, key and value apart; timm keeps them in one tensor, `qkv`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError

# How released files call the parts of a qkv, in the order in which timm joins them.
PARTS = {"query": 0, "key": 1, "value": 2, "proj_q": 0, "proj_k": 1, "proj_v": 2}


class Entry(NamedTuple):
    """One released tensor and where it lies: the whole of our tensor, or one of the three parts of a qkv."""

    released: str
    ours: str
    part: int | None = None


def module(ours: str, released: str) -> Iterator[Entry]:
    """The weight and the bias of one module."""
    part = PARTS.get(released.rpartition(".")[2])
    for name in ("weight", "bias"):
        yield Entry(f"{released}.{name}", f"{ours}.{name}", part)


def modules(ours: str, released: str, names: Iterable[tuple[str, str]]) -> Iterator[Entry]:
    """The weights and biases of several modules (our name, released name), behind prefixes."""
    for own, theirs in names:
        yield from module(ours + own, released + theirs)


def to_released(state_dict: Mapping[str, Tensor], entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Return a state_dict under its released names, in the order of `entries`."""
    return {
        entry.released: _part(state_dict[entry.ours], entry.part)
        for entry in entries
        if entry.ours in state_dict  # convolutions, for one, have no bias
    }


def from_released(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], entries: Sequence[Entry], source: object
) -> dict[str, Tensor]:
    """Return a released state_dict under the names of the model whose state_dict is `own`.

    Raises UserError, naming `source`, where entries are missing or unknown, or a part of a qkv has another shape than
    the model's; other shapes are left to the caller.
    """
    entries = [entry for entry in entries if entry.ours in own]
    _check_names({entry.released for entry in entries}, state_dict.keys(), source)
    result: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for released, ours, part in entries:  # the parts of a qkv come in their order
        found, needed = state_dict[released].shape, own[ours].shape
        if part is None:
            result[ours] = state_dict[released]
        elif found != (needed[0] // 3, *needed[1:]):
            raise UserError(f"{source} has {released} of shape {tuple(found)}: it belongs to another model type")
        else:
            parts.setdefault(ours, []).append(state_dict[released])
    return result | {ours: torch.cat(tensors) for ours, tensors in parts.items()}


def check_shapes(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], source: object) -> None:
    """UserError, naming `source`, for the first tensor whose shape is not that of the same name in `own`."""
    for key, value in own.items():
        if state_dict[key].shape != value.shape:
            found, needed = tuple(state_dict[key].shape), tuple(value.shape)
            raise UserError(f"{source} has {key} of shape {found}, this model needs {needed}")


def _part(tensor: Tensor, part: int | None) -> Tensor:
    return tensor if part is None else tensor.chunk(3)[part].clone()


def _check_names(wanted: set[str], found: Iterable[str], source: object) -> None:
    found = set(found)
    for names, verb in ((wanted - found, "lacks"), (found - wanted, "holds the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source} {verb} {min(names)}{more}: it belongs to another model type")
