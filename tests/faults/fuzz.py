"""Files that nobody has checked: each reader of the product gets thousands of damaged and invented ones.

    python -m faults.fuzz --cases 1000000 --jobs 2              all targets (PYTHONPATH=.:tests)
    python -m faults.fuzz --only safetensors --cases 20000      those whose title contains this
    python -m faults.fuzz --replay "TITLE OF TARGET" FILE        one saved case again, with its traceback

A target is a reader and the files that it should read. A case is a file made of these by one to three mutations, or
drawn whole by hypothesis. It may be read, or be refused by a UserError in one printable line. Anything else is a
failure: another exception, more than CPU_LIMIT seconds, memory beyond GROWTH times the file plus SLACK, a dead process.
Cases are numbered: the same number of the same target is the same file on every run.
"""

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from common.errors import UserError, on_one_line
from faults.cases import Case
from faults.fuzz_bytes import flip_bits

CPU_LIMIT = 5.0  # seconds of computing that a case may take
CLOCK_LIMIT = 60  # seconds of waiting: a busy machine is no hang
GROWTH, SLACK = 10, 16 << 20  # bytes of memory for a byte of the file; what allocators and imports may keep beside it
SPACE = 6 << 30  # bytes of addresses beyond those at the start: a reader that asks for more gets a MemoryError
BLOCK = 500  # cases between two reports of a process
EACH = 4  # files that are mutated with the numbers of one draw
LONGEST = 2200  # characters of a sentence
KEPT = "kept"

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]  # (numbers, one seed, all seeds) -> a file


@dataclass(frozen=True)
class Target:
    """A reader that is to be fuzzed. All functions stand in a module: processes find them by their names."""

    name: str  # row of the table
    entry: str  # column of the table
    seeds: Callable[[Path], Sequence[bytes]]  # files that can be read; made once in each process, in an empty folder
    read: Callable[[Path], object]  # gets the path of one file; it may leave more beside it, which is deleted
    mutators: tuple[Mutator, ...]
    suffix: str = ""  # of the file's name, for readers that go by it
    structures: Callable[[], SearchStrategy[bytes]] | None = None  # whole files; a fifth of the cases
    weight: int = 1  # share of the cases

    @property
    def title(self) -> str:
        return f"{self.name} | {self.entry}"


@dataclass
class Figures:
    """What came of cases."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    growth: int = 0  # bytes; the largest of all cases
    failures: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # first words of the sentences

    def add(self, other: "Figures") -> None:
        for name in ("cases", "accepted", "refused", "seconds", "failures", "reasons"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.growth = max(self.growth, other.growth)


# One case


def check(target: Target, path: Path) -> str:
    """Read `path`: "" if it was accepted, the sentence of its refusal; every other exception passes."""
    try:
        target.read(path)
    except UserError as error:
        sentence = str(error)
        assert sentence.strip(), "a sentence of no words"
        assert on_one_line(sentence), f"not one printable line: {sentence!r}"
        assert len(sentence) <= LONGEST, f"a sentence of {len(sentence)} characters"
        return sentence
    return ""


def _measured(target: Target, path: Path) -> tuple[str, int]:
    """`check`, and the bytes by which the peak of resident memory grew."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmHWM")
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT)
    signal.alarm(CLOCK_LIMIT)
    try:
        sentence = check(target, path)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return sentence, _resident("VmHWM") - before


def _resident(name: str) -> int:
    with open("/proc/self/status", "rb") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name.encode()))


def _run_case(target: Target, content: bytes, folder: Path, figures: Figures) -> None:
    path = folder / f"case{target.suffix}"
    path.write_bytes(content)
    figures.cases += 1
    allowed = GROWTH * len(content) + SLACK
    started = time.process_time()
    try:
        sentence, growth = _measured(target, path)
        if growth > allowed:  # a first import, a cache that grew: what the file itself costs, it costs again
            gc.collect()
            path.write_bytes(content)
            sentence, growth = _measured(target, path)
        assert growth <= allowed, f"{growth >> 20} MiB of memory for a file of {len(content)} bytes"
    except Exception:
        figures.failures.append(_kept(target, content, traceback.format_exc()))
    else:
        figures.growth = max(figures.growth, growth)
        figures.accepted += not sentence
        figures.refused += bool(sentence)
        if sentence:
            figures.reasons[" ".join(sentence.replace(str(path), "FILE").split()[:6])] += 1
    figures.seconds += time.process_time() - started
    for extra in folder.iterdir():
        if extra == folder / KEPT:
            continue
        if extra.is_dir():
            shutil.rmtree(extra)
        elif extra != path:
            extra.unlink()


