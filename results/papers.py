"""The published numbers, read from the TOML files of this folder.

A file repeats a paper's tables as printed. `[data.KEY]` describes a data set: name, `test` (images in the test set,
where known), `selection` (how the released code chooses the epoch it reports). `columns` gives the models with a
template for the row ids: `{data}` is the data set's key, `{stem}` its spelling in a script's name, `{size}` the image
size. Each `[[tables]]` block has one source and one grade, and `tables.cells` one list of cells a data set. Cells are
strings, "90.93 ± 0.24" or "91.6", because the number of printed digits is part of the value: it bounds the rounding
error. An empty cell stays empty and the table's `empty` says why. `read_off` is each column's reading error where the
values are read off a figure. `[[figures]]` holds numbers that are no accuracy, `[notes]` remarks by row id.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GRADES = {
    "T": "the paper's own table",
    "C": "official code or README",
    "S": "quoted by another paper or index",
    "F": "read off a figure",
}
PAPERS = ("gft", "ffvt", "glsim", "transfg")  # the order in which tables list them


@dataclass(frozen=True)
class Row:
    """One cell of a paper's accuracy table. `value`, `std`, `step`, `read_off`: percentage points.

    `step` is one unit of the last printed digit, `read_off` the half width of a figure's reading error, `seeds` the
    number of runs behind `value` (None: not known), `test_size` the images of the test set (None: not known). `empty`
    says why there is no value, `not_comparable` why no run compares with it.
    """

    id: str
    paper: str
    paper_name: str
    arxiv: str
    data_name: str
    model: str
    image_size: int
    metric: str
    source: str
    grade: str
    printed: str
    value: float | None
    std: float | None
    step: float
    read_off: float
    seeds: int | None
    test_size: int | None
    selection: str
    protocol: str
    empty: str
    not_comparable: str
    note: str


@dataclass(frozen=True)
class Figures:
    """Published numbers, in `unit`, that are no accuracy: `values[line]` has one for each column."""

    id: str
    title: str
    unit: str
    source: str
    grade: str
    columns: list[str]
    values: dict[str, list[float]]
    complexity: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class Paper:
    """One TOML file. `key` is its name without the suffix."""

    key: str
    name: str
    arxiv: str
    rows: tuple[Row, ...]
    figures: tuple[Figures, ...]


@cache
def all_papers() -> tuple[Paper, ...]:
    """All papers in the order of the tables."""
    return tuple(_paper(key, Path(__file__).with_name(f"{key}.toml").read_text(encoding="utf-8")) for key in PAPERS)


@cache
def all_rows() -> dict[str, Row]:
    """Every row of every paper by its id, in the order of the tables."""
    return {row.id: row for paper in all_papers() for row in paper.rows}


def published_row(row_id: str) -> Row:
    """The row of this id, in any capitals (some published script names have them). Raises ValueError."""
    by_lower = {known.lower(): row for known, row in all_rows().items()}
    if row_id.lower() in by_lower:
        return by_lower[row_id.lower()]
    close = [by_lower[name].id for name in difflib.get_close_matches(row_id.lower(), by_lower, n=3)]
    hint = f"did you mean {' or '.join(close)}?" if close else "python -m results lists all rows."
    raise ValueError(f"No paper has a row {row_id!r}: {hint}")


def _paper(key: str, text: str) -> Paper:
    raw = tomllib.loads(text)
    rows = tuple(
        _row(key, raw, table, data, number, cell)
        for table in raw["tables"]
        for data, cells in table["cells"].items()
        for number, cell in enumerate(cells)
    )
    return Paper(key, raw["name"], raw["arxiv"], rows, tuple(Figures(**table) for table in raw.get("figures", [])))


def _row(key: str, raw: dict[str, Any], table: dict[str, Any], data: str, number: int, cell: str) -> Row:
    about, column = raw["data"][data], raw["columns"][number]
    row_id = column["id"].format(data=data, stem=about.get("stem", data), size=table["image_size"])
    value, _, std = cell.partition(" ± ")
    return Row(
        id=row_id,
        paper=key,
        paper_name=raw["name"],
        arxiv=raw["arxiv"],
        data_name=about["name"],
        model=column["model"],
        image_size=table["image_size"],
        metric=table["metric"],
        source=table["source"] if cell else "",
        grade=table["grade"] if cell else "",
        printed=cell,
        value=float(value) if value else None,
        std=float(std) if std else None,
        step=10.0 ** -len(value.partition(".")[2]) if value else 0.0,
        read_off=table["read_off"][number] if "read_off" in table else 0.0,
        seeds=table.get("seeds"),
        test_size=about.get("test"),
        selection=about.get("selection", ""),
        protocol="; ".join(part for part in (table.get("protocol"), about.get("protocol")) if part),
        empty="" if cell else table["empty"],
        not_comparable=table.get("not_comparable", "") if cell else "",
        note=raw.get("notes", {}).get(row_id, ""),
    )
