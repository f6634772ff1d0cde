"""No network, no data, no weights: what needs them says so in one sentence; what does not, never asks."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from contract.programs import METHOD, PROGRAMS, ROOT, Outcome, new_home, reference, run, run_folder

CLOSED = ROOT / "tests" / "contract" / "closed.py"


def closed(words: Sequence[str | Path], home: Path) -> tuple[Outcome, str]:
    """A program to which the network is closed, and what it asked of it."""
    report = home / "asked"
    outcome = run([CLOSED, report, ROOT / words[0], *words[1:]], home)
    asked = report.read_text()
    report.unlink()
    return outcome, asked


@pytest.mark.parametrize("name", ["gft", "ffvt", "glsim"])
def test_a_demo_asks_nothing_of_the_network(name: str, tmp_path: Path) -> None:
    """Trained, and asked what is on a picture."""
    program, home = PROGRAMS[name], new_home(tmp_path / "home", name)
    outcome, asked = closed([program.file, *program.start("--limit", "16")], home)
    assert (outcome.done().status, asked) == (0, "")
    picture = next((home / "runs" / "demo-data").rglob("*.jpg"))
    words = [program.file, *program.other("--predict", picture, "--checkpoint", reference(name).folder)]
    outcome, asked = closed(words, home)
    assert (outcome.done().status, asked) == (0, "")


DOWNLOADED = {
    "gft_food101.py --data-root runs/demo-data --workers 0": ("gft", "vit_base_patch16_224", "--weights"),
    "densenet169_food101.py --data-root runs/demo-data --workers 0": ("gft", "densenet169", "--weights"),
    "glsim/tools/train.py --dataset_root_path runs/demo-data/CUB --pretrained": ("glsim", "ckpts/ViT-B_16.npz"),
}


@pytest.mark.parametrize("command", DOWNLOADED, ids=["gft-vit", "gft-dense", "glsim"])
def test_weights_that_cannot_be_downloaded(command: str, tmp_path: Path) -> None:
    """By their name, with the flag that names a file instead, or the place where one is looked for."""
    name, *named = DOWNLOADED[command]
    outcome, asked = closed(command.split(), new_home(tmp_path / "home", name))
    outcome.sentence(*named)
    assert asked


MISSING = {
    "gft_food101.py": ("food-101", True),
    "gft_fgvcaircraft.py": ("fgvc-aircraft-2013b", True),
    "gft_coco.py": ("coco", True),
    "ffvt/train.py --name n --dataset CUB": ("data/CUB", False),
    "ffvt/train.py --name n --dataset cotton": ("data/cotton", False),
    f"glsim/tools/train.py --cfg_method {METHOD}": ("CUB_200_2011", False),
}


@pytest.mark.parametrize("command", MISSING)
def test_data_that_are_missing(command: str, tmp_path: Path) -> None:
    """By their folder; asked for are only those that their authors let be downloaded, and not with --no-download."""
    folder, downloads = MISSING[command]
    for words, asks in ((command.split(), downloads), ([*command.split(), "--no-download"], False)):
        outcome, asked = closed(words, tmp_path)
        assert folder in outcome.sentence()
        assert bool(asked) == asks


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gft", ("--weights", "none.pth")),
        ("gft", ("--weights", "none.npz")),
        ("gft", ("--eval", "none.safetensors")),
        ("gft", ("--resume", "none-run")),
        ("gft", ("--predict", "none.jpg")),
        ("ffvt", ("--eval", "none.bin")),
        ("glsim", ("--ckpt_path", "none.pth", "--test_only")),
        ("glsim", ("--cfg", "none.yaml")),
    ],
)
def test_files_that_are_missing(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    program, home = PROGRAMS[name], new_home(tmp_path / "home", name)
    outcome, asked = closed([program.file, *program.other(*words)], home)
    assert words[1] in outcome.sentence()
    assert not asked


def test_pretrained_weights_that_were_downloaded_before(tmp_path: Path) -> None:
    """The published way to start, with a file of random weights where the hub's client keeps its downloads."""
    home, name = new_home(tmp_path / "home", "gft"), "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model(name, pretrained=False)  # 1000 classes, as the real file has
    cache, commit = home / "hub" / f"models--timm--{name}", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    file = cache / "snapshots" / commit / "model.safetensors"
    save_file(model.state_dict(), file)
    words = ["vit_food101.py", "--data-root", "runs/demo-data", "--model", name, "--limit", "2", "--batch-size", "2"]
    words += ["--epochs", "1", "--workers", "0", "--lr", "1e-30", "--weight-decay", "0"]  # too small to move them
    closed(words, home)[0].done()
    weights = json.loads((run_folder(home) / "record.json").read_text(encoding="utf-8"))["weights"]
    assert weights == {"source": f"timm/{name}", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    trained = load_file(run_folder(home) / "best.safetensors")
    assert trained.pop("head.weight").shape == (10, 192)
    del trained["head.bias"]
    for key, value in trained.items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=1e-29)
