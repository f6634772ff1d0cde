"""A run to which something happens: `disk_run.py SPECIFICATION PROGRAM words...`, started by the server of the runs.

The specification is JSON: home (the folder to run in), disk (the folder whose writes are counted), at (the number of
the write at which something happens; 0: never), event ("fill" the disk, "limit" the size of files, "remove" every
run's folder), left (bytes that stay free), counts (a file for the number of writes, or ""), copies (how many of the run
are started at once; their output goes to the files out-0, out-1, ... in the home).

A write is a file that the main thread opens for writing: the audit hook sees each, wherever it is opened.
"""

import json
import os
import resource
import runpy
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILLER = "filler"


class Watch:
    """Counts writes below the disk, and makes the event happen at its time."""

    def __init__(self, disk: str, at: int, event: str, left: int) -> None:
        self.disk, self.at, self.event, self.left = os.path.abspath(disk), at, event, left
        self.count = 0
        self.busy = False
        sys.addaudithook(self._hear)

    def _hear(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name != "open" or self.busy or threading.current_thread() is not threading.main_thread():
            return
        path, _, flags = arguments
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(self.disk + os.sep):
            return
        self.count += 1
        if self.count == self.at:
            self.busy = True
            getattr(self, f"_{self.event}")()
            self.busy = False

    def _fill(self) -> None:
        state = os.statvfs(self.disk)
        size = state.f_bavail * state.f_frsize - self.left
        if size > 0:
            handle = os.open(f"{self.disk}/{FILLER}", os.O_WRONLY | os.O_CREAT)
            os.posix_fallocate(handle, 0, size)
            os.close(handle)

    def _limit(self) -> None:
        # Of this process alone, and its screen is a file as well: that has to stay writable.
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(self.left, 20_000), resource.RLIM_INFINITY))

    def _remove(self) -> None:
        for folder in Path(self.disk).glob("runs/*/2*/"):
            shutil.rmtree(folder)


def main() -> None:
    specification = json.loads(sys.argv[1])
    sys.argv = sys.argv[2:]
    copies, counts = specification.pop("copies"), specification.pop("counts")
    os.chdir(specification.pop("home"))
    if copies > 1:
        crowd(copies)
        return
    watch = Watch(**specification)
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    finally:
        if counts:
            Path(counts).write_text(str(watch.count))


def crowd(copies: int) -> None:
    """The same run many times at once; the file `statuses` says how each ended."""
    processes = []
    for number in range(copies):
        process = os.fork()
        if process == 0:
            handle = os.open(f"out-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
            return
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    Path("statuses").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
