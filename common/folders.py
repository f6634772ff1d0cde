"""The folder of a run: `OUTPUT/<script>/<time>-<id>/`. No run ever writes into the folder of another.

last.pt, best.safetensors, model.json (recipe, class names, preprocessing), log.jsonl, tensorboard/, record.json,
tables, .launch (which start of torchrun trains it).
"""

import json
import os
import platform
import secrets
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError
from common.files import write_text
from common.predict import read_model_info


def new_folder(output: str, script: str) -> Path:
    """Makes the folder of a new run; UserError where nothing can be written."""
    folder = Path(output) / script / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another place with --output") from error
    return folder


class Lock:
    """A run's folder is written by one training at a time: `with Lock(folder)`. The lock goes with its process.

    A POSIX record lock: data workers do not inherit it, and it holds on network file systems. Where the system has
    none (Windows) nothing is locked.
    """

    def __init__(self, folder: Path) -> None:
        """UserError where another process trains in `folder`, or nothing can be written there."""
        self.file: TextIO | None = None
        try:
            import fcntl
        except ImportError:
            return
        try:
            self.file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the run is
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}), which training does") from error
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            owner = self.file.read().strip()
            raise UserError(
                f"{folder} is still being trained by {owner or 'another process'}: stop that first"
            ) from None
        except OSError:
            return  # a file system without locks
        try:
            self.file.truncate(0)
            os.write(self.file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}), which training does") from error

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def mark_launch(folder: Path, names: Collection[str]) -> None:
    """Notes by which starts of torchrun (`dist.launch_name` of every process) the run in `folder` is trained."""
    if names:
        write_text(folder / ".launch", json.dumps(sorted(names)))


def run_of_launch(output: str, script: str, names: Collection[str]) -> Path | None:
    """The run of `script` that the same start of torchrun has trained before it started the processes again.

    One of `names` is enough: of several machines one may have been replaced. None where nothing was saved yet.
    """
    for run in sorted((Path(output) / script).glob("*/"), reverse=True) if names else []:
        mark = run / ".launch"
        if mark.is_file() and (run / "last.pt").is_file() and not set(names).isdisjoint(_marked(mark)):
            return run
    return None


def _marked(mark: Path) -> list[str]:
    try:
        names: list[str] = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{mark} is damaged: remove it, and go on with that run by --resume {mark.parent}") from error
    return names


def newest(output: str, script: str, having: str, lacking: str = "") -> Path:
    """The newest run of `script` whose folder has the file `having` and not the file `lacking`."""
    runs = sorted((Path(output) / script).glob("*/"), reverse=True)  # names begin with the time
    for run in runs:
        if (run / having).is_file() and not (lacking and (run / lacking).exists()):
            return run
    what = "interrupted run" if lacking else "finished or running training"
    done = " (all that are there are finished)" if lacking and runs else ""
    raise UserError(f"{Path(output) / script} holds no {what} of {script}{done}: name its folder, or see --output")


def check_same_experiment(
    folder: Path,
    info: dict[str, Any],
    recipe: dict[str, Any],
    overrides: dict[str, Any],
    demo: bool,
    places: Collection[str] = ("data_root",),
) -> None:
    """A run may be resumed only as what it was: UserError that names the recipe fields which differ.

    `recipe` is what the script and the command line ask for now, `overrides` what was given on the command line. Fields
    given when the run was started need not be given again, and `places` may have changed.
    """
    if info["demo"] != demo:
        flag = "with" if info["demo"] else "without"
        raise UserError(f"{folder} was started {flag} --demo: resume it the same way")
    wanted = recipe | {name: value for name, value in info["overrides"].items() if name not in overrides}
    wanted = json.loads(json.dumps(wanted))  # as `model.json` holds it: tuples are lists there
    stored = info["recipe"]
    names = (wanted.keys() | stored.keys()) - set(places)
    differing = [name for name in names if wanted.get(name) != stored.get(name)]
    if differing:
        changes = ", ".join(f"{name} {stored.get(name)} -> {wanted.get(name)}" for name in sorted(differing))
        raise UserError(
            f"{folder} was started with another recipe ({changes}): start a new run, or resume with the old values"
        )


def open_run(path: str, script: str) -> tuple[Path, dict[str, Any]]:
    """The folder and `model.json` of the run of `script` at `path`."""
    folder = Path(path)
    info = read_model_info(folder)
    if info["script"] != script:
        raise UserError(f"{folder} is a run of {info['script']}, not of {script}: use it with that script")
    return folder, info
