"""common.files and common.checkpoint: what stands on the disk after each failure, and what is never unpickled."""

import builtins
import errno
import multiprocessing
import os
import pickle
import re
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common.checkpoint import load_state, save_state, save_weights
from common.errors import UserError
from common.files import keep_earlier, one_at_a_time, write_atomically, write_csv, write_text

ROOT = Path(__file__).parent.parent
STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    "history": [{"step": 4, "val": {"top1": 0.5, "name": "é", "none": None}}],
}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and all(map(same, first, second)) and len(first) == len(second)
    return bool(first == second)


# Writing


def test_text_is_written_as_given(tmp_path: Path) -> None:
    path = tmp_path / "a b é.txt"
    write_text(path, "one\r\ntwo é\n")
    assert path.read_bytes() == "one\r\ntwo é\n".encode()
    write_text(path, "")
    assert path.read_bytes() == b""
    assert list(tmp_path.iterdir()) == [path]


def test_tables_are_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [["x", 'y "z"'], [1, "a,b"], ["", None]])
    assert (tmp_path / "a.csv").read_bytes() == b'x,"y ""z"""\r\n1,"a,b"\r\n,\r\n'


def test_states_and_weights_come_back(tmp_path: Path) -> None:
    save_state(tmp_path / "last.pt", STATE)
    assert same(load_state(tmp_path / "last.pt"), STATE)
    weights = {"a": torch.randn(3, 4).T, "b": torch.ones(2, requires_grad=True), "c": torch.tensor(7)}
    save_weights(tmp_path / "best.safetensors", weights, {"script": "x"})
    assert same(load_file(tmp_path / "best.safetensors"), {key: value.detach() for key, value in weights.items()})
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert file.metadata() == {"script": "x"}


def test_every_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
        save_state(tmp_path / "a.pt", STATE)
        save_weights(tmp_path / "a.safetensors", STATE["model"], {})  # type: ignore[arg-type]
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


# Each writes an "old" or a much larger "new" file.
WRITERS: dict[str, Any] = {
    "a.txt": lambda path, new: write_text(path, "new" * 100_000 if new else "old"),
    "a.csv": lambda path, new: write_csv(path, [["new"]] * 100_000 if new else [["old"]]),
    "a.pt": lambda path, new: save_state(path, {"a": torch.ones(100_000 if new else 1)}),
    "a.safetensors": lambda path, new: save_weights(path, {"a": torch.ones(100_000 if new else 1)}, {"note": "x"}),
}


