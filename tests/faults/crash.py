"""Runs that are killed or asked to stop at exact moments, and resumed: they must end as if nothing had happened."""

import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from faults.cases import FFVT, GFT, GLSIM, Case
from faults.crash_moments import COMPUTING, SAVING
from faults.crash_runs import PROGRAMS, Kill, reference, survive

SECTION = "Killed and stopped"
SIGNALS = {"SIGKILL": 20, "SIGTERM": 20, "SIGINT": 20, "SIGUSR1": 5}  # moments in each of COMPUTING
# Moments in each of SAVING: GLSim writes nine files, and all programs some of theirs more often.
SAVES = {"SIGKILL": 10, "SIGTERM": 4, "SIGINT": 4, "SIGUSR1": 2}
PAIRS = 20  # of two kills, the second in the resumed run
AFTERWARDS = {
    "SIGKILL": "resumed bit-identical",
    "SIGTERM": "saved, exit 0, resumed bit-identical",
    "SIGINT": "saved, exit 130, resumed bit-identical",
    "SIGUSR1": "saved, exit 0, resumed bit-identical",
}

ABOUT = """
## How runs are killed

A moment is the n-th operation of torch in all forward passes of a run together (or backward passes, optimizer steps,
evaluations), or the n-th time that a file comes to a part of its saving; n is drawn from a seed that is the name of the
case. At that moment the process sends itself the signal. The run has nine steps on digits, an evaluation after every
third, and a save at these and at every second step; GFT's and GLSim's have dropout, GLSim's mixes images too.

The promise is kept if every file that then stands under its final name is whole, the run ended as the signal lets it
(SIGTERM and SIGUSR1: exit 0 and the command that resumes; SIGINT: exit 130 and that command; a signal in the last
writes of a run may find it done), and the resumed run ends with the files of a run that was left alone: state of model,
optimizer and schedule, best weights, published checkpoints, metrics, record, tables, log with the learning rates, and
curves are equal bit for bit, dates and speeds apart; nothing is left of half-written files, and the published files of
an earlier run are kept. Before the first checkpoint --resume refuses in one sentence, and the run is started anew.
"""


def cases() -> list[Case]:
    return [case for number, entry in enumerate((GFT, FFVT, GLSIM)) for case in _of(number, entry)]


def _of(place: int, entry: str) -> Iterator[Case]:
    for row, (signal, moments) in enumerate(SIGNALS.items()):
        for column, phase in enumerate(COMPUTING):
            check = partial(in_computing, entry, signal, phase)
            quick = row < 3 and (place + row + column) % 3 == 0  # each phase once, each signal at least once
            yield from _split(f"{signal} in the {phase}", entry, AFTERWARDS[signal], moments, check, quick)
        for part in SAVING:
            quick = signal == "SIGKILL" and (entry == GFT or part in SAVING[1::3])
            check = partial(in_saving, entry, signal, part)
            promise = f"files whole, {AFTERWARDS[signal]}"
            yield from _split(f"{signal} in a save, {part}", entry, promise, SAVES[signal], check, quick)
    promise = f"no worker is left, {AFTERWARDS['SIGKILL']}"
    yield from _split("any of these with a data worker", entry, promise, 6, partial(with_worker, entry), entry == GLSIM)
    promise = "files whole, resumed bit-identical"
    yield from _split("killed again while resuming", entry, promise, PAIRS, partial(twice, entry), entry == FFVT)


def _split(fault: str, entry: str, promise: str, moments: int, check: "partial[int]", quick: bool) -> Iterator[Case]:
    """The first moment is a case of its own, which `make test` runs too if `quick`."""
    yield Case(SECTION, fault, entry, promise, "the first moment", partial(check, range(1)), quick)
    yield Case(SECTION, fault, entry, promise, f"{moments - 1} more moments", partial(check, range(1, moments)))


def in_computing(entry: str, signal: str, phase: str, which: Iterable[int], folder: Path) -> int:
    moments = range(1, reference(entry).counts[phase] + 1)
    numbers = random.Random(f"{entry} {signal} {phase}").sample(moments, SIGNALS[signal])
    return _survive_each(entry, [[Kill(signal, phase, numbers[trial])] for trial in which], folder)


def in_saving(entry: str, signal: str, part: str, which: Iterable[int], folder: Path) -> int:
    """SIGKILL meets each file once, then some of those that are written more often; the others some of all."""
    counts, draw = reference(entry).counts, random.Random(f"{entry} {signal} {part}")
    phases = sorted(phase for phase in counts if phase.endswith(f": {part}"))
    if signal == "SIGKILL":
        first = [f"{Path(name).name}: {part}" for name in (*PROGRAMS[entry].published, "last.pt")]
        more = [phase for phase in phases if counts[phase] > 1]
        chosen = [*first, *(phase for phase in phases if phase not in first)]
        chosen += [draw.choice(more) for _ in range(SAVES[signal] - len(chosen))]
    else:
        phases.remove(f"model.json: {part}")  # nothing is there to be saved yet: they end this program as any other
        chosen = draw.sample(phases, SAVES[signal])
    kills = [Kill(signal, phase, draw.randint(1, counts[phase])) for phase in chosen]
    return _survive_each(entry, [[kills[trial]] for trial in which], folder)


def with_worker(entry: str, which: Iterable[int], folder: Path) -> int:
    counts, draw = reference(entry).counts, random.Random(f"{entry} with a worker")
    kills = []
    for trial in range(6):
        phase = ("forward pass", "backward pass")[trial // 3]  # elsewhere a worker takes moments over
        kills.append(Kill(("SIGKILL", "SIGTERM", "SIGINT")[trial % 3], phase, draw.randint(1, counts[phase])))
    return _survive_each(entry, [[kills[trial]] for trial in which], folder, workers=1)


def twice(entry: str, which: Iterable[int], folder: Path) -> int:
    counts, draw = reference(entry).counts, random.Random(f"{entry} twice")
    last, best = (f"{name}: {SAVING[1]}" for name in ("last.pt", "best.safetensors"))
    evaluation = Kill("SIGTERM", "evaluation", draw.randint(1, counts["evaluation"] // 5))
    pairs = [[evaluation, Kill("SIGKILL", last, 1)], [Kill("SIGKILL", best, 1), Kill("SIGKILL", best, 1)]]
    for part in SAVING:  # the log is cut when a run is resumed
        phase = draw.choice(COMPUTING)
        pairs.append([Kill("SIGKILL", phase, draw.randint(1, counts[phase])), Kill("SIGKILL", f"log.jsonl: {part}", 1)])
    phases = [phase for phase in sorted(counts) if not phase.startswith("model.json")]
    while len(pairs) < PAIRS:
        one, other = (Kill(draw.choice([*SIGNALS]), phase, 0) for phase in draw.choices(phases, k=2))
        reached = max(1, counts[other.phase] // 3)  # about so far comes a run that is resumed
        pairs.append(
            [
                Kill(one.signal, one.phase, draw.randint(1, counts[one.phase])),
                Kill(other.signal, other.phase, draw.randint(1, reached)),
            ]
        )
    return _survive_each(entry, [pairs[trial] for trial in which], folder)


def _survive_each(entry: str, trials: Sequence[Sequence[Kill]], folder: Path, workers: int = 0) -> int:
    for kills in trials:
        try:
            survive(entry, folder / "home", kills, workers)
        except AssertionError as error:
            raise AssertionError(f"{entry}, {', then '.join(map(str, kills))}: {error}") from error
        shutil.rmtree(folder / "home")
    return len(trials)
