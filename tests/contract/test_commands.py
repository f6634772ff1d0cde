"""What a user types: printed commands mean the published experiments, --help says all, a mistake is one sentence.

The commands stand here as the three READMEs print them. They run on small demo data, with random or made-up weights and
few steps, and what they meant is read from the records that they leave.
"""

import ast
import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from formula import fill_npz, pil_image, vit_spec
from PIL import Image

from contract.programs import METHOD, PROGRAMS, ROOT, Outcome, new_home, reference, run

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
TOOLS = [f"glsim/tools/{name}.py" for name in ("train", "inference", "vis_dfsm")]
RECIPES = [*SCRIPTS, "ffvt/train.py", *TOOLS]  # programs with a flag for every field of their recipe
PREPARING = ("calc_hw", "custom_datasets", "data_split", "download_convert_vit_models", "make_classid_classname")
OTHERS = [
    *("glsim/tools/calc_flops.py", "glsim/tools/demo.py"),
    *(f"glsim/tools/preprocess/{name}.py" for name in PREPARING),
    *(f"glsim/tools/preprocess/make_{name}.py" for name in ("data_dic_imagenetstyle", "dataset_cotton_soy")),
]
# What FFVT's README prints, less "$ python3 -m torch.distributed.launch --nproc_per_node 4 ".
FFVT = {
    "cotton": "train.py --name {name} --dataset cotton --model_type ViT-B_16 --pretrained_dir {pretrained_model_dir} --img_size 384 --resize_size 500 --train_batch_size 8 --learning_rate 0.02 --num_steps 2000 --fp16 --eval_every 16 --feature_fusion",  # noqa: E501
    "soyloc": "train.py --name {name} --dataset soyloc --model_type ViT-B_16 --pretrained_dir {pretrained_model_dir} --img_size 384 --resize_size 500 --train_batch_size 8 --learning_rate 0.02 --num_steps 4750 --fp16 --eval_every 50 --feature_fusion",  # noqa: E501
    "CUB": "train.py --name {name} --dataset CUB --model_type ViT-B_16 --pretrained_dir {pretrained_model_dir} --img_size 448 --resize_size 600 --train_batch_size 8 --learning_rate 0.02 --num_steps 10000 --fp16 --eval_every 200 --feature_fusion",  # noqa: E501
    "dog": "train.py --name {name} --dataset CUB --model_type ViT-B_16 --pretrained_dir {pretrained_model_dir} --img_size 448 --resize_size 600 --train_batch_size 4 --learning_rate 3e-3 --num_steps 30000 --fp16 --eval_every 300 --feature_fusion --decay_type linear --num_token 24",  # noqa: E501
}
FFVT_DEFAULTS: dict[str, Any] = {
    **{"dataset": "cotton", "model_type": "ViT-B_16", "pretrained_dir": "checkpoint/ViT-B_16.npz", "img_size": 448},
    **{"resize_size": 600, "train_batch_size": 16, "eval_batch_size": 16, "num_token": 12, "eval_every": 100},
    **{"learning_rate": 3e-2, "weight_decay": 0.0, "num_steps": 10000, "decay_type": "cosine", "warmup_steps": 500},
    **{"max_grad_norm": 1.0, "seed": 42, "gradient_accumulation_steps": 1, "fp16": False, "fp16_opt_level": "O2"},
    **{"feature_fusion": False, "loss_scale": 0.0, "data_root": "./data", "smoothing_value": 0.0},
    **{"output_dir": "output", "model_kwargs": {}, "released": False},
}
# What each command says, its row, and what it changes in that row beside the shortening: the Dogs command says CUB.
FFVT_MEANING: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "cotton": (dict(img_size=384, resize_size=500, num_steps=2000, eval_every=16), "ffvt_cotton", set()),
    "soyloc": (dict(img_size=384, resize_size=500, num_steps=4750, eval_every=50), "ffvt_soyloc", set()),
    "CUB": (dict(num_steps=10000, eval_every=200), "ffvt_cub", set()),
    "dog": (
        dict(train_batch_size=4, learning_rate=3e-3, num_steps=30000, eval_every=300, decay_type="linear")
        | dict(num_token=24, dataset="CUB"),
        "ffvt_cub",
        {"learning_rate", "eval_every", "decay_type", "num_token"},
    ),
}
SIZES = ("hidden_size=48", "mlp_dim=96", "num_heads=3", "num_layers=4")  # of the made-up ViT-B_16.npz, as vit_spec's
SHORT = ("--num_steps", "1", "--limit", "4", "--workers", "0", "--data_root", "runs/demo-data", "--no_download")