def refused(name: str, path: Path, reason: str) -> None:
    """Writing the new file fails with one sentence; the old one is whole and alone."""
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} could not be written \({reason}\)") as refusal:
        WRITERS[name](path, True)
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    path = tmp_path / name
    WRITERS[name](path, False)

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        refused(name, path, "Input/output error")
    WRITERS[name](path, True)
    assert path.stat().st_size > 100_000


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, in a process of its own: every write beyond it fails as on a full disk."""
    program = f"""
        import resource
        from pathlib import Path
        from test_files import WRITERS, refused
        for name in WRITERS:
            folder = Path({str(tmp_path)!r}) / name
            folder.mkdir()
            WRITERS[name](folder / name, False)
            for limit in (0, 200, 10_000, 250_000):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                refused(name, folder / name, "File too large")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    """
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=True, timeout=60)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_or_read_only_file_system(tmp_path: Path, name: str) -> None:
    """The real thing, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs; RLIMIT_FSIZE is tested above")
    try:
        WRITERS[name](disk / name, False)
        refused(name, disk / name, "No space left on device")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(name, disk / name, "Read-only file system")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        write_text(tmp_path / "nowhere" / "a.txt", "x")


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        write_text(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("error", [TypeError("a defect"), KeyboardInterrupt()])
def test_other_faults_are_not_called_the_disks(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the whole file, then the rename, then fsync of the folder."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        status = os.fstat(handle)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else f"file of {status.st_size}")
        fsync(handle)

    def noted_replace(source: Any, target: Any) -> None:
        calls.append("rename")
        assert Path(source).parent == Path(target).parent  # else it would be no rename
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_text(tmp_path / "a.txt", "12345")
    assert calls == ["file of 5", "rename", "folder"]


def test_a_folder_that_cannot_be_synced_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"


# Names and locks


def test_an_earlier_file_is_kept_once_however_many_ask(tmp_path: Path) -> None:
    """8 processes at once, 50 files one after the other: each is kept under one number, and all are told which."""
    context = multiprocessing.get_context("fork")
    together = context.Barrier(8)
    processes = [context.Process(target=_keep, args=(tmp_path, number, together)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"a.bin": "50"} | {f"a.{turn + 1}.bin": str(turn) for turn in range(50)}


def _keep(folder: Path, number: int, together: Any) -> None:
    path = folder / "a.bin"
    for turn in range(51):
        if number == 0:
            write_text(path, str(turn))
        together.wait(30)
        if turn < 50:
            assert keep_earlier(path) == folder / f"a.{turn + 1}.bin"
        together.wait(30)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EACCES])
def test_an_earlier_file_is_kept_where_files_have_one_name(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    assert keep_earlier(tmp_path / "a.bin") is None
    (tmp_path / "a.bin").write_text("second")
    (tmp_path / "a.1.bin").write_text("first")
    monkeypatch.setattr(os, "link", refuse)
    if code == errno.EACCES:
        with pytest.raises(
            UserError, match=r"a\.bin is there and cannot be renamed to a\.1\.bin \(Permission denied\)"
        ):
            keep_earlier(tmp_path / "a.bin")
        return
    assert keep_earlier(tmp_path / "a.bin") == tmp_path / "a.2.bin"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.1.bin": "first", "a.2.bin": "second"}


def test_one_at_a_time_goes_through_the_block(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    (tmp_path / ".a.bin.lock").touch()  # of a process that was killed
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_one, args=(path,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert path.read_text() == "200"
    assert list(tmp_path.iterdir()) == [path]


def _add_one(path: Path) -> None:
    for _ in range(25):
        with one_at_a_time(path):
            count = int(path.read_text()) if path.exists() else 0
            time.sleep(0.001)
            path.write_text(str(count + 1))


# Reading


def unreadable(path: Path) -> str:
    with pytest.raises(UserError) as refusal:
        load_state(path)
    text = str(refusal.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_a_missing_state(tmp_path: Path) -> None:
    assert "does not exist" in unreadable(tmp_path / "last.pt")
    assert "does not exist" in unreadable(tmp_path)


def test_a_state_cut_anywhere(tmp_path: Path) -> None:
    save_state(tmp_path / "whole.pt", STATE)
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        assert "not a readable checkpoint" in unreadable(tmp_path / "cut.pt")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80", b"PK\x03\x04", b"\0" * 1000, b"\x80\x02}q\x00K", b"GIF89a"])
def test_a_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    assert "not a readable checkpoint" in unreadable(tmp_path / "a.pt")


def test_a_state_that_is_no_dictionary(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pt")
    assert "holds a list" in unreadable(tmp_path / "a.pt")


class Bomb:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("kind", ["system", "eval", "exec", "open", "nested"])
@pytest.mark.parametrize("how", ["torch", "legacy torch", "pickle"])
def test_pickled_code_is_refused_and_never_run(tmp_path: Path, kind: str, how: str) -> None:
    trace, path = tmp_path / "was-run", tmp_path / "a.pt"
    bombs = {
        "system": Bomb(os.system, f"touch {trace}"),
        "eval": Bomb(eval, f"open({str(trace)!r}, 'w')"),
        "exec": Bomb(exec, f"open({str(trace)!r}, 'w')"),
        "open": Bomb(builtins.open, str(trace), "w"),
        "nested": Bomb(eval, Bomb(str, f"open({str(trace)!r}, 'w')")),
    }
    state = {"model": {"weight": torch.ones(2)}, "history": [bombs[kind]]}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"history": [bombs[kind]]}, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch")
    assert "could run code" in unreadable(path)
    assert not trace.exists()
    if how == "pickle":  # and the files are dangerous indeed
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()
