"""Masks and overlays: the definitions in loops, each model's own evidence, pictures, and refusals.

The released figures are in tests/parity/test_heatmap_figures.py.
"""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from formula import fill, fill_image, fill_state_dict
from small_models import transfg
from torch import Tensor

from common.errors import UserError
from ffvt.model import FFVT
from glsim.tools.heatmap import Evidence, gather, make_mask
from glsim.train_utils.pictures import overlay, squares

SIZES = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "num_layers": 4}


def evidence_of(depth: int, batch: int = 1) -> Evidence:
    tokens, *blocks = (fill(f"tokens_{block}", (batch, 17, 32)) for block in range(depth + 1))
    attention = [tuple(6 * fill(f"{name}_{block}", (batch, 3, 17, 8)) for name in "qk") for block in range(depth)]
    return Evidence(tokens, blocks, attention, 1, True, (4, 4))  # type: ignore[arg-type]


def test_numbers_left_out_mean_all_blocks_or_the_last() -> None:
    evidence = evidence_of(12)
    for name, same in (("rollout", "rollout_0_12"), ("attention", "attention_11"), ("maws", "maws_10")):
        assert torch.equal(make_mask(evidence, name), make_mask(evidence, same))
    assert torch.equal(make_mask(evidence, "rollout", released=True), make_mask(evidence, "rollout_0_11"))
    torch.testing.assert_close(make_mask(evidence, "psm"), sum(make_mask(evidence, f"psm_{head}") for head in range(3)))


# Evidence


TIMMS = {
    **{"tiny": "vit_tiny_patch16_224", "clip": "vit_base_patch16_clip_224", "deit3": "deit3_small_patch16_224"},
    **{"registers": "vit_small_patch14_reg4_dinov2", "dinov2": "vit_base_patch14_dinov2"},
    **{"distilled": "deit_tiny_distilled_patch16_224", "siglip": "vit_base_patch16_siglip_224"},
}


def small_timm(name: str) -> Any:
    torch.manual_seed(0)
    size = 56 if "patch14" in TIMMS[name] else 64
    model = timm.create_model(TIMMS[name], img_size=size, embed_dim=96, depth=3, num_heads=3, num_classes=5)
    return model.eval()


@pytest.mark.parametrize("name", TIMMS)
def test_evidence_is_what_timm_computes(name: str) -> None:
    model = small_timm(name)
    side = model.patch_embed.img_size[0]
    images = fill_image(2, 3, side, side)
    found: list[Tensor] = []
    for block in model.blocks:  # timm's own explicit attention
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        tokens = model.forward_features(images)
    evidence = gather(model, images)
    torch.testing.assert_close(evidence.tokens, tokens)
    assert len(evidence.blocks) == len(evidence.attention) == len(found) == 3
    assert make_mask(evidence, "gls").shape == (2, 16)
    for block, probabilities in enumerate(found if evidence.has_cls else []):
        expected = probabilities.mean(1)[:, 0, tokens.shape[1] - 16 :]
        torch.testing.assert_close(make_mask(evidence, f"attention_{block}"), expected)


@pytest.mark.parametrize("name", ["tiny", "registers"])
def test_definitions_in_loops(name: str) -> None:
    model = small_timm(name).double()
    side = model.patch_embed.img_size[0]
    evidence = gather(model, fill_image(1, 3, side, side).double())
    count = evidence.tokens.shape[1]
    matrices = []  # (H, N, N) of each block
    for q, k in evidence.attention:
        scores = torch.stack([q[0, h] @ k[0, h].T / q.shape[-1] ** 0.5 for h in range(q.shape[1])])
        matrices.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
    products = [torch.linalg.multi_dot([matrix[h] for matrix in reversed(matrices)]) for h in range(3)]
    rollout = torch.eye(count, dtype=torch.float64)
    for matrix in matrices:
        mixed = matrix.mean(0) + torch.eye(count)
        rollout = mixed / mixed.sum(-1, keepdim=True) @ rollout
    q, k = evidence.attention[1]
    scores = (q @ k.mT / q.shape[-1] ** 0.5)[0].exp()
    maws = (scores / scores.sum(-1, keepdim=True)).mean(0)[0] * (scores / scores.sum(-2, keepdim=True)).mean(0)[:, 0]
    cls = evidence.tokens[0, 0]
    cosine = torch.stack([cls @ token / (cls.norm() * token.norm()) for token in evidence.tokens[0]])
    expected = {"psm": sum(p[0] for p in products), "rollout": rollout[0], "maws": maws, "gls": cosine}
    expected |= {f"psm_{h}": products[h][0] for h in range(3)}
    for name, row in expected.items():
        torch.testing.assert_close(make_mask(evidence, name)[0], row[evidence.prefix :], msg=name)