# What GLSim's README prints; started inside glsim/.
GLSIM_TRAIN = "python tools/train.py --cfg configs/cub_ft_is224_medaugs.yaml --lr 0.01 --model_name vit_b16 --cfg_method configs/methods/glsim.yaml"  # noqa: E501
GLSIM_EVALUATE = {
    "python tools/train.py --ckpt_path ckpts/cub_glsim_224.pth --test_only": {"test_only": True},
    "python tools/train.py --ckpt_path ckpts/cub_glsim_224.pth --batch_size 1": {"batch_size": 1},
    "python tools/train.py --ckpt_path ckpts/cub_glsim_224.pth --vis_errors": {"vis_errors": True},
    "python tools/train.py --ckpt_path ckpts/cub_glsim_224.pth --vis_errors_save": {"vis_errors_save": True},
}
PICTURE = "samples/others/dafb_rena_170785.jpg"
GLSIM_INFERENCE = {
    "python tools/inference.py --ckpt_path ckpts/dafb_glsim.pth --images_path samples/others/dafb_rena_170785.jpg": (
        {"dafb_rena_170785.png"}
    ),
    "python tools/inference.py --ckpt_path ckpts/dafb_glsim.pth --images_path samples/others/dafb_rena_170785.jpg --vis_mask_sq --vis_mask glsim_norm": (  # noqa: E501
        {f"dafb_rena_170785{mask}.png" for mask in ("", "_similarity", "_glsim_norm")}
    ),
    "python tools/inference.py --ckpt_path ckpts/dafb_glsim.pth --images_path samples/others/dafb_rena_170785.jpg --vis_mask rollout": (  # noqa: E501
        {"dafb_rena_170785.png", "dafb_rena_170785_rollout.png"}
    ),
    "python tools/inference.py --ckpt_path ckpts/cub_glsim_224.pth --images_path samples/": (
        {"others/dafb_rena_170785.png", "another.png"}
    ),
}
GLSIM_MASKS = {
    f"python tools/vis_dfsm.py --serial 52 --batch_size 4 --vis_cols 4 --cfg configs/nabirds_ft_is224_weakaugs.yaml --model_name glsvit_base_patch14_dinov2.lvd142m --vis_mask {mask}{more}": (  # noqa: E501
        f"glsvit_base_patch14_dinov2.lvd142m_{mask}_52.png"
    )
    for mask, more in (("gls", " --vis_mask_pow"), ("attention_11", ""), ("rollout_0_12", ""))
}
# What the training command says, configs/cub_ft_is224_medaugs.yaml and methods/glsim.yaml included.
GLSIM_MEANING: dict[str, Any] = {
    **{"cfg": "configs/cub_ft_is224_medaugs.yaml", "cfg_method": "configs/methods/glsim.yaml", "pretrained": True},
    **{"dataset_name": "cub", "dataset_root_path": "data/CUB_200_2011", "image_size": 224, "custom_mean_std": False},
    **{"horizontal_flip": True, "trivial_aug": True, "re": 0.3, "ls": True, "smoothing": 0.1, "sd": 0.1},
    **{"classifier": "cls", "dynamic_anchor": True, "anchor_class_token": True, "dynamic_top": 8, "sim_metric": "cos"},
    **{"reducer": "cls", "aggregator": True, "aggregator_norm": True, "model_name": "vit_b16", "lr": 0.01},
    **{"epochs": 50, "batch_size": 8, "opt": "sgd", "momentum": 0.9, "weight_decay": 0.0, "clip_grad": 1.0},
    **{"sched": "cosine", "warmup_steps": 500, "warmup_lr": 1e-6, "min_lr": 1e-5, "t_in_epochs": False, "seed": 0},
    **{"train_trainval": True, "fp16": True, "eval_freq": 200, "released": False},
}


def record_of(outcome: Outcome, home: Path) -> dict[str, Any]:
    assert outcome.status == 0, outcome
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("record: ")]
    return json.loads((home / line.removeprefix("record: ")).read_text(encoding="utf-8"))


def altered(record: dict[str, Any]) -> set[str]:
    """The fields that keep a record from counting."""
    return {reason.split()[1] for reason in record["excluded"] if reason.startswith("altered: ")}


class Flag(NamedTuple):
    names: tuple[str, ...]
    sentence: str
    default: str


