"""Disks that fill up, files that may not be written, odd places, and many runs at once."""

import functools
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import test_archive
import test_download
from safetensors.torch import load_file
from scripts import ROOT

from common.checkpoint import load_state, save_state
from common.log import Log
from common.metrics import Predictions, summarize
from common.records import read_record
from faults.cases import COMMON, ENTRIES, FFVT, GFT, GLSIM, Case
from faults.crash_runs import (
    EARLIER,
    PROGRAMS,
    Ended,
    Kill,
    Program,
    assert_equal,
    assert_whole,
    new_home,
    reference,
    server,
    what_was_written,
)
from faults.crash_runs import survive as survive_kills

SECTION = "Disk and files"
WRAPPER = str(Path(__file__).with_name("disk_run.py"))
SIZE = 64 << 20  # bytes of the small disk
ODD = "a  b é 日本 [x] {y} #%&'\"(z); $HOME ~ *.txt"
GROUPS = (1, 6, 6, 7)  # 20 moments for each entry point; the first group is quick


def run(words: Sequence[str], base: Path, home: Path, **specification: Any) -> Ended:
    """Runs a program in `home`; `specification` says what happens to it (disk_run), its output goes to `base`."""
    usual = {"home": str(home), "disk": str(home), "at": 0, "event": "", "left": 0, "counts": "", "copies": 1}
    return server().run([WRAPPER, json.dumps(usual | specification), *words], base, None)


