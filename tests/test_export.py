"""common.export: the files give the models' logits, for any number of images, and say how to use them."""

import errno
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from formula import fill_image, fill_state_dict
from torch import Tensor, nn
from torchvision import transforms as T

from common import export as exporting
from common.engine import logits_of
from common.errors import UserError
from common.export import TOLERANCE, check_export, export
from common.models import GFT, TransFG, gft, transfg
from common.predict import describe_transform
from ffvt.model import FFVT
from glsim.model_utils.cal import CAL
from glsim.model_utils.config import ViTConfig
from glsim.model_utils.glsim import ViTGLSim
from glsim.model_utils.timm_glsim import GLSimTimm
from glsim.model_utils.transfg import TransFG as OfficialTransFG

SIDE = 32
CLASSES = ["nothing", "an apple, red", "crème", "3", "4"]
NUMBER = len(CLASSES)
TRANSFORM = T.Compose([T.Resize((SIDE, SIDE)), T.ToTensor(), T.Normalize([0.5] * 3, [0.25] * 3)])
VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SIZES = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "num_layers": 3, "patch_size": 8}
CROPS: dict[str, Any] = {"image_size": SIDE, "num_classes": NUMBER, "dynamic_anchor": True, "dynamic_top": 3}
CROPS |= {"reducer": "cls", "aggregator": True, "aggregator_norm": True}
GLSIM = {"patch_size": 8, "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "GFT described": lambda: GFT("vit_base_patch16_224", NUMBER, SIDE, **VIT),
    "GFT released": lambda: GFT("vit_base_patch16_224", NUMBER, SIDE, released=True, **VIT),
    "TransFG of the GFT repository": lambda: TransFG("vit_base_patch16_224", NUMBER, SIDE, num_parts=5, **VIT),
    "FFVT": lambda: FFVT(SIZES, SIDE, NUMBER, num_token=4),
    "FFVT without fusion": lambda: FFVT(SIZES | {"num_layers": 1}, SIDE, NUMBER, feature_fusion=False),
    "GLSim": lambda: ViTGLSim(ViTConfig("vit_b16", **CROPS, **GLSIM)),
    "GLSimTimm": lambda: GLSimTimm("glsvit_base_patch16_224", **CROPS, model_kwargs=VIT | {"depth": 1}),
    "TransFG": lambda: OfficialTransFG(SIZES, SIDE, NUMBER, slide_step=6),
}


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One ViT block before the parts that are the models' own."""
    monkeypatch.setattr(gft, "DEPTH", 1)
    monkeypatch.setattr(transfg, "DEPTH", 1)


