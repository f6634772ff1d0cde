"""Short texts from anywhere, read no further than they may go."""

import json
from pathlib import Path
from typing import Any

JSON_BYTES = 8 << 20  # several times the description of a model of 21,841 named classes


def read_text(path: Path, limit: int) -> str:
    """The text of a file of at most `limit` bytes; OSError or ValueError for any other."""
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content.decode("utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file says; OSError or ValueError where it is none."""
    try:
        return json.loads(read_text(path, JSON_BYTES))
    except RecursionError as error:
        raise ValueError("brackets in brackets without end") from error