def refusal(ended: Ended, *parts: str) -> str:
    """The one sentence on the screen of a run that did not succeed."""
    assert ended.status == 1, ended
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert ": error: " in lines[0], lines[0]
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a disk of its own."""
    with small_disk(Path("/tmp"), probe=True) as mounted:
        return mounted


@contextmanager
def small_disk(base: Path, probe: bool = False) -> Iterator[bool]:
    """base/disk is a tmpfs of SIZE, where this process may mount one."""
    disk = base / (f".probe-{os.getpid()}" if probe else "disk")
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)]
    mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        if probe:
            disk.rmdir()


def folder_of(home: Path, program: Program) -> Path:
    """Of the run there is one; it may have none yet."""
    return next(iter((home / "runs" / program.folder).glob("*/")), home / "nowhere")


# A full disk


@functools.cache
def writes_of(entry: str) -> int:
    """How often a whole run opens a file for writing."""
    program, like = PROGRAMS[entry], reference(entry)
    base = like.home.parent / "counted"
    home = new_home(base / "home", program, like.home)
    ended = run(program.start(0), base, home, counts=str(base / "count"))
    assert ended.status == 0, ended.err
    return int((base / "count").read_text())


def full_disk(entry: str, moments: range, folder: Path) -> int:
    """At seeded moments of a run, each another one, and in every second trial of the run that resumes it as well."""
    failed = 0
    for trial in moments:
        base = folder / str(trial)
        base.mkdir()
        with small_disk(base) as mounted:
            failed += _fill_and_go_on(entry, trial, base, "fill" if mounted else "limit")
    assert failed > len(moments) // 2, f"only {failed} of {len(moments)} disks were too small"
    return len(moments)


def _fill_and_go_on(entry: str, trial: int, base: Path, event: str) -> int:
    """One trial; returns how many of its runs have failed."""
    program, like = PROGRAMS[entry], reference(entry)
    choice = random.Random(f"{entry} {trial}")
    home = base / "disk"
    new_home(home, program, like.home)
    words, failed = program.start(0), 0
    moments = random.Random(entry).sample(range(1, writes_of(entry) + 1), sum(GROUPS))
    for at in (moments[trial], choice.choice(moments))[: 1 + trial % 2]:
        left = choice.choice((0, 0, 0, 4096, choice.randrange(1 << 20))) if trial else 0
        ended = run(words, base, home, at=at, event=event, left=left)
        (home / "filler").unlink(missing_ok=True)
        assert not list(home.rglob(".*.tmp")), list(home.rglob(".*.tmp"))
        if ended.status == 0:
            break
        failed += 1
        refusal(ended, "No space left on device" if event == "fill" else "File too large")
        found = folder_of(home, program)
        for path in [*found.glob("*"), *(home / name for name in program.published)]:
            if path.name != "log.jsonl":  # its last line may be cut short, which resuming mends
                assert_whole(path)
        words = program.start(0)
        if (found / "last.pt").exists():
            words = program.resume(found.relative_to(home), 0)
        elif found.exists():
            subprocess.run(["rm", "-r", found], check=True)
    else:
        ended = run(words, base, home)
    assert (ended.status, ended.err) == (0, ""), ended
    assert_equal(what_was_written(program, home), like.written, "")
    return failed


def full_disk_later(entry: str, folder: Path) -> int:
    """While a finished run is evaluated, and while predictions are written."""
    program, like = PROGRAMS[entry], reference(entry)
    finished = folder_of(like.home, program)
    pictures = some_pictures(like.home)
    for name, words in (("eval", evaluation(program, finished)), ("predict", prediction(program, finished, pictures))):
        base = folder / name
        base.mkdir()
        with small_disk(base) as mounted:
            home = new_home(base / "disk", program, like.home)
            event, reason = ("fill", "No space left") if mounted else ("limit", "File too large")
            refusal(run(words, base, home, at=1, event=event), reason)
            (home / "filler").unlink(missing_ok=True)
            assert not [path for path in home.rglob("*") if path.name in ("record.json", "p.csv")]
            assert not list(home.rglob(".*.tmp"))
            ended = run(words, base, home)
            assert (ended.status, ended.err) == (0, ""), ended
    return 2


def evaluation(program: Program, folder: Path) -> list[str]:
    return [
        str(ROOT / program.entry),
        *program.named,
        "--demo",
        "--limit",
        "48",
        "--eval",
        str(folder),
        "--output",
        "runs",
    ]


def prediction(program: Program, folder: Path, pictures: Sequence[str], out: str = "p.csv") -> list[str]:
    more = ["--checkpoint", str(folder), "--output", "runs", *(["--out", out] if out else [])]
    return [str(ROOT / program.entry), *program.named, "--demo", "--predict", *pictures, *more]


def some_pictures(home: Path) -> list[str]:
    found = sorted(str(path) for path in (home / "runs" / "demo-data").rglob("*") if path.suffix in (".jpg", ".png"))
    return found[:: len(found) // 3]


# Places


@contextmanager
def read_only(disk: Path, mounted: bool) -> Iterator[str]:
    """Nothing can be written below `disk`; gives what the system says to who tries."""
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield "Read-only file system"
    else:
        folders = [disk, *(path for path in disk.rglob("*") if path.is_dir() and not path.is_symlink())]
        for folder in folders:
            folder.chmod(0o555)
        yield "Permission denied"
        for folder in folders:
            folder.chmod(0o755)


def read_only_output(entry: str, folder: Path) -> int:
    program, like = PROGRAMS[entry], reference(entry)
    pictures = some_pictures(like.home)
    with small_disk(folder) as mounted:
        home = new_home(folder / "disk", program, like.home)
        ended = run(program.start(0), folder, home)
        assert ended.status == 0, ended.err
        finished = folder_of(home, program).relative_to(home)
        (home / finished / "record.json").unlink()
        before = sorted(home.rglob("*"))
        with read_only(home, mounted) as reason:
            for words in (
                program.start(0),
                program.resume(finished, 0),
                evaluation(program, finished),
                prediction(program, finished, pictures),
            ):
                refusal(run(words, folder, home), reason)
            ended = run(prediction(program, finished, pictures, out=""), folder, home)  # which writes nothing
            assert (ended.status, ended.err) == (0, ""), ended
        assert sorted(home.rglob("*")) == before
    return 5


def odd_place(entry: str, folder: Path) -> int:
    """Trained, stopped, resumed, evaluated and asked below a folder with an odd name."""
    program, like = PROGRAMS[entry], reference(entry)
    home = folder / ODD
    survive_kills(entry, home, [Kill("SIGTERM", "optimizer step", like.counts["optimizer step"] // 2)])
    finished = folder_of(home, program)
    pictures = [str(home / name) for name in ("é 1.jpg", "[2].jpg")]
    for source, picture in zip(some_pictures(like.home), pictures, strict=False):
        Path(picture).write_bytes(Path(source).read_bytes())
    for words in (evaluation(program, finished), prediction(program, finished, pictures, out=str(home / "é p.csv"))):
        ended = server().run(words, home, None)
        assert (ended.status, ended.err) == (0, ""), ended
    assert "[2].jpg" in (home / "é p.csv").read_text(encoding="utf-8")
    records = [read_record(path) for path in home.glob("runs/*/2*/record.json")]
    assert sorted(record["status"] for record in records) == ["evaluated", "finished"]
    return 4


def impossible_place(entry: str, folder: Path) -> int:
    program, like = PROGRAMS[entry], reference(entry)
    home = new_home(folder / "home", program, like.home)
    (home / "file").write_text("mine")
    places = ("file", "file/below", "x" * 300, "/proc/nowhere", "/dev/null")
    for place in places:
        words = [place if word == "runs" else word for word in program.start(0)]
        refusal(run(words, folder, home))
    assert (home / "file").read_text() == "mine"
    assert not list((home / "runs").glob(f"{program.folder}/*"))
    return len(places)


def removed_folder(entry: str, folder: Path) -> int:
    """The run's folder goes while it trains."""
    program, like = PROGRAMS[entry], reference(entry)
    choice = random.Random(entry)
    for trial in range(3):
        home = new_home(folder / str(trial) / "home", program, like.home)
        at = choice.randrange(6, writes_of(entry) - 3)
        refusal(run(program.start(0), home.parent, home, at=at, event="remove"), "No such file or directory")
        assert not [path for path in (home / "runs" / program.folder).rglob("*") if path.suffix in (".pt", ".json")]
    return 3


