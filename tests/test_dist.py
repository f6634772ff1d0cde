"""common.dist: launchers' variables, devices, and real gloo processes on loopback."""

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from common import dist
from common.dist import Launch, choose_device, detect, first_host
from common.errors import UserError

ROOT = Path(__file__).parent.parent
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
SBATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODELIST": "n1"}
SRUN = SBATCH | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch(0, 1, 0, "python")),
        (TORCHRUN, Launch(2, 4, 1, "torchrun")),
        ({name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}, Launch(2, 4, 2, "torchrun")),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch(0, 1, 0, "torchrun")),
        (SRUN, Launch(3, 4, 1, "slurm")),
        (SBATCH, Launch(0, 1, 0, "python")),
        (SBATCH | {"SLURM_STEP_NUM_TASKS": "1"}, Launch(0, 1, 0, "python")),
        (SRUN | TORCHRUN, Launch(2, 4, 1, "torchrun")),
    ],
    ids=["python", "torchrun", "no-local", "one", "srun", "sbatch", "srun-1", "torchrun-in-srun"],
)
def test_every_launcher(environ: Mapping[str, str], launch: Launch) -> None:
    assert detect(environ) == launch


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["RANK"]),
        (TORCHRUN | {"RANK": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK=-1"]),
        (TORCHRUN | {"WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
        (TORCHRUN | {"LOCAL_RANK": "3"}, ["LOCAL_RANK=3", "RANK=2"]),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, ["LOCAL_RANK=-1"]),
        (TORCHRUN | {"RANK": "two"}, ["RANK", "'two'"]),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "x"}, ["SLURM_STEP_NUM_TASKS", "'x'"]),
        (SRUN | {"SLURM_PROCID": "9"}, ["SLURM_PROCID=9", "SLURM_STEP_NUM_TASKS=4"]),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, ["SLURM_LOCALID", "missing"]),
    ],
)
def test_contradictions_are_one_sentence(environ: Mapping[str, str], parts: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        detect(environ)
    assert "\n" not in str(refusal.value)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[9,03-05]", "gpu9"),
        ("node7", "node7"),
        ("node7,node8", "node7"),
        ("a-b-[1,3]", "a-b-1"),
        ("a-b-2,c[1-3]", "a-b-2"),
        ("n[1-4]-ib,m", "n1-ib"),
        ("rack[1-2]n[04-07,9],x", "rack1n04"),
        ("host.domain.org", "host.domain.org"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "[]"])
def test_a_list_without_a_host(nodes: str) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        first_host(nodes)


def test_slurm_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in (SRUN | {"SLURM_STEP_NODELIST": "gpu[03-05]", "SLURM_JOB_ID": "19999"}).items():
        monkeypatch.setenv(name, value)
    dist._slurm_rendezvous()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03", "27999")
    monkeypatch.setenv("MASTER_ADDR", "mine")
    monkeypatch.setenv("MASTER_PORT", "5")
    dist._slurm_rendezvous()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("mine", "5")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", Launch(1, 2, 1)) == torch.device("cuda:1")
    assert choose_device("cuda", Launch()) == torch.device("cuda:0")
    assert choose_device("cuda:1", Launch()) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1"), torch.device("cuda:0"), torch.device("cuda:1")]
    assert choose_device("cpu", Launch()) == torch.device("cpu")
    with pytest.raises(UserError, match="CUDA device 2, this machine offers 2"):
        choose_device("cuda", Launch(2, 3, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto", Launch()) == torch.device("cpu")
    with pytest.raises(UserError, match="offers 0"):
        choose_device("cuda", Launch())
    with pytest.raises(UserError, match="Metal"):
        choose_device("mps", Launch())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", Launch()) == torch.device("mps")
    assert choose_device("auto", Launch(0, 2)) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "meta", "xpu", "cuda:x", "cuda:-1"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UserError, match="expected auto, cpu, cuda"):
        choose_device(name, Launch())


def test_alone_every_collective_is_the_identity() -> None:
    dist.start(Launch(), torch.device("cpu"))
    assert not dist.active()
    assert (dist.rank(), dist.size(), dist.is_main()) == (0, 1, True)
    value = {"a": torch.ones(2)}
    assert dist.gather(value) == [value]
    assert dist.broadcast(value) is value
    assert dist.maximum(3) == 3
    model = nn.BatchNorm1d(2)
    dist.share_buffers(model)
    with dist.main_first():
        pass
    dist.stop()


# Real processes


def free_port(candidates: Iterable[int] = (0,)) -> int:
    """The first of `candidates` that nobody uses; 0: whichever the system offers."""
    for candidate in candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", candidate))
            port: int = probe.getsockname()[1]
            return port
    raise AssertionError("no port is free")


def processes(
    program: str, environments: list[dict[str, str]], folder: Path, without: Collection[int] = ()
) -> list[tuple[int, str, str]]:
    """Runs `program` once in each environment, all at the same time: exit status, output and errors of each.

    Those `without` are not waited for, but killed when the others have ended.
    """
    file = folder / "program.py"
    file.write_text("import time, torch\nfrom torch import nn\nfrom common import dist\n" + textwrap.dedent(program))
    base = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=base | environment,
        )
        for environment in environments
    ]
    try:
        for number, process in enumerate(running):
            if number not in without:
                process.wait(timeout=90)
    finally:
        for process in running:
            process.kill()
    ended = [process.communicate() for process in running]
    return [(process.returncode, out, err) for process, (out, err) in zip(running, ended, strict=True)]


