"""common.npz: conversion both ways, position embeddings, loading into timm, and files that must be refused."""

import pickle
import zipfile
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

from common import npz
from common.errors import UserError
from common.npz import download_npz, google_to_timm, load_npz, read_npz, resize_position_embedding, timm_to_google


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


@pytest.mark.parametrize("classes", [10, 7])
def test_logits_equal_those_of_timms_own_loader(tiny_file: Path, classes: int) -> None:
    ours, theirs = tiny_vit(num_classes=classes), tiny_vit(num_classes=classes)
    report = load_npz(ours, tiny_file)
    theirs.load_pretrained(str(tiny_file))
    assert report.left == (() if classes == 10 else ("head.weight", "head.bias"))
    images = fill_image(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_hybrid_equals_timms_own_loader(tmp_path: Path) -> None:
    path = tmp_path / "hybrid.npz"
    fill_npz(path, hybrid_spec((3, 4, 9), grid=2, depth=2))
    sizes = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2, "depth": 2}
    ours, theirs = (timm.create_model("vit_base_r50_s16_224", num_classes=10, **sizes).eval() for _ in range(2))
    assert load_npz(ours, path).left == ()
    theirs.load_pretrained(str(path))
    images = fill_image(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_stem_alone_is_a_hybrid_too() -> None:
    spec = hybrid_spec((), depth=1)
    spec["embedding/kernel"] = (8, 8, 64, 48)
    state = google_to_timm(arrays_of(spec))
    model = timm.create_model("vit_tiny_r_s16_p8_224", depth=1)
    backbone = {key for key in model.state_dict() if key.startswith("patch_embed.")}
    assert {key for key in state if key.startswith("patch_embed.")} == backbone


def test_flat_group_norm_parameters_are_accepted() -> None:
    arrays = arrays_of(hybrid_spec((1,), depth=1))
    flat = {key: value.reshape(-1) if value.shape[:3] == (1, 1, 1) else value for key, value in arrays.items()}
    for key, value in google_to_timm(arrays).items():
        assert torch.equal(google_to_timm(flat)[key], value), key


@pytest.mark.parametrize("spec", [vit_spec(), hybrid_spec((2, 1), depth=2)], ids=["plain", "hybrid"])
def test_round_trip_is_exact(spec: Spec) -> None:
    arrays = arrays_of(spec)
    back = timm_to_google(google_to_timm(arrays), num_heads=3)
    assert back.keys() == arrays.keys() - npz.IGNORED
    for key, value in back.items():
        assert value.shape == arrays[key].shape, key
        assert value.tobytes() == arrays[key].tobytes(), key


def test_a_timm_model_exports_to_a_file_that_timm_reads(tmp_path: Path) -> None:
    model, again = tiny_vit(), tiny_vit()
    np.savez(tmp_path / "export.npz", **timm_to_google(model.state_dict(), num_heads=3))
    torch.nn.init.ones_(again.cls_token)
    again.load_pretrained(str(tmp_path / "export.npz"))
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_export_refuses_a_model_that_the_layout_cannot_hold() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, init_values=1.0)
    with pytest.raises(UserError, match=r"holds the unknown blocks\.0\.ls1\.gamma"):
        timm_to_google(model.state_dict(), num_heads=3)


@pytest.mark.parametrize(("old", "new"), [(14, 28), (14, 24), (14, 37), (7, 10), (14, 9), (5, 2), (3, 1), (1, 4)])
def test_resizing_equals_scipy(old: int, new: int) -> None:
    position = fill("pos", (1, 1 + old * old, 8))
    grid = position[0, 1:].reshape(old, old, 8).numpy()
    expected = torch.from_numpy(zoom(grid, (new / old, new / old, 1), order=1)).reshape(1, -1, 8)
    resized = resize_position_embedding(position, new)
    assert torch.equal(resized[:, :1], position[:, :1])
    torch.testing.assert_close(resized[:, 1:], expected, atol=1e-6, rtol=0)


def test_resizing_to_rows_and_columns_equals_scipy_and_keeps_any_prefix() -> None:
    position = fill("pos", (1, 2 + 16, 8))
    expected = zoom(position[0, 2:].reshape(4, 4, 8).numpy(), (6 / 4, 3 / 4, 1), order=1)
    resized = resize_position_embedding(position, (6, 3), prefix_tokens=2)
    assert torch.equal(resized[:, :2], position[:, :2])
    torch.testing.assert_close(resized[0, 2:], torch.from_numpy(expected).reshape(-1, 8), atol=1e-6, rtol=0)
    assert resize_position_embedding(position, 4, prefix_tokens=2) is position


