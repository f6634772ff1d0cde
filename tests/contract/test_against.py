"""`make against`: it says "same" of what computes the same, and of what does not, where and by how much it differs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from against import compare
from safetensors.torch import load_file, save_file

from contract.programs import ROOT, reference


def against(tree: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(tree / "tests" / "against.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def git(tree: Path, *words: str) -> str:
    command = ["git", "-C", str(tree), "-c", "user.name=n", "-c", "user.email=e@invalid", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_commit_that_does_not_exist(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "against.py", tmp_path / "tests")
    ended = against(tmp_path, "no-such-commit")
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert "no-such-commit" in line


def in_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines() if name.endswith("l") else [(folder / name).read_text()]
        contents = [json.loads(line) for line in lines]
        change(contents[-1])
        (folder / name).write_text("\n".join(map(json.dumps, contents)))

    return act


def in_state(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        state = torch.load(folder / "last.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "last.pt")

    return act


def nudge(state: dict[str, Any]) -> None:
    """By one bit."""
    tensor = next(value for value in state["model"].values() if value.ndim > 1)
    tensor.view(torch.int32).flatten()[0] ^= 1


def in_best(folder: Path) -> None:
    weights = load_file(folder / "best.safetensors")
    save_file(weights | {name: value + 1 for name, value in [next(iter(weights.items()))]}, folder / "best.safetensors")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda folder: None, ""),
    "times": (in_json("record.json", lambda record: record.update(wall_seconds=1e9, host="other")), ""),
    "a bit of a weight": (in_state(nudge), "last.pt model"),
    "a figure of the history": (
        in_state(lambda state: state["history"][-1]["val"].update(loss=0.125)),
        "last.pt history",
    ),
    "the best weights": (in_best, "best.safetensors"),
    "a rate": (in_json("log.jsonl", lambda line: line.update(loss=0.125)), "log"),
    "a result": (
        in_json("record.json", lambda record: record["results"]["best"]["test"].update(correct=999)),
        "record: results/best/test/correct",
    ),
    "a field less": (in_json("record.json", lambda record: record.pop("side")), "record: side"),
    "a field more": (in_json("record.json", lambda record: record["recipe"].update(new=1)), "record: recipe/new"),
}


@pytest.mark.parametrize("change", CHANGES, ids=[f"densenet-{change}" for change in CHANGES])
def test_what_differs_is_named(change: str, tmp_path: Path) -> None:
    like = reference("densenet").home
    shutil.copytree(like, tmp_path / "home", symlinks=True)
    (record,) = (tmp_path / "home").glob("runs/*/*/record.json")
    act, named = CHANGES[change]
    act(record.parent)
    found = compare(like, tmp_path / "home")
    assert len(found) == bool(named), found
    assert all(line.startswith(named) for line in found)


def test_a_run_that_fails_differs(tmp_path: Path) -> None:
    assert compare(tmp_path, "ends with 1: that is wrong") == ["ends with 1: that is wrong at REV"]
    assert len(compare("ends with 1: a", "ends with 1: a")) == 2


@pytest.mark.slow
def test_a_changed_line_is_found(tmp_path: Path) -> None:
    """In a copy of this tree with one changed line, which stands in one of two programs."""
    tree = tmp_path / "tree"
    files = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for file in (ROOT / name for name in files if name and (ROOT / name).is_file()):
        (tree / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tree / file.relative_to(ROOT))
    git(tree, "init", "-q")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "-q", "-m", "as it is")
    script = tree / "vit_food101.py"
    changed = script.read_text().replace("weight_decay: float = ", "weight_decay: float = 1", 1)
    assert changed != script.read_text()
    script.write_text(changed)
    ended = against(tree, "HEAD", "--only", "it_food101")  # vit and deit
    lines = ended.stdout.splitlines()
    assert ended.returncode == 1, ended
    assert [line for line in lines if line.startswith(("vit", "deit"))] == [
        "vit_food101.py: DIFFERS",
        "deit_food101.py: same",
    ]
    assert any(line.strip().startswith("record: recipe/weight_decay") for line in lines)
    assert any(line.strip().startswith("last.pt model") for line in lines)
    assert git(tree, "worktree", "list").count("\n") == 1
