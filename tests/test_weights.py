"""common.weights: state_dicts of every accepted kind, strict and starting loads, the hub's cache and its absence."""

import argparse
import hashlib
import time
from pathlib import Path

import pytest
import timm
import torch
from formula import fill_npz, fill_state_dict, tiny_vit, vit_spec
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from common.weights import (
    explain_offline,
    load,
    load_checkpoint,
    load_weights,
    pretrained_report,
    read_file,
    read_state_dict,
    sha256_of,
)
from common.weights.google_npz import google_to_timm, read_npz, resize_position_embedding


class Wrapper(nn.Module):
    """What our own models look like: a timm ViT, a part of their own, a classifier."""

    def __init__(self, img_size: int = 64, num_classes: int = 5) -> None:
        super().__init__()
        self.base_model = tiny_vit(img_size)
        self.part = nn.Linear(48, 48)
        self.classifier = nn.Linear(48, num_classes)


OWN = ["part.weight", "part.bias", "classifier.weight", "classifier.bias"]


def filled(model: nn.Module) -> nn.Module:
    fill_state_dict(model)
    return model


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def save(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


# Reading


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin"])
def test_a_saved_state_dict_comes_back(tmp_path: Path, name: str) -> None:
    state = tiny_vit().state_dict()
    assert same(read_state_dict(save(tmp_path / name, state)), state)


def test_the_usual_wrappings_are_taken_off(tmp_path: Path) -> None:
    state = tiny_vit().state_dict()
    parallel = {f"module.{key}": value for key, value in state.items()}
    for content in ({"state_dict": state, "epoch": 3}, {"model": state}, parallel, {"model": parallel}):
        torch.save(content, tmp_path / "a.pth")
        assert same(read_state_dict(tmp_path / "a.pth"), state)


def test_a_run_folder_means_its_best_weights(tmp_path: Path) -> None:
    state = tiny_vit().state_dict()
    save_file(state, tmp_path / "best.safetensors")
    assert same(read_state_dict(tmp_path), state)


def test_the_namespace_of_released_checkpoints_is_read(tmp_path: Path) -> None:
    config = argparse.Namespace(image_size=224, opt_betas=None)
    torch.save({"config": config, "model": {"model.a": torch.ones(1)}}, tmp_path / "released.pth")
    assert read_file(tmp_path / "released.pth")["config"] == config
    assert read_state_dict(tmp_path / "released.pth").keys() == {"a"}


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
@pytest.mark.parametrize("length", [0, 3000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, length: int) -> None:
    path = save(tmp_path / name, tiny_vit().state_dict())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [{}, {"a": 1}, [torch.ones(1)], {"model": {}}, 5])
def test_a_file_without_parameters_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth holds no parameters"):
        read_state_dict(tmp_path / "other.pth")


def test_what_is_not_there_or_unknown_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    for path, named in (("none.pth", r"none\.pth"), ("", r"best\.safetensors"), ("a.onnx", r"a\.onnx")):
        with pytest.raises(UserError, match=named):
            read_state_dict(tmp_path / path)


# Strict loading


def test_a_checkpoint_fills_everything(tmp_path: Path) -> None:
    saved, fresh = filled(Wrapper()), Wrapper()
    assert load_checkpoint(fresh, save(tmp_path / "a.safetensors", saved.state_dict())) == []
    assert same(fresh.state_dict(), saved.state_dict())


def test_ema_gradients_of_released_files_are_dropped_and_named(tmp_path: Path) -> None:
    saved, fresh = filled(Wrapper()), Wrapper()
    extra = {f"hierarchical_blocks.{i}.ema_grad": torch.ones(16, 196) for i in range(3)}
    path = save(tmp_path / "released.pth", saved.state_dict() | extra)
    assert load_checkpoint(fresh, path) == list(extra)
    assert same(fresh.state_dict(), saved.state_dict())
    assert load_weights(Wrapper(num_classes=9), path)["left"] == ["classifier.weight", "classifier.bias"]


def one_less(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


def bad_checkpoints() -> dict[str, tuple[dict[str, Tensor], str]]:
    state = Wrapper().state_dict()
    return {
        "classes": (Wrapper(num_classes=7).state_dict(), "trained for 7 classes, not 5"),
        "missing": (one_less(state, "part.bias"), "lacks part.bias: it belongs to another model than this Wrapper"),
        "unknown": (state | {"extra.weight": torch.ones(1)}, "holds the unknown extra.weight"),
        "shape": (state | {"part.bias": torch.ones(3)}, r"has part.bias \(3,\) instead of \(48,\)"),
        "grid": (Wrapper(img_size=96).state_dict(), r"\(1, 37, 48\) instead of \(1, 17, 48\): .* image size"),
        "other": (tiny_vit().state_dict(), "lacks base_model.cls_token, .* and holds the unknown cls_token"),
        "diverged": (state | {"part.bias": torch.full((48,), torch.nan)}, "part.bias holds NaN"),
    }


@pytest.mark.parametrize("case", bad_checkpoints())
def test_a_checkpoint_that_does_not_fit_changes_nothing_and_says_why(tmp_path: Path, case: str) -> None:
    state, sentence = bad_checkpoints()[case]
    model = Wrapper()
    before = copy_of(model)
    with pytest.raises(UserError, match=rf"bad\.pth.*{sentence}"):
        load_checkpoint(model, save(tmp_path / "bad.pth", state))
    assert same(model.state_dict(), before)


# Starting weights


@pytest.fixture
def npz_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.npz"
    fill_npz(path, vit_spec(classes=10))
    return path


def test_npz_into_a_timm_model(npz_file: Path) -> None:
    model = tiny_vit(num_classes=5)
    head = model.head.weight.clone()
    report = load_weights(model, str(npz_file))
    left = ["head.weight", "head.bias"]
    assert report == {"source": "tiny.npz", "sha256": sha256_of(npz_file), "left": left}
    expected = google_to_timm(read_npz(npz_file))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items() if key not in left)
    assert torch.equal(model.head.weight, head)


def test_npz_goes_into_the_backbone_of_a_wrapper(npz_file: Path) -> None:
    model = Wrapper(img_size=96)
    before = copy_of(model)
    assert load_weights(model, npz_file)["left"] == OWN
    expected = google_to_timm(read_npz(npz_file))
    expected["pos_embed"] = resize_position_embedding(expected["pos_embed"], (6, 6))
    assert same(model.base_model.state_dict(), expected)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in OWN)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_timm_backbone_at_another_size_and_class_count(tmp_path: Path, suffix: str) -> None:
    saved, model = filled(tiny_vit()), tiny_vit(img_size=96, num_classes=5)
    path = save(tmp_path / f"backbone{suffix}", saved.state_dict())
    sha256, left = hashlib.sha256(path.read_bytes()).hexdigest(), ["head.weight", "head.bias"]
    assert load_weights(model, path) == {"source": path.name, "sha256": sha256, "left": left}
    expected = saved.state_dict()
    expected["pos_embed"] = resize_position_embedding(expected["pos_embed"], (6, 6))
    for key in set(expected) - {"head.weight", "head.bias"}:
        assert torch.equal(model.state_dict()[key], expected[key]), key
    assert torch.equal(model.head.weight, tiny_vit(img_size=96, num_classes=5).head.weight)  # as it was initialised


