"""Whole runs: killed and resumed, on several processes, evaluated, asked for predictions, given bad input."""

import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, TRACED, Outcome, finish, run_script

from common.data.images import load_image
from common.predict import restore_transform

SMALL = ("--demo", "--limit", "72", "--epochs", "2", "--batch-size", "16", "--workers", "0", "--log-every", "1")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ENVIRONMENT = os.environ | TRACED | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def start(*words: str | Path, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


def last_state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same_run(folder: Path, reference: Path) -> None:
    """Weights, optimizer, metrics and the trace of the log are equal to the last bit."""
    state, expected = last_state(folder), last_state(reference)
    for name, value in expected["model"].items():
        assert torch.equal(state["model"][name], value), name
    for number, entry in expected["optimizer"]["state"].items():
        assert all(torch.equal(state["optimizer"]["state"][number][name], value) for name, value in entry.items())
    assert state["history"] == expected["history"]
    best, expected_best = (load_file(path / "best.safetensors") for path in (folder, reference))
    assert all(torch.equal(best[name], value) for name, value in expected_best.items())
    records = [json.loads((path / "record.json").read_text()) for path in (folder, reference)]
    assert records[0]["results"] == records[1]["results"]

    def trace(path: Path) -> list[tuple[Any, ...]]:
        lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        return [(line["kind"], line["step"], line.get("lr"), line["loss"]) for line in lines]

    assert trace(folder) == trace(reference)


@pytest.fixture(scope="module")
def whole(demo_output: Path) -> Outcome:
    """An uninterrupted small run of gft_food101 (described: with the moving average that a resume must keep)."""
    outcome = run_script("gft_food101.py", *SMALL, "--output", demo_output)
    assert outcome.status == 0, outcome.err
    return outcome


def wait_for_step(output: Path, step: int, process: "subprocess.Popen[str]", seconds: float = 60) -> Path:
    """The run folder, once its log has reached `step`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for log in output.glob("*/*/log.jsonl"):
            if any(json.loads(line)["step"] >= step for line in log.read_text().splitlines() if line.endswith("}")):
                return log.parent
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate(timeout=5)}")


def with_demo_data(demo_output: Path, folder: Path) -> Path:
    """An --output of its own, so that the run started there is the only one."""
    (folder / "runs").mkdir()
    (folder / "runs" / "demo-data").symlink_to(demo_output / "demo-data")
    return folder / "runs"


def test_killed_in_the_middle_of_an_epoch_and_resumed(demo_output: Path, tmp_path: Path, whole: Outcome) -> None:
    """By a bare --resume, which goes on with the newest run; kills at many moments are fault cases. Images are kept
    before and not after: they are the same."""
    output = with_demo_data(demo_output, tmp_path)
    keeping = ("--cache-resized", tmp_path / "kept")
    process = start("gft_food101.py", *SMALL, "--output", output, "--save-every", 2, *keeping)
    folder = wait_for_step(output, 3, process)
    process.kill()
    process.communicate(timeout=30)
    assert not (folder / "record.json").exists()
    assert last_state(folder)["step"] % 2 == 0 or last_state(folder)["step"] == 5
    assert [*tmp_path.glob("kept/*/*/*.rgb")]
    resumed = run_script("gft_food101.py", *SMALL, "--output", output, "--resume")
    assert resumed.status == 0, resumed.err
    assert resumed.record["options"]["cache_resized"] is None
    assert_same_run(folder, whole.folder)


def test_asked_to_stop_by_slurm(demo_output: Path, tmp_path: Path, whole: Outcome) -> None:
    """Saves and says how to go on; the command that it says does go on. Data workers do not get in the way."""
    output = with_demo_data(demo_output, tmp_path)
    words = [word for word in SMALL if word not in ("--workers", "0")]
    process = start("gft_food101.py", *words, "--output", output, "--workers", 1)
    folder = wait_for_step(output, 2, process)
    process.send_signal(signal.SIGUSR1)
    outcome = finish(process)
    assert (outcome.status, outcome.err) == (0, "")
    (sentence,) = [line for line in outcome.out.splitlines() if line.startswith("stopped by SIGUSR1")]
    command = shlex.split(sentence.partition("continue with: ")[2])
    assert command[:2] == ["python", "gft_food101.py"]
    resumed = finish(start(*command[1:], "--log-every", 1))
    assert resumed.status == 0, resumed.err
    assert_same_run(folder, whole.folder)


def test_resume_takes_over_what_was_given_at_the_start(whole: Outcome, demo_output: Path, tmp_path: Path) -> None:
    """Batch size and epochs of the first command hold without being said again; another value is refused by name."""
    folder = demo_output / "gft_food101" / "20000101-000000-aaaaaa"
    shutil.copytree(whole.folder, folder)
    (folder / "record.json").unlink()
    refused = run_script("gft_food101.py", "--demo", "--output", demo_output, "--resume", folder, "--lr", "0.5")
    assert refused.status == 1
    assert "lr 0.002 -> 0.5" in one_line(refused.err)
    without = run_script("gft_food101.py", "--output", demo_output, "--resume", folder)
    assert "--demo" in one_line(without.err)
    other = run_script("vit_food101.py", "--demo", "--output", demo_output, "--resume", folder)
    assert "gft_food101" in one_line(other.err)
    finished = run_script("gft_food101.py", "--demo", "--output", demo_output, "--resume", whole.folder)
    assert "finished" in one_line(finished.err)
    precise = run_script("gft_food101.py", "--demo", "--output", demo_output, "--resume", folder, "--precision", "bf16")
    assert "--precision fp32" in one_line(precise.err)
    info = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(info | {"options": info["options"] | {"accumulate": 2}}))
    words = ("--demo", "--output", demo_output, "--resume", folder)
    whole_batches = run_script("gft_food101.py", *words, "--accumulate", "1")  # the default, but said
    assert "--accumulate 2" in one_line(whole_batches.err)
    repeated = run_script("gft_food101.py", *words, "--deterministic")
    assert "was started without --deterministic: resume it without --deterministic" in one_line(repeated.err)
    less = {name: value for name, value in info["options"].items() if name != "deterministic"}
    (folder / "model.json").write_text(json.dumps(info | {"options": less}))  # as a run of an earlier version
    resumed = run_script("gft_food101.py", "--demo", "--workers", "0", "--resume", folder)  # --limit is kept too
    assert resumed.status == 0, resumed.err
    assert json.loads((folder / "record.json").read_text())["results"] == whole.record["results"]
    shutil.rmtree(folder)


def test_a_damaged_state_is_named(whole: Outcome, demo_output: Path) -> None:
    folder = demo_output / "gft_food101" / "20000101-000000-bbbbbb"
    shutil.copytree(whole.folder, folder)
    (folder / "record.json").unlink()
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:5000])
    outcome = run_script("gft_food101.py", "--demo", "--output", demo_output, "--resume", folder)
    assert outcome.status == 1
    assert "last.pt" in one_line(outcome.err)
    shutil.rmtree(folder)


def test_a_state_of_other_random_numbers_is_not_gone_on_with(whole: Outcome, demo_output: Path) -> None:
    folder = demo_output / "gft_food101" / "20000101-000000-cccccc"
    shutil.copytree(whole.folder, folder)
    (folder / "record.json").unlink()
    state = last_state(folder)
    del state["draws"]  # as before they were numbered
    torch.save(state, folder / "last.pt")
    outcome = run_script("gft_food101.py", "--demo", "--output", demo_output, "--resume", folder)
    assert outcome.status == 1
    assert "draws other random numbers: start a new run" in one_line(outcome.err)
    shutil.rmtree(folder)


def test_record(whole: Outcome) -> None:
    record = whole.record
    assert record["row"] == "gft_food101"
    assert record["side"] == "described"
    assert record["overrides"] == {"epochs": 2, "batch_size": 16}
    assert record["seed"] == 42
    assert record["data"]["test"] == record["data"]["test"] | {"split": "test", "count": 72, "classes": 10}
    assert record["weights"] == {"source": "none", "sha256": None}
    assert record["selection"]["split"] == "train (other 20 %, seed 42)"
    assert record["parameters"]["trained"] < record["parameters"]["total"]
    for entry in record["results"].values():
        for split in ("val", "test"):
            assert entry[split]["top1"] == entry[split]["correct"] / entry[split]["total"]
    assert record["peak_memory_bytes"] > 50e6
    assert record["wall_seconds"] > 0
    assert record["versions"]["torch"] == torch.__version__
    table = list(csv.reader((whole.folder / "best_per_class.csv").read_text().splitlines()))
    assert sum(int(row[2]) for row in table[1:]) == record["results"]["best"]["test"]["correct"]
    confusion = list(csv.reader((whole.folder / "best_confusion.csv").read_text().splitlines()))
    assert sum(int(cell) for row in confusion[1:] for cell in row[1:]) == 72
    assert (whole.folder / "best_confusion.png").read_bytes().startswith(b"\x89PNG")


def test_overrides_and_other_data_never_count(demo_output: Path) -> None:
    """A run of the real script, without --demo, on a data set that is not the published one."""
    outcome = run_script(
        "vit_food101.py", "--output", demo_output, "--data-root", demo_output / "demo-data", "--weights", "none",
        "--img-size", "16", "--model-kwargs", "patch_size=4", "embed_dim=32", "depth=2", "num_heads=2",
        "--epochs", "2", "--lr", "1e-4", "--workers", "0", "--no-download", "--accumulate", "2",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    record = outcome.record
    assert record["overrides"]["epochs"] == 2
    assert record["overrides"]["lr"] == 1e-4
    assert "altered: epochs 30 -> 2" in record["excluded"]
    assert "altered: weights pretrained -> none" in record["excluded"]
    assert any(reason.startswith("data: food101 train has 1,") for reason in record["excluded"])
    assert not any("lr" in reason for reason in record["excluded"])  # 1e-4 is the published value
    assert not any("accumulate" in reason for reason in record["excluded"])  # a plain ViT does not mind


def test_evaluation_of_a_run_gives_the_record_again(whole: Outcome, demo_output: Path) -> None:
    outcome = run_script("gft_food101.py", "--demo", "--limit", "72", "--output", demo_output, "--eval", whole.folder)
    assert outcome.status == 0, outcome.err
    record = outcome.record
    assert record["status"] == "evaluated"
    assert record["excluded"]
    assert record["results"]["checkpoint"]["test"] == whole.record["results"]["best"]["test"]
    assert record["results"]["checkpoint"]["val"] == whole.record["results"]["best"]["val"]


def test_evaluation_of_a_released_file(whole: Outcome, demo_output: Path, tmp_path: Path) -> None:
    """A bare state_dict with ema_grad entries, as the released scripts save; another class count is refused."""
    state = load_file(whole.folder / "best.safetensors")
    extra = {f"hierarchical_blocks.{stage}.ema_grad": torch.zeros(3, size) for stage, size in enumerate((12, 8, 4))}
    torch.save(state | extra, tmp_path / "best_gft.pth")
    words = ("--demo", "--limit", "72", "--output", demo_output, "--eval", tmp_path / "best_gft.pth")
    outcome = run_script("gft_food101.py", *words)
    assert outcome.status == 0, outcome.err
    assert "add --released" in outcome.out
    assert outcome.record["results"]["checkpoint"]["test"] == whole.record["results"]["best"]["test"]
    released = run_script("gft_food101.py", *words, "--released")
    assert "add --released" not in released.out
    assert released.record["side"] == "released"
    state["classifier.weight"], state["classifier.bias"] = torch.zeros(7, 64), torch.zeros(7)
    torch.save(state, tmp_path / "best_gft.pth")
    refused = run_script("gft_food101.py", *words)
    assert refused.status == 1
    assert re.search(r"7 classes.* 10", one_line(refused.err))


def test_predict(whole: Outcome, demo_output: Path, tmp_path: Path) -> None:
    images = demo_output / "demo-data" / "food-101" / "images" / "three"
    one = min(images.glob("*.jpg"))
    for name in ("guesses.csv", "guesses.json"):
        outcome = run_script(
            "gft_food101.py", "--predict", images, one, "--checkpoint", whole.folder, "--top", "3",
            "--out", tmp_path / name, "--device", "cpu",
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader((tmp_path / "guesses.csv").read_text().splitlines()))
    table = json.loads((tmp_path / "guesses.json").read_text())
    assert [(row["path"], row["name"]) for row in rows] == [(row["path"], row["name"]) for row in table]
    assert len(rows) == 3 * len(list(images.glob("*.jpg")))
    best = [float(row["probability"]) for row in rows]
    assert all(a >= b >= c for a, b, c in zip(best[::3], best[1::3], best[2::3], strict=True))
    assert {row["name"] for row in rows} <= set(DIGITS)
    alone = finish(
        start(
            "-m", "common.predict", "--run", whole.folder, "--images", one, "--top", 3, "--out", tmp_path / "alone.json"
        )
    )
    assert alone.status == 0, alone.err
    for found, expected in zip(json.loads((tmp_path / "alone.json").read_text()), table, strict=False):
        assert (found["name"], found["rank"]) == (expected["name"], expected["rank"])
        assert found["probability"] == pytest.approx(expected["probability"], abs=1e-5)


def test_half_precision_without_training(whole: Outcome, demo_output: Path, tmp_path: Path) -> None:
    """--precision of --eval and --predict is that of the arithmetic, not of the record alone."""
    small = ("gft_food101.py", "--demo", "--limit", "72", "--output", demo_output, "--workers", "0")
    outcome = run_script(*small, "--eval", whole.folder, "--precision", "bf16")
    assert outcome.status == 0, outcome.err
    assert outcome.record["precision"] == "bf16"
    found, expected = (o.record["results"][name]["test"] for o, name in ((outcome, "checkpoint"), (whole, "best")))
    assert found["loss"] != expected["loss"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    image = next((demo_output / "demo-data" / "food-101" / "images" / "two").glob("*.jpg"))
    guesses = []
    for precision in ("fp32", "bf16"):
        words = ("--predict", image, "--checkpoint", whole.folder, "--out", tmp_path / "a.json")
        assert run_script(*small, *words, "--precision", precision).status == 0
        table = json.loads((tmp_path / "a.json").read_text())
        guesses.append({row["name"]: row["probability"] for row in table})
    assert guesses[0] != guesses[1]
    assert guesses[0] == pytest.approx(guesses[1], abs=0.05)


def test_export(whole: Outcome, demo_output: Path, tmp_path: Path) -> None:
    """What the file answers to the images that its description makes of pictures is what --predict says."""
    pictures = sorted((demo_output / "demo-data" / "food-101" / "images" / "two").glob("*.jpg"))[:3]
    words = ("gft_food101.py", "--demo", "--output", demo_output, "--checkpoint", whole.folder)
    outcome = run_script(*words, "--export", tmp_path / "gft.pt2")
    assert outcome.status == 0, outcome.err
    assert "largest difference of a logit from the model's: " in outcome.out
    about = json.loads((tmp_path / "gft.pt2.json").read_text(encoding="utf-8"))
    sha256 = hashlib.sha256((whole.folder / "best.safetensors").read_bytes()).hexdigest()
    assert about["weights"] == {"source": str(whole.folder), "sha256": sha256}
    transform = restore_transform(about["preprocessing"])
    images = torch.stack([transform(load_image(path)) for path in pictures])
    best = torch.export.load(tmp_path / "gft.pt2").module()(images).softmax(-1).max(-1)
    assert run_script(*words, "--predict", *pictures, "--top", "1", "--out", tmp_path / "guesses.json").status == 0
    table = json.loads((tmp_path / "guesses.json").read_text())
    assert [about["classes"][number] for number in best.indices] == [row["name"] for row in table]
    assert best.values.tolist() == pytest.approx([row["probability"] for row in table], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--export", "model.txt"), "ends in .onnx"),
        (("--export", "model.pt2", "--device", "cpu", "--precision", "bf16"), "leave --precision out"),
        (("--export", "model.pt2", "--predict", "."), "--predict and --export exclude each other"),
        (("--export", "model.pt2", "--checkpoint", "nowhere"), "nowhere does not exist"),
    ],
)
def test_exports_that_cannot_be(words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in one_line(run_script("gft_food101.py", *words).err)
    assert not list(tmp_path.glob("model*"))


def test_bare_file_predicts_with_the_data_sets_names(whole: Outcome, demo_output: Path, tmp_path: Path) -> None:
    shutil.copy(whole.folder / "best.safetensors", tmp_path / "bare.safetensors")
    image = next((demo_output / "demo-data" / "food-101" / "images" / "two").glob("*.jpg"))
    words = ("--demo", "--output", demo_output, "--predict", image, "--out", tmp_path / "guess.json")
    outcome = run_script("gft_food101.py", *words, "--checkpoint", tmp_path / "bare.safetensors")
    assert outcome.status == 0, outcome.err
    again = run_script("gft_food101.py", *words, "--checkpoint", whole.folder)
    assert again.out.splitlines()[-1] == outcome.out.splitlines()[-1]


PLAIN_VIT = ("patch_size=4", "embed_dim=32", "depth=2", "num_heads=2")  # no dropout: processes draw differently there


ODD = tuple("71" if word == "72" else word for word in SMALL)  # images that no number of processes here divides


@pytest.fixture(scope="module")
def alone(demo_output: Path) -> Outcome:
    outcome = run_script("vit_fgvcaircraft.py", *ODD, "--output", demo_output, "--model-kwargs", *PLAIN_VIT)
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (("torch.distributed.run", "--standalone", "--nproc_per_node", "2"), 2),
        (("torch.distributed.launch", "--nproc_per_node", "2", "--master_port", "29713"), 2),
        (("torch.distributed.run", "--standalone", "--nproc_per_node", "4"), 4),
    ],
)
def test_processes_train_and_evaluate_alike(
    launcher: tuple[str, ...], processes: int, alone: Outcome, demo_output: Path
) -> None:
    """The same global batches on any number of processes, and the same figures."""
    words = (*ODD, "--output", demo_output, "--model-kwargs", *PLAIN_VIT)
    outcome = finish(start("-m", *launcher, "vit_fgvcaircraft.py", *words), 180)
    assert outcome.status == 0, outcome.err
    record, expected = outcome.record, alone.record
    assert record["processes"] == processes

    def losses(folder: Path) -> list[float]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]

    assert losses(outcome.folder) == pytest.approx(losses(alone.folder), abs=1e-5)
    for which in ("last", "best"):
        found, wanted = record["results"][which]["test"], expected["results"][which]["test"]
        assert (found["total"], found["correct"]) == (71, wanted["correct"])
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_gft_on_two_processes_is_resumed_and_evaluated(demo_output: Path, tmp_path: Path) -> None:
    """Frozen parameters under DDP, a moving average a process: killed and resumed equals uninterrupted; and the
    checkpoint has the same metrics on one process."""
    words = ("gft_fgvcaircraft.py", *ODD, "--epochs", 6, "--save-every", 2)
    whole = finish(start(*TWO, *words, "--output", demo_output), 180)
    assert whole.status == 0, whole.err
    output = with_demo_data(demo_output, tmp_path)
    process = subprocess.Popen(
        [sys.executable, *map(str, (*TWO, *words, "--output", output))],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    folder = wait_for_step(output, 5, process)
    for child in subprocess.run(
        ["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if str(output) in child and "gft_fgvcaircraft.py" in child:
            os.kill(int(child.split()[0]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (folder / "record.json").exists()
    alone = run_script("gft_fgvcaircraft.py", "--demo", "--output", output, "--resume", folder)
    assert "2 processes" in one_line(alone.err)
    resumed = finish(start(*TWO, *words, "--output", output, "--resume", folder), 180)
    assert resumed.status == 0, resumed.err
    assert_same_run(folder, whole.folder)
    again = run_script(
        "gft_fgvcaircraft.py", "--demo", "--limit", "71", "--output", demo_output, "--eval", whole.folder
    )
    found, expected = again.record["results"]["checkpoint"]["test"], whole.record["results"]["best"]["test"]
    assert found == pytest.approx(expected | {"loss": pytest.approx(expected["loss"], abs=1e-6)})


def test_faults_before_training_are_told_once(tmp_path: Path) -> None:
    """Rank 0 says what is missing; the others leave without a traceback of their own."""
    words = ("vit_food101.py", "--data-root", tmp_path, "--no-download", "--weights", "none", "--workers", "0")
    outcome = finish(start(*TWO, *words, "--output", tmp_path / "out"), 120)
    assert outcome.status != 0
    assert outcome.err.count("vit_food101.py: error: ") == 1
    assert 'File "' not in outcome.err.partition("torch/distributed")[0].partition("ChildFailedError")[0]


def test_gradient_checkpointing_changes_nothing(whole: Outcome, demo_output: Path) -> None:
    outcome = run_script("gft_food101.py", *SMALL, "--output", demo_output, "--grad-checkpointing")
    assert outcome.status == 0, outcome.err
    expected = last_state(whole.folder)["model"]
    for name, value in last_state(outcome.folder)["model"].items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    refused = run_script("resnet18_Food101.py", *SMALL, "--output", demo_output, "--grad-checkpointing")
    assert "BatchNorm" in one_line(refused.err)


def test_steps_instead_of_epochs(demo_output: Path, tmp_path: Path) -> None:
    """A recipe may count optimizer steps and evaluate between epochs, as FFVT's does."""
    text = (ROOT / "vit_food101.py").read_text(encoding="utf-8")
    text = text.replace("    epochs: int = 30", "    steps: int = 7\n    evaluate_every: int = 3\n    epochs: int = 30")
    (tmp_path / "stepwise.py").write_text(text)
    words = ("--demo", "--limit", "72", "--batch-size", "16", "--workers", "0", "--output", demo_output)
    outcome = finish(start(tmp_path / "stepwise.py", *words, "--model-kwargs", *PLAIN_VIT))
    assert outcome.status == 0, outcome.err
    state = last_state(outcome.folder)
    assert state["step"] == 7
    assert [entry["step"] for entry in state["history"]] == [3, 6, 7]


def test_batch_that_the_processes_cannot_divide(demo_output: Path) -> None:
    words = ("vit_fgvcaircraft.py", *SMALL, "--output", demo_output, "--accumulate", 5)
    outcome = finish(start(*words))
    assert outcome.status == 1
    assert "--batch-size: the batch of 16" in one_line(outcome.err)


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("--lrr", "3"), 2, "did you mean --lr"),
        (("--epochs", "many"), 2, "--epochs"),
        (("--precision", "fp8"), 2, "fp8"),
        (("--data-root", "nowhere", "--no-download"), 1, r"food-101.*nowhere|nowhere.*food-101"),
        (("--weights", "missing.npz"), 1, r"missing\.npz"),
        (("--eval", "missing"), 1, "missing"),
        (("--eval", "a", "--resume"), 1, "--resume and --eval"),
        (("--predict", "missing.jpg"), 1, r"missing\.jpg"),
        (("--predict", "x.jpg", "--out", "x.txt"), 1, r"\.csv or \.json"),
        (("--device", "cuda:7"), 1, "cuda:7"),
        (("--device", "quantum"), 1, "quantum"),
        (("--limit", "0"), 1, "--limit"),
        (("--amp-backend", "apex"), 1, "apex"),
        (("--resume",), 1, "gft_food101"),
        (("--model", "vit_unheard_of"), 1, "vit_unheard_of"),
        (("--model", "resnet18"), 1, "resnet18"),
        (("--img-size", "17"), 1, "17"),
        (("--batch-size", "0"), 1, "--batch-size"),
        (("--epochs", "0"), 1, "--epochs"),
        (("--lr", "-1"), 1, "--lr"),
        (("--workers", "-1"), 1, "--workers"),
        (("--lr", "nan"), 1, "--lr nan: expected more than 0"),
        (("--lr", "inf"), 1, "--lr inf: expected more than 0"),
        (("--batch-size", "9" * 400), 1, r"--batch-size <an integer of 1329 bits>: expected less than 2\^63"),
        (("--t-max", "0"), 1, "--t-max"),
        (("--img-size", "0"), 1, "--img-size"),
        (("--model-kwargs", "odd=3"), 1, "odd"),
    ],
)
def test_bad_input_gives_one_sentence(
    words: tuple[str, ...],
    status: int,
    sentence: str,
    demo_output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "out"
    given = dict(zip(words[::2], words[1::2], strict=False))
    data = () if "--data-root" in given else ("--data-root", demo_output / "demo-data")
    weights = () if "--weights" in given else ("--weights", "none")
    outcome = run_script("gft_food101.py", "--output", output, "--workers", "0", *data, *weights, *words)
    assert outcome.status == status
    assert re.search(sentence, one_line(outcome.err)), outcome.err
    assert list(tmp_path.rglob("*")) == []  # nothing half-written


def test_weights_that_cannot_be_downloaded(demo_output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published weights without a network: one sentence with the tag, the cache folder and the way out."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    outcome = run_script("gft_food101.py", "--output", tmp_path / "out", "--data-root", demo_output / "demo-data")
    assert outcome.status == 1
    line = one_line(outcome.err)
    for part in ("vit_base_patch16_224.augreg2_in21k_ft_in1k", str(tmp_path / "cache"), "--weights FILE"):
        assert part in line
    assert not (tmp_path / "out").exists()


def test_pretrained_weights_from_the_cache(demo_output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published way to start, with a file of random weights where the hub's client keeps its downloads."""
    import huggingface_hub.constants
    import timm
    from safetensors.torch import save_file

    from common.weights import sha256_of

    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model(name, pretrained=False)  # 1000 classes, as the real file has
    cache = tmp_path / "hub" / f"models--timm--{name}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    file = cache / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(model.state_dict(), file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    outcome = run_script(
        "vit_food101.py", "--output", tmp_path / "out", "--data-root", demo_output / "demo-data", "--model", name,
        "--limit", "2", "--batch-size", "2", "--lr", "1e-30", "--weight-decay", "0", "--epochs", "1", "--workers", "0",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert outcome.record["weights"] == {"source": f"timm/{name}", "sha256": sha256_of(file)}
    trained = load_file(outcome.folder / "best.safetensors")
    assert trained["head.weight"].shape == (10, 192)
    for key, value in model.state_dict().items():  # the rate is too small to move them
        if not key.startswith("head."):
            torch.testing.assert_close(trained[key], value)


def test_output_that_cannot_be_written(demo_output: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = run_script(
        "vit_food101.py", "--output", tmp_path / "file", "--data-root", demo_output / "demo-data", "--weights", "none",
        "--workers", "0", "--img-size", "16", "--model-kwargs", *PLAIN_VIT,
    )  # fmt: skip
    assert outcome.status == 1
    assert "--output" in one_line(outcome.err)


def test_full_disk_while_saving(demo_output: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the run ends in one sentence that names the file."""
    output = with_demo_data(demo_output, tmp_path)
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    outcome = finish(start("-c", code, "gft_food101.py", *SMALL, "--output", output))
    assert outcome.status == 1
    assert "last.pt" in one_line(outcome.err)
    (folder,) = (path for path in output.iterdir() if path.name != "demo-data")
    assert not list(folder.glob("*/.*.tmp"))


def test_out_of_gpu_memory_names_the_flags(demo_output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from common.engine import Trainer

    def run(self: Trainer) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "run", run)
    outcome = run_script("gft_food101.py", *SMALL, "--output", demo_output)
    assert outcome.status == 1
    line = one_line(outcome.err)
    for part in ("16 images", "--accumulate 2", "--eval-batch-size", "--precision", "--grad-checkpointing"):
        assert part in line


def test_a_truncated_image_is_named(demo_output: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_output / "demo-data" / "food-101", tmp_path / "food-101")
    victim = min((tmp_path / "food-101" / "images" / "five").glob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:300])
    words = ("resnet18_Food101.py", "--data-root", tmp_path, "--weights", "none", "--img-size", "32", "--epochs", "1")
    words += ("--model-kwargs", "channels=(8,8,8,8)", "--workers", "1", "--output", tmp_path / "out")
    outcome = run_script(*words)
    assert outcome.status == 1
    assert str(victim) in one_line(outcome.err)
    tolerant = run_script(*words, "--skip-bad-images", "1")
    assert tolerant.status == 0, tolerant.err
    assert [str(victim) in why for why in tolerant.record["skipped_images"]] == [True]
