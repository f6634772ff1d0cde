"""glsim.model_utils.timm_glsim: timm's own models, the method written out, each option, and refusals.

What it shares with the other models is in test_glsim_families.py, the released figures in tests/parity.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import fill, fill_state_dict
from small_models import METHOD, NAMES, SIZES, WITH_CLS, WITHOUT_CLS, images_for
from small_models import timm_glsim as build
from torch import nn

from common.errors import UserError
from common.weights import load_weights
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


@KINDS
@torch.no_grad()
def test_attention_is_timms(kind):
    if kind in ("parallel", "norm_behind_branches"):  # hands out none
        return
    model, seen = build(kind, **METHOD, adapter="bottleneck"), []
    batch = images_for(model)
    _, _, x, inter, probabilities, _ = model(batch, ret_dist=True)
    assert torch.equal(model.base_model.norm(inter[-1]), x)
    attention = model.base_model.blocks[1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch)
    torch.testing.assert_close(probabilities[1], seen[0], atol=1e-6, rtol=0)


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


@KINDS
@torch.no_grad()
def test_without_crops_in_evaluation_the_image_alone_is_classified(kind):
    model, batch = build(kind, **METHOD, inference_crops=False), images_for(build(kind))
    plain = build(kind, **(METHOD | {"dynamic_anchor": False, "anchor_class_token": False}))
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key != "cls_token_crops"})
    torch.testing.assert_close(model(batch), plain(batch), atol=1e-6, rtol=0)
    assert model.train()(batch)[1].shape == batch.shape


@KINDS
@torch.no_grad()
def test_selected_tokens_themselves_are_aggregated(kind):
    model = build(kind, **METHOD, select_top_k=True)
    batch = images_for(model)
    seen = []
    model.aggregator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert model(batch).shape == (2, 10)
    x = model.base_model.forward_features(batch)
    patches, indices = x[:, model.base_model.num_prefix_tokens :], model.select(x).indices
    representation = x[:, 0] if kind not in WITHOUT_CLS else model.base_model.forward_head(x)
    expected = [torch.cat((representation[i : i + 1], patches[i, indices[i]])) for i in range(2)]
    torch.testing.assert_close(seen[0], torch.stack(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["vit", "registers", "gap_norm_behind"])
@torch.no_grad()
def test_classifiers_of_image_and_crop(kind):
    """Every token of both without a reducer, registers apart."""
    for reducer, count in ((None, 34), ("cls", 2)):
        model = build(kind, **(METHOD | {"reducer": reducer}))
        seen, batch = [], images_for(model)
        model.aggregator.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        assert torch.equal(model(batch)[0], model.head(seen[0][:, 0]))
        assert seen[0].shape[1] == count
        for classifier, read in (
            ("pool", seen[0].mean(1)),
            ("cls_pool", torch.cat((seen[0][:, 0], seen[0][:, 1:].mean(1)), dim=1)),
        ):
            other = build(kind, **(METHOD | {"reducer": reducer, "classifier": classifier}))
            torch.testing.assert_close(other(batch)[0], other.head(read), atol=1e-6, rtol=0)


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


@torch.no_grad()
def test_metrics_random_patches_and_inclusive_boxes():
    tokens = fill("tokens", (3, 17, 64))
    cls, patches = tokens[:, :1], tokens[:, 1:]
    expected = {"l1": (cls - patches).abs().mean(-1), "l2": (cls - patches).square().mean(-1)}
    for metric, distance in expected.items():
        found = build(**METHOD, sim_metric=metric).select(tokens)
        assert torch.equal(found.indices, distance.argsort(1)[:, :3])
    inclusive = build(**METHOD, crop_inclusive=True).select(tokens)
    assert torch.equal(inclusive.boxes, bounding_boxes(inclusive.indices, 4, 16, inclusive=True))
    assert not torch.equal(inclusive.boxes, build(**METHOD).select(tokens).boxes)
    torch.manual_seed(0)
    random = build(**METHOD, anchor_random=True).select(tokens.repeat(100, 1, 1)).indices
    assert random.unique().tolist() == list(range(16))
    assert all(len(set(row)) == 3 for row in random.tolist())


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


def test_an_adapter_starts_as_nothing_and_is_trained_instead_of_the_encoder():
    plain = GLSimTimm("glsvit_tiny_patch16_224", num_classes=10, image_size=64, **METHOD, model_kwargs=SIZES)
    model = GLSimTimm(**(plain.config | {"adapter": "bottleneck"}))
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == 2 * 4
    assert all(key.startswith("adapters.") for key in missing)
    batch = images_for(model)
    torch.testing.assert_close(model.eval()(batch)[0], plain.eval()(batch)[0], atol=5e-6, rtol=0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("base_model.")}
    fill_state_dict(model)
    before = model(batch)[0]
    model.adapters[0][2].bias.data += 1
    assert not torch.allclose(model(batch)[0], before, atol=1e-3)


def test_a_frozen_backbone_leaves_what_is_behind_it_to_training():
    model = build(**METHOD, freeze_backbone=True)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"cls_token_crops", "aggregator", "head"}


def test_stochastic_depth_rises_to_its_rate_and_the_aggregators_norm_has_the_released_epsilon():
    model = build(**METHOD, sd=0.2, aggregator_num_hidden_layers=2)
    assert model.aggregator[-1].eps == 1e-5
    for blocks in (model.base_model.blocks, model.aggregator[:2]):
        assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks] == [0.0, pytest.approx(0.2)]


@pytest.mark.parametrize("kind", ["vit", "deit3", "registers", "gap"])
def test_position_embeddings_are_resized_to_another_image(kind, tmp_path):
    model = build(kind, **METHOD)
    torch.save({"model": model.released_state_dict()}, tmp_path / "glsim.pth")
    larger = build(kind, **METHOD, image_size=2 * model.options.image_size, num_classes=5)
    report = load_weights(larger, tmp_path / "glsim.pth")
    assert report["left"] == ["head.weight", "head.bias"]
    own, resized = model.base_model.pos_embed, larger.base_model.pos_embed
    prefix = own.shape[1] - 16
    assert torch.equal(resized[:, :prefix], own[:, :prefix])
    grid = own[:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    corners = resized[:, prefix:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)[..., ::7, ::7]
    torch.testing.assert_close(corners, grid[..., ::3, ::3], atol=1e-6, rtol=0)


# Refusals.


TINY = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {}, "'glsresnet50': expected glsvit"),
        ("vit_nowhere", {}, "vit_nowhere"),
        (f"{TINY}.nowhere", {}, rf"{TINY}\.nowhere"),
        ("vit_relpos_small_patch16_224", {}, "is no VisionTransformer"),
        (TINY, {"image_size": 100}, "image_size 100"),
        (TINY, {"image_size": 8}, "image_size 8"),
        ("vit_tiny_r_s16_p8_224", {"image_size": 100}, "image_size 100"),
        (TINY, METHOD | {"dynamic_top": 17}, "dynamic_top 17: expected 1 to 16"),
        (TINY, METHOD | {"dynamic_top": 0}, "dynamic_top 0"),
        (TINY, METHOD | {"dynamic_top": 9, "token_drop": 0.5}, "dynamic_top 9: expected 1 to 8"),
        (TINY, {"classifier": "max_cls"}, "classifier 'max_cls'"),
        (TINY, {"adapter": "lora"}, "adapter 'lora'"),
        (TINY, {"token_drop": 1.0}, r"token_drop 1\.0"),
        (TINY, {"select_top_k": True}, "select_top_k"),
        (TINY, {"classifier": "cls_pool", "reducer": "cls"}, "reducer 'cls'"),
        (TINY, METHOD | {"classifier": "cls_pool", "inference_crops": False}, "reducer 'cls'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(name, options, message):
    kwargs = {} if "relpos" in name else {"depth": 1}
    with pytest.raises(UserError, match=message) as caught:
        GLSimTimm(f"gls{name}", **({"image_size": 64, "model_kwargs": kwargs} | options))
    assert "\n" not in str(caught.value)
