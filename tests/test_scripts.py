"""The 21 scripts: their recipes against a table reviewed by hand, their transforms, models, help and demos."""

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, run_script
from torchvision import transforms as T

from common.predict import read_model_info, rebuild
from common.weights import load_checkpoint

# script: lr, batch, epochs, T_max, RandAugment, seed (facts of the released scripts; weight decay 0.05 in all)
PROTOCOL: dict[str, tuple[float, int, int, int, bool, int | None]] = {
    "gft_fgvcaircraft": (1e-5, 16, 50, 50, True, None),
    "gft_food101": (1e-5, 32, 30, 50, False, 42),
    "gft_coco": (1e-5, 16, 20, 20, True, None),
    "transfg_fgvcaircraft": (1e-5, 16, 50, 50, True, None),
    "transfg_food101": (1e-4, 32, 30, 30, False, 42),
    "transfg_coco": (1e-5, 32, 20, 20, True, None),
    "vit_fgvcaircraft": (1e-4, 32, 50, 30, False, 42),
    "deit_fgvcaircraft": (1e-4, 32, 50, 30, False, 42),
    "densenet169_fgvcaircraft": (1e-4, 32, 50, 30, False, 42),
    "resnet18_FGVCAircraft": (1e-4, 32, 50, 30, False, 42),
    "resnetv2_101x3_bitm_fgvcaircraft": (1e-4, 32, 30, 30, False, 42),
    "vit_food101": (1e-4, 32, 30, 30, False, 42),
    "deit_food101": (1e-4, 32, 30, 30, False, 42),
    "densenet169_food101": (1e-4, 32, 30, 30, False, 42),
    "resnet18_Food101": (1e-4, 32, 30, 30, False, 42),
    "resnetv2_101x3_bitm_food101": (1e-4, 32, 30, 30, False, 42),
    "vit_coco": (1e-4, 32, 20, 30, False, 42),
    "deit_coco": (1e-4, 32, 20, 30, False, 42),
    "densenet169_coco": (1e-4, 32, 20, 30, False, 42),
    "resnet18_COCO": (1e-4, 32, 20, 30, False, 42),
    "resnetv2_101x3_bitm_coco": (1e-4, 32, 20, 30, False, 42),
}
TAGS = {
    "gft": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "transfg": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "deit": "deit_base_patch16_224.fb_in1k",
    "densenet169": "densenet169.tv_in1k",
    "resnet18": "resnet18.a1_in1k",
    "resnetv2": "resnetv2_101x3_bit.goog_in21k_ft_in1k",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def family(script: str) -> str:
    return script.partition("_")[0]


def load(script: str) -> Any:
    return importlib.import_module(script)


def splits_of(script: str, demo_output: Path, **changes: Any) -> Any:
    module = load(script)
    return module.data(module.Recipe(data_root=str(demo_output / "demo-data"), **changes))


def test_the_scripts_are_the_published_ones() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == PROTOCOL.keys()


@pytest.mark.parametrize("script", PROTOCOL)
def test_recipe_is_the_published_protocol(script: str) -> None:
    recipe = load(script).Recipe()
    lr, batch, epochs, t_max, _, seed = PROTOCOL[script]
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.t_max, recipe.seed) == (lr, batch, epochs, t_max, seed)
    assert (recipe.weight_decay, recipe.img_size, recipe.weights, recipe.released) == (0.05, 224, "pretrained", False)
    assert recipe.model == TAGS[family(script)]
    assert recipe.model_kwargs == {}
    if family(script) == "transfg":
        assert recipe.num_parts == 100


