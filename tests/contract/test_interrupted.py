"""Runs that are killed, or asked to stop, at exact moments, and resumed: they end as if nothing had happened.

Weights, optimizer, history, learning-rate trace, tables, record, curves and published checkpoints are equal to the bit.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from contract.moments import COMPUTING, SAVING
from contract.programs import (
    EARLIER,
    PROGRAMS,
    Moment,
    Outcome,
    Reference,
    assert_same,
    new_home,
    reference,
    run,
    run_folder,
    state_of,
    written,
)

EACH = pytest.mark.parametrize("name", PROGRAMS)
STATUS = {"SIGTERM": 0, "SIGUSR1": 0, "SIGINT": 130}  # of a run that saved because it was asked to stop
EVALUATE_EVERY = 3  # steps
MANY, PAIRS = 6, 8  # moments in each phase, pairs of two of them


def saves(like: Reference, phase: str) -> dict[str, list[int]]:
    """File -> which moments of `phase` are in its saving."""
    found: dict[str, list[int]] = {}
    targets = dict(like.moments["renamed"])
    files = (
        [targets.get(path, path) for path in like.moments["synced"]]
        if phase in ("half", "fsync")
        else [target for _, target in like.moments["renamed"]]
    )
    for number, file in enumerate(files, 1):
        found.setdefault(Path(file).name, []).append(number)
    return found


def draw(name: str, act: str, phase: str, count: int) -> list[Moment]:
    """So many moments of a phase; one alone comes from the second half of the run, when there is much to resume."""
    total = reference(name).moments["counts"][phase]
    moments = range(total // 2 if count == 1 else 1, total + 1)
    numbers = random.Random(f"{name} {act} {phase}").sample(moments, min(count, len(moments)))
    return [Moment(phase, number, act) for number in numbers]


def resume(name: str, home: Path, moments: Sequence[Moment], *more: str) -> None:
    """Runs the program, killed at the first moment; goes on, killed at the second; and so on, and then to its end."""
    program = PROGRAMS[name]
    words = program.start(*more)
    for moment in moments:
        ended = run([program.file, *words], home, moment)
        folder = run_folder(home)
        written(home)  # every file can be read to its end
        done = (folder / "record.json").exists()
        if moment.act == "SIGKILL":
            assert done or ended.status == -9, ended
        else:
            assert (ended.status, ended.err) == (0 if done else STATUS[moment.act], ""), ended
            if not done and moment.phase == "evaluation":
                assert state_of(folder)["step"] % EVALUATE_EVERY == 0  # not after the step behind it
        if done:
            break
        words = program.other("--resume", str(folder.relative_to(home)), *more)
        if moment.act != "SIGKILL":
            assert ended.resume[1:] == [*program.named, "--demo", "--resume", str(folder.relative_to(home))]
        if not (folder / "last.pt").exists():
            run([program.file, *words], home).sentence()
            shutil.rmtree(folder)
            words = program.start(*more)
    else:
        run([program.file, *words], home).done()


def survive(name: str, home: Path, *moments: Moment) -> None:
    resume(name, new_home(home, name, True), moments)
    assert_same(written(home), reference(name).written)


def kill_moments(name: str) -> Iterator[Moment]:
    """Of every computing phase some, and every phase of the saving of every file, each file's at another save."""
    for phase in COMPUTING:
        yield from draw(name, "SIGKILL", phase, MANY)
    for phase in SAVING[1:]:
        for file, numbers in sorted(saves(reference(name), phase).items()):
            yield Moment(phase, random.Random(f"{name} {phase} {file}").choice(numbers), "SIGKILL")


@EACH
def test_every_file_is_synced_renamed_and_its_folder_synced(name: str) -> None:
    """What stands under a final name is whole even after a power cut."""
    moments = reference(name).moments
    files = {Path(target).name for _, target in moments["renamed"]}
    assert files >= {"last.pt", "best.safetensors", "record.json", *(Path(f).name for f in PROGRAMS[name].published)}
    assert [source for source, _ in moments["renamed"]] == moments["synced"]
    assert moments["folders"] == [*range(1, len(moments["renamed"]) + 1)]


@EACH
def test_checkpoints_of_an_earlier_run_are_kept(name: str) -> None:
    """Under a number, beside those that this run has published under their names."""
    kept = [file for file, content in reference(name).written.items() if content == EARLIER]
    stems = [str(Path(file).with_suffix("")) for file in PROGRAMS[name].published]
    assert sorted(str(Path(file).with_suffix("")).rpartition(".")[0] for file in kept) == sorted(stems)


