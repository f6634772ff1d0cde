"""Processes: how they were launched, and collectives that are the identity when there is only one.

Understood: plain `python`, `torchrun`, `python -m torch.distributed.launch` (RANK, WORLD_SIZE, LOCAL_RANK) and `srun`
(SLURM_*). Collectives on Python objects and CPU tensors use gloo, gradients on CUDA use NCCL, so a host-side decision
never waits for the GPU.
"""

import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.rendezvous import rendezvous

from common.errors import UserError
from common.lost import RollCall, is_loss

T = TypeVar("T")
DOWNLOAD_TIME = timedelta(days=2)  # how long others wait for rank 0 in `main_first`
_roll_call: RollCall | None = None  # of the present group
_patient: Any = None  # a group of its own for `main_first`, for its time-out: a download takes longer than a collective


@dataclass(frozen=True)
class Launch:
    """Where this process stands: `rank` of `size`, `local_rank` on its machine, and how it was started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "python"


def detect(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's variables; raises UserError where they are incomplete or contradict each other."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise UserError(
                f"the environment sets RANK or WORLD_SIZE but not {', '.join(missing)}: start with torchrun, "
                "or unset them for a single process"
            )
        names, launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK" if "LOCAL_RANK" in environ else "RANK"), "torchrun"
    elif environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # set by srun alone, not inside a bare sbatch script
        names, launcher = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), "slurm"
    else:
        return Launch()
    rank, size, local_rank = (_number(environ, name) for name in names)
    if not 0 <= local_rank <= rank < size:
        values = ", ".join(f"{name}={environ[name]}" for name in dict.fromkeys(names))
        raise UserError(f"{values} contradict each other: start with torchrun or srun, and set none of them yourself")
    return Launch(rank, size, local_rank, launcher)


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise UserError(
            f"the environment variable {name} is {environ.get(name, 'missing')!r}, expected a whole number: "
            "start with torchrun or srun, which set it"
        ) from None


def _slurm_rendezvous() -> None:
    """MASTER_ADDR and MASTER_PORT from SLURM's own variables: the first host of the step, a port from the job id."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "localhost")
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    port = 20000 + _number({"SLURM_JOB_ID": "0", **os.environ}, "SLURM_JOB_ID") % 12000  # below Linux's own choices
    os.environ.setdefault("MASTER_PORT", str(port))


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],cpu1` -> `gpu03`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]+\])+", nodelist)  # up to the first comma outside brackets
    if first is None:
        raise UserError(f"SLURM_NODELIST={nodelist!r} names no host: set MASTER_ADDR and MASTER_PORT yourself")
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first[0])


def choose_device(name: str, launch: Launch) -> torch.device:
    """`auto` -> this process's CUDA device, else MPS, else the CPU; a device that is not there is a UserError."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() and launch.size == 1 else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is not None and launch.size > 1:
            raise UserError(
                f"--device {name}: with {launch.size} processes each takes a GPU of its own; say --device cuda"
            )
        # SLURM may show each process one GPU alone (--gpus-per-task), which is number 0 to all of them.
        own = 0 if launch.launcher == "slurm" and count == 1 else launch.local_rank
        index = own if device.index is None else device.index
        if index >= count:
            raise UserError(
                f"--device {name}: process {launch.rank} needs CUDA device {index}, this machine offers {count}"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Metal device; use --device cpu")
    return device


def start(launch: Launch, device: torch.device, timeout_s: float = 1800) -> None:
    """Joins the process group when there is more than one process; UserError where they cannot meet."""
    global _roll_call, _patient
    if launch.size == 1:
        return
    if launch.launcher == "slurm":
        _slurm_rendezvous()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and distributed.is_nccl_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    try:
        met, *_ = next(rendezvous("env://", launch.rank, launch.size, timeout=timeout))
        met.set_timeout(timeout)
        name = _name_of_start(distributed.PrefixStore("meeting", met), launch, timeout_s)
        store = distributed.PrefixStore(name, met)
        distributed.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
        _patient = distributed.new_group(backend="gloo", timeout=DOWNLOAD_TIME)
    except (RuntimeError, ValueError) as error:
        taken = "server socket has failed to listen" in str(error)  # no DistError in torch 2.6
        if not taken and not isinstance(error, distributed.DistError | ValueError) and not is_loss(error):
            raise
        place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {launch.size} processes could not meet at {place} ({str(error).splitlines()[0]}): "
            "check that host, or choose another port"
        ) from error
    _roll_call = RollCall(distributed.PrefixStore("roll call", store), launch.rank, launch.size, timeout_s)


def _name_of_start(store: distributed.Store, launch: Launch, timeout_s: float) -> str:
    """A new name that all processes of this start agree on, and none that ended before it knows.

    torchrun keeps its store over a restart (torch 2.6 to 2.15), with the addresses of processes that ended, and what it
    says of restarts (TORCHELASTIC_RESTART_COUNT) is the count of one node: it differs between nodes.
    Each process gives rank 0 a word of its own, hears the name under that word, and returns it. Rank 0 also answers
    words that ended processes have left, which nobody hears, until a live one has written over each.
    """
    own = uuid.uuid4().hex
    if launch.rank > 0:
        store.set(f"word/{launch.rank}", own)
        name = store.get(f"name/{own}").decode()  # waits for it
        store.set(f"word/{launch.rank}", name)
        return name
    deadline = time.monotonic() + timeout_s
    missing = set(range(1, launch.size))
    while True:
        for rank in [rank for rank in missing if store.check([f"word/{rank}"])]:
            word = store.get(f"word/{rank}").decode()
            if word == own:
                missing.remove(rank)
            else:
                store.set(f"name/{word}", own)
        if not missing:
            return own
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise distributed.DistStoreError(f"no word from rank {ranks} within {timeout_s:g} s")
        time.sleep(0.05)


def stop() -> None:
    global _roll_call, _patient
    if active():
        distributed.destroy_process_group()
    _roll_call = _patient = None


def leave_word(reason: str) -> None:
    """Before this process fails: tells the others why, who would notice a closed connection alone."""
    if _roll_call is not None:
        _roll_call.leave_word(reason)


@contextmanager
def losses_explained(place: Callable[[], str]) -> Iterator[None]:
    """ProcessLost where a collective in the block fails because another process has ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if _roll_call is None or not is_loss(error):
            raise
        raise _roll_call.explain(error, place()) from error


def launch_name(environ: Mapping[str, str] = os.environ) -> str | None:
    """Names this one start of torchrun on this machine: its restarts of the processes have it too, nothing else.

    torchrun makes a folder of a new name when it starts, and tells the processes a file in it:
    FOLDER/attempt_<restarts>/<local rank>/error.json. The run id alone may be used again, and is "none" by default.
    """
    place = Path(environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    if not place.name.startswith("attempt_"):
        return None
    return f"{environ.get('TORCHELASTIC_RUN_ID')} {platform.node()} {place.parent}"


def active() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if active() else 0


def size() -> int:
    return distributed.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def gather(value: T) -> list[T]:
    """`value` of every process, in rank order, on every process."""
    if not active():
        return [value]
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's `value` on every process."""
    if not active():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def maximum(number: int) -> int:
    """The largest `number` of all processes; a meeting point as well. It never waits for a GPU."""
    if not active():
        return number
    vote = torch.tensor([number])
    distributed.all_reduce(vote, op=distributed.ReduceOp.MAX)
    return int(vote.item())


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others do: it downloads or writes what they then find.

    If it fails there, they fail too.
    """
    if not active():
        yield
        return
    if not is_main():
        distributed.barrier(_patient)
    yield
    if is_main():
        distributed.barrier(_patient)


def share_buffers(model: nn.Module) -> None:
    """Rank 0's buffers (BatchNorm statistics) on every process, so that all evaluate, and save, the same model."""
    if active():
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)
