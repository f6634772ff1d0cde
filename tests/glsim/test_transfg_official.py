"""glsim.model_utils.transfg: part selection, contrastive loss and whole model written out, files, options, the start.

What it shares with the other models is in test_glsim_families.py, the released figures in tests/parity.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from formula import fill_image
from small_models import LABELS
from small_models import transfg as tiny

from glsim.model_utils.transfg import CONFIGS, ROWS, Config, TransFG, contrastive_loss, joint_attention, select_parts

TINY = Config(hidden_size=48, mlp_dim=96, num_heads=3, num_layers=4)


def images(batch=2, size=(64, 64)):
    return fill_image(batch, 3, *size)


# Google's .npz files.


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


@pytest.mark.parametrize(("side", "step", "patches"), [(448, 12, 37), (304, 12, 25), (224, 12, 18), (448, None, 28)])
def test_patches_are_as_many_as_published(side, step, patches):
    with torch.device("meta"):
        embedding = TransFG(CONFIGS["ViT-B_16"], side, 200, step).base_model.patch_embed
    assert (embedding.grid_size, embedding.num_patches) == ((patches, patches), patches**2)


# Dropout, initialisation.


# What the backward pass keeps.