@cache
def flags_of(program: str) -> list[Flag]:
    """Every flag of the program's --help but -h, as a user reads it."""
    outcome = run([program, "--help"], Path("/"))
    assert (outcome.status, outcome.err) == (0, ""), outcome
    found = []
    for entry in re.findall(r"^  (--\S.*(?:\n {3,}\S.*)*)", outcome.out, re.MULTILINE):
        head, gap, rest = entry.partition("\n") if "  " not in entry.partition("\n")[0] else entry.partition("  ")
        assert gap, entry
        said = " ".join(rest.split())
        default = re.search(r"(?:^| )\[((?:[^\[\]]|\[\])*)\]$", said)
        names = tuple(re.findall(r"--[\w-]+", head))
        text = said[: default.start()] if default else said
        found.append(Flag(names, text.strip(), default[1] if default else ""))
    return found


def shown(value: Any) -> str:
    """A value of a record as --help shows it."""
    if value in (None, {}, []):
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


# Printed commands


def ffvt_home(folder: Path) -> Path:
    home = new_home(folder, "ffvt")
    (home / "checkpoint").mkdir()
    fill_npz(home / "checkpoint" / "ViT-B_16.npz", vit_spec())
    return home


@pytest.fixture(scope="module")
def digits() -> None:
    """Digits in the layouts of the data sets that FFVT's README names, where --demo puts them."""
    home = reference("ffvt").home
    for dataset in ("cotton", "soyloc", "dog"):
        words = ("--name", dataset, "--dataset", dataset, "--demo", "--limit", "2", "--num_steps", "1")
        run(["ffvt/train.py", *words, "--workers", "0", "--output", "runs"], home).done()
        shutil.rmtree(home / "runs" / f"ffvt-{dataset}")


@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize("which", [*FFVT, "dog, as meant"])
def test_commands_of_ffvt(which: str, tmp_path: Path) -> None:
    """One process alone trains with a quarter of the published batch, and says so; else nothing of them is altered."""
    home = ffvt_home(tmp_path / "home")
    command = FFVT[which.partition(",")[0]].replace("{name}", "n")
    words = shlex.split(command.replace("{pretrained_model_dir}", "checkpoint/ViT-B_16.npz"))
    values, row, changes = FFVT_MEANING[which.partition(",")[0]]
    if which == "dog, as meant":  # docs/fidelity.md FIX-15
        words += ["--dataset", "dog"]
        values, row, changes = values | {"dataset": "dog"}, "ffvt_dog", set()
    outcome = run(["ffvt/train.py", *words[1:], *SHORT, "--model_kwargs", *SIZES], home)
    record = record_of(outcome, home)
    meant = FFVT_DEFAULTS | {"dataset": which, "train_batch_size": 8, "learning_rate": 0.02, "name": "n"} | values
    meant |= {"fp16": True, "feature_fusion": True}
    assert (record["row"], record["side"], record["script"]) == (row, "described", "ffvt/train.py")
    sizes = {name: int(value) for name, value in (size.split("=") for size in SIZES)}
    assert record["recipe"] == meant | {"num_steps": 1, "data_root": "runs/demo-data", "model_kwargs": sizes}
    assert record["weights"]["source"] == "ViT-B_16.npz"
    assert altered(record) == changes | {"num_steps", "model_kwargs", "batch_size"}
    assert record["overrides"].keys() == {word[2:] for word in words if word.startswith("--")} | {
        *("data_root", "model_kwargs")
    }
    assert (home / "output" / "n_checkpoint.bin").exists()
    published = {"CUB": 32, "soyloc": 32, "cotton": 32, "dog": 16}[meant["dataset"]]
    (batch,) = [why for why in record["excluded"] if "batch_size" in why]
    assert batch == f"altered: batch_size {published} -> {meant['train_batch_size']}"
    assert ("--dataset dog" in outcome.out) == (which == "dog")
    assert record["precision"] == "fp32"  # of --fp16 on a CPU
    assert "--fp16" in outcome.out


def glsim_home(folder: Path, *checkpoints: str) -> Path:
    """What the printed commands find in glsim/, and the checkpoint of a small run under the names that they have."""
    home = new_home(folder, "glsim")
    for name in ("tools", "configs"):
        (home / name).symlink_to(ROOT / "glsim" / name)
    (home / "ckpts").mkdir()
    for name in checkpoints:
        shutil.copy(reference("glsim").home / PROGRAMS["glsim"].published[0], home / "ckpts" / name)
    (home / PICTURE).parent.mkdir(parents=True)
    pil_image().save(home / PICTURE)
    pil_image(64, 80).save(home / "samples" / "another.png")
    return home


def start(command: str, home: Path, *more: str) -> Outcome:
    python, program, *words = shlex.split(command)
    assert python == "python"
    return run([f"glsim/{program}", *words, *more], home)


