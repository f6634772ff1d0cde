"""glsim.model_utils.transfg: part selection, contrastive loss and whole model written out, files, options, the start.

What it shares with the other models is in test_glsim_families.py, the released figures in tests/parity.
"""

import copy
import functools
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import fill_image, fill_npz, vit_spec
from small_models import LABELS, assert_uniform
from small_models import transfg as tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.npz import google_to_timm, read_npz, resize_position_embedding
from common.weights import load_weights
from glsim.model_utils.transfg import CONFIGS, ROWS, Config, TransFG, contrastive_loss, joint_attention, select_parts

TINY = Config(hidden_size=48, mlp_dim=96, num_heads=3, num_layers=4)


def images(batch=2, size=(64, 64)):
    return fill_image(batch, 3, *size)


# Google's .npz files.


@pytest.mark.parametrize("zero_head", [True, False])
def test_an_npz_file_leaves_the_head_alone_and_one_of_another_depth_changes_nothing(zero_head, tmp_path):
    fill_npz(tmp_path / "tiny.npz", vit_spec())
    model = TransFG(TINY, 64, 10, zero_head=zero_head)
    before = copy.deepcopy(model.state_dict())
    report = load_weights(model, tmp_path / "tiny.npz")
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(before) - set(report["left"])
    assert {key for key in report["left"] if "head" in key} == {"base_model.head.weight", "base_model.head.bias"}
    assert bool(model.get_classifier().weight.any()) is not zero_head
    oblong = tiny((40, 128))  # 3 x 10 patches
    oblong.load_npz(tmp_path / "tiny.npz")
    position = google_to_timm(read_npz(tmp_path / "tiny.npz"))["pos_embed"]
    assert torch.equal(oblong.base_model.pos_embed, resize_position_embedding(position, (3, 10)))
    short = tiny(num_layers=3)
    before = copy.deepcopy(short.state_dict())
    with pytest.raises(UserError, match=r"tiny\.npz has 4 blocks, but .* has 3"):
        short.load_npz(tmp_path / "tiny.npz")
    assert all(torch.equal(value, before[key]) for key, value in short.state_dict().items())


# The Part Selection Module and the contrastive loss, written out.


def random_blocks(num_blocks, batch=2, heads=3, tokens=17, width=8, sharpness=1.5):
    """Return queries and keys (B, H, N, d) of some blocks, the last block first."""
    generator = torch.Generator().manual_seed(num_blocks + tokens)
    shape = (batch, heads, tokens, width)
    return [tuple(sharpness * torch.randn(2, *shape, generator=generator)) for _ in range(num_blocks)]


def full_product(blocks):
    """Return the product (B, H, N, N) of all attention matrices in float64, the last block's leftmost."""
    matrices = [(q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(-1) for q, k in blocks]
    return functools.reduce(torch.matmul, matrices)


ROUNDING = 2e-6  # of scores of up to 50, which the exponential makes a share of the entries: at most 1


SIZES = [(2, 3, 17, 8, 1.5), (1, 1, 2, 4, 1), (2, 12, 50, 64, 1), (2, 3, ROWS, 8, 1), (2, 3, ROWS + 1, 8, 1)]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 11])
@pytest.mark.parametrize(("batch", "heads", "tokens", "width", "sharpness"), [*SIZES, (1, 3, 3 * ROWS + 6, 8, 3)])
def test_part_selection_equals_the_full_product_in_float64(num_blocks, batch, heads, tokens, width, sharpness):
    blocks = random_blocks(num_blocks, batch, heads, tokens, width, sharpness)
    expected = full_product(blocks)[:, :, 0]
    torch.testing.assert_close(joint_attention(blocks).double(), expected, rtol=0, atol=ROUNDING)
    assert torch.equal(select_parts(iter(blocks)), expected[..., 1:].argmax(-1) + 1)
    if num_blocks == 3 and tokens > 2:  # their order matters
        assert not torch.equal(select_parts(blocks), select_parts(blocks[::-1]))


