"""glsim/tools/inference.py: classes, pictures, lists and folders, the demo, and refusals."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formula import fill, pil_image
from PIL import Image

from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.tools import heatmap, inference
from glsim.train_utils import pictures
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
    drawn = pictures.overlay(image.astype(np.uint8), mask)
    np.testing.assert_array_equal(read(folder / "photo_glsim_norm.png"), drawn)
    np.testing.assert_array_equal(read(folder / "photo_similarity.png"), pictures.squares(drawn, mask))

    changes = {
        ("--vis_mask_pow",): {"power": True},
        ("--vis_mask_top", 2): {"top": 2},
        ("--vis_mask_color",): {"color": False},  # as published, the flag turns it off
        ("--no-vis_mask_color",): {"color": False},
        ("--vis_mask_color", "--released"): {"color": False, "released": True},
    }
    for words, options in changes.items():
        run("--ckpt_path", checkpoint, "--images_path", photo, "--vis_mask", "glsim_norm", *words)
        expected = pictures.overlay(image.astype(np.uint8), mask, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(read(folder / "photo_glsim_norm.png"), expected)
        assert (expected != drawn).any()


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
    said, drawn = {}, {}
    for helpers in (0, 2):
        words = ("--images_path", "samples", "--batch_size", 2, "--cpu_workers", helpers, "--results_dir", helpers)
        with pytest.raises(SystemExit, match="1 of 7 images could not be read"):
            run("--ckpt_path", checkpoint, *words)
        said[helpers] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("samples")]
        drawn[helpers] = {path.name: read(path) for path in Path(str(helpers)).rglob("*.png")}
    assert said[0] == said[2]
    assert drawn[0].keys() == drawn[2].keys() == {f"{number}.png" for number in (0, 1, 2, 4, 5, 6)}
    assert all((picture == drawn[2][name]).all() for name, picture in drawn[0].items())


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


def test_settings_of_the_command_line_win(checkpoint: Path, photo: Path) -> None:
    """A top of all patches, crop_inclusive: the crop is the whole image."""
    run("--ckpt_path", checkpoint, "--images_path", photo, "--dynamic_top", 16, "--crop_inclusive")
    picture = read(Path("results_inference/vit_b16_16/photo.png")).astype(int)
    assert np.abs(picture[:, :64] - picture[:, 65:]).max() <= 1
