"""Processes: how they were launched, and collectives that are the identity when there is only one.

Understood: plain `python`, `torchrun`, `python -m torch.distributed.launch` (RANK, WORLD_SIZE, LOCAL_RANK) and `srun`
(SLURM_*). Collectives on Python objects and CPU tensors use gloo, gradients on CUDA use NCCL, so a decision on the host
never waits for the GPU.
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError

T = TypeVar("T")
DOWNLOAD_TIME = timedelta(days=2)  # how long others wait for rank 0 in `main_first`
REPEAT_AFTER = 3.0  # seconds until a process repeats what another says: mostly the launcher ends it before
_patient: Any = None  # the group of `main_first`: a download takes longer than a collective may


@dataclass(frozen=True)
class Launch:
    """Where this process stands: `rank` of `size`, `local_rank` on its machine, and how it was started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "python"


def detect(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's variables."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names, launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK" if "LOCAL_RANK" in environ else "RANK"), "torchrun"
    elif environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # set by srun alone, not inside a bare sbatch script
        names, launcher = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), "slurm"
    else:
        return Launch()
    try:
        rank, size, local_rank = (int(environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the environment variables {', '.join(names)} are incomplete ({error}): start with torchrun or srun, "
            "which set them, or unset them for a single process"
        ) from error
    return Launch(rank, size, local_rank, launcher)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],cpu1` -> `gpu03`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]+\])+", nodelist)  # up to the first comma outside brackets
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first[0] if first else "localhost")


def choose_device(name: str, launch: Launch) -> torch.device:
    """`auto` -> this process's CUDA device, else MPS, else the CPU. UserError for a device that is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and launch.size == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Metal device; use --device cpu")
    if device.type != "cuda":
        return device
    if device.index is not None and launch.size > 1:
        raise UserError(f"--device {name}: with {launch.size} processes each takes its own GPU; say --device cuda")
    count = torch.cuda.device_count()
    # SLURM may show each process one GPU alone (--gpus-per-task), which is number 0 to all of them.
    own = 0 if launch.launcher == "slurm" and count == 1 else launch.local_rank
    index = own if device.index is None else device.index
    if index >= count:
        raise UserError(
            f"--device {name}: process {launch.rank} needs CUDA device {index}, this machine offers {count}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def start(options: Any) -> torch.device:
    """Joins the process group when there is more than one process; returns the device of this one."""
    global _patient
    launch = detect()
    device = choose_device(options.device, launch)
    if options.demo:
        torch.set_num_threads(1)  # its models are too small for more: threads would wait for each other
    if options.deterministic:
        make_deterministic()
    if launch.size == 1:
        return device
    if launch.launcher == "slurm":
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "localhost")
        os.environ.setdefault("MASTER_ADDR", first_host(nodes))
        port = 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 12000  # below the ports that Linux gives away
        os.environ.setdefault("MASTER_PORT", str(port))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and distributed.is_nccl_available() else "gloo"
    timeout = timedelta(seconds=options.dist_timeout)
    distributed.init_process_group(backend, rank=launch.rank, world_size=launch.size, timeout=timeout)
    _patient = distributed.new_group(backend="gloo", timeout=DOWNLOAD_TIME)
    return device


def make_deterministic() -> None:
    """The same command gives the same weights on the same machine; to be called before anything is computed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with it cuBLAS repeats itself
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class Stopped(Exception):
    """A signal asked the program to stop, and everything is saved; the text says how to go on."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@contextmanager
def explained(program: str) -> Iterator[None]:
    """The whole of a program: what ends it becomes its last line and its exit status, on any number of processes."""
    try:
        yield
    except UserError as error:
        time.sleep(REPEAT_AFTER if rank() else 0)
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        _leave(1)
    except Stopped as stopped:
        if is_main():
            print(stopped, flush=True)
        if stopped.status:
            raise SystemExit(stopped.status) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; a training goes on from its last save with --resume", file=sys.stderr)
        _leave(130)
    except Exception as error:
        if size() == 1:
            raise
        # Another process that has ended says why itself, and the launcher then ends this one.
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
        time.sleep(REPEAT_AFTER if lost else 0)
        traceback.print_exc()
        _leave(1)
    if active():
        distributed.destroy_process_group()


def _leave(status: int) -> None:
    """Ends this process. Among several, at once: the others wait in a collective, and the launcher ends them."""
    if size() == 1:
        raise SystemExit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
    box = [value]
    if active():
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def maximum(number: int) -> int:
    """The largest `number` of all processes. It never waits for a GPU."""
    if not active():
        return number
    vote = torch.tensor([number])
    distributed.all_reduce(vote, op=distributed.ReduceOp.MAX)
    return int(vote.item())


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others do: it downloads or writes what they then find."""
    if active() and not is_main():
        distributed.barrier(_patient)
    yield
    if active() and is_main():
        distributed.barrier(_patient)


def share_buffers(model: nn.Module) -> None:
    """Rank 0's buffers (BatchNorm statistics) on every process, so that all evaluate, and save, the same model."""
    for buffer in model.buffers() if active() else ():
        distributed.broadcast(buffer, src=0)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel where there are several processes."""
    if size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
