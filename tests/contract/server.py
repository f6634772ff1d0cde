"""A process that has imported everything, and forks itself into programs: half a second instead of five.

A line of JSON asks for one: words (the command line from the program's file on), cwd, environment, moment (what Moments
takes), said (a folder for the files out, err, pid, and moments and status at the end).
"""

import atexit
import importlib
import json
import os
import random
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.utils.tensorboard

from contract.moments import Moments

PROGRAMS = ("gft_food101", "densenet169_food101", "ffvt.train", "glsim.tools.train")  # for what they import


def main() -> None:
    for name in PROGRAMS:
        importlib.import_module(name)
    plt.figure().text(0, 0, "reads the fonts").figure.savefig(os.devnull, format="png")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return attend(json.loads(line))
    return None


def attend(job: dict[str, Any]) -> None:
    """Waits for the program, which is another process, and writes down how it has ended."""
    said = Path(job["said"])
    process = os.fork()
    if process == 0:
        return become(job, said)
    (said / "pid").write_text(str(process))
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    (said / "status.new").write_text(str(status))
    (said / "status.new").rename(said / "status")
    os._exit(0)


def become(job: dict[str, Any], said: Path) -> None:
    os.setsid()
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # What a program does not seed itself must not come from here: all would have it in common.
    random.seed()
    np.random.seed()  # noqa: NPY002 - the generator that every process has
    torch.seed()
    moments = Moments(*job["moment"]) if job["moment"] is not None else None
    sys.argv = job["words"]
    how: BaseException | None = None
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException as error:
        how = error
    finally:
        if moments is not None and not moments.act:
            (said / "moments").write_text(json.dumps(moments.counted()))
    leave(how)


def leave(how: BaseException | None) -> NoReturn:
    """Ends as the interpreter does, but for freeing every module, which takes it longer than most of these runs."""
    status = 0
    if isinstance(how, SystemExit):
        status = how.code if isinstance(how.code, int) else int(how.code is not None)
        if isinstance(how.code, str):
            print(how.code, file=sys.stderr)
    elif how is not None:
        sys.excepthook(type(how), how, how.__traceback__)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
