"""Run records: one JSON file a run, `runs/<script>/<time>-<id>/record.json`, written whole or not at all.

A record holds whole counts (`correct` of `total`) beside every rate, so that rates can be pooled and checked.
"""

import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError, brief
from common.files import write_text
from common.reading import read_json

SCHEMA = 1
SIDES = ("described", "released")
REQUIRED: dict[str, tuple[type, ...]] = {
    "row": (str, type(None)),
    "script": (str,),
    "side": (str,),
    "status": (str,),
    "excluded": (list,),
    "recipe": (dict,),
    "overrides": (dict,),
    "seed": (int, type(None)),
    "data": (dict,),
    "weights": (dict, type(None)),
    "selection": (dict, type(None)),
    "results": (dict, type(None)),
}


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes the record as JSON, atomically: a reader sees the old file or the new one, never a part.

    Numbers that JSON does not know (NaN, infinities) become null, numpy scalars plain numbers, paths strings.
    Raises UserError where the file cannot be written (the earlier file is then unchanged), TypeError for a
    value that has no JSON form.
    """
    text = json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(Path(path), text + "\n")


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in this file. Raises UserError, naming the file, where it is no possible record."""
    try:
        record = read_json(Path(path))
    except OSError as error:
        raise UserError(f"Cannot read the record {path}: {error.strerror or error}.") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError too
        raise UserError(f"The record {path} is not valid JSON ({error}); move it away or restore it.") from error
    fault = _fault(record)
    if fault:
        raise UserError(f"The record {path} {fault}; move it away or restore it.")
    return dict(record)


def find_records(runs_dir: str | Path) -> list[Path]:
    """The files `<script>/<run>/record.json` under `runs_dir`, sorted; none where there is no folder."""
    return sorted(Path(runs_dir).glob("*/*/record.json"))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}")


def _fault(record: Any) -> str:
    """What makes this no record, as the rest of a sentence, or ''."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    if record.get("schema") != SCHEMA:
        return f"has schema {brief(record.get('schema'))}, this program reads schema {SCHEMA}"
    for name, types in REQUIRED.items():
        if name not in record:
            return f"lacks the field {name!r}"
        if not isinstance(record[name], types) or isinstance(record[name], bool):
            return f"has {brief(record[name])} in the field {name!r}"
    if record["side"] not in SIDES:
        return f"has the side {brief(record['side'])}, expected {' or '.join(SIDES)}"
    if not all(isinstance(reason, str) for reason in record["excluded"]):
        return "has a reason in 'excluded' that is no text"
    for name, result in (record["results"] or {}).items():
        if result is not None and not isinstance(result, dict):
            return f"has {brief(result)} in results.{name}"
        for split in ("val", "test"):
            metrics = (result or {}).get(split)
            fault = "" if metrics is None else _metrics_fault(metrics)
            if fault:
                return f"{fault} in results.{name}.{split}"
    return ""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _metrics_fault(metrics: Any) -> str:
    if not isinstance(metrics, dict):
        return f"has {brief(metrics)}"
    correct: Any = metrics.get("correct")
    total: Any = metrics.get("total")
    if not _whole(correct) or not _whole(total):
        return "has no whole numbers 'correct' and 'total'"
    top5 = metrics.get("top5_correct")
    if total < 1 or not 0 <= correct <= total:
        return f"has the impossible count {correct} correct of {total}"
    if top5 is not None and not (_whole(top5) and correct <= top5 <= total):
        return f"has the impossible count top5_correct {brief(top5)} beside {correct} correct of {total}"
    top1 = metrics.get("top1")
    # The counts decide; a rate that contradicts them means that the file was edited or its writer is wrong.
    if top1 is not None and not (isinstance(top1, (int, float)) and abs(top1 - correct / total) <= 1e-4):
        return f"has top1 {brief(top1)} beside {correct} correct of {total}"
    return ""
