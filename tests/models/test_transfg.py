"""The GFT repository's "TransFG" against its definition written out."""

import pytest
import torch
import torch.nn.functional as F
from tiny_timm import VIT, images, plain_attention, tiny


def test_layer_norms_of_the_new_blocks_have_torchs_epsilon():
    model = tiny("transfg")
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


@pytest.mark.parametrize(("backbone", "size"), [(VIT, (32, 32)), ("vit_small_patch14_reg4_dinov2", (24, 32))])
@torch.no_grad()
def test_equals_the_direct_formulation_in_float64(backbone, size):
    model = tiny("transfg", backbone, img_size=size).double()
    logits, selection = model(images(2, size).double(), return_selection=True)
    expected, kept = reference(model, images(2, size).double())
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert selection.indices.tolist() == kept


@torch.no_grad()
def test_the_scorer_reaches_the_logits_and_later_blocks_do_not():
    model = tiny("transfg")
    logits = model(images())
    for parameter in model.base_model.parameters():
        if not parameter.requires_grad:
            parameter.normal_()
    assert torch.equal(model(images()), logits)
    model.part_select[0].weight.neg_()
    assert (model(images()) - logits).abs().max() > 1e-3
