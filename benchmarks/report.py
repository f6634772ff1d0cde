"""What a benchmark writes with --json: its name, how and where it ran, and its figures."""

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from common.provenance import versions


def write(
    file: str | None,
    benchmark: str,
    figures: Mapping[str, Any],
    *,
    recipe: Any,
    device: str,
    precision: str = "fp32",
    **more: Any,
) -> None:
    """Writes the report of `python -m benchmarks.NAME` to `file`, if there is one; a failing disk ends the program.

    `device` is what `device_name` says of it, `recipe` the dataclass that was run; `more` goes to `about`.
    """
    if file is None:
        return
    about = {
        "command": command(benchmark, sys.argv[1:]),
        "recipe": vars(recipe),
        "device": device,
        "precision": precision,
        **more,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        write_text(Path(file), json.dumps({"benchmark": benchmark, "about": about, **figures}, indent=1) + "\n")
    except UserError as error:
        raise SystemExit(str(error)) from error


def command(benchmark: str, words: Sequence[str]) -> str:
    """The command line, without the place of the report: figures do not depend on it."""
    pairs = zip(["", *words], words, strict=False)
    kept = [word for before, word in pairs if "--json" not in (before, word) and not word.startswith("--json=")]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *kept])


def processor() -> str:
    """The name of the processor: where Linux says its model, that, which `platform` does not look up."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()
