"""The comparison as text: tables for the terminal, as CSV and for README.md, and one line for the end of a run."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from results.compare import Accuracy, Comparison, compare_record, is_demo
from results.measured import parse_record
from results.papers import GRADES, Figures, Row, all_papers

README = """\
# Published and measured

Made by `python -m results --readme` from the TOML files of this folder, which hold what the papers print, and from the
run records in [records](records). Do not edit it; a test holds that it is current.

A cell has the published top-1 accuracy and, of each side that was run, the mean of the runs and how it compares:
"reproduced" where the difference stays within the 95 % interval of the noise model that [compare.py](compare.py)
explains, otherwise "above" or "below". `python -m results --row ID` says all that is known of one cell.
"""


def row_line(record: Mapping[str, Any]) -> str:
    """One sentence beside the paper's row, for the end of a run; it says so where the record never counts."""
    try:
        return _row_line(record)
    except Exception as error:  # noqa: BLE001 - the run is finished and recorded, and this sentence may not fail it
        return f"The run cannot be compared with its paper's row: {error!r}."


def _row_line(raw: Mapping[str, Any]) -> str:
    record = parse_record(raw)
    line = compare_record(record)
    if line is None:
        return f"{raw['script']} ({record.side}): no paper gives a row for this run."
    row = line.row
    start = f"{row.id} ({row.paper_name}, {line.side}): published {_published(row)}; this run {_values(line)} %; "
    if is_demo(record):
        return start + "a DEMO on tiny data, which never counts and says nothing about the paper's value."
    if _difference(line) != "-":
        return start + f"difference {_difference(line)}: {line.verdict}."
    return start + line.verdict + (f" ({line.reason})." if line.reason else ".")


def _accuracy(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    return f"{accuracy.mean:.2f}" + (f" ± {accuracy.sd:.2f}" if accuracy.sd is not None else "")


def _values(line: Comparison) -> str:
    if line.side.endswith("evaluated"):
        return f"checkpoint {_accuracy(line.best)}"
    return f"best {_accuracy(line.best)}, last {_accuracy(line.last)}"


def _published(row: Row) -> str:
    return f"{row.printed} ({row.grade})" if row.printed else "-"


def _difference(line: Comparison) -> str:
    parts = [
        f"{name}{accuracy.difference:+.2f} (±{accuracy.margin:.2f})"
        for name, accuracy in (("", line.best), ("last " if line.best else "", line.last))
        if accuracy and accuracy.difference is not None
    ]
    return ", ".join(parts) or "-"


def _cells(line: Comparison) -> tuple[str, ...]:
    row, found = line.row, [accuracy for accuracy in (line.best, line.last) if accuracy]
    runs = f"n={max(accuracy.n for accuracy in found)}, {_values(line)}" if found else "-"
    verdict = line.verdict + (f": {line.reason}" if line.reason else "")
    return row.paper_name, row.id, line.side or "-", _published(row), runs, _difference(line), verdict


def text_table(lines: Sequence[Comparison]) -> str:
    """The comparison as an aligned table for the terminal."""
    header = ("paper", "row", "side", "published", "runs", "difference", "verdict")
    return _aligned([header, *map(_cells, lines)])


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in table)


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    table = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in table)


def csv_table(lines: Sequence[Comparison]) -> str:
    """The comparison as CSV with unrounded numbers, %; an empty field where there is no number."""
    table, out = list(map(_fields, lines)), io.StringIO()
    writer = csv.DictWriter(out, table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def _fields(line: Comparison) -> dict[str, object]:
    row, numbers = line.row, ("n", "mean", "sd", "difference", "margin")
    fields: dict[str, object] = {"paper": row.paper, "row": row.id, "data": row.data_name, "model": row.model}
    fields |= {"image_size": row.image_size, "published": row.value, "published_std": row.std}
    fields |= {"grade": row.grade, "source": row.source, "side": line.side, "seeds": line.seeds or None}
    for which, accuracy in (("best", line.best), ("last", line.last)):
        fields |= {f"{which}_{name}": getattr(accuracy, name, None) for name in numbers}
    return fields | {"verdict": line.verdict, "reason": line.reason or row.empty, "notes": "; ".join(line.notes)}


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
        ("source", row.source and f"{row.source} ({GRADES[row.grade]})"),
        ("no value", row.empty),
        ("test set", f"{size}, {row.selection}" if row.selection else ""),
        ("protocol", row.protocol),
        ("note", "; ".join(line.notes)),
        ("runs", runs if line.side else ""),
        ("difference", _difference(line).strip("-") and f"{_difference(line)}, percentage points"),
        ("verdict", _cells(line)[6]),
        *(("record", str(path)) for path in line.records),
    ]
    return f"{row.id}\n" + "".join(f"  {name:<11} {text}\n" for name, text in facts if text)


def readme(lines: Sequence[Comparison]) -> str:
    """The text of results/README.md: a table a paper, laid out as in the paper, data sets down and models across."""
    blocks = [README]
    for paper in all_papers():
        of_paper = [line for line in lines if line.row.paper == paper.key]
        models = list(dict.fromkeys(line.row.model for line in of_paper))
        table: dict[str, dict[str, list[Comparison]]] = {}
        for line in of_paper:
            label = f"{line.row.data_name}, {line.row.image_size} px"
            table.setdefault(label, {}).setdefault(line.row.model, []).append(line)
        cells = [["top-1, %", *models]]
        cells += [[label, *(_readme_cell(row.get(model, [])) for model in models)] for label, row in table.items()]
        notes = [*footnotes(of_paper), *(f"`{row.id}`: {row.note}" for row in paper.rows if row.note)]
        blocks.append(f"## {paper.name} (arXiv {paper.arxiv})\n\n{_markdown(cells)}")
        blocks.append("".join(f"- {note}\n" for note in notes))
        blocks += map(_figures, paper.figures)
    return "\n".join(blocks)


def _figures(figures: Figures) -> str:
    cells = [["", *figures.columns], *([["complexity", *figures.complexity]] if figures.complexity else [])]
    cells += [[name, *(f"{number:g}" for number in numbers)] for name, numbers in figures.values.items()]
    about = f"{figures.title} ({figures.unit}; {figures.source}, grade {figures.grade}). {figures.note}".rstrip()
    return f"{about}\n\n{_markdown(cells)}"


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