# Many at once


def together(entry: str, copies: int, folder: Path) -> int:
    """Runs that start in the same second."""
    program, like = PROGRAMS[entry], reference(entry)
    home = new_home(folder / "home", program, like.home)
    ended = run(program.start(0), folder, home, copies=copies)
    assert ended.status == 0, ended
    assert json.loads((home / "statuses").read_text()) == [0] * copies
    made = list((home / "runs" / program.folder).glob("*/"))
    assert len(made) == copies
    said = [re.search("^run folder: (.*)$", (home / f"out-{n}").read_text(), re.MULTILINE) for n in range(copies)]
    assert {str(path.relative_to(home)) for path in made} == {found[1] for found in said if found}
    expected = folder_of(like.home, program)
    for own in made:
        assert_equal(*(load_file(path / "best.safetensors") for path in (own, expected)), "best.safetensors")
        for name in ("best_per_class.csv", "best_confusion.csv"):
            assert (own / name).read_bytes() == (expected / name).read_bytes(), name
        steps = [json.loads(line)["step"] for line in (own / "log.jsonl").read_text().splitlines()]
        assert steps == [json.loads(line)["step"] for line in (expected / "log.jsonl").read_text().splitlines()]
        assert read_record(own / "record.json")["results"] == read_record(expected / "record.json")["results"]
    for name in program.published:
        whole = list((home / name).parent.glob("*"))
        assert sum(path.read_bytes() == EARLIER for path in whole) == len(program.published)
        for path in whole:
            assert_whole(path)
    return copies


