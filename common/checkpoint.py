"""The two checkpoints of a run: the resume state `last.pt`, and the model for others `best.safetensors`."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from common.errors import UserError
from common.files import write_atomically


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Saves `state` (tensors, numbers, strings, lists, dicts) so that `load_state` reads it without unpickling code."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_state(path: Path) -> dict[str, Any]:
    """The dictionary of `save_state`, on the CPU; UserError where the file is missing, cut short or anything else."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: this run saved no state to resume from; start it anew")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): it is damaged, or holds objects that could "
            "run code, which are never unpickled; restore it, or start a new run"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not the state of a run: start a new run")
    return state


def save_weights(path: Path, weights: dict[str, Tensor], note: dict[str, str]) -> None:
    """A state_dict as .safetensors; `note` goes into the file's header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # Not save_file: it makes a file that only its owner may read.
    write_atomically(path, lambda file: file.write(save(tensors, note)))
