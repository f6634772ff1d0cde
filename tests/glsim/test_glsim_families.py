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
    images_for,
    timm_glsim,
    transfg,
    vit_glsim,
)
from tiny_models import objective_of
from torch import nn

from common.errors import UserError
from common.train.loop import logits_of
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
