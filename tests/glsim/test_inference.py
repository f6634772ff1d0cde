"""glsim/tools/inference.py: classes, pictures, lists and folders, the demo, and refusals."""

import csv
import os
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formula import fill, pil_image
from PIL import Image

from common.data import write_demo
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.tools import heatmap, inference
from glsim.train_utils.settings import Settings
from glsim.train_utils.trained import Trained, load_trained

ROOT = Path(__file__).parents[2]
SMALL = {
    **{"model_name": "vit_b16", "image_size": 64, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2},
    **{"intermediate_size": 128, "dynamic_anchor": True, "dynamic_top": 3, "anchor_class_token": True},
    **{"reducer": "cls", "aggregator": True, "aggregator_norm": True},
}
CLASSES = ["ant", "bee", "cat", "dog"]


def write_checkpoint(path: Path, dataset_name: str = "moe", **changes: Any) -> Path:
    """A checkpoint as the authors', small, with class names as ours have."""
    values = {**SMALL, **changes}
    model = ViTGLSim(ViTConfig(num_classes=len(CLASSES), **values))
    state = {f"model.{key}": fill(key, tensor.shape) for key, tensor in model.released_state_dict().items()}
    config = Namespace(dataset_name=dataset_name, fp16=True, num_classes=len(CLASSES), **values)
    torch.save({"config": config, "classes": CLASSES, "epoch": 1, "accuracy": 50.0, "model": state}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ckpts") / "small.pth")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs write where they are started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    pil_image().save(path)
    return path


def run(*words: object) -> None:
    inference.main([*map(str, words), "--device", "cpu"])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def seen_by(trained: Trained, photo: Path) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """What the model sees (moe is normalised by 0.5), its crop, and the probabilities."""
    inputs = trained.transform(Image.open(photo).convert("RGB"))[None]
    with torch.no_grad():
        logits, crops = trained.model(inputs)
    pictures = [((x[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy() for x in (inputs, crops)]
    return pictures[0], pictures[1], logits[0].softmax(-1)


def test_an_image(checkpoint: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = load_trained(checkpoint, torch.device("cpu"))
    image, crop, probabilities = seen_by(trained, photo)
    run("--ckpt_path", checkpoint, "--images_path", photo)
    picture = read(Path("results_inference/vit_b16_16/photo.png")).astype(float)
    assert picture.shape == (64, 129, 3)
    np.testing.assert_allclose(picture[:, :64], image, atol=0)
    np.testing.assert_allclose(picture[:, 65:], crop, atol=0)
    assert np.abs(image - crop).mean() > 1
    best = probabilities.argsort(descending=True)[:3].tolist()
    line = f"{photo}: " + ", ".join(f"{CLASSES[i]} {float(probabilities[i]):.1%}" for i in best)
    assert line in capsys.readouterr().out.splitlines()
    with open("results_inference/vit_b16_16/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [CLASSES[i] for i in best]
    assert [int(row["class"]) for row in rows] == best
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert {row["path"] for row in rows} == {str(photo)}
    np.testing.assert_allclose([float(row["probability"]) for row in rows], probabilities[best], rtol=1e-5)


def test_masks(checkpoint: Path, photo: Path) -> None:
    run("--ckpt_path", checkpoint, "--images_path", photo, "--vis_mask_sq", "--vis_mask", "glsim_norm")
    folder = Path("results_inference/vit_b16_16")
    names = {"photo.png", "photo_glsim_norm.png", "photo_similarity.png", "predictions.csv"}
    assert {path.name for path in folder.iterdir()} == names
    trained = load_trained(checkpoint, torch.device("cpu"))
    image, _, _ = seen_by(trained, photo)
    evidence = heatmap.gather(trained.model, trained.transform(Image.open(photo))[None])
    mask = heatmap.make_mask(evidence, "glsim_norm")[0].view(4, 4).numpy()
    drawn = heatmap.overlay(image.astype(np.uint8), mask)
    np.testing.assert_array_equal(read(folder / "photo_glsim_norm.png"), drawn)
    np.testing.assert_array_equal(read(folder / "photo_similarity.png"), heatmap.squares(drawn, mask))

    changes = {
        ("--vis_mask_pow",): {"power": True},
        ("--vis_mask_top", 2): {"top": 2},
        ("--vis_mask_color",): {"color": False},  # as published, the flag turns it off
        ("--no-vis_mask_color",): {"color": False},
        ("--vis_mask_color", "--released"): {"color": False, "released": True},
    }
    for words, options in changes.items():
        run("--ckpt_path", checkpoint, "--images_path", photo, "--vis_mask", "glsim_norm", *words)
        expected = heatmap.overlay(image.astype(np.uint8), mask, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(read(folder / "photo_glsim_norm.png"), expected)
        assert (expected != drawn).any()


def test_released_masks_are_asked_for(checkpoint: Path, photo: Path) -> None:
    path = Path("results_inference/vit_b16_16/photo_attention.png")
    words = ("--ckpt_path", checkpoint, "--images_path", photo, "--vis_mask", "attention")
    run(*words)
    ours = read(path)
    run(*words, "--released")
    assert (read(path) != ours).any()


def test_all_masks_and_captions(checkpoint: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[tuple[Any, ...]] = []
    draw = heatmap.draw
    monkeypatch.setattr(heatmap, "draw", lambda *given: figures.append(given) or draw(*given))
    words = ("--ckpt_path", checkpoint, "--images_path", photo, "--vis_mask", "psm_1")
    run(*words, "--vis_mask_all")
    [(panels, columns, title)] = figures
    assert [caption for caption, _ in panels] == ["image", "crop", *heatmap.MASKS]
    assert columns == 4
    assert [line.split()[0] in CLASSES for line in title.splitlines()] == [True] * 3
    assert read(Path("results_inference/vit_b16_16/photo_masks.png")).shape[1] > 1000
    for words_off in ("--save_crops_only", "--no-save_crops_only"):
        figures.clear()
        run(*words, words_off, "--results_dir", "elsewhere")
        [(panels, _, _)] = figures
        assert [caption for caption, _ in panels] == ["image", "crop", "psm_1"]
        assert read(Path("elsewhere/vit_b16_16/photo.png")).shape[1] > 500


def test_a_folder_and_what_is_below_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "a.png", "birds/a.jpg", "birds/small/b.webp"):
        path = Path("samples") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pil_image().save(path)
    Path("samples/birds/broken.jpg").write_bytes(b"no image")
    Path("samples/notes.txt").write_text("not looked at")
    with pytest.raises(SystemExit, match=r"^inference.py: 1 of 5 images could not be read: see above$") as left:
        run("--ckpt_path", checkpoint, "--images_path", "samples/", "--batch_size", 2, "--top", 9)
    assert left.value.code != 0
    assert capsys.readouterr().err == (
        "samples/birds/broken.jpg: not readable as an image, "
        "its content is of none of the formats BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP\n"
    )
    folder = Path("results_inference/vit_b16_16")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert found == {"a.jpg.png", "a.png.png", "birds/a.png", "birds/small/b.png"}
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(CLASSES)  # all classes there are
    assert [row["path"] for row in rows[:: len(CLASSES)]] == [
        *("samples/a.jpg", "samples/a.png", "samples/birds/a.jpg", "samples/birds/small/b.webp")
    ]


def test_helpers_change_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by processes and written by threads: the same in the same order, and a picture for each image."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    Path("samples").mkdir()
    for number in range(7):
        pil_image(60 + 10 * number).save(f"samples/{number}.png")
    Path("samples/3.png").write_bytes(b"no image")
    said, pictures, asked = {}, {}, []
    batches, write = inference.evaluation_batches, inference._write
    threads = set()
    monkeypatch.setattr(inference, "evaluation_batches", lambda *given: asked.append(given[1:5]) or batches(*given))
    monkeypatch.setattr(inference, "_write", lambda *given: threads.add(threading.get_ident()) or write(*given))
    for helpers in (0, 2):
        threads.clear()
        words = ("--images_path", "samples", "--batch_size", 2, "--cpu_workers", helpers, "--results_dir", helpers)
        with pytest.raises(SystemExit, match="1 of 7 images could not be read"):
            run("--ckpt_path", checkpoint, *words)
        assert asked.pop() == (2, 0, 1, helpers)
        assert (threading.get_ident() in threads) == (helpers == 0)
        said[helpers] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("samples")]
        pictures[helpers] = {path.name: read(path) for path in Path(str(helpers)).rglob("*.png")}
    assert said[0] == said[2]
    assert pictures[0].keys() == pictures[2].keys() == {f"{number}.png" for number in (0, 1, 2, 4, 5, 6)}
    assert all((picture == pictures[2][name]).all() for name, picture in pictures[0].items())


def test_what_a_thread_cannot_write_is_one_sentence(checkpoint: Path) -> None:
    Path("samples").mkdir()
    for number in range(3):
        pil_image().save(f"samples/{number}.png")
    Path("results/vit_b16_16/1.png").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^inference.py: error: results/vit_b16_16/1.png could not be written"):
        run("--ckpt_path", checkpoint, "--images_path", "samples", "--batch_size", 2, "--results_dir", "results")


def test_workers_without_shared_memory_are_a_sentence(
    checkpoint: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(inference, "evaluation_batches", fail)
    with pytest.raises(SystemExit, match=r"was lost \(unable to allocate shared.*processes, --cpu_workers 0$"):
        run("--ckpt_path", checkpoint, "--images_path", photo)


def test_half_precision(checkpoint: Path, photo: Path) -> None:
    said = []
    for precision in ("fp32", "bf16"):
        words = ("--precision", precision, "--top", len(CLASSES), "--results_dir", precision)
        run("--ckpt_path", checkpoint, "--images_path", photo, *words)
        with open(Path(precision) / "vit_b16_16" / "predictions.csv", newline="") as file:
            said.append({row["name"]: float(row["probability"]) for row in csv.DictReader(file)})
    assert said[0] != said[1]
    assert said[0] == pytest.approx(said[1], abs=0.02)


@pytest.mark.parametrize("where", ["beside", "images", "data set"])
def test_a_list(checkpoint: Path, where: str) -> None:
    root = {"beside": Path("set"), "images": Path("set/images"), "data set": Path("data/pictures")}[where]
    (root / "x").mkdir(parents=True)
    pil_image().save(root / "x" / "one.jpg")
    pil_image().save(root / "x" / "two.jpg")
    Path("set").mkdir(exist_ok=True)
    Path("set/test.csv").write_text("class_id,dir\n0,x/one.jpg\n1,x/two.jpg\n")
    words = ["--dataset_root_path", "data", "--folder_test", "images" if where == "images" else "pictures"]
    run("--ckpt_path", checkpoint, "--images_path", "set/test.csv", *words)
    folder = Path("results_inference/vit_b16_16")
    assert {path.name for path in (folder / "x").iterdir()} == {"one.png", "two.png"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x/one.jpg\n", "list.csv has no column `dir`"),
        ("", "list.csv has no column `dir`"),
        ("dir\n", "list.csv lists no image"),
        ("dir\n../one.jpg\n", r"list.csv lists '\.\./one.jpg': expected an image below"),
        ("dir\n/etc/passwd\n", "list.csv lists '/etc/passwd': expected an image below"),
        ("class_id,dir\n1,\n", "list.csv lists '': expected an image below"),
    ],
)
def test_lists_that_are_none(checkpoint: Path, text: str, says: str) -> None:
    Path("list.csv").write_text(text)
    with pytest.raises(SystemExit, match=f"^inference.py: error: {says}"):
        run("--ckpt_path", checkpoint, "--images_path", "list.csv")
    assert not Path("results_inference").exists()


def test_a_list_of_images_that_are_not_there(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.csv").write_text("dir\nx/one.jpg\n")
    with pytest.raises(SystemExit, match="1 of 1 images could not be read"):
        run("--ckpt_path", checkpoint, "--images_path", "list.csv")
    assert "x/one.jpg: not readable as an image, there is no such file" in capsys.readouterr().err


def test_models_that_do_not_crop_show_the_image_alone(tmp_path: Path, photo: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain.pth", dynamic_anchor=False, anchor_class_token=False)
    run("--ckpt_path", plain, "--images_path", photo, "--vis_mask", "rollout_0_2")
    folder = Path("results_inference/vit_b16")
    assert read(folder / "photo.png").shape == read(folder / "photo_rollout_0_2.png").shape == (64, 64, 3)


def test_settings_of_the_command_line_win(checkpoint: Path, photo: Path) -> None:
    """A top of all patches, crop_inclusive: the crop is the whole image."""
    run("--ckpt_path", checkpoint, "--images_path", photo, "--dynamic_top", 16, "--crop_inclusive")
    picture = read(Path("results_inference/vit_b16_16/photo.png")).astype(int)
    assert np.abs(picture[:, :64] - picture[:, 65:]).max() <= 1


def test_the_demo(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo("cub", tmp_path / "runs" / "demo-data")
    run("--demo", "--vis_mask", "gls")
    assert "random weights" in capsys.readouterr().out
    folder = Path("results_inference/vit_b16_4")
    assert len(list(folder.glob("*_gls.png"))) == inference.DEMO_IMAGES
    with open(folder / "predictions.csv", newline="") as file:
        assert {row["name"].split(".")[1] for row in csv.DictReader(file)} <= {
            *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        }
    run("--demo", "--ckpt_path", checkpoint, "--results_dir", "second")
    assert "random weights" not in capsys.readouterr().out
    assert len(list(Path("second/vit_b16_16").glob("*.png"))) == inference.DEMO_IMAGES


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--images_path", "photo.jpg"], "--ckpt_path: name a checkpoint, or the folder of a run"),
        (["--ckpt_path", "CHECKPOINT"], "--images_path: name an image, a folder, or a .csv list"),
        (["--ckpt_path", "CHECKPOINT", "--images_path", "none.jpg"], "--images_path none.jpg does not exist"),
        (["--ckpt_path", "CHECKPOINT", "--images_path", "empty"], "empty holds no image"),
        (["--ckpt_path", "CHECKPOINT", "--images_path", "photo.jpg", "--top", "0"], "--top 0: expected 1 or more"),
        (["--ckpt_path", "CHECKPOINT", "--images_path", "photo.jpg", "--vis_mask", "psm_2"], "mask 'psm_2': expected"),
        (["--ckpt_path", "CHECKPOINT", "--images_path", "photo.jpg", "--vis_mask", "cam"], "there is no mask 'cam'"),
        (
            ["--ckpt_path", "CHECKPOINT", "--images_path", "photo.jpg", "--dynamic_top", "17"],
            "dynamic_top 17: expected",
        ),
        (["--ckpt_path", "none.pth", "--images_path", "photo.jpg"], "none.pth"),
        (["--images_path", "photo.jpg", "--cpu_workers", "-1"], "--cpu_workers -1: expected 0 or more"),
    ],
)
@pytest.mark.usefixtures("photo")
def test_refusals(checkpoint: Path, words: list[str], says: str) -> None:
    Path("empty").mkdir()
    given = [str(checkpoint) if word == "CHECKPOINT" else word for word in words]
    with pytest.raises(SystemExit, match=f"^inference.py: error: .*{says}"):
        run(*given)
    assert not Path("results_inference").exists()


def test_results_that_cannot_be_written(checkpoint: Path, photo: Path) -> None:
    Path("results").touch()
    with pytest.raises(SystemExit, match=r"cannot be made .*--results_dir"):
        run("--ckpt_path", checkpoint, "--images_path", photo, "--results_dir", "results")


def test_a_training_file_may_be_given(checkpoint: Path, photo: Path) -> None:
    Path("train.yaml").write_text("lr: 0.01\nresults_dir: of_training\ndynamic_top: 16\ncrop_inclusive: true\n")
    run("--ckpt_path", checkpoint, "--images_path", photo, "--cfg", "train.yaml")
    picture = read(Path("results_inference/vit_b16_16/photo.png")).astype(int)
    assert np.abs(picture[:, :64] - picture[:, 65:]).max() <= 1


def test_it_starts_as_a_file(tmp_path: Path) -> None:
    program = ROOT / "glsim" / "tools" / "inference.py"
    command = [sys.executable, program, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--vis_mask_sq" in done.stdout


def test_names_of_folders() -> None:
    model = torch.nn.Linear(1, 1)
    other = Trained(model, Settings(), [], None, "resnet50")  # type: ignore[arg-type]
    assert inference.folder_name(other) == "resnet50"