def test_a_head_never_picks_cls_and_two_may_pick_the_same_patch():
    q, k = torch.ones(1, 2, 4, 1), torch.tensor([9.0, 1.0, 3.0, 2.0]).expand(1, 2, 4)[..., None]
    assert joint_attention([(q, k)])[0, 0].argmax() == 0
    assert select_parts([(q, k), (q, k)]).tolist() == [[2, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_part_selection_is_float32_and_off_by_the_rounding_of_its_inputs_alone(dtype):
    blocks = [(q.to(dtype), k.to(dtype)) for q, k in random_blocks(3)]
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype):
        row = joint_attention(blocks)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.double(), full_product(blocks)[:, :, 0], rtol=0, atol=ROUNDING)


def test_part_selection_costs_a_row_a_block_and_forms_a_few_rows_of_a_matrix_at_once():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    size, width = 1370, 64
    blocks = random_blocks(3, batch=1, heads=1, tokens=size, width=width)
    with Largest() as largest:
        joint_attention(blocks)
    with FlopCounterMode(display=False) as flops:
        joint_attention(blocks)
    assert largest.size == ROWS * size
    assert flops.get_total_flops() == 2 * size * width * (1 + 2 * size) + 2 * 2 * size**2  # attention, and rows


def slow_contrastive_loss(features, labels):
    total, count = 0.0, len(features)
    for one, label in zip(features.tolist(), labels.tolist(), strict=True):
        for other, other_label in zip(features.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(one, other, strict=True))
            cosine = dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))
            total += 1 - cosine if label == other_label else max(cosine - 0.4, 0.0)
    return total / count**2


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("classes", [1, 2, 200])
def test_contrastive_loss_equals_a_loop_over_all_pairs(count, classes):
    generator = torch.Generator().manual_seed(count)
    features = 1 + torch.randn(count, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(classes, (count,), generator=generator)
    loss = contrastive_loss(features, labels)
    assert loss.item() == pytest.approx(slow_contrastive_loss(features, labels), abs=1e-12)
    assert torch.autograd.gradcheck(contrastive_loss, (features, labels))
    with torch.autocast("cpu", torch.bfloat16):
        of_half = contrastive_loss(features.bfloat16(), labels)
    assert of_half.dtype == torch.float32
    assert of_half.item() == pytest.approx(slow_contrastive_loss(features.bfloat16(), labels), abs=1e-6)


# The whole model, written out.


def reference(model, batch):
    """Return logits (B, C), features (B, D) and the part of each head (B, H), from the released entries."""
    config = Config(**model.config["config"])
    step = model.config["slide_step"] or config.patch_size
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
        return x + dense(y * (1 + torch.erf(y / math.sqrt(2))) / 2, f"{name}.ffn.fc2"), share

    features, parts = [], []
    for image in batch:
        kernel, bias = (state[f"embeddings.patch_embeddings.{name}"] for name in ("weight", "bias"))
        patches = F.unfold(image[None], config.patch_size, stride=step)[0].T  # row after row of the image
        tokens = torch.cat((state["embeddings.cls_token"][0], patches @ kernel.flatten(1).T + bias))
        tokens = tokens + state["embeddings.position_embeddings"][0]
        product = torch.eye(len(tokens)).double()
        for i in range(config.num_layers - 1):
            tokens, share = run(tokens, f"encoder.layer.{i}")
            product = share @ product  # (H, N, N)
        parts.append([max(range(1, len(tokens)), key=lambda n, row=head[0]: row[n]) for head in product])
        tokens, _ = run(torch.stack([tokens[0], *(tokens[part] for part in parts[-1])]), "encoder.part_layer")
        features.append(norm(tokens[0], "encoder.part_norm"))
    features = torch.stack(features)
    logits = features @ state["part_head.weight"].T + state["part_head.bias"]
    return logits, features, parts


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "step", "sizes"),
    [
        ((64, 64), 12, {}),
        ((64, 64), None, {}),
        ((64, 96), 12, {}),  # 5 rows of 7 patches; 8 columns of the image in none
        ((48, 32), None, {}),
        ((37, 50), 5, {"patch_size": 8}),
        ((32, 48), None, {"patch_size": 8}),
        ((64, 64), 12, {"num_layers": 2, "num_heads": 4}),
        ((16, 16), 12, {}),  # one patch, which every head picks
    ],
    ids=str,
)
def test_equals_the_equations_in_float64(size, step, sizes):
    model, batch = tiny(size, step, **sizes).double(), images(2, size).double()
    logits, features, parts = reference(model, batch)
    ours, selection = model(batch, return_selection=True)
    assert selection.tolist() == parts
    torch.testing.assert_close(ours, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.forward_features(batch)[0], features, rtol=1e-9, atol=1e-9)


