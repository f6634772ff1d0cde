"""What a killed process leaves of a file that it was writing, and who removes it."""

import os
from pathlib import Path

from common.files import remove_leftovers

ENDED = 2**30  # no process has such a number


def test_leftovers_of_one_file_or_of_a_folder(tmp_path: Path) -> None:
    written, older = f".a[1].bin.0f.{ENDED}.tmp", f".a[1].bin.{ENDED}.tmp"
    names = {written, older, f".a1.bin.{ENDED}.tmp", ".last.pt.x.tmp", "a[1].bin", ".lock", "7.tmp"}
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "a[1].bin")
    assert {path.name for path in tmp_path.iterdir()} == names - {written, older}
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].bin", ".lock", "7.tmp"}


def test_what_another_process_is_writing_is_left_to_it(tmp_path: Path) -> None:
    own, another = (tmp_path / f".a.bin.0f.{process}.tmp" for process in (os.getpid(), os.getppid()))
    own.touch()
    another.touch()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [another]
