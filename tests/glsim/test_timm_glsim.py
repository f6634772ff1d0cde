"""glsim.model_utils.timm_glsim: timm's own models, the method written out, each option, and refusals.

What it shares with the other models is in test_glsim_families.py, the released figures in tests/parity.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import fill
from small_models import METHOD, NAMES, SIZES, WITH_CLS, WITHOUT_CLS, images_for
from small_models import timm_glsim as build
from torch import nn

from glsim.model_utils.glsim import bounding_boxes, crop
from glsim.model_utils.timm_glsim import GLSimTimm

KINDS = pytest.mark.parametrize("kind", NAMES)


def forward_of_timm(vit, images):
    """Tokens before and behind the norm, by timm's own forward pass."""
    before = []
    hook = vit.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    behind = vit.forward_features(images)
    hook.remove()
    return before[0], behind


# timm's own models.


@pytest.mark.parametrize("kind", WITH_CLS | WITHOUT_CLS)
@torch.no_grad()
def test_without_options_a_model_is_timms_own(kind):
    model = build(kind)
    theirs = timm.create_model(NAMES[kind], img_size=model.options.image_size, num_classes=10, **SIZES).eval()
    state = {key.removeprefix("base_model."): value for key, value in model.state_dict().items()}
    theirs.load_state_dict(state)
    torch.testing.assert_close(model(images_for(model)), theirs(images_for(model)), atol=1e-6, rtol=0)


@KINDS
@torch.no_grad()
def test_the_method_written_out(kind):
    model = build(kind, **METHOD)
    vit, batch = model.base_model, images_for(model)

    def encode(images):
        before, behind = forward_of_timm(vit, images)
        if vit.cls_token is not None:
            assert torch.equal(before, behind)  # no norm
            return behind[:, 0], behind[:, 0], behind[:, vit.num_prefix_tokens :]
        assert isinstance(vit.norm, nn.Identity) or not torch.equal(before, behind)
        patches = behind[:, vit.num_prefix_tokens :]
        return patches.mean(1), vit.forward_head(behind), patches

    anchor, representation, patches = encode(batch)
    assert patches.shape[1] == 16
    scores = [[F.cosine_similarity(g, patch, dim=0) for patch in row] for g, row in zip(anchor, patches, strict=True)]
    indices = torch.tensor([sorted(range(16), key=lambda n: -row[n])[:3] for row in scores])
    crops = crop(batch, bounding_boxes(indices, 4, model.patch_size))
    if vit.cls_token is not None:
        own = vit.cls_token.clone()
        vit.cls_token.copy_(model.cls_token_crops)
    of_crop = encode(crops)[1]
    if vit.cls_token is not None:
        vit.cls_token.copy_(own)
    expected = model.head(model.aggregator(torch.stack((representation, of_crop), dim=1))[:, 0])
    logits, ours = model(batch)
    assert torch.equal(ours, crops)
    torch.testing.assert_close(logits, expected, atol=2e-6, rtol=0)
    assert model.select(model.base_model.forward_features(batch)).indices.tolist() == indices.tolist()


# Options.


@torch.no_grad()
def test_a_crop_has_the_cls_token_of_the_image_unless_it_has_its_own():
    own, shared = build(**METHOD), build(**(METHOD | {"anchor_class_token": False}))
    assert shared.cls_token_crops is None
    batch = images_for(own)
    before, plain = own(batch), shared(batch)
    assert not torch.allclose(before[0], plain[0], atol=1e-3)
    own.cls_token_crops.copy_(own.base_model.cls_token)
    assert torch.equal(own(batch)[1], before[1])
    torch.testing.assert_close(own(batch)[0], plain[0], atol=1e-6, rtol=0)
    fresh = GLSimTimm("glsvit_tiny_patch16_224", **METHOD, image_size=64, model_kwargs=SIZES)
    assert torch.equal(fresh.cls_token_crops, fresh.base_model.cls_token)


@pytest.mark.parametrize("aggregator_type", ["dwsc", "conv"])
@torch.no_grad()
def test_convolutions_over_the_sequence_written_out(aggregator_type):
    options = METHOD | {"reducer": None, "aggregator_type": aggregator_type, "aggregator_norm": False}
    model = build(**options, aggregator_num_hidden_layers=2)
    assert len(model.aggregator) == 2
    block, x = model.aggregator[0], fill("tokens", (2, 5, 64))
    normed = F.pad(block.norm(x), (0, 0, 1, 1))  # a zero token at both ends
    if aggregator_type == "dwsc":
        (depthwise, depthwise_bias), (pointwise, pointwise_bias) = (layer.parameters() for layer in block.conv)
        assert depthwise.shape == (64, 1, 3)
        mixed = torch.stack(
            [(normed[:, n : n + 3] * depthwise[:, 0].T).sum(1) + depthwise_bias for n in range(5)], dim=1
        )
        convolved = mixed @ pointwise[:, :, 0].T + pointwise_bias
    else:
        weight, bias = block.conv.parameters()
        convolved = torch.stack(
            [sum(normed[:, n + k] @ weight[..., k].T for k in range(3)) + bias for n in range(5)], 1
        )
    torch.testing.assert_close(block(x), x + F.gelu(convolved), atol=1e-5, rtol=0)
    assert model(images_for(model))[0].shape == (2, 10)


@pytest.mark.parametrize("kind", ["vit", "clip", "registers", "gap"])
@torch.no_grad()
def test_tokens_dropped_in_training_leave_the_others_in_their_places(kind):
    model = build(kind, **METHOD, token_drop=0.5)
    vit, batch, seen, encoded = model.base_model, images_for(model, 4), [], []
    vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vit.norm.register_forward_hook(lambda *args: encoded.append(args[-1]))
    assert torch.equal(model(batch)[0], build(kind, **METHOD)(batch)[0])  # not in evaluation
    whole, prefix = seen[0], vit.num_prefix_tokens
    _, crops = model.train()(batch)
    of_image, of_crop = seen[-2:]
    assert of_image.shape[1] == of_crop.shape[1] == prefix + 8
    torch.testing.assert_close(of_image[:, :prefix], whole[:, :prefix])
    distances = (of_image[:, prefix:, None] - whole[:, None, prefix:]).abs().amax(-1)  # (B, kept, all)
    nearest, places = distances.min(-1)
    assert nearest.max() < 1e-5
    assert torch.equal(places, places.sort().values)
    assert len(places.unique(dim=0)) == 4  # others for each image
    x = encoded[-2]
    found, of_the_rest = model.select(x, places), model.select(x)
    assert torch.equal(found.indices, places.gather(1, of_the_rest.indices))
    assert torch.equal(crops, crop(batch, bounding_boxes(found.indices, 4, model.patch_size)))


# Refusals.
