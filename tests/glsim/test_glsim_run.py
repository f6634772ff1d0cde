"""The program glsim/tools/train.py: published commands and flags, its files, checkpoints, evaluation, resumption."""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import fill
from PIL import Image
from safetensors.torch import load_file
from scripts import ROOT, Outcome, run_program, run_script

from common.engine import logits_of
from common.errors import UserError
from common.experiment import Options
from common.predict import load_run
from common.train import Training
from glsim.model_utils.build import build_model
from glsim.tools.train import EXPERIMENT
from glsim.train_utils.demo import demo_settings
from glsim.train_utils.recipe import Recipe, altered
from glsim.train_utils.settings import Settings
from glsim.train_utils.trained import load_trained, settings_of_checkpoint
from glsim.train_utils.yaml_config import read_configs

HOME = ROOT / "glsim"
METHOD = str(HOME / "configs" / "methods" / "glsim.yaml")
TRAINED = "vit_b16_best.pth"
# As printed in the README of GLSim.
TRAIN = (
    "python tools/train.py --cfg configs/cub_ft_is224_medaugs.yaml --lr 0.01 --model_name vit_b16 "
    "--cfg_method configs/methods/glsim.yaml"
)
SMALL = ("--demo", "--limit", "48", "--epochs", "2", "--eval_freq", "1", "--cpu_workers", "0")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to run in: the program writes results_train/ where it is started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(demo_output: Path, *words: str | Path) -> Outcome:
    return run_script("glsim/tools/train.py", "--output", demo_output, *words)


def one_line(outcome: Outcome) -> str:
    assert outcome.status == 1, (outcome.out, outcome.err)
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    return lines[0]


