"""What is published about each data set, from datasets.toml beside this file, which says what each field means."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from common.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Archive:
    url: str
    inside: str
    to: str
    provides: Sequence[str]
    md5: str | None = None


@dataclass(frozen=True)
class Facts:
    name: str  # what the command line calls it
    title: str
    folder: str
    classes: int
    counts: Mapping[str, int]
    source: str
    tree: str = ""
    per_class: Mapping[str, Sequence[int]] = field(default_factory=dict)
    also: Sequence[str] = ()
    archives: Sequence[Archive] = ()


@cache
def data_sets() -> dict[str, Facts]:
    """All data sets by name."""
    tables = tomllib.loads(Path(__file__).with_name("datasets.toml").read_text(encoding="utf-8"))
    found = {}
    for name, table in tables.items():
        archives = [Archive(**archive) for archive in table.pop("archives", ())]
        found[name] = Facts(name, archives=archives, **table)
    return found


def facts(name: str) -> Facts:
    """What is published about one data set, its name in capitals or not; UserError for an unknown name."""
    if name.lower() not in data_sets():
        raise UserError(f"there is no data set {name!r}: choose one of {', '.join(sorted(data_sets()))}")
    return data_sets()[name.lower()]