@pytest.mark.parametrize("tokens", [1, 13])
def test_only_a_square_grid_is_resized(tokens: int) -> None:
    with pytest.raises(UserError, match=r"x\.npz has a position embedding of \d+ patches: only a square"):
        resize_position_embedding(torch.zeros(1, tokens, 8), 4, source="x.npz")


def test_a_model_for_oblong_images_is_loaded(tiny_file: Path) -> None:
    model = tiny_vit((32, 128))  # 2 x 8 patches: as many as 4 x 4, in another order
    load_npz(model, tiny_file)
    expected = resize_position_embedding(google_to_timm(read_npz(tiny_file))["pos_embed"], (2, 8))
    assert torch.equal(model.pos_embed, expected)


def test_reads_what_numpy_wrote_with_slashes(tmp_path: Path) -> None:
    arrays = fill_npz(tmp_path / "a.npz", vit_spec())
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "a.npz") as old, zipfile.ZipFile(tmp_path / "c.npz", "w") as new:
        for name in old.namelist():
            new.writestr(name.replace("/", "\\"), old.read(name))
    for name in ("a.npz", "b.npz", "c.npz"):
        found = read_npz(tmp_path / name)
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[key], value) for key, value in arrays.items())


def without(spec: Spec, *keys: str) -> Spec:
    return {key: shape for key, shape in spec.items() if key not in keys}


QUERY = "Transformer/encoderblock_2/MultiHeadDotProductAttention_1/query/kernel"
BAD_CONTENT = [
    (without(vit_spec(), QUERY), f"bad.npz lacks {QUERY}: expected exactly"),
    (without(vit_spec(), "head/bias"), "bad.npz lacks head/bias"),
    ({k: s for k, s in vit_spec().items() if "encoderblock_1/" not in k}, "lacks .*encoderblock_1/.* and 13 more"),
    (vit_spec() | {"Transformer/encoderblock_999999999/x": (1,)}, "holds the unknown .*_999999999/x"),
    (vit_spec() | {"optimizer/step": (1,)}, "bad.npz holds the unknown optimizer/step"),
    (vit_spec() | {QUERY: (48, 4, 12)}, r"_2/.*query/kernel has shape \(48, 4, 12\), .* need \(48, 3, 16\)"),
    (vit_spec() | {"embedding/bias": (47,)}, r"embedding/bias has shape \(47,\), .* need \(48\)"),
    (vit_spec() | {"cls": (48,)}, r"cls has shape \(48,\), .* need \(1, 1, D\)"),
    (vit_spec(depth=3), "bad.npz has 3 blocks, but VisionTransformer has 4: use the file of this model"),
    (vit_spec(width=24), r"bad.npz has cls_token of shape \(1, 1, 24\), but .* needs \(1, 1, 48\)"),
    (hybrid_spec((1,)), "bad.npz has patch_embed.backbone.* but VisionTransformer has not"),
    (vit_spec() | {"Transformer/posembed_input/pos_embedding": (1, 16, 48)}, "15 patches: only a square"),
]


@pytest.mark.parametrize(("spec", "sentence"), BAD_CONTENT)
def test_a_file_that_does_not_fit_changes_nothing_and_says_why(tmp_path: Path, spec: Spec, sentence: str) -> None:
    fill_npz(tmp_path / "bad.npz", spec)
    model = tiny_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=sentence) as caught:
        load_npz(model, tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_integers_are_no_weights(tmp_path: Path) -> None:
    arrays = arrays_of(vit_spec()) | {"cls": np.zeros((1, 1, 48), np.int64)}
    with pytest.raises(UserError, match="cls has type int64, expected floating point"):
        google_to_timm(arrays)


def test_numbers_that_are_not_finite_are_no_weights(tmp_path: Path) -> None:
    arrays: dict[str, Any] = arrays_of(vit_spec())
    arrays["head/bias"][1] = np.nan
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=r"bad\.npz: head/bias\.npy holds NaN or infinite numbers"):
        read_npz(tmp_path / "bad.npz")


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch16_siglip_224"])
def test_a_model_without_class_token_is_refused(tiny_file: Path, name: str) -> None:
    model = timm.create_model(name, **({"depth": 1} if name.startswith("vit") else {}))
    with pytest.raises(UserError, match="is for a ViT with a class token, which"):
        load_npz(model, tiny_file)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_objects_are_refused_and_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(Harmful(trace)))
    trace.unlink()  # it is harmful indeed
    np.savez(tmp_path / "objects.npz", cls=np.array([Harmful(trace)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"objects\.npz holds pickled objects \(cls\.npy\), .*never loaded"):
        read_npz(tmp_path / "objects.npz")
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Harmful(trace)))
    with pytest.raises(UserError, match=r"bare\.npz is damaged or not an \.npz"):
        read_npz(tmp_path / "bare.npz")
    assert not trace.exists()


