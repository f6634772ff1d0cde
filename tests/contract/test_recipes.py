"""The 21 scripts, FFVT and GLSim: recipes, optimizers, schedules, transforms, splits and models, each by a table.

The tables were typed from the published sources and reviewed. Where a figure can be seen in what a program writes (its
record, its log, last.pt), it is read there; of the scripts Recipe, data, build and optimize are called.
"""

import ast
import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from contract.programs import METHOD, ROOT, Outcome, log_of, new_home, reference, run, state_of

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
# data set: classes, then train, val and test split, and what the choice of the epoch is called
DATA: dict[str, tuple[int, tuple[str, str, str], str]] = {
    "food101": (101, ("train (80 %, seed 42)", "train (other 20 %, seed 42)", "test"), "validation-selected"),
    "fgvcaircraft": (100, ("train", "val", "test"), "validation-selected"),
    "coco": (80, ("train2017", "val2017", "val2017"), "test-selected"),
}
READER = {"food101": "food101", "fgvcaircraft": "aircraft", "coco": "coco"}
EACH = pytest.mark.parametrize("script", PROTOCOL)


def family(script: str) -> str:
    return script.partition("_")[0]


def data_set(script: str) -> str:
    return script.lower().rpartition("_")[2]


def load(script: str) -> Any:
    return importlib.import_module(script)


def cosine(lr: float, epoch: float, t_max: int) -> float:
    return lr * (1 + math.cos(math.pi * epoch / t_max)) / 2


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    """Every script's demo, two epochs of two steps with the published rate and T_max; the folder and what was said."""
    reference("gft")
    home = new_home(tmp_path_factory.mktemp("demos") / "gft", "gft")
    found = {}
    for script, (lr, _, _, t_max, _, _) in PROTOCOL.items():
        words = ("--lr", str(lr), "--t-max", str(t_max), "--epochs", "2", "--batch-size", "8", "--limit", "16")
        more = ("--log-every", "1", "--workers", "0", "--output", str(home / "runs"))
        words = (*words, *more, "--demo", "--seed", "7")
        outcome = run([f"{script}.py", *words], home).done()
        (line,) = [line for line in outcome.out.splitlines() if line.startswith("run folder: ")]
        found[script] = Path(line.removeprefix("run folder: ")), outcome
    return found


@pytest.fixture(scope="module")
def demo_data(demos: dict[str, Any]) -> str:
    return str(reference("gft").home / "runs" / "demo-data") if demos else ""


def test_the_scripts_are_the_published_ones() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == PROTOCOL.keys()


@EACH
def test_recipe_is_the_published_protocol(script: str) -> None:
    recipe = load(script).Recipe()
    lr, batch, epochs, t_max, _, seed = PROTOCOL[script]
    meant = dict(lr=lr, batch_size=batch, epochs=epochs, t_max=t_max, seed=seed, weight_decay=0.05, img_size=224)
    meant |= dict(weights="pretrained", released=False, model=TAGS[family(script)], model_kwargs={}, data_root="data")
    if family(script) == "transfg":
        meant["num_parts"] = 100
    assert dataclasses.asdict(recipe) == meant


@EACH
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
    expected = [cosine(recipe.lr, epoch, recipe.t_max) for epoch in range(recipe.epochs)]
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-15)


@EACH
def test_demo(script: str, demos: dict[str, tuple[Path, Outcome]]) -> None:
    """The real layout and reader, the same model built small; rate and optimizer are those that `optimize` makes."""
    folder, outcome = demos[script]
    lr, _, _, t_max, _, _ = PROTOCOL[script]
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert (record["row"], record["script"], record["side"]) == (script, f"{script}.py", "described")
    assert record["excluded"] == ["demo"]
    assert "DEMO" in outcome.out
    assert record["overrides"] == {"lr": lr, "t_max": t_max, "epochs": 2, "batch_size": 8, "seed": 7}
    _, splits, selection = DATA[data_set(script)]
    assert tuple(record["data"][name]["split"] for name in ("train", "val", "test")) == splits
    assert {record["data"][name]["count"] for name in ("train", "val", "test")} == {16}
    assert (record["data"]["name"], record["selection"]["kind"]) == (READER[data_set(script)], selection)
    assert record["selection"]["split"] == splits[1]
    for entry in record["results"].values():
        assert entry["test"]["total"] == 16
        assert entry["test"]["top1"] == entry["test"]["correct"] / 16
    log = log_of(folder)
    assert [(line["kind"], line["step"]) for line in log] == [
        *(("train", 1), ("train", 2), ("val", 2), ("train", 3), ("train", 4), ("val", 4))
    ]
    rates = [line["lr"] for line in log if line["kind"] == "train"]
    np.testing.assert_allclose(rates, [cosine(lr, epoch, t_max) for epoch in (0, 0, 1, 1)], rtol=1e-9)
    (group,) = state_of(folder)["optimizer"]["param_groups"]
    assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.05, (0.9, 0.999), 1e-8)
    assert "nesterov" not in group
    shown = json.loads((folder / "model.json").read_text(encoding="utf-8"))["preprocessing"]
    assert [step["name"] for step in shown] == ["Resize", "ToTensor", "Normalize"]
    assert (tuple(shown[2]["mean"]), tuple(shown[2]["std"])) == (MEAN, STD)
    assert shown[0]["interpolation"] == "bicubic"


