"""ffvt.model: the paper's equations written out, configurations, files there and back, and what is refused."""

import copy
import json
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import fill, fill_image, fill_npz, fill_state_dict, tiny_vit, vit_spec
from largest import largest
from torch import nn

from common.errors import UserError
from ffvt.model import CONFIGS, FFVT, Config, maws_scores

LABELS = torch.tensor([3, 7])
TINY = Config(hidden_size=48, mlp_dim=96, num_heads=3, num_layers=4)
FUSION = pytest.mark.parametrize("fusion", [True, False], ids=["fusion", "plain"])


def tiny(img_size=64, fusion=True, num_token=3, num_classes=10, smoothing=0.0, **sizes):
    """A model filled by the keys that its entries have in a released file."""
    model = FFVT(replace(TINY, **sizes), img_size, num_classes, fusion, num_token, smoothing)
    model.load_released({key: fill(key, value.shape) for key, value in model.released_state_dict().items()})
    return model.eval()


def images(batch=2, size=(64, 64)):
    return fill_image(batch, 3, *size)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


# Google's .npz files.


@pytest.fixture(scope="module")
def npz_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "tiny.npz"
    fill_npz(path, vit_spec())
    return path


@FUSION
@pytest.mark.parametrize(
    ("sizes", "head", "message"),
    [
        ({"num_classes": 7}, True, r"tiny\.npz has head\.weight \(10, 48\) instead of \(7, 48\)"),
        ({"num_layers": 3}, False, r"tiny\.npz .*blocks\.[23]"),
    ],
    ids=["head", "depth"],
)
def test_an_npz_file_of_another_model_is_refused_and_changes_nothing(npz_file, sizes, head, message, fusion):
    model = tiny(fusion=fusion, **sizes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        model.load_npz(npz_file, zero_head=not head)
    assert_same_state(model.state_dict(), before)
    if head:
        assert "base_model.head.weight" in model.load_npz(npz_file).left


@torch.no_grad()
def test_without_fusion_it_is_timms_vit_loaded_by_timm(npz_file):
    ours, theirs = FFVT(TINY, 64, 10, feature_fusion=False).eval(), tiny_vit()
    ours.load_npz(npz_file, zero_head=False)
    theirs.load_pretrained(str(npz_file))
    torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-5, rtol=0)


# The equations.