@pytest.mark.parametrize("more", ["", " --image_size 448"])
def test_training_commands_of_glsim(more: str, tmp_path: Path) -> None:
    reference("glsim")  # the digits are there
    home = glsim_home(tmp_path / "home")
    refused = start(GLSIM_TRAIN + more, home)
    refused.sentence("data/CUB_200_2011/")
    fill_npz(home / "ckpts" / "ViT-B_16.npz", vit_spec(width=64, heads=4, mlp=96, depth=2, classes=5))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    small = {"dataset_root_path": "runs/demo-data/CUB", "epochs": 2, "cpu_workers": 0, **sizes}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    outcome = start(GLSIM_TRAIN + more, home, *words, "--limit", "4")
    record = record_of(outcome, home)
    meant = GLSIM_MEANING | ({"image_size": 448} if more else {})
    row = "glsim_cub_448_glsim" if more else "glsim_cub_224_glsim"
    assert (record["row"], record["side"]) == (row, "described")
    assert record["weights"]["source"] == "ViT-B_16.npz"
    assert {name: record["recipe"][name] for name in meant} == meant | {
        name: small[name] for name in meant & small.keys()
    }
    defaults = {flag.names[0][2:]: flag.default for flag in flags_of("glsim/tools/train.py")}
    others = record["recipe"].keys() - meant.keys() - small.keys()
    assert {name: shown(record["recipe"][name]) for name in others} == {name: defaults[name] for name in others}
    assert altered(record) == {"epochs", *sizes}
    said = {word[2:] for word in shlex.split(GLSIM_TRAIN + more) if word.startswith("--")}
    assert record["overrides"].keys() == said | small.keys()


@pytest.mark.parametrize("command", GLSIM_EVALUATE)
def test_evaluation_commands_of_glsim(command: str, tmp_path: Path) -> None:
    """The checkpoint says where its data lie: nothing is added but fewer images."""
    home = glsim_home(tmp_path / "home", "cub_glsim_224.pth")
    record = record_of(start(command, home, "--limit", "12", "--cpu_workers", "0"), home)
    assert (record["status"], record["weights"]["source"]) == ("evaluated", "ckpts/cub_glsim_224.pth")
    assert record["results"]["checkpoint"]["test"]["total"] == 12
    recipe = reference("glsim").record["recipe"]
    changed = GLSIM_EVALUATE[command]
    model = {name for name in recipe if name.startswith(("dynamic", "aggr", "num_", "hidden_size", "model", "image_"))}
    assert {name: record["recipe"][name] for name in model} == {name: recipe[name] for name in model}
    assert {name: record["recipe"][name] for name in changed} == changed
    assert record["evaluation_speed"]["batch_size"] == (1 if "--batch_size 1" in command else 12)
    errors = record["results"]["checkpoint"]["test"]
    found = sorted(path.name for path in home.glob("results_train/*/errors/*.png"))
    each = [name for name in found if name != "errors.png"]
    assert bool(found) == ("vis_errors" in command)
    assert len(each) == ((errors["total"] - errors["correct"]) if "vis_errors_save" in command else 0)


@pytest.mark.parametrize("command", GLSIM_INFERENCE)
def test_inference_commands_of_glsim(command: str, tmp_path: Path) -> None:
    home = glsim_home(tmp_path / "home", "cub_glsim_224.pth", "dafb_glsim.pth")
    outcome = start(command, home).done()
    folder = home / "results_inference" / "vit_b16_4"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert found == GLSIM_INFERENCE[command]
    lines = [line for line in outcome.out.splitlines() if line.startswith("samples/")]
    assert len(lines) == (2 if command.endswith("samples/") else 1)
    assert all(re.fullmatch(r"samples/\S+: (\S+ [\d.]+%(, )?){3}", line) for line in lines)
    for name in found:
        with Image.open(folder / name) as picture:
            assert picture.mode == "RGB"


@pytest.mark.parametrize("command", GLSIM_MASKS)
def test_mask_commands_of_glsim(command: str, tmp_path: Path) -> None:
    """The data set is named where it is not there; on digits the command draws what it names."""
    home = glsim_home(tmp_path / "home")
    refused = start(command, home)
    refused.sentence("data/nabirds/")
    outcome = start(command, home, "--demo").done()
    path = outcome.out.splitlines()[-1]
    assert path == f"results_inference/cub_{GLSIM_MASKS[command]}"
    with Image.open(home / path) as picture:
        assert picture.width > 1.5 * picture.height  # four columns, a mask below each image


