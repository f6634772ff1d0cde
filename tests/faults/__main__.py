"""`python -m faults` (in tests/): runs all fault cases, prints the table, writes docs/reliability.md if asked to."""

import argparse
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from tqdm import tqdm

from common.provenance import versions
from faults import families
from faults.cases import ENTRIES, Case
from faults.report import Outcome, page, table


@dataclass(frozen=True)
class _Job:
    case: Case

    def __call__(self) -> Outcome:
        folder = Path(tempfile.mkdtemp(prefix="fault-"))
        started = time.perf_counter()
        try:
            trials, failure = self.case.check(folder), ""
        except Exception:  # whatever a case trips over is its failure, and is shown
            trials, failure = 1, traceback.format_exc()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Outcome(self.case, trials, failure, time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose title contains this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", type=Path, help="the page that the table goes to (all cases must be run)")
    arguments = parser.parse_args()
    cases = [case for case in families.all_cases() if arguments.only in case.title]
    if not cases or (arguments.write and arguments.only):
        parser.error("no case has such a title" if not cases else "--write is for all cases")
    assert all(case.entry in ENTRIES for case in cases)
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        futures = [pool.submit(_Job(case)) for case in cases]
        for future in tqdm(as_completed(futures), total=len(futures), desc="faults"):
            outcome = future.result()
            outcomes.append(outcome)
            if outcome.failure:
                tqdm.write(f"FAILED {outcome.case.title}\n{outcome.failure}")
    order = {case: number for number, case in enumerate(cases)}
    outcomes.sort(key=lambda outcome: order[outcome.case])
    print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.failure]
    minutes = (time.perf_counter() - started) / 60
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} cases kept their promise, {minutes:.1f} minutes")
    if arguments.write and not failed:
        found = versions()
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, no GPU used"
        run = {"date": time.strftime("%Y-%m-%d"), "command": "make faults", "machine": machine}
        run |= {name: found[name] for name in ("code", "python", "torch", "timm")} | {"minutes": f"{minutes:.0f}"}
        arguments.write.write_text(page(outcomes, run, families.about()), encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
