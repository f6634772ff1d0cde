"""Run records and their comparison with the papers: the table of all rows, on the terminal and in the README.

    python -m common.results                        every row of every paper, "not run" where nobody did
    python -m common.results --row gft_food101      one row with source, protocol, interval, records
    python -m common.results --markdown             the same as Markdown; --csv: unrounded, for programs
    python -m common.results --readme README.md     writes the tables between the README's markers
    python -m common.results --readme README.md --check   exits 1 where they are not current

What the verdicts mean stands in `common/comparison.py`.
"""

import argparse
import csv
import io
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.comparison import (
    Comparison,
    Measured,
    Record,
    compare_all,
    compare_record,
    comparison,
    is_demo,
    margin,
    survey,
)
from common.errors import UserError
from common.files import write_text
from common.papers import GRADES, Row, papers
from common.records import find_records, read_record, write_record

__all__ = [
    "Comparison",
    "Measured",
    "comparison",
    "csv_table",
    "find_records",
    "main",
    "margin",
    "markdown_table",
    "read_record",
    "readme_block",
    "row_line",
    "write_record",
]

BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEADER = ("paper", "row", "side", "published", "runs", "difference", "verdict")


def row_line(record: Record) -> str:
    """One sentence beside the paper's row, for the end of a run; it says so where the record never counts."""
    line = compare_record(record)
    if line is None:
        return f"{record['script']} ({record['side']}): no paper gives a row for this run."
    row = line.row
    start = f"{row.id} ({row.paper_name}, {line.side}): published {_published(row)}; this run {_values(line)} %; "
    if is_demo(record):
        return start + "a DEMO on tiny data, which never counts and says nothing about the paper's value."
    if _difference(line) != "-":
        return start + f"difference {_difference(line)}: {line.verdict}."
    return start + line.verdict + (f" ({line.reason})." if line.reason else ".")


def _accuracy(measured: Measured | None) -> str:
    if measured is None:
        return "-"
    return f"{measured.mean:.2f}" + (f" ± {measured.sd:.2f}" if measured.sd is not None else "")


def _values(line: Comparison) -> str:
    if line.side.endswith("evaluated"):
        return f"checkpoint {_accuracy(line.best)}"
    return f"best {_accuracy(line.best)}, last {_accuracy(line.last)}"


def _published(row: Row) -> str:
    return f"{row.printed} ({row.grade})" if row.printed else "-"


def _difference(line: Comparison) -> str:
    parts = [
        f"{name}{measured.difference:+.2f} (±{measured.margin:.2f})"
        for name, measured in (("", line.best), ("last " if line.best else "", line.last))
        if measured and measured.difference is not None
    ]
    return ", ".join(parts) or "-"


def _cells(line: Comparison) -> tuple[str, ...]:
    runs = "-"
    if line.best or line.last:
        n = max(measured.n for measured in (line.best, line.last) if measured)
        runs = f"n={n}, {_values(line)}"
    verdict = line.verdict + (f": {line.reason}" if line.reason else "")
    row = line.row
    return row.paper_name, row.id, line.side or "-", _published(row), runs, _difference(line), verdict


def text_table(lines: Sequence[Comparison]) -> str:
    """The comparison as an aligned table for the terminal."""
    return _aligned([HEADER, *map(_cells, lines)])


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in table)


def markdown_table(lines: Sequence[Comparison]) -> str:
    """The comparison as one Markdown table, one line a row and group."""
    return _markdown([HEADER, *map(_cells, lines)])


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    table = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in table)


def csv_table(lines: Sequence[Comparison]) -> str:
    """The comparison as CSV with unrounded numbers, %; an empty field where there is no number."""
    names = ("n", "mean", "sd", "difference", "margin")
    out = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for line in lines:
        row = line.row
        fields: dict[str, object] = {
            "paper": row.paper,
            "row": row.id,
            "data": row.data_name,
            "model": row.model,
            "image_size": row.image_size,
            "published": row.value,
            "published_std": row.std,
            "grade": row.grade,
            "source": row.source,
            "side": line.side,
            "seeds": line.seeds or None,
        }
        for which, measured in (("best", line.best), ("last", line.last)):
            fields |= {f"{which}_{name}": getattr(measured, name, None) for name in names}
        fields |= {
            "verdict": line.verdict,
            "reason": line.reason or row.empty,
            "notes": "; ".join(line.notes),
        }
        if writer is None:
            writer = csv.DictWriter(out, fields, lineterminator="\n")
            writer.writeheader()
        writer.writerow(fields)
    return out.getvalue()


def footnotes(lines: Sequence[Comparison]) -> list[str]:
    """What the table's signs mean, as far as these lines need it: grades, and the reasons of empty cells."""
    grades = {line.row.grade: None for line in lines if line.row.grade}
    empty = Counter((line.row.paper_name, line.row.empty) for line in lines if line.row.empty)
    notes = ["Published: " + "; ".join(f"{grade} = {GRADES[grade]}" for grade in grades) + "."] if grades else []
    return notes + [f"No published value in {n} of the cells of {paper}: {why}." for (paper, why), n in empty.items()]