def test_flags_of_the_printed_commands_are_in_the_help() -> None:
    printed = {
        "ffvt/train.py": " ".join(FFVT.values()),
        TOOLS[0]: " ".join([GLSIM_TRAIN, "--image_size 448", *GLSIM_EVALUATE]),
        TOOLS[1]: " ".join(GLSIM_INFERENCE),
        TOOLS[2]: " ".join(GLSIM_MASKS),
    }
    for program, text in printed.items():
        said = set(re.findall(r"--[\w-]+", text))
        assert said
        assert said <= {name for flag in flags_of(program) for name in flag.names}, program


# Help


@pytest.mark.parametrize("program", RECIPES)
def test_every_flag_of_a_recipe_has_a_sentence_and_a_default(program: str) -> None:
    flags = flags_of(program)
    assert len(flags) > 30 or program in TOOLS[1:]
    for flag in flags:
        assert flag.sentence, flag
        assert flag.default, flag
    names = [name for flag in flags for name in flag.names]
    assert len(names) == len(set(names))
    own = ("--released", "--device", "--demo", "--output")
    assert set(own) <= set(names)


@pytest.mark.parametrize("program", OTHERS)
def test_every_flag_of_a_tool_is_explained(program: str) -> None:
    flags = flags_of(program)
    assert flags
    assert all(flag.sentence for flag in flags), flags


@pytest.mark.parametrize("program", RECIPES)
def test_both_spellings_are_the_same_flag(program: str) -> None:
    """Of a word that no number is, both are refused, by the name that --help has."""
    name = {"ffvt/train.py": "train_batch_size"}.get(program, "batch_size")
    flag = next(flag for flag in flags_of(program) for spelled in flag.names if spelled[2:].replace("-", "_") == name)
    outcomes = [run([program, f"--{name.replace('_', between)}", "many"], Path("/")) for between in ("-", "_")]
    for outcome in outcomes:
        assert outcome.status == 2
        assert flag.names[0] in outcome.err
        assert "many" in outcome.err
    assert outcomes[0].err == outcomes[1].err


