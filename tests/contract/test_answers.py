"""What a trained model answers is what its record says: evaluated, asked for predictions, exported, trained again.

All of it is asked of the reference run, in another folder. Where something is computed in another way, in batches of
another size or by another program, logits differ by rounding, some 1e-6; those that counts depend on are 3e-4 apart
here, so that counts are compared exactly.
"""

import csv
import functools
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torchvision import transforms as T

from contract.programs import (
    METHOD,
    PROGRAMS,
    Outcome,
    Reference,
    assert_same,
    new_home,
    reference,
    run,
    run_folder,
    state_of,
    written,
)

IMAGES = 48  # of each split
EACH = pytest.mark.parametrize("name", PROGRAMS)
WITHOUT_BATCH_NORM = [name for name in PROGRAMS if name != "densenet"]
# What a bare file of weights does not say.
BARE = {"ffvt": ("--dataset", "CUB", "--feature_fusion"), "glsim": ("--cfg_method", METHOD)}
# The models of the demo, on data that are named; with its number of steps and what those have no flag for.
NAMED = {
    "gft": (
        "--img-size",
        "16",
        "--epochs",
        "1",
        "--model-kwargs",
        "patch_size=4",
        "embed_dim=64",
        "depth=9",
        "num_heads=4",
    ),
    "densenet": ("--img-size", "32", "--epochs", "1", "--model-kwargs", "growth_rate=8", "block_config=(2,2,2,2)"),
    "ffvt": (
        *("--name=k", *BARE["ffvt"], "--img_size", "16", "--resize_size", "16", "--num_token", "4", "--num_steps", "1"),
        *("--model_kwargs", "hidden_size=64", "mlp_dim=128", "num_heads=4", "num_layers=4", "patch_size=4"),
    ),
    "glsim": (
        *(*BARE["glsim"], "--image_size", "16", "--resize_size", "16", "--test_resize_size", "16", "--epochs", "1"),
        *(
            "--hidden_size",
            "64",
            "--intermediate_size",
            "128",
            "--num_attention_heads",
            "4",
            "--num_hidden_layers",
            "4",
        ),
        *("--dynamic_top", "4", "--anchor_class_token", "--model_kwargs", "patch_size=4"),
    ),
}
# Flags of the scripts, as the other two programs spell them; they have _ for -.
SPELLED = {
    "ffvt": {"--lr": "--learning_rate", "--weights": "--pretrained_dir"},
    "glsim": {
        **{"--eval-batch-size": "--batch_size", "--workers": "--cpu_workers", "--log-every": "--log_freq"},
        **{"--data-root": "--dataset_root_path", "--weights": "--ckpt_path"},
    },
}


def slow_but(*quick: str) -> Any:
    """All programs, of which `make test` runs these. gft and densenet have one main."""
    marks = {name: () if name in quick else pytest.mark.slow for name in PROGRAMS}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


def flag(name: str, script: str) -> str:
    return SPELLED.get(name, {}).get(script) or (script if name not in SPELLED else "--" + script[2:].replace("-", "_"))


def asked(name: str, home: Path, *words: str | Path) -> Outcome:
    """The program without training, on the images of the reference run."""
    return run([PROGRAMS[name].file, *PROGRAMS[name].other("--limit", str(IMAGES), *words)], home)


def record_of(home: Path) -> dict[str, Any]:
    return json.loads((run_folder(home) / "record.json").read_text(encoding="utf-8"))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def counts(metrics: dict[str, Any]) -> list[int]:
    return [metrics[name] for name in ("total", "correct", "top5_correct")]


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Records