@pytest.fixture(scope="module")
def whole(demo_output: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A small run of GLSim on digits in the layout of CUB, and its results_train folder."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = train(demo_output, "--cfg_method", METHOD, *SMALL, "--results_dir", folder)
    assert outcome.status == 0, outcome.err
    return outcome, folder / "demo_cub_vit_b16_16_0"


def demo_model(**changes: Any) -> tuple[Settings, Any]:
    """The demo's GLSim with weights by formula, and its settings."""
    method = read_configs({"cfg_method": METHOD})
    settings = Settings(**(method | demo_settings(Settings(**method), {}, Path("runs")) | changes))
    model: Any = build_model(settings, 10)
    model.load_released({name: fill(name, value.shape) for name, value in model.released_state_dict().items()})
    return settings, model.eval()


def released_checkpoint(path: Path, **changes: Any) -> tuple[Any, Any]:
    """A checkpoint as the authors' program writes it, Namespace and all; returns its configuration and model."""
    settings, model = demo_model()
    config = argparse.Namespace(**vars(settings), num_classes=10, world_size=1, anchor_size=16, device="cuda", lr=0.01)
    vars(config).update({"resize_size": 16, "batch_size": 8, "cfg": "configs/x.yaml"} | changes)
    state = {f"model.{name}": value for name, value in model.released_state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    torch.save({"config": config, "epoch": 50, "model": state, "accuracy": 90.1, "optimizer": optimizer}, path)
    return config, model


def test_help_and_flags() -> None:
    shown = run_script("glsim/tools/train.py", "--help").out
    flags = (
        "cfg",
        "cfg_method",
        "lr",
        "model_name",
        "image_size",
        "ckpt_path",
        "test_only",
        "batch_size",
        "vis_errors",
    )
    assert all(f"--{name} " in shown or f"--{name}," in shown for name in flags)
    mistaken = run_script("glsim/tools/train.py", "--anchor_pool_avg")
    assert mistaken.status == 2
    assert "--anchor_pool_avg has no effect in GLSim" in mistaken.err


@pytest.mark.parametrize("flag", ["fp16", "train_trainval", "pin_memory", "encoder_norm", "inference_crops"])
@pytest.mark.parametrize("spelling", ["--{}", "--no-{}", "--no_{}"])
def test_published_flags_that_turn_off(flag: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("common.run._dispatch", lambda experiment, recipe, *_: seen.append(recipe))
    run_script("glsim/tools/train.py", spelling.format(flag))
    run_script("glsim/tools/train.py")
    assert [getattr(recipe, flag) for recipe in seen] == [False, True]


def test_mixed_precision_is_for_a_gpu_and_a_precision_that_is_asked_for_wins() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    asked = Options(precision="fp32")
    assert EXPERIMENT.options(Recipe(), Options(), gpu, ()).precision == "fp16"
    assert EXPERIMENT.options(Recipe(), Options(), cpu, ()).precision == "fp32"
    assert EXPERIMENT.options(Recipe(), asked, gpu, {"precision"}).precision == "fp32"


def test_the_command_line_wins_over_the_method_which_wins_over_the_experiment(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("common.run._dispatch", lambda experiment, *found: seen.append(found))
    (home / "a.yaml").write_text("sd: 0.1\nls: true\nre: 0.3\nlr: 0.2\npretrained: true")
    (home / "b.yaml").write_text("sd: 0.2\nre: 0.4")
    words = ("--cfg", "a.yaml", "--cfg_method", "b.yaml", "--re", "0.5", "--no-pretrained")
    outcome = run_script("glsim/tools/train.py", *words)
    assert outcome.status == 0, outcome.err
    recipe, _, overrides, _ = seen[0]
    assert (recipe.sd, recipe.ls, recipe.re, recipe.lr, recipe.pretrained) == (0.2, True, 0.5, 0.2, False)
    assert overrides.keys() == {"cfg", "cfg_method", "re", "pretrained"}


def test_a_wrong_configuration_is_a_sentence(home: Path) -> None:
    (home / "a.yaml").write_text("learning_rate: 0.1")
    assert "a.yaml: there is no option 'learning_rate'" in one_line(
        run_script("glsim/tools/train.py", "--cfg", "a.yaml")
    )


def test_the_printed_training_commands_are_the_published_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their own words nothing of them counts as altered."""
    seen: list[Any] = []
    monkeypatch.chdir(HOME)
    monkeypatch.setattr("common.run._dispatch", lambda experiment, recipe, *_: seen.append(recipe))
    for more in ("", " --image_size 448"):
        words = shlex.split(TRAIN + more)[2:]
        assert run_script("glsim/tools/train.py", *words).status == 0
    for recipe, row in zip(seen, ("glsim_cub_224_glsim", "glsim_cub_448_glsim"), strict=True):
        assert EXPERIMENT.row(recipe) == row
        assert altered(recipe, trained=True) == []
        assert Path(recipe.weights) == Path("ckpts/ViT-B_16.npz")
        assert (recipe.batch_size, recipe.epochs, recipe.sd, recipe.ls) == (8, 50, 0.1, True)


@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({"dynamic_top": 4}, "dynamic_top 8 -> 4"),
        ({"epochs": 3}, "epochs 50 -> 3"),
        ({"batch_size": 16}, "batch 8 -> 16"),
        ({"gradient_accumulation_steps": 4}, "batch 8 -> 32"),
        ({"lr": 0.02}, "lr: one of 0.03, 0.01, 0.003, 0.001 -> 0.02"),
        ({"pretrained": False}, "pretrained True -> False"),
        ({"crop_inclusive": True}, "crop_inclusive False -> True"),
        ({"resize_size": 256}, "resize_size None -> 256"),
        ({"train_trainval": False}, "train_trainval True -> False"),
    ],
)
def test_what_alters_a_row(changes: dict[str, Any], change: str) -> None:
    given = {"cfg": str(HOME / "configs" / "cub_ft_is224_weakaugs.yaml"), "cfg_method": METHOD}
    recipe = Recipe(**(read_configs(given, Recipe) | changes))
    assert altered(recipe, trained=True) == [change]
    of_the_model = changes.keys() & {"dynamic_top", "crop_inclusive", "resize_size"}
    assert altered(recipe, trained=False) == ([change] if of_the_model else [])


def test_memory_is_saved_by_smaller_iterations() -> None:
    advice = EXPERIMENT.save_memory(Recipe(batch_size=8, gradient_accumulation_steps=3), Options())
    assert advice.startswith("--batch_size 4 with --gradient_accumulation_steps 6")


@pytest.mark.parametrize("column", ["vit", "resnet101", "cal", "transfg", "ffvt"])
def test_rows_of_the_comparators(column: str) -> None:
    given = {"cfg": str(HOME / "configs" / "dogs_ft_is224_medaugs.yaml")}
    if column == "cal":
        given["cfg_method"] = str(HOME / "configs" / "methods" / "cal.yaml")
    recipe = Recipe(**({"model_name": "vit_b16" if column == "vit" else column} | read_configs(given, Recipe)))
    assert EXPERIMENT.row(recipe) == f"glsim_dogs_224_{column}"
    assert altered(recipe, trained=True) == []


def test_the_whole_run_and_its_files(whole: tuple[Outcome, Path]) -> None:
    outcome, folder = whole
    record = outcome.record
    assert record["script"] == "glsim/tools/train.py"
    assert record["excluded"] == ["demo"]
    assert (record["results"]["last"]["epoch"], record["results"]["last"]["test"]["total"]) == (2, 48)
    assert sorted(path.name for path in folder.iterdir()) == [TRAINED, "vit_b16_last.pth"]
    best = torch.load(folder / TRAINED, weights_only=True)  # no pickled object in it
    assert best["config"]["dynamic_top"] == 4
    assert len(best["classes"]) == 10
    assert best["accuracy"] == pytest.approx(record["results"]["best"]["val"]["top1"])
    weights = load_file(outcome.folder / "best.safetensors")
    query = best["model"]["model.encoder.blocks.1.attn.proj_q.weight"]
    assert torch.equal(query, weights["base_model.blocks.1.attn.qkv.weight"][: len(query)])


def test_all_files_of_a_run_load_and_agree(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    """The run's folder and its best checkpoint, by the program and as a module."""
    outcome, folder = whole
    best = outcome.record["results"]["best"]["test"]
    for path in (outcome.folder, folder / TRAINED):
        tested = train(demo_output, "--ckpt_path", path, "--test_only", "--demo", "--limit", "48", "--cpu_workers", "0")
        assert tested.status == 0, tested.err
        found = tested.record["results"]["checkpoint"]["test"]
        assert (found["correct"], found["total"]) == (best["correct"], 48)
        assert found["loss"] == pytest.approx(best["loss"], abs=1e-5)
        assert tested.record["evaluation_speed"]["images_per_s"] > 0
    images = torch.rand(3, 3, 16, 16)
    one, other = (load_trained(path, torch.device("cpu")) for path in (outcome.folder, folder / TRAINED))
    assert one.classes == other.classes
    assert str(one.transform) == str(other.transform)
    with torch.inference_mode():
        assert torch.equal(one.model(images)[0], other.model(images)[0])


def test_predict(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    Image.new("RGB", (40, 30), "red").save("red.png")
    for flag in ("--checkpoint", "--ckpt_path"):
        for checkpoint in (whole[0].folder, whole[1] / TRAINED):
            outcome = train(demo_output, "--predict", "red.png", flag, checkpoint, "--demo", "--top", "2")
            assert outcome.status == 0, outcome.err
            assert f"model: {checkpoint}" in outcome.out
            assert re.search(r"red\.png: \S+ [\d.]+%, \S+ [\d.]+%", outcome.out)
    words = ("--predict", "red.png", "--ckpt_path", whole[0].folder, "--checkpoint", whole[1] / TRAINED)
    assert "--ckpt_path and --checkpoint name different models" in one_line(train(demo_output, *words, "--demo"))


def test_export(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    images = torch.rand(3, 3, 16, 16)
    trained = load_trained(whole[0].folder, torch.device("cpu"))
    with torch.inference_mode():
        logits, crops = trained.model(images)
    assert crops.shape == images.shape
    for flag, checkpoint in (("--checkpoint", whole[0].folder), ("--ckpt_path", whole[1] / TRAINED)):
        outcome = train(demo_output, "--export", "glsim.pt2", flag, checkpoint, "--demo")
        assert outcome.status == 0, outcome.err
        assert torch.equal(torch.export.load("glsim.pt2").module()(images), logits)
        assert json.loads(Path("glsim.pt2.json").read_text(encoding="utf-8"))["classes"] == trained.classes


def test_configuration_files_win_over_a_checkpoint(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    root = demo_output / "demo-data" / "CUB"
    (home / "mine.yaml").write_text(f"dataset_root_path: {root}\nfolder_test: images\ntest_flip: true\n")
    released_checkpoint(home / "c.pth")
    for path in (home / "c.pth", whole[1] / TRAINED, whole[0].folder):
        words = ("--ckpt_path", path, "--test_only", "--cfg", "mine.yaml", "--limit", "6", "--cpu_workers", "0")
        outcome = train(demo_output, *words)
        assert outcome.status == 0, outcome.err
        recipe = outcome.record["recipe"]
        assert (recipe["dataset_root_path"], recipe["test_flip"]) == (str(root), True)
        flipped = train(demo_output, *words, "--no-test_flip")
        assert flipped.record["recipe"]["test_flip"] is False


def test_where_the_data_of_a_checkpoint_lie(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    """Ours says it; of the authors' the shipped configuration does, and nothing else of it counts."""
    ours = settings_of_checkpoint(whole[1] / TRAINED)
    assert ours["dataset_root_path"] == str(demo_output / "demo-data" / "CUB")
    released_checkpoint(home / "d.pth", dataset_name="dafb", custom_mean_std=False, dataset_root_path=None)
    theirs = settings_of_checkpoint(home / "d.pth")
    assert (theirs["dataset_root_path"], theirs["custom_mean_std"]) == ("data/dafb", False)
    released_checkpoint(home / "m.pth", dataset_name="mybirds")
    assert settings_of_checkpoint(home / "m.pth")["dataset_root_path"] == "data/mybirds"
    words = ("--ckpt_path", "m.pth", "--test_only")
    assert "data/mybirds/train_val.csv is not there" in one_line(train(demo_output, *words))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": "16"}, "c.pth: image_size: '16'"),
        ({"resize_size": "a"}, "c.pth: resize_size: 'a'"),
        ({"sim_metric": "cosine"}, "c.pth: sim_metric: 'cosine'"),
    ],
)
def test_odd_values_in_a_checkpoint(changes: dict[str, Any], message: str, demo_output: Path, home: Path) -> None:
    released_checkpoint(home / "c.pth", **changes)
    assert message in one_line(train(demo_output, "--ckpt_path", "c.pth", "--test_only", "--demo"))


def test_what_a_checkpoint_leaves_out_is_the_default(demo_output: Path, home: Path) -> None:
    released_checkpoint(home / "c.pth", sim_metric=None, a_field_of_theirs={"a": [1]})
    words = ("--ckpt_path", "c.pth", "--test_only", "--demo", "--limit", "5", "--cpu_workers", "0")
    outcome = train(demo_output, *words)
    assert outcome.status == 0, outcome.err
    assert outcome.record["recipe"]["sim_metric"] == "cos"


def test_a_checkpoint_of_the_authors_is_evaluated(demo_output: Path, home: Path) -> None:
    """The model comes from the Namespace in it, whatever the defaults of the command line are."""
    config, model = released_checkpoint(home / "cub_glsim_224.pth")
    outcome = train(demo_output, "--ckpt_path", "cub_glsim_224.pth", "--test_only", "--demo", "--limit", "30")
    assert outcome.status == 0, outcome.err
    recipe = outcome.record["recipe"]
    assert (recipe["dynamic_top"], recipe["hidden_size"], recipe["reducer"]) == (4, 64, "cls")
    assert recipe["dataset_root_path"] != config.dataset_root_path  # that of the authors' machine
    trained = load_trained("cub_glsim_224.pth", torch.device("cpu"))
    assert trained.classes == [str(number) for number in range(10)]
    assert trained.settings.resize_size is not None  # 16 is no rule of 16 pixels
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(trained.model(images)[0], model(images)[0])


@pytest.mark.parametrize(
    ("words", "batch"), [(("--batch_size", "1"), 1), (("--test_only_bs1",), 1), (("--batch_size", "7"), 7)]
)
def test_a_checkpoint_alone_is_evaluated(words: tuple[str, ...], batch: int, demo_output: Path, home: Path) -> None:
    released_checkpoint(home / "c.pth")
    outcome = train(demo_output, "--ckpt_path", "c.pth", *words, "--demo", "--limit", "5", "--cpu_workers", "0")
    assert outcome.status == 0, outcome.err
    assert outcome.record["status"] == "evaluated"
    speed = outcome.record["evaluation_speed"]
    assert speed["batch_size"] == min(batch, 5)
    assert speed["images_per_s"] == pytest.approx(1000 * speed["batch_size"] / speed["latency_ms"], rel=1e-2)


def test_errors_are_drawn(demo_output: Path, home: Path) -> None:
    released_checkpoint(home / "c.pth")
    words = ("--demo", "--limit", "9", "--cpu_workers", "0", "--results_dir", "res")
    sheet = train(demo_output, "--ckpt_path", "c.pth", "--vis_errors", *words)
    assert sheet.status == 0, sheet.err
    folder = home / "res" / "demo_cub_vit_b16_16_0" / "errors"
    assert [path.name for path in folder.iterdir()] == ["errors.png"]
    each = train(demo_output, "--ckpt_path", "c.pth", "--vis_errors_save", *words)
    counts = each.record["results"]["checkpoint"]["test"]
    pictures = sorted(folder.glob("0*.png"))
    assert len(pictures) == counts["total"] - counts["correct"] > 0
    assert all(min(Image.open(path).size) > 300 for path in [*pictures, folder / "errors.png"])


def test_a_checkpoint_with_cfg_is_where_training_starts(demo_output: Path, home: Path) -> None:
    _, model = released_checkpoint(home / "c.pth")
    words = ("--cfg_method", METHOD, "--transfer_learning", "--ckpt_path", "c.pth", "--lr", "1e-12", *SMALL)
    outcome = train(demo_output, *words, "--warmup_lr", "0", "--min_lr", "0", "--epochs", "1")
    assert outcome.status == 0, outcome.err
    assert outcome.record["status"] == "finished"
    assert outcome.record["weights"]["source"] == "c.pth"
    weights = load_file(outcome.folder / "best.safetensors")
    torch.testing.assert_close(weights["head.weight"], model.state_dict()["head.weight"], atol=1e-6, rtol=0)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("harmed",))


@pytest.mark.parametrize("where", ["config", "inside", "model"])
def test_a_harmful_checkpoint_is_refused(where: str, demo_output: Path, home: Path) -> None:
    released_checkpoint(home / "c.pth")
    content = torch.load(home / "c.pth", weights_only=False)
    if where == "inside":
        content["config"].evil = Harmful()
    else:
        content[where] = Harmful()
    torch.save(content, home / "c.pth")
    message = one_line(train(demo_output, "--ckpt_path", "c.pth", "--test_only", "--demo"))
    assert "c.pth holds a pickled posix.mkdir" in message
    assert not (home / "harmed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregator": False}, "unknown aggregator"),
        ({"num_hidden_layers": 5}, "lacks encoder.blocks.4"),
        ({"hidden_size": 128, "num_attention_heads": 2}, "c.pth has"),
        ({"image_size": 32, "resize_size": None, "test_resize_size": None}, "trained at another image size"),
        ({"model_name": "ffvt"}, "ffvt|another model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    changes: dict[str, Any], message: str, demo_output: Path, home: Path
) -> None:
    released_checkpoint(home / "c.pth", **changes)
    words = ("--ckpt_path", "c.pth", "--test_only", "--demo", "--cpu_workers", "0")
    assert re.search(message, one_line(train(demo_output, *words)))
    with pytest.raises(UserError, match=message):
        load_trained("c.pth", torch.device("cpu"))


def test_checkpoints_that_are_not_there(whole: tuple[Outcome, Path], home: Path) -> None:
    for path, message in (
        ("nothing.pth", "nothing.pth does not exist: ./scripts/download_ckpts.sh"),
        (".", "is a folder without a model.json: name a checkpoint"),
        (whole[1], f"is a folder without a model.json: name {TRAINED} in it"),
    ):
        with pytest.raises(UserError, match=message):
            load_trained(path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--test_only",), "--test_only evaluates a checkpoint: name it with --ckpt_path"),
        (("--ckpt_path", "nothing.pth"), "nothing.pth"),
        (("--cfg", "nothing.yaml"), "nothing.yaml does not exist"),
        (("--dynamic_anchor", "--dynamic_top", "17", "--demo"), "dynamic_top 17: expected 1 to 16"),
        (("--image_size", "30", "--model_name", "glsvit_tiny_patch16_224", "--demo"), "30"),
        (("--epochs", "0"), "--epochs 0: expected more than 0"),
        (("--dataset_root_path", "nowhere"), r"nowhere/\w+.csv is not there"),
        (("--lr", "inf"), "--lr inf: expected more than 0"),
        (("--model_name", "vit_s16", "--pretrained", "--demo"), "vit_s16"),
        (("--model_name", "vit_b61", "--demo"), "there is no such model; did you mean vit_b16"),
    ],
)
def test_bad_input_is_a_sentence(words: tuple[str, ...], message: str, demo_output: Path, home: Path) -> None:
    assert re.search(message, one_line(train(demo_output, *words)))


@pytest.mark.parametrize(
    "name",
    [
        *("vit_b16", "transfg", "ffvt", "cal", "resnet50"),
        *(
            "vit_tiny_patch16_224",
            "glsvit_tiny_patch16_224",
            "glsdeit_tiny_patch16_224",
            "glsvit_small_patch14_reg4_dinov2",
        ),
    ],
)
def test_every_comparator_trains_a_step_and_evaluates(name: str, demo_output: Path, home: Path) -> None:
    method = ("--cfg_method", METHOD) if name.startswith("gls") else ()
    words = ("--demo", "--limit", "8", "--epochs", "1", "--cpu_workers", "0", "--batch_size", "8")
    outcome = train(demo_output, "--model_name", name, *method, *words)
    assert outcome.status == 0, outcome.err
    assert outcome.record["results"]["last"]["step"] == 1
    assert outcome.record["results"]["last"]["test"]["total"] == 8
    (checkpoint,) = (home / "results_train").rglob(f"{name}_best.pth")
    again = train(demo_output, "--ckpt_path", checkpoint, "--test_only", "--demo", "--limit", "8", "--cpu_workers", "0")
    assert again.status == 0, again.err
    before, after = outcome.record["results"]["best"]["test"], again.record["results"]["checkpoint"]["test"]
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    predicted = train(
        demo_output, "--predict", str(next((demo_output / "demo-data" / "CUB" / "images").rglob("*.jpg")))
    )
    assert predicted.status == 0, predicted.err
    device, images = torch.device("cpu"), torch.rand(2, 3, *([outcome.record["recipe"]["image_size"]] * 2))
    with torch.inference_mode():
        rebuilt, built = load_run(outcome.folder, device).model.eval(), load_trained(checkpoint, device).model
        torch.testing.assert_close(logits_of(rebuilt(images)), logits_of(built(images)))


def test_resumed_equals_uninterrupted(demo_output: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second epoch and resumed: the same weights bit for bit, with dropout and mixed batches."""
    words = (
        "--cfg_method",
        METHOD,
        *SMALL,
        "--hidden_dropout_prob",
        "0.1",
        "--cm",
        "--mu",
        "--ra",
        "2",
        "--save_every",
        "1",
    )
    straight = train(demo_output, *words, "--results_dir", "one")
    assert straight.status == 0, straight.err
    save = Training._save

    def interrupted(self: Training) -> None:
        save(self)
        if self.trainer.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_save", interrupted)
        stopped = train(demo_output, *words, "--results_dir", "two")
    assert stopped.status == 130
    resumed = train(demo_output, "--demo", "--cpu_workers", "0", "--results_dir", "two", "--resume", stopped.folder)
    assert resumed.status == 0, resumed.err
    one = home / "one" / "demo_cub_vit_b16_16_0" / "vit_b16_best.pth"
    assert torch.load(one, weights_only=True)["epoch"] is not None
    for name in ("best", "last"):
        paths = (home / folder / "demo_cub_vit_b16_16_0" / f"vit_b16_{name}.pth" for folder in ("one", "two"))
        one, two = (torch.load(path, weights_only=True) for path in paths)
        assert (one["epoch"], one["accuracy"]) == (two["epoch"], two["accuracy"])
        assert all(torch.equal(two["model"][key], value) for key, value in one["model"].items())
    assert resumed.record["results"] == straight.record["results"]


def test_two_processes_train_and_evaluate_as_one(demo_output: Path, home: Path) -> None:
    """Two processes of 8 images are one of 16: without dropout the losses are equal."""
    words = ["--cfg_method", METHOD, *SMALL, "--limit", "41", "--output", str(demo_output), "--log_freq", "1"]
    alone = run_script("glsim/tools/train.py", *words, "--batch_size", "16", "--results_dir", "one")
    assert alone.status == 0, alone.err
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program += [str(HOME / "tools" / "train.py"), *words, "--batch_size", "8", "--results_dir", "two"]
    together = run_program(program, home)
    assert together.status == 0, together.err

    def losses(outcome: Outcome) -> list[float]:
        lines = [json.loads(line) for line in (outcome.folder / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]

    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert together.record["results"]["best"]["test"]["correct"] == alone.record["results"]["best"]["test"]["correct"]


@pytest.fixture
def inside_glsim(home: Path) -> Path:
    """What the printed commands find in glsim/, and a checkpoint of a demo model."""
    for name in ("tools", "configs"):
        (home / name).symlink_to(HOME / name)
    (home / "ckpts").mkdir()
    released_checkpoint(home / "ckpts" / "cub_glsim_224.pth")
    return home


@pytest.mark.parametrize("more", ["", " --image_size 448"])
def test_the_printed_training_commands(more: str, demo_output: Path, inside_glsim: Path) -> None:
    words = shlex.split(TRAIN + more)[1:]
    words += ["--epochs", "1", "--demo", "--limit", "16", "--output", str(demo_output)]
    done = run_program([sys.executable, *words], inside_glsim)
    assert done.status == 0, done.err
    record = done.record
    assert record["recipe"]["image_size"] == (448 if more else 16)
    assert (record["recipe"]["lr"], record["recipe"]["ls"], record["recipe"]["dynamic_anchor"]) == (0.01, True, True)


@pytest.mark.parametrize("words", ["--test_only", "--batch_size 1", "--vis_errors", "--vis_errors_save"])
def test_the_printed_evaluation_commands(words: str, demo_output: Path, inside_glsim: Path) -> None:
    command = f"--ckpt_path ckpts/cub_glsim_224.pth {words} --demo --limit 16"
    outcome = train(demo_output, *command.split())
    assert outcome.status == 0, outcome.err
    assert outcome.record["results"]["checkpoint"]["test"]["total"] == 16
    assert "per class" in outcome.out


def test_the_demo_learns(demo_output: Path, home: Path) -> None:
    outcome = train(demo_output, "--cfg_method", METHOD, "--demo")
    assert outcome.status == 0, outcome.err
    assert outcome.record["results"]["best"]["test"]["top1"] >= 0.9
