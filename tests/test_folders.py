"""common.folders: where runs live, which one is the newest, and which may be resumed as what."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import ROOT

from common.errors import UserError
from common.folders import (
    Lock,
    check_same_experiment,
    mark_launch,
    new_folder,
    newest,
    open_run,
    run_of_launch,
)
from common.predict import MODEL_INFO


def made(output: Path, script: str, name: str, *files: str) -> Path:
    folder = output / script / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).touch()
    return folder


def test_a_new_folder_stands_under_output_and_script(tmp_path: Path) -> None:
    folder = new_folder(str(tmp_path / "out é"), "gft_food101")
    assert folder.parent == tmp_path / "out é" / "gft_food101"
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.folders.time.strftime", lambda _: "20250101-000000")
    folders = {new_folder(str(tmp_path), "s") for _ in range(50)}
    assert len(folders) == 50
    assert all(folder.name.startswith("20250101-000000-") for folder in folders)


def test_a_folder_is_never_used_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.folders.time.strftime", lambda _: "20250101-000000")
    monkeypatch.setattr("common.folders.secrets.token_hex", lambda _: "aaaaaa")
    new_folder(str(tmp_path), "s")
    with pytest.raises(UserError, match="File exists"):
        new_folder(str(tmp_path), "s")


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\).*--output"):
        new_folder(str(tmp_path / "file"), "s")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # root may write everywhere
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\).*--output"):
        new_folder(str(tmp_path), "s")


def test_newest(tmp_path: Path) -> None:
    old = made(tmp_path, "s", "20250101-000000-ffffff", "last.pt")
    late = made(tmp_path, "s", "20250301-000000-000000", "last.pt")
    finished = made(tmp_path, "s", "20250401-000000-000000", "last.pt", "record.json", "best.safetensors")
    made(tmp_path, "s", "20250501-000000-000000")  # died before its first save
    made(tmp_path, "other", "20250601-000000-000000", "last.pt", "best.safetensors")
    (tmp_path / "s" / "notes.txt").touch()
    os.utime(old)  # the name decides, not when a file was touched
    assert newest(str(tmp_path), "s", having="last.pt", lacking="record.json") == late
    assert newest(str(tmp_path), "s", having="last.pt") == finished
    assert newest(str(tmp_path), "s", having="best.safetensors") == finished


def test_no_such_run(tmp_path: Path) -> None:
    made(tmp_path, "s", "20250401-000000-000000", "last.pt", "record.json")
    with pytest.raises(UserError, match=r"no interrupted run of s \(all that are there are finished\): .*--output"):
        newest(str(tmp_path), "s", having="last.pt", lacking="record.json")
    with pytest.raises(UserError, match="holds no finished or running training of t"):
        newest(str(tmp_path), "t", having="best.safetensors")


# Which run a launcher that starts its processes again has to go on with


def test_the_run_of_a_launch(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert run_of_launch(output, "s", {"a"}) is None
    stale = made(tmp_path, "s", "20250101-000000-ffffff", "last.pt")
    mark_launch(stale, {"earlier"})
    own = made(tmp_path, "s", "20250201-000000-000000", "last.pt")
    mark_launch(own, {"here", "there"})
    empty = made(tmp_path, "s", "20250301-000000-000000")  # died before its first save
    mark_launch(empty, {"here"})
    made(tmp_path, "s", "20250401-000000-000000", "last.pt")  # not started by torchrun
    assert run_of_launch(output, "s", {"here", "there"}) == own
    assert run_of_launch(output, "s", {"there", "a new machine"}) == own
    assert run_of_launch(output, "s", {"another"}) is None
    assert run_of_launch(output, "s", set()) is None
    assert run_of_launch(output, "other", {"here"}) is None
    mark_launch(stale, {"here"})  # resumed by this launch, after which it is no other's
    mark_launch(own, {"later"})
    assert run_of_launch(output, "s", {"here"}) == stale
    assert run_of_launch(output, "s", {"earlier"}) is None
    mark_launch(empty, set())
    assert json.loads((empty / ".launch").read_text()) == ["here"]


def test_a_damaged_mark_of_a_launch(tmp_path: Path) -> None:
    (made(tmp_path, "s", "20250101-000000-ffffff", "last.pt") / ".launch").write_text("[")
    with pytest.raises(UserError, match=r"\.launch is damaged: remove it.*--resume"):
        run_of_launch(str(tmp_path), "s", {"a"})


# Which recipe a run may be resumed with

PUBLISHED = {"lr": 0.1, "epochs": 30, "seed": None, "model_kwargs": {}}
FOLDER = Path("runs/s/r")


def started_with(**overrides: Any) -> dict[str, Any]:
    """model.json of a run that was started so, as it comes back from the disk."""
    info = {"recipe": PUBLISHED | overrides, "overrides": overrides, "demo": False}
    return json.loads(json.dumps(info))


def resume(info: dict[str, Any], demo: bool = False, **overrides: Any) -> None:
    check_same_experiment(FOLDER, info, PUBLISHED | overrides, overrides, demo)


def test_the_same_recipe_resumes() -> None:
    resume(started_with())


@pytest.mark.parametrize(
    "overrides", [{"lr": 0.2}, {"seed": 3, "epochs": 2}, {"model_kwargs": {"depths": (2, 2), "name": "x"}}]
)
def test_what_was_given_at_the_start_need_not_be_given_again(overrides: dict[str, Any]) -> None:
    resume(started_with(**overrides))
    resume(started_with(**overrides), **overrides)
    first = dict([next(iter(overrides.items()))])
    resume(started_with(**overrides), **first)


def test_a_demos_own_tuples_are_the_lists_of_its_file() -> None:
    demo = PUBLISHED | {"model_kwargs": {"channels": (16, 32)}}
    info = json.loads(json.dumps({"recipe": demo, "overrides": {}, "demo": True}))
    check_same_experiment(FOLDER, info, demo, {}, True)


@pytest.mark.parametrize(
    ("info", "overrides", "named", "not_named"),
    [
        (started_with(), {"lr": 0.2}, ["lr 0.1 -> 0.2"], ["epochs", "seed"]),
        (started_with(lr=0.2), {"lr": 0.3, "epochs": 2}, ["epochs 30 -> 2, lr 0.2 -> 0.3"], ["seed"]),
        (started_with(lr=0.2), {"lr": 0.1}, ["lr 0.2 -> 0.1"], ["epochs"]),
        (started_with(), {"seed": 3}, ["seed None -> 3"], ["lr"]),
        (started_with(), {"model_kwargs": {"depth": 2}}, ["model_kwargs {} -> {'depth': 2}"], ["lr"]),
        (started_with() | {"recipe": {**PUBLISHED, "lr": 0.5}}, {}, ["lr 0.5 -> 0.1"], ["epochs"]),  # script changed
        (started_with() | {"recipe": {**PUBLISHED, "t_max": 5}}, {}, ["t_max 5 -> None"], ["epochs"]),
    ],
)
def test_another_recipe_is_refused_by_field(
    info: dict[str, Any], overrides: dict[str, Any], named: list[str], not_named: list[str]
) -> None:
    with pytest.raises(UserError, match="started with another recipe") as refusal:
        resume(info, **overrides)
    text = str(refusal.value)
    assert str(FOLDER) in text
    for part in named:
        assert part in text
    for part in not_named:
        assert part not in text


def test_demo_resumes_as_demo() -> None:
    with pytest.raises(UserError, match="started without --demo"):
        resume(started_with(), demo=True)
    with pytest.raises(UserError, match="started with --demo"):
        resume(started_with() | {"demo": True})


# Opening a run


def test_open_run(tmp_path: Path) -> None:
    info: dict[str, Any] = {name: types[0]() for name, types in MODEL_INFO.items()} | {"script": "gft_food101"}
    info |= {"architecture": {"library": "timm", "name": "resnet18", "arguments": {}}, "classes": ["a"]}
    info["data"] = {part: {"count": 1, "classes": 1} for part in ("train", "val", "test")}
    info["weights"] = {"source": "none"}
    (tmp_path / "model.json").write_text(json.dumps(info))
    assert open_run(str(tmp_path), "gft_food101") == (tmp_path, info)
    with pytest.raises(UserError, match="is a run of gft_food101, not of vit_coco"):
        open_run(str(tmp_path), "vit_coco")
    with pytest.raises(UserError, match=r"nowhere/model\.json does not exist"):
        open_run(str(tmp_path / "nowhere"), "vit_coco")


HOLD = """
import sys, time
from pathlib import Path
from common.folders import Lock

with Lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path: Path) -> None:
    """The lock of a process that was killed is gone with it; the same process may take its own again."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(UserError, match=rf"still being trained by process {other.pid} on .*: stop that first"):
        Lock(tmp_path)
    other.kill()
    other.wait()
    with Lock(tmp_path), Lock(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
    other.stdout.close()


def test_a_folder_that_cannot_be_locked_because_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        Lock(tmp_path)


def test_a_lock_that_cannot_say_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            Lock(tmp_path)
    with Lock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
