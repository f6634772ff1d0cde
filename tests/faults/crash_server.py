"""A process that has imported everything, and forks one that becomes a run: half a second instead of five.

A line of JSON asks for a run: words (the command line from the program's file on), home (the folder to run in),
moment (phase, number and signal of crash_moments, or nothing), counts (a file for the moments that were passed by, or
nothing). Its output goes to the files out and err in its home. The answers are two lines: its process id (it leads a
process group of its own), and its exit status once it is there.
"""

import json
import os
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.tensorboard

import ffvt.train
import gft_food101
import glsim.tools.train
from common.metrics import _draw
from faults.crash_moments import Moments

ENTRIES = (gft_food101, ffvt.train, glsim.tools.train)  # imported for what they import


def main() -> None:
    _draw(np.eye(2, dtype=np.int64), ["a", "b"]).savefig(os.devnull, format="png")  # reads the fonts
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            return become(job)  # and from there to the regular end of an interpreter
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(job: dict[str, Any]) -> None:
    os.setsid()
    os.chdir(job["home"])
    for name, number in (("out", 1), ("err", 2)):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    # What a run does not seed itself must not come from here: all runs would have it in common.
    random.seed()
    np.random.seed()  # noqa: NPY002 - the generator that every process has
    torch.seed()
    moments = Moments(*job["moment"])
    if job["moment"] or job["counts"]:
        moments.watch()
    sys.argv = job["words"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if job["counts"]:
            Path(job["counts"]).write_text(json.dumps(moments.counts), encoding="utf-8")


if __name__ == "__main__":
    main()
