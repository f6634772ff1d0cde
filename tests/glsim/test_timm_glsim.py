"""glsim.model_utils.timm_glsim: the figures of the released class, timm's own models, each option, and refusals."""

import copy
import functools
import hashlib
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import check_figures, fill, fill_image, fill_state_dict
from torch import nn

from common.errors import UserError
from common.models.vit import num_heads
from common.weights import load_checkpoint, load_weights
from glsim.model_utils.glsim import bounding_boxes, crop
from glsim.model_utils.timm_glsim import GLSimTimm

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glsim_timm.json").read_text())
METHOD = {
    **{"dynamic_anchor": True, "anchor_class_token": True, "reducer": "cls"},
    **{"aggregator": True, "aggregator_norm": True},
}
# What the recorded command lines say.
ARGUMENTS = {
    "": {},
    "--cfg_method glsim.yaml": METHOD,
    "--cfg_method glsim.yaml --select_top_k": {**METHOD, "select_top_k": True},
    "--cfg_method glsim.yaml --inference_crops": {**METHOD, "inference_crops": False},
    "--classifier cls_pool": {"classifier": "cls_pool"},
    "--classifier pool": {"classifier": "pool"},
}
TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2}
WITH_CLS = {
    "vit": "vit_tiny_patch16_224",
    "untagged_and_tagged": "vit_base_patch16_224.dino",
    "clip": "vit_base_patch16_clip_224",
    "deit3": "deit3_small_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
    "registers": "vit_small_patch14_reg4_dinov2",
    "dinov2_giant": "vit_giant_patch14_reg4_dinov2",
    "parallel": "vit_small_patch16_18x2_224",
}
WITHOUT_CLS = {
    "gap": "vit_base_patch16_gap_224",
    "gap_norm_behind": "vit_medium_patch16_reg4_gap_256",
    "norm_behind_branches": "vit_base_patch16_rpn_224",
    "siglip": "vit_base_patch16_siglip_224",
}
NAMES = {**WITH_CLS, **WITHOUT_CLS, "distilled": "deit_tiny_distilled_patch16_224"}
KINDS = pytest.mark.parametrize("kind", NAMES)
filled = functools.cache(fill)  # the base models share most of their entries


@pytest.fixture(autouse=True, scope="module")
def forget_filled():
    yield
    filled.cache_clear()


def build(kind="vit", **options):
    """A tiny model of 4 x 4 patches, its weights by formula."""
    name = NAMES[kind]
    size = 4 * int(re.search(r"patch(\d+)", name)[1])
    options = {"dynamic_top": 3, "num_classes": 10, "image_size": size, "model_kwargs": TINY, **options}
    model = GLSimTimm(f"gls{name}", **options)
    fill_state_dict(model)
    return model.eval()


def images_for(model, batch=2):
    return fill_image(batch, 3, model.options.image_size, model.options.image_size)


def logits_of(output):
    return output[0] if isinstance(output, tuple) else output


def close_to(figures, rtol=5e-7):
    atol = rtol * max(1.0, figures["abs_sum"])
    return {key: value if key == "shape" else pytest.approx(value, abs=atol) for key, value in figures.items()}


def forward_of_timm(vit, images):
    """Tokens before and behind the norm, by timm's own forward pass."""
    before = []
    hook = vit.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    behind = vit.forward_features(images)
    hook.remove()
    return before[0], behind


# The recorded figures of the released class.


@pytest.mark.parametrize("recorded", GOLDEN["models"])
@torch.no_grad()
def test_figures_equal_those_of_the_released_class(recorded):
    figures = GOLDEN["models"][recorded]
    options = ARGUMENTS[" ".join(figures["args"])]
    skip = {"weight_init": "skip"}  # time
    model = GLSimTimm(figures["name"], num_classes=10, image_size=224, **options, model_kwargs=skip)
    assert sum(parameter.numel() for parameter in model.parameters()) == figures["num_params"]
    released = model.released_state_dict()
    lines = "".join(f"{key}:{'x'.join(map(str, value.shape))}\n" for key, value in released.items())
    sha1 = hashlib.sha1(lines.encode()).hexdigest()
    assert {"n": len(released), "sha1": sha1} == figures["state_dict"]
    model.load_released({key: filled(key, tuple(value.shape)) for key, value in released.items()})
    if "logits" not in figures:  # the released class crashes
        return
    batch = images_for(model.eval())
    output = model(batch, ret_dist=True)
    torch.testing.assert_close(output[0], torch.tensor(figures["logits"]), atol=5e-5, rtol=0)
    assert len(output) == (6 if "crops" in figures else 5)
    if "crops" in figures:
        found = model.select(output[2])
        assert found.indices.tolist() == figures["indices"]
        kth = found.similarity.gather(1, found.indices)[:, -1]
        torch.testing.assert_close(kth, torch.tensor(figures["kth"]), atol=1e-6, rtol=0)
        # The released crop, in float32, is itself off by 1e-5 pixels.
        assert [check_figures(image) for image in output[1]] == [close_to(chk, 1e-6) for chk in figures["crops"]]


