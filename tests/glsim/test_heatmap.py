"""Masks and overlays: the released figures, the definitions in loops, timm's own attention, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from formula import check_figures, fill, fill_image, fill_state_dict, tiny_vit
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError
from ffvt.model import FFVT
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.model_utils.timm_glsim import GLSimTimm
from glsim.model_utils.transfg import TransFG
from glsim.tools.heatmap import (
    MASKS,
    Evidence,
    beside,
    draw,
    gather,
    make_mask,
    overlay,
    save,
    squares,
    to_picture,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "heatmap.json").read_text())
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {
    **{"model_name": "vit_t16", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
    **{"num_hidden_layers": 3, "num_classes": 10, "image_size": 64, "dynamic_anchor": True, "dynamic_top": 3},
}
SIZES = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "num_layers": 4}
RELEASED_ONLY = ("rollout", "psm_1", "attention", "attention_11")  # what the default computes as its name says


def recorded(depth: int, key: str = "scores", batch: int = 1) -> Evidence:
    """The recorded inputs: raw scores are those of these queries and of unit vectors as keys."""
    scores = [6 * fill(f"{key}_{block}", (batch, 3, 17, 17)) for block in range(depth)]
    keys = torch.eye(17).expand(batch, 3, 17, 17)
    tokens = fill("btokens" if key == "bscores" else "tokens", (batch, 17, 32))
    blocks = [fill(f"tokens_{block}", (batch, 17, 32)) for block in range(depth)]
    return Evidence(tokens, blocks, [(some * 17**0.5, keys) for some in scores], 1, True, (4, 4))


def close(mask: Tensor, figures: Any) -> None:
    torch.testing.assert_close(mask, torch.tensor(figures).view_as(mask), rtol=0, atol=1e-6)


def one(mask: Tensor) -> np.ndarray:
    return mask[0].view(4, 4).numpy()


def wrapped_picture() -> np.ndarray:
    """The recorded image, whose levels beyond 0..255 wrap around as in the released program."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return ((fill_image(1, 3, 64, 64)[0] * std + mean) * 255).long().numpy().astype(np.uint8).transpose(1, 2, 0)


def assert_picture(picture: np.ndarray, figures: dict[str, Any], off: float) -> None:
    """Compare with a recorded picture, from which a level may be `off` by so much on average, and by 1 at most."""
    ours = check_figures(torch.from_numpy(picture.astype(np.float64)))
    assert ours["shape"] == figures["shape"]
    for name in ("sum", "wsum"):
        assert abs(ours[name] - figures[name]) <= off * picture.size, name
    assert abs(ours["l2"] - figures["l2"]) <= off * picture.size**0.5
    np.testing.assert_allclose(picture.ravel()[:8], figures["first"], rtol=0, atol=1 if off > 0.01 else 0)


# The released figures


@pytest.mark.parametrize("name", GOLDEN["masks"])
def test_released_masks(name: str) -> None:
    mask = make_mask(recorded(12), name, released=True)
    assert mask.shape == (1, 16)
    close(mask, GOLDEN["masks"][name])
    # The picture, of which OpenCV's resize makes every level a little different.
    assert_picture(overlay(wrapped_picture(), one(mask)), GOLDEN["images"][name], off=0.1)


@pytest.mark.parametrize("name", GOLDEN["masks"])
def test_masks_that_were_right_are_the_default(name: str) -> None:
    same = torch.allclose(make_mask(recorded(12), name), torch.tensor(GOLDEN["masks"][name]), rtol=0, atol=1e-6)
    assert same == (name not in RELEASED_ONLY)


@pytest.mark.parametrize("depth", ["4", "3", "1"])
def test_rollout_until(depth: str) -> None:
    close(make_mask(recorded(4), f"rollout_{depth}"), GOLDEN["rollout_of_4"][depth])
    close(make_mask(recorded(4), f"rollout_0_{depth}"), GOLDEN["rollout_of_4"][depth])


def test_rollout_takes_all_blocks_and_the_released_one_eleven() -> None:
    evidence = recorded(12)
    assert torch.equal(make_mask(evidence, "rollout"), make_mask(evidence, "rollout_0_12"))
    assert torch.equal(make_mask(evidence, "rollout", released=True), make_mask(evidence, "rollout_0_11"))


def test_psm_of_a_head_is_that_head() -> None:
    for head, row in enumerate(GOLDEN["psm_of_4_rows"]):
        close(make_mask(recorded(4), f"psm_{head}"), row)
        close(make_mask(recorded(4), f"psm_{head}", released=True), GOLDEN["psm_of_4"][str(head)])
    close(make_mask(recorded(4), "psm"), GOLDEN["psm_of_4"]["0"])


def test_attention_is_that_of_cls_over_all_heads() -> None:
    close(make_mask(recorded(4), "attention_0"), GOLDEN["attention_of_4_meant"])
    for block, figures in GOLDEN["attention_of_4"].items():
        close(make_mask(recorded(4), f"attention_{block}", released=True), figures)
    assert torch.equal(make_mask(recorded(4), "attention"), make_mask(recorded(4), "attention_3"))


