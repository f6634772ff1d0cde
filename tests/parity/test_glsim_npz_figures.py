"""Google's .npz files in GLSim's models and in TransFG, against the figures of the released conversions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import assert_close_at, assert_close_to_figures, assert_within, build_filled, filled, golden
from formula import fill_image, fill_npz, vit_spec
from torch import Tensor

from common.train.loop import logits_of
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.model_utils.transfg import CONFIGS, TransFG

GLSIM, TRANSFG = golden("glsim")["npz"], golden("transfg")
TINY = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "num_layers": 4}
METHOD = {"dynamic_anchor": True, "anchor_class_token": True, "reducer": "cls"}
METHOD |= {"aggregator": True, "aggregator_norm": True}
MODELS: dict[str, dict[str, Any]] = {
    "tiny_method": {"model_name": "vit_t16", "num_hidden_layers": 4, **METHOD, "dynamic_top": 4},
    "b16_method": {"model_name": "vit_b16", **METHOD, "dynamic_top": 8},
    "b16_plain": {"model_name": "vit_b16"},
}
# Each with the head that the models were recorded with.
SPECS = {
    "glsim tiny": vit_spec(192, 3, 768, 4, 6, 100),
    "transfg tiny": vit_spec(),
    "b16": vit_spec(768, 12, 3072, 12, 14),
}
SUMS = 5e-7  # recorded in float32
LOGITS = 5e-5  # 12 blocks, each off by the rounding of float32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    found = {name: tmp_path_factory.mktemp("npz") / f"{name}.npz" for name in SPECS}
    for name, path in found.items():
        fill_npz(path, SPECS[name])
    yield found
    found["b16"].unlink()  # 340 MB
    filled.cache_clear()


def load(model: Any, file: Path) -> tuple[dict[str, Tensor], list[str], set[str]]:
    """Load the file; return the released entries, those of them that stayed, and our names of these."""
    report, state = model.load_npz(file), model.released_state_dict()
    assert {*report.loaded, *report.left} == set(model.state_dict())
    left = [key for key, value in state.items() if torch.equal(value, filled(key, (*value.shape,)))]
    return state, left, set(report.left)


def assert_logits(model: Any, size: int, recorded: list[list[float]]) -> None:
    rows = 2 if size < 448 else 1  # one image is enough where it takes seconds
    with torch.no_grad():
        logits = logits_of(model(fill_image(rows, 3, size, size)))
    assert_within(LOGITS, logits, recorded[:rows])


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, figures in GLSIM.items() for size in figures["sizes"]]
)
def test_glsim(files: dict[str, Path], name: str, size: str) -> None:
    figures, at_size = GLSIM[name], GLSIM[name]["sizes"][size]
    config = ViTConfig(**MODELS[name], num_classes=10, image_size=int(size))
    model = build_filled(lambda: ViTGLSim(config))
    state, left, names = load(model, files["b16" if name.startswith("b16") else "glsim tiny"])
    for key, chk in figures["params"].items():
        assert_close_to_figures(state[key], chk, sums=SUMS, what=key)
    position = state["positional_embedding.pos_embedding"]
    assert_close_to_figures(position, at_size["position"], sums=SUMS)
    assert_close_at(position[0], at_size["position_at"], 1e-6)
    assert left == [key for key in figures["left"] if key != "anchor_class_token"]
    assert names == {key for key in model.state_dict() if key.startswith(("aggregator", "head"))}
    if model.anchor_class_token is not None:
        assert torch.equal(model.anchor_class_token, model.base_model.cls_token)
    if size == min(figures["sizes"], key=int):  # as in the file, nothing is resized
        loaded = [value.double() for key, value in state.items() if key not in figures["left"]]
        total = figures["all_params_abs_sum"]
        assert_within(1e-8 * total, sum(value.sum().item() for value in loaded), figures["all_params_sum"])
        assert_within(1e-8 * total, sum(value.abs().sum().item() for value in loaded), total)
    assert_logits(model, int(size), at_size["logits"])


@pytest.mark.parametrize("name", TRANSFG["npz"])
def test_transfg(files: dict[str, Path], name: str) -> None:
    file, side, split = name.split("_")
    config = TINY if file == "tiny" else CONFIGS["ViT-B_16"]
    model = build_filled(lambda: TransFG(config, int(side), 10, slide_step=12 if split == "overlap" else None))
    state, left, names = load(model, files["b16" if file == "b16" else "transfg tiny"])
    for key, chk in TRANSFG["npz"][name]["params"].items():
        assert_close_to_figures(state[key], chk, sums=SUMS, what=key)
    assert left == TRANSFG["npz_left"]
    part_layer = f"base_model.blocks.{len(model.base_model.blocks) - 1}."
    assert names == {key for key in model.state_dict() if key.startswith((part_layer, "base_model.head."))}
    assert_logits(model, int(side), TRANSFG["npz"][name]["logits"])
