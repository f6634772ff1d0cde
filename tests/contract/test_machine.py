"""What the machine lacks is one sentence: room on the disk, a folder that can be written, memory of the GPU.

At whatever moment a disk breaks, every file is whole, and the run goes on when there is room again.
"""

import random
import shutil
from pathlib import Path

import pytest

from contract.programs import (
    PROGRAMS,
    Moment,
    Outcome,
    assert_same,
    content_of,
    new_home,
    reference,
    run,
    run_folder,
    start,
    written,
)

EACH = pytest.mark.parametrize("name", PROGRAMS)
MANY = 10  # moments for each program


def break_and_go_on(name: str, home: Path, moment: Moment) -> Outcome:
    """A run whose disk breaks at this moment; then one that goes on, which ends as if nothing had happened."""
    program = PROGRAMS[name]
    new_home(home, name, True)
    ended = run([program.file, *program.start()], home, moment)
    assert not list(home.rglob(".*.tmp"))
    found = [path for path in (home / "runs").glob("*/2*") if path.is_dir()]
    if ended.status == 0:
        assert_same(written(home), reference(name).written)
        return ended
    for path in (path for folder in found for path in folder.iterdir() if path.is_file()):
        if path.name != "log.jsonl":  # its last line may be cut short, which resuming mends
            content_of(path)  # fails where a file is damaged
    if found and (found[0] / "last.pt").exists():
        words = program.other("--resume", str(run_folder(home).relative_to(home)))
    else:
        for folder in found:
            shutil.rmtree(folder)
        words = program.start()
    run([program.file, *words], home).done()
    assert_same(written(home), reference(name).written)
    return ended


def number_of(name: str, file: str, which: int) -> int:
    """The moment at which this file, by its final name, is opened for writing."""
    return reference(name).moments["opened"][file][which]


@EACH
@pytest.mark.parametrize("act", ["full", "readonly"])
def test_a_disk_breaks_in_a_save(name: str, act: str, tmp_path: Path) -> None:
    """Of last.pt, when an earlier one is there: that stays, and the sentence names the file."""
    ended = break_and_go_on(name, tmp_path / "home", Moment("open", number_of(name, "last.pt", 1), act))
    ended.sentence("last.pt")


@EACH
@pytest.mark.parametrize("act", ["full", "readonly"])
@pytest.mark.slow
def test_a_disk_breaks_at_any_moment(name: str, act: str, tmp_path: Path) -> None:
    total = reference(name).moments["counts"]["open"]
    for number in random.Random(f"{name} {act}").sample(range(1, total + 1), MANY):
        ended = break_and_go_on(name, tmp_path / str(number), Moment("open", number, act))
        assert ended.status == 0 or ended.sentence()


@EACH
def test_a_folder_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    """Training and evaluation say so in one sentence; prediction, which writes nothing, answers."""
    program, home = PROGRAMS[name], new_home(tmp_path / "home", name)
    broken = Moment("start", 1, "readonly")
    folder = str(reference(name).folder)
    picture = min(path for path in (home / "runs" / "demo-data").rglob("*") if path.suffix in (".jpg", ".png"))
    before = sorted(home.rglob("*"))
    run([program.file, *program.start()], home, broken).sentence("runs")
    run([program.file, *program.other("--eval", folder)], home, broken).sentence("runs")
    run([program.file, *program.other("--predict", picture, "--checkpoint", folder)], home, broken).done()
    assert sorted(home.rglob("*")) == before


@EACH
def test_output_that_is_a_file(name: str, tmp_path: Path) -> None:
    program, home = PROGRAMS[name], new_home(tmp_path / "home", name)
    (home / "file").write_text("mine")
    words = ["file" if word == "runs" else word for word in program.start()]
    run([program.file, *words], home).sentence("file")
    assert (home / "file").read_text() == "mine"
    assert not list((home / "runs").glob("*/2*"))


@pytest.mark.slow
@EACH
def test_a_folder_with_an_odd_name(name: str, tmp_path: Path) -> None:
    """Trained, stopped, resumed and evaluated below it."""
    program, home = PROGRAMS[name], new_home(tmp_path / "a  b é 日本 [x] {y} #%&'\"(z); $HOME ~ *.txt", name, True)
    total = reference(name).moments["counts"]["forward"]
    stopped = run([program.file, *program.start()], home, Moment("forward", total // 2, "SIGTERM"))
    run([program.file, *stopped.resume[1:], *program.often], home).done()
    assert_same(written(home), reference(name).written)
    folder = run_folder(home)
    run([program.file, *program.other("--eval", folder, "--output", "évaluation")], home).done()


@pytest.mark.slow
@EACH
def test_one_run_is_resumed_by_two_at_once(name: str, tmp_path: Path) -> None:
    """One goes on, the other is refused."""
    program, home = PROGRAMS[name], new_home(tmp_path / "home", name, True)
    total = reference(name).moments["counts"]["backward"]
    run([program.file, *program.start()], home, Moment("backward", total // 3 + 700, "SIGKILL"))
    words = [program.file, *program.other("--resume", str(run_folder(home).relative_to(home)))]
    ended = [started.end() for started in [start(words, home), start(words, home)]]
    assert sorted(outcome.status for outcome in ended) == [0, 1], ended
    max(ended, key=lambda outcome: outcome.status).sentence(run_folder(home).name)
    assert_same(written(home), reference(name).written)


@EACH
def test_out_of_gpu_memory(name: str, tmp_path: Path) -> None:
    """The sentence names the flags that leave the experiment as it is, as this program spells them."""
    program, home = PROGRAMS[name], new_home(tmp_path / "home", name)
    sentence = run([program.file, *program.start()], home, Moment("forward", 50, "memory")).sentence("16 images")
    accumulate = (
        "--gradient_accumulation_steps" if name == "ffvt" else "--batch_size" if name == "glsim" else "--accumulate"
    )
    flags = [flag.strip(":,;()") for flag in sentence.split() if flag.startswith("--")]
    assert {accumulate, "--precision"} <= set(flags)
    known = run([program.file, "--help"], home).done().out
    assert all(flag in known for flag in flags)
