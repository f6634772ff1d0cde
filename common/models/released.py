"""Renaming between a timm ViT's parameters and those of released checkpoints, there and back.

A released file keeps query, key and value apart; timm keeps them in one tensor, `qkv`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

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


def bare(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict without the `model.` of GLSim's wrapper, where every key has it."""
    prefixed = all(key.startswith("model.") for key in state_dict)
    return {key.removeprefix("model.") if prefixed else key: value for key, value in state_dict.items()}


class ReleasedNames(nn.Module):
    """A model around a `base_model` whose entries have other names in the authors' files."""

    theirs: str = ""  # what one of their names begins with; "": theirs is every file that has no `base_model.`
    not_released: tuple[str, ...] = ()  # entries that their files lack

    def _layout(self) -> Iterable[Entry]:
        """List the entries of the authors' files, in their order."""
        raise NotImplementedError

    def from_released(self, state_dict: Mapping[str, Tensor], source: object = "the checkpoint") -> dict[str, Tensor]:
        """Return the authors' state_dict in this model's names; one that is not theirs comes back unchanged.

        The `model.` before every key of GLSim's checkpoints is optional; what their files lack is zero. Raises
        UserError, naming `source`, where entries are missing or unknown; shapes are left to the caller.
        """
        state_dict = bare(state_dict)
        if any(key.startswith(self.theirs or "base_model.") for key in state_dict) != bool(self.theirs):
            return state_dict
        return self._converted(state_dict, source)

    def load_released(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the authors' state_dict in place.

        Raises UserError where an entry is missing, unknown or of another shape; the model is then unchanged.
        """
        state_dict = bare(state_dict)
        converted = self._converted(state_dict, "the checkpoint")
        check_shapes(state_dict, self.released_state_dict(), "the checkpoint")
        self.load_state_dict(converted)

    def _converted(self, state_dict: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        own = self.state_dict()
        lacking = {key: torch.zeros_like(own[key]) for key in self.not_released}
        return from_released(state_dict, own, list(self._layout()), source) | lacking

    def released_state_dict(self) -> dict[str, Tensor]:
        """Return the state_dict under the authors' names, in their order, without the `model.` of GLSim's wrapper."""
        return to_released(self.state_dict(), self._layout())


def _part(tensor: Tensor, part: int | None) -> Tensor:
    return tensor if part is None else tensor.chunk(3)[part].clone()


def _check_names(wanted: set[str], found: Iterable[str], source: object) -> None:
    found = set(found)
    for names, verb in ((wanted - found, "lacks"), (found - wanted, "holds the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source} {verb} {min(names)}{more}: it belongs to another model type")
