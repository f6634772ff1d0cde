"""`python tests/against.py REV`: what computes otherwise in this working tree than in another commit, from outside.

Every program runs a small demo in both trees, on this machine, by this Python, with the same words; weights, history,
log and record are compared to the bit. Times, speeds, memory, the machine and the code's version may differ. The exit
status is 0 where all is the same, else 1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = 2  # programs at a time, each on one core
SHOWN = 6  # differences of a file
# What is a run's own, by its name in record.json, log.jsonl and last.pt's history.
OWN = {
    *("started", "finished", "time", "wall_seconds", "speed", "images_per_s", "peak_memory_bytes", "host", "device"),
    "code",  # the version of it, among those of the libraries
}
SMALL = "--demo --limit 48 --output runs --device cpu --seed 1 "
SCRIPT = SMALL + "--epochs 2 --batch-size 16 --workers 0 --log-every 1"
MODELS = ("gft", "transfg", "vit", "deit", "densenet169", "resnetv2_101x3_bitm")
SCRIPTS = [f"{model}_{data}.py" for model in MODELS for data in ("coco", "fgvcaircraft", "food101")]
SCRIPTS += [f"resnet18_{data}.py" for data in ("COCO", "FGVCAircraft", "Food101")]
FFVT = (
    f"ffvt/train.py --name demo --dataset CUB --feature_fusion {SMALL} --train_batch_size 16 --num_steps 6 "
    "--eval_every 3 --warmup_steps 3 --workers 0 --log_every 1 "
    "--model_kwargs patch_size=4 hidden_size=64 mlp_dim=128 num_heads=4 num_layers=4 dropout=0.1"
)
GLSIM = (
    f"glsim/tools/train.py --cfg_method tree/glsim/configs/methods/glsim.yaml {SMALL} --batch_size 8 --epochs 2 "
    "--eval_freq 1 --warmup_steps 3 --cpu_workers 0 --log_freq 1 --hidden_dropout_prob 0.1 --cm --mu --ra 2"
)
PROGRAMS = [*(f"{script} {SCRIPT}" for script in SCRIPTS), FFVT, GLSIM]
RELEASED = ("gft_coco", "resnetv2_101x3_bitm_fgvcaircraft", "transfg_food101", "ffvt", "glsim")
PROGRAMS += [f"{command} --released" for command in PROGRAMS if command.startswith(RELEASED)]
RUNNING: set["subprocess.Popen[bytes]"] = set()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev", metavar="REV", help="a commit, or what names one")
    parser.add_argument("--only", default="", metavar="TEXT", help="only programs that have this in their name [all]")
    options = parser.parse_args()
    if git("rev-parse", "--verify", f"{options.rev}^{{commit}}").returncode:
        sys.exit(f"against: error: {options.rev} is no commit in {ROOT}: `git fetch` what is elsewhere")
    programs = [command for command in PROGRAMS if options.only in title_of(command)]
    if not programs:
        sys.exit(f"against: error: --only {options.only}: no program has that in its name")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the worktree is removed all the same
    different = 0
    with worktree(options.rev) as (rev, homes), ThreadPoolExecutor(TOGETHER) as pool:
        runs = [
            [pool.submit(run, tree, homes / f"{number}-{side}", command) for side, tree in enumerate((ROOT, rev))]
            for number, command in enumerate(programs)
        ]
        try:
            for command, pair in zip(programs, runs, strict=True):
                found = compare(*(one.result() for one in pair))
                different += bool(found)
                print(f"{title_of(command)}: {'DIFFERS' if found else 'same'}", *found, sep="\n    ", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*RUNNING]:
                process.kill()
            raise
    print(f"{len(programs)} runs here and at {options.rev}: {different or 'none'} differ")
    return int(different > 0)


def git(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", "-C", str(ROOT), *words], check=False, capture_output=True, text=True)


def title_of(command: str) -> str:
    return command.split()[0] + " --released" * command.endswith(" --released")


@contextmanager
def worktree(rev: str) -> Iterator[tuple[Path, Path]]:
    """The tree of a commit, and a folder to run in; neither is left."""
    with tempfile.TemporaryDirectory(prefix="against-", ignore_cleanup_errors=True) as scratch:
        tree = Path(scratch, "tree")
        try:
            added = git("worktree", "add", "--detach", str(tree), rev)
            if added.returncode:
                sys.exit(f"against: error: no worktree of {rev} in {tree}: {added.stderr.strip()}")
            yield tree, Path(scratch)
        finally:
            git("worktree", "remove", "--force", str(tree))


def run(tree: Path, home: Path, command: str) -> Path | str:
    """Run a program of a tree in the folder `home`; return that, or how it failed."""
    home.mkdir()
    (home / "tree").symlink_to(tree)  # so that a path of the command line, which goes into the record, is the same
    with open(home / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *f"tree/{command}".split()],
            cwd=home,
            env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        RUNNING.add(process)
        status = process.wait()
        RUNNING.discard(process)
    said = (home / "stderr").read_text(encoding="utf-8", errors="replace").split("\n")
    return home if status == 0 else f"ends with {status}: {next(filter(None, reversed(said)), '')}"


def compare(here: Path | str, rev: Path | str) -> list[str]:
    """What differs between two runs, a line each; of each the folder that it ran in, or how it failed."""
    failed = [f"{end} {side}" for end, side in ((here, "here"), (rev, "at REV")) if isinstance(end, str)]
    if isinstance(here, str) or isinstance(rev, str):
        return failed
    one, two = written(here), written(rev)
    return [line for name in one | two for line in differences(name, one.get(name, {}), two.get(name, {}))]


def written(home: Path) -> dict[str, dict[str, Any]]:
    """Item -> place in it -> figure or tensor, of what the one run in `home` has left."""
    (record,) = home.glob("runs/*/*/record.json")
    state = torch.load(record.with_name("last.pt"), weights_only=True)
    items = {"last.pt model": state["model"], "last.pt history": state["history"]}
    with safe_open(record.with_name("best.safetensors"), "pt") as file:
        items["best.safetensors"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    items["log"] = [json.loads(line) for line in record.with_name("log.jsonl").read_text(encoding="utf-8").splitlines()]
    items["record"] = json.loads(record.read_text(encoding="utf-8"))
    for published in (*home.glob("output/*.bin"), *home.glob("results_train/*/*.pth")):
        items[str(published.relative_to(home))] = torch.load(published, weights_only=True)
    return {name: dict(figures(content)) for name, content in items.items()}


def figures(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    parts = dict(enumerate(content)) if isinstance(content, list) else content
    if not isinstance(parts, dict) or not parts:
        yield place, content
        return
    for key, part in parts.items():
        if key not in OWN:
            yield from figures(part, f"{place}/{key}" if place else str(key))


def differences(name: str, here: dict[str, Any], rev: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {place}: only here" for place in here if place not in rev]
    lines += [f"{name}: {place}: only at REV" for place in rev if place not in here]
    for place in (place for place in here if place in rev):
        how = difference(here[place], rev[place])
        lines += [f"{name}: {place}: {how}"] if how else []
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"{name}: {len(lines) - SHOWN} more of {len(here)}"]


def difference(here: Any, rev: Any) -> str:
    """How two figures or tensors differ, or ''."""
    if not (isinstance(here, torch.Tensor) and isinstance(rev, torch.Tensor)):
        size = f", by {abs(here - rev):.3g}" if isinstance(here, float) and isinstance(rev, float) else ""
        return "" if repr(here) == repr(rev) else f"{here!r} here, {rev!r} at REV{size}"
    kinds = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (here, rev)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]} here, {kinds[1]} at REV"
    if torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (here, rev))):
        return ""
    return f"by {(here.double() - rev.double()).abs().max().item():.3g} at most"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