def test_maws_and_asim() -> None:
    for block, figures in GOLDEN["maws_of_4"].items():
        close(make_mask(recorded(4), f"maws_{block}"), figures)
    close(make_mask(recorded(4), "asim"), GOLDEN["asim_of_4"])


def test_masks_of_a_batch() -> None:
    evidence = recorded(4, "bscores", batch=2)
    figures = GOLDEN["vis_dfsm"]
    for name in ("rollout", "rollout_2", "rollout_1_3", "attention_3"):
        close(make_mask(evidence, name), figures[name])
    close(make_mask(evidence, "attention_0"), figures["attention"])  # as released, where no number says so
    close(make_mask(evidence, "gls"), figures["gls_with_cls"])


@pytest.mark.parametrize("name", MASKS)
def test_images_of_a_batch_do_not_see_each_other(name: str) -> None:
    whole = recorded(4, "bscores", batch=2)
    second = Evidence(
        whole.tokens[1:], [x[1:] for x in whole.blocks], [(q[1:], k[1:]) for q, k in whole.attention], 1, True, (4, 4)
    )
    torch.testing.assert_close(make_mask(whole, name)[1:], make_mask(second, name))


@pytest.mark.parametrize("name", GOLDEN["apply_mask"])
def test_released_overlays(name: str) -> None:
    top, power, color = (word[-1] == "1" for word in name.split("_"))
    mask = one(make_mask(recorded(4), "glsim_norm"))
    picture = overlay(wrapped_picture(), mask, power, 8 if top else None, color, released=True)
    assert_picture(picture, GOLDEN["apply_mask"][name], off=0.03 if color else 1e-5)


@pytest.mark.parametrize(("name", "mean_std"), [("", IMAGENET), ("_custom", ((0.5,) * 3, (0.5,) * 3))])
def test_pictures_are_clipped(name: str, mean_std: Any) -> None:
    picture = to_picture(fill_image(1, 3, 64, 64)[0], *mean_std)
    assert picture.shape == (64, 64, 3)
    first = np.array(GOLDEN[f"inverse_normalize{name}"]["first"]).clip(0, 1) * 255
    np.testing.assert_array_equal(picture[0, :8, 0], np.rint(first))
    assert (wrapped_picture() != picture).any()


# Evidence


def small_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    kwargs = {"img_size": 56, "embed_dim": 96, "depth": 3, "num_heads": 3, "num_classes": 5}
    models: dict[str, nn.Module] = {"tiny": tiny_vit(depth=3)}
    for name in ("vit_small_patch14_reg4_dinov2", "vit_base_patch14_dinov2"):
        models[name] = timm.create_model(name, **kwargs)
    models["clip"] = timm.create_model("vit_base_patch16_clip_224", **kwargs | {"img_size": 64})
    models["deit3"] = timm.create_model("deit3_small_patch16_224", **kwargs | {"img_size": 64})
    models["distilled"] = timm.create_model("deit_tiny_distilled_patch16_224", **kwargs | {"img_size": 64})
    models["siglip"] = timm.create_model("vit_base_patch16_siglip_224", **kwargs | {"img_size": 64})
    return {name: model.eval() for name, model in models.items()}


@pytest.mark.parametrize(("name", "model"), small_models().items(), ids=str)
def test_evidence_is_what_timm_computes(name: str, model: Any) -> None:
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
    if model.cls_token is None:
        return
    prefix = tokens.shape[1] - 16
    for block, probabilities in enumerate(found):
        mask = make_mask(evidence, f"attention_{block}")
        torch.testing.assert_close(mask, probabilities.mean(1)[:, 0, prefix:])


@pytest.mark.parametrize("model", [small_models()["tiny"], small_models()["vit_small_patch14_reg4_dinov2"]])
def test_definitions_in_loops(model: Any) -> None:
    model = model.double()
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