def details(line: Comparison) -> str:
    """All that is known about one line: source, protocol, reason, interval, records."""
    row = line.row
    size = f"{row.test_size:,} images" if row.test_size else "size not known"
    runs = f"{line.side}: {_cells(line)[4]}" + (f"; distinct seeds: {line.seeds}" if line.seeds else "")
    facts = [
        ("paper", f"{row.paper_name}, arXiv {row.arxiv}"),
        ("cell", f"{row.model} on {row.data_name}, {row.image_size} px: {_published(row)}"),
        ("metric", row.metric),
        ("source", f"{row.source} ({GRADES[row.grade]})"),
        ("no value", row.empty),
        ("no verdict", row.not_comparable),
        ("test set", f"{size}, {row.selection}" if row.selection else ""),
        ("protocol", row.protocol),
        ("note", "; ".join(line.notes)),
        ("runs", runs if line.side else ""),
        ("difference", _difference(line).strip("-") and f"{_difference(line)}, percentage points"),
        ("verdict", _cells(line)[6]),
        *(("record", str(path)) for path in line.records),
    ]
    return f"{row.id}\n" + "".join(f"  {name:<11} {text}\n" for name, text in facts if text)


def figures_text(key: str) -> str:
    """The paper's numbers that are no accuracy (throughput, cost, parameters), as aligned tables."""
    tables = []
    for figures in next(paper.figures for paper in papers() if paper.key == key):
        cells = [
            ("", *figures.columns),
            *([("complexity", *figures.complexity)] if figures.complexity else []),
        ]
        cells += [(name, *(f"{number:g}" for number in numbers)) for name, numbers in figures.values.items()]
        about = f"{figures.title} ({figures.unit}; {figures.source}, grade {figures.grade}). {figures.note}\n"
        tables.append(about + _aligned(cells))
    return "\n".join(tables)


def readme_block(runs_dir: str | Path = "runs") -> str:
    """One compact Markdown table a paper, laid out as in the paper: data sets down, models across."""
    lines = comparison(runs_dir)
    blocks = []
    for paper in papers():
        of_paper = [line for line in lines if line.row.paper == paper.key]
        models = list(dict.fromkeys(line.row.model for line in of_paper))
        table: dict[str, dict[str, list[Comparison]]] = {}
        for line in of_paper:
            label = f"{line.row.data_name}, {line.row.image_size} px"
            table.setdefault(label, {}).setdefault(line.row.model, []).append(line)
        cells = [["top-1, %", *models]]
        cells += [[label, *(_readme_cell(row.get(model, [])) for model in models)] for label, row in table.items()]
        notes = "".join(f"{note}\n" for note in footnotes(of_paper))
        blocks.append(f"**{paper.name}** (arXiv {paper.arxiv})\n\n{_markdown(cells)}\n{notes}")
    return "\n".join(blocks)


def _readme_cell(lines: Sequence[Comparison]) -> str:
    if not lines:
        return ""
    row = lines[0].row
    parts = [row.printed + (f" ({row.grade})" if row.grade != "T" else "") if row.printed else "-"]
    for line in lines:
        found = line.best or line.last
        start = f"{line.side}: {_accuracy(found)} (n={found.n}), " if found else ""
        parts.append(start + line.verdict)
    return "<br>".join(parts)


def update_readme(path: str | Path, runs_dir: str | Path = "runs", check: bool = False) -> bool:
    """Puts `readme_block` between the markers of this file; with `check` only looks.

    Returns whether the file was current. Raises UserError where the file or its two markers are missing.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path} ({error}); --readme expects an existing text file.") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path} needs the line {BEGIN} and after it the line {END}, each once, for the tables.")
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n\n{readme_block(runs_dir)}\n{END}{rest.split(END)[1]}"
    if new != text and not check:
        write_text(Path(path), new)
    return new == text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 where --check finds an old README, 2 for an error of the user."""
    arguments = _parser().parse_args(argv)
    try:
        status = _main(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough; without this the interpreter complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.results", description="Run records beside the papers' tables."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--csv", action="store_true", help="print CSV with unrounded numbers")
    form.add_argument("--readme", metavar="FILE", help=f"write the tables between {BEGIN} and {END} of this file")
    parser.add_argument("--check", action="store_true", help="with --readme: write nothing, exit 1 if not current")
    parser.add_argument("--row", metavar="ID", action="append", help="only this row, with details; repeatable")
    parser.add_argument("--paper", choices=[paper.key for paper in papers()], help="only this paper")
    parser.add_argument("--runs", metavar="DIR", help="folder of the run records [runs]")
    return parser


def _main(arguments: argparse.Namespace) -> int:
    if arguments.check and not arguments.readme:
        raise UserError("--check needs --readme FILE, the file to look at.")
    if arguments.readme and (arguments.row or arguments.paper):
        raise UserError("--readme writes the tables of all papers: leave --row and --paper out.")
    if arguments.runs and not Path(arguments.runs).is_dir():
        raise UserError(f"--runs {arguments.runs}: there is no such folder; expected one with run records.")
    runs_dir = arguments.runs or "runs"
    if arguments.readme:
        current = update_readme(arguments.readme, runs_dir, arguments.check)
        if arguments.check and not current:
            command = f"python -m common.results --runs {arguments.runs} --readme {arguments.readme}"
            print(f"{arguments.readme} does not show the current results: run {command}", file=sys.stderr)
        return int(arguments.check and not current)

    runs, left_out = survey(runs_dir)
    lines = compare_all(runs, arguments.row)
    lines = [line for line in lines if arguments.paper in (None, line.row.paper)]
    if arguments.csv:
        print(csv_table(lines), end="")
        return 0
    print((markdown_table if arguments.markdown else text_table)(lines))
    if arguments.row and not arguments.markdown:
        print("\n".join(map(details, lines)))
    if arguments.paper and not arguments.row and not arguments.markdown:
        print(figures_text(arguments.paper))
    for note in footnotes(lines):
        print(note)
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        print(f"Records in {runs_dir} that do not count: {left_out.total()} ({reasons}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
