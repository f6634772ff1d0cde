"""The measured numbers: run records, `<script>/<time>-<id>/record.json`, as the programs write them.

A record holds whole counts (`correct` of `total`) beside every rate, so that rates can be pooled and checked. What a
comparison needs is read and checked here; the other fields of a record are for people.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1


class Counts(NamedTuple):
    """Images of a test set, and how many of them the model named rightly."""

    correct: int
    total: int


@dataclass(frozen=True)
class Record:
    """What a record says about a run.

    `best` is the test of the chosen epoch, or of the checkpoint that was evaluated; `last`, of the last epoch. `sha256`
    names the weights that the run began with, `selection` the kind of split on which the epoch was chosen.
    """

    path: Path | None
    row: str | None
    side: str
    status: str
    excluded: tuple[str, ...]
    seed: int | None
    sha256: str | None
    selection: str | None
    best: Counts | None
    last: Counts | None


def read_record(path: Path) -> Record:
    """The record in this file. Raises ValueError, a sentence that names the file, where there is no possible record."""
    try:
        return parse_record(json.loads(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8 or no JSON, too
        raise ValueError(f"{path} is no record of a run: {error}") from error


def parse_record(record: Any, path: Path | None = None) -> Record:
    """The record that a JSON file, or a program that is about to write one, holds. Raises ValueError for any other."""
    try:
        if record["schema"] != SCHEMA or record["side"] not in ("described", "released"):
            raise ValueError(f"expected schema {SCHEMA}, and the side described or released")
        tests = {name: _counts(name, result) for name, result in (record["results"] or {}).items()}
        return Record(
            path=path,
            row=record["row"],
            side=record["side"],
            status=record["status"],
            excluded=tuple(map(str, record["excluded"])),
            seed=record["seed"],
            sha256=(record["weights"] or {}).get("sha256"),
            selection=(record["selection"] or {}).get("kind"),
            best=tests.get("checkpoint" if record["status"] == "evaluated" else "best"),
            last=tests.get("last"),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"a field is missing or of another kind ({type(error).__name__}: {error})") from error


def _counts(name: str, result: Any) -> Counts | None:
    """The counts on the test set, if it was tested. Raises ValueError for impossible ones."""
    test = (result or {}).get("test")
    if test is None:
        return None
    correct, total, top5 = test["correct"], test["total"], test.get("top5_correct")
    top5 = correct if top5 is None else top5
    possible = {type(correct), type(total), type(top5)} == {int} and 0 <= correct <= top5 <= total > 0
    # The counts decide; a rate that contradicts them means that the file was edited or its writer is wrong.
    if not possible or abs(test["top1"] - correct / total) > 1e-4:
        raise ValueError(f"results.{name}.test has counts that are impossible or in contradiction")
    return Counts(correct, total)
