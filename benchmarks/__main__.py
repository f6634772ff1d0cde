"""All benchmarks: prints their tables, and writes docs/performance.md.

python -m benchmarks              about ten minutes on two quiet cores
python -m benchmarks --quick      a minute, nothing is written
"""

import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from common.train.record import versions

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
# Module, what it measures, what makes it quick.
PARTS = (
    ("models", "Models", ("--only", "GFT released", "--sizes", "224", "--batch-size", "1", "--rounds", "1")),
    ("engine", "Training loop", ("--rounds", "1", "--batch-size", "1")),
    ("data", "Input", ("--only", "FFVT CUB", "--rounds", "3")),
)


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# Speed and memory",
        "",
        "Written by `make performance`. Only ratios inside one table count: seconds differ from machine to machine,",
        "and on one machine from hour to hour. The docstrings of the modules in `benchmarks/` say what is measured.",
        "",
        f"{processor()}, {time.strftime('%Y-%m-%d')}; {found}",
    ]
    for module, title, words in PARTS:
        command = [sys.executable, "-m", f"benchmarks.{module}", *(words if quick else ())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(done.stdout, flush=True)
        lines += ["", f"## {title}", "", f"`python -m benchmarks.{module}`", "", "```", done.stdout.strip(), "```"]
    if not quick:
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def processor() -> str:
    """The name of the processor: where Linux says its model, that, which `platform` does not look up."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