def torchrun_environments(size: int) -> list[dict[str, str]]:
    port = str(free_port())
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def test_collectives_of_two_processes(tmp_path: Path) -> None:
    program = """
        launch = dist.detect()
        dist.start(launch, dist.choose_device("cpu", launch), timeout_s=30)
        rank = dist.rank()
        assert (rank, dist.size(), dist.is_main()) == (launch.rank, 2, launch.rank == 0)
        assert dist.gather({"rank": rank, "tensor": torch.full((rank + 1,), rank)})[1]["tensor"].tolist() == [1, 1]
        assert [part["rank"] for part in dist.gather({"rank": rank})] == [0, 1]
        assert dist.broadcast(("of", rank)) == ("of", 0)
        assert dist.maximum(10 - 3 * rank) == 10
        assert dist.maximum(2**40 * rank) == 2**40

        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        torch.manual_seed(rank)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.copy_(torch.rand(tensor.shape) * 10)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        weights = {name: weight.clone() for name, weight in model.named_parameters()}
        dist.share_buffers(model)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, dist.broadcast(buffers[name])), name
            assert rank == 0 or buffer.dtype == torch.long or not torch.equal(buffer, buffers[name]), name
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
        dist.stop()
        assert not dist.active()
        print("done")
    """
    for status, out, err in processes(program, torchrun_environments(2), tmp_path):
        assert (status, out) == (0, "done\n"), err


def test_rank_0_goes_first_and_may_take_longer_than_any_collective(tmp_path: Path) -> None:
    program = f"""
        from pathlib import Path
        made = Path({str(tmp_path / "made")!r})
        launch = dist.detect()
        dist.start(launch, torch.device("cpu"), timeout_s=2)
        with dist.main_first():
            if dist.is_main():
                time.sleep(4)
                assert not made.exists()
                made.touch()
            assert made.exists()
        with dist.main_first():
            order = dist.rank()
        dist.stop()
        print("done")
    """
    for status, out, err in processes(program, torchrun_environments(2), tmp_path):
        assert (status, out) == (0, "done\n"), err


def test_if_rank_0_fails_first_the_others_do_not_go_on(tmp_path: Path) -> None:
    program = """
        import os
        launch = dist.detect()
        dist.start(launch, torch.device("cpu"), timeout_s=30)
        try:
            with dist.main_first():
                if dist.is_main():
                    raise ValueError("no network")
                print("went on")
        except ValueError:
            os._exit(7)
    """
    (first, *_), (second, out, _) = processes(program, torchrun_environments(2), tmp_path)
    assert first == 7
    assert second != 0
    assert "went on" not in out