def resumed_twice(entry: str, folder: Path) -> int:
    """Two that resume the same run at once: one does, the other says why not."""
    program, like = PROGRAMS[entry], reference(entry)
    home = new_home(folder / "home", program, like.home)
    server().run(program.start(0), home, Kill("SIGKILL", "optimizer step", like.counts["optimizer step"] // 3))
    words = program.resume(folder_of(home, program).relative_to(home), 0)
    run(words, folder, home, copies=2)
    statuses = json.loads((home / "statuses").read_text())
    assert sorted(statuses) == [0, 1], statuses
    (line,) = (home / f"out-{statuses.index(1)}").read_text().strip().splitlines()
    assert re.search(r" is (still being trained by process \d+ on|finished)", line), line
    assert_equal(what_was_written(program, home), like.written, "")
    return 1


# Long runs


def long_log(folder: Path) -> int:
    """10,000 epochs, of two lines each: the last are written as fast as the first; all can be read and cut."""
    epochs, part = 10_000, 1_000
    log = Log(folder, 0, False, {})
    spent = []
    for epoch in range(1, epochs + 1):
        started = time.process_time()
        log.write(
            "train", epoch, epoch=float(epoch), loss=1 / epoch, accuracy=0.5, lr=1e-5, images_per_s=9.5, skipped=0
        )
        log.write("val", epoch, epoch=float(epoch), correct=1, total=2, top1=0.5)
        spent.append(time.process_time() - started)
    log.close()
    assert sum(spent[-part:]) < 3 * sum(spent[:part]) + 1, (sum(spent[:part]), sum(spent[-part:]))
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [n for n in range(1, epochs + 1) for _ in range(2)]
    started = time.process_time()
    Log(folder, epochs // 2, False, {}).close()
    assert time.process_time() - started < 5
    assert len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()) == epochs
    return 2 * epochs


def long_history(folder: Path) -> int:
    """10,000 evaluations in last.pt: 200 bytes each, no more than a second to save and a few to read."""
    count = 10_000
    predictions = Predictions(
        *(np.zeros(shape, dtype) for shape, dtype in ((4, int), (4, int), ((4, 5), int), (4, float)))
    )
    metrics = summarize(predictions, 5, "val")
    history = [{"step": n, "epoch": n / 7, "val": metrics | {"loss": 1 / n}} for n in range(1, count + 1)]
    started = time.process_time()
    save_state(folder / "last.pt", {"history": history})
    assert time.process_time() - started < 2
    assert (folder / "last.pt").stat().st_size < 250 * count
    started = time.process_time()
    assert load_state(folder / "last.pt")["history"] == history
    assert time.process_time() - started < 10
    return count


# Downloads and archives: what tests/test_download.py and tests/test_archive.py do once more


def served(test: Callable[[Any, Path], None], trials: int, folder: Path) -> int:
    with test_download.serving() as of_its_own:
        test(of_its_own, folder)
    return trials


def archives(test: Callable[..., None], arguments: Sequence[tuple[Any, ...]], trials: int, folder: Path) -> int:
    for number, values in enumerate(arguments):
        (folder / str(number)).mkdir()
        test(folder / str(number), *values)
    return trials


def cases() -> list[Case]:
    found = [case for entry in (GFT, FFVT, GLSIM) for case in _of_program(entry)]
    assert {case.entry for case in found} <= set(ENTRIES)
    return found + _of_common()


def _of_program(entry: str) -> list[Case]:
    case = partial(Case, SECTION, entry=entry)
    same = "one sentence, no file damaged, no part of one left, resumed bit-identical"
    found = []
    first = 0
    for size in GROUPS:
        name = f"{size} of the moments, from {first + 1} on"
        check = partial(full_disk, entry, range(first, first + size))
        found.append(
            case("disk full at a seeded moment of a run", promise=same, name=name, check=check, quick=not first)
        )
        first += size
    rows: list[tuple[str, str, Any]] = [
        (
            "disk full in evaluation and prediction",
            "one sentence, no part of a file left, works when there is room",
            partial(full_disk_later, entry),
        ),
        (
            "output below a folder with blanks, other alphabets, quotes and wildcards",
            "trained, stopped, resumed bit-identical, evaluated, predicted",
            partial(odd_place, entry),
        ),
        ("output is a file, a device or too long a name", "one sentence", partial(impossible_place, entry)),
        ("the run's folder is removed while it trains", "one sentence", partial(removed_folder, entry)),
        (
            "runs started in the same second",
            "a folder each, every file that of its own run",
            partial(together, entry, 20 if entry == GFT else 6),
        ),
        (
            "a run resumed twice at once",
            "one goes on bit-identical, the other is refused",
            partial(resumed_twice, entry),
        ),
    ]
    if can_mount() or os.getuid():  # else nothing is read-only to this process
        rows.insert(
            1,
            (
                "read-only output: training, resuming, evaluation, prediction with and without --out",
                "one sentence, or success where nothing is written",
                partial(read_only_output, entry),
            ),
        )
    return found + [case(fault, promise=promise, name="", check=check) for fault, promise, check in rows]


def _of_common() -> list[Case]:
    case = partial(Case, SECTION, entry=COMMON, name="")
    right = "taken up again, the right file in the end"
    safe = "refused in one sentence, nothing unpacked"
    tests = test_archive
    both = [(name,) for name in tests.WRITERS]
    outside, again = _product(tests.OUTSIDE), _product(tests.AGAIN)
    rows: list[tuple[str, str, Any]] = [
        ("10,000 epochs of log lines", "readable, appended and cut at no growing cost", long_log),
        ("10,000 evaluations in last.pt", "saved in 2 s, 250 bytes each", long_history),
        (
            "download cut at a seeded moment",
            right,
            partial(served, test_download.test_cut_at_seeded_moments_and_called_again, 20),
        ),
        (
            "process killed in a download",
            right,
            partial(served, test_download.test_a_killed_process_leaves_what_the_next_one_takes_up, 1),
        ),
        (
            "processes that want the same download",
            "fetched once, found by all",
            partial(served, test_download.test_processes_that_want_the_same_file_fetch_it_once, 8),
        ),
        (
            "server that answers seeded nonsense",
            "the right file, or one sentence and no file",
            partial(served, test_download.test_seeded_nonsense_ends_in_a_file_or_a_sentence, 300),
        ),
        (
            "archive with ../, absolute paths or drives",
            safe,
            partial(archives, tests.test_members_outside_are_refused, outside, len(outside)),
        ),
        (
            "archive with links, devices or pipes",
            safe,
            partial(archives, tests.test_links_and_devices_are_refused, tests.SPECIAL, len(tests.SPECIAL)),
        ),
        (
            "archive with names that are there twice, or differ in case alone",
            safe,
            partial(archives, tests.test_a_name_that_is_there_twice_is_refused, again, len(again)),
        ),
        (
            "archive that inflates to more than 100 times its size",
            safe,
            partial(archives, tests.test_a_bomb_is_refused_before_it_is_inflated, both, 2),
        ),
        (
            "archive with a changed bit",
            "what was packed, or one sentence",
            partial(archives, tests.test_a_changed_byte_is_found_or_changes_nothing, both, 600),
        ),
    ]
    return [case(fault, promise=promise, check=check) for fault, promise, check in rows]


def _product(values: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, value) for name in test_archive.WRITERS for value in values]