@pytest.mark.parametrize("name", GOLDEN["names"])
@torch.no_grad()
def test_every_released_name_is_timms_model_and_crops(name):
    figures = GOLDEN["names"][name]
    size = 8 * figures["patch_size"]
    assert size == figures.get("image_size", size)  # as recorded; models without CLS crashed
    kwargs = {"depth": 1, "weight_init": "skip"}
    model = GLSimTimm(name, num_classes=10, image_size=size, **METHOD, model_kwargs=kwargs).eval()
    vit = model.base_model
    assert (model.patch_size, model.grid, vit.embed_dim) == (figures["patch_size"], 8, figures["embed_dim"])
    assert num_heads(vit) == figures["num_heads"]
    assert (vit.cls_token is not None, vit.num_reg_tokens) == (figures["class_token"], figures["reg_tokens"])
    logits, crops = model(images_for(model, 1))
    assert (logits.shape, crops.shape) == ((1, 10), (1, 3, size, size))
    narrow = GLSimTimm(name, model_kwargs={"embed_dim": 8, "num_heads": 1, "weight_init": "skip"})
    assert len(narrow.base_model.blocks) == figures["depth"]


def test_the_aggregators_norm_has_the_released_epsilon():
    assert build(**METHOD).aggregator[-1].eps == 1e-5


# timm's own models.


@pytest.mark.parametrize("kind", WITH_CLS | WITHOUT_CLS)
@torch.no_grad()
def test_without_options_a_model_is_timms_own(kind):
    model = build(kind)
    theirs = timm.create_model(NAMES[kind], img_size=model.options.image_size, num_classes=10, **TINY).eval()
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
def test_attention_is_handed_out_where_blocks_are_plain(kind):
    model = build(kind, **METHOD, adapter="bottleneck")
    batch = images_for(model)
    if kind in ("parallel", "norm_behind_branches"):
        with pytest.raises(UserError, match="hands out no attention"):
            model(batch, ret_dist=True)
        return
    logits, crops, x, inter, probabilities, scores = model(batch, ret_dist=True)
    for ours, other in zip((logits, crops), model(batch), strict=True):
        torch.testing.assert_close(ours, other, atol=2e-6, rtol=0)
    assert len(inter) == len(probabilities) == len(scores) == 2
    assert torch.equal(model.base_model.norm(inter[-1]), x)
    heads = (2, 2, x.shape[1], x.shape[1])
    for p, raw in zip(probabilities, scores, strict=True):
        assert p.shape == raw.shape == heads
        torch.testing.assert_close(p, raw.softmax(-1))
    attention = model.base_model.blocks[1].attn  # the second block, by timm's unfused attention
    attention.fused_attn, seen = False, []
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
    fresh = GLSimTimm("glsvit_tiny_patch16_224", **METHOD, image_size=64, model_kwargs=TINY)
    assert torch.equal(fresh.cls_token_crops, fresh.base_model.cls_token)


@KINDS
@torch.no_grad()
def test_without_crops_in_evaluation_the_image_alone_is_classified(kind):
    model, batch = build(kind, **METHOD, inference_crops=False), images_for(build(kind))
    logits = model(batch)
    plain = build(kind, **(METHOD | {"dynamic_anchor": False, "anchor_class_token": False}))
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key != "cls_token_crops"})
    torch.testing.assert_close(logits, plain(batch), atol=1e-6, rtol=0)
    assert model.train()(batch)[1].shape == batch.shape


