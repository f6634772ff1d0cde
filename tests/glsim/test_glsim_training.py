"""Losses, optimizers, rates and demo models of GLSim's program. The released figures are in tests/parity."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.train.loop import logits_of
from glsim.model_utils.build import build_model
from glsim.train_utils.demo import demo_settings
from glsim.train_utils.losses import focal_loss, make_objective
from glsim.train_utils.recipe import Recipe, learning_rate


def test_a_confident_sample_has_a_finite_gradient() -> None:
    """1 - p_t is 0 in float32, and its power below 1 rises infinitely there."""
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0]), 0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("kind", ["cm", "mu"])
def test_the_loss_of_a_mixed_batch_is_that_of_both_labels(kind: str) -> None:
    """Released: the images are mixed, and the loss is that of the labels before."""
    torch.manual_seed(1)
    seen = []

    def model(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean((-1, -2))  # (B, 3): three classes

    images = torch.stack([torch.full((3, 8, 8), float(value)) for value in range(4)])
    images[:, 0] *= 3
    labels = torch.tensor([0, 1, 2, 1])
    objective = make_objective(Recipe(**{kind: True, "mix_prob": 1.0, "alpha": 0.7}), 3)
    loss, logits = objective(model, images, labels)  # type: ignore[arg-type]
    mixed = seen[0]
    assert not torch.equal(mixed, images)
    other = images.roll(1, 0)
    # Plane 1 of image i holds i, of its partner i - 1 (mod 4): the share of the partner is read off the pixels.
    share = ((mixed[:, 1] - images[:, 1]) / (other[:, 1] - images[:, 1])).mean((-1, -2))
    torch.testing.assert_close(share, share[:1].expand(4))
    expected = (1 - share[0]) * F.cross_entropy(logits, labels) + share[0] * F.cross_entropy(logits, labels.roll(1))
    torch.testing.assert_close(loss, expected)
    untouched = make_objective(Recipe(**{kind: True, "mix_prob": 0.0}), 3)
    untouched(model, images, labels)  # type: ignore[arg-type]
    assert torch.equal(seen[1], images)


DEMO = [
    *((name, {"image_size": 64}) for name in ("densenet121", "convnext_atto", "vit_tiny_patch16_224")),
    *((name, {"image_size": 16}) for name in ("transfg", "ffvt")),
    *((name, {"image_size": 32}) for name in ("cal", "resnet101")),
    ("vit_b16", {"image_size": 16, "dynamic_top": 4}),
    ("glsvit_tiny_patch16_224", {"image_size": 64, "dynamic_top": 4}),
]


@pytest.mark.parametrize(("name", "changes"), DEMO)
def test_the_models_of_the_demo_are_built_for_its_images(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    settings = Recipe(model_name=name)
    demo = demo_settings(settings, {}, tmp_path)
    assert {key: demo[key] for key in ("image_size", "dynamic_top") if key in demo} == changes
    model = build_model(replace(settings, **demo), 3).eval()
    with torch.inference_mode():
        logits = logits_of(model(torch.rand(1, 3, *[changes["image_size"]] * 2)))
    assert logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("processes", "released", "expected"),
    [(1, False, 0.1 * 32 / 8), (1, True, 0.1 * 16 / 8), (4, False, 0.1 * 128 / 8), (4, True, 0.1 * 4 * 128 / 256)],
)
def test_base_lr(processes: int, released: bool, expected: float) -> None:
    recipe = Recipe(base_lr=0.1, batch_size=16, gradient_accumulation_steps=2, released=released)
    assert learning_rate(recipe, processes) == pytest.approx(expected)
    assert learning_rate(Recipe(lr=0.3, batch_size=16), processes) == 0.3
