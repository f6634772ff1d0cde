"""What every model of GLSim's programs promises: files there and back, refusals, batches, gradients, precision."""

import copy
import functools
import json

import pytest
import torch
from small_models import (
    KINDS,
    LABELS,
    METHOD,
    NAMES,
    OPTIONS,
    cal,
    images,
    images_for,
    timm_glsim,
    transfg,
    vit_glsim,
)
from tiny_models import objective_of
from torch import nn

from common.engine import logits_of
from common.errors import UserError
from common.weights import load_checkpoint
from glsim.model_utils import ViTGLSim

MODELS = {
    **{f"vit {kind}": functools.partial(vit_glsim, kind) for kind in KINDS},
    **{f"timm {kind}": functools.partial(timm_glsim, kind, **METHOD) for kind in NAMES},
    **{
        f"timm {kind} with {name}": functools.partial(timm_glsim, kind, **options)
        for name, options in OPTIONS.items()
        for kind in ("registers", "siglip")
    },
    "transfg overlap": transfg,
    "transfg nonoverlap": functools.partial(transfg, step=None),
    "transfg oblong": functools.partial(transfg, (64, 96)),
    "cal": cal,
}


def models(*families, variants=False):
    names = [name for name in MODELS if name.startswith(families) and (variants or " with " not in name)]
    return pytest.mark.parametrize("name", names)


def batch_for(name, model, batch=2):
    some = images_for(model, batch)
    return torch.cat((some, some[..., :32]), dim=-1) if name == "transfg oblong" else some


def assert_state(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


# Files.


@models("")
@torch.no_grad()
def test_a_released_file_loads_bit_for_bit(name, tmp_path):
    model, again = MODELS[name](), MODELS[name]()
    state, released, batch = copy.deepcopy(model.state_dict()), model.released_state_dict(), batch_for(name, model)
    assert not any(key.startswith(("base_model", "model")) for key in released)
    kept = model.from_released(model.state_dict())  # our own names are left as they are
    assert kept.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in kept.items())
    file = tmp_path / "released.pth"
    for prefix in ("", "model."):
        entries = {prefix + key: value for key, value in released.items()}
        torch.save({"model": entries, "amp": {"loss_scaler0": {"unskipped": 0}}}, file)
        for load in (lambda: load_checkpoint(again, file), lambda entries=entries: again.load_released(entries)):
            for parameter in again.parameters():
                parameter.zero_()
            load()
            assert_state(again, state)
    assert torch.equal(logits_of(again(batch)), logits_of(model(batch)))


def changed(state, changes):
    """The entries, some of other shapes, or gone where the shape is None; values are others than before."""
    state = {key: value + 1 for key, value in state.items()}
    state |= {key: torch.zeros(shape or 0) for key, shape in changes.items()}
    return {key: value for key, value in state.items() if changes.get(key, ()) is not None}


QUERY, KEY = (f"encoder.blocks.1.attn.proj_{part}.weight" for part in "qk")
PART_QUERY, PART_KEY = (f"transformer.encoder.layer.1.attn.{name}.weight" for name in ("query", "key"))
QUERY_OR_QKV = r"blocks\.1\.attn\.proj_q\.weight|blocks\.1\.attn\.qkv\.weight"
DAMAGES = {
    vit_glsim: [
        ({QUERY: None}, f"lacks {QUERY}"),
        ({QUERY: None, KEY: None}, f"lacks {KEY} and 1 more"),
        ({"anchor_class_token": None}, "lacks anchor_class_token"),
        ({"head.scale": (1,)}, r"unknown head\.scale"),
        ({"head.bias": (9,)}, r"head\.bias of shape \(9,\)"),
        ({QUERY: (63, 64)}, QUERY_OR_QKV),
        ({QUERY: (56, 64), KEY: (72, 64)}, QUERY_OR_QKV),  # as many rows together
    ],
    transfg: [
        ({PART_QUERY: None}, f"lacks {PART_QUERY}"),
        ({"head.weight": (10, 48)}, r"unknown head\.weight"),
        ({"part_head.bias": (9,)}, r"part_head\.bias of shape \(9,\)"),
        ({PART_QUERY: (48, 47)}, PART_QUERY),
        ({PART_QUERY: (40, 48), PART_KEY: (56, 48)}, PART_QUERY),
    ],
    lambda: timm_glsim(**METHOD): [
        ({"cls_token_crops": None}, "lacks cls_token_crops"),
        ({"blocks.1.norm1.weight": None, "head.bias": None}, r"lacks blocks\.1\.norm1\.weight and 1 more"),
        ({"norm.weight": (64,)}, r"unknown norm\.weight"),
        ({"pos_embed": (1, 26, 64)}, r"pos_embed of shape \(1, 26, 64\)"),
    ],
    cal: [
        ({"net.attentions.bn.running_var": None}, r"lacks net\.attentions\.bn\.running_var"),
        ({"net.fc.bias": (1,)}, r"unknown net\.fc\.bias"),
        ({"net.fc.weight": (3,)}, r"net\.fc\.weight of shape \(3,\)"),
    ],
}


