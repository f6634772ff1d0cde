"""A program, one process of which breaks: python -m faults.processes_breaker RANK:PLACE:CALL:HOW program words...

The process of that rank breaks HOW at the CALL-th time that it comes to PLACE, before a restart by torchrun alone.
Several such words are separated by commas.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ffvt.train
import gft_food101
import glsim.tools.train
from common import engine, session, train
from common.amp import Precision
from common.data.images import BadImage, Images

PROGRAMS = (gft_food101, ffvt.train, glsim.tools.train)  # imported for what they import
PLACES: dict[str, tuple[Any, str]] = {
    "forward": (engine, "seed_everything"),  # just before it
    "backward": (Precision, "backward"),
    "image": (Images, "__getitem__"),
    "evaluation": (session, "evaluate"),
    "save": (train, "save_state"),
    "state": (engine.Trainer, "state_dict"),
    "goodbye": (train, "tell_results"),  # after the record
}
assert all(hasattr(owner, name) for owner, name in PLACES.values())


def _raise() -> None:
    raise RuntimeError("broken on purpose")


def _unreadable() -> None:
    raise BadImage("broken.jpg cannot be read")


HOW: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "raise": _raise,
    "unreadable": _unreadable,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(3600),
    "nap": lambda: time.sleep(8),  # longer than launchers need to notice that a process has ended
}


def arm(place: str, number: int, how: str) -> None:
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def broken(*positional: Any, **named: Any) -> Any:
        if next(calls) == number:
            HOW[how]()
        return original(*positional, **named)

    setattr(owner, name, broken)


def start(broken: str, program: str) -> None:
    """The program as `python program` has it, `broken` (nothing: not at all)."""
    for one in filter(None, broken.split(",")):
        rank, place, number, how = one.split(":")
        if os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            arm(place, int(number), how)
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")


def become(
    environment: dict[str, str], folder: Path, files: tuple[Path, Path], broken: str, words: Sequence[str]
) -> None:
    """In a new process: the program in `folder`, which writes its output and errors to `files`."""
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in enumerate(files, start=1):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.argv = list(words)
    start(broken, words[0])


if __name__ == "__main__":
    given, sys.argv = sys.argv[1], sys.argv[2:]
    start(given, sys.argv[0])