@pytest.mark.parametrize("script", PROTOCOL)
def test_optimizer_and_schedule(script: str) -> None:
    """AdamW with PyTorch's own betas and eps; half a cosine over T_max epochs, rising again behind it."""
    module = load(script)
    recipe = module.Recipe()
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, scheduler = module.optimize(recipe, [weight])
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (recipe.lr, 0.05, (0.9, 0.999), 1e-8)
    rates = []
    for _ in range(recipe.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [recipe.lr * (1 + np.cos(np.pi * epoch / recipe.t_max)) / 2 for epoch in range(recipe.epochs)]
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("script", PROTOCOL)
def test_transforms(script: str, demo_output: Path) -> None:
    """Order and numbers of every step; the training split alone is augmented."""
    data = splits_of(script, demo_output)
    names = [type(step).__name__ for step in data.train.transform.transforms]
    wanted = ["Resize", "RandomHorizontalFlip", "RandomAutocontrast", "ToTensor", "Normalize"]
    if PROTOCOL[script][4]:
        wanted.insert(3, "RandAugment")
        augment = data.train.transform.transforms[3]
        assert (augment.num_ops, augment.magnitude) == (2, 9)
    assert names == wanted
    for split in (data.train, data.val, data.test):
        resize, normalize = split.transform.transforms[0], split.transform.transforms[-1]
        assert tuple(resize.size) == (224, 224)
        assert resize.interpolation is T.InterpolationMode.BICUBIC
        assert (tuple(normalize.mean), tuple(normalize.std)) == (MEAN, STD)
    for split in (data.val, data.test):
        assert [type(step).__name__ for step in split.transform.transforms] == ["Resize", "ToTensor", "Normalize"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    torch.manual_seed(0)
    assert any(not torch.equal(data.train.transform(picture), data.test.transform(picture)) for _ in range(8))
    assert torch.equal(data.val.transform(picture), data.test.transform(picture))


@pytest.mark.parametrize("script", [script for script in PROTOCOL if script.lower().endswith("food101")])
def test_released_food101_trains_without_augmentation(script: str, demo_output: Path) -> None:
    data = splits_of(script, demo_output, released=True)
    assert [type(step).__name__ for step in data.train.transform.transforms] == ["Resize", "ToTensor", "Normalize"]


@pytest.mark.parametrize("script", PROTOCOL)
def test_splits(script: str, demo_output: Path) -> None:
    data = splits_of(script, demo_output)
    names = (data.train.split, data.val.split, data.test.split)
    if script.lower().endswith("food101"):
        assert names == ("train (80 %, seed 42)", "train (other 20 %, seed 42)", "test")
        assert not set(data.train.ids) & set(data.val.ids)
    elif script.lower().endswith("coco"):
        assert names == ("train2017", "val2017", "val2017")
    else:
        assert names == ("train", "val", "test")
    assert data.selection == ("test-selected" if names[1] == names[2] else "validation-selected")


@pytest.mark.parametrize(
    ("script", "released", "architecture", "parameters"),
    [
        # timm's own published counts less its 1000-class head, plus the head of our classes
        ("vit_food101", False, "vit_base_patch16_224", 85_798_656 + 101 * 769),
        ("deit_fgvcaircraft", False, "deit_base_patch16_224", 85_798_656 + 100 * 769),
        ("densenet169_coco", False, "densenet169", 12_484_480 + 80 * 1665),
        ("resnet18_Food101", False, "resnet18", 11_176_512 + 101 * 513),
        ("resnetv2_101x3_bitm_fgvcaircraft", True, "resnetv2_101x3_bit", None),
        ("resnetv2_101x3_bitm_food101", False, "resnetv2_101x3_bit", None),
        ("resnetv2_101x3_bitm_food101", True, "resnetv2_101x1_bit", None),
        ("resnetv2_101x3_bitm_coco", True, "resnetv2_101x1_bit", None),
    ],
)
def test_models(script: str, released: bool, architecture: str, parameters: int | None) -> None:
    module = load(script)
    classes = {"food101": 101, "fgvcaircraft": 100, "coco": 80}[script.lower().rpartition("_")[2]]
    # Shapes without memory (the largest has 388 million parameters); some versions of timm cannot build a ViT so.
    with torch.device("cpu" if "vit" in architecture or "deit" in architecture else "meta"):
        model = module.build(module.Recipe(weights="none", released=released), classes)
    assert model.pretrained_cfg["architecture"] == architecture
    assert model.num_classes == classes
    if parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_import_has_no_side_effect(tmp_path: Path) -> None:
    """Importing all scripts downloads, writes, logs and prints nothing, chooses no device, starts no process group."""
    code = f"""
import sys, socket, logging
sys.path.insert(0, {str(ROOT)!r})
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = refuse
import torch
for script in {list(PROTOCOL)!r}:
    __import__(script)
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert not logging.getLogger().handlers
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", PROTOCOL)
def test_shape_of_a_script(script: str) -> None:
    """One screen, the same order in all, no loop, no class but Recipe."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 64
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert defined == ["Recipe", "data", "build", "optimize"]
    assert not any(isinstance(node, ast.For | ast.While) for node in ast.walk(tree))
    assert f"python {script}.py" in (ast.get_docstring(tree) or "")


@pytest.mark.parametrize("script", PROTOCOL)
def test_help_names_every_field_with_its_default(script: str) -> None:
    outcome = run_script(f"{script}.py", "--help")
    assert outcome.status == 0
    text = " ".join(outcome.out.split())
    recipe = load(script).Recipe()
    for field in dataclasses.fields(recipe):
        assert f"--{field.name.replace('_', '-')}" in text
    lr, batch, epochs, t_max, _, seed = PROTOCOL[script]
    for flag, default in (
        ("--lr X", f"{lr:g}"),
        ("--batch-size N", batch),
        ("--epochs N", epochs),
        ("--t-max N", t_max),
    ):
        described = text.split(flag, 1)[1].split("--", 1)[0]
        assert f"[{default}]" in described
    assert f"[{'none' if seed is None else seed}]" in text.split("--seed N", 1)[1].split("--weights", 1)[0]


@pytest.mark.parametrize("script", PROTOCOL)
def test_demo_to_the_first_evaluation(script: str, demo_output: Path) -> None:
    """Real layout, real reader, the same model class built small; model.json builds the trained model again."""
    outcome = run_script(
        f"{script}.py", "--demo", "--output", demo_output, "--epochs", "1", "--limit", "96", "--workers", "0"
    )
    assert outcome.status == 0, outcome.err
    record = outcome.record
    assert record["script"] == f"{script}.py"
    assert "demo" in record["excluded"]
    assert record["overrides"] == {"epochs": 1}
    best = record["results"]["best"]["test"]
    assert best["total"] == 96
    assert best["top1"] == best["correct"] / 96
    assert "DEMO" in outcome.out
    info = read_model_info(outcome.folder)
    assert load_checkpoint(rebuild(info["architecture"]), outcome.folder) == []
    lines = [json.loads(line) for line in (outcome.folder / "log.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "val"}


@pytest.mark.parametrize("script", ["gft_food101", "resnet18_COCO"])
def test_demo_to_the_end(script: str, demo_output: Path) -> None:
    outcome = run_script(f"{script}.py", "--demo", "--output", demo_output, "--workers", "0")
    assert outcome.status == 0, outcome.err
    results = outcome.record["results"]
    assert results["best"]["test"]["top1"] >= 0.9
    assert results["last"]["test"]["top1"] >= 0.9
    seen = json.loads((outcome.folder / "record.json").read_text())["data"]["test"]["count"]
    assert results["best"]["test"]["total"] == seen