def assert_refused(model, state, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        model.load_released(state)
    assert "\n" not in str(caught.value)
    assert_state(model, before)


@pytest.mark.parametrize(
    ("build", "changes", "message"), [(build, *damage) for build, damages in DAMAGES.items() for damage in damages]
)
def test_a_file_that_does_not_fit_changes_nothing_and_names_the_entry(build, changes, message):
    model = build()
    state = changed(model.released_state_dict(), changes)
    for prefix in ("", "model."):
        assert_refused(model, {prefix + key: value for key, value in state.items()}, message)


@pytest.mark.parametrize("build", DAMAGES)
@pytest.mark.parametrize("state", [{}, {"fc.weight": torch.zeros(10, 64)}], ids=["empty", "foreign"])
def test_a_file_of_something_else_is_refused(build, state):
    assert_refused(build(), state, "checkpoint")


@pytest.mark.parametrize(
    ("build", "ours", "theirs", "message"),
    [
        (vit_glsim, {}, {"num_classes": 7}, r"head\.weight of shape \(7, 64\), .*\(10, 64\)"),
        (vit_glsim, {}, {"image_size": 96}, r"pos_embedding of shape \(1, 37, 64\), .*\(1, 17, 64\)"),
        (vit_glsim, {"num_hidden_layers": 3}, {}, r"lacks encoder\.blocks\.2\."),
        (vit_glsim, {}, {"num_hidden_layers": 3}, r"unknown encoder\.blocks\.2\."),
        (vit_glsim, {"aggregator_num_hidden_layers": 2}, {}, r"lacks aggregator\.blocks\.1\."),
        (vit_glsim, {"classifier": "avg_cls"}, {}, r"lacks head_reducer\.0\."),
        (vit_glsim, {}, {"representation_size": 128}, r"unknown reducer\."),
        (vit_glsim, {}, {"anchor_class_token": False}, "lacks anchor_class_token"),
        (vit_glsim, {}, {"intermediate_size": 192}, r"fc1\.(weight|bias) of shape \(192.*, this model needs \(128"),
        (transfg, {}, {"num_classes": 7}, r"part_head\.weight of shape \(7, 48\), .*\(10, 48\)"),
        (transfg, {}, {"step": None}, r"position_embeddings of shape \(1, 17, 48\), .*\(1, 26, 48\)"),
        (transfg, {"num_layers": 5}, {}, r"lacks transformer\.encoder\.layer\.3\."),
    ],
)
def test_a_file_of_another_model_says_which(build, ours, theirs, message):
    assert_refused(build(**ours), build(**theirs).released_state_dict(), message)


@models("", variants=True)
@torch.no_grad()
def test_a_model_is_built_again_from_its_configuration(name):
    model = MODELS[name]()
    kept = vars(model.config) if isinstance(model, ViTGLSim) else model.config
    build_again = ViTGLSim.from_arguments if isinstance(model, ViTGLSim) else type(model)
    again = build_again(**json.loads(json.dumps(kept))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(again(batch_for(name, model))), logits_of(model(batch_for(name, model))))


# Batches.


@models("vit", "transfg")
@torch.no_grad()
def test_a_batch_of_one_equals_the_rows_of_a_batch(name):
    model = MODELS[name]()
    more = {"ret_dist": True} if isinstance(model, ViTGLSim) else {"return_selection": True}
    batch = batch_for(name, model, 5)
    whole = model(batch, **more)
    whole = whole[:-3] if isinstance(model, ViTGLSim) else whole  # without what lists hold
    for row in range(5):
        for alone, of_all in zip(model(batch[row : row + 1], **more), whole, strict=False):
            torch.testing.assert_close(alone[0], of_all[row], atol=1e-5, rtol=0)


@models("vit", "timm")
@torch.no_grad()
def test_flipping_averages_two_images_in_evaluation_alone(name):
    plain, flipping = MODELS[name](), MODELS[name](test_flip=True)
    batch = batch_for(name, plain)
    one, other = (logits_of(plain(some)) for some in (batch, batch.flip(-1)))
    torch.testing.assert_close(logits_of(flipping(batch)), (one + other) / 2, atol=2e-6, rtol=0)
    outputs = []
    for model in (plain, flipping):
        torch.manual_seed(0)
        outputs.append(logits_of(model.train()(batch)))
    assert torch.equal(*outputs)


@models("vit", "timm")
def test_reading_the_attention_changes_no_logits(name):
    """Apart from dropout, which is drawn for all patches of the last block only where these are handed out."""
    model = MODELS[name]()
    batch = batch_for(name, model)
    if name in ("timm parallel", "timm norm_behind_branches"):
        with pytest.raises(UserError, match="hands out no attention"):
            model(batch, ret_dist=True)
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for train in (False, True):
        outputs = []
        for ret_dist in (False, True):
            torch.manual_seed(0)
            outputs.append(model.train(train)(batch, ret_dist=ret_dist))
        torch.testing.assert_close(logits_of(outputs[0]), outputs[1][0], atol=2e-6, rtol=0)
        if isinstance(outputs[0], tuple):
            assert torch.equal(outputs[0][1], outputs[1][1])
    *_, inter, probabilities, scores = outputs[1]
    assert len(inter) == len(probabilities) == len(scores) == 2
    for share, raw in zip(probabilities, scores, strict=True):
        torch.testing.assert_close(share, raw.softmax(-1))


@pytest.mark.parametrize("shape", [(2, 3, 64, 96), (2, 3, 96, 96), (2, 3, 48, 48), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("name", ["vit method", "vit plain", "vit pool", "timm vit"])
def test_images_of_another_size_are_refused(name, shape):
    with pytest.raises(UserError, match=r"this model takes \(B, 3, 64, 64\)"):
        MODELS[name]()(torch.zeros(shape))


# Gradients and precision.


@models("")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_exactly_the_trainable_parameters_get_a_finite_gradient(name, dtype):
    model = MODELS[name]().train()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss, _ = objective_of(model)(model, batch_for(name, model), LABELS)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert model.get_classifier().weight.grad.any()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if isinstance(model, ViTGLSim):
        assert frozen == {"anchor_class_token"} & set(dict(model.named_parameters()))


@models("vit", "timm", "transfg", variants=True)
def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(name):
    model, losses, gradients, runs = MODELS[name]().train(), [], [], []
    norm = next(module for module in model.base_model.blocks[0].modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_pre_hook(lambda *_: runs.append(enable))
    for enable in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        loss, _ = objective_of(model)(model, batch_for(name, model), LABELS)
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        # Sums of the same products in another order: off by the rounding of the largest.
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, one.abs().max().item()), rtol=0)
    frozen = not any(parameter.requires_grad for parameter in model.base_model.blocks[0].parameters())
    assert frozen or runs.count(True) == 2 * runs.count(False) > 0


def test_nothing_is_printed_without_debugging(capfd):
    for kind in KINDS:
        vit_glsim(kind)(images(), ret_dist=True)
    assert capfd.readouterr() == ("", "")
    vit_glsim(debugging=True)(images())
    assert "logits: (2, 10)" in capfd.readouterr().out
