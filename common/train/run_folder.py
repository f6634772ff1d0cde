"""The folder of a run, OUTPUT/<program>/<time>-<id>/, and what an earlier run left in it.

last.pt, best.safetensors, model.json (recipe, class names, preprocessing), log.jsonl, tensorboard/, record.json and
tables. No run ever writes into the folder of another.
"""

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from common.cli import AUTO, NEWEST, Flags, of_recipe
from common.data import Data
from common.data.transforms import describe_transform
from common.errors import UserError
from common.files import write_text
from common.train import distributed
from common.train.log import Log
from common.train.precision import Precision

# Options that a resumed run keeps: they are in its figures.
KEPT = ("limit", "precision", "amp_backend", "accumulate", "deterministic", "compile")
ORPHANS = 6.0  # seconds that data workers of a killed run may still hold its lock


@dataclass
class Run:
    """Where and with what a program works; its `main` fills this in from top to bottom."""

    program: str  # what model.json calls it
    script: str  # its file, from the root of this repository
    runs: Path  # holds a folder for each run: OUTPUT/<program>/
    recipe: Any
    options: Any
    given: dict[str, Any]  # the fields of both that were typed
    flag: Flags
    device: torch.device
    seed: int = 0
    row: str | None = None  # of a paper's table
    folder: Path = Path()
    resumed: bool = False
    weights: dict[str, Any] = field(default_factory=dict)  # where the starting weights are from
    batch_size: int = 0  # images per optimizer step, over all processes
    excluded: list[str] = field(default_factory=list)  # why its record will not count
    data: Data = field(init=False)
    precision: Precision = field(init=False)
    log: Log = field(init=False)

    @property
    def side(self) -> str:
        return "released" if self.recipe.released else "described"

    @property
    def typed(self) -> dict[str, Any]:
        """The recipe fields that were typed."""
        return of_recipe(type(self.recipe), self.given)


def new_folder(run: Run) -> None:
    """Makes the folder of a training, with model.json, unless it goes on in that of another."""
    if not run.resumed:
        make_folder(run)
        write_model_info(run)


