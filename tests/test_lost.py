"""common.lost: which failures of a collective are another process's, and who says what when one is missing."""

from pathlib import Path

import pytest
import torch.distributed as distributed
from test_dist import processes, torchrun_environments

from common import dist
from common.lost import is_loss

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"  # torch 2.6; since then with another root
GONE = [
    GLOO + "pair.cc:534] Connection closed by peer [127.0.0.1]:9101",
    GLOO + "pair.cc:525] Read error [127.0.0.1]:37547: Connection reset by peer",
    GLOO + "pair.cc:446] writev [127.0.0.1]:9101: Broken pipe",
    GLOO + "pair.cc:1006] Socket closed [127.0.0.1]:9101",
    GLOO + "tls/pair.cc:120] Connection closed by peer [127.0.0.1]:9101",
    GLOO + "unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation to complete",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:144] Application timeout caused pair closure",
    "Application timeout caused pair closure",
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 6000ms for",
    "Gloo connectFullMesh failed with [" + GLOO + "pair.cc:147] no error",
]
OWN = [
    "[enforce fail at ../third_party/gloo/gloo/transport/tcp/pair.cc:454] op.preamble.length <= op.nbytes. 20 vs 16",
    "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:9] Connection closed by peer",
    "mat1 and mat2 shapes cannot be multiplied (4x300 and 30x30)",
    "Connection closed by peer",  # of a download, perhaps
    "CUDA error: an illegal memory access was encountered",
    "Expected to have finished reduction in the prior iteration before starting a new one.",
]


@pytest.mark.parametrize("text", GONE)
def test_how_gloo_says_that_a_process_is_gone(text: str) -> None:
    assert is_loss(RuntimeError(text))
    assert not is_loss(ValueError(text))


@pytest.mark.parametrize("text", OWN)
def test_a_fault_of_our_own_is_not_taken_for_a_loss(text: str) -> None:
    assert not is_loss(RuntimeError(text))


def test_losses_by_type_and_of_nccl() -> None:
    assert is_loss(distributed.DistStoreError("wait timeout after 6000ms, keys: /default_pg/0"))
    assert is_loss(distributed.DistNetworkError("failed to recv, got 0 bytes"))
    remote = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    assert is_loss(distributed.DistBackendError(f"NCCL error in: NCCLUtils.cpp:77, {remote}"))
    slow = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 600000 milliseconds"
    assert is_loss(distributed.DistBackendError(slow))
    assert not is_loss(distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error"))


def test_what_is_no_loss_passes_through_unchanged() -> None:
    error = RuntimeError(GONE[0])
    with pytest.raises(RuntimeError) as raised, dist.losses_explained(lambda: ""):  # one process alone loses nobody
        raise error
    assert raised.value is error


PROGRAM = """
    import os, signal
    from common.lost import ProcessLost
    launch = dist.detect()
    dist.start(launch, torch.device("cpu"), timeout_s=8)
    try:
        with dist.losses_explained(lambda: " after step 3"):
            dist.gather("all are here")
            if dist.rank() == {broken}:
                {how}
            dist.maximum(0)
    except ProcessLost as lost:
        print(f"{{lost}} | {{lost.first}}", flush=True)
        os._exit(1)
    dist.leave_word("its disk is full")
    os._exit(2)
"""


def ends(folder: Path, size: int, broken: int, how: str) -> list[tuple[int, str]]:
    """Status and words of each process but the broken one."""
    environments = torchrun_environments(size)
    ended = processes(PROGRAM.format(broken=broken, how=how), environments, folder, without=[broken])
    return [(status, out) for rank, (status, out, _) in enumerate(ended) if rank != broken]


@pytest.mark.parametrize("broken", [0, 2])
def test_a_process_that_hangs_is_named_by_those_that_are_left(broken: int, tmp_path: Path) -> None:
    """Rank 0, which has the store that the others ask, is stopped altogether; another only sleeps."""
    how = "os.kill(os.getpid(), signal.SIGSTOP)" if broken == 0 else "time.sleep(1000)"
    first, second = [rank for rank in range(3) if rank != broken]
    words = "no answer from process {} after step 3 within the 8 s of --dist-timeout: it hangs, or needs longer"
    assert ends(tmp_path, 3, broken, how) == [
        (1, f"{words.format(broken)} (process {first} says so) | True\n"),
        (1, f"{words.format(broken)} (process {second} says so) | False\n"),
    ]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_process_that_dies_is_named(broken: int, tmp_path: Path) -> None:
    other = 1 - broken
    words = f"process {other} lost process {broken} after step 3: it was killed or has crashed, its launcher says how"
    assert ends(tmp_path, 2, broken, "os.kill(os.getpid(), signal.SIGKILL)") == [(1, f"{words} | True\n")]


def test_the_others_repeat_the_reason_of_a_process_that_failed(tmp_path: Path) -> None:
    how = "dist.leave_word('its disk is full'); os._exit(2)"
    words = "stops after step 3 because process 2 failed: its disk is full"
    assert ends(tmp_path, 3, 2, how) == [(1, f"process {rank} {words} | False\n") for rank in range(2)]


def test_a_process_that_comes_back_too_late(tmp_path: Path) -> None:
    """The others have given it up: it is told so, and names nobody."""
    program = PROGRAM.format(broken=1, how="time.sleep(12)").replace("os._exit(1)", "time.sleep(9); os._exit(1)")
    (_, patient, _), (status, late, _) = processes(program, torchrun_environments(2), tmp_path)
    assert patient.startswith("no answer from process 1 after step 3 within the 8 s")
    assert status == 1
    assert late.startswith("process 1 lost its connection to the others after step 3, which had waited the 8 s")


def test_the_name_of_a_start_of_torchrun() -> None:
    """Its restarts have it too; another start, another machine or another run id has not."""
    file = "/tmp/torchelastic_abc/none_def/attempt_{}/{}/error.json"
    environ = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": file.format(0, 0)}
    name = dist.launch_name(environ)
    assert name is not None
    assert dist.launch_name(environ | {"TORCHELASTIC_ERROR_FILE": file.format(2, 3)}) == name
    assert dist.launch_name(environ | {"TORCHELASTIC_RUN_ID": "77"}) != name
    other = file.replace("def", "ghi").format(0, 0)
    assert dist.launch_name(environ | {"TORCHELASTIC_ERROR_FILE": other}) != name
    for nothing in ({}, {"TORCHELASTIC_ERROR_FILE": ""}, {"TORCHELASTIC_ERROR_FILE": "/tmp/error.json"}):
        assert dist.launch_name(nothing) is None


def test_torchrun_names_its_starts_as_we_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths are those that the installed torch makes."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    names = []
    for _ in range(2):
        specs = DefaultLogsSpecs()
        for restart in ("0", "1"):
            environ = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": restart}
            specs.reify({0: environ})
            names.append(
                dist.launch_name(environ | {"TORCHELASTIC_ERROR_FILE": specs.reify({0: environ}).error_files[0]})
            )
    assert names[0] == names[1] != names[2] == names[3]
    assert None not in names