def test_both_spellings_have_the_same_value(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", "gft")
    words = ("--demo", "--limit", "4", "--epochs", "1", "--workers", "0")
    recipes = []
    for spelled in (("--batch-size", "3", "--weight-decay=0.5"), ("--batch_size=3", "--weight_decay", "0.5")):
        recipes.append(record_of(run(["gft_food101.py", *words, *spelled], home), home)["recipe"])
    assert recipes[0] == recipes[1]
    assert (recipes[0]["batch_size"], recipes[0]["weight_decay"]) == (3, 0.5)


# Mistakes


@pytest.mark.parametrize(
    ("program", "words", "near"),
    [
        ("gft_food101.py", ("--lrr", "3"), "--lr"),
        ("resnet18_COCO.py", ("--epoch", "3"), "--epochs"),
        ("vit_coco.py", ("--weigth_decay=2",), "--weight-decay"),
        ("densenet169_food101.py", ("--relased",), "--released"),
        ("ffvt/train.py", ("--name", "n", "--num-stepz", "5"), "--num_steps"),
        ("glsim/tools/train.py", ("--dynamic_topp", "5"), "--dynamic_top"),
        ("glsim/tools/inference.py", ("--image_path", "x"), "--images_path"),
        ("glsim/tools/vis_dfsm.py", ("--vis_masc", "gls"), "--vis_mask"),
    ],
)
def test_a_mistyped_flag(program: str, words: tuple[str, ...], near: str, tmp_path: Path) -> None:
    outcome = run([program, *words], tmp_path)
    assert (outcome.status, outcome.out) == (2, "")
    (line,) = outcome.err.strip().splitlines()
    mistyped = next(word for word in words if word not in ("--name", "n")).partition("=")[0]
    assert mistyped.replace("-", "_") in line.replace("-", "_")
    assert re.search(rf"{near}\b(?!_)", line.partition("; ")[2]), line
    assert list(tmp_path.iterdir()) == []


BAD_SCRIPT = [
    # words, exit status, what the sentence names
    (("--epochs", "many"), 2, "--epochs"),
    (("--precision", "fp8"), 2, "--precision"),
    (("--epochs",), 2, "--epochs"),
    (("--model-kwargs", "depth"), 2, "--model-kwargs"),
    (("stray",), 2, "stray"),
    (("--data-root", "nowhere", "--no-download"), 1, "nowhere"),
    (("--weights", "missing.npz"), 1, "missing.npz"),
    (("--weights", "missing.pth"), 1, "--weights missing.pth"),
    (("--eval", "missing"), 1, "missing"),
    (("--eval", "a", "--resume"), 1, "--resume"),
    (("--predict", "missing.jpg"), 1, "missing.jpg"),
    (("--predict", "x.jpg", "--out", "x.txt"), 1, "x.txt"),
    (("--export", "model.txt"), 1, "model.txt"),
    (("--export", "model.pt2", "--predict", "."), 1, "--export"),
    (("--export", "model.pt2", "--checkpoint", "nowhere"), 1, "nowhere"),
    (("--device", "cuda:7"), 1, "cuda:7"),
    (("--device", "quantum"), 1, "quantum"),
    (("--limit", "0"), 1, "--limit"),
    (("--amp-backend", "apex"), 1, "apex"),
    (("--resume",), 1, "gft_food101"),
    (("--resume", "nowhere"), 1, "nowhere"),
    (("--model", "vit_unheard_of"), 1, "vit_unheard_of"),
    (("--model", "resnet18"), 1, "resnet18"),
    (("--img-size", "17"), 1, "17"),
    (("--img-size", "0"), 1, "--img-size"),
    (("--batch-size", "0"), 1, "--batch-size"),
    (("--batch-size", "7", "--accumulate", "2"), 1, "--batch-size"),
    (("--batch-size", "9" * 400), 1, "--batch-size"),
    (("--epochs", "0"), 1, "--epochs"),
    (("--t-max", "0"), 1, "--t-max"),
    (("--lr", "-1"), 1, "--lr"),
    (("--lr", "nan"), 1, "--lr"),
    (("--lr", "inf"), 1, "--lr"),
    (("--weight-decay", "-1"), 1, "--weight-decay"),
    (("--workers", "-1"), 1, "--workers"),
    (("--accumulate", "0"), 1, "--accumulate"),
    (("--log-every", "0"), 1, "--log-every"),
    (("--save-every", "0"), 1, "--save-every"),
    (("--top", "0"), 1, "--top"),
    (("--dist-timeout", "0"), 1, "--dist-timeout"),
    (("--eval-batch-size", "0"), 1, "--eval-batch-size"),
    (("--model-kwargs", "odd=3"), 1, "odd"),
]
BAD_FFVT = [
    (("--dataset", "cats"), 2, "--dataset"),
    (("--eval_every", "0"), 1, "--eval_every"),
    (("--img_size", "17", "--resize_size", "17", "--model_kwargs", "patch_size=4"), 1, "--img_size"),
    (("--resize_size", "8"), 1, "--resize_size"),
    (("--num_token", "17"), 1, "--num_token"),
    (("--num_token", "0"), 1, "--num_token"),
    (("--loss_scale", "3"), 1, "--loss_scale"),
    (("--loss_scale", "-2"), 1, "--loss_scale"),
    (("--precision", "fp16", "--fp16_opt_level", "O3"), 1, "--fp16_opt_level"),
    (("--fp16", "--precision", "fp32"), 1, "--precision"),
    (("--fp16", "--amp_backend", "apex", "--device", "cpu"), 1, "apex"),
    (("--gradient_accumulation_steps", "3"), 1, "--gradient_accumulation_steps"),
    (("--name", "../t"), 1, "--name"),
    (("--name", ""), 1, "--name"),
    (("--name", ".."), 1, "--name"),
    (("--smoothing_value", "2"), 1, "--smoothing_value"),
    (("--model_kwargs", "num_heads=5", "hidden_size=64"), 1, "num_heads"),
    (("--model_kwargs", "width=3"), 1, "width"),
    (("--learning_rate", "0"), 1, "--learning_rate"),
    (("--max_grad_norm", "0"), 1, "--max_grad_norm"),
    (("--eval", "x.bin"), 1, "x.bin"),
]
BAD_GLSIM = [
    (("--test_only",), 1, "--ckpt_path"),
    (("--ckpt_path", "nothing.pth"), 1, "nothing.pth"),
    (("--cfg", "nothing.yaml"), 1, "nothing.yaml"),
    (("--dynamic_anchor", "--dynamic_top", "17"), 1, "dynamic_top"),
    (("--image_size", "30", "--model_name", "glsvit_tiny_patch16_224"), 1, "30"),
    (("--epochs", "0"), 1, "--epochs"),
    (("--eval_freq", "0"), 1, "--eval_freq"),
    (("--dataset_root_path", "nowhere"), 1, "nowhere/"),
    (("--lr", "inf"), 1, "--lr"),
    (("--opt", "sgdd"), 1, "--opt"),
    (("--opt_betas", "0.9"), 1, "--opt_betas"),
    (("--smoothing", "2"), 1, "--smoothing"),
    (("--mix_prob", "2"), 1, "--mix_prob"),
    (("--model_name", "vit_s16", "--pretrained"), 1, "vit_s16"),
    (("--model_name", "vit_b61"), 1, "vit_b16"),
    (("--model_name", "transfg", "--cm"), 1, "--cm"),
    (("--sched", "wave"), 2, "--sched"),
    (("--anchor_pool_avg",), 2, "--anchor_pool_avg"),
]
BAD_INFERENCE = [
    (("--images_path", PICTURE), 1, "--ckpt_path"),
    (("--ckpt_path", "none.pth", "--images_path", PICTURE), 1, "none.pth"),
    (("--demo", "--images_path", "none.jpg"), 1, "none.jpg"),
    (("--demo", "--images_path", "empty"), 1, "empty"),
    (("--demo", "--top", "0"), 1, "--top"),
    (("--demo", "--cpu_workers", "-1"), 1, "--cpu_workers"),
    (("--demo", "--vis_mask", "psm_4"), 1, "psm_4"),
    (("--demo", "--vis_mask", "cam"), 1, "cam"),
    (("--demo", "--dynamic_top", "17"), 1, "dynamic_top"),
    (("--precision", "fp8"), 2, "--precision"),
]
BAD_MASKS = [
    (("--vis_mask", "attention_4"), 1, "attention_4"),
    (("--vis_mask", "cam"), 1, "cam"),
    (("--vis_cols", "0"), 1, "--vis_cols"),
    (("--batch_size", "0"), 1, "--batch_size"),
    (("--vis_mask_top", "0"), 1, "--vis_mask_top"),
    (("--cfg", "none.yaml"), 1, "none.yaml"),
    (("--ckpt_path", "none.pth"), 1, "none.pth"),
    (("--model_name", "resnet50"), 1, "--vis_mask"),
    (("--vis_split", "all"), 2, "--vis_split"),
]


# Found out when the optimizer or the loss is made: behind the folder of the run, which stays, without a state in it.
FOUND_LATE = {"--opt", "--opt_betas", "--smoothing", "--mix_prob", "--cm"}


def left_in(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*") if "demo-data" not in path.parts)


def refused(program: str, words: tuple[str, ...], more: tuple[str, ...], status: int, names: str, home: Path) -> None:
    """One sentence that names it, and nothing left behind."""
    before = left_in(home)
    outcome = run([program, *more, *words], home)
    assert outcome.status == status, outcome
    (line,) = outcome.err.strip().splitlines()
    assert names in line
    if names in FOUND_LATE:
        assert not list(home.glob("runs/*/*/*.pt"))
        shutil.rmtree(home / "runs" / "glsim", ignore_errors=True)
    assert left_in(home) == before


@pytest.fixture(scope="module")
def food101(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_home(tmp_path_factory.mktemp("bad") / "gft", "gft") if reference("gft") else Path()


@pytest.mark.parametrize(("words", "status", "names"), BAD_SCRIPT)
def test_bad_values_of_a_script(words: tuple[str, ...], status: int, names: str, food101: Path) -> None:
    data = () if "--data-root" in words else ("--data-root", "runs/demo-data")
    weights = () if "--weights" in words else ("--weights", "none")
    refused("gft_food101.py", words, ("--workers", "0", *data, *weights), status, names, food101)


@pytest.fixture(scope="module")
def cub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_home(tmp_path_factory.mktemp("bad") / "ffvt", "ffvt") if reference("ffvt") else Path()


@pytest.mark.parametrize(("words", "status", "names"), BAD_FFVT)
def test_bad_values_of_ffvt(words: tuple[str, ...], status: int, names: str, cub: Path) -> None:
    small = ("--name", "t", "--dataset", "CUB", "--feature_fusion", "--demo", "--limit", "8", "--num_steps", "2")
    small += ("--train_batch_size", "4", "--workers", "0")
    refused("ffvt/train.py", words, small, status, names, cub)


def test_a_name_is_required(tmp_path: Path) -> None:
    refused("ffvt/train.py", (), ("--dataset", "CUB"), 2, "--name", tmp_path)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), ("checkpoint/ViT-B_16.npz", "imagenet21k/ViT-B_16.npz")),
        (("--model_type", "R50-ViT-B_16", "--pretrained_dir", "w/r50.npz"), ("w/r50.npz", "R50+ViT-B_16.npz")),
        (("--model_type", "ViT-L_16", "--pretrained_dir", "w/vit.npz"), ("w/vit.npz", "imagenet21k/ViT-L_16.npz")),
        (("--pretrained_dir", "w.bin"), ("--pretrained_dir w.bin",)),
        (("--pretrained_dir", "pretrained"), ("--pretrained_dir pretrained",)),
    ],
)
def test_weights_that_are_not_there(words: tuple[str, ...], names: tuple[str, ...], cub: Path) -> None:
    """Where to get them, too."""
    start_ = ("--name", "t", "--dataset", "CUB", "--data_root", "runs/demo-data", "--workers", "0", "--no_download")
    for part in names:
        refused("ffvt/train.py", words, start_, 1, part, cub)


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = new_home(tmp_path_factory.mktemp("bad") / "glsim", "glsim") if reference("glsim") else Path()
    (home / PICTURE).parent.mkdir(parents=True)
    pil_image().save(home / PICTURE)
    (home / "empty").mkdir()
    return home