@EACH
def test_transforms(script: str, demo_data: str) -> None:
    """Order and numbers of every step; the training split alone is augmented."""
    module = load(script)
    data = module.data(module.Recipe(data_root=demo_data))
    names = [type(step).__name__ for step in data.train.transform.transforms]
    wanted = ["Resize", "RandomHorizontalFlip", "RandomAutocontrast", "ToTensor", "Normalize"]
    if PROTOCOL[script][4]:
        wanted.insert(3, "RandAugment")
        augment = data.train.transform.transforms[3]
        assert (augment.num_ops, augment.magnitude) == (2, 9)
    assert names == wanted
    assert (data.train.transform.transforms[1].p, data.train.transform.transforms[2].p) == (0.5, 0.5)
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


def test_parts_of_a_split_have_no_image_in_common(demos: dict[str, tuple[Path, Outcome]]) -> None:
    module = load("vit_food101")
    data = module.data(module.Recipe(data_root=str(reference("gft").home / "runs" / "demo-data")))
    train, val = set(data.train.paths), set(data.val.paths)
    assert train
    assert not train & val
    assert len(train) == len(data.train) == int(0.8 * len(train | val))


@pytest.mark.parametrize(
    ("script", "architecture", "parameters"),
    [
        # timm's own published counts less its 1000-class head, plus the head of our classes
        ("vit_food101", "vit_base_patch16_224", 85_798_656 + 101 * 769),
        ("deit_fgvcaircraft", "deit_base_patch16_224", 85_798_656 + 100 * 769),
        ("densenet169_coco", "densenet169", 12_484_480 + 80 * 1665),
        ("resnet18_Food101", "resnet18", 11_176_512 + 101 * 513),
        ("resnetv2_101x3_bitm_fgvcaircraft", "resnetv2_101x3_bit", None),
        ("resnetv2_101x3_bitm_food101", "resnetv2_101x3_bit", None),
        ("resnetv2_101x3_bitm_coco", "resnetv2_101x3_bit", None),
    ],
)
def test_models(script: str, architecture: str, parameters: int | None) -> None:
    module = load(script)
    classes = DATA[data_set(script)][0]
    # Shapes without memory (the largest has 388 million parameters); some versions of timm cannot build a ViT so.
    with torch.device("cpu" if "vit" in architecture or "deit" in architecture else "meta"):
        model = module.build(module.Recipe(weights="none"), classes)
    assert model.pretrained_cfg["architecture"] == architecture
    assert model.num_classes == classes
    if parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_gft_has_its_93_million_parameters() -> None:
    """docs/fidelity.md GFT-5: 93.7 M, of which 64.6 M take part as described and 57.5 M as released."""
    module = load("gft_food101")
    for released, part in ((False, 64.6), (True, 57.5)):
        model = module.build(module.Recipe(weights="none", released=released), 101)
        counts = [parameter.numel() for parameter in model.parameters()]
        assert sum(counts) / 1e6 == pytest.approx(93.7, abs=0.05)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert trained / 1e6 == pytest.approx(part, abs=0.05)


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


@EACH
def test_shape_of_a_script(script: str) -> None:
    """One screen, the same order in all, no loop, no class but Recipe."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 64
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert defined == ["Recipe", "data", "build", "optimize"]
    assert not any(isinstance(node, ast.For | ast.While) for node in ast.walk(tree))
    assert f"python {script}.py" in (ast.get_docstring(tree) or "")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gft_food101", "resnet18_COCO"])
def test_demo_learns(script: str, tmp_path: Path, demo_data: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo-data").symlink_to(demo_data)
    run([f"{script}.py", "--demo", "--workers", "0"], tmp_path).done()
    (path,) = tmp_path.glob("runs/*/*/record.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert results["best"]["test"]["top1"] >= 0.9
    assert results["last"]["test"]["top1"] >= 0.9


# FFVT and GLSim: what a short run has done, by the formula


def trace(program: str, home: Path, *words: str) -> tuple[list[float], Path]:
    """The learning rate of each update, as the log has it, and the run's folder."""
    before = set(home.glob("runs/*/*/"))
    assert run([program, *words], home).status == 0
    (folder,) = [path for path in set(home.glob("runs/*/*/")) - before if path.parent.name != "demo-data"]
    return [line["lr"] for line in log_of(folder) if line["kind"] == "train"], folder


