"""common.train.distributed: launchers' variables, devices, and what two real processes see of each other."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.train.distributed import Launch, choose_device, detect, first_host

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SBATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = SBATCH | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch()),
        (TORCHRUN, Launch(2, 4, 1, "torchrun")),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Launch(2, 4, 2, "torchrun")),
        (SRUN, Launch(3, 4, 1, "slurm")),
        (SBATCH, Launch()),
        (SRUN | TORCHRUN, Launch(2, 4, 1, "torchrun")),
    ],
)
def test_every_launcher(environ: Mapping[str, str], launch: Launch) -> None:
    assert detect(environ) == launch


@pytest.mark.parametrize("environ", [{"RANK": "0"}, TORCHRUN | {"RANK": "two"}, SRUN | {"SLURM_LOCALID": ""}])
def test_incomplete_variables_are_named(environ: Mapping[str, str]) -> None:
    with pytest.raises(UserError, match=r"WORLD_SIZE|SLURM_LOCALID"):
        detect(environ)


def test_first_host() -> None:
    lists = {"gpu[03-05,9],cpu1": "gpu03", "gpu[9,03-05]": "gpu9", "n7,n8": "n7", "a-b-[1,3]": "a-b-1"}
    lists |= {"n[1-4]-ib,m": "n1-ib", "rack[1-2]n[04-07,9],x": "rack1n04", "host.domain.org": "host.domain.org"}
    assert {nodes: first_host(nodes) for nodes in lists} == lists


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    found = [choose_device(name, Launch(1, size, 1)) for name, size in (("auto", 2), ("cuda:0", 1), ("cpu", 2))]
    assert found == [torch.device(name) for name in ("cuda:1", "cuda:0", "cpu")]
    refused = [("cuda:1", Launch(0, 2)), ("cuda", Launch(2, 3, 2)), ("cuda:2", Launch()), ("mps", Launch())]
    for name, launch in [*refused, ("gpu", Launch()), ("cuda:-1", Launch())]:
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_device(name, launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda", Launch(1, 2, 1, "slurm")) == torch.device("cuda:0")  # it is shown that one alone
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", Launch()) == torch.device("cpu")


TWO = """
import sys, torch
from common.cli import Options
from common.train import distributed
distributed.start(Options(device="cpu", dist_timeout=60))
rank, size = distributed.rank(), distributed.size()
assert distributed.gather((rank, torch.full((rank + 1,), rank)))[1][1].tolist() == [1, 1]
assert distributed.broadcast(f"of {rank}") == "of 0"
assert distributed.maximum(10 - 3 * rank) == 10
model = torch.nn.BatchNorm1d(2)
model.running_mean += rank + 1
distributed.share_buffers(model)
assert model.running_mean.tolist() == [1, 1]
with distributed.main_first():
    with open("order", "a") as file:
        file.write(str(rank))
distributed.gather(None)
assert open("order").read() == "01"
with distributed.explained("program"):
    if rank == 0:
        raise distributed.UserError("no weights")
    distributed.gather(None)  # of a process that has ended
"""


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_processes(launcher: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    names = ("RANK", "WORLD_SIZE") if launcher == "torchrun" else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    base = os.environ | meeting | {"PYTHONPATH": str(Path(__file__).parents[1]), "SLURM_LOCALID": "0"}
    places = [base | dict(zip(names, (str(rank), "2"), strict=True)) for rank in range(2)]
    words, pipe = [sys.executable, "-c", TWO], subprocess.PIPE
    running = [subprocess.Popen(words, cwd=tmp_path, env=place, stderr=pipe, text=True) for place in places]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [1, 1], errors
    assert errors[0].strip() == "program: error: no weights"
    assert "gather(None)  # of a process that has ended" in errors[1] or "Traceback" in errors[1]