@pytest.mark.parametrize(("words", "status", "names"), BAD_GLSIM)
def test_bad_values_of_glsim(words: tuple[str, ...], status: int, names: str, birds: Path) -> None:
    small = ("--limit", "8", "--cpu_workers", "0", *(() if "--dataset_root_path" in words else ("--demo",)))
    refused("glsim/tools/train.py", words, small, status, names, birds)


@pytest.mark.parametrize(("words", "status", "names"), BAD_INFERENCE)
def test_bad_values_of_inference(words: tuple[str, ...], status: int, names: str, birds: Path) -> None:
    refused("glsim/tools/inference.py", words, (), status, names, birds)


@pytest.mark.parametrize(("words", "status", "names"), BAD_MASKS)
def test_bad_values_of_vis_dfsm(words: tuple[str, ...], status: int, names: str, birds: Path) -> None:
    refused("glsim/tools/vis_dfsm.py", words, ("--demo",), status, names, birds)


# Files of settings


def test_the_command_line_wins_over_the_method_which_wins_over_the_experiment(tmp_path: Path) -> None:
    reference("glsim")
    home = new_home(tmp_path / "home", "glsim")
    (home / "a.yaml").write_text("smoothing: 0.2\nls: true\ntest_multiple: 3\nserial: 4\nwarmup_steps: 7\n")
    (home / "b.yaml").write_text("smoothing: 0.3\nserial: 5\n")
    words = ("--cfg", "a.yaml", "--cfg_method", "b.yaml", "--serial", "6", "--no-ls")
    words += ("--demo", "--limit", "4", "--epochs", "2", "--cpu_workers", "0")
    record = record_of(run(["glsim/tools/train.py", *words], home), home)
    found = {name: record["recipe"][name] for name in ("smoothing", "ls", "test_multiple", "serial")}
    assert found == {"smoothing": 0.3, "ls": False, "test_multiple": 3, "serial": 6}
    assert record["overrides"].keys() == {"cfg", "cfg_method", "serial", "ls", "epochs", "cpu_workers"}