def test_evidence_of_vit_glsim_is_what_it_hands_out() -> None:
    torch.manual_seed(0)
    model = ViTGLSim(ViTConfig(**SMALL)).eval()  # type: ignore[arg-type]
    images = fill_image(2, 3, 64, 64)
    with torch.no_grad():
        _, _, tokens, blocks, probabilities, _ = model(images, ret_dist=True)
    evidence = gather(model, images)
    torch.testing.assert_close(evidence.tokens, tokens)
    for ours, theirs in zip(evidence.blocks, blocks, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(make_mask(evidence, "attention_1"), probabilities[1].mean(1)[:, 0, 1:])
    similarity = model.select(tokens).similarity
    torch.testing.assert_close(make_mask(evidence, "glsim_norm"), similarity)


@pytest.mark.parametrize("name", ["glsvit_tiny_patch16_224", "glsvit_base_patch16_siglip_224"])
def test_evidence_of_a_timm_model_with_adapters(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 96, "depth": 2, "num_heads": 3}
    model = GLSimTimm(name, num_classes=5, image_size=64, dynamic_anchor=True, adapter="bottleneck", model_kwargs=sizes)
    fill_state_dict(model)
    model.eval()
    images = fill_image(2, 3, 64, 64)
    with torch.no_grad():
        _, _, tokens, blocks, *_ = model(images, ret_dist=True)
    evidence = gather(model, images)
    torch.testing.assert_close(evidence.tokens, tokens)
    torch.testing.assert_close(evidence.blocks[-1], blocks[-1])
    torch.testing.assert_close(make_mask(evidence, "gls"), model.select(tokens).similarity)


def test_evidence_of_transfg_is_what_picks_its_parts() -> None:
    model = TransFG(SIZES, 64, 10, slide_step=12).eval()
    fill_state_dict(model)
    images = fill_image(2, 3, 64, 64)
    with torch.no_grad():
        _, parts = model(images, return_selection=True)
    evidence = gather(model, images)
    assert evidence.grid == (5, 5)
    assert len(evidence.blocks) == 3
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
        ("attention_12", "'attention_12': expected a number from 0 to 11"),
        ("glsim_12", "from 0 to 11"),
        ("maws_12", "from 0 to 11"),
        ("psm_3", "from 0 to 2"),
        ("rollout_0", "from 1 to 12"),
        ("rollout_13", "from 1 to 12"),
        ("rollout_0_13", "from 1 to 12"),
        ("rollout_3_3", "from 4 to 12"),
        ("rollout_12_13", "from 0 to 11 in place of '12'"),
        ("attention_-1", "in place of '-1'"),
        ("attention_last", "in place of 'last'"),
        ("attention_1_2", "no mask 'attention_1_2': expected gls, glsim_norm"),
        ("glsim", "no mask 'glsim': expected gls"),
        ("grad_cam", r"rollout_FROM_TO, psm\[_HEAD\]"),
        ("", "no mask ''"),
    ],
)
def test_masks_that_there_are_not(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_mask(recorded(12), name)


def test_models_without_cls_have_similarity_alone() -> None:
    model = timm.create_model("vit_base_patch16_siglip_224", img_size=64, embed_dim=96, depth=2, num_heads=3).eval()
    evidence = gather(model, fill_image(2, 3, 64, 64))
    patches = evidence.tokens
    expected = torch.cosine_similarity(patches.mean(1, keepdim=True), patches, dim=-1)
    torch.testing.assert_close(make_mask(evidence, "gls"), expected)
    for name in MASKS[1:]:
        with pytest.raises(UserError, match=f"'{name}' reads the attention of CLS"):
            make_mask(evidence, name)


@pytest.mark.parametrize(
    "model",
    [
        timm.create_model("resnet18", num_classes=2),
        timm.create_model("beit_base_patch16_224", depth=1, num_classes=2),
        timm.create_model("vit_relpos_small_patch16_224", depth=1, num_classes=2),
        timm.create_model(
            "vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ParallelScalingBlock
        ),
    ],
    ids=["convolutions", "beit", "relative positions", "other blocks"],
)
def test_models_without_plain_blocks_are_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match=f"{type(model).__name__} is none; leave --vis_mask out"):
        gather(model.eval(), torch.zeros(1, 3, 224, 224))


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


def test_without_colour_the_mask_darkens() -> None:
    picture = np.full((32, 32, 3), 200, np.uint8)
    mask = np.array([[-0.5, 0.5], [-0.5, 0.5]])
    drawn = overlay(picture, mask, color=False)
    assert drawn[:, 0].max() == 0
    assert drawn[:, -1].min() == 255
    top = overlay(picture, np.array([[1.0, 4.0], [2.0, 3.0]]), top=2, color=False)  # an error as released
    assert top[0, 0].max() == 0
    assert top[0, -1].min() == top[-1, -1].min() == 255


def test_power_and_top() -> None:
    picture = np.zeros((2, 2, 3), np.uint8)
    mask = np.array([[0.0, 0.5], [0.25, 1.0]])
    np.testing.assert_array_equal(overlay(picture, mask, power=True), overlay(picture, mask**4))
    np.testing.assert_array_equal(overlay(picture, mask, top=2), overlay(picture, np.array([[0, 1], [0, 1]])))
    np.testing.assert_array_equal(overlay(picture, mask, top=99), overlay(picture, np.ones((2, 2))))


def test_figures_and_files(tmp_path: Path) -> None:
    left, right = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 9, np.uint8)
    pair = beside([left, right])
    assert pair.shape == (64, 129, 3)
    assert (pair[:, 64] == 255).all()
    assert (pair[:, 65:] == 9).all()
    assert beside([left, right], axis=0).shape == (129, 64, 3)
    path = tmp_path / "a" / "b.png"
    save(pair, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pair)
    figure = draw([("one", left), ("two", right), ("three", left)], 2, "title")
    assert [axes.get_title() for axes in figure.axes] == ["one", "two", "three"]
    save(figure, path)
    with Image.open(path) as image:
        assert image.width > 500
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be made \(.*\): see --results_dir"):
        save(pair, tmp_path / "file" / "b.png")