def test_two_slurm_tasks_meet_by_slurms_variables(tmp_path: Path) -> None:
    program = """
        launch = dist.detect()
        dist.start(launch, torch.device("cpu"), timeout_s=30)
        print(launch.launcher, dist.gather(launch.rank))
        dist.stop()
    """
    job = free_port(range(20000 + os.getpid() % 12000, 32000)) - 20000
    shared = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(job)}
    tasks = [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    for status, out, err in processes(program, tasks, tmp_path):
        assert (status, out) == (0, "slurm [0, 1]\n"), err


@pytest.mark.parametrize("of_first", ["1", "0"])
def test_processes_started_again_do_not_look_for_those_that_ended(tmp_path: Path, of_first: str) -> None:
    """torchrun keeps its store over a restart, with the addresses that the first processes have left there.

    Each node counts the restarts that it has asked for itself, and so says 0 where another has lost a process.
    """
    program = """
        import os
        launch = dist.detect()
        if launch.rank == 0:
            time.sleep(3)  # the other comes first to where the old address is
        dist.start(launch, torch.device("cpu"), timeout_s=60)
        print(dist.gather(launch.rank), flush=True)
        os._exit(0)
    """
    _store, launched = store_of_launcher()  # it ends with the last reference
    for counts in (("0", "0"), (of_first, "1")):
        environments = [
            one | launched | {"TORCHELASTIC_RESTART_COUNT": count}
            for one, count in zip(torchrun_environments(2), counts, strict=True)
        ]
        for status, out, err in processes(program, environments, tmp_path):
            assert (status, out) == (0, "[0, 1]\n"), err


def store_of_launcher() -> tuple[torch.distributed.TCPStore, dict[str, str]]:
    """A store such as torchrun keeps, and the variables that tell processes of it."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_words_of_processes_that_ended_are_not_taken_for_those_of_this_start(tmp_path: Path) -> None:
    """Two ended before they had heard a name, one after; all are still to write when rank 0 has read what they left."""
    program = """
        import os
        launch = dist.detect()
        store = torch.distributed.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
        while launch.rank > 0 and store.get("meeting/name/lost") == b"an earlier start":
            time.sleep(0.05)
        dist.start(launch, torch.device("cpu"), timeout_s=60)
        print(dist.gather(launch.rank), flush=True)
        dist.stop()
    """
    store, launched = store_of_launcher()
    meeting = torch.distributed.PrefixStore("meeting", store)
    for rank, word in {1: "lost", 2: "lost as well", 3: "an earlier start"}.items():
        meeting.set(f"word/{rank}", word)
    meeting.set("name/lost", "an earlier start")
    for status, out, err in processes(program, [one | launched for one in torchrun_environments(4)], tmp_path):
        assert (status, out) == (0, "[0, 1, 2, 3]\n"), err
    name = meeting.get("word/1")
    assert name not in (b"lost", b"an earlier start")
    assert [meeting.get(f"word/{rank}") for rank in (2, 3)] == [name, name]
    assert meeting.get("name/lost") == name


@pytest.mark.parametrize(("rank", "reason"), [(0, "no word from rank 1, 2 within 1 s"), (1, "timeout")])
def test_those_that_wait_in_vain_for_the_others_are_told_so(
    monkeypatch: pytest.MonkeyPatch, rank: int, reason: str
) -> None:
    store, launched = store_of_launcher()
    torch.distributed.PrefixStore("meeting", store).set("word/1", "lost")
    for name, value in (torchrun_environments(3)[rank] | launched).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"3 processes could not meet at .*{reason}"):
        dist.start(Launch(rank, 3, rank, "torchrun"), torch.device("cpu"), timeout_s=1)
    assert not dist.active()


def test_processes_that_cannot_meet_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        for value in (port, "no-port"):
            monkeypatch.setenv("MASTER_PORT", value)
            with pytest.raises(UserError, match=f"2 processes could not meet.*MASTER_PORT={value}"):
                dist.start(Launch(0, 2, 0, "torchrun"), torch.device("cpu"), timeout_s=1)
    assert not dist.active()