@EACH
def test_a_record_says_what_was_run(name: str) -> None:
    """DESIGN, Numbers: counts, recipe, seed, data, weights, versions, device, precision, selection, speed, memory."""
    run_of, record = reference(name), reference(name).record
    given = dict(zip(PROGRAMS[name].run[::2], PROGRAMS[name].run[1::2], strict=False))
    assert record["seed"] == record["recipe"]["seed"] == record["overrides"]["seed"]
    assert str(record["seed"]) == (given.get("--seed") or PROGRAMS[name].run[-1])
    assert record["overrides"].items() <= record["recipe"].items()
    assert record["weights"] == {"source": "none", "sha256": None}
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"].keys() >= {"python", "timm", "torchvision"}
    assert record["device"].startswith("cpu")
    assert (record["precision"], record["processes"], record["excluded"]) == ("fp32", 1, ["demo"])
    data = record["data"]
    assert all((data[split]["count"], data[split]["classes"]) == (IMAGES, 10) for split in ("train", "val", "test"))
    tested = record["selection"]["kind"] == "test-selected"
    assert tested == (name in ("ffvt", "glsim"))
    assert len({data[split]["sha256"] for split in ("train", "val", "test")}) == (2 if tested else 3)
    assert record["selection"]["split"] == data["val"]["split"]
    history = [line for line in run_of.written[f"runs/{run_of.folder.parent.name}/RUN/log.jsonl"] if "top1" in line]
    last, best = record["results"]["last"], record["results"]["best"]
    assert (last["step"], last["epoch"]) == (9, 3)
    assert [entry["step"] for entry in state_of(run_of.folder)["history"]] == [line["step"] for line in history]
    chosen = max(history, key=lambda line: (line["correct"], -line["step"]))  # the earliest of equals
    assert (best["step"], best["epoch"]) == (chosen["step"], chosen["epoch"])
    for entry, line in ((last, history[-1]), (best, chosen)):
        assert {**entry["val"], "split": ""} == {key: line[key] for key in entry["val"] if key != "split"} | {
            "split": ""
        }
        for metrics in (entry["val"], entry["test"]):
            assert [type(number) for number in counts(metrics)] == [int] * 3
            assert metrics["top1"] == metrics["correct"] / metrics["total"]
            assert metrics["total"] == IMAGES
    assert 0 < record["speed"]["train_images_per_s"] < 1e6
    assert 5e7 < record["peak_memory_bytes"] < 1e11
    assert 0 < record["wall_seconds"] < 1000
    assert record["started"] <= record["finished"]


# Evaluation


def assert_as_recorded(name: str, home: Path, file: Path, loss: float = 1e-6) -> None:
    """A loss of 2.3 is within 2e-7 in float32, and the mean of 48 is taken in float64."""
    expected, record = reference(name).record["results"]["best"], record_of(home)
    for split in ("val", "test"):
        found = record["results"]["checkpoint"].get(split, expected[split])
        assert counts(found) == counts(expected[split])
        assert found["loss"] == pytest.approx(expected[split]["loss"], rel=0, abs=loss)
    assert record["status"] == "evaluated"
    assert record["data"]["test"] == reference(name).record["data"]["test"]
    assert record["weights"]["sha256"] == sha256_of(file)


@EACH
def test_evaluation_gives_the_record_again(name: str, tmp_path: Path) -> None:
    home, folder = new_home(tmp_path / "home", name), reference(name).folder
    asked(name, home, "--eval", folder).done()
    assert_as_recorded(name, home, folder / "best.safetensors")
    for table in ("per_class", "confusion"):
        (found,) = run_folder(home).glob(f"*_{table}.csv")
        assert found.read_bytes() == (folder / f"best_{table}.csv").read_bytes()


@EACH
def test_evaluation_of_a_bare_file_in_other_batches(name: str, tmp_path: Path) -> None:
    home, file = new_home(tmp_path / "home", name), tmp_path / "weights.safetensors"
    shutil.copy(reference(name).folder / "best.safetensors", file)
    asked(name, home, "--eval", file, *BARE.get(name, ()), flag(name, "--eval-batch-size"), "5").done()
    assert_as_recorded(name, home, file, 1e-5)  # matrices of other sizes are multiplied in another order


@pytest.mark.parametrize("name", ["ffvt", "glsim"])
def test_evaluation_of_the_published_checkpoint(name: str, tmp_path: Path) -> None:
    """Under the authors' names; what GLSim's says of itself is in it."""
    home, file = new_home(tmp_path / "home", name), reference(name).home / PROGRAMS[name].published[0]
    words = ("--eval", file, *BARE["ffvt"]) if name == "ffvt" else ("--ckpt_path", file, "--test_only")
    asked(name, home, *words).done()
    assert_as_recorded(name, home, file)


@slow_but("gft")
def test_bfloat16_changes_little(name: str, tmp_path: Path) -> None:
    """It has 8 bits: logits of about 1 move by some 0.01."""
    home = new_home(tmp_path / "home", name)
    asked(name, home, "--eval", reference(name).folder, "--precision", "bf16").done()
    record, expected = record_of(home), reference(name).record["results"]["best"]["test"]["loss"]
    assert record["precision"] == "bf16"
    assert 1e-6 < abs(record["results"]["checkpoint"]["test"]["loss"] - expected) < 0.05


