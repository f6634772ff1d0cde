"""What a resumed run takes over from its start, and what it refuses."""

import functools
import shutil
from pathlib import Path

import pytest

from contract.programs import (
    PROGRAMS,
    Moment,
    assert_same,
    new_home,
    reference,
    run,
    run_folder,
    written,
)

EACH = pytest.mark.parametrize("name", PROGRAMS)
RATE = {"gft": "--lr", "densenet": "--lr", "ffvt": "--learning_rate", "glsim": "--lr"}


@functools.cache
def stopped(name: str) -> Path:
    """The home of a run that was asked to stop in its second epoch; not to be changed."""
    program, like = PROGRAMS[name], reference(name)
    home = new_home(like.home.parent / f"{name}-stopped" / "home", name, True)
    moment = Moment("backward", like.moments["counts"]["backward"] // 2, "SIGTERM")
    assert run([program.file, *program.start()], home, moment).status == 0
    return home


def copy_of(home: Path, place: Path) -> Path:
    shutil.copytree(home, place, symlinks=True)
    return place


@EACH
def test_another_experiment_is_refused(name: str, tmp_path: Path) -> None:
    """By the name of the flag; what was given at the start need not be given again."""
    program, home = PROGRAMS[name], copy_of(stopped(name), tmp_path / "home")
    before = written(home)
    folder = str(run_folder(home).relative_to(home))
    for words, named in (
        ((RATE[name], "0.5"), (RATE[name].strip("-"), "0.5")),
        (("--limit", "40"), ("--limit",)),
        (("--seed", "99"), ("seed", "99")),
        (("--precision", "bf16"), ("--precision",)),
        (("--deterministic",), ("--deterministic",)),
    ):
        run([program.file, *program.other("--resume", folder, *words)], home).sentence(*named)
    without = [word for word in program.other("--resume", folder) if word != "--demo"]
    run([program.file, *without], home).sentence("--demo")
    assert_same(written(home), before)


@EACH
def test_the_newest_run_is_resumed_where_none_is_named(name: str, tmp_path: Path) -> None:
    program, home = PROGRAMS[name], copy_of(stopped(name), tmp_path / "home")
    run([program.file, *program.other("--resume")], home).done()
    assert_same(written(home), reference(name).written)
    again = [program.file, *program.other("--resume", str(run_folder(home).relative_to(home)))]
    run(again, home).sentence(run_folder(home).name)  # it is finished


@EACH
def test_a_damaged_state_is_named(name: str, tmp_path: Path) -> None:
    program, home = PROGRAMS[name], copy_of(stopped(name), tmp_path / "home")
    last = run_folder(home) / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    run([program.file, *program.other("--resume", run_folder(home))], home).sentence("last.pt")
    last.unlink()
    run([program.file, *program.other("--resume", run_folder(home))], home).sentence("last.pt")


def test_the_run_of_another_program_is_refused(tmp_path: Path) -> None:
    home = copy_of(stopped("gft"), tmp_path / "home")
    words = PROGRAMS["gft"].other("--resume", run_folder(home))
    run([PROGRAMS["densenet"].file, *words], home).sentence("gft_food101")


@EACH
def test_there_is_no_run_to_resume(name: str, tmp_path: Path) -> None:
    program, home = PROGRAMS[name], new_home(tmp_path / "home", name)
    run([program.file, *program.other("--resume")], home).sentence("runs")
    run([program.file, *program.other("--resume", "nowhere")], home).sentence("nowhere")
