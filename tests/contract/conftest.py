"""The table of docs/reliability.md, from the outcomes of `make faults`."""

import platform
import re
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from contract.programs import PROGRAMS

HEAD = """# Reliability: what was broken on purpose, and what held

Made by `make faults`; do not edit. A row is a test of `tests/contract`, which runs the programs as a user does: `held`,
or in how many of its cases it held. A case may be many moments: runs are killed at every phase of a step and of the
saving of every file, and the resumed run must equal one that was left alone, bit for bit. No GPU was used.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="write the table of outcomes to this page, if all tests passed")


def pytest_configure(config: pytest.Config) -> None:
    page = config.getoption("--reliability", None)  # none: the whole suite has not asked this folder for options
    if page is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Table(page))


class _Table:
    def __init__(self, page: Path) -> None:
        self.page, self.started = page, time.time()
        self.held: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or report.skipped:
            return
        file, _, test = report.nodeid.partition("::")
        name, _, case = test.partition("[")
        programs = [program for program in PROGRAMS if re.search(rf"\b{program}\b", case)]
        row = (Path(file).stem.removeprefix("test_"), name.removeprefix("test_").replace("_", " "))
        self.held[row][programs[0] if programs else "all"] += report.passed

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus != 0:
            return
        lines = [HEAD, f"{time.strftime('%Y-%m-%d')}, {time.time() - self.started:.0f} s, {platform.machine()}, "]
        lines[-1] += f"Python {platform.python_version()}, torch {torch.__version__}."
        columns = [*PROGRAMS, "all"]
        for part in dict.fromkeys(part for part, _ in self.held):
            lines += ["", f"## {part.capitalize()}", "", f"| promise | {' | '.join(columns)} |", "|---" * 6 + "|"]
            for (where, promise), held in self.held.items():
                if where == part:
                    cells = ["-" if not held[column] else str(held[column]) for column in columns]
                    lines.append(f"| {promise} | {' | '.join(cells)} |")
        self.page.write_text("\n".join(lines) + "\n", encoding="utf-8")
