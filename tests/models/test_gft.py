"""GFT: both sides against the paper's definitions written out, what reaches the logits, and the averages' state."""

import pytest
import torch
from formula import fill
from largest import largest
from tiny_timm import TINY, VIT, images, plain_attention, tiny

from common.errors import UserError
from gft import GFT
from gft.model import HierarchicalAttention

SIDES = pytest.mark.parametrize("side", ["described", "released"])


# A direct formulation of both sides: materialised N x N scores, loops over images, heads and tokens.


def reference_scores(gala, raw):
    """Return the z-scores (P,) of raw scores (H, P, N), by the definition."""
    mean = raw.mean(-1)
    num_heads, num_tokens = mean.shape
    strength = torch.zeros(num_tokens + 2, dtype=raw.dtype)
    for i in range(num_tokens):
        before, after = max(i - 1, 0), min(i + 1, num_tokens - 1)
        slope = (mean[:, after] - mean[:, before]) / (after - before)
        strength[i + 1] = slope.abs().sum() / num_heads
    kernel = gala.smooth.weight.flatten()
    smoothed = torch.stack([(kernel * strength[i : i + 3]).sum() for i in range(num_tokens)])
    spread = ((smoothed - smoothed.mean()) ** 2).sum() / (num_tokens - 1)
    return (smoothed - smoothed.mean()) / (spread.sqrt() + 1e-6)


