"""`python -m faults` (in tests/): runs all fault cases, prints the table, writes docs/reliability.md if asked to.

A command that was broken off, or whose cases failed, goes on where it stood with `--keep FILE`: a case that has kept
its promise stands there with the version of the code, and is not run again. The page names all these versions.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from tqdm import tqdm

from common.provenance import versions
from faults import families
from faults.cases import ENTRIES, Case
from faults.report import Outcome, attempt, page, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose title contains this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", type=Path, help="the page that the table goes to (all cases must be run)")
    parser.add_argument("--keep", type=Path, help="a file for what was found, and of what need not be run again")
    arguments = parser.parse_args()
    cases = [case for case in families.all_cases() if arguments.only in case.title]
    if not cases or (arguments.write and arguments.only):
        parser.error("no case has such a title" if not cases else "--write is for all cases")
    assert all(case.entry in ENTRIES for case in cases)
    assert len({case.key for case in cases}) == len(cases)
    order = [case.key for case in cases]
    outcomes = _kept(arguments.keep, cases)
    done = {outcome.case.key for outcome in outcomes}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        futures = [pool.submit(attempt, case) for case in cases if case.key not in done]
        for future in tqdm(as_completed(futures), total=len(futures), desc="faults"):
            outcome = future.result()
            outcomes.append(outcome)
            if outcome.failure:
                tqdm.write(f"FAILED {outcome.case.title}\n{outcome.failure}")
            elif arguments.keep:
                _keep(outcome, arguments.keep)
    outcomes.sort(key=lambda outcome: order.index(outcome.case.key))
    print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.failure]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} cases kept their promise")
    if arguments.write and not failed:
        found = versions()
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU used"
        run = {
            "command": "make faults",
            "machine": machine,
            **{name: found[name] for name in ("python", "torch", "timm")},
        }
        arguments.write.write_text(page(outcomes, run, families.about()), encoding="utf-8")
    return int(bool(failed))


def _keep(outcome: Outcome, path: Path) -> None:
    values = {name: getattr(outcome, name) for name in ("trials", "seconds", "date", "code")}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"case": outcome.case.key, **values}) + "\n")


def _kept(path: Path | None, cases: Sequence[Case]) -> list[Outcome]:
    if path is None or not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {tuple(line.pop("case")): line for line in lines}
    return [Outcome(case, failure="", **found[case.key]) for case in cases if case.key in found]


if __name__ == "__main__":
    sys.exit(main())
