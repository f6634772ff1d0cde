"""What a fault is here: something is broken on purpose, and a promise must hold afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The columns of the table: one entry point of each reproduced system, and what all of them share.
GFT, FFVT, GLSIM, COMMON = "gft_food101.py", "ffvt/train.py", "glsim/tools/train.py", "common"
ENTRIES = (GFT, FFVT, GLSIM, COMMON)


@dataclass(frozen=True)
class Case:
    """One fault at one moment.

    `check(folder)` breaks something in the empty `folder`, raises AssertionError where the promise is not kept, and
    returns the number of trials that it made. It must be picklable (a module's function or a functools.partial of it).
    """

    section: str  # heading in the table
    fault: str  # row: "SIGKILL in the backward pass"
    entry: str  # column, one of ENTRIES
    promise: str  # what must hold: "resumed bit-identical"
    name: str  # which of the cases of this row and column: "step 3 of 6"
    check: Callable[[Path], int]
    quick: bool = False  # also a part of `make test`

    @property
    def title(self) -> str:
        return f"{self.fault} | {self.entry} | {self.name}"

    @property
    def key(self) -> tuple[str, ...]:
        """Names it among all cases; `check` is another object in another process."""
        return self.section, self.promise, self.fault, self.entry, self.name
