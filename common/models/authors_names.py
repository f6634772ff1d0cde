"""Our parameters under the names of the authors' checkpoints, there and back.

The authors' files keep query, key and value apart; timm keeps them in one tensor, `qkv`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError

# How the authors call the parts of a qkv, in the order in which timm joins them.
PARTS = {"query": 0, "key": 1, "value": 2, "proj_q": 0, "proj_k": 1, "proj_v": 2}


class Entry(NamedTuple):
    """One tensor of the authors and where it lies: the whole of our tensor, or one of the three parts of a qkv."""

    released: str
    ours: str
    part: int | None = None


def module(ours: str, released: str) -> Iterator[Entry]:
    """The weight and the bias of one module."""
    part = PARTS.get(released.rpartition(".")[2])
    for name in ("weight", "bias"):
        yield Entry(f"{released}.{name}", f"{ours}.{name}", part)


def modules(ours: str, released: str, names: Iterable[tuple[str, str]]) -> Iterator[Entry]:
    """The weights and biases of several modules (our name, the authors' name), behind prefixes."""
    for own, theirs in names:
        yield from module(ours + own, released + theirs)


class ReleasedNames(nn.Module):
    """A model around a `base_model` whose entries have other names in the authors' files."""

    theirs: str = ""  # what one of their names begins with; "": theirs is every file that has no `base_model.`
    not_released: tuple[str, ...] = ()  # entries that their files lack

    def _layout(self) -> Iterable[Entry]:
        """List the entries of the authors' files, in their order; those that the model lacks do not count."""
        raise NotImplementedError

    def from_released(self, state_dict: Mapping[str, Tensor], source: object = "the checkpoint") -> dict[str, Tensor]:
        """Return the authors' state_dict in this model's names; one that is not theirs comes back unchanged.

        The `model.` before every key of GLSim's checkpoints is optional; what their files lack is zero. Raises
        UserError, naming `source`, where entries are missing or unknown; shapes are left to the caller.
        """
        state = _bare(state_dict)
        is_theirs = any(key.startswith(self.theirs or "base_model.") for key in state) == bool(self.theirs)
        return self._converted(state, source) if is_theirs else state

    def load_released(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the authors' state_dict in place.

        Raises UserError where an entry is missing, unknown or of another shape; the model is then unchanged.
        """
        state = _bare(state_dict)
        converted = self._converted(state, "the checkpoint")
        for key, value in self.released_state_dict().items():
            found, needed = tuple(state[key].shape), tuple(value.shape)
            if found != needed:
                raise UserError(f"the checkpoint has {key} of shape {found}, this model needs {needed}")
        self.load_state_dict(converted)

    def released_state_dict(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the state_dict, or `tensors` by our names, such as gradients, under the authors' names in their order.

        Without the `model.` of GLSim's wrapper.
        """
        own = self.state_dict() if tensors is None else tensors
        return {entry.released: _part(own[entry.ours], entry.part) for entry in self._layout() if entry.ours in own}

    def _converted(self, state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        own = self.state_dict()
        entries = [entry for entry in self._layout() if entry.ours in own]  # convolutions, for one, have no bias
        wanted = {entry.released for entry in entries}
        for names, verb in ((wanted - state.keys(), "lacks"), (state.keys() - wanted, "holds the unknown")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{source} {verb} {min(names)}{more}: it belongs to another model type")
        result = {key: torch.zeros_like(own[key]) for key in self.not_released}
        parts: dict[str, list[Tensor]] = {}
        for released, ours, part in entries:  # the parts of a qkv come in their order
            found, needed = state[released], own[ours].shape
            if part is None:
                result[ours] = found
            elif found.shape != (needed[0] // 3, *needed[1:]):
                raise UserError(
                    f"{source} has {released} of shape {tuple(found.shape)}: it belongs to another model type"
                )
            else:
                parts.setdefault(ours, []).append(found)
        return result | {ours: torch.cat(tensors) for ours, tensors in parts.items()}


def _bare(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict without the `model.` of GLSim's wrapper, where every key has it."""
    prefixed = all(key.startswith("model.") for key in state_dict)
    return {key.removeprefix("model.") if prefixed else key: value for key, value in state_dict.items()}


def _part(tensor: Tensor, part: int | None) -> Tensor:
    return tensor if part is None else tensor.chunk(3)[part].clone()
