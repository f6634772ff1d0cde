"""The two checkpoints of a run: the resume state `last.pt`, and the model for others, `best.safetensors`."""

import pickle
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError
from common.files import write_atomically
from common.train import distributed
from common.train.log import say
from common.train.precision import Precision
from common.train.run_folder import Run

FORMAT = 4  # raised where last.pt changes, or where the same seed comes to mean other random numbers


@dataclass
class State:
    """What changes while a model is trained: last.pt holds all of it."""

    model: nn.Module  # not wrapped for several processes
    optimizer: Optimizer
    scheduler: Any  # torch's, stepped by epoch or by step; or timm's, which is told both
    precision: Precision
    step: int = 0  # optimizer steps done
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry an evaluation
    best: dict[str, Any] | None = None  # the entry with most correct images; the earliest of equals
    skipped: int = 0  # steps, for a gradient that overflowed in fp16
    logged: list[float] = field(default_factory=lambda: [0.0] * 3)  # loss, correct, images since the last log line
    epoch: list[float] = field(default_factory=lambda: [0.0] * 3)  # the same since the last evaluation
    trained_images: int = 0  # in `trained_seconds`, which are of training alone
    trained_seconds: float = 0.0
    wall_seconds: float = 0.0
    sums: Tensor = field(init=False)  # this process's share of `logged`, on the device, and skipped steps
    clock: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        self.sums = torch.zeros(4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def make_state(run: Run, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> State:
    """The state of a new run, or that of last.pt."""
    model, optimizer = run.precision.prepare(model, optimizer)
    state = State(model, optimizer, scheduler, run.precision)
    if run.resumed:
        load(run, state)
    return state


COUNTED = ("step", "history", "best", "skipped", "logged", "epoch", "trained_images", "trained_seconds", "wall_seconds")


def read_sums(state: State) -> None:
    """Adds what all processes have summed up on their devices: nothing else in training waits for a GPU."""
    parts = distributed.gather(state.sums.tolist())
    totals = [sum(column) for column in zip(*parts, strict=True)]
    state.sums.zero_()
    state.logged = [old + new for old, new in zip(state.logged, totals, strict=False)]
    state.skipped += round(totals[3] / len(parts))


def save(run: Run, state: State) -> None:
    """Writes last.pt. Every process calls it: each brings the state that it has to itself (GFT's moving average).

    UserError, and the last good checkpoint stays, where the weights are not finite.
    """
    run.log.flush()
    now = time.perf_counter()
    state.wall_seconds, state.clock = state.wall_seconds + now - state.clock, now
    read_sums(state)
    if not all(tensor.isfinite().all() for tensor in state.model.state_dict().values()):
        raise UserError(
            f"training has diverged: weights are not finite at step {state.step}; lower the learning rate. "
            f"{run.folder / 'last.pt'} is that of an earlier step"
        )
    own: dict[str, Tensor] = getattr(state.model, "training_state", dict)()
    content = {
        "format": FORMAT,
        "processes": distributed.size(),
        "batch_size": run.batch_size,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict() if state.scheduler is not None else {},
        "precision": state.precision.state_dict(),
        "of_each_process": distributed.gather({name: value.cpu() for name, value in own.items()}),
        **{name: getattr(state, name) for name in COUNTED},
    }
    if distributed.is_main():
        write_atomically(run.folder / "last.pt", lambda file: torch.save(content, file))


def load(run: Run, state: State) -> None:
    """Goes on from last.pt. UserError where it is damaged, or of another model, batch or number of processes."""
    path = run.folder / "last.pt"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): restore it, or start a new run") from error
    if content.get("format") != FORMAT:
        raise UserError(f"{path} was saved by another version of this program: start a new run")
    processes, own = content["processes"], content["of_each_process"]
    if content["batch_size"] != run.batch_size or (processes != distributed.size() and any(own)):
        raise UserError(
            f"{path} was saved by {processes} processes with a batch of {content['batch_size']} in all: resume with as "
            f"many, not with {distributed.size()}"
        )
    try:
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit the model of this recipe ({' '.join(str(error).split())})") from error
    for parameter, entry in state.optimizer.state.items():
        for name, value in entry.items():  # fused kernels take for granted that both lie in memory alike
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    if state.scheduler is not None:
        state.scheduler.load_state_dict(content["scheduler"])
    state.precision.load_state_dict(content["precision"])
    if any(own):
        mine = {name: value.to(run.device) for name, value in own[distributed.rank()].items()}
        state.model.load_training_state(mine)  # type: ignore[operator]
    for name in COUNTED:
        setattr(state, name, content[name])
    say(f"resumed at step {state.step} from {path}")


def save_best(run: Run, state: State) -> None:
    """best.safetensors, with the step and the accuracy in its header."""
    if not distributed.is_main() or state.best is None:
        return
    note = {"script": run.program, "step": str(state.best["step"]), "val_top1": f"{state.best['val']['top1']:.6f}"}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.model.state_dict().items()}
    write_atomically(run.folder / "best.safetensors", lambda file: file.write(safetensors_bytes(tensors, note)))
