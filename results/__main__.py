"""Run records beside the papers' tables.

    python -m results                        every row of every paper, "not run" where nobody did
    python -m results --row gft_food101      one row with source, protocol, interval, records
    python -m results --csv                  unrounded, for programs
    python -m results --readme               writes results/README.md, of the records in results/records

What the verdicts mean stands in `results/compare.py`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from results.compare import compare, survey
from results.papers import published_row
from results.table import csv_table, details, footnotes, readme, text_table

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 where a file is no record, with 2 for an error of the user."""
    parser = argparse.ArgumentParser(prog="python -m results", description="Run records beside the papers' tables.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--row", metavar="ID", action="append", help="only this row, with details; repeatable")
    form.add_argument("--csv", action="store_true", help="print CSV with unrounded numbers")
    form.add_argument("--readme", nargs="?", const=HERE / "README.md", metavar="FILE", help="write results/README.md")
    parser.add_argument("--runs", metavar="DIR", help="folder of the run records [runs; for --readme results/records]")
    arguments = parser.parse_args(argv)
    runs_dir = Path(arguments.runs or (HERE / "records" if arguments.readme else "runs"))
    if arguments.runs and not runs_dir.is_dir():
        parser.exit(2, f"error: --runs {runs_dir}: there is no such folder; expected one with run records.\n")
    try:
        rows = [published_row(row_id) for row_id in arguments.row] if arguments.row else None
    except ValueError as error:
        parser.exit(2, f"error: --row: {error}\n")
    runs, left_out, faults = survey(runs_dir)
    lines = compare(runs, rows)
    if arguments.csv:
        print(csv_table(lines), end="")
    elif arguments.readme:
        Path(arguments.readme).write_text(readme(lines), encoding="utf-8")
    else:
        print(text_table(lines))
        if rows:
            print("\n".join(map(details, lines)))
        for note in footnotes(lines):
            print(note)
        if left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
            print(f"Records in {runs_dir} that do not count: {left_out.total()} ({reasons}).")
    sys.stdout.flush()
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # `| head` has read enough; without this the interpreter complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
