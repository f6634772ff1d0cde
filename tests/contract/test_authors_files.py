"""Checkpoints of the authors, in the layouts that their programs write: evaluated, asked, and trained on from."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from contract.programs import METHOD, PROGRAMS, Outcome, log_of, new_home, reference, run, run_folder

GLSIM = PROGRAMS["glsim"].published[0]  # its file has the names and the layout of the authors' program


def evaluated(home: Path) -> dict[str, Any]:
    record = json.loads((run_folder(home) / "record.json").read_text(encoding="utf-8"))
    assert record["status"] == "evaluated"
    return record


def assert_counts(home: Path, like: dict[str, Any]) -> None:
    found = evaluated(home)["results"]["checkpoint"]["test"]
    assert (found["correct"], found["total"]) == (like["correct"], like["total"])
    assert found["loss"] == pytest.approx(like["loss"], rel=0, abs=1e-6)  # float32 of a loss of 2.3


@pytest.mark.parametrize("name", ["gft", "densenet"])
def test_a_bare_state_dict(name: str, tmp_path: Path) -> None:
    """As the 21 released scripts save: GFT's has the moving average of its last batch too, which no model needs."""
    program, like, home = PROGRAMS[name], reference(name), new_home(tmp_path / "home", name)
    state = load_file(like.folder / "best.safetensors")
    if name == "gft":
        state |= {
            f"hierarchical_blocks.{stage}.ema_grad": torch.zeros(3, size) for stage, size in enumerate((12, 8, 4))
        }
    torch.save(state, home / "best.pth")
    run([program.file, *program.other("--limit", "48", "--eval", "best.pth")], home).done()
    assert_counts(home, like.record["results"]["best"]["test"])


def namespace(home: Path, **changes: Any) -> dict[str, Any]:
    """Writes the reference's checkpoint as GLSim's authors do: its options in an argparse.Namespace, an optimizer."""
    content = torch.load(reference("glsim").home / GLSIM, weights_only=True)
    theirs = {"world_size": 1, "anchor_size": 16, "device": "cuda", "a_field_of_theirs": {"a": [1]}}
    content["config"] = argparse.Namespace(**(content["config"] | theirs | changes))
    content["optimizer"] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1).state_dict()
    torch.save(content, home / "cub_glsim_224.pth")
    return content


WORDS = ("--ckpt_path", "cub_glsim_224.pth", "--limit", "48")


def test_a_namespace(tmp_path: Path) -> None:
    """The model comes from the checkpoint, whatever the defaults of the command line are."""
    home, like = new_home(tmp_path / "home", "glsim"), reference("glsim").record
    namespace(home)
    run([PROGRAMS["glsim"].file, *PROGRAMS["glsim"].other(*WORDS, "--test_only")], home).done()
    assert_counts(home, like["results"]["best"]["test"])
    recipe = evaluated(home)["recipe"]
    for field in ("dynamic_top", "hidden_size", "reducer", "model_name", "image_size", "resize_size"):
        assert recipe[field] == like["recipe"][field]


def test_training_starts_from_it(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", "glsim")
    content = namespace(home)
    still = ("--lr", "1e-12", "--warmup_lr", "0", "--min_lr", "0", "--epochs", "1")
    words = PROGRAMS["glsim"].other(*WORDS, "--cfg_method", METHOD, "--transfer_learning", *still)
    run([PROGRAMS["glsim"].file, *words], home).done()
    record = json.loads((run_folder(home) / "record.json").read_text(encoding="utf-8"))
    assert (record["status"], record["weights"]["source"]) == ("finished", "cub_glsim_224.pth")
    head = load_file(run_folder(home) / "best.safetensors")["head.weight"]
    torch.testing.assert_close(head, content["model"]["model.head.weight"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "folder"), [("dafb", "data/dafb/"), ("mybirds", "data/mybirds/")])
def test_where_the_data_of_it_lie(name: str, folder: str, tmp_path: Path) -> None:
    """In a folder here of the data set's name, not where they lay on the authors' machine."""
    home = new_home(tmp_path / "home", "glsim")
    namespace(home, dataset_name=name, dataset_root_path="/home/authors/birds")
    run([PROGRAMS["glsim"].file, *WORDS[:2], "--test_only"], home).sentence(folder)


def refused(home: Path, name: str, *words: str) -> Outcome:
    return run([PROGRAMS[name].file, *PROGRAMS[name].other("--limit", "48", *words)], home)


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregator": False},
        {"num_hidden_layers": 5},
        {"hidden_size": 128, "num_attention_heads": 2},
        {"image_size": 32, "resize_size": None, "test_resize_size": None},
        {"image_size": "16"},
        {"sim_metric": "cosine"},
    ],
)
def test_a_checkpoint_that_does_not_fit_its_options(changes: dict[str, Any], tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", "glsim")
    namespace(home, **changes)
    refused(home, "glsim", *WORDS, "--test_only").sentence("cub_glsim_224.pth")


def test_checkpoints_of_another_experiment(tmp_path: Path) -> None:
    """Another number of classes, another size of images, a model without the fusion: each names the file."""
    gft, ffvt = new_home(tmp_path / "gft", "gft"), new_home(tmp_path / "ffvt", "ffvt")
    state = load_file(reference("gft").folder / "best.safetensors")
    seven = {"classifier.weight": torch.zeros(7, 64), "classifier.bias": torch.zeros(7)}
    torch.save(state | seven, gft / "seven.pth")
    refused(gft, "gft", "--eval", "seven.pth").sentence("seven.pth", "7", "10")
    torch.save({name: value for name, value in state.items() if "block" not in name}, gft / "less.pth")
    refused(gft, "gft", "--eval", "less.pth").sentence("less.pth")
    theirs = str(reference("ffvt").home / PROGRAMS["ffvt"].published[0])
    words = ("--dataset", "CUB", "--eval", theirs)
    refused(ffvt, "ffvt", *words).sentence("k_checkpoint.bin")
    larger = ("--feature_fusion", "--img_size", "20", "--resize_size", "20")
    refused(ffvt, "ffvt", *words, *larger).sentence("k_checkpoint.bin")


def test_what_ffvt_writes_beside_its_run() -> None:
    """The authors' names and tensors in the checkpoint, and the three published curves."""
    like = reference("ffvt")
    theirs = torch.load(like.home / PROGRAMS["ffvt"].published[0], weights_only=True)
    ours = load_file(like.folder / "best.safetensors")
    assert next(iter(theirs)) == "transformer.embeddings.position_embeddings"
    query = theirs["transformer.encoder.layer.1.attn.query.weight"]
    assert any(torch.equal(query, value[: len(query)]) for name, value in ours.items() if name.endswith("qkv.weight"))
    assert sum(value.numel() for value in theirs.values()) == sum(value.numel() for value in ours.values())
    curves = like.written["logs/k curves"]
    assert curves.keys() == {"test/accuracy", "train/loss", "train/lr"}
    lines = log_of(like.folder)
    for tag, kind, field in (
        ("test/accuracy", "val", "top1"),
        ("train/loss", "train", "loss"),
        ("train/lr", "train", "lr"),
    ):
        logged = [(line["step"], line[field]) for line in lines if line["kind"] == kind]
        assert curves[tag] == [(step, pytest.approx(value, rel=1e-6, abs=1e-9)) for step, value in logged]  # float32
