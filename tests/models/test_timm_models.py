"""What holds of every model on a timm ViT: GFT on both sides, and the repository's TransFG."""

import pytest
import torch
from tiny_timm import BUILDS, DEIT, TINY, VIT, images, tiny

from common.errors import UserError
from gft import GFT, TransFG

ALL = pytest.mark.parametrize("name", BUILDS)


@ALL
def test_only_parameters_that_can_get_a_gradient_require_one(name):
    model = tiny(name, DEIT)
    unread = ["base_model.blocks.8.", "base_model.norm.", "base_model.head.", "base_model.head_dist.", "part_select."]
    unread += ["hierarchical_blocks."] if name == "released" else [f"hierarchical_blocks.{i}.smooth." for i in range(3)]
    expected = {key for key, _ in model.named_parameters() if key.startswith(tuple(unread))}
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == expected
    model(images()).square().sum().backward()
    assert {key for key, p in model.named_parameters() if p.grad is None} == expected


@ALL
def test_bfloat16_autocast_trains_with_float32_scores(name):
    model = tiny(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, selection = model(images(), return_selection=True)
    scores = [selection.scores] if name == "transfg" else [stage.importance for stage in selection]
    assert {tensor.dtype for tensor in scores} == {torch.float32}
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@ALL
def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(name):
    plain, saving = tiny(name).train(), tiny(name).train()
    saving.set_grad_checkpointing()
    calls = []
    saving.base_model.blocks[7].norm1.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        model(images()).square().sum().backward()
    assert len(calls) == 2
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.requires_grad:  # the same sums in the same order
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6 * a.grad.abs().max().item(), msg=key)


@pytest.mark.parametrize(
    ("build", "backbone", "changes", "named"),
    [
        (GFT, "resnet18", {}, "'resnet18'"),
        (GFT, "swin_tiny_patch4_window7_224", {"img_size": 224}, "SwinTransformer"),
        (GFT, "vit_base_patch16_siglip_224", {}, "no CLS token"),
        (GFT, VIT, {"depth": 8}, "8 blocks"),
        (TransFG, VIT, {"depth": 8}, "8 blocks"),
        (GFT, VIT, {"img_size": (32, 30)}, r"img_size \(32, 30\)"),
        (GFT, VIT, {"img_size": (4, 8)}, r"img_size \(4, 8\) .* 4 patches"),
        (TransFG, VIT, {}, "num_parts 100 .* 64 patches"),
    ],
)
def test_a_backbone_that_cannot_serve_is_refused(build, backbone, changes, named):
    sizes = TINY if backbone.startswith("vit_base") else {}
    with pytest.raises(UserError, match=named):
        build(backbone, **{**sizes, **changes})
