"""Runs on several processes: the same figures on any number; one that ends or hangs does not go unnoticed."""

import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from scripts import Outcome

from common.checkpoint import load_state
from faults.cases import FFVT, GFT, GLSIM, Case
from faults.inside import assert_same_run, home
from faults.processes_runs import (
    PROGRAMS,
    STEPS,
    TIMEOUT,
    Launch,
    assert_done,
    differences,
    plain,
    reference,
    run_folder,
    torchrun,
    two_nodes,
)

SECTION = "Several processes"
TOLERANCE = 1e-5  # of a loss between 0.5 and 4 in fp32; the largest difference measured was 5e-7
KILLED = "it was killed or has crashed, its launcher says how"
# Place, call and rank at which a process breaks; two processes but for the last.
MOMENTS = {
    "in the forward pass": "1:forward:4",
    "in the backward pass": "0:backward:5",
    "in an evaluation": "1:evaluation:1",
    "in a save": "0:save:2",
}

ABOUT = """
## How processes are lost

The runs are those of 12 images a step over all processes, on digits, without dropout (of which each process draws its
own): 67 images, two epochs, two evaluations, a save at every second step. All use gloo on loopback. Processes are
killed, stopped or put to sleep by themselves, at the n-th forward pass, image or save of one rank. "Plain" launches
give each process its RANK and WORLD_SIZE, as srun does, and nobody ends the others when one ends: they have to
leave by themselves. The sentence of the others has to be all that they say.
"""


def cases() -> list[Case]:
    return [case for entry in (GFT, FFVT, GLSIM) for case in _of(entry)]


def _of(entry: str) -> Iterator[Case]:
    make = partial(_case, entry)
    for size in (2, 3):
        promise = f"losses as on one within {TOLERANCE:g}, equal counts on 67 images"
        yield make(f"the batch shared by {size} processes", promise, "one run", partial(alike, entry, size))
    yield make("two nodes, a launcher each", "bit-identical to one node", "one run", partial(nodes, entry))
    if entry == GFT:
        promise = f"goes on in the same order, losses within {TOLERANCE:g}"
        yield make("resumed on other numbers of processes", promise, "--released: 2, 3, 1", partial(regrouped, entry))
    promise = "refused in a sentence where it would be another training"
    yield make("resumed on another number of processes", promise, "2, then 1", partial(refused, entry))

    promise = "the others end within 60 s, each with one sentence"
    for moment, place in MOMENTS.items():
        quick = (entry, moment) == (GFT, "in the backward pass")
        yield make("a process killed", promise, moment, partial(killed, entry, place, 2), quick)
    yield make("a process killed", promise, "one of three", partial(killed, entry, "2:backward:5", 3))
    yield make("a process calls _exit", promise, "in the forward pass", partial(left, entry))
    promise = "ends all within 60 s; its reason is told, and no traceback but its own"
    yield make("a defect in one process", promise, "RuntimeError", partial(failed, entry, "raise", torchrun))
    quick = entry == GLSIM
    yield make(
        "an unreadable image in one process", promise, "plain", partial(failed, entry, "unreadable", plain), quick
    )

    promise = "--dist-timeout names it and the step, the others end"
    for name, broken, size in (
        ("the first", "0:image:20:stop", 2),
        ("the second", "1:image:20:stop", 2),
        ("one of three", "1:image:14:stop", 3),
    ):
        yield make("a process stopped (SIGSTOP)", promise, name, partial(hung, entry, broken, size))
    name, check = "in a transform", partial(hung, entry, "1:image:20:sleep", 2)
    yield make("a process sleeps for ever", promise, name, check, entry == FFVT)
    if entry == GFT:
        promise = "--dist-timeout names it and the step, torchrun ends all"
        yield make("a process stopped under torchrun", promise, "the first", partial(hung_under_torchrun, entry))

    promise = "recovers by itself, bit-identical"
    for name, broken in (("in the backward pass", "1:backward:5:kill"), ("in a save", "0:save:5:kill")):
        quick = (entry, name) == (FFVT, "in the backward pass")
        yield make("killed under torchrun --max-restarts 2", promise, name, partial(restarted, entry, broken), quick)
    for name, lost, other in (("of the first", 0, 1), ("of the second", 1, 0)):
        check = partial(restarted_on_two_nodes, entry, lost, other)
        yield make("killed on one of two nodes, --max-restarts 2", promise, name, check)
    yield make("killed before the first save, restarts", "starts anew, no stale run taken", "", partial(anew, entry))
    yield make("killed after the record, restarts", "is left as it is, exit 0", "", partial(finished, entry))
    if entry == GFT:
        promise = "recovers by itself, bit-identical"
        yield make(
            "killed again in a resumed run, restarts", promise, "--resume", partial(resumed_and_restarted, entry)
        )

    promise = "all save and end, resumed bit-identical"
    yield make("SIGTERM to torchrun", promise, "after step 4", partial(terminated, entry))
    for name, ranks in (("to all", (0, 1)), ("to one", (1,))):
        yield make("SIGUSR1 to the processes", promise, name, partial(warned, entry, ranks))