@pytest.mark.parametrize("length", [0, 10, 5000, -1])
def test_a_truncated_file_is_refused(tiny_file: Path, length: int) -> None:
    content = tiny_file.read_bytes()
    tiny_file.write_bytes(content[:length])
    with pytest.raises(UserError, match=r"tiny\.npz is damaged or not an \.npz file .*download it again"):
        read_npz(tiny_file)


def test_a_flipped_bit_is_noticed(tiny_file: Path) -> None:
    content = bytearray(tiny_file.read_bytes())
    with zipfile.ZipFile(tiny_file) as archive:
        place = archive.getinfo("embedding/kernel.npy").header_offset + 20_000
    content[place] ^= 1
    tiny_file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_npz(tiny_file)


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


STRANGE = {
    "a shape beyond the file": ("cls.npy", header((1 << 40,)) + b"1234", "declares shape"),
    "a negative shape": ("cls.npy", header((-1,)) + b"1234", "damaged"),
    "more data than shape": ("cls.npy", header((1,)) + b"12345678", "declares shape"),
    "text": ("cls.npy", header((1,), "<U1") + b"1234", "has type <U1, expected numbers"),
    "no array": ("cls.npy", b"hello", "damaged"),
    "another version": ("cls.npy", header((1,)).replace(b"\x01\x00", b"\x09\x00", 1) + b"1234", "damaged"),
    "another file": ("readme.txt", b"hello", "holds readme.txt: expected numpy arrays only"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_members_are_refused(tmp_path: Path, case: str) -> None:
    name, content, sentence = STRANGE[case]
    with zipfile.ZipFile(tmp_path / "strange.npz", "w") as archive:
        archive.writestr(name, content)
    with pytest.raises(UserError, match=sentence):
        read_npz(tmp_path / "strange.npz")


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cls.npy", bytes(npz.FREE_BYTES * 2))
    with pytest.raises(UserError, match=r"claims to unpack to \d+ bytes"):
        read_npz(tmp_path / "bomb.npz")


def test_a_missing_file_names_where_to_fetch_it(tmp_path: Path) -> None:
    sentence = r"R50-ViT-B_16\.npz does not exist: .*imagenet21k/R50\+ViT-B_16\.npz and put it there"
    with pytest.raises(UserError, match=sentence):
        read_npz(tmp_path / "R50-ViT-B_16.npz")


def test_download_goes_to_the_published_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(url: str, target: Path) -> None:
        asked.append(url)
        fill_npz(target, {"cls": (1, 1, 8)})

    monkeypatch.setattr(npz, "download", fetch)
    for _ in range(2):  # the second finds the file
        assert download_npz("ViT-B_16", tmp_path) == tmp_path / "ViT-B_16.npz"
    assert download_npz("R50-ViT-B_16", tmp_path) == tmp_path / "R50+ViT-B_16.npz"
    root = "https://storage.googleapis.com/vit_models/imagenet21k/"
    assert asked == [root + "ViT-B_16.npz", root + "R50+ViT-B_16.npz"]


@pytest.mark.parametrize("cut", [100, -1])
def test_a_download_that_is_no_whole_archive_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_file: Path, cut: int
) -> None:
    content = tiny_file.read_bytes()[:cut]
    monkeypatch.setattr(npz, "download", lambda url, target: target.write_bytes(content))
    with pytest.raises(UserError, match=r"ViT-B_16\.npz is damaged .* deleted: run again"):
        download_npz("ViT-B_16", tmp_path)
    assert not (tmp_path / "ViT-B_16.npz").exists()


def test_download_of_an_unpublished_name_lists_the_published_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'ViT-S_16': choose from ViT-B_16, ViT-B_32"):
        download_npz("ViT-S_16", tmp_path)