def _kept(target: Target, content: bytes, reason: str) -> str:
    """Save a failing file; returns how it failed and how to see that again."""
    name = f"{hashlib.sha256(content).hexdigest()[:16]}{target.suffix}"
    path = Path(tempfile.gettempdir()) / "fuzz-failures" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return f'{target.title}: {reason}\nagain with: python -m faults.fuzz --replay "{target.title}" {path}'


# A block of cases


def contents(target: Target, number: int, count: int, seeds: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The files of block `number`, in lists of EACH or one more."""
    structures = target.structures() if target.structures is not None else st.none()
    drawn: list[tuple[int, bytes | None]] = []

    # A generator of numbers and structures alone: the failing case is known, and is not to be made smaller.
    @hypothesis.seed(int.from_bytes(hashlib.sha256(f"{target.title} {number}".encode()).digest()[:8], "big"))
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1), structures)
    def draw(numbers: int, structure: bytes | None) -> None:
        drawn.append((numbers, structure))

    draw()
    for numbers, structure in drawn:
        rng = random.Random(numbers)
        files = [_mutated(target, rng, seeds) for _ in range(EACH)]
        yield files if structure is None else [*files, structure]


def _mutated(target: Target, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    content = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            content = rng.choice(target.mutators)(rng, content, seeds)
        except RecursionError:  # what the mutation before this one has nested cannot be copied
            content = flip_bits(rng, content, seeds)
    return content


@cache
def _folder() -> Path:
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=f"fuzz-{os.getpid()}-", dir=shared if shared.is_dir() else None))


@cache
def kept() -> Path:
    """A folder for what readers need beside a case; it stays as long as this process."""
    folder = _folder() / KEPT
    folder.mkdir()
    return folder


_SEEDS: dict[str, Sequence[bytes]] = {}  # by the title of their target: partials are equal to themselves alone


def _seeds(target: Target) -> Sequence[bytes]:
    """The target's seeds, each read once, so that nothing is imported or built while a case is measured."""
    if target.title not in _SEEDS:
        _SEEDS[target.title] = _made_seeds(target)
    return _SEEDS[target.title]


def _made_seeds(target: Target) -> Sequence[bytes]:
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    seeds = target.seeds(folder)
    shutil.rmtree(folder)
    for content in seeds:
        path = _folder() / f"case{target.suffix}"
        path.write_bytes(content)
        sentence = check(target, path)
        assert not sentence, f"a seed of {target.title} is refused: {sentence}"
    gc.collect()
    return seeds


def run_block(target: Target, number: int, count: int) -> Figures:
    """Run `count` cases of block `number` in this process, which dies of a hang."""
    figures = Figures()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        seeds = _seeds(target)
        each = EACH + (target.structures is not None)
        for files in contents(target, number, -(-count // each), seeds):
            for content in files:
                _run_case(target, content, _folder(), figures)
    return figures


def run_given(target: Target, files: Sequence[bytes]) -> Figures:
    """Run these files as cases, in this process."""
    figures = Figures()
    _seeds(target)
    for content in files:
        _run_case(target, content, _folder(), figures)
    return figures


def _begin() -> None:
    """Prepare a process: hangs kill it, and say first where it hung; no reader gets the whole machine's memory."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in (signal.SIGPROF, signal.SIGALRM):
        faulthandler.register(number, chain=True)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The signals' default action, which ends the process, leaves the folder; its owner removes it.


class Lane:
    """One process that runs blocks, and its successor where a case kills it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _begin)
        self.folder: Path = self.pool.submit(_folder).result()

    def run(self, target: Target, number: int, count: int) -> Figures:
        return self._run(target, count, run_block, number, count)

    def run_given(self, target: Target, files: Sequence[bytes]) -> Figures:
        return self._run(target, len(files), run_given, files)

    def _run(self, target: Target, count: int, work: Callable[..., Figures], *arguments: Any) -> Figures:
        try:
            return self.pool.submit(work, target, *arguments).result()
        except BrokenProcessPool:
            path = self.folder / f"case{target.suffix}"
            content = path.read_bytes() if path.exists() else b""
            reason = f"the process died or hung for {CPU_LIMIT:g} s (its traceback, if any, is on stderr)"
            figures = Figures(cases=count, failures=[_kept(target, content, reason)])
            self.close()
            self._start()
            return figures

    def close(self) -> None:
        self.pool.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


@cache
def _lane() -> Lane:
    """The lane of this process, for all its fault cases: a start takes seconds."""
    import atexit

    lane = Lane()
    atexit.register(lane.close)
    return lane


# As fault cases


def cases_of(section: str, targets: Sequence[Target], quick: int, full: int) -> list[Case]:
    """A quick fault case and a full one of each target, of so many files each for every unit of weight."""
    promise = "read, or refused in one sentence; no hang, no memory beyond 10 times the file"
    return [
        Case(
            section,
            target.name,
            target.entry,
            promise,
            name,
            partial(check_blocks, target, first, count),
            name == "quick",
        )
        for target in targets
        for name, first, count in (("quick", 0, quick * target.weight), ("full", 1000, full * target.weight))
    ]


def run_files(target: Target, files: Sequence[bytes]) -> Figures:
    """Run these files as cases in a process of their own."""
    return _lane().run_given(target, files)


def check_blocks(target: Target, first: int, count: int, folder: Path) -> int:
    """The check of a fault case: `count` files from block `first` on."""
    figures = Figures()
    while figures.cases < count:
        figures.add(_lane().run(target, first, min(BLOCK, count - figures.cases)))
        first += 1
    assert not figures.failures, f"{len(figures.failures)} of {figures.cases} failed, the first:\n{figures.failures[0]}"
    assert figures.refused, "no case was refused: the files are not damaged at all"
    return figures.cases


# As a program


def all_targets() -> list[Target]:
    from faults import untrusted_data, untrusted_weights

    return [*untrusted_weights.TARGETS, *getattr(untrusted_data, "TARGETS", ())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000, help="over all targets, by their weights")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="targets whose title (name | entry) contains this")
    parser.add_argument("--first", type=int, default=0, help="number of the first block")
    parser.add_argument("--reasons", type=int, default=0, help="show the most frequent refusals of each target")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    arguments = parser.parse_args()
    if arguments.replay:
        name, file = arguments.replay
        return _replay(next(target for target in all_targets() if target.title == name), Path(file))
    targets = [target for target in all_targets() if arguments.only in target.title]
    if not targets:
        parser.error("no target has such a title")
    return _report(targets, _fuzz(targets, arguments.cases, arguments.jobs, arguments.first), arguments.reasons)


def _replay(target: Target, file: Path) -> int:
    sentence = check(target, Path(shutil.copy(file, _folder() / f"case{target.suffix}")))
    print(f"refused: {sentence}" if sentence else "accepted")
    shutil.rmtree(_folder())
    return 0


def _fuzz(targets: Sequence[Target], cases: int, jobs: int, first: int) -> dict[str, Figures]:
    found = {target.title: Figures() for target in targets}
    share = cases / sum(target.weight for target in targets)
    blocks: list[tuple[Target, int, int]] = []
    counts: dict[str, int] = {}
    for target in targets:
        count = counts[target.title] = round(share * target.weight)
        blocks += [(target, first + n, min(BLOCK, count - n * BLOCK)) for n in range(-(-count // BLOCK))]
    lanes = [Lane() for _ in range(jobs)]
    # Every lane is fed by a thread of its own.
    pairs = list(zip(blocks, cycle(range(jobs)), strict=False))

    def feed(lane: int) -> None:
        for (target, number, count), mine in pairs:
            if mine == lane:
                figures = lanes[lane].run(target, number, count)
                for failure in figures.failures:
                    print(failure, file=sys.stderr, flush=True)
                found[target.title].add(figures)
                if found[target.title].cases >= counts[target.title]:
                    failed = len(found[target.title].failures)
                    print(f"{target.title}: {found[target.title].cases:,} cases, {failed} failed", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(feed, range(jobs)))
    for lane in lanes:
        lane.close()
    return found


def _report(targets: Sequence[Target], found: dict[str, Figures], reasons: int) -> int:
    total = Figures()
    print("| target | entry | cases | accepted | refused | failed | seconds | ms a case | largest growth, MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for target in targets:
        _print_row(target.name, target.entry, found[target.title])
        for reason, count in found[target.title].reasons.most_common(reasons):
            print(f"    {count:6} {reason}")
        total.add(found[target.title])
    _print_row("all", "", total)
    return int(bool(total.failures))


def _print_row(name: str, entry: str, figures: Figures) -> None:
    cells: tuple[Any, ...] = (
        *(name, entry, f"{figures.cases:,}", f"{figures.accepted:,}", f"{figures.refused:,}", len(figures.failures)),
        *(f"{figures.seconds:.1f}", f"{1000 * figures.seconds / max(1, figures.cases):.2f}"),
        f"{figures.growth / 2**20:.1f}",
    )
    print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    from faults import fuzz  # not as __main__, of whose functions other processes know nothing

    sys.exit(fuzz.main())
