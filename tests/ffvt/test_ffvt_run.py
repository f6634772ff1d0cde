"""The program ffvt/train.py: the README's commands, its files, evaluation, prediction, resumption, bad input."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, Outcome, run_program, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DistributedSampler

from common import dist
from common.errors import UserError
from common.experiment import Options
from ffvt.data import DATASETS
from ffvt.train import EXPERIMENT, PUBLISHED, Recipe

GPU = torch.device("cuda")
# As printed in the README of FFVT, less "$ ".
COMMANDS = {
    "cotton": "python3 -m torch.distributed.launch --nproc_per_node 4 train.py --name {name} --dataset cotton --model_type ViT-B_16 --pretrained_dir {pretrained_model_dir} --img_size 384 --resize_size 500 --train_batch_size 8 --learning_rate 0.02 --num_steps 2000 --fp16 --eval_every 16 --feature_fusion",  # noqa: E501
    "soyloc": "python3 -m torch.distributed.launch --nproc_per_node 4 train.py --name {name} --dataset soyloc --model_type ViT-B_16 --pretrained_dir {pretrained_model_dir} --img_size 384 --resize_size 500 --train_batch_size 8 --learning_rate 0.02 --num_steps 4750 --fp16 --eval_every 50 --feature_fusion",  # noqa: E501
    "CUB": "python3 -m torch.distributed.launch --nproc_per_node 4 train.py --name {name} --dataset CUB --model_type ViT-B_16 --pretrained_dir {pretrained_model_dir} --img_size 448 --resize_size 600 --train_batch_size 8 --learning_rate 0.02 --num_steps 10000 --fp16 --eval_every 200 --feature_fusion",  # noqa: E501
    "dog": "python3 -m torch.distributed.launch --nproc_per_node 4 train.py --name {name} --dataset CUB --model_type ViT-B_16 --pretrained_dir {pretrained_model_dir} --img_size 448 --resize_size 600 --train_batch_size 4 --learning_rate 3e-3 --num_steps 30000 --fp16 --eval_every 300 --feature_fusion --decay_type linear --num_token 24",  # noqa: E501
}
# Flag and default, as the released program has them (--local_rank is not part of the recipe).
FLAGS: dict[str, Any] = {
    "dataset": "cotton",
    "model_type": "ViT-B_16",
    "pretrained_dir": "checkpoint/ViT-B_16.npz",
    "output_dir": "output",
    "img_size": 448,
    "resize_size": 600,
    "train_batch_size": 16,
    "eval_batch_size": 16,
    "num_token": 12,
    "eval_every": 100,
    "learning_rate": 3e-2,
    "weight_decay": 0,
    "num_steps": 10000,
    "decay_type": "cosine",
    "warmup_steps": 500,
    "max_grad_norm": 1.0,
    "seed": 42,
    "gradient_accumulation_steps": 1,
    "fp16": False,
    "fp16_opt_level": "O2",
    "feature_fusion": False,
    "loss_scale": 0,
    "data_root": "./data",
    "smoothing_value": 0.0,
}
SMALL = (
    "--demo",
    "--limit",
    "71",
    "--num_steps",
    "6",
    "--train_batch_size",
    "16",
    "--eval_every",
    "3",
    "--workers",
    "0",
)


def words_of(command: str, name: str, processes: int) -> list[str]:
    """A printed command, filled in, on so many processes."""
    command = command.replace("{name}", name).replace("{pretrained_model_dir}", "checkpoint/ViT-B_16.npz")
    return shlex.split(command.replace("--nproc_per_node 4", f"--nproc_per_node {processes}"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to run in: the program writes logs/ and output/ where it is started."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(demo_output: Path, *words: str | Path) -> Outcome:
    return run_script("ffvt/train.py", "--name", "t", "--output", demo_output, *words)


def one_line(outcome: Outcome) -> str:
    assert outcome.status == 1, (outcome.out, outcome.err)
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    return lines[0]


@pytest.fixture(scope="module")
def whole(demo_output: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A small run of FFVT on digits in the layout of CUB, and the folder in which it was started."""
    folder, before = tmp_path_factory.mktemp("whole"), os.getcwd()
    os.chdir(folder)
    try:
        outcome = train(demo_output, "--dataset", "CUB", "--feature_fusion", *SMALL)
    finally:
        os.chdir(before)
    assert outcome.status == 0, outcome.err
    return outcome, folder


