"""What holds of every model on a timm ViT: GFT on both sides, and the repository's TransFG."""

import copy

import pytest
import torch
from tiny_timm import BUILDS, DEIT, TINY, VIT, images, tiny

from common.errors import UserError
from common.models import GFT, TransFG

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


@pytest.fixture
def shallow(monkeypatch):
    """Two ViT blocks instead of eight, for tests whose time is the tracing of blocks that are all alike."""
    for module in ("gft", "transfg"):
        monkeypatch.setattr(f"common.models.{module}.DEPTH", 2)
    return {"depth": 3}


@ALL
def test_compiles_into_one_graph(name, shallow):
    torch.compiler.reset()
    model = tiny(name, **shallow)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(), True), eager(images(), True), rtol=0, atol=1e-5)
    for batch in (images(), images().flip(3)):
        logits = compiled.train()(batch)
        torch.testing.assert_close(logits, eager.train()(batch), rtol=0, atol=1e-5)
        logits.square().sum().backward()
    if name != "transfg":
        assert len(model.training_state()) == {"described": 2, "released": 0}[name]
        torch.testing.assert_close(model.training_state(), eager.training_state(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["described", "released"])
def test_exports_with_a_dynamic_batch(name, shallow):
    model = tiny(name, **shallow)
    dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=64)}, "return_selection": None}
    program = torch.export.export(model, (images(3), True), dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(images(5), True), model(images(5), True), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "backbone", "changes", "named"),
    [
        (GFT, "no_such_vit", {}, "'no_such_vit' is unknown to timm"),
        (GFT, "vit_base_patch16_224.no_such_tag", {}, "no_such_tag"),
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
    sizes = TINY if backbone.startswith("vit_base") and "no_such" not in backbone else {}
    with pytest.raises(UserError, match=named):
        build(backbone, **{**sizes, **changes})
