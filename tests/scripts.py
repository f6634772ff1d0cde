"""Running the top-level scripts inside the tests' process, and what came of it."""

import io
import json
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Outcome:
    """How a script ended: exit status, what it printed, the folder of its run if it made one."""

    status: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        line = next(line for line in self.out.splitlines() if line.startswith("run folder: "))
        return Path(line.removeprefix("run folder: "))

    @property
    def record(self) -> dict[str, Any]:
        line = next(line for line in self.out.splitlines() if line.startswith("record: "))
        return json.loads(Path(line.removeprefix("record: ")).read_text(encoding="utf-8"))


def run_script(name: str, *words: str | Path) -> Outcome:
    """Runs a top-level script as `python name words...` would, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [name, *map(str, words)]
    status = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = before
    return Outcome(status, out.getvalue(), err.getvalue())