def test_a_whole_wrapper_starts_another_data_set(tmp_path: Path) -> None:
    saved, model = filled(Wrapper(num_classes=7)), Wrapper(img_size=128)
    path = save(tmp_path / "a.safetensors", saved.state_dict())
    assert load_weights(model, path)["left"] == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.part.weight, saved.state_dict()["part.weight"])
    assert model.base_model.pos_embed.shape == (1, 65, 48)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "resnetv2_50", "deit_tiny_distilled_patch16_224"])
def test_the_classifier_of_any_timm_model_is_left_and_nothing_else(tmp_path: Path, name: str) -> None:
    saved = timm.create_model(name, num_classes=7)
    path = save(tmp_path / "a.pth", saved.state_dict())
    same_classes, other = timm.create_model(name, num_classes=7), timm.create_model(name, num_classes=3)
    assert load_weights(same_classes, path)["left"] == []
    names = {"resnet18": ["fc"], "densenet121": ["classifier"], "resnetv2_50": ["head.fc"]}.get(name)
    names = names or ["head", "head_dist"]
    assert load_weights(other, path)["left"] == [f"{n}.{kind}" for n in names for kind in ("weight", "bias")]


BAD_STARTS = [
    (one_less(tiny_vit().state_dict(), "norm.bias"), "lacks norm.bias: it belongs to another model"),
    (tiny_vit().state_dict() | {"extra": torch.ones(1)}, "holds the unknown extra"),
    (tiny_vit(depth=2).state_dict(), r"lacks blocks.2.norm1.weight, .* \.\.\.: it belongs to another model"),
    (tiny_vit().state_dict() | {"pos_embed": torch.ones(1, 14, 48)}, "13 patches"),
    (tiny_vit().state_dict() | {"pos_embed": torch.ones(1, 26, 24)}, r"pos_embed \(1, 17, 24\) instead of"),
    (timm.create_model("resnet18").state_dict(), "lacks cls_token, pos_embed, .* and holds the unknown conv1.weight"),
]


