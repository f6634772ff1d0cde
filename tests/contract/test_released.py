"""What `--released` switches: one test for each id of the first table of docs/fidelity.md.

Each compares both sides, where it can with a formula in float64. Models with a head of zeros and known biases make
the loss in the log a function of the labels alone: it says which images a step had.
"""

import importlib
import json
import math
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from contract.programs import METHOD, PROGRAMS, ROOT, log_of, new_home, reference, run, start_ranks, state_of

FIDELITY = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
SIDES = pytest.mark.parametrize("released", [False, True], ids=["described", "released"])
BIASES = np.array([0.0, 0.3, 0.7, 1.2, 1.8, 2.5, 3.3, 4.2, 5.2, 6.3])  # of ten classes; no two differences are equal


def test_every_switched_id_has_a_test() -> None:
    """The last column of the table names it."""
    rows = re.findall(r"^\| ([A-Z]+-\d+) \|.*\| `(\w+)` \|$", FIDELITY.partition("## Our reading")[0], re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| [A-Z]+-\d+ \|", FIDELITY.partition("## Our reading")[0], re.MULTILINE)) > 0
    assert [name for _, name in rows if name not in globals() or not name.startswith("test_")] == []


def side(released: bool) -> list[str]:
    return ["--released"] if released else []


def record_in(home: Path) -> dict[str, Any]:
    """Of the newest run there."""
    newest = max(home.glob("runs/*/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text(encoding="utf-8"))


def losses(home: Path) -> list[float]:
    """The loss of each update of the one run there."""
    (log,) = home.glob("runs/*/*/log.jsonl")
    return [line["loss"] for line in log_of(log.parent) if line["kind"] == "train"]


# GFT and the 21 scripts


def evaluated(home: Path, weights: Path, released: bool) -> float:
    words = ("--demo", "--limit", "48", "--workers", "0", "--eval", weights)
    run(["gft_food101.py", *words, *side(released)], home).done()
    record = record_in(home)
    assert record["side"] == ("released" if released else "described")
    return record["results"]["checkpoint"]["test"]["loss"]


def test_the_stages_of_gft_reach_the_logits_as_described_alone(tmp_path: Path) -> None:
    """Random weights in all three GALA stages leave every figure of the released side as it was."""
    home = new_home(tmp_path / "home", "gft") if reference("gft") else tmp_path
    weights = load_file(reference("gft").folder / "best.safetensors")
    stages = [name for name in weights if name.startswith("hierarchical_blocks.")]
    assert {name.split(".")[1] for name in stages} == {"0", "1", "2"}
    draw = torch.Generator().manual_seed(0)
    changed = {name: torch.randn(weights[name].shape, generator=draw) for name in stages}
    for name, tensors in (("own", weights), ("changed", weights | changed)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    own, other = (tmp_path / f"{name}.safetensors" for name in ("own", "changed"))
    assert evaluated(home, own, True) == evaluated(home, other, True)
    assert evaluated(home, own, False) != evaluated(home, other, False)


def test_food101_is_augmented_as_described_alone() -> None:
    root = str(reference("gft").home / "runs" / "demo-data")
    scripts = sorted(path.stem for path in ROOT.glob("*.py") if path.stem.lower().endswith("food101"))
    assert len(scripts) == 7
    plain = ["Resize", "ToTensor", "Normalize"]
    augmented = ["Resize", "RandomHorizontalFlip", "RandomAutocontrast", "ToTensor", "Normalize"]
    for script in scripts:
        module = importlib.import_module(script)
        for released, wanted in ((False, augmented), (True, plain)):
            data = module.data(module.Recipe(data_root=root, released=released))
            found = [[type(step).__name__ for step in part.transform.transforms] for part in (data.train, data.test)]
            assert found == [wanted, plain], script


def test_101x3_is_what_it_says_as_described_alone() -> None:
    """On Food-101 and COCO the released scripts build x1; on Aircraft x3."""
    for data, classes, built in (("food101", 101, "101x1"), ("coco", 80, "101x1"), ("fgvcaircraft", 100, "101x3")):
        module = importlib.import_module(f"resnetv2_101x3_bitm_{data}")
        with torch.device("meta"):  # shapes without memory: 388 million parameters
            models = [module.build(module.Recipe(weights="none", released=side), classes) for side in (False, True)]
        assert [model.pretrained_cfg["architecture"] for model in models] == [
            f"resnetv2_{n}_bit" for n in ("101x3", built)
        ]
        assert all(model.num_classes == classes for model in models)


# FFVT


def few_birds(home: Path) -> tuple[Path, list[int]]:
    """A data root with two training images and one test image of each class of the digits, and the training labels."""
    digits = home / "runs" / "demo-data" / "CUB"
    root = home / "few" / "CUB"
    root.mkdir(parents=True)
    (root / "images").symlink_to((digits / "images").resolve())
    lists = {name: (digits / f"{name}.txt").read_text().splitlines() for name in ("images", "image_class_labels")}
    shutil.copy(digits / "classes.txt", root)
    label = {line.split()[0]: int(line.split()[1]) - 1 for line in lists["image_class_labels"]}
    kept: dict[int, list[str]] = {}
    for number, which in label.items():
        if len(kept.setdefault(which, [])) < 3:
            kept[which].append(number)
    numbers = {number for three in kept.values() for number in three}
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines if line.split()[0] in numbers))
    train = {three[place] for three in kept.values() for place in (0, 1)}
    in_order = [line.split()[0] for line in lists["images"] if line.split()[0] in numbers]
    (root / "train_test_split.txt").write_text("".join(f"{number} {int(number in train)}\n" for number in in_order))
    names = {line.split()[0]: line.split()[1] for line in lists["images"]}
    for file, part in (("train_val", train), ("test", numbers - train)):  # as GLSim reads it
        rows = [f"{label[number]},{names[number]}" for number in in_order if number in part]
        (root / f"{file}.csv").write_text("class_id,dir\n" + "\n".join(rows) + "\n")
    return root.parent, [label[number] for number in in_order if number in train]


def cross_entropy(label: int) -> float:
    return float(np.log(np.exp(BIASES).sum()) - BIASES[label])


def label_of(loss: float) -> int:
    errors = [abs(loss - cross_entropy(label)) for label in range(len(BIASES))]
    assert min(errors) < 1e-4  # float32; the biases are 0.3 apart and more
    return int(np.argmin(errors))


@SIDES
def test_order_of_ffvts_images(released: bool, tmp_path: Path) -> None:
    """A new order every epoch; as released the one of a DistributedSampler with seed 0, every time."""
    home = new_home(tmp_path / "home", "ffvt") if reference("ffvt") else tmp_path
    root, labels = few_birds(home)
    weights = torch.load(reference("ffvt").home / PROGRAMS["ffvt"].published[0], weights_only=True)
    weights |= {"head.weight": torch.zeros(10, 64), "head.bias": torch.tensor(BIASES, dtype=torch.float32)}
    torch.save(weights, home / "known.bin")
    sizes = ("hidden_size=64", "mlp_dim=128", "num_heads=4", "num_layers=4", "patch_size=4")
    words = (
        "--name",
        "n",
        "--dataset",
        "CUB",
        "--feature_fusion",
        "--data_root",
        root,
        "--pretrained_dir",
        "known.bin",
    )
    words += (
        "--img_size",
        "16",
        "--resize_size",
        "16",
        "--num_token",
        "4",
        "--train_batch_size",
        "1",
        "--workers",
        "0",
    )
    words += (
        "--learning_rate",
        "1e-30",
        "--num_steps",
        "40",
        "--eval_every",
        "40",
        "--log_every",
        "1",
        "--no_download",
    )
    run(["ffvt/train.py", *words, *side(released), "--model_kwargs", *sizes], home).done()
    found = [label_of(loss) for loss in losses(home)]
    first, second = found[:20], found[20:]
    assert sorted(first) == sorted(second) == sorted(labels)
    fixed = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    expected = [labels[place] for place in fixed]
    if released:
        assert first == second == expected
    else:
        assert first != second
        assert first != labels
        assert expected not in (first, second)


@pytest.mark.parametrize(
    ("dataset", "crop", "as_released"),
    [("dog", 448, 600), ("INat2017", 304, 400), ("dog", 28, 32), ("CUB", 448, 460)],
)
def test_sizes_of_ffvts_images(dataset: str, crop: int, as_released: int, tmp_path: Path) -> None:
    """At the crop that the released code fixes for a data set, its size of the resized image; else --resize_size."""
    home = new_home(tmp_path / "home", "ffvt") if reference("ffvt") else tmp_path
    asked = {448: 460, 304: 310, 28: 32}[crop]
    words = ("--name", "n", "--dataset", dataset, "--img_size", str(crop), "--resize_size", str(asked), "--demo")
    words += ("--limit", "2", "--num_steps", "1", "--train_batch_size", "2", "--workers", "0")
    for released, size in ((False, asked), (True, as_released)):
        run(["ffvt/train.py", *words, *side(released)], home).done()
        newest = max(home.glob("runs/ffvt-n/*/model.json"), key=lambda path: path.stat().st_mtime_ns)
        about = json.loads(newest.read_text(encoding="utf-8"))
        steps = {step["name"]: step for step in about["preprocessing"]}
        assert about["side"] == ("released" if released else "described")
        assert (steps["Resize"]["size"], steps["CenterCrop"]["size"]) == ([size] * 2, [crop] * 2)


# GLSim

SMALL = (
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
    "2",
)


@SIDES
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_of_glsims_updates(accumulate: int, released: bool, tmp_path: Path) -> None:
    """Update u has the schedule at u; as released at the iteration before, which may be several an update."""
    home = new_home(tmp_path / "home", "glsim") if reference("glsim") else tmp_path
    lr, low, minimum, warmup, epochs = 0.02, 1e-4, 1e-3, 3, 2
    words = ("--lr", str(lr), "--warmup_lr", str(low), "--min_lr", str(minimum), "--warmup_steps", str(warmup))
    words += ("--epochs", str(epochs), "--gradient_accumulation_steps", str(accumulate))
    run(["glsim/tools/train.py", *SMALL, *words, *side(released)], home).done()
    updates = epochs * 8 // accumulate
    total = updates * (accumulate if released else 1)
    expected = []
    for update in range(updates):
        at = max(0, update * accumulate - 1) if released else update
        fallen = minimum + (lr - minimum) * (1 + math.cos(math.pi * at / total)) / 2
        expected.append(low + at * (lr - low) / warmup if at < warmup else fallen)
    (log,) = home.glob("runs/glsim/*/log.jsonl")
    rates = [line["lr"] for line in log_of(log.parent) if line["kind"] == "train"]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    assert (rates[0] == rates[1]) == (released and accumulate == 1)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A home with few images, a GLSim checkpoint whose logits are the biases, and the training labels."""
    home = new_home(tmp_path_factory.mktemp("known") / "glsim", "glsim") if reference("glsim") else Path()
    _, labels = few_birds(home)
    content = torch.load(reference("glsim").home / PROGRAMS["glsim"].published[0], weights_only=True)
    head = {name for name in content["model"] if "head." in name}
    assert {name.rpartition(".")[2] for name in head} == {"weight", "bias"}
    for name in head:
        shape = content["model"][name].shape
        content["model"][name] = torch.zeros(shape) if len(shape) > 1 else torch.tensor(BIASES, dtype=torch.float32)
    torch.save(content, home / "known.pth")
    return home, labels


@pytest.mark.parametrize(
    ("words", "described", "as_released"),  # alpha and smoothing
    [
        ((), (0.25, 0.0), (1.0, 0.0)),
        (("--focal_alpha", "0.5"), (0.5, 0.0), (1.0, 0.0)),
        (("--ls", "--smoothing", "0.3"), (0.25, 0.3), (1.0, 0.1)),
    ],
)
def test_focal_loss_of_glsim(
    words: tuple[str, ...],
    described: tuple[float, float],
    as_released: tuple[float, float],
    known: tuple[Path, list[int]],
    tmp_path: Path,
) -> None:
    """The first update's loss, all images in one batch, by eq. 5 of Lin et al. (ICCV 2017) in float64."""
    home, labels = known
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    sizes |= {"image_size": 16, "resize_size": 16, "test_resize_size": 16, "dynamic_top": 4}
    given = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    given += ["--cfg_method", METHOD, "--ckpt_path", "known.pth", "--transfer_learning", "--no-pretrained"]
    given += ["--dataset_root_path", "few/CUB", "--batch_size", "20", "--epochs", "2", "--log_freq", "1"]
    given += ["--cpu_workers", "0", "--focal_gamma", "2", *words, "--model_kwargs", "patch_size=4"]
    log = BIASES - np.log(np.exp(BIASES).sum())
    for released, (alpha, smoothing) in ((False, described), (True, as_released)):
        shutil.rmtree(home / "runs" / "glsim", ignore_errors=True)
        run(["glsim/tools/train.py", *given, *side(released)], home).done()
        each = np.array([-(1 - smoothing) * log[label] - smoothing * log.mean() for label in labels])
        expected = alpha * ((1 - np.exp(-each)) ** 2 * each).mean()
        assert losses(home)[0] == pytest.approx(expected, abs=1e-5)  # float32 sums of 20 losses up to 7


@pytest.mark.parametrize(
    ("processes", "accumulate", "described", "as_released"),
    [
        (1, 1, 4 / 8, 4 / 8),
        (1, 2, 4 * 2 / 8, 4 / 8),
        (2, 2, 4 * 2 * 2 / 8, 2 * (4 * 2 * 2) / 256),
    ],
)
def test_base_rate_of_glsim(
    processes: int, accumulate: int, described: float, as_released: float, tmp_path: Path
) -> None:
    """For 8 images an update, on any number of processes; as released by two other rules."""
    home = new_home(tmp_path / "home", "glsim") if reference("glsim") else tmp_path
    words = ("--batch_size", "4", "--epochs", "1", "--warmup_steps", "1")
    words += ("--gradient_accumulation_steps", str(accumulate), "--base_lr", "0.1")
    for released, share in ((False, described), (True, as_released)):
        command = ["glsim/tools/train.py", *SMALL, *words, *side(released)]
        outcomes = [started.end() for started in start_ranks(command, home, processes)] if processes > 1 else []
        outcomes = outcomes or [run(command, home)]
        assert {outcome.status for outcome in outcomes} == {0}, outcomes
        newest = max(home.glob("runs/glsim/*/last.pt"), key=lambda path: path.stat().st_mtime_ns)
        rates = {group["initial_lr"] for group in state_of(newest.parent)["optimizer"]["param_groups"]}
        assert list(rates) == [pytest.approx(0.1 * share, rel=1e-12)]


# Maps

BLOCKS, HEADS, SIDE, PATCH = 12, 4, 32, 8


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a checkpoint of twelve blocks, of which the released rollout leaves one out, and a picture."""
    home = new_home(tmp_path_factory.mktemp("deep") / "glsim", "glsim") if reference("glsim") else Path()
    words = ("--cfg_method", METHOD, "--demo", "--limit", "8", "--epochs", "2", "--cpu_workers", "0")
    words += ("--num_hidden_layers", str(BLOCKS), "--image_size", str(SIDE))
    run(["glsim/tools/train.py", *words], home).done()
    (folder,) = home.glob("runs/glsim/*")
    weights = load_file(folder / "best.safetensors")
    draw = torch.Generator().manual_seed(0)  # sharper attention than that of new weights
    for name in [name for name in weights if name.endswith("attn.qkv.weight")]:
        weights[name] = weights[name] + 0.2 * torch.randn(weights[name].shape, generator=draw)
    save_file(weights, folder / "best.safetensors")
    shutil.copytree(folder, home / "deep")
    for block in range(10):  # uniform attention, through which what the last two blocks see shows
        for part in ("weight", "bias"):
            weights[f"base_model.blocks.{block}.attn.qkv.{part}"][:64] = 0
    save_file(weights, folder / "best.safetensors")
    folder.rename(home / "flat")
    y, x = np.mgrid[:SIDE, :SIDE]
    picture = np.stack([8 * x, 8 * y, (5 * x * y) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(home / "picture.png")
    return home


@cache
def attention(home: Path, which: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture (height, width, 3), and the attention (blocks, heads, N, N) of timm's ViT with these weights."""
    model = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=64, depth=BLOCKS, num_heads=HEADS, mlp_ratio=2, num_classes=0
    )
    weights = load_file(home / which / "best.safetensors")
    own = {name.removeprefix("base_model."): value for name, value in weights.items() if name.startswith("base_model.")}
    missing, _ = model.double().load_state_dict(own, strict=False)
    assert missing == []
    found = []

    def hear(_: Any, __: Any, out: torch.Tensor) -> None:
        q, k, _ = out[0].reshape(out.shape[1], 3, HEADS, -1).permute(1, 2, 0, 3)  # (H, N, d)
        found.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))

    for block in model.blocks:
        block.attn.qkv.register_forward_hook(hear)
    picture = np.asarray(Image.open(home / "picture.png"))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        model.eval()(torch.from_numpy((picture / 255 - mean) / std).permute(2, 0, 1)[None])
    return picture, torch.stack(found).numpy()