def filled(build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    fill_state_dict(model)
    return model


def largest_difference(model: nn.Module, run: Callable[[Tensor], Tensor]) -> float:
    """Over batches of 1, 3 and 5 images, of which the logits are not all the same."""
    images, differences = fill_image(5, 3, SIDE, SIDE), []
    with torch.no_grad():
        for count in (1, 3, 5):
            expected, found = logits_of(model.eval()(images[:count])), run(images[:count])
            assert found.shape == (count, NUMBER)
            differences.append((found - expected).abs().max().item())
    assert expected.std(0).max() > 100 * TOLERANCE
    return max(differences)


def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("name", MODELS)
def test_both_files_give_the_models_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(MODELS[name])
    trace, traces = exporting._traced, []
    monkeypatch.setattr(exporting, "_traced", lambda *given: traces[0] if traces else traces.append(trace(*given)))
    exporting._traced(exporting._Logits(model).eval(), [3, SIDE, SIDE])  # once for both
    for file in ("a.onnx", "a.pt2"):
        export(model, TRANSFORM, CLASSES, {}, tmp_path / file)
    assert largest_difference(model, in_onnxruntime(tmp_path / "a.onnx")) <= TOLERANCE
    assert largest_difference(model, torch.export.load(tmp_path / "a.pt2").module()) <= TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.json", "a.pt2", "a.pt2.json"]


def small_cal() -> nn.Module:
    """CAL, a convolution in the place of its ResNet."""
    model = CAL(NUMBER, backbone="resnet18", num_maps=4)
    model.base_model = nn.Conv2d(3, 512, 8, stride=8)
    return model


@pytest.mark.parametrize(
    "build",
    [small_cal, lambda: timm.create_model("resnet18", num_classes=NUMBER, channels=(8, 8, 16, 16))],
    ids=["CAL", "ResNet"],
)
def test_models_without_attention_to_tokens(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = filled(build)
    export(model, TRANSFORM, CLASSES, {}, tmp_path / "a.pt2")
    assert largest_difference(model, torch.export.load(tmp_path / "a.pt2").module()) <= TOLERANCE


class Linear(nn.Module):
    """Answers with what `change` makes of a linear function."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        self.head, self.change = nn.Linear(3, NUMBER), change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.head(images.mean((2, 3))))


def test_the_files_say_how_they_are_used(tmp_path: Path) -> None:
    weights = {"source": "runs/x", "sha256": "0f"}
    for file in ("a.onnx", "a.pt2"):
        export(Linear(changed_in_a_file(TOLERANCE / 2)), TRANSFORM, CLASSES, weights, tmp_path / file)
        about = json.loads((tmp_path / f"{file}.json").read_text(encoding="utf-8"))
        assert about["file"] == file
        assert about["classes"] == CLASSES
        assert about["preprocessing"] == describe_transform(TRANSFORM)
        assert about["input"] == {"name": "images", "type": "float32", "shape": ["batch", 3, SIDE, SIDE]}
        assert about["output"] == {"name": "logits", "type": "float32", "shape": ["batch", NUMBER]}
        assert about["weights"] == weights
        assert about["largest_difference"] == pytest.approx(TOLERANCE / 2, rel=0.1)
        assert about["versions"]["torch"] == str(torch.__version__)
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    inside = {"classes.json": "", "preprocessing.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=inside)
    for found in (said, {name.removesuffix(".json"): json.loads(text) for name, text in inside.items()}):
        assert (found["classes"], found["preprocessing"]) == (CLASSES, about["preprocessing"])


def changed_in_a_file(by: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits + by if torch.compiler.is_compiling() else logits


@pytest.mark.parametrize("file", ["a.onnx", "a.pt2"])
@pytest.mark.parametrize(
    "change",
    [torch.rand_like, changed_in_a_file(2 * TOLERANCE), lambda logits: logits / 0],
    ids=["random", "a little", "not finite"],
)
def test_a_file_that_differs_is_not_kept(change: Callable[[Tensor], Tensor], file: str, tmp_path: Path) -> None:
    for name in (file, f"{file}.json"):
        (tmp_path / name).write_text("of before")
    with pytest.raises(UserError, match=rf"--export .*{file}: the file was not kept, .* differ from the model's by"):
        export(Linear(change), TRANSFORM, CLASSES, {}, tmp_path / file)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file, f"{file}.json"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"of before"}


@pytest.mark.parametrize("file", ["a.onnx", "a.pt2"])
def test_what_torch_cannot_export_is_one_sentence(file: str, tmp_path: Path) -> None:
    model = Linear(lambda logits: logits if logits.sum() > 0 else logits + 1)
    with pytest.raises(UserError, match=r"^--export: torch .* cannot bring this model into the form of torch\.export"):
        export(model, TRANSFORM, CLASSES, {}, tmp_path / file)
    assert not list(tmp_path.iterdir())


def test_what_onnx_lacks_is_one_sentence(tmp_path: Path) -> None:
    model = Linear(lambda logits: torch.linalg.eigvals(torch.diag_embed(logits)).real)
    with pytest.raises(UserError, match=r"cannot bring this model into the form of ONNX"):
        export(model, TRANSFORM, CLASSES, {}, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


class Session:
    """One of onnxruntime that knows an operator less."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED\nand more")


def fail(*_: Any, **__: Any) -> Any:
    raise ValueError("no such operator\nand more")


@pytest.mark.parametrize(
    ("module", "name", "broken", "file"),
    [
        (onnxruntime, "InferenceSession", fail, "a.onnx"),
        (onnxruntime, "InferenceSession", Session, "a.onnx"),
        (torch.export, "save", fail, "a.pt2"),
        (torch.export, "load", fail, "a.pt2"),
    ],
)
def test_a_file_that_cannot_be_made_or_tried_is_one_sentence(
    module: Any, name: str, broken: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken)
    form = {"a.onnx": "ONNX", "a.pt2": r"torch\.export"}[file]
    with pytest.raises(
        UserError, match=rf"form of {form} \((\[ONNXRuntimeError\] .*NOT_IMP\w+|no such operator)\): try"
    ):
        export(Linear(), TRANSFORM, CLASSES, {}, tmp_path / file)
    assert not list(tmp_path.iterdir())


def test_the_versions_are_of_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where onnxruntime-gpu is installed there is no package onnxruntime to ask."""
    known = metadata.version

    def version(package: str) -> str:
        if package == "onnxruntime":
            raise metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(metadata, "version", version)
    assert exporting._versions(Path("a.onnx"))["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize(("file", "place"), [("a.onnx", "replace"), ("a.pt2", "replace"), ("a.pt2", "write_bytes")])
def test_a_full_disk_is_one_sentence(file: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / file).write_text("of before")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if place == "replace" else Path, place, fail)
    with pytest.raises(UserError, match=rf"{file} could not be written \(No space left on device\)"):
        export(Linear(), TRANSFORM, CLASSES, {}, tmp_path / file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of before"]


def refusal(name: str, **chosen: Any) -> str:
    with pytest.raises(UserError) as refused:
        check_export(name, chosen)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_names_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.pt2").mkdir()
    for name in ("model", "model.pt", "model.onnx.json", ".onnx"):
        assert refusal(name) == f"--export {name}: expected a name that ends in .onnx (ONNX) or .pt2 (torch.export)"
    assert refusal("no/model.onnx") == f"--export no/model.onnx: the folder {tmp_path / 'no'} does not exist"
    assert refusal("folder.pt2").startswith("--export folder.pt2 is a folder")
    check_export(None, {"device": "cuda"})
    check_export("model.onnx", {"device": "cpu", "precision": "fp32"})


@pytest.mark.parametrize(("option", "value"), [("device", "cuda"), ("precision", "bf16"), ("precision", "fp16")])
def test_options_that_an_export_does_not_follow(option: str, value: str) -> None:
    assert f"leave --{option} out" in refusal("model.pt2", **{option: value})


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_sentence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal("model.onnx")
    assert f"{package} cannot be imported" in said
    assert "`pip install onnx onnxscript onnxruntime`" in said
    check_export("model.pt2", {})