def _case(entry: str, fault: str, promise: str, name: str, check: "partial[int]", quick: bool = False) -> Case:
    return Case(SECTION, fault, entry, promise, name, check, quick)


def alike(entry: str, size: int, folder: Path) -> int:
    assert max(differences(reference(entry, size), reference(entry, 1))) < TOLERANCE
    return 1


def nodes(entry: str, folder: Path) -> int:
    with two_nodes(entry, home(folder / "home"), PROGRAMS[entry].command(2)) as launch:
        first, second = launch.end()
    assert_done([first, second])
    assert sum(outcome.out.count("record: ") for outcome in (first, second)) == 1
    assert_same_run(run_folder(entry, folder / "home"), reference(entry, 2))
    return 1


def regrouped(entry: str, folder: Path) -> int:
    place, words = home(folder / "home"), [*PROGRAMS[entry].command(2), "--released"]
    for size, broken in ((2, "0:save:4:kill"), (3, "0:save:2:kill"), (1, "")):
        with plain(entry, place, size, words, broken) as launch:
            outcomes = launch.end()
        words = [*words[: len(PROGRAMS[entry].command(2)) + 1], "--resume"]
        assert (outcomes[0].status == 0) == (not broken), outcomes
    assert max(differences(run_folder(entry, place), reference(entry, 1, ("--released",)))) < TOLERANCE
    return 1


def refused(entry: str, folder: Path) -> int:
    place, words = home(folder / "home"), PROGRAMS[entry].command(2)
    with plain(entry, place, 2, words, "0:save:4:kill") as launch:
        launch.end()
    with plain(entry, place, 1, [*words, "--resume"]) as launch:
        (outcome,) = launch.end()
    what = "each with a moving average of its own" if entry == GFT else "with a batch of 12 in all"
    sentence = rf".*last\.pt was saved by 2 processes,? {what}: resume with as many, not with 1"
    assert outcome.status == 1, outcome
    assert re.fullmatch(rf"{re.escape(entry)}: error: {sentence}\n", outcome.err), outcome.err
    return 1


def killed(entry: str, place: str, size: int, folder: Path) -> int:
    return _lost(entry, f"{place}:kill", size, -signal.SIGKILL, folder)


def left(entry: str, folder: Path) -> int:
    return _lost(entry, "1:forward:4:exit", 2, 3, folder)


def _lost(entry: str, broken: str, size: int, status: int, folder: Path) -> int:
    rank = int(broken[0])
    with plain(entry, home(folder / "home"), size, PROGRAMS[entry].command(size), broken) as launch:
        outcomes = launch.end()
    assert (outcomes[rank].status, said(outcomes[rank])) == (status, "")
    for other, outcome in enumerate(outcomes):
        if other != rank:
            # Who waits for another that is left hears of the loss only when that one leaves, and cannot answer it.
            one = rf"(process {rank}|one of the processes \d, \d)" if size > 2 else rf"process {rank}"
            _assert_sentence(entry, outcome, rf"process {other} lost {one} after step \d+: {KILLED}")
    load_state(run_folder(entry, folder / "home") / "last.pt")
    return 1


