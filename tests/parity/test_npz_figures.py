"""Google's .npz files against the figures recorded of the released loader (FFVT) and the released converter (GLSim)."""

import re
from pathlib import Path

import pytest
import torch
from figures import assert_close_at, assert_close_to_figures, assert_within, golden
from formula import fill, fill_image, fill_npz, npz_array, tiny_vit, vit_spec
from torch import Tensor

from common.weights import load_npz
from common.weights.google_npz import google_to_timm, resize_position_embedding
from ffvt.model import FFVT, Config

GOLDEN = golden("npz")
CONVERTED = GOLDEN["glsim_tiny"]
PARTS = ("proj_q", "proj_k", "proj_v")
GLSIM_NAMES = {
    r"^patch_embedding\.": "patch_embed.proj.",
    "^class_token$": "cls_token",
    r"^positional_embedding\.pos_embedding$": "pos_embed",
    r"^encoder\.blocks\.": "blocks.",
    r"^encoder_norm\.": "norm.",
    r"(?<=\d)\.proj\.": ".attn.proj.",
    r"\.pwff\.": ".mlp.",
    r"\.attn\.proj_[qkv]\.": ".attn.qkv.",
}


@pytest.mark.parametrize("img_size", GOLDEN["ffvt_tiny"])
def test_parameters_and_logits_of_the_loader(tmp_path: Path, img_size: str) -> None:
    recorded, model = GOLDEN["ffvt_tiny"][img_size], tiny_vit(int(img_size))
    named = FFVT(Config(48, 96, 3, 4), int(img_size), 10, feature_fusion=False)
    named.base_model = model
    fill_npz(tmp_path / "tiny.npz", vit_spec())
    assert load_npz(model, tmp_path / "tiny.npz").left == ()
    found = named.released_state_dict()
    for name, figures in recorded["params"].items():
        if name != "head.weight":  # zeroed there, filled here
            assert_close_to_figures(found[name], figures, what=name)
    with torch.no_grad():
        for name, parameter in model.head.named_parameters(prefix="head"):
            parameter.copy_(fill(name, parameter.shape))
        assert_within(5e-5, model(fill_image(2, 3, int(img_size), int(img_size))), recorded["logits"])


@pytest.fixture(scope="module")
def converted() -> dict[str, Tensor]:
    arrays = {key: npz_array(key, shape) for key, shape in vit_spec(192, 3, 768, 4, 6, 100).items()}
    return {name: tensor for name, tensor in google_to_timm(arrays).items() if not name.startswith("head.")}


@pytest.mark.parametrize("name", CONVERTED["params"])
def test_parameters_of_the_converter(converted: dict[str, Tensor], name: str) -> None:
    ours, module = name, name.split(".")[-2:][0]  # of class_token and the position embedding, nothing that matters
    for theirs, own in GLSIM_NAMES.items():
        ours = re.sub(theirs, own, ours)
    tensor = converted[ours].chunk(3)[PARTS.index(module)] if module in PARTS else converted[ours]
    assert_close_to_figures(tensor, CONVERTED["params"][name])


def test_all_parameters_of_the_converter(converted: dict[str, Tensor]) -> None:
    """Queries, keys and values are three entries there."""
    assert sum(3 if ".qkv." in key else 1 for key in converted) == CONVERTED["n"]
    flat = torch.cat([value.double().flatten() for value in converted.values()])
    assert_within(1e-7 * CONVERTED["abs_sum"], flat.sum(), CONVERTED["sum"])
    assert_within(1e-7 * CONVERTED["abs_sum"], flat.abs().sum(), CONVERTED["abs_sum"])


@pytest.mark.parametrize("grid", CONVERTED["position"])
def test_position_embeddings_of_the_converter(grid: str) -> None:
    arrays = {key: npz_array(key, shape) for key, shape in vit_spec(192, 3, 768, 1, 6).items()}
    position = resize_position_embedding(google_to_timm(arrays)["pos_embed"], (int(grid), int(grid)))
    assert_close_to_figures(position, CONVERTED["position"][grid])


@pytest.mark.parametrize("grid", GOLDEN["position_768"])
def test_position_embeddings_of_vit_b16(grid: str) -> None:
    key = "Transformer/posembed_input/pos_embedding"
    position = resize_position_embedding(torch.from_numpy(npz_array(key, (1, 197, 768))), (int(grid), int(grid)))
    assert_close_to_figures(position, GOLDEN["position_768"][grid]["chk"])
    assert_close_at(position[0], GOLDEN["position_768"][grid]["probe"], 1e-6)