def joint(found: np.ndarray) -> np.ndarray:
    """The CLS row of the product of all attention matrices, for each head."""
    rows = np.eye(found.shape[-1])[0][None].repeat(HEADS, 0)[:, None]
    for block in found[::-1]:
        rows = rows @ block
    return rows[:, 0]


def rollout(found: np.ndarray) -> np.ndarray:
    row = np.eye(found.shape[-1])[0]
    for block in found[::-1]:
        row = row @ (block.mean(0) + np.eye(len(row))) / 2
    return row


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


def enlarged(mask: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def in_colours(picture: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Half the picture, half the map in the colours of OpenCV's JET."""
    levels = enlarged(np.rint(scaled(row[1:]) * 255).astype(np.uint8).reshape(SIDE // PATCH, -1)).astype(float)
    colours = np.clip(1.5 - np.abs(4 * levels[..., None] / 255 - np.array([3, 2, 1])), 0, 1)
    return (picture + 255 * colours) / 2


def darkened(picture: np.ndarray, row: np.ndarray, released: bool) -> np.ndarray:
    mask = (row[1:] if released else scaled(row[1:])).astype(np.float32).reshape(SIDE // PATCH, -1)
    return scaled(enlarged(mask)[..., None] * picture) * 255


def drawn(home: Path, which: str, mask: str, released: bool, *more: str) -> np.ndarray:
    words = ("--ckpt_path", which, "--images_path", "picture.png", "--vis_mask", mask, "--results_dir", "maps")
    run(["glsim/tools/inference.py", *words, *more, *side(released), "--cpu_workers", "0"], home).done()
    (path,) = home.glob(f"maps/*/picture_{mask}.png")
    return np.asarray(Image.open(path)).astype(float)


MAPS: dict[str, Any] = {  # mask -> the row (N,) as described and as released
    "attention_1": (lambda a: a[1].mean(0)[0], lambda a: a[1][0].mean(0)),
    "attention": (lambda a: a[-1].mean(0)[0], lambda a: a[-1][0].mean(0)),
    "psm_0": (lambda a: joint(a)[0], lambda a: joint(a).sum(0)),
    "psm_2": (lambda a: joint(a)[2], lambda a: 2 * (joint(a)[2] + joint(a)[1]) + joint(a)[3]),
    "rollout": (rollout, lambda a: rollout(a[:11])),
    "rollout_0_12": (rollout, rollout),
}


@SIDES
@pytest.mark.parametrize("mask", MAPS)
def test_maps_of_glsim(mask: str, released: bool, deep: Path) -> None:
    """A map of inference.py by its formula: a level of it is up to two of the picture, and float32 may move one."""
    which = "flat" if mask.startswith("rollout") else "deep"
    picture, found = attention(deep, which)
    expected = [in_colours(picture, row(found)) for row in MAPS[mask]]
    difference = np.abs(drawn(deep, which, mask, released) - expected[released])
    assert difference.mean() < 1
    assert difference.max() < 6
    if mask != "rollout_0_12":
        assert np.abs(expected[0] - expected[1]).max() > 12


@SIDES
def test_maps_without_colour(released: bool, deep: Path) -> None:
    picture, found = attention(deep, "deep")
    expected = [darkened(picture, rollout(found), which) for which in (False, True)]
    difference = np.abs(drawn(deep, "deep", "rollout_0_12", released, "--vis_mask_color") - expected[released])
    assert difference.mean() < 1
    assert difference.max() < 4
    assert np.abs(expected[0] - expected[1]).max() > 12


def test_attention_without_a_number_in_vis_dfsm(deep: Path) -> None:
    """GLSIM-7: the last block, as released the first."""
    figures = {}
    for number, words in enumerate((["attention"], ["attention_3"], ["attention", "--released"], ["attention_0"])):
        more = ("--batch_size", "2", "--demo", "--results_dir", str(number))
        out = run(["glsim/tools/vis_dfsm.py", "--vis_mask", *words, *more], deep).done().out
        picture = np.asarray(Image.open(deep / out.splitlines()[-1]))
        figures[" ".join(words)] = picture[len(picture) // 5 :]  # without the title, which names the mask
    assert np.array_equal(figures["attention"], figures["attention_3"])
    assert np.array_equal(figures["attention --released"], figures["attention_0"])
    assert not np.array_equal(figures["attention"], figures["attention_0"])