def test_the_published_flags_and_their_defaults() -> None:
    recipe = vars(Recipe("t"))
    assert {name: recipe[name] for name in FLAGS} == FLAGS
    assert recipe.keys() - FLAGS.keys() == {"name", "model_kwargs", "released"}
    choices = Recipe.__annotations__["dataset"].__args__
    assert sorted(choices) == sorted(DATASETS)
    shown = run_script("ffvt/train.py", "--help").out
    assert all(
        f"--{name} " in shown for name in (*FLAGS, "name", "local_rank", "resume", "eval", "predict", "released")
    )
    nameless = run_script("ffvt/train.py", "--dataset", "CUB")
    assert nameless.status == 2
    assert "--name" in nameless.err


@pytest.mark.parametrize("which", COMMANDS)
def test_the_printed_commands_are_the_published_recipes(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On four processes nothing of them counts as altered; in their own words the Dogs command trains on CUB."""
    words = words_of(COMMANDS[which], "t", 4)
    given = dict(re.findall(r"--(\w+) ([^-]\S*)", " ".join(words[words.index("train.py") :])))
    kinds = {name: type(value) for name, value in FLAGS.items()} | {"name": str}
    recipe = Recipe(**{name: kinds[name](value) for name, value in given.items()}, fp16=True, feature_fusion=True)
    monkeypatch.setattr(dist, "size", lambda: 4)
    assert EXPERIMENT.row(recipe) == ("ffvt_cub" if which == "dog" else f"ffvt_{which.lower()}")
    if which == "dog":
        assert "--dataset dog" in EXPERIMENT.advice(recipe, Options(demo=True), GPU)[0]
        assert "learning_rate 0.02 -> 0.003" in EXPERIMENT.alterations(recipe, trained=True)
        recipe.dataset = "dog"
    assert EXPERIMENT.alterations(recipe, trained=True) == []
    assert EXPERIMENT.advice(recipe, Options(), GPU) == []
    monkeypatch.setattr(dist, "size", lambda: 1)
    batch = PUBLISHED[recipe.dataset]["batch_size"]
    assert f"--train_batch_size {batch} would be the same" in EXPERIMENT.advice(recipe, Options(), GPU)[0]
    assert EXPERIMENT.alterations(recipe, trained=True) == [f"batch_size {batch} -> {batch // 4}"]
    recipe.train_batch_size, recipe.pretrained_dir = batch, "B_16-augreg.npz"
    assert EXPERIMENT.alterations(recipe, trained=True) == ["pretrained_dir ViT-B_16.npz -> B_16-augreg.npz"]
    assert EXPERIMENT.alterations(recipe, trained=False) == []
    recipe.feature_fusion, recipe.num_token = False, 5
    assert EXPERIMENT.row(recipe) == f"ffvt_{recipe.dataset.lower()}_vit"
    assert EXPERIMENT.alterations(recipe, trained=False) == []
    recipe.img_size = 224
    assert EXPERIMENT.alterations(recipe, trained=False) == [
        f"img_size {PUBLISHED[recipe.dataset].get('img_size', 448)} -> 224"
    ]


@pytest.fixture(scope="module")
def inside_ffvt(demo_output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ffvt/ beside common/, to be in when a printed command is run: what it writes stays out of this tree."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "ffvt" / "runs").mkdir(parents=True)
    for file in (ROOT / "ffvt").glob("*.py"):  # not what somebody's own runs have left there
        shutil.copy(file, folder / "ffvt")
    (folder / "common").symlink_to(ROOT / "common")
    (folder / "ffvt" / "runs" / "demo-data").symlink_to(demo_output / "demo-data")
    return folder / "ffvt"


def launch(words: list[str], cwd: Path) -> Outcome:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return run_program([sys.executable, *words[1:]], cwd, environment)


@pytest.mark.parametrize("which", COMMANDS)
def test_the_printed_commands_on_two_processes(which: str, inside_ffvt: Path) -> None:
    """Verbatim, shortened by --num_steps and on demo data; its checkpoint has the same metrics on one process."""
    words = [*words_of(COMMANDS[which], which, 2), "--num_steps", "3", "--demo", "--limit", "71"]
    outcome = launch(words, inside_ffvt)
    assert outcome.status == 0, outcome.err
    record = json.loads((inside_ffvt / outcome.folder / "record.json").read_text())
    assert (record["processes"], record["precision"], record["amp_backend"]) == (2, "fp32", "native")
    assert "--fp16 is for a GPU" in outcome.out
    assert record["recipe"]["img_size"] == (384 if which in ("cotton", "soyloc") else 448)
    assert record["results"]["last"]["step"] == 3
    assert ("for Stanford Dogs say --dataset dog" in outcome.out) == (which == "dog")
    checkpoint = inside_ffvt / "output" / f"{which}_checkpoint.bin"
    assert len(list((inside_ffvt / "logs" / which).glob("events*"))) == 1
    alone = launch(["python3", *words[words.index("train.py") :], "--eval", str(checkpoint)], inside_ffvt)
    assert alone.status == 0, alone.err
    (line,) = [line for line in alone.out.splitlines() if line.startswith("record: ")]
    evaluated = json.loads((inside_ffvt / line.removeprefix("record: ")).read_text())
    found, expected = evaluated["results"]["checkpoint"]["test"], record["results"]["best"]["test"]
    assert (found["correct"], found["total"]) == (expected["correct"], 71)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.parametrize("which", COMMANDS)
def test_the_printed_commands_on_one_process(which: str, demo_output: Path, home: Path) -> None:
    words = words_of(COMMANDS[which], which, 1)
    words = [*words[words.index("train.py") + 1 :], "--num_steps", "2", "--demo", "--limit", "71", "--workers", "0"]
    outcome = run_script("ffvt/train.py", *words, "--output", demo_output)
    assert outcome.status == 0, outcome.err
    assert outcome.record["results"]["last"]["step"] == 2
    assert (home / "output" / f"{which}_checkpoint.bin").exists()


def test_torchrun_trains_the_same_batches(demo_output: Path, home: Path) -> None:
    """Two processes of 8 images are one of 16: without dropout the losses are equal."""
    small = [word for word in SMALL if word not in ("--train_batch_size", "16")]
    words = ["--dataset", "CUB", "--feature_fusion", *small, "--output", str(demo_output), "--log_every", "1"]
    alone = run_script("ffvt/train.py", "--name", "one", *words, "--train_batch_size", "16")
    assert alone.status == 0, alone.err
    program = ["torchrun", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program += [str(ROOT / "ffvt" / "train.py"), "--name", "two", *words, "--train_batch_size", "8"]
    together = launch(program, home)
    assert together.status == 0, together.err

    def losses(outcome: Outcome) -> list[float]:
        lines = [json.loads(line) for line in (outcome.folder / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]

    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert together.record["results"]["best"]["test"]["correct"] == alone.record["results"]["best"]["test"]["correct"]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What common.run would have trained: (session, trainer), instead of training."""
    made: list[Any] = []

    class NotTraining:
        def __init__(self, session: Any, trainer: Any, resume: bool, evaluate_every: int) -> None:
            made.append((session, trainer, evaluate_every))

        def run(self) -> None:
            return None

    monkeypatch.setattr("common.run.Training", NotTraining)
    return made


def test_every_flag_reaches_what_it_names(sessions: list[Any], demo_output: Path, home: Path) -> None:
    words = ("--max_grad_norm", "0.25", "--smoothing_value", "0.1", "--weight_decay", "0.01", "--learning_rate", "0.3")
    words += ("--warmup_steps", "4", "--decay_type", "linear", "--num_steps", "8", "--eval_every", "5", "--seed", "7")
    words += ("--gradient_accumulation_steps", "2", "--train_batch_size", "12", "--eval_batch_size", "5")
    words += ("--precision", "fp16", "--fp16_opt_level", "O1", "--loss_scale", "64", "--num_token", "3")
    outcome = train(demo_output, "--dataset", "dog", "--feature_fusion", "--demo", "--workers", "0", *words)
    assert outcome.status == 0, outcome.err
    ((session, trainer, evaluate_every),) = sessions
    assert (trainer.clip_grad, trainer.steps, trainer.seed, evaluate_every) == (0.25, 8, 7, 5)
    assert (trainer.plan.batch_size, trainer.plan.accumulate, session.loading.eval_batch_size) == (12, 2, 5)
    assert (trainer.model.smoothing_value, trainer.model.num_token, trainer.model.feature_fusion) == (0.1, 3, True)
    assert (trainer.precision.opt_level, trainer.precision.scaler.get_scale()) == ("O1", 64)
    (group,) = trainer.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"], group["initial_lr"], group["lr"]) == (0.01, 0.9, 0.3, 0)
    factor = trainer.scheduler.lr_lambdas[0]
    assert [factor(step) for step in (1, 4, 6, 8)] == [0.25, 1.0, 0.5, 0.0]
    assert trainer.schedule_per == "step"
    assert list(trainer.plan.order(0)) != list(trainer.plan.order(1))


def test_released_reaches_order_and_sizes(sessions: list[Any], demo_output: Path, home: Path) -> None:
    words = ("--img_size", "448", "--resize_size", "500", "--demo", "--workers", "0", "--released")
    outcome = train(demo_output, "--dataset", "dog", *words)
    assert outcome.status == 0, outcome.err
    ((session, trainer, _),) = sessions
    assert list(trainer.plan.order(0)) == list(trainer.plan.order(1))
    assert session.data.test.transform.transforms[0].size == (600, 600)
    assert session.side == "released"


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_trains_evaluates_and_records(dataset: str, demo_output: Path, home: Path) -> None:
    outcome = train(demo_output, "--dataset", dataset, "--feature_fusion", *SMALL)
    assert outcome.status == 0, outcome.err
    record = outcome.record
    assert record["script"] == "ffvt/train.py"
    assert record["row"] == (f"ffvt_{dataset.lower()}" if dataset in PUBLISHED else None)
    assert record["excluded"] == ["demo"]
    assert record["selection"]["kind"] == "test-selected"
    assert record["results"]["last"]["test"]["total"] == 71


def test_the_demo_learns(demo_output: Path, home: Path) -> None:
    outcome = train(demo_output, "--dataset", "CUB", "--feature_fusion", "--demo", "--workers", "1")
    assert outcome.status == 0, outcome.err
    assert outcome.record["results"]["best"]["test"]["top1"] >= 0.9


def test_the_released_programs_files(whole: tuple[Outcome, Path]) -> None:
    """A bare state_dict under the authors' names, equal to our own best weights, and the three published curves."""
    outcome, folder = whole
    released = torch.load(folder / "output" / "t_checkpoint.bin", weights_only=True)
    assert next(iter(released)) == "transformer.embeddings.position_embeddings"
    assert list(released)[-4:] == [
        *("transformer.encoder.ff_encoder_norm.weight", "transformer.encoder.ff_encoder_norm.bias"),
        *("head.weight", "head.bias"),
    ]
    best = load_file(outcome.folder / "best.safetensors")
    query = released["transformer.encoder.layer.1.attn.query.weight"]
    assert torch.equal(query, best["base_model.blocks.1.attn.qkv.weight"][: len(query)])
    assert torch.equal(released["head.weight"], best["base_model.head.weight"])

    curves = EventAccumulator(str(folder / "logs" / "t"))
    curves.Reload()
    assert sorted(curves.Tags()["scalars"]) == ["test/accuracy", "train/loss", "train/lr"]
    accuracies = {event.step: event.value for event in curves.Scalars("test/accuracy")}
    lines = [json.loads(line) for line in (outcome.folder / "log.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["top1"] for line in lines if line["kind"] == "val"}
    assert list(accuracies) == [3, 6]
    assert accuracies == pytest.approx(logged)
    rates = {event.step: event.value for event in curves.Scalars("train/lr")}
    assert rates[6] == pytest.approx(0.1 * 5 / 100)  # the rate that update number 5, from 0, has used


def test_an_earlier_checkpoint_is_kept(demo_output: Path, home: Path) -> None:
    (home / "output").mkdir()
    for number in (1, 2):
        (home / "output" / "t_checkpoint.bin").write_text(f"theirs {number}")
        outcome = train(demo_output, "--dataset", "cotton", *SMALL)
        assert outcome.status == 0, outcome.err
        assert f"t_checkpoint.{number}.bin" in outcome.out
        assert (home / "output" / f"t_checkpoint.{number}.bin").read_text() == f"theirs {number}"
        assert torch.load(home / "output" / "t_checkpoint.bin", weights_only=True)


@pytest.mark.parametrize("kind", ["run folder", "safetensors", "released"])
def test_evaluation(kind: str, whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    outcome, folder = whole
    paths = {"run folder": outcome.folder, "safetensors": home / "w.safetensors", "released": home / "theirs.bin"}
    shutil.copy(outcome.folder / "best.safetensors", home / "w.safetensors")
    shutil.copy(folder / "output" / "t_checkpoint.bin", home / "theirs.bin")
    words = ("--dataset", "CUB", "--feature_fusion", "--demo", "--limit", "71", "--eval", paths[kind])
    evaluated = train(demo_output, *words)
    assert evaluated.status == 0, evaluated.err
    assert evaluated.record["results"]["checkpoint"]["test"] == outcome.record["results"]["best"]["test"]
    assert evaluated.record["status"] == "evaluated"


def test_apex_is_refused_in_evaluation(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    image = min((demo_output / "demo-data" / "CUB" / "images").glob("*three/*"))
    for words in (("--eval", whole[0].folder), ("--predict", image, "--checkpoint", whole[0].folder)):
        outcome = train(demo_output, "--demo", "--amp_backend", "apex", *words)
        assert "--amp_backend apex is for training" in one_line(outcome)


def test_evaluation_of_a_checkpoint_that_does_not_fit(
    whole: tuple[Outcome, Path], demo_output: Path, home: Path
) -> None:
    file = whole[1] / "output" / "t_checkpoint.bin"
    words = ("--demo", "--limit", "71", "--eval", file)
    assert "add --feature_fusion" in one_line(train(demo_output, "--dataset", "CUB", *words))
    larger = train(
        demo_output, "--dataset", "CUB", "--feature_fusion", "--img_size", "20", "--resize_size", "20", *words
    )
    assert re.search(r"another image size.* 17 .* 26", one_line(larger))
    state = torch.load(file, weights_only=True)
    torch.save(state | {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}, home / "seven.bin")
    seven = train(demo_output, "--dataset", "CUB", "--feature_fusion", *words[:-1], home / "seven.bin")
    assert re.search(r"7 classes.* 10", one_line(seven))
    file.rename(home / "away.bin")
    assert "does not exist" in one_line(train(demo_output, "--dataset", "CUB", "--feature_fusion", *words))
    (home / "away.bin").rename(file)


def test_predictions(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    outcome, folder = whole
    image = min((demo_output / "demo-data" / "CUB" / "images").glob("*three/*"))
    ours = train(demo_output, "--predict", image, "--checkpoint", outcome.folder)
    assert ours.status == 0, ours.err
    released = (
        "--checkpoint",
        folder / "output" / "t_checkpoint.bin",
        "--dataset",
        "CUB",
        "--feature_fusion",
        "--demo",
    )
    theirs = train(demo_output, "--predict", image, *released)
    assert theirs.out.splitlines()[-1] == ours.out.splitlines()[-1]
    assert "zero" in ours.out
    words = ["python", "-m", "common.predict", "--run", str(outcome.folder), "--images", str(image)]
    alone = launch(words, ROOT)
    assert alone.status == 0, alone.err
    assert alone.out.splitlines()[-1] == ours.out.splitlines()[-1]


def test_export(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    """Of a run, and of a bare checkpoint, which says less of itself."""
    bare = ("--dataset", "CUB", "--feature_fusion", "--demo", "--checkpoint", whole[1] / "output" / "t_checkpoint.bin")
    images, logits, about = torch.randn(3, 3, 16, 16), [], []
    for words in (("--checkpoint", whole[0].folder), bare):
        outcome = train(demo_output, "--export", "ffvt.pt2", *words)
        assert outcome.status == 0, outcome.err
        logits.append(torch.export.load("ffvt.pt2").module()(images))
        about.append(json.loads(Path("ffvt.pt2.json").read_text(encoding="utf-8")))
    assert torch.equal(*logits)
    assert all(about[0][name] == about[1][name] for name in ("classes", "preprocessing", "input"))


def test_predictions_without_the_data_set(whole: tuple[Outcome, Path], demo_output: Path, home: Path) -> None:
    """A bare checkpoint says how many classes there are, not what they are called."""
    image = min((demo_output / "demo-data" / "CUB" / "images").glob("*three/*"))
    sizes = ("hidden_size=64", "mlp_dim=128", "num_heads=4", "num_layers=4", "patch_size=4")
    words = ("--dataset", "CUB", "--feature_fusion", "--img_size", "16", "--resize_size", "16", "--num_token", "4")
    words += ("--model_kwargs", *sizes, "--predict", image, "--checkpoint", whole[1] / "output" / "t_checkpoint.bin")
    outcome = train(demo_output, *words)
    assert outcome.status == 0, outcome.err
    assert "classes are numbered from 1" in outcome.out
    named = train(demo_output, "--predict", image, "--checkpoint", whole[0].folder)
    numbers = re.findall(r"(\d+) \d+\.\d%", outcome.out.splitlines()[-1])
    names = re.findall(r"(\d{3})\.\w+ \d+\.\d%", named.out.splitlines()[-1])
    assert [int(number) for number in numbers] == [int(name) for name in names]


@pytest.mark.parametrize("place", ["output", "logs"])
def test_places_that_cannot_be_written(place: str, demo_output: Path, home: Path) -> None:
    (home / place).write_text("a file")
    refused = train(demo_output, "--dataset", "CUB", *SMALL)
    assert re.search(rf"{place}.* cannot be written", one_line(refused))


def test_a_demo_of_another_size_goes_on_with_the_command_it_prints(demo_output: Path, home: Path) -> None:
    outcome = train(demo_output, "--dataset", "CUB", *SMALL, "--img_size", "28", "--resize_size", "28")
    assert outcome.status == 0, outcome.err
    (outcome.folder / "record.json").unlink()
    resumed = train(demo_output, "--demo", "--workers", "0", "--resume", outcome.folder)
    assert resumed.status == 0, resumed.err


def test_killed_and_resumed(demo_output: Path, tmp_path: Path) -> None:
    """With dropout, weights and metrics are those of a run that was left alone, to the last bit."""
    words = ["--name", "k", "--dataset", "soyloc", "--feature_fusion", *SMALL, "--num_steps", "8"]
    words += ["--model_kwargs", "hidden_size=48", "mlp_dim=96", "num_heads=3", "num_layers=3", "patch_size=4"]
    words += ["--log_every", "1", "--save_every", "10"]  # resumed at step 3, where its best so far was written
    folders = []
    for name in ("left alone", "killed"):
        home = tmp_path / name
        (home / "runs").mkdir(parents=True)
        (home / "runs" / "demo-data").symlink_to(demo_output / "demo-data")
        command = [sys.executable, str(ROOT / "ffvt" / "train.py"), *words]
        process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if name == "killed":
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and process.poll() is None:
                if any('"step": 5' in log.read_text() for log in home.glob("runs/*/*/log.jsonl")):
                    break  # after the first evaluation and before the second
                time.sleep(0.005)
            process.kill()
            process.communicate(timeout=30)
            process = subprocess.Popen(
                [*command[:2], "--name=k", "--demo", "--resume"], cwd=home, stderr=subprocess.PIPE, text=True
            )
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        folders.append(next(home.glob("runs/ffvt-k/*/")))
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(other["model"][name], value) for name, value in one["model"].items())
    assert one["history"] == other["history"]
    files = [folder.parents[2] / "output" / "k_checkpoint.bin" for folder in folders]
    states = [torch.load(file, weights_only=True) for file in files]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not list(files[1].parent.glob("k_checkpoint.*.bin"))  # the resumed run's own file is not "an earlier one"


def test_what_all_processes_find_is_said_once(home: Path) -> None:
    program = ["torchrun", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    outcome = launch([*program, str(ROOT / "ffvt" / "train.py"), "--name", "t", "--eval_every", "0"], home)
    assert outcome.status != 0
    assert outcome.err.count("--eval_every 0: expected more than 0") == 1


def test_another_number_of_processes_would_be_another_batch(
    whole: tuple[Outcome, Path], demo_output: Path, home: Path
) -> None:
    folder = demo_output / "ffvt-t" / "20000101-000000-cccccc"
    shutil.copytree(whole[0].folder, folder)
    (folder / "record.json").unlink()
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save(state | {"batch_size": 64, "processes": 4}, folder / "last.pt")
    outcome = train(demo_output, "--demo", "--workers", "0", "--resume", folder)
    assert "4 processes with a batch of 64 in all: resume with as many, not with 1" in one_line(outcome)
    shutil.rmtree(folder)


@pytest.mark.parametrize("processes", [1, 3])
def test_released_order_is_that_of_the_released_sampler(processes: int) -> None:
    """The same permutation each epoch; every step takes from it what the processes of the released program took."""
    count, share = 41, 4
    order = EXPERIMENT.order(Recipe("t", released=True), count, seed=42)
    samplers = [DistributedSampler(range(count), processes, rank) for rank in range(processes)]
    shares = [list(sampler) for sampler in samplers]
    batch = share * processes
    for step in range(count // batch):
        theirs = {sample for own in shares for sample in own[step * share : (step + 1) * share]}
        assert set(order(0)[step * batch : (step + 1) * batch]) == theirs
    assert list(order(0)) == list(order(5))
    described = EXPERIMENT.order(Recipe("t"), count, seed=42)
    assert list(described(0)) != list(described(1))
    assert sorted(described(1)) == list(range(count))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--img_size", "17", "--resize_size", "17", "--model_kwargs", "patch_size=4"), "--img_size 17: .* multiple"),
        (("--resize_size", "8"), "--resize_size 8: expected at least --img_size 16"),
        (("--num_token", "17"), "--num_token 17: expected 1 to 16"),
        (("--num_token", "0"), "--num_token 0"),
        (("--loss_scale", "3"), "--loss_scale 3: expected 0 .* power of 2"),
        (("--loss_scale", "-2"), "--loss_scale -2"),
        (("--precision", "fp16", "--fp16_opt_level", "O3"), "O3, fp16 throughout, exists in apex alone"),
        (("--fp16", "--amp_backend", "apex", "--device", "cpu"), "apex works with .* CUDA"),
        (("--gradient_accumulation_steps", "3"), "--train_batch_size.*--gradient_accumulation_steps"),
        (("--name", "../t"), r"--name \.\./t"),
        (("--name", ""), "--name "),
        (("--name", ".."), r"--name \.\."),
        (("--smoothing_value", "2"), "--smoothing_value 2"),
        (("--model_kwargs", "num_heads=5", "hidden_size=64"), "hidden_size 64 .* num_heads 5"),
        (("--amp_backend", "apex", "--eval", "x.bin"), "x.bin does not exist"),
        (("--model_kwargs", "width=3"), "width"),
        (("--learning_rate", "0"), "--learning_rate 0"),
    ],
)
def test_bad_values(words: tuple[str, ...], sentence: str, demo_output: Path, home: Path) -> None:
    outcome = train(demo_output, "--dataset", "CUB", "--feature_fusion", *SMALL, *words)
    assert re.search(sentence, one_line(outcome)), outcome.err


def test_starting_weights_that_are_not_there_or_not_whole(demo_output: Path, home: Path) -> None:
    words = ("--dataset", "CUB", "--data_root", demo_output / "demo-data", "--workers", "0", "--no_download")
    missing = one_line(train(demo_output, *words))
    assert "checkpoint/ViT-B_16.npz does not exist" in missing
    assert "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz and put it there" in missing
    hybrid = one_line(train(demo_output, *words, "--model_type", "R50-ViT-B_16", "--pretrained_dir", "w/r50.npz"))
    assert "imagenet21k/R50+ViT-B_16.npz" in hybrid
    (home / "cut.npz").write_bytes(b"PK\x03\x04 and nothing more")
    cut = one_line(train(demo_output, *words, "--pretrained_dir", "cut.npz"))
    assert "cut.npz is damaged or not an .npz file" in cut
    for name in ("w.bin", "pretrained"):
        other = one_line(train(demo_output, *words, "--pretrained_dir", name))
        assert f"--pretrained_dir {name}: expected none, or an existing .npz" in other
    large = one_line(train(demo_output, *words, "--model_type", "ViT-L_16", "--pretrained_dir", "w/vit.npz"))
    assert "imagenet21k/ViT-L_16.npz" in large


@pytest.mark.parametrize("other", ["bf16", "fp32"])
def test_fp16_and_another_precision_exclude_each_other(other: Any) -> None:
    with pytest.raises(UserError, match=f"--fp16 and --precision {other} exclude"):
        EXPERIMENT.options(Recipe("t", fp16=True), Options(precision=other), GPU, {"name", "fp16", "precision"})


def test_of_a_run_of_fp16_another_precision_may_be_asked(
    whole: tuple[Outcome, Path], demo_output: Path, home: Path
) -> None:
    """What this command line says wins over what the run's says; both of one line still exclude each other."""
    shutil.copytree(whole[0].folder, home / "half")
    info = json.loads((home / "half" / "model.json").read_text(encoding="utf-8"))
    for part in ("recipe", "overrides"):
        info[part]["fp16"] = True
    (home / "half" / "model.json").write_text(json.dumps(info))
    image = min((demo_output / "demo-data" / "CUB" / "images").glob("*three/*"))
    last = []
    for precision in ("fp32", "bf16"):
        words = ("--predict", image, "--checkpoint", "half", "--precision", precision)
        outcome = train(demo_output, *words, "--out", f"{precision}.json")
        assert outcome.status == 0, outcome.err
        last.append(json.loads((home / f"{precision}.json").read_text())[0]["probability"])
        assert "--fp16 and --precision" in one_line(train(demo_output, *words, "--fp16"))
    assert last[0] != last[1]
    words = ("--demo", "--limit", "71", "--eval", "half", "--precision", "bf16")
    assert train(demo_output, *words).record["precision"] == "bf16"
    recipe = Recipe("t", fp16=True)
    assert EXPERIMENT.options(recipe, Options(precision="fp32"), GPU, {"precision"}).precision == "fp32"


@pytest.mark.parametrize("scale", ["0", "1024"])
def test_half_precision_on_a_cpu_where_it_is_asked_for(scale: str, demo_output: Path, home: Path) -> None:
    words = ("--dataset", "CUB", "--feature_fusion", *SMALL, "--precision", "fp16", "--loss_scale", scale)
    outcome = train(demo_output, *words)
    assert outcome.status == 0, outcome.err
    assert outcome.record["precision"] == "fp16"
    state = torch.load(outcome.folder / "last.pt", weights_only=True)
    # Dynamic: halved by each update that overflows, from 2^20 on; static: never touched.
    expected = 1024.0 if scale != "0" else 2.0 ** (20 - outcome.record["skipped_updates"])
    assert state["precision"]["scale"] == expected
    assert not outcome.err
    assert outcome.record["results"]["last"]["test"]["loss"] < 2.4


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_opt_levels(level: str) -> None:
    recipe = Recipe("t", fp16=True, fp16_opt_level=level)  # type: ignore[arg-type]
    assert EXPERIMENT.options(recipe, Options(), torch.device("cpu"), ()).precision == "fp32"
    options = EXPERIMENT.options(recipe, Options(), GPU, ())
    assert options.precision == ("fp32" if level == "O0" else "fp16")
    assert (options.accumulate, options.eval_batch_size) == (1, 16)
    scaler = EXPERIMENT.precision(recipe, options, torch.device("cpu")).scaler
    assert scaler.is_enabled() == (level != "O0")
    if level != "O0":
        assert scaler.get_scale() == 2.0**20


def test_the_released_side_is_recorded(demo_output: Path, home: Path) -> None:
    outcome = train(demo_output, "--dataset", "dog", "--feature_fusion", "--released", *SMALL)
    assert outcome.status == 0, outcome.err
    assert outcome.record["side"] == "released"


def test_a_row_of_the_paper_stands_beside_a_run(whole: tuple[Outcome, Path]) -> None:
    assert "ffvt_cub (FFVT, described): published 91.6 (T)" in whole[0].out
    with pytest.raises(UserError, match="--name"):
        EXPERIMENT.folder(Recipe("a/b"))