FFVT = ("--name", "n", "--dataset", "CUB", "--demo", "--workers", "0", "--log_every", "1", "--limit", "16")


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rates_of_ffvt(decay: str, tmp_path: Path) -> None:
    """Update u, from 0, has the schedule at u: the first has rate 0 (docs/fidelity.md FFVT-6). SGD, momentum 0.9."""
    reference("ffvt")
    home = new_home(tmp_path / "home", "ffvt")
    lr, warmup, steps = 0.02, 3, 9
    numbers = ("--warmup_steps", str(warmup), "--num_steps", str(steps), "--learning_rate", str(lr))
    more = ("--decay_type", decay, "--train_batch_size", "4", "--eval_every", "9", "--weight_decay", "0.01")
    rates, folder = trace("ffvt/train.py", home, *FFVT, *numbers, *more)
    done = [(update - warmup) / (steps - warmup) for update in range(steps)]
    fall = [0.5 * (1 + math.cos(math.pi * share)) if decay == "cosine" else 1 - share for share in done]
    expected = [lr * (update / warmup if update < warmup else fall[update]) for update in range(steps)]
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-12)
    assert rates[0] == 0
    (group,) = state_of(folder)["optimizer"]["param_groups"]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 0.01)
    assert group["initial_lr"] == lr


GLSIM = (
    "--cfg_method",
    METHOD,
    "--demo",
    "--cpu_workers",
    "0",
    "--log_freq",
    "1",
    "--limit",
    "16",
    "--batch_size",
    "4",
)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
def test_rates_of_glsim(schedule: str, tmp_path: Path) -> None:
    """Update u, from 0, has the schedule at u, warm-up from `warmup_lr`; sgd with Nesterov momentum (GLSIM-17)."""
    reference("glsim")
    home = new_home(tmp_path / "home", "glsim")
    lr, low, minimum, warmup, epochs, per_epoch = 0.02, 1e-4, 1e-3, 3, 3, 4
    numbers = ("--lr", str(lr), "--warmup_lr", str(low), "--min_lr", str(minimum), "--warmup_steps", str(warmup))
    more = ("--sched", schedule, "--epochs", str(epochs), "--decay_epochs", "1", "--decay_rate", "0.5")
    rates, folder = trace("glsim/tools/train.py", home, *GLSIM, *numbers, *more, "--weight_decay", "0.1")
    total = epochs * per_epoch
    expected = []
    for update in range(total):
        if update < warmup:
            rate = low + update * (lr - low) / warmup
        elif schedule == "cosine":
            rate = minimum + (lr - minimum) * (1 + math.cos(math.pi * update / total)) / 2
        elif schedule == "linear":
            rate = lr * (1 - 0.99 * (update - warmup) / (total - warmup))
        else:
            rate = lr * 0.5 ** ((update - warmup) // per_epoch)
        expected.append(rate)
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    groups = state_of(folder)["optimizer"]["param_groups"]
    assert {(group["momentum"], group["nesterov"]) for group in groups} == {(0.9, True)}
    assert sorted(group["weight_decay"] for group in groups) == [0, 0.1]  # vectors, and the others


def test_options_of_ffvt_reach_what_they_name(tmp_path: Path) -> None:
    """Static loss scale and the batches of a run, from last.pt and the log."""
    reference("ffvt")
    home = new_home(tmp_path / "home", "ffvt")
    words = ("--num_steps", "5", "--eval_every", "2", "--train_batch_size", "8", "--precision", "fp16")
    words += ("--loss_scale", "64", "--seed", "7", "--eval_batch_size", "5")
    _, folder = trace("ffvt/train.py", home, *FFVT, *words)
    state = state_of(folder)
    assert (state["step"], state["batch_size"], state["precision"]["scale"]) == (5, 8, 64.0)
    assert [line["step"] for line in log_of(folder) if line["kind"] == "val"] == [2, 4, 5]
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert (record["seed"], record["precision"], record["options"]["eval_batch_size"]) == (7, "fp16", 5)