def failed(entry: str, how: str, start: Callable[..., Launch], folder: Path) -> int:
    place = home(folder / "home")
    with start(entry, place, 2, PROGRAMS[entry].command(2), f"1:image:20:{how}") as launch:
        outcomes = launch.end()
    reason = "RuntimeError: broken on purpose" if how == "raise" else "broken.jpg cannot be read"
    repeated = rf"process 0 stops after step 3 because process 1 failed: {reason}"
    if start is plain:
        _assert_sentence(entry, outcomes[0], repeated)
        _assert_sentence(entry, outcomes[1], reason)
    else:
        (outcome,) = outcomes
        assert outcome.status == 1
        assert outcome.err.count("in _raise") == 1, outcome.err  # the traceback of the process that failed
        assert "gloo" not in outcome.err
    return 1


def hung(entry: str, broken: str, size: int, folder: Path) -> int:
    rank, place = int(broken[0]), home(folder / "home")
    words = [*PROGRAMS[entry].command(size), "--dist-timeout", str(TIMEOUT)]
    with plain(entry, place, size, words, broken) as launch:
        outcomes = launch.end(without=[rank])
        waited = time.time() - (run_folder(entry, place) / "log.jsonl").stat().st_mtime
    assert TIMEOUT - 1 < waited < TIMEOUT + 60
    for other, outcome in enumerate(outcomes):
        if other != rank:
            _assert_sentence(entry, outcome, _no_answer(rank, other))
    return 1


def hung_under_torchrun(entry: str, folder: Path) -> int:
    words = [*PROGRAMS[entry].command(2), "--dist-timeout", str(TIMEOUT)]
    with torchrun(entry, home(folder / "home"), 2, words, "0:image:20:stop") as launch:
        (outcome,) = launch.end()
    assert outcome.status == 1
    assert len(re.findall(_no_answer(0, 1), outcome.err)) == 1, outcome.err
    return 1


def _no_answer(rank: int, other: int) -> str:
    return (
        rf"no answer from process {rank} after step 3 within the {TIMEOUT} s of --dist-timeout: it hangs, or needs "
        rf"longer \(process {other} says so\)"
    )


def _assert_sentence(entry: str, outcome: Outcome, sentence: str) -> None:
    """The process ended with this one sentence."""
    assert outcome.status == 1, outcome
    assert re.fullmatch(rf"{re.escape(entry)}: error: {sentence}\n", said(outcome)), outcome.err


def said(outcome: Outcome) -> str:
    """Standard error without torch's own warnings, some of which have a stack of C++ below them."""
    lines = outcome.err.splitlines(keepends=True)
    noise = re.compile(r"\[(rank\d+\]: ?\[)?[WE]\d{4} |frame #|Exception raised from |\n$|<omitting python frames>")
    return "".join(line for line in lines if not noise.match(line))


def _restarting(entry: str, place: Path, broken: str, words: Sequence[str] = (), restarts: int = 2) -> Outcome:
    options = ["--max-restarts", str(restarts)]
    with torchrun(entry, place, 2, [*PROGRAMS[entry].command(2), *words], broken, options) as launch:
        (outcome,) = launch.end()
    return outcome


def restarted(entry: str, broken: str, folder: Path) -> int:
    outcome = _restarting(entry, home(folder / "home"), broken)
    assert outcome.status == 0, outcome
    run = run_folder(entry, folder / "home")
    assert f"started again by the launcher: going on with {run.relative_to(folder / 'home')}\n" in outcome.out
    assert_same_run(run, reference(entry, 2))
    return 1