# Prediction


@functools.cache
def test_images(name: str) -> list[tuple[Path, str]]:
    """The images of the test split, and the names of their classes, as the data set's own lists have them."""
    data = reference(name).home / "runs" / "demo-data"
    if name in ("gft", "densenet"):
        lines = (data / "food-101" / "meta" / "test.txt").read_text(encoding="utf-8").splitlines()
        files = [data / "food-101" / "images" / f"{line}.jpg" for line in lines]
    elif name == "ffvt":
        paths, parts = (
            dict(line.split() for line in (data / "CUB" / f"{file}.txt").read_text(encoding="utf-8").splitlines())
            for file in ("images", "train_test_split")
        )
        files = [data / "CUB" / "images" / path for number, path in paths.items() if parts[number] == "0"]
    else:
        files = [data / "CUB" / "images" / row["dir"] for row in rows_of(data / "CUB" / "test.csv")]
    return [(file, file.parent.name) for file in files[:IMAGES]]


test_images.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def guesses(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All guesses for the test images of a program, best first, by image; asked for once."""

    @functools.cache
    def of(name: str) -> dict[str, list[dict[str, str]]]:
        home = new_home(tmp_path_factory.mktemp(name) / "home", name)
        images = [str(path) for path, _ in test_images(name)]
        words = ("--checkpoint", reference(name).folder, "--top", "10", "--out", "guesses.csv")
        asked(name, home, *words, "--predict", *images, images[3]).done()  # twice the same: answered once
        found: dict[str, list[dict[str, str]]] = {}
        for row in rows_of(home / "guesses.csv"):
            found.setdefault(row["path"], []).append(row)
        assert list(found) == images
        for rows in found.values():
            assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 11)]
        return found

    return of


@EACH
def test_predictions_are_what_the_record_counts(name: str, guesses: Any) -> None:
    """The counts, the loss, the tables, and precision, recall and F1, computed again by scikit-learn."""
    expected, folder = reference(name).record["results"]["best"]["test"], reference(name).folder
    truth = [label for _, label in test_images(name)]
    names = [[row["name"] for row in rows] for rows in guesses(name).values()]
    first = [ranked[0] for ranked in names]
    hits = [ranked.index(label) for ranked, label in zip(names, truth, strict=True)]
    assert [len(hits), hits.count(0), sum(hit < 5 for hit in hits)] == counts(expected)
    shares = [float(rows[hit]["probability"]) for rows, hit in zip(guesses(name).values(), hits, strict=True)]
    assert -sum(map(math.log, shares)) / IMAGES == pytest.approx(expected["loss"], rel=0, abs=1e-5)

    classes = [row["name"] for row in rows_of(folder / "best_per_class.csv")]
    numbered = {row["name"]: row["class"] for rows in guesses(name).values() for row in rows}
    assert [numbered[title] for title in classes] == [str(number) for number in range(10)]
    matrix = confusion_matrix(truth, first, labels=classes)
    assert [list(row.values()) for row in rows_of(folder / "best_confusion.csv")] == [
        [title, *map(str, row)] for title, row in zip(classes, matrix.tolist(), strict=True)
    ]
    for number, row in enumerate(rows_of(folder / "best_per_class.csv")):
        assert (row["correct"], row["total"]) == (str(matrix[number, number]), str(matrix[number].sum()))
    for average in ("weighted", "macro"):
        figures = precision_recall_fscore_support(truth, first, labels=classes, average=average, zero_division=0)
        for kind, figure in zip(("precision", "recall", "f1"), figures, strict=False):
            assert expected[f"{kind}_{average}"] == pytest.approx(figure, rel=0, abs=1e-12)


@slow_but("gft", "ffvt", "glsim")
def test_a_table_as_json_has_the_same_guesses(name: str, guesses: Any, tmp_path: Path) -> None:
    """The best three of all images in a folder, and of one that is named beside it."""
    home, (one, _) = new_home(tmp_path / "home", name), test_images(name)[0]
    (tmp_path / "some").mkdir()
    for number in (2, 1):
        shutil.copy(test_images(name)[number][0], tmp_path / "some" / f"{number}.jpg")
    words = ("--checkpoint", reference(name).folder, "--top", "3", "--out", "guesses.json")
    asked(name, home, *words, "--predict", tmp_path / "some", one).done()
    found = json.loads((home / "guesses.json").read_text(encoding="utf-8"))
    paths = [tmp_path / "some" / "1.jpg", tmp_path / "some" / "2.jpg", one]
    assert [row["path"] for row in found] == [str(path) for path in paths for _ in range(3)]
    known = list(guesses(name).values())
    for row, like in zip(found, [*known[1][:3], *known[2][:3], *known[0][:3]], strict=True):
        assert (str(row["rank"]), str(row["class"]), row["name"]) == (like["rank"], like["class"], like["name"])
        # Three images or 48 at a time: matrices of another size.
        assert row["probability"] == pytest.approx(float(like["probability"]), rel=0, abs=1e-5)


# Export


def prepared(path: Path, steps: list[dict[str, Any]]) -> torch.Tensor:
    """The image as the description beside an exported file says."""
    kinds = {"Resize": T.Resize, "CenterCrop": T.CenterCrop, "ToTensor": T.ToTensor, "Normalize": T.Normalize}
    made = []
    for step in steps:
        arguments = {key: value for key, value in step.items() if key != "name"}
        if "interpolation" in arguments:
            arguments["interpolation"] = T.InterpolationMode(arguments["interpolation"])
        made.append(kinds[step["name"]](**arguments))
    with Image.open(path) as image:
        return T.Compose(made)(image.convert("RGB"))


EXPORTS = [(name, suffix) for suffix in ("pt2", "onnx") for name in PROGRAMS]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [pytest.param(*case, marks=() if case == ("ffvt", "pt2") else pytest.mark.slow) for case in EXPORTS],
)
def test_an_exported_file_answers_as_predict_does(name: str, suffix: str, guesses: Any, tmp_path: Path) -> None:
    """Within 1e-5: another program multiplies and adds in another order."""
    home, file = new_home(tmp_path / "home", name), tmp_path / f"model.{suffix}"
    asked(name, home, "--export", file, "--checkpoint", reference(name).folder).done()
    about = json.loads(Path(f"{file}.json").read_text(encoding="utf-8"))
    assert about["weights"]["sha256"] == sha256_of(reference(name).folder / "best.safetensors")
    images = torch.stack([prepared(path, about["preprocessing"]) for path, _ in test_images(name)])
    if suffix == "pt2":
        logits = torch.export.load(file).module()(images)
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {about["input"]["name"]: images.numpy()})[0])
    for shares, rows in zip(logits.softmax(-1).tolist(), guesses(name).values(), strict=True):
        expected = {row["name"]: float(row["probability"]) for row in rows}
        assert dict(zip(about["classes"], shares, strict=True)) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.slow
def test_glsim_inference_names_the_same_classes(guesses: Any, tmp_path: Path) -> None:
    """Of the run's folder and of the published file."""
    known = reference("glsim")
    for checkpoint in (known.folder, known.home / PROGRAMS["glsim"].published[0]):
        (home := tmp_path / checkpoint.name).mkdir()
        (home / "some").mkdir()
        for number in range(3):
            shutil.copy(test_images("glsim")[number][0], home / "some" / f"{number}.jpg")
        words = ("--ckpt_path", checkpoint, "--images_path", "some", "--cpu_workers", "0", "--top", "3")
        run(["glsim/tools/inference.py", *map(str, words)], home).done()
        text = "".join(path.read_text(encoding="utf-8") for path in home.rglob("*.csv"))
        for rows in list(guesses("glsim").values())[:3]:
            for row in rows[:3]:
                assert row["name"] in text


# Training again


def trained(name: str, home: Path, *more: str | Path) -> Outcome:
    return run([PROGRAMS[name].file, *PROGRAMS[name].start(*more)], home)


def assert_same_training(home: Path, like: Reference) -> None:
    """Weights bit for bit, and every count."""
    states, records = (state_of(run_folder(home)), state_of(like.folder)), (record_of(home), like.record)
    assert_same(states[0]["model"], states[1]["model"])
    for one, other in zip(states[0]["history"], states[1]["history"], strict=True):
        assert (one["step"], counts(one["val"])) == (other["step"], counts(other["val"]))
    for which in ("last", "best"):
        one, other = (record["results"][which]["test"] for record in records)
        assert counts(one) == counts(other)
    best = [path for path in like.written if path.endswith("best.safetensors")]
    assert_same(written(home)[best[0]], like.written[best[0]])


@EACH
def test_how_it_reports_does_not_matter(name: str, tmp_path: Path) -> None:
    """Nor who reads the images: two data workers, few lines, no saves between evaluations, small evaluation batches."""
    home = new_home(tmp_path / "home", name)
    words = {"--workers": "2", "--log-every": "4", "--save-every": "100"}
    if name != "glsim":  # whose evaluation batch is that of training
        words["--eval-batch-size"] = "7"
    trained(name, home, *(word for pair in words.items() for word in (flag(name, pair[0]), pair[1]))).done()
    assert_same_training(home, reference(name))


@slow_but("glsim")
def test_data_workers_change_nothing(name: str, tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", name, earlier=True)
    trained(name, home, flag(name, "--workers"), "2").done()
    assert_same(written(home), reference(name).written)


@slow_but("ffvt")
def test_deterministic_twice(name: str, tmp_path: Path) -> None:
    one, other = (new_home(tmp_path / number, name) for number in ("1", "2"))
    for home in (one, other):
        trained(name, home, "--deterministic").done()
    assert_same(written(one), written(other))


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_gradient_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    """Dropout is drawn again as it was. Weights of about 1 after nine updates, recomputed by the same operations."""
    home = new_home(tmp_path / "home", name)
    trained(name, home, flag(name, "--grad-checkpointing")).done()
    found = state_of(run_folder(home))["model"]
    for key, value in state_of(reference(name).folder)["model"].items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def test_gradient_checkpointing_is_refused_with_batch_norm(tmp_path: Path) -> None:
    """It would count every batch twice in the running statistics."""
    home = new_home(tmp_path / "home", "densenet")
    trained("densenet", home, "--grad-checkpointing").sentence("--grad-checkpointing")
    assert not list((home / "runs").glob("densenet*"))


def on_named_data(name: str, home: Path, data: Path, weights: Path) -> Outcome:
    """Training without --demo."""
    root = data / "CUB" if name == "glsim" else data
    words = [flag(name, "--data-root"), root, flag(name, "--weights"), weights, "--no-download", "--output", "runs"]
    more = ("--transfer_learning",) if name == "glsim" else ()
    return run(
        [PROGRAMS[name].file, *NAMED[name], *map(str, words), *more, "--limit", str(IMAGES), *READER[name]], home
    )


READER = {name: (flag(name, "--workers"), "0") for name in PROGRAMS}


@slow_but("gft", "ffvt", "glsim")
def test_starting_weights_are_named_with_their_digest(name: str, tmp_path: Path) -> None:
    home, file = new_home(tmp_path / "home", name), tmp_path / "start.safetensors"
    shutil.copy(reference(name).folder / "best.safetensors", file)
    on_named_data(name, home, home / "runs" / "demo-data", file).done()
    record = record_of(home)
    assert record["weights"]["source"].endswith(file.name)
    assert record["weights"]["sha256"] == sha256_of(file)
    assert record["data"]["test"] == reference(name).record["data"]["test"]


# Training that cannot go on


@slow_but("densenet", "ffvt", "glsim")
def test_a_learning_rate_at_which_all_overflows(name: str, tmp_path: Path) -> None:
    """One sentence, no record, and nothing that is not finite in what was saved."""
    home = new_home(tmp_path / "home", name)
    warm = {"ffvt": ("--warmup_steps", "1"), "glsim": ("--warmup_steps", "1", "--warmup_lr", "1e38")}.get(name, ())
    rate = "1e38" if warm else "1e30"  # AdamW multiplies it, and would itself make the weights infinite
    trained(name, home, flag(name, "--lr"), rate, *warm).sentence()
    folder = run_folder(home)
    assert not (folder / "record.json").exists()
    for path, content in written(home).items():
        if path.endswith(("last.pt", ".safetensors", ".bin", ".pth")):
            assert all(value.isfinite().all() for value in tensors_of(content)), path


def tensors_of(content: Any) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@slow_but("gft", "ffvt", "glsim")
def test_a_truncated_image_is_named(name: str, tmp_path: Path) -> None:
    """Every image of a class has lost its last bytes; training meets one. With --demo they would be written anew."""
    home, data = tmp_path / "home", tmp_path / "data"
    home.mkdir()
    shutil.copytree(reference(name).home / "runs" / "demo-data", data)
    victims = [path for path in data.rglob("*.jpg") if path.parent.name.endswith("eight")]
    for path in victims:
        path.write_bytes(path.read_bytes()[:-60])
    weights = reference(name).folder / "best.safetensors"
    sentence = on_named_data(name, home, data, weights).sentence("eight")
    assert any(str(path) in sentence for path in victims), sentence
    assert not list(home.rglob("record.json"))
