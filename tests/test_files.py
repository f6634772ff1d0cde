"""common.files: a file is replaced as a whole or not at all."""

import csv
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from common.errors import UserError
from common.files import keep_earlier, make_ready, write_atomically, write_csv, write_text


def failing(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def half(file: BinaryIO) -> None:
    file.write(b"half")
    failing()


def weights(file: BinaryIO) -> None:
    file.write = failing  # type: ignore[method-assign]
    torch.save({"weight": torch.ones(3)}, file)  # wraps the OSError


@pytest.mark.parametrize("write", [half, weights])
@pytest.mark.parametrize("before", [None, "before"])
def test_a_failing_disk_leaves_what_was_there(write: Any, before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    if before is not None:
        write_text(path, before)
    with pytest.raises(UserError, match=r"last\.pt could not be written \(No space left on device\)"):
        write_atomically(path, write)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_it_fails_at_the_last_moment(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "before")
    monkeypatch.setattr(f"common.files.os.{step}", failing)
    with pytest.raises(UserError, match="No space left"):
        write_text(tmp_path / "a", "after")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_a_defect_of_ours_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ours"):
        write_atomically(tmp_path / "a", lambda _: (_ for _ in ()).throw(RuntimeError("ours")))


def test_tables(tmp_path: Path) -> None:
    rows = [["name", "count"], ["a, b", "1"], ['"c"\nd', "2"]]
    write_csv(tmp_path / "a.csv", rows)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == rows


def test_files_of_an_earlier_run_are_kept_once(tmp_path: Path) -> None:
    """Also where the program was killed between keeping one and replacing it."""
    path = tmp_path / "new" / "best.bin"
    make_ready(path, ours=False)
    for number in (1, 2):
        write_text(path, str(number))
        assert keep_earlier(path) == keep_earlier(path) == path.with_name(f"best.{number}.bin")
    make_ready(path, ours=True)
    assert {file.name: file.read_text() for file in path.parent.iterdir()} == {
        **{"best.bin": "2", "best.1.bin": "1", "best.2.bin": "2"},
    }