def restarted_on_two_nodes(entry: str, lost: int, other: int, folder: Path) -> int:
    """The other does not notice before its launcher ends it, which does not count that as a restart of its own."""
    place, options = home(folder / "home"), ["--max-restarts", "2"]
    broken = f"{lost}:backward:5:kill,{other}:backward:5:nap"
    with two_nodes(entry, place, PROGRAMS[entry].command(2), broken, options) as launch:
        outcomes = launch.end()
    assert_done(outcomes)
    run = run_folder(entry, place)
    going_on = f"started again by the launcher: going on with {run.relative_to(place)}\n"
    assert sum(outcome.out.count(going_on) for outcome in outcomes) == 1, outcomes
    assert_same_run(run, reference(entry, 2))
    return 1


def anew(entry: str, folder: Path) -> int:
    """An unfinished run of an earlier launch stands there, which this one must not take."""
    place = home(folder / "home")
    assert _restarting(entry, place, "0:save:4:kill", restarts=0).status == 1
    stale = run_folder(entry, place)
    before = (stale / "last.pt").read_bytes()
    outcome = _restarting(entry, place, "1:state:1:kill")
    assert outcome.status == 0, outcome
    assert "started again" not in outcome.out
    (run,) = (path.parent for path in (place / "runs").glob("*/*/record.json"))
    assert run != stale
    assert (stale / "last.pt").read_bytes() == before
    assert_same_run(run, reference(entry, 2))
    return 1


def finished(entry: str, folder: Path) -> int:
    outcome = _restarting(entry, home(folder / "home"), "0:goodbye:1:kill")
    assert outcome.status == 0, outcome
    assert "was finished before the launcher started this again" in outcome.out
    assert_same_run(run_folder(entry, folder / "home"), reference(entry, 2))
    return 1


def resumed_and_restarted(entry: str, folder: Path) -> int:
    place = home(folder / "home")
    assert _restarting(entry, place, "0:save:3:kill", restarts=0).status == 1
    outcome = _restarting(entry, place, "1:backward:4:kill", ["--resume"])
    assert outcome.status == 0, outcome
    assert outcome.out.count("resumed at step 2 ") == 1, outcome.out
    assert outcome.out.count("started again by the launcher") == 1, outcome.out
    assert_same_run(run_folder(entry, place), reference(entry, 2))
    return 1


def terminated(entry: str, folder: Path) -> int:
    place, words = home(folder / "home"), PROGRAMS[entry].command(2)
    with torchrun(entry, place, 2, words) as launch:
        launch.wait_for_step(4)
        launch.processes[0].send_signal(signal.SIGTERM)
        (outcome,) = launch.end()
    _resume_stopped(entry, place, outcome, "SIGTERM")
    return 1


def warned(entry: str, ranks: Sequence[int], folder: Path) -> int:
    place, words = home(folder / "home"), PROGRAMS[entry].command(2)
    with plain(entry, place, 2, words) as launch:
        launch.wait_for_step(4)
        for rank in ranks:
            launch.processes[rank].send_signal(signal.SIGUSR1)
        outcomes = launch.end()
    assert_done(outcomes)
    assert [said(outcome) for outcome in outcomes] == ["", ""]
    _resume_stopped(entry, place, outcomes[0], "SIGUSR1")
    return 1


def _resume_stopped(entry: str, place: Path, outcome: Outcome, name: str) -> None:
    """The run was stopped before its end and saved; resumed by the command that it says, it ends as if alone."""
    (sentence,) = [line for line in outcome.out.splitlines() if line.startswith(f"stopped by {name} after step ")]
    step = int(sentence.split()[5])
    assert load_state(run_folder(entry, place) / "last.pt")["step"] == step < STEPS
    command = shlex.split(sentence.partition("continue with: ")[2])
    assert command[:3] == ["torchrun", "--nproc_per_node", "2"], sentence
    assert Path(command[3]).name == Path(entry).name
    workers = "--cpu_workers" if entry == GLSIM else "--workers"
    frequency = "--log_freq" if entry == GLSIM else "--log-every"
    with torchrun(entry, place, 2, [*command[4:], workers, "0", frequency, "1", "--save-every", "2"]) as launch:
        assert_done(launch.end())
    assert_same_run(run_folder(entry, place), reference(entry, 2))
