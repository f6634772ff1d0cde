"""common.predict: model.json says enough to build model and transform again, and to name what is on a picture."""

import csv
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from common import predict
from common.data.images import BadImage, load_image
from common.engine import Loading
from common.errors import UserError
from common.models import GFT, TransFG
from common.predict import (
    MODEL_INFO,
    check_out,
    describe_model,
    describe_transform,
    find_images,
    load_run,
    read_model_info,
    rebuild,
    restore_transform,
    write_predictions,
)

CPU = torch.device("cpu")
NORMALIZE = T.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TRANSFORMS = {
    "square": T.Compose([T.Resize((24, 20), InterpolationMode.BICUBIC), T.ToTensor(), NORMALIZE]),
    "crop": T.Compose([T.Resize(30), T.CenterCrop(24), T.ToTensor(), T.Normalize([0.5], [0.25])]),
    "list": T.Compose([T.Resize([24, 24], InterpolationMode.NEAREST), T.CenterCrop((20, 22)), T.ToTensor()]),
    "bare": T.Compose([T.ToTensor()]),
}


def picture(seed: int, size: tuple[int, int] = (37, 41)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def on_disk(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_comes_back_bit_for_bit(name: str) -> None:
    transform = TRANSFORMS[name]
    restored = restore_transform(on_disk(describe_transform(transform)))
    for seed in range(3):
        assert torch.equal(restored(picture(seed)), transform(picture(seed)))
    assert describe_transform(restored) == describe_transform(transform)


def test_descriptions_tell_transforms_apart() -> None:
    described = [json.dumps(describe_transform(transform)) for transform in TRANSFORMS.values()]
    bilinear = T.Compose([T.Resize((24, 20), InterpolationMode.BILINEAR), T.ToTensor(), NORMALIZE])
    assert len({*described, json.dumps(describe_transform(bilinear))}) == 5


def test_a_step_that_cannot_be_described_is_named() -> None:
    with pytest.raises(TypeError, match="RandomHorizontalFlip"):
        describe_transform(T.Compose([T.RandomHorizontalFlip(), T.ToTensor()]))


# Models

VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 9, "num_heads": 2}
MODELS: dict[str, tuple[Any, dict[str, Any], int]] = {  # model, the recipe's model_kwargs, image side
    "gft": (lambda: GFT("vit_base_patch16_224.augreg2_in21k_ft_in1k", 7, 16, **VIT), VIT, 16),
    "gft released": (lambda: GFT("vit_base_patch16_224", 7, 16, released=True, **VIT), VIT, 16),
    "transfg": (lambda: TransFG("vit_base_patch16_224", 7, 16, num_parts=4, **VIT), VIT, 16),
    "vit": (
        lambda: timm.create_model("vit_base_patch16_224.augreg_in21k", num_classes=7, img_size=16, **VIT),
        VIT,
        16,
    ),
    "deit": (lambda: timm.create_model("deit_base_distilled_patch16_224", num_classes=7, img_size=16, **VIT), VIT, 16),
    "densenet": (
        lambda: timm.create_model("densenet169.tv_in1k", num_classes=7, growth_rate=4, block_config=(1, 2)),
        {"growth_rate": 4, "block_config": (1, 2)},
        32,
    ),
    "resnet": (
        lambda: timm.create_model("resnet18.a1_in1k", num_classes=7, channels=(8, 8, 16, 16)),
        {"channels": (8, 8, 16, 16)},
        32,
    ),
    "resnetv2": (
        lambda: timm.create_model(
            "resnetv2_50x1_bit.goog_in21k", num_classes=7, channels=(128, 128, 128, 128), stem_chs=32
        ),
        {"channels": (128, 128, 128, 128), "stem_chs": 32},
        32,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_again_from_its_description(name: str) -> None:
    build, kwargs, side = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    again = rebuild(on_disk(describe_model(model, 7, kwargs))).eval()
    assert type(again) is type(model)
    again.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        assert again(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["hf-hub:someone/something", "local-dir:/tmp", "no_such_model"])
def test_only_timms_own_models_are_built(name: str) -> None:
    with pytest.raises(ValueError, match="timm has no model"):
        rebuild({"library": "timm", "name": name, "arguments": {}})


# A run's folder


CLASSES = ["nothing", "an apple, red", "crème", "3", "4", "5", "6"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    build, kwargs, _ = MODELS["resnet"]
    torch.manual_seed(4)
    model = build()
    count = {"count": 7, "classes": 7}
    info = {name: types[0]() for name, types in MODEL_INFO.items()} | {
        "data": dict.fromkeys(("train", "val", "test"), count),
        "weights": {"source": "none", "sha256": None},
        "classes": CLASSES,
        "architecture": describe_model(model, 7, kwargs),
        "preprocessing": describe_transform(TRANSFORMS["square"]),
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(info), encoding="utf-8")
    save_file(model.state_dict(), folder / "best.safetensors")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    paths = [folder / "b.png", folder / "c.JPG", folder / "more" / "a b.webp", folder / "é.bmp", folder / "z.gif"]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / "a folder.png").mkdir()
    return paths


def test_images_are_found_in_folders_and_by_name(pictures: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    b, c, a, e, z = pictures
    assert find_images([str(folder)]) == sorted([b, c, a, e, z])
    assert find_images([str(c), str(folder / "more"), str(c)]) == [c, a]
    assert find_images([str(folder / "notes.txt")]) == [folder / "notes.txt"]  # named: then it is an image, or bad
    with pytest.raises(UserError, match=r"holds no image \(\.bmp"):
        find_images([str(folder / "a folder.png")])
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_images([str(c), str(tmp_path / "nowhere")])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_predictions_are_the_models(run_folder: Path, pictures: list[Path], batch_size: int) -> None:
    predictor = load_run(run_folder, CPU)
    build, _, _ = MODELS["resnet"]
    model = build()
    model.load_state_dict(predictor.model.state_dict())
    predictor.loading.eval_batch_size = batch_size
    ranked = predictor(pictures, 3)
    assert len(ranked) == len(pictures)
    for path, guesses in zip(pictures, ranked, strict=True):
        with torch.no_grad(), Image.open(path) as image:
            shares = model.eval()(TRANSFORMS["square"](image.convert("RGB"))[None])[0].exp()
        shares = (shares / shares.sum()).tolist()
        best = sorted(range(7), key=lambda number: -shares[number])[:3]
        assert [number for number, _ in guesses] == best
        assert [share for _, share in guesses] == pytest.approx([shares[number] for number in best], abs=1e-5)
    assert [len(guesses) for guesses in predictor(pictures, 99)] == [7] * 5


def test_an_image_whose_output_is_not_finite_is_named(run_folder: Path, pictures: list[Path]) -> None:
    predictor = load_run(run_folder, CPU)
    predictor.transform = T.Compose([*TRANSFORMS["square"].transforms, Blinding(3)])
    with pytest.raises(UserError, match=f"{pictures[3].name}: the model's output is not finite"):
        predictor(pictures, 3)


@pytest.mark.parametrize(("count", "used"), [(2, 0), (3, 2)])
def test_workers_read_where_there_are_several_batches(
    count: int, used: int, run_folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_run(run_folder, CPU)(pictures[:count], 3)
    read, seen = predict.evaluation_batches, []

    def watched(*given: Any) -> Any:
        seen.append(given[1:5])
        return read(*given)

    monkeypatch.setattr(predict, "evaluation_batches", watched)
    found = load_run(run_folder, CPU, loading=Loading(workers=2, eval_batch_size=2))(pictures[:count], 3)
    assert seen == [(2, 0, 1, used)]
    for guesses, wanted in zip(found, expected, strict=True):
        assert [number for number, _ in guesses] == [number for number, _ in wanted]
        assert [share for _, share in guesses] == pytest.approx([share for _, share in wanted], abs=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_of_several_bad_images_the_first_is_named(workers: int, run_folder: Path, pictures: list[Path]) -> None:
    for number in (3, 2):
        pictures[number].write_bytes(b"no image")
    predictor = load_run(run_folder, CPU, loading=Loading(workers, eval_batch_size=1))
    with pytest.raises(UserError) as refused:
        predictor(pictures, 3)
    with pytest.raises(BadImage) as alone:
        load_image(pictures[2])
    assert str(refused.value) == str(alone.value)


def test_half_precision_is_used_where_it_is_asked_for(run_folder: Path, pictures: list[Path]) -> None:
    guesses = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        predictor, seen = load_run(run_folder, CPU, precision), set()
        predictor.model.conv1.register_forward_hook(lambda _model, _given, output, seen=seen: seen.add(output.dtype))
        guesses[precision] = [dict(found) for found in predictor(pictures, 7)]
        assert seen == {dtype}
    assert guesses["bf16"] != guesses["fp32"]
    for half, full in zip(guesses["bf16"], guesses["fp32"], strict=True):
        assert half == pytest.approx(full, abs=0.03)
    predictor = load_run(run_folder, CPU, "bf16")
    predictor.transform = T.Compose([*TRANSFORMS["square"].transforms, Blinding(0)])
    with pytest.raises(UserError, match="not finite: its training has diverged, or bf16 overflows: use --precision"):
        predictor(pictures, 3)


class Blinding:
    """Makes the pixels of one image infinite."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        return image * float("inf") if self.left == -1 else image


def test_the_weights_are_those_of_the_file(run_folder: Path) -> None:
    torch.manual_seed(4)
    expected = MODELS["resnet"][0]().state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in load_run(run_folder, CPU).model.state_dict().items()
    )


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    predict.main()


def test_the_command_writes_what_it_prints(
    run_folder: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--run", run_folder, "--images", *pictures, "--top", "2", "--device", "cpu"]
    command(monkeypatch, *words, "--out", tmp_path / "a.json")
    command(monkeypatch, *words, "--out", tmp_path / "a.csv")
    listed = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(listed) == 10
    for row, item in zip(rows, listed, strict=True):
        assert list(row) == list(item) == ["path", "rank", "class", "name", "probability"]
        assert [type(value) for value in item.values()] == [str, int, int, str, float]
        assert list(row.values()) == [str(value) for value in item.values()]
        assert item["name"] == CLASSES[item["class"]]
    assert [item["path"] for item in listed[::2]] == [str(path) for path in pictures]
    assert [item["rank"] for item in listed] == [1, 2] * 5
    ranked = load_run(run_folder, CPU)(pictures, 2)
    assert [(item["class"], item["probability"]) for item in listed] == [
        guess for guesses in ranked for guess in guesses
    ]
    printed = capsys.readouterr().out.splitlines()
    best, second = listed[:2]
    expected = f"{pictures[0]}: {best['name']} {best['probability']:.1%}, {second['name']} {second['probability']:.1%}"
    assert printed[0] == expected
    assert len(printed) == 10


def refusal(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as leaving:
        command(monkeypatch, *words, "--device", "cpu")
    text = str(leaving.value.code)
    assert text.startswith("error: ")
    assert "\n" not in text
    return text


def test_one_bad_image_is_one_sentence(
    run_folder: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "pictures" / "bad.png"
    bad.write_bytes(pictures[0].read_bytes()[:300])
    words = ["--run", run_folder, "--images", tmp_path / "pictures", "--out", tmp_path / "a.csv"]
    assert str(bad) in refusal(monkeypatch, *words)
    assert not (tmp_path / "a.csv").exists()


def test_what_the_command_line_lacks_is_said(
    run_folder: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ["--images", pictures[0]]
    for words in (["--run", run_folder], images, ["--run", run_folder, *images, "--top", "0"]):
        assert "--run" in refusal(monkeypatch, *words)
    for words in (["--workers", "-1"], ["--eval-batch-size", "0"]):
        assert f"{words[0]} " in refusal(monkeypatch, "--run", run_folder, *images, *words)
    assert "does not exist" in refusal(monkeypatch, "--run", tmp_path / "nowhere", *images)
    for out, part in (("a.txt", ".csv or .json"), ("a", ".csv or .json"), ("no/a.csv", "does not exist")):
        assert part in refusal(monkeypatch, "--run", run_folder, *images, "--out", tmp_path / out)
    check_out(None)
    check_out("a.csv")


class Dying:
    """Ends the process that reads, as the system does when there is no shared memory left."""

    def __call__(self, image: Any) -> Any:
        os.kill(os.getpid(), signal.SIGBUS)


def test_a_worker_that_was_killed_is_a_sentence(
    run_folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "restore_transform", lambda _: T.Compose([Dying()]))
    monkeypatch.setattr(predict, "_check_parts", lambda *_: None)
    words = ("--run", run_folder, "--images", *pictures, "--workers", "1", "--eval-batch-size", "1")
    said = refusal(monkeypatch, *words)
    assert "a process that reads images was lost (DataLoader worker (pid" in said
    assert said.endswith("or read without such processes, --workers 0")


def test_nothing_to_write_is_an_empty_table(tmp_path: Path) -> None:
    write_predictions([], [], CLASSES, str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text()) == []


# Damaged folders


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"recipe": {}, "classes": []}', "\udcff"])
def test_a_broken_model_json(run_folder: Path, text: str) -> None:
    (run_folder / "model.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as broken:
        read_model_info(run_folder)
    assert "\n" not in str(broken.value)
    assert str(run_folder / "model.json") in str(broken.value)


@pytest.mark.parametrize("name", MODEL_INFO)
def test_model_json_lacks_a_part(run_folder: Path, name: str) -> None:
    info = json.loads((run_folder / "model.json").read_text(encoding="utf-8"))
    del info[name]
    (run_folder / "model.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=f"lacks {name}:"):
        read_model_info(run_folder)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("architecture", None),
        ("architecture", {"library": "timm", "name": "hf-hub:x/y", "arguments": {"num_classes": 7}}),
        ("architecture", {"library": "timm", "name": "resnet18", "arguments": {"num_classes": 7, "odd": 1}}),
        ("architecture", {"library": "timm", "name": "resnet18", "arguments": {}}),
        ("architecture", {"library": "common.models", "name": "os", "arguments": {"num_classes": 7}}),
        ("architecture", {"library": "common.models", "name": "GFT", "arguments": {"num_classes": 7}}),
        ("preprocessing", [{"name": "Lambda"}]),
        ("preprocessing", [{"name": "Resize", "size": 4, "interpolation": "magic"}]),
        ("preprocessing", "ToTensor"),
        ("classes", ["a", "b"]),
    ],
)
def test_a_description_that_fits_nothing(run_folder: Path, part: str, value: Any) -> None:
    info = json.loads((run_folder / "model.json").read_text(encoding="utf-8"))
    (run_folder / "model.json").write_text(json.dumps(info | {part: value}))
    with pytest.raises(UserError) as broken:
        load_run(run_folder, CPU)
    assert "\n" not in str(broken.value)
    assert str(run_folder) in str(broken.value)


def test_a_folder_without_weights(run_folder: Path) -> None:
    (run_folder / "best.safetensors").unlink()
    with pytest.raises(UserError, match=r"best\.safetensors does not exist"):
        load_run(run_folder, CPU)
