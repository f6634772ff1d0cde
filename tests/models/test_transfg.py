import copy

import pytest
import torch
import torch.nn.functional as F
from formula import fill_image, fill_state_dict
from parity import GOLDEN, LABELS, TINY, assert_figures, plain_attention, state_dict_figures

from common.errors import UserError
from common.models import TransFG

RECORDED = GOLDEN["transfg"]


def tiny(backbone="vit_base_patch16_224", num_parts=20, **changes):
    model = TransFG(backbone, num_parts=num_parts, **{**TINY, **changes})
    fill_state_dict(model)
    return model.eval()


def images(batch=2, size=(32, 32)):
    return fill_image(batch, 3, *size)


def test_full_size_equals_the_released_class():
    model = TransFG(num_classes=10, weight_init="skip")
    fill_state_dict(model)
    logits, selection = model.eval()(fill_image(2, 3, 224, 224), return_selection=True)
    torch.testing.assert_close(logits, torch.tensor(RECORDED["eval_logits"]), atol=5e-5, rtol=0)
    for scores, chk in zip(selection.scores, RECORDED["part_scores"], strict=True):
        assert_figures(scores, chk, rtol=1e-3, atol=1e-3)
    assert selection.indices[0].tolist() == RECORDED["selected_sample0"]

    loss = F.cross_entropy(logits, LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(RECORDED["loss"], abs=1e-5)
    parameters = dict(model.named_parameters())
    for name, chk in RECORDED["grads"].items():
        assert parameters[name].grad.double().norm().item() == pytest.approx(chk["norm"], rel=1e-5), name


def test_names_shapes_and_order_of_the_state_dict_are_the_released_ones():
    assert state_dict_figures(TransFG(num_classes=10, weight_init="skip")) == RECORDED["state_dict"]


@pytest.mark.parametrize("num_classes", [100, 101, 80])
def test_parameter_counts_are_the_released_ones(num_classes):
    model = TransFG(num_classes=num_classes, weight_init="skip")
    assert sum(p.numel() for p in model.parameters()) == RECORDED["param_counts"][str(num_classes)]


def test_layer_norms_of_the_new_blocks_have_torchs_epsilon():
    model = TransFG(**TINY, num_parts=20)
    assert {norm.eps for block in model.local_blocks for norm in (block.norm1, block.norm2)} == {1e-5}
    assert model.base_model.blocks[0].norm1.eps == 1e-6


@torch.no_grad()
def reference(model, batch):
    """Return logits and kept patches per image, by the definition: full attention matrices, a loop over images."""
    patches, prefix = model.base_model.forward_intermediates(
        batch, indices=[7], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[0]
    hidden, _, out = model.part_select
    logits, kept = [], []
    for image in range(len(batch)):
        scores = (patches[image] @ hidden.weight.T + hidden.bias).clamp(min=0) @ out.weight[0] + out.bias
        order = sorted(range(len(scores)), key=lambda i: -scores[i].item())[: model.num_parts]
        x = torch.cat((prefix[image, :1], patches[image][order]))
        for block in model.local_blocks:
            x = x + plain_attention(block.attn, F.layer_norm(x, x.shape[-1:], *block.norm1.parameters()))[0]
            y = F.layer_norm(x, x.shape[-1:], *block.norm2.parameters())
            y = F.gelu(y @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
            x = x + y @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        logits.append(model.classifier(x[0]))
        kept.append(order)
    return torch.stack(logits), kept


@pytest.mark.parametrize(
    ("backbone", "size"), [("vit_base_patch16_224", (32, 32)), ("vit_small_patch14_reg4_dinov2", (24, 32))]
)
@torch.no_grad()
def test_equals_the_direct_formulation_in_float64(backbone, size):
    model = tiny(backbone, img_size=size).double()
    logits, selection = model(images(2, size).double(), return_selection=True)
    expected, kept = reference(model, images(2, size).double())
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert selection.indices.tolist() == kept


def test_scorer_and_later_blocks_get_no_gradient_and_all_others_do():
    model = tiny("deit_tiny_distilled_patch16_224")
    behind = ("base_model.blocks.8.", "base_model.norm.", "base_model.head.", "base_model.head_dist.", "part_select.")
    expected = {name for name, _ in model.named_parameters() if name.startswith(behind)}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == expected
    model(images()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == expected


@torch.no_grad()
def test_the_scorer_reaches_the_logits_and_later_blocks_do_not():
    model = tiny()
    logits = model(images())
    for name, parameter in model.base_model.named_parameters():
        if not parameter.requires_grad:
            model.base_model.get_parameter(name).normal_()
    assert torch.equal(model(images()), logits)
    model.part_select[0].weight.neg_()
    assert (model(images()) - logits).abs().max() > 1e-3


@torch.no_grad()
def test_evaluation_at_batch_1_equals_the_rows_of_a_batch():
    model, batch = tiny().double(), images(3).double()
    logits, selection = model(batch, return_selection=True)
    for row in range(3):
        alone, selection_alone = model(batch[row : row + 1], return_selection=True)
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-10, atol=1e-10)
        assert torch.equal(selection_alone.indices[0], selection.indices[row])


def test_bfloat16_autocast_trains_with_float32_scores():
    model = tiny().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, selection = model(images(), return_selection=True)
    assert selection.scores.dtype == torch.float32
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_gradient_checkpointing_changes_nothing():
    plain, saving = tiny().train(), tiny().train()
    saving.set_grad_checkpointing()
    assert saving.base_model.grad_checkpointing
    for model in (plain, saving):
        model(images()).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr("common.models.transfg.DEPTH", 2)  # tracing time grows with blocks that are all alike
    torch.compiler.reset()
    model = tiny(depth=3)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(), True), eager(images(), True))
    logits = compiled.train()(images())
    torch.testing.assert_close(logits, eager.train()(images()))
    logits.square().sum().backward()


@pytest.mark.parametrize(
    ("backbone", "changes", "message"),
    [
        ("no_such_vit", {}, "'no_such_vit' is unknown to timm"),
        ("resnet18", {}, "'resnet18' cannot be built"),
        ("vit_base_patch16_224", {**TINY, "depth": 8}, "has 8 blocks: a timm VisionTransformer with a CLS token"),
        ("vit_base_patch16_224", TINY, "num_parts 100 must lie between 1 and the 64 patches"),
    ],
)
def test_a_backbone_that_cannot_serve_is_refused(backbone, changes, message):
    with pytest.raises(UserError, match=message):
        TransFG(backbone, **changes)
