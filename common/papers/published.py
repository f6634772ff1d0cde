"""Loads the published numbers from the TOML files of this folder.

A file repeats the paper's tables as printed. `[data.KEY]` describes a data set: name, `test` (images in
the test set, where known), `selection` (how the released code chooses the epoch it reports). `columns`
gives the models with a template for the row ids: `{data}` is the data set's key, `{stem}` its spelling
in a script's name, `{size}` the image size. Each `[[tables]]` block has one source and one grade, and
`tables.cells` one list of cells a data set. Cells are strings, "90.93 ± 0.24" or "91.6", because the
number of printed digits is part of the value: it bounds the rounding error. An empty cell stays empty and
the table's `empty` says why. `[[figures]]` holds numbers that are no accuracy, `[notes]` remarks by
row id.
"""

import difflib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GRADES = {
    "T": "the paper's own table",
    "C": "official code or README",
    "S": "quoted by another paper or index",
    "F": "read off a figure",
    "": "no value",
}
PAPERS = ("gft", "ffvt", "glsim", "transfg")  # the order in which tables list them


@dataclass(frozen=True)
class Row:
    """One cell of a paper's accuracy table. `value`, `std`, `step`, `read_off`: percentage points.

    `step` is one unit of the last printed digit, `read_off` the half width of a figure's reading error,
    `seeds` the number of runs behind `value` (None: not known), `test_size` the images of the test set
    (None: not known). `empty` says why there is no value, `not_comparable` why no run compares with it.
    """

    id: str
    paper: str
    paper_name: str
    arxiv: str
    data: str
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
    columns: tuple[str, ...]
    values: dict[str, tuple[float, ...]]
    complexity: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Paper:
    """One TOML file. `key` is its name without the suffix."""

    key: str
    name: str
    title: str
    arxiv: str
    rows: tuple[Row, ...]
    figures: tuple[Figures, ...]


@cache
def papers() -> tuple[Paper, ...]:
    """All papers in the order of the tables. Raises ValueError where a TOML file contradicts itself."""
    here = Path(__file__).parent
    return tuple(parse_paper(key, (here / f"{key}.toml").read_text("utf-8")) for key in PAPERS)


@cache
def all_rows() -> dict[str, Row]:
    """Every row of every paper by its id, in the order of the tables."""
    return {row.id: row for paper in papers() for row in paper.rows}


def published_row(row_id: str) -> Row:
    """The row of this id, in any capitals (some published script names have them). Raises UserError."""
    by_lower = {known.lower(): row for known, row in all_rows().items()}
    row = by_lower.get(row_id.lower())
    if row is None:
        close = [by_lower[name].id for name in difflib.get_close_matches(row_id.lower(), by_lower, n=3)]
        hint = f"did you mean {' or '.join(close)}?" if close else "python -m common.results lists all rows."
        raise UserError(f"No paper has a row {row_id!r}: {hint}")
    return row


def parse_paper(key: str, text: str) -> Paper:
    """The paper of this TOML text. Raises ValueError naming the table or row where it contradicts itself."""
    raw = tomllib.loads(text)
    rows: dict[str, Row] = {}
    for table in raw["tables"]:
        for data, cells in table["cells"].items():
            if len(cells) != len(raw["columns"]):
                raise ValueError(f"{key}.toml, {data}: {len(cells)} cells for {len(raw['columns'])} columns")
            for column, cell in zip(raw["columns"], cells, strict=True):
                row = _row(key, raw, table, data, column, cell)
                if row.id in rows:
                    raise ValueError(f"{key}.toml: two cells have the id {row.id}")
                rows[row.id] = row
    stray = set(raw.get("notes", {})) - set(rows)
    if stray:
        raise ValueError(f"{key}.toml: notes on unknown rows {sorted(stray)}")
    figures = tuple(_figures(table) for table in raw.get("figures", []))
    return Paper(key, raw["name"], raw["title"], raw["arxiv"], tuple(rows.values()), figures)


def _row(key: str, raw: dict[str, Any], table: dict[str, Any], data: str, column: dict[str, str], cell: str) -> Row:
    about = raw["data"][data]
    row_id = column["id"].format(data=data, stem=about.get("stem", data), size=table["image_size"])
    value, _, std = cell.partition(" ± ")
    if not cell and not table.get("empty"):
        raise ValueError(f"{key}.toml, {row_id}: an empty cell needs the table's reason, empty = '...'")
    if std and table.get("seeds", 0) < 2 and "not_comparable" not in table:
        raise ValueError(f"{key}.toml, {row_id}: a standard deviation needs the number of seeds")
    return Row(
        id=row_id,
        paper=key,
        paper_name=raw["name"],
        arxiv=raw["arxiv"],
        data=data,
        data_name=about["name"],
        model=column["model"],
        image_size=table["image_size"],
        metric=table["metric"],
        source=table["source"],
        grade=table["grade"] if cell else "",
        printed=cell,
        value=float(value) if value else None,
        std=float(std) if std else None,
        step=10.0 ** -len(value.partition(".")[2]) if value else 0.0,
        read_off=table.get("read_off", 0.0),
        seeds=table.get("seeds"),
        test_size=about.get("test"),
        selection=about.get("selection", ""),
        protocol="; ".join(part for part in (table.get("protocol"), about.get("protocol")) if part),
        empty="" if cell else table["empty"],
        not_comparable=table.get("not_comparable", ""),
        note=raw.get("notes", {}).get(row_id, "").strip(),
    )


def _figures(table: dict[str, Any]) -> Figures:
    values = {line: tuple(float(number) for number in numbers) for line, numbers in table["values"].items()}
    if any(len(numbers) != len(table["columns"]) for numbers in values.values()):
        raise ValueError(f"figures {table['id']}: a line has not one number for each column")
    return Figures(
        id=table["id"],
        title=table["title"],
        unit=table["unit"],
        source=table["source"],
        grade=table["grade"],
        columns=tuple(table["columns"]),
        values=values,
        complexity=tuple(table.get("complexity", ())),
        note=table.get("note", "").strip(),
    )