def make_folder(run: Run) -> None:
    """UserError where nothing can be written."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    run.folder = distributed.broadcast(run.runs / name)
    if not distributed.is_main():
        return
    try:
        run.folder.mkdir(parents=True)
        (run.folder / ".lock").touch()
    except OSError as error:
        raise UserError(
            f"{run.folder} cannot be written ({error.strerror}): choose another place with {run.flag('output')}"
        ) from error


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """A folder is written by one training at a time. UserError where another trains there, or has ended it."""
    if not distributed.is_main():
        yield
        return
    try:
        lock = FileLock(run.folder / ".lock").acquire(timeout=ORPHANS)
    except Timeout:
        raise UserError(f"{run.folder} is being trained by another process: stop that first") from None
    except OSError as error:
        raise UserError(f"{run.folder} cannot be written ({error.strerror}), which training does") from error
    with lock:
        if (run.folder / "record.json").exists():
            raise UserError(f"{run.folder} is finished: see its record.json, or start a new run")
        for leftover in run.folder.glob(".*.tmp"):  # of a killed process
            leftover.unlink()
        yield


def newest(run: Run, having: str, unfinished: bool = False) -> list[Path]:
    """The runs of the program that have this file, the newest first."""
    runs = sorted(run.runs.glob("*/"), reverse=True)  # names begin with the time
    return [path for path in runs if (path / having).is_file() and not (unfinished and (path / "record.json").exists())]


def resume(run: Run, places: Collection[str] = ("data_root",)) -> None:
    """Takes over folder, recipe, seed and options of the run that --resume means; with `auto` there may be none.

    `places` are the recipe fields that may differ. UserError for a run that was started as another experiment.
    """
    wanted, found = run.options.resume, ""
    if wanted in (NEWEST, AUTO):
        runs = newest(run, "last.pt", unfinished=True)
        runs = [path for path in runs if wanted == NEWEST or not _differences(run, read_model_info(path), places, True)]
        found = distributed.broadcast(str(runs[0]) if runs else "")
        if not found and wanted == AUTO:
            return
        if not found:
            raise UserError(
                f"{run.runs} holds no interrupted run of {run.program}: name its folder, or see {run.flag('output')}"
            )
    folder = Path(found or wanted)
    info = read_model_info(folder)
    if info["script"] != run.program:
        raise UserError(f"{folder} is a run of {info['script']}, not of {run.program}: use it with that script")
    if (folder / "record.json").exists():
        raise UserError(f"{folder} is finished: see its record.json, or start a new run")
    if not (folder / "last.pt").is_file():
        raise UserError(f"{folder / 'last.pt'} does not exist: this run saved nothing to resume from; start it anew")
    if differences := _differences(run, info, places):
        raise UserError(
            f"{folder} was started otherwise ({', '.join(differences)}): resume it as it was, or start a new run"
        )
    moved = {name: value for name, value in run.typed.items() if name in places}
    run.recipe = dataclasses.replace(run.recipe, **(info["recipe"] | moved))
    run.options = dataclasses.replace(run.options, **info["options"])
    run.given = {**info["overrides"], **moved}
    run.resumed, run.folder, run.seed, run.weights = True, folder, info["seed"], info["weights"]


def _differences(run: Run, info: dict[str, Any], places: Collection[str], all_typed: bool = False) -> list[str]:
    """How the command line asks for another run than the one that model.json describes.

    What was typed when it was started need not be typed again, unless `all_typed`.
    """
    then = {**info["recipe"], **info["options"], "demo": info["demo"]}
    now = {name: value for name, value in run.given.items() if name in then and name not in places}
    now = json.loads(json.dumps({**now, "demo": run.options.demo}))  # as model.json holds it: tuples are lists there
    if all_typed:
        now |= {name: None for name in info["overrides"] if name not in run.given and name not in places}
    return [f"{run.flag(name)} {then[name]}, not {value}" for name, value in now.items() if then[name] != value]


def check_data(run: Run) -> None:
    """UserError where a resumed run was started on other images or labels."""
    if not run.resumed:
        return
    then, now = read_model_info(run.folder)["data"], fingerprints(run.data)
    for split in (split for split in then if then[split] != now[split]):
        sizes = [f"{part[split]['count']:,} images of {part[split]['classes']} classes" for part in (then, now)]
        raise UserError(
            f"{run.folder} was started on other images or labels than {run.recipe.data_root} holds now ({split}: "
            f"{sizes[0]} then, {sizes[1]} now): start a new run"
        )


def choose_seed(run: Run) -> None:
    """That of the recipe, or where the published script sets none a drawn one; a resumed run keeps its own."""
    if not run.resumed:
        drawn = distributed.broadcast(int.from_bytes(os.urandom(4), "little"))
        run.seed = drawn if run.recipe.seed is None else run.recipe.seed


def fingerprints(data: Data) -> dict[str, Any]:
    return {name: getattr(data, name).fingerprint() for name in ("train", "val", "test")}


def write_model_info(run: Run) -> None:
    """model.json: enough to resume, to evaluate, and to predict."""
    info = {
        "script": run.program,
        "side": run.side,
        "demo": run.options.demo,
        "seed": run.seed,
        "overrides": {**run.typed, **{name: run.given[name] for name in KEPT if name in run.given}},
        "options": {name: getattr(run.options, name) for name in KEPT},
        "recipe": dataclasses.asdict(run.recipe),
        "weights": run.weights,
        "data": fingerprints(run.data),
        "classes": run.data.classes,
        "preprocessing": describe_transform(run.data.test.transform),
    }
    if distributed.is_main():
        write_text(run.folder / "model.json", json.dumps(info, indent=1))


def read_model_info(folder: Path) -> dict[str, Any]:
    """model.json of a run. UserError where there is none."""
    path = folder / "model.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return info
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} does not exist: expected the folder of a run, OUTPUT/<program>/<time>-<id>") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or start a new run") from error


class Checkpoint(NamedTuple):
    """What --eval or --checkpoint names."""

    path: Path  # of a run's folder or a file
    info: dict[str, Any]  # its model.json; empty for a bare file


def find_checkpoint(run: Run) -> Checkpoint:
    """The checkpoint that the options name, or that of the newest run; `run` gets the recipe that it says."""
    name = run.options.eval or run.options.checkpoint
    runs = [] if name else newest(run, "best.safetensors")
    if not name and not runs:
        raise UserError(f"{run.runs} holds no trained run of {run.program}: name one with {run.flag('checkpoint')}")
    path = Path(name or runs[0])
    if not path.exists():
        raise UserError(f"{path} does not exist: expected a run's folder, a .safetensors file or a released checkpoint")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and not (folder / "model.json").is_file():
        return Checkpoint(path, {})
    info = read_model_info(folder)
    if info["script"] != run.program:
        raise UserError(f"{folder} is a run of {info['script']}, not of {run.program}: use it with that script")
    run.recipe = dataclasses.replace(run.recipe, **{**info["recipe"], **run.typed})
    run.excluded = ["evaluation of a run that has a record of its own"]
    return Checkpoint(path, info)