def test_evidence_of_transfg_is_what_picks_its_parts() -> None:
    model, images = transfg(), fill_image(2, 3, 64, 64)
    with torch.no_grad():
        _, parts = model(images, return_selection=True)
    evidence = gather(model, images)
    assert (evidence.grid, len(evidence.blocks)) == ((5, 5), 3)
    picked = torch.stack([make_mask(evidence, f"psm_{head}").argmax(-1) + 1 for head in range(3)], dim=1)
    assert torch.equal(picked, parts)


def test_evidence_of_ffvt_is_what_picks_its_tokens() -> None:
    model = FFVT(SIZES, 64, 10, feature_fusion=True, num_token=3).eval()
    fill_state_dict(model)
    images = fill_image(2, 3, 64, 64)
    with torch.no_grad():
        _, selection = model(images, return_selection=True)
    evidence = gather(model, images)
    for block, indices in enumerate(selection):  # CLS is never picked here
        assert torch.equal(make_mask(evidence, f"maws_{block}").topk(3).indices + 1, indices)
    with pytest.raises(UserError, match="from 0 to 2"):
        make_mask(evidence, "maws_3")
    plain = gather(FFVT(SIZES, 64, 10, feature_fusion=False).eval(), images)
    assert len(plain.blocks) == 4


# Refusals


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((f"{kind}_12", "from 0 to 11") for kind in ("attention", "glsim", "maws")),
        ("psm_3", "from 0 to 2"),
        *((f"rollout_{numbers}", "from 1 to 12") for numbers in ("0", "13", "0_13")),
        ("rollout_3_3", "from 4 to 12"),
        ("rollout_12_13", "from 0 to 11"),
        *((f"attention_{word}", f"'{word}'") for word in ("-1", "last")),
        *((word, f"no mask '{word}'") for word in ("attention_1_2", "glsim", "grad_cam", "")),
    ],
)
def test_masks_that_there_are_not(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_mask(evidence_of(12), name)


# Pictures


def test_the_overlay_lies_where_the_patch_is() -> None:
    mask = np.zeros((3, 5))
    mask[0, 4] = 1  # above on the right
    picture = overlay(np.full((48, 80, 3), 100, np.uint8), mask)
    assert picture.shape == (48, 80, 3)
    np.testing.assert_array_equal(picture[0, -1], [114, 50, 50])  # half of it, and half of JET's dark red
    np.testing.assert_array_equal(picture[-1, 0], [50, 50, 114])  # and of its dark blue
    plain = squares(picture, mask)
    assert (plain[:16, 64:] == plain[0, -1]).all()  # the whole patch
    assert (plain[16:] == plain[-1, 0]).all()


def test_jet_is_opencvs() -> None:
    levels = np.arange(256).reshape(16, 16)
    drawn = squares(np.zeros((16, 16, 3), np.uint8), levels).reshape(256, 3)
    x = np.arange(256)[:, None] / 255
    np.testing.assert_allclose(drawn, 255 * np.clip(1.5 - np.abs(4 * x - [3, 2, 1]), 0, 1), atol=1.01)