@KINDS
@torch.no_grad()
def test_selected_tokens_themselves_are_aggregated(kind):
    model = build(kind, **METHOD, select_top_k=True)
    batch = images_for(model)
    seen = []
    model.aggregator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(batch)
    assert logits.shape == (2, 10)
    x = model.base_model.forward_features(batch)
    patches = x[:, model.base_model.num_prefix_tokens :]
    indices = model.select(x).indices
    assert seen[0].shape == (2, 4, 64)
    for image in range(2):
        torch.testing.assert_close(seen[0][image, 1:], patches[image, indices[image]], atol=1e-6, rtol=0)
    representation = x[:, 0] if kind not in WITHOUT_CLS else model.base_model.forward_head(x)
    torch.testing.assert_close(seen[0][:, 0], representation, atol=1e-6, rtol=0)


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
def test_flipping_averages_two_images_in_evaluation_alone():
    plain, flipping = build(**METHOD), build(**METHOD, test_flip=True)
    batch = images_for(plain)
    one, other = plain(batch)[0], plain(batch.flip(-1))[0]
    torch.testing.assert_close(flipping(batch)[0], (one + other) / 2, atol=1e-6, rtol=0)
    with_dist = flipping(batch, ret_dist=True)
    torch.testing.assert_close(with_dist[0], (one + other) / 2, atol=2e-6, rtol=0)
    assert torch.equal(with_dist[2], plain(batch, ret_dist=True)[2])
    assert torch.equal(flipping.train()(batch)[0], plain.train()(batch)[0])


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
    vit, batch, seen = model.base_model, images_for(model, 4), []
    vit.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    in_evaluation = model(batch)
    torch.testing.assert_close(in_evaluation[0], build(kind, **METHOD)(batch)[0], atol=0, rtol=0)
    whole, prefix = seen.pop(0), vit.num_prefix_tokens
    seen.clear()
    torch.manual_seed(0)
    _, crops = model.train()(batch)
    assert [x.shape[1] for x in seen] == [prefix + 8, prefix + 8]
    torch.manual_seed(0)
    x, places, *_ = model._encode(batch)
    assert places.shape == (4, 8)
    assert torch.equal(places, places.sort().values)
    assert len({tuple(row) for row in places.tolist()}) == 4  # others for each image
    for image in range(4):
        torch.testing.assert_close(seen[0][image, :prefix], whole[image, :prefix])
        torch.testing.assert_close(seen[0][image, prefix:], whole[image, prefix + places[image]])
    found, of_the_rest = model.select(x, places), model.select(x)
    assert torch.equal(found.indices, torch.stack([places[i][of_the_rest.indices[i]] for i in range(4)]))
    assert torch.equal(crops, crop(batch, bounding_boxes(found.indices, 4, model.patch_size)))


def test_an_adapter_starts_as_nothing_and_is_trained_instead_of_the_encoder():
    plain = GLSimTimm("glsvit_tiny_patch16_224", num_classes=10, image_size=64, **METHOD, model_kwargs=TINY)
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


OPTIONS = {
    "plain": {},
    "method": METHOD,
    "no_aggregator": METHOD | {"aggregator": False, "aggregator_norm": False},
    "no_aggregator_pool": METHOD | {"aggregator": False, "aggregator_norm": False, "classifier": "pool"},
    "no_reducer": METHOD | {"reducer": None, "classifier": "cls_pool"},
    "select_top_k": METHOD | {"select_top_k": True},
    "two_convolutions": METHOD | {"aggregator_type": "conv", "aggregator_num_hidden_layers": 2},
    "dwsc": METHOD | {"aggregator_type": "dwsc"},
    "inference_crops_off": METHOD | {"inference_crops": False},
    "adapter": METHOD | {"adapter": "bottleneck"},
    "token_drop": METHOD | {"token_drop": 0.25},
    "stochastic_depth": METHOD | {"sd": 0.1, "aggregator_num_hidden_layers": 2},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for options in OPTIONS for kind in ("registers", "siglip")]
    + [(kind, options) for options in ("plain", "method") for kind in NAMES if kind not in ("registers", "siglip")],
)
def test_exactly_the_trainable_parameters_get_a_gradient_with_checkpointing_too(kind, options):
    model, gradients, runs = build(kind, **OPTIONS[options]).train(), [], []
    norm = next(module for module in model.base_model.blocks[-1].modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_pre_hook(lambda *_: runs.append(enable))
    for enable in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        logits = logits_of(model(images_for(model)))
        F.cross_entropy(logits, torch.tensor([3, 7])).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)
    assert gradients[0]["head.weight"].abs().sum() > 0
    assert runs.count(True) > runs.count(False) > 0  # blocks are computed again


def test_stochastic_depth_rises_to_its_rate():
    model = build(**METHOD, sd=0.2, aggregator_num_hidden_layers=2)
    for blocks in (model.base_model.blocks, model.aggregator[:2]):
        assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks] == [0.0, pytest.approx(0.2)]


# Building again, and files.


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_a_model_is_built_again_from_its_configuration(options):
    model = build("registers", **OPTIONS[options])
    again = GLSimTimm(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(again(images_for(model))), logits_of(model(images_for(model))))


