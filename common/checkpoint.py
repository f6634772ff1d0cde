"""The two checkpoints of a run: the resume state `last.pt`, and the model for others `best.safetensors`."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from common import pickles
from common.errors import UserError, brief
from common.files import write_atomically


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Saves `state` (tensors, numbers, strings, lists, dicts) so that `load_state` reads it without unpickling code."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_state(path: Path) -> dict[str, Any]:
    """The dictionary of `save_state`, on the CPU; UserError where the file is missing, cut short or anything else."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: this run saved no state to resume from; start it anew")
    try:
        state = pickles.load(path)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): it is damaged, or holds objects that could "
            "run code, which are never unpickled; restore it, or start a new run"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not the state of a run: start a new run")
    return state


def check_like(found: Any, own: Any, name: str) -> None:
    """ValueError, naming the place, unless `found`, from a file, is made as `own`: types, shapes, lengths of numbers.

    Entries that one of them lacks are left alone, as another version of a library may have them; so is what `own` has
    as None.
    """
    kind = type(own)
    if isinstance(own, Tensor):
        fits = isinstance(found, Tensor) and (found.shape, found.dtype) == (own.shape, own.dtype)
    elif isinstance(own, dict):
        fits = isinstance(found, dict)
        for key in own if fits else ():
            if key in found:
                check_like(found[key], own[key], f"{name}.{key}")
    elif isinstance(own, (list, tuple)):
        fits = isinstance(found, (list, tuple)) and (len(found) == len(own) or not any(map(_is_number, own)))
        for number, (one, other) in enumerate(zip(found, own, strict=False) if fits else ()):
            check_like(one, other, f"{name}[{number}]")
    else:
        fits = own is None or type(found) is kind or (kind is float and type(found) is int)
    if not fits:
        raise ValueError(f"{name} is no {kind.__name__} as this run has it")


def check_optimizer_state(found: Any, parameters: list[Tensor]) -> None:
    """ValueError unless `found`, the "state" of an optimizer, has numbers, and tensors no larger than parameters."""
    check_like(found, {}, "optimizer.state")
    for index, entry in found.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(entry, dict):
            raise ValueError(f"optimizer.state has an entry {brief(index)} for {len(parameters)} parameters")
        for key, value in entry.items():
            small = isinstance(value, Tensor) and value.numel() <= max(1, parameters[index].numel())
            if not small and not _is_number(value) and value is not None:
                raise ValueError(
                    f"optimizer.state[{index}].{brief(key)} is neither a number nor one for each parameter"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def save_weights(path: Path, weights: dict[str, Tensor], note: dict[str, str]) -> None:
    """A state_dict as .safetensors; `note` goes into the file's header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # Not save_file: it makes a file that only its owner may read.
    write_atomically(path, lambda file: file.write(save(tensors, note)))