def reference_scores(q, k):
    """Return the mutual attention weights (B, N) in float64, of the whole score matrices."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])  # (B, H, N, N)
    from_cls = (scores.exp() / scores.exp().sum(3, keepdim=True))[:, :, 0].mean(1)
    to_cls = (scores.exp() / scores.exp().sum(2, keepdim=True))[:, :, :, 0].mean(1)
    return from_cls * to_cls


def queries_and_keys(shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 17, 16), (1, 1, 1, 4), (1, 12, 26, 64), (3, 2, 5, 8)], ids=str)
def test_maws_equals_the_equations_in_float32_whatever_its_inputs(shape, dtype):
    q, k = (part.to(dtype) for part in queries_and_keys(shape))
    scores, expected = maws_scores(q, k), reference_scores(q, k)
    assert (scores.dtype, scores.shape) == (torch.float32, (shape[0], shape[2]))
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6 * expected.max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(maws_scores(q, k), scores)


def test_maws_never_holds_anything_as_large_as_a_score_matrix():
    q, k = queries_and_keys((1, 3, 200, 16))
    assert largest(maws_scores, q, k) <= q.numel()


def reference(model, batch):
    """Return logits (B, C) and the picked indices, a list an image of a list a block, from the released entries."""
    config = Config(**model.config["config"])
    state = {key.removeprefix("transformer."): value for key, value in model.released_state_dict().items()}

    def dense(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def run(x, name):
        q, k, v = (
            dense(norm(x, f"{name}.attention_norm"), f"{name}.attn.{part}")
            .unflatten(-1, (config.num_heads, -1))
            .transpose(0, 1)
            for part in ("query", "key", "value")
        )
        raw = q @ k.mT / math.sqrt(q.shape[-1])
        share = raw.exp() / raw.exp().sum(-1, keepdim=True)
        x = x + dense((share @ v).transpose(0, 1).flatten(1), f"{name}.attn.out")
        y = dense(norm(x, f"{name}.ffn_norm"), f"{name}.ffn.fc1")
        return x + dense(y * (1 + torch.erf(y / math.sqrt(2))) / 2, f"{name}.ffn.fc2"), q, k

    logits, picked = [], []
    for image in batch:
        kernel, bias = (state[f"embeddings.patch_embeddings.{name}"] for name in ("weight", "bias"))
        patches = F.unfold(image[None], config.patch_size, stride=config.patch_size)[0].T  # row after row of the image
        tokens = torch.cat((state["embeddings.cls_token"][0], patches @ kernel.flatten(1).T + bias))
        tokens = tokens + state["embeddings.position_embeddings"][0]
        fused, indices = [], []
        for i in range(config.num_layers - 1):
            tokens, q, k = run(tokens, f"encoder.layer.{i}")
            if model.feature_fusion:
                scores = reference_scores(q[None], k[None])[0].tolist()
                indices.append(sorted(range(len(scores)), key=lambda n: -scores[n])[: model.num_token])
                fused.append(tokens[indices[-1]])
        last, last_norm = f"encoder.layer.{config.num_layers - 1}", "encoder.encoder_norm"
        if model.feature_fusion:
            tokens = torch.cat((tokens[:1], *fused))
            last, last_norm = "encoder.ff_last_layer", "encoder.ff_encoder_norm"
        tokens, _, _ = run(tokens, last)
        logits.append(dense(norm(tokens[0], last_norm), "head"))
        picked.append(indices)
    return torch.stack(logits), picked


@torch.no_grad()
@FUSION
@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((64, 64), {}),
        ((64, 96), {}),  # 4 rows of 6 patches
        ((48, 32), {}),
        ((32, 48), {"patch_size": 8}),
        ((64, 64), {"num_layers": 2, "num_heads": 4}),
        ((64, 64), {"num_token": 1}),
        ((64, 64), {"num_token": 16}),
        ((64, 64), {"num_layers": 2, "num_token": 1}),  # the released class fails on these
    ],
    ids=str,
)
def test_equals_the_equations_in_float64(size, sizes, fusion):
    model, batch = tiny(size, fusion, **sizes).double(), images(2, size).double()
    logits, selection = model(batch, return_selection=True)
    expected, picked = reference(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert [[indices[image].tolist() for indices in selection] for image in range(len(batch))] == picked


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_loss_is_cross_entropy_smoothed_over_the_classes(smoothing):
    loss, logits = tiny(smoothing=smoothing)(images(), LABELS)
    log_p = logits.log_softmax(-1)
    expected = -(1 - smoothing) * log_p[[0, 1], LABELS] - smoothing * log_p.mean(-1)
    torch.testing.assert_close(loss, expected.mean(), rtol=0, atol=1e-5)


# Configurations, sizes, precision.


def test_models_that_pick_other_numbers_of_tokens_do_not_interfere():
    models = [tiny(), tiny(num_token=5), tiny(fusion=False)]
    shapes = [[i.shape[1] for i in model(images(), return_selection=True)[1]] for model in (*models, models[0])]
    assert shapes == [[3, 3, 3], [5, 5, 5], [], [3, 3, 3]]
    with pytest.raises(TypeError):
        CONFIGS["ViT-B_16"] = TINY


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_token": 17}, "--num_token 17: .* 16"),
        ({"num_token": 0}, "--num_token 0"),
        ({"img_size": (16, 32), "num_token": 3}, "--num_token 3: .* 2"),
        ({"img_size": 65}, "--img_size 65: .* 16"),
        ({"img_size": (64, 40)}, r"--img_size \(64, 40\)"),
        ({"img_size": 0}, "--img_size 0"),
        ({"config": replace(TINY, num_layers=1)}, "feature fusion"),
        ({"config": CONFIGS["R50-ViT-B_16"], "img_size": 230}, "--img_size 230"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_sentence(arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        FFVT(**{"config": TINY, "img_size": 64, "num_classes": 10, "num_token": 12, **arguments})
    assert "\n" not in str(caught.value)


def test_without_fusion_the_number_of_tokens_does_not_matter():
    assert FFVT(replace(TINY, num_layers=1), 64, 10, feature_fusion=False, num_token=1000)(images()).shape == (2, 10)


TIMMS = {
    "ViT-B_16": "vit_base_patch16_224",
    "ViT-B_32": "vit_base_patch32_224",
    "ViT-L_16": "vit_large_patch16_224",
    "ViT-L_32": "vit_large_patch32_224",
    "ViT-H_14": "vit_huge_patch14_224",
    "R50-ViT-B_16": "vit_base_r50_s16_224",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_has_the_sizes_of_timms_model_and_runs(name):
    """With fusion and without; the epsilon of every LayerNorm is the released one."""
    config, side = CONFIGS[name], 16 * CONFIGS[name].patch_size
    with torch.device("meta"):
        theirs = timm.create_model(TIMMS[name], num_classes=200, img_size=side)
        for fusion in (True, False):
            model = FFVT(config, side, 200, fusion)
            ours = model.base_model
            logits, selection = model(torch.empty(2, 3, side, side), return_selection=True)
            assert logits.shape == (2, 200)
            assert [indices.shape for indices in selection] == [(2, 12)] * (config.num_layers - 1) * fusion
            shapes = [{key: value.shape for key, value in vit.state_dict().items()} for vit in (ours, theirs)]
            assert shapes[0] == shapes[1]
            assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
            norms = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
            assert norms == [1e-6] * (2 * config.num_layers + 1)


def test_the_recorded_arguments_build_the_same_model():
    model = tiny((64, 96), num_token=5, smoothing=0.1)
    again = FFVT(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    ours, theirs = model(images(2, (64, 96)), LABELS), again.eval()(images(2, (64, 96)), LABELS)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bfloat16_autocast_trains():
    model = tiny().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(images(), LABELS)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Dropout, initialisation.


@FUSION
def test_dropout_stands_behind_the_position_embedding_and_in_the_mlps_alone(fusion):
    places = ["pos_drop", *(f"blocks.{i}.mlp.drop{n}" for i in range(4) for n in (1, 2))]
    for rate in (0.1, 0.0):
        model = FFVT(replace(TINY, dropout=rate), 64, 10, fusion)
        rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
        assert rates == ({f"base_model.{place}": rate for place in places} if rate else {})


def assert_uniform(tensor, bound):
    assert 0.95 * bound < tensor.abs().max().item() <= bound


@FUSION
def test_initialisation_is_the_released_one(fusion):
    torch.manual_seed(0)
    model = FFVT(replace(TINY, hidden_size=96, mlp_dim=192), 64, 10, fusion)
    state = {key.removeprefix("base_model."): value for key, value in model.state_dict().items()}
    assert not any(state[key].any() for key in ("head.weight", "head.bias", "cls_token", "pos_embed"))
    assert_uniform(state["patch_embed.proj.weight"], 1 / math.sqrt(3 * 16 * 16))
    assert_uniform(state["patch_embed.proj.bias"], 1 / math.sqrt(3 * 16 * 16))
    for i in range(4):
        for name in ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"):
            assert_uniform(state[f"blocks.{i}.{name}"], 1 / math.sqrt(96))
        for name in ("fc1", "fc2"):
            assert_uniform(state[f"blocks.{i}.mlp.{name}.weight"], math.sqrt(6 / (96 + 192)))
            assert state[f"blocks.{i}.mlp.{name}.bias"].std().item() == pytest.approx(1e-6, rel=0.3)
    norms = {key: value for key, value in state.items() if "norm" in key}
    assert len(norms) == 18
    assert all((value == (1 if key.endswith("weight") else 0)).all() for key, value in norms.items())


# The authors' checkpoints.


@pytest.mark.parametrize(
    ("fusion", "sizes"),
    [(True, {}), (False, {}), (True, {"resnet_layers": (1, 2, 1)})],
    ids=["fusion", "plain", "hybrid"],
)
def test_an_exported_checkpoint_loads_bit_for_bit(fusion, sizes, tmp_path):
    model, again = (FFVT(replace(TINY, **sizes), 64, 10, fusion, 3) for _ in range(2))
    fill_state_dict(model)
    torch.save(model.released_state_dict(), tmp_path / "x_checkpoint.bin")
    again.load_released(torch.load(tmp_path / "x_checkpoint.bin", weights_only=True))
    assert_same_state(again.state_dict(), model.state_dict())
    assert_same_state(model.from_released(model.state_dict()), model.state_dict())  # in this model's names already


QUERY, KEY = (f"transformer.encoder.layer.1.attn.{name}.weight" for name in ("query", "key"))
QUERY_OR_QKV = r"layer\.1\.attn\.query\.weight|blocks\.1\.attn\.qkv\.weight"


def assert_refused(model, state, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        model.load_released(state)
    assert "\n" not in str(caught.value)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("changes", "named"),  # the shapes of other entries; None: no such entry
    [
        ({QUERY: None}, QUERY),
        ({"head.scale": (1,)}, r"head\.scale"),
        ({"head.bias": (9,)}, r"head\.bias of shape \(9,\)"),
        ({QUERY: (48, 47)}, QUERY_OR_QKV),
        ({QUERY: (40, 48), KEY: (56, 48)}, QUERY_OR_QKV),  # as many rows together
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_changes_nothing_and_says_why(changes, named):
    model = tiny()
    state = model.released_state_dict() | {key: torch.zeros(shape or 0) for key, shape in changes.items()}
    assert_refused(model, {key: value for key, value in state.items() if changes.get(key, ()) is not None}, named)


@pytest.mark.parametrize(
    ("ours", "theirs", "named"),
    [
        ({}, {"num_classes": 7}, r"7.*10"),
        ({}, {"fusion": False}, "without feature fusion"),
        ({"fusion": False}, {}, "with feature fusion"),
        ({}, {"img_size": 96}, "position_embeddings|pos_embed"),
        ({"num_layers": 5}, {}, r"layer\.3\."),
        ({"num_layers": 3}, {}, r"layer\.2\."),
        ({}, {"mlp_dim": 192}, r"fc1\."),
        ({}, None, "checkpoint"),  # an empty file
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_says_which(ours, theirs, named):
    assert_refused(tiny(**ours), {} if theirs is None else tiny(**theirs).released_state_dict(), named)


# What the backward pass keeps.


def test_no_matrix_of_all_tokens_by_all_tokens_is_kept_for_the_backward_pass():
    model, shapes = tiny((64, 96)).train(), []  # 25 tokens: no other size is 25
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda t: t):
        loss, _ = model(images(2, (64, 96)), LABELS)
    assert sum(25 in shape for shape in shapes) > 20  # they are watched indeed
    assert not [shape for shape in shapes if list(shape).count(25) > 1]
    loss.backward()


@FUSION
def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(fusion):
    plain, saving = tiny(fusion=fusion).train(), tiny(fusion=fusion).train()
    saving.set_grad_checkpointing(True)
    calls, losses = [], []
    saving.base_model.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        torch.manual_seed(0)
        loss, _ = model(images(), LABELS)
        loss.backward()
        losses.append(loss)
    assert len(calls) == 2
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6 * max(1.0, a.grad.abs().max().item()), msg=name)
    torch.manual_seed(1)
    assert not torch.equal(plain(images(), LABELS)[0], losses[0])  # there is dropout