@torch.no_grad()
def reference(model, batch, emas=None):
    """Return logits, importance per stage and image, and patches per stage and image; `emas` holds training state."""
    vit, lead = model.base_model, 0 if model.released else 1
    patches, prefix = vit.forward_intermediates(
        batch, indices=[7], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[0]
    num_patches, logits, weights, kept = patches.shape[1], [], [], []
    for image in range(len(batch)):
        cls = prefix[image, 0]
        positions = list(range(num_patches))
        tokens = patches[image] if model.released else torch.cat((cls[None], patches[image]))
        for stage, (gala, ratio) in enumerate(zip(model.hierarchical_blocks, (0.75, 0.5, 0.25), strict=True)):
            out, raw = plain_attention(gala, tokens)
            scores = reference_scores(gala, raw[:, lead:])
            if emas is not None:
                before = emas.get((stage, image), scores)
                emas[stage, image] = 0.9 * before + 0.1 * scores
                scores = 0.5 * (scores + emas[stage, image])
            weight = (scores / 0.1).exp() / (scores / 0.1).exp().sum()
            order = sorted(range(len(weight)), key=lambda i: -weight[i].item())[: int(num_patches * ratio)]
            positions = [positions[i] for i in order]
            attended = out if model.released else tokens + out
            tokens = attended[list(range(lead)) + [i + lead for i in order]]
            weights.append(weight)
            kept.append(positions)
        logits.append(model.classifier(cls if model.released else tokens[0]))
    return torch.stack(logits), weights, kept


def assert_equals_reference(model, batch, emas=None):
    logits, stages = model(batch, return_selection=True)
    expected, weights, kept = reference(model, batch, emas)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    if emas is None:
        torch.testing.assert_close(model(batch), logits, rtol=1e-9, atol=1e-9)
    for image in range(len(batch)):
        for stage in range(3):
            index = 3 * image + stage
            torch.testing.assert_close(stages[stage].importance[image], weights[index], rtol=1e-7, atol=1e-12)
            assert stages[stage].patches[image].tolist() == kept[index]


@SIDES
@pytest.mark.parametrize(
    ("backbone", "prefix_tokens", "size"),
    [
        (VIT, 1, (32, 32)),
        ("deit_tiny_distilled_patch16_224", 2, (32, 24)),
        ("vit_small_patch14_reg4_dinov2", 5, (24, 32)),  # position embedding for the patches alone, layer scale
        ("vit_base_patch16_clip_224", 1, (24, 24)),  # norm before the blocks
    ],
)
def test_equals_the_direct_formulation_in_float64(backbone, prefix_tokens, size, side):
    model = tiny(side, backbone, img_size=size).double()
    assert model.base_model.num_prefix_tokens == prefix_tokens
    assert_equals_reference(model, images(2, size).double())


@SIDES
def test_equals_the_direct_formulation_over_training_calls(side):
    model, emas = tiny(side).double().train(), {}
    for batch in (images(), images().flip(3), images().flip(2)):
        assert_equals_reference(model, batch.double(), emas)
    for (stage, image), ema in emas.items():
        torch.testing.assert_close(model.hierarchical_blocks[stage].ema[image], ema, rtol=1e-9, atol=1e-9)


# The averages: not in the state_dict, but in the training state.


@SIDES
def test_a_ragged_last_batch_trains_and_starts_the_averages_afresh(side):
    model = tiny(side).train()
    for batch in (3, 1, 3):
        logits, stages = model(images(batch), return_selection=True)
        logits.sum().backward()
        assert [tuple(ema.shape) for ema in model.training_state().values()] == [(batch, n) for n in (64, 48, 32)]
        assert [tuple(stage.indices.shape) for stage in stages] == [(batch, n) for n in (48, 32, 16)]
    assert torch.equal(model.eval()(images(2)), tiny(side)(images(2)))  # evaluation never reads them


@SIDES
def test_training_state_makes_a_resumed_run_exact(side):
    model, resumed, batch = tiny(side).train(), tiny(side).train(), images().flip(3)
    assert not any("ema" in key for key in model.state_dict())
    model(images(), return_selection=True)
    saved = model.training_state()
    resumed.load_training_state(saved)
    for _ in range(2):
        (logits, stages), (logits2, stages2) = model(batch, True), resumed(batch, True)
        assert torch.equal(logits, logits2)
        for a, b in zip(stages, stages2, strict=True):
            assert torch.equal(a.importance, b.importance)
    assert not torch.equal(saved["hierarchical_blocks.0.ema"], model.training_state()["hierarchical_blocks.0.ema"])
    with pytest.raises(UserError, match=r"blocks\.ema"):
        resumed.load_training_state({"blocks.ema": torch.zeros(1)})


@torch.no_grad()
def test_scores_that_are_not_finite_do_not_stay_in_the_average():
    """One bad image would spoil its place in every later batch."""
    for step, bad in ((0, 2), (2, 1)):
        gala, twin = (HierarchicalAttention(48, num_heads=3).train() for _ in range(2))
        twin.load_state_dict(gala.state_dict())
        for call in range(4):
            q, k, _ = gala.heads(fill(f"tokens {call}", (3, 20, 48)))
            twin.score(q, k)
            if call == step:
                q = q.clone()
                q[bad, 0, 7] = float("nan")
            gala.score(q, k)
        assert gala.ema.isfinite().all()
        kept = [row for row in range(3) if row != bad]
        assert torch.equal(gala.ema[kept], twin.ema[kept])


# Scores and importance.


def test_selection_keeps_its_order_where_the_importance_underflows(monkeypatch):
    def scores(gala, q, k):
        return torch.linspace(0, 40, q.shape[2]).expand(q.shape[0], -1)

    monkeypatch.setattr(HierarchicalAttention, "score", scores)
    _, stages = tiny()(images(), return_selection=True)
    assert (stages[0].importance[0] == 0).sum() > 16  # so many that ties alone would choose
    assert stages[0].indices[0].tolist() == list(range(63, 15, -1))


@torch.no_grad()
def test_scores_stay_float32_under_autocast():
    gala = tiny().hierarchical_blocks[0]
    q, k, _ = (part.bfloat16() for part in gala.heads(fill("tokens", (2, 50, 48))))
    expected = gala.score(q.float(), k.float())
    with torch.autocast("cpu", torch.bfloat16):
        scores = gala.score(q, k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)  # z-scores; bfloat16 would be off by 1e-2


def test_score_never_holds_anything_as_large_as_a_score_matrix():
    gala, num_tokens = tiny().hierarchical_blocks[0], 200
    q, k, _ = gala.heads(fill("tokens", (1, num_tokens, 48)))
    assert largest(gala.score, q, k) <= num_tokens * 48


def test_timms_dropouts_apply_and_selection_counts_surviving_patches():
    model = tiny(patch_drop_rate=0.5, pos_drop_rate=0.1, drop_path_rate=0.1).train()
    logits, stages = model(images(), return_selection=True)
    assert [stage.indices.shape[1] for stage in stages] == [24, 16, 8]
    assert not torch.equal(logits, model(images()))


def test_initial_smoothing_is_a_sum_of_three():
    assert GFT(**TINY).hierarchical_blocks[2].smooth.weight.flatten().tolist() == [1, 1, 1]