def test_loss_is_smoothed_cross_entropy_plus_the_contrastive_loss():
    for smoothing in (0.0, 0.1, 0.3):
        model = tiny(smoothing=smoothing)
        loss, logits = model(images(), LABELS)
        log_p = logits.log_softmax(-1)
        expected = -(1 - smoothing) * log_p[[0, 1], LABELS] - smoothing * log_p.mean(-1)
        features, _ = model.forward_features(images())
        torch.testing.assert_close(loss, expected.mean() + slow_contrastive_loss(features, LABELS))


# Sizes.


def test_a_batch_of_one_trains_on_cross_entropy_alone():
    loss, logits = tiny().train()(images(1), LABELS[:1])
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS[:1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slide_step": 0}, "slide_step 0: expected 1 to 16"),
        ({"slide_step": 17}, "slide_step 17"),
        ({"img_size": (64, 8)}, r"img_size \(64, 8\): expected at least 16"),
        ({"img_size": 65, "slide_step": None}, "img_size 65: expected a multiple"),
        ({"img_size": (64, 40), "slide_step": 16}, r"img_size \(64, 40\): expected a multiple"),
        ({"config": replace(TINY, num_layers=1)}, "needs at least 2 blocks"),
    ],
)
def test_what_cannot_serve_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        TransFG(**{"config": TINY, "img_size": 64, "num_classes": 10, **arguments})


@pytest.mark.parametrize(("side", "step", "patches"), [(448, 12, 37), (304, 12, 25), (224, 12, 18), (448, None, 28)])
def test_patches_are_as_many_as_published(side, step, patches):
    with torch.device("meta"):
        embedding = TransFG(CONFIGS["ViT-B_16"], side, 200, step).base_model.patch_embed
    assert (embedding.grid_size, embedding.num_patches) == ((patches, patches), patches**2)


TIMMS = {"B_16": "base_patch16", "B_32": "base_patch32", "L_16": "large_patch16", "L_32": "large_patch32"}
TIMMS |= {"H_14": "huge_patch14"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs_and_has_the_sizes_of_timms_model(name):
    config = CONFIGS[name]
    side = 4 * config.patch_size
    with torch.device("meta"):
        for step in (12, None):
            model = TransFG(config, side, 10, step)
            logits, parts = model(torch.empty(2, 3, side, side), return_selection=True)
            assert (logits.shape, parts.shape) == ((2, 10), (2, config.num_heads))
        theirs = timm.create_model(f"vit_{TIMMS[name.removeprefix('ViT-')]}_224", img_size=side, num_classes=10)
    eps = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert eps == [1e-6] * (2 * config.num_layers + 1)
    ours = model.base_model
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


# Dropout, initialisation.


def test_dropout_stands_behind_the_position_embedding_and_in_the_mlps_alone():
    rates = {name: m.p for name, m in tiny().named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    places = ["pos_drop", *(f"blocks.{i}.mlp.drop{n}" for i in range(4) for n in (1, 2))]
    assert rates == {f"base_model.{place}": 0.1 for place in places}
    plain = TransFG(replace(TINY, dropout=0.0), 64, 10)
    assert not any(m.p for m in plain.modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize("zero_head", [True, False])
def test_initialisation_is_that_of_the_released_family(zero_head):
    torch.manual_seed(0)
    model = TransFG(replace(TINY, hidden_size=96, mlp_dim=192), 64, 100, zero_head=zero_head)
    state = {key.removeprefix("base_model."): value for key, value in model.state_dict().items()}
    assert not any(state[key].any() for key in ("cls_token", "pos_embed"))
    for key in ("head.weight", "head.bias"):
        if zero_head:
            assert not state[key].any()
        else:
            assert_uniform(state[key], 1 / math.sqrt(96))
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


# What the backward pass keeps.


def test_no_matrix_of_all_tokens_by_all_tokens_is_kept_for_the_backward_pass():
    model, shapes = tiny((64, 96)).train(), []  # 36 tokens: no other size is 36
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda t: t):
        loss, _ = model(images(2, (64, 96)), LABELS)
    assert sum(36 in shape for shape in shapes) > 20  # they are watched indeed
    assert not [shape for shape in shapes if list(shape).count(36) > 1]
    loss.backward()