@pytest.mark.parametrize(("state", "sentence"), BAD_STARTS, ids=range(len(BAD_STARTS)))
def test_starting_weights_that_do_not_fit_change_nothing(
    tmp_path: Path, state: dict[str, Tensor], sentence: str
) -> None:
    model = tiny_vit()
    before = copy_of(model)
    with pytest.raises(UserError, match=rf"bad\.pth.*{sentence}"):
        load_weights(model, save(tmp_path / "bad.pth", state))
    assert same(model.state_dict(), before)


# Pretrained weights of timm

TAG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub at an address where nothing listens."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


def put_in_cache(cache: Path, tag: str) -> Path:
    """Lay a file down as huggingface_hub does."""
    repository, revision = cache / f"models--timm--{tag}", "0" * 40
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    model = timm.create_model(tag)
    fill_state_dict(model)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    return snapshot / "model.safetensors"


def test_without_a_connection_one_sentence_comes_fast(cache: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught, explain_offline(TAG):
        timm.create_model(TAG, pretrained=True)
    assert time.monotonic() - start < 10
    for part in (TAG, str(cache), "http://127.0.0.1:9 does not answer", "--weights FILE"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.HF_HUB_OFFLINE is False


def test_cached_weights_need_no_connection_and_are_reported(cache: Path) -> None:
    file = put_in_cache(cache, TAG)
    with explain_offline(TAG):
        model = timm.create_model(TAG, pretrained=True)
    assert pretrained_report(model) == {"source": f"timm/{TAG}", "sha256": sha256_of(file)}
    wrapper = Wrapper()
    wrapper.base_model = model
    assert pretrained_report(wrapper) == pretrained_report(model)


@pytest.mark.parametrize("tag", ["vit_tiny_patch61_224", "vit_tiny_patch16_224.nonsense"])
def test_names_that_timm_does_not_know_have_their_own_sentence(cache: Path, tag: str) -> None:
    with pytest.raises(UserError, match=f"has no {tag} .*timm.list_models"), explain_offline(tag):
        timm.create_model(tag, pretrained=True)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError("disk"), KeyError("x"), KeyboardInterrupt()])
def test_other_exceptions_pass_unchanged(cache: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explain_offline("no timm name"):
        raise error
    assert caught.value is error


def test_nothing_is_asked_of_the_network_without_pretrained(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "get_session", lambda: pytest.fail("asked the network"))
    with explain_offline(TAG, pretrained=False):
        timm.create_model(TAG, depth=1)
    with pytest.raises(UserError, match="has no nonsense"), explain_offline("nonsense", pretrained=False):
        timm.create_model("nonsense")
