"""The table of docs/reliability.md, from the outcomes of `make faults`."""

import platform
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from contract.programs import PROGRAMS

PARTS = ("interrupted", "resume", "machine", "processes", "malicious", "offline")  # tests/contract/test_{part}.py
COLUMNS = (*PROGRAMS, "others")
HEAD = """# Reliability: what was broken on purpose, and what held

Made by `make faults`; do not edit. A row is a test of `tests/contract`, which runs the programs as a user does. A cell
says in how many cases it held; `-`: it does not concern the program. If a case fails, this page is not written.

"At every moment" stands for dozens of cases: each phase of a step, and each phase of saving each file. After each of
them the run is resumed, and must end like a run that was left alone, bit for bit.

When a process dies, torchrun ends the others and reports which one it was.
`torchrun --max-restarts 2 ... --resume auto` starts them again, and they go on from the last save. No GPU was used.

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="write the table of outcomes to this page, if all tests passed")


def pytest_configure(config: pytest.Config) -> None:
    page = config.getoption("--reliability", None)  # none: the whole suite has not asked this folder for options
    if page is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Table(page))


class _Table:
    def __init__(self, page: Path) -> None:
        self.page, self.started = page, time.monotonic()
        self.held: Counter[tuple[str, str, str]] = Counter()  # part, promise, column

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = re.search(r"test_(\w+)\.py::test_(\w+)(?:\[(.*)\])?$", report.nodeid)
        if report.when == "call" and report.passed and found and found[1] in PARTS:
            named = (program for program in PROGRAMS if re.search(rf"\b{program}\b", found[3] or ""))
            self.held[found[1], found[2].replace("_", " "), next(named, COLUMNS[-1])] += 1

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus != 0:
            return
        seconds = time.monotonic() - self.started
        made = f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes, {platform.machine()}"
        lines = [f"| {made}, torch {torch.__version__} | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
        for part, promise in sorted({key[:2] for key in self.held}, key=lambda row: (PARTS.index(row[0]), row[1])):
            counts = [self.held[part, promise, column] for column in COLUMNS]
            lines.append(f"| {part}: {promise} | {' | '.join(str(count or '-') for count in counts)} |")
        self.page.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