def test_published_flags_that_turn_off(tmp_path: Path) -> None:
    """The bare flag, and --no-, in both spellings: off. Without it, on."""
    reference("glsim")
    home = new_home(tmp_path / "home", "glsim")
    small = ("--demo", "--limit", "4", "--epochs", "2", "--cpu_workers", "0", "--cfg_method", METHOD)
    off = {}
    for words in ((), ("--fp16", "--no-train_trainval", "--no_pin_memory"), ("--no-fp16", "--train_trainval")):
        recipe = record_of(run(["glsim/tools/train.py", *small, *words], home), home)["recipe"]
        off[words] = {name for name in ("fp16", "train_trainval", "pin_memory") if not recipe[name]}
    assert list(off.values()) == [set(), {"fp16", "train_trainval", "pin_memory"}, {"fp16", "train_trainval"}]


def test_nothing_here_knows_the_inside() -> None:
    """Of the repository these tests import the scripts and their own helpers alone."""
    own = (
        {path.stem for path in (ROOT / "tests").glob("*.py")} | {"contract"} | {path.stem for path in ROOT.glob("*.py")}
    )
    inside = {"common", "ffvt", "glsim", "results", "gft", "benchmarks"}
    for path in Path(__file__).parent.glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not {name.partition(".")[0] for name in names} & (inside - own), path.name


def test_the_checkpoint_that_stands_for_the_authors_holds_plain_values() -> None:
    file = reference("glsim").home / PROGRAMS["glsim"].published[0]
    assert torch.load(file, weights_only=True)["config"]["model_name"] == "vit_b16"