@KINDS
@torch.no_grad()
def test_an_exported_checkpoint_loads_bit_for_bit(kind, tmp_path):
    model, batch = build(kind, **METHOD), images_for(build(kind))
    released = model.released_state_dict()
    assert len(released) == len(model.state_dict())
    assert not any(key.startswith("base_model") for key in released)
    again = build(kind, **METHOD)
    for prefix in ("", "model."):
        torch.save({"model": {prefix + key: value for key, value in released.items()}}, tmp_path / "glsim.pth")
        for parameter in again.parameters():
            parameter.zero_()
        load_checkpoint(again, tmp_path / "glsim.pth")
        assert torch.equal(again(batch)[0], model(batch)[0])
        again.head.bias.zero_()
        again.load_released({prefix + key: value for key, value in released.items()})
        assert torch.equal(again(batch)[0], model(batch)[0])
    own = again.from_released(model.state_dict())
    assert own.keys() == model.state_dict().keys()


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


@pytest.mark.parametrize(
    ("changes", "message"),  # the shapes of other entries; None: no such entry
    [
        ({"cls_token_crops": None}, "lacks cls_token_crops"),
        ({"blocks.1.norm1.weight": None, "head.bias": None}, r"lacks blocks\.1\.norm1\.weight and 1 more"),
        ({"norm.weight": (64,)}, r"holds the unknown norm\.weight"),
        ({"head.bias": (9,)}, r"head\.bias of shape \(9,\)"),
        ({"pos_embed": (1, 26, 64)}, r"pos_embed of shape \(1, 26, 64\)"),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_changes_nothing_and_says_why(changes, message):
    model = build(**METHOD)
    before = copy.deepcopy(model.state_dict())
    state = model.released_state_dict() | {key: torch.zeros(shape or 0) for key, shape in changes.items()}
    with pytest.raises(UserError, match=message):
        model.load_released({key: value for key, value in state.items() if changes.get(key, ()) is not None})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Refusals.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {}, r"there is no model 'vit_tiny_patch16_224': expected glsvit_\* or glsdeit\*"),
        ("glsresnet50", {}, "there is no model 'glsresnet50'"),
        ("glsvit_nowhere", {}, "has no model vit_nowhere"),
        ("glsvit_tiny_patch16_224.nowhere", {}, r"no pretrained weights vit_tiny_patch16_224\.nowhere"),
        ("glsvit_relpos_small_patch16_224", {}, "is no VisionTransformer but a VisionTransformerRelPos"),
        ("glsvit_tiny_patch16_224", {"image_size": 100}, "image_size 100: expected a multiple of the patch size of"),
        ("glsvit_tiny_patch16_224", {"image_size": 8}, "image_size 8: expected a multiple"),
        ("glsvit_tiny_r_s16_p8_224", {"image_size": 100}, "image_size 100: expected a multiple"),
        ("glsvit_tiny_patch16_224", METHOD | {"dynamic_top": 17}, "dynamic_top 17: expected 1 to 16, the patches"),
        ("glsvit_tiny_patch16_224", METHOD | {"dynamic_top": 0}, "dynamic_top 0: expected 1 to 16"),
        ("glsvit_tiny_patch16_224", METHOD | {"dynamic_top": 9, "token_drop": 0.5}, "dynamic_top 9: expected 1 to 8"),
        (
            "glsvit_tiny_patch16_224",
            {"classifier": "max_cls"},
            "classifier 'max_cls': expected one of cls, pool",
        ),
        ("glsvit_tiny_patch16_224", {"adapter": "lora"}, "adapter 'lora': expected one of bottleneck, None"),
        ("glsvit_tiny_patch16_224", {"token_drop": 1.0}, r"token_drop 1\.0: expected 0 or more, and less than 1"),
        ("glsvit_tiny_patch16_224", {"select_top_k": True}, "select_top_k selects patches as dynamic_anchor does"),
        ("glsvit_tiny_patch16_224", {"classifier": "cls_pool", "reducer": "cls"}, "reducer 'cls' leaves none"),
        (
            "glsvit_tiny_patch16_224",
            METHOD | {"classifier": "cls_pool", "inference_crops": False},
            "reducer 'cls' leaves none",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(name, options, message):
    kwargs = {} if "relpos" in name else {"depth": 1}
    with pytest.raises(UserError, match=message) as caught:
        GLSimTimm(name, **({"image_size": 64, "model_kwargs": kwargs} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 3, 64, 48), (2, 3, 48, 48), (3, 64, 64)], ids=str)
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(UserError, match=r"this model takes \(B, 3, 64, 64\)"):
        build(**METHOD)(torch.zeros(shape))
