"""FFVT's training loop: what accumulation and the loss scale promise."""

import copy

import pytest
import torch
from formula import fill_image
from parity.ffvt_steps import formula_images, formula_model, train
from tiny_run import CPU

from common.cli import Options
from common.train.checkpoint import read_sums
from ffvt.train import Recipe, make_precision, optimize, rate_factor


def test_no_gradient_of_one_epoch_leaks_into_the_next() -> None:
    """The released loop leaves the micro-batches that an epoch has over in .grad, and the next update takes them in."""
    recipe = Recipe("t", num_steps=4, warmup_steps=1, gradient_accumulation_steps=3, max_grad_norm=1e9)
    _, state, steps = train(recipe, batch_size=9)  # two steps an epoch, of 9 and 3 images
    next(steps), next(steps)
    before = copy.deepcopy(state.model)
    next(steps)
    images, labels = formula_images(12).images[:9], torch.tensor(formula_images(9).labels)
    before.train()(images, labels)[0].backward()
    for one, other in zip(before.parameters(), state.model.parameters(), strict=True):
        # Three sums of three images and one of nine: entries are off by a share of the largest.
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5 * max(0.1, one.grad.abs().max().item()))


def test_accumulation_equals_the_large_batch() -> None:
    states = []
    for parts in (1, 2):
        more = {"gradient_accumulation_steps": parts}
        _, state, steps = train(Recipe("t", learning_rate=0.05, warmup_steps=1, num_steps=4, **more), batch_size=6)
        assert len(list(steps)) == 4
        read_sums(state)
        states.append(state)
    for one, other in zip(*(state.model.parameters() for state in states), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert states[0].logged == pytest.approx(states[1].logged, abs=1e-5)


def test_without_warm_up() -> None:
    assert rate_factor(0, 0, 10, "cosine") == 1
    assert rate_factor(0, 0, 10, "linear") == 1


def test_static_and_dynamic_loss_scale() -> None:
    model = formula_model()
    optimizer, _ = optimize(Recipe("t"), model.parameters())
    for scale, expected in ((0.0, 2.0**20), (1024.0, 1024.0)):
        precision = make_precision(Recipe("t", loss_scale=scale), Options(precision="fp16"), CPU)
        assert precision.scaler.get_scale() == expected
        model(fill_image(2, 3, 64, 64), torch.tensor([3, 7]))[0].backward()
        model.base_model.cls_token.grad.fill_(float("inf"))
        precision.scaler.scale(torch.ones(()))  # as backward does, before the step
        assert precision.step(optimizer, model.parameters(), 1.0)
        assert precision.scaler.get_scale() == (scale if scale else expected / 2)