@EACH
def test_killed_while_computing(name: str, tmp_path: Path) -> None:
    """Two phases of each program, so that each phase has two programs."""
    for phase in COMPUTING[[*PROGRAMS].index(name) % 2 :: 2]:
        survive(name, tmp_path / phase, *draw(name, "SIGKILL", phase, 1))


@EACH
def test_killed_while_saving(name: str, tmp_path: Path) -> None:
    """In the middle of writing last.pt, when the best weights are about to be renamed, and behind that."""
    places = (("half", "last.pt", -2), ("rename", "best.safetensors", 0), ("renamed", "last.pt", 2))
    for place, (phase, file, which) in enumerate(places):
        survive(name, tmp_path / str(place), Moment(phase, saves(reference(name), phase)[file][which], "SIGKILL"))


@EACH
@pytest.mark.parametrize("act", ["SIGINT", "SIGUSR1"])
def test_asked_to_stop(name: str, act: str, tmp_path: Path) -> None:
    """Saves after the present step, says how to go on, and goes on."""
    phase = COMPUTING[([*PROGRAMS].index(name) + [*STATUS].index(act)) % len(COMPUTING)]
    survive(name, tmp_path / "home", *draw(name, act, phase, 1))


@EACH
def test_asked_to_stop_with_data_workers(name: str, tmp_path: Path) -> None:
    """The command that the stopped run prints is taken as it is; no process is left."""
    home = new_home(tmp_path / "home", name, True)
    flag = next(word for word in PROGRAMS[name].often if word.endswith("workers"))
    (moment,) = draw(name, "SIGTERM", "backward", 1)
    stopped = run([PROGRAMS[name].file, *PROGRAMS[name].start(flag, "1")], home, moment)
    assert (stopped.status, stopped.err) == (0, ""), stopped
    assert_none_is_left(stopped)
    every = [word for pair in zip(PROGRAMS[name].often[::2], PROGRAMS[name].often[1::2], strict=True) for word in pair]
    resumed = run([PROGRAMS[name].file, *stopped.resume[1:], *every], home).done()
    assert_none_is_left(resumed)
    assert_same(written(home), reference(name).written)


def assert_none_is_left(outcome: Outcome) -> None:
    """A data worker notices within seconds that its program is gone."""
    deadline = time.monotonic() + 20
    while alive := [number for number in Path("/proc").glob("[0-9]*") if _lives_in(number, outcome.group)]:
        assert time.monotonic() < deadline, [(number / "cmdline").read_text() for number in alive]
        time.sleep(0.05)


def _lives_in(process: Path, group: int) -> bool:
    try:
        return os.getpgid(int(process.name)) == group and " (Z" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@EACH
def test_killed_at_every_moment(name: str, tmp_path: Path) -> None:
    for place, moment in enumerate(kill_moments(name)):
        survive(name, tmp_path / str(place), moment)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("act", STATUS)
def test_asked_to_stop_at_every_moment(name: str, act: str, tmp_path: Path) -> None:
    for phase in COMPUTING:
        for moment in draw(name, act, phase, MANY // 2):
            survive(name, tmp_path / f"{phase} {moment.number}", moment)
    for phase in SAVING[2:]:
        for moment in draw(name, act, phase, 1):
            survive(name, tmp_path / f"{phase} {moment.number}", moment)


@pytest.mark.slow
@EACH
def test_killed_again_while_resuming(name: str, tmp_path: Path) -> None:
    choose = random.Random(name)
    moments = list(kill_moments(name))
    for place in range(PAIRS):
        first, second = choose.sample(moments, 2)
        survive(name, tmp_path / str(place), first, Moment(second.phase, max(1, second.number // 3), "SIGKILL"))


@pytest.mark.parametrize("name", ["gft", "ffvt"])
def test_the_loss_scale_of_half_precision_is_resumed(name: str, tmp_path: Path) -> None:
    """FFVT starts at 2^20, which overflows and is halved in the first steps."""
    half = ("--precision", "fp16")
    whole, home = (new_home(tmp_path / place, name, True) for place in ("whole", "home"))
    resume(name, whole, [], *half)
    record = json.loads((run_folder(whole) / "record.json").read_text(encoding="utf-8"))
    assert (record["precision"], record["skipped_updates"] > 0) == ("fp16", name == "ffvt")
    last = saves(reference(name), "renamed")["last.pt"]
    resume(name, home, [Moment("renamed", last[1], "SIGKILL")], *half)
    assert_same(written(home), written(whole))
