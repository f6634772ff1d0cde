"""common.weights.google_npz against timm's own loader and scipy, and files that do not fit."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from formula import (
    Spec,
    base_sequence,
    fill,
    fill_image,
    fill_npz,
    hybrid_spec,
    npz_array,
    pil_image,
    tiny_vit,
    vit_spec,
)
from scipy.ndimage import zoom

from common.errors import UserError
from common.weights import download_npz, google_npz, load_npz
from common.weights.google_npz import google_to_timm, read_npz, resize_position_embedding


def arrays_of(spec: Spec) -> dict[str, np.ndarray]:
    return {key: npz_array(key, shape) for key, shape in spec.items()}


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.npz"
    fill_npz(path, vit_spec())
    return path


def test_formula_check_values() -> None:
    expected = [-0.630970478, 0.296592593, 0.421406686, -0.96330452, -0.503253818, -0.274237931]
    assert fill("head.weight", (2, 3)).flatten().tolist() == pytest.approx(expected, abs=1e-7)
    wave = [0.0, 0.981158853, 1.484303, 1.26430345]
    assert fill_image(1, 1, 1, 4).flatten().tolist() == pytest.approx(wave, abs=1e-7)
    assert base_sequence("a", 1000).min() >= -1
    assert pil_image().getpixel((10, 20)) == (130, 290 % 256, 170)


def assert_equal_to_timms_own_loader(ours: Any, theirs: Any, file: Path, size: int) -> None:
    theirs.load_pretrained(str(file))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    images = fill_image(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("classes", [10, 7])
def test_a_vit(tiny_file: Path, classes: int) -> None:
    ours, theirs = tiny_vit(num_classes=classes), tiny_vit(num_classes=classes)
    report = load_npz(ours, tiny_file)
    assert report.left == (() if classes == 10 else ("head.weight", "head.bias"))
    assert {*report.loaded, *report.left} == set(ours.state_dict())
    assert_equal_to_timms_own_loader(ours, theirs, tiny_file, 64)


def test_a_hybrid(tmp_path: Path) -> None:
    fill_npz(tmp_path / "hybrid.npz", hybrid_spec((3, 4, 9), grid=2, depth=2))
    sizes = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2, "depth": 2}
    ours, theirs = (timm.create_model("vit_base_r50_s16_224", num_classes=10, **sizes).eval() for _ in range(2))
    assert load_npz(ours, tmp_path / "hybrid.npz").left == ()
    assert_equal_to_timms_own_loader(ours, theirs, tmp_path / "hybrid.npz", 32)


def test_flat_group_norm_parameters_are_accepted() -> None:
    arrays = arrays_of(hybrid_spec((1,), depth=1))
    flat = {key: value.reshape(-1) if value.shape[:3] == (1, 1, 1) else value for key, value in arrays.items()}
    for key, value in google_to_timm(arrays).items():
        assert torch.equal(google_to_timm(flat)[key], value), key


@pytest.mark.parametrize("new", [(14, 28), (14, 24), (14, 37), (7, 10), (14, 9), (5, 2), (3, 1), (1, 4)], ids=str)
def test_resizing_equals_scipy(new: tuple[int, int]) -> None:
    old, side = new
    position = fill("pos", (1, 1 + old * old, 8))
    grid = position[0, 1:].reshape(old, old, 8).numpy()
    expected = torch.from_numpy(zoom(grid, (side / old, side / old, 1), order=1)).reshape(1, -1, 8)
    resized = resize_position_embedding(position, (side, side))
    assert torch.equal(resized[:, :1], position[:, :1])
    torch.testing.assert_close(resized[:, 1:], expected, atol=1e-6, rtol=0)


def test_resizing_to_rows_and_columns_equals_scipy_and_keeps_any_prefix() -> None:
    position = fill("pos", (1, 2 + 16, 8))
    expected = zoom(position[0, 2:].reshape(4, 4, 8).numpy(), (6 / 4, 3 / 4, 1), order=1)
    resized = resize_position_embedding(position, (6, 3), prefix_tokens=2)
    assert torch.equal(resized[:, :2], position[:, :2])
    torch.testing.assert_close(resized[0, 2:], torch.from_numpy(expected).reshape(-1, 8), atol=1e-6, rtol=0)
    assert resize_position_embedding(position, (4, 4), prefix_tokens=2) is position


def test_a_model_for_oblong_images(tiny_file: Path) -> None:
    model = tiny_vit((32, 128))  # 2 x 8 patches: as many as 4 x 4, in another order
    load_npz(model, tiny_file)
    expected = resize_position_embedding(google_to_timm(read_npz(tiny_file))["pos_embed"], (2, 8))
    assert torch.equal(model.pos_embed, expected)


QUERY = "Transformer/encoderblock_2/MultiHeadDotProductAttention_1/query/kernel"
BAD_CONTENT = [
    ({QUERY: None}, QUERY),
    ({"optimizer/step": (1,)}, "optimizer/step"),
    ({"embedding/bias": (47,)}, r"patch_embed\.proj\.bias \(47,\) instead of \(48,\)"),
    ({"cls": (48,)}, r"cls_token \(48,\)"),
    (vit_spec(depth=3), r"blocks\.3"),
    (vit_spec(width=24), r"cls_token \(1, 1, 24\) instead of \(1, 1, 48\)"),
    (hybrid_spec((1,)), "patch_embed.backbone"),
    ({"Transformer/posembed_input/pos_embedding": (1, 16, 48)}, "15 patches"),
]


@pytest.mark.parametrize(("changes", "named"), BAD_CONTENT, ids=range(len(BAD_CONTENT)))
def test_a_file_that_does_not_fit_changes_nothing_and_says_why(tmp_path: Path, changes: Any, named: str) -> None:
    spec = changes if "cls" in changes and len(changes) > 1 else vit_spec() | changes
    fill_npz(tmp_path / "bad.npz", {key: shape for key, shape in spec.items() if shape})
    model = tiny_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"bad\.npz.*{named}"):
        load_npz(model, tmp_path / "bad.npz")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch16_siglip_224"])
def test_a_model_without_class_token_is_refused(tiny_file: Path, name: str) -> None:
    model = timm.create_model(name, **({"depth": 1} if name.startswith("vit") else {}))
    with pytest.raises(UserError, match=r"tiny\.npz "):
        load_npz(model, tiny_file)


@pytest.mark.parametrize("content", ["pickle", "text", "half", "nothing"])
def test_what_is_no_npz_file_is_refused(tiny_file: Path, content: str) -> None:
    whole = tiny_file.read_bytes()
    bad = {"pickle": pickle.dumps({"cls": 1}), "text": b"<html>", "half": whole[: len(whole) // 2], "nothing": b""}
    tiny_file.write_bytes(bad[content])
    with pytest.raises(UserError, match=r"tiny\.npz is damaged or not an \.npz"):
        read_npz(tiny_file)


def test_download_goes_to_the_published_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(url: str, target: Path) -> None:
        asked.append(url)
        target.touch()

    monkeypatch.setattr(google_npz, "fetch", fetch)
    for _ in range(2):  # the second finds the file
        assert download_npz("ViT-B_16", tmp_path) == tmp_path / "ViT-B_16.npz"
    assert download_npz("R50-ViT-B_16", tmp_path) == tmp_path / "R50+ViT-B_16.npz"
    root = "https://storage.googleapis.com/vit_models/imagenet21k/"
    assert asked == [root + "ViT-B_16.npz", root + "R50+ViT-B_16.npz"]
    with pytest.raises(UserError, match="'ViT-S_16': choose from ViT-B_16, ViT-B_32"):
        download_npz("ViT-S_16", tmp_path)
