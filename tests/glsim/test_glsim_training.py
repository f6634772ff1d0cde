"""Losses, optimizers, rates and demo models of GLSim's program. The released figures are in tests/parity."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.engine import logits_of
from common.errors import UserError
from glsim.model_utils.build import build_model
from glsim.tools.train import repeated
from glsim.train_utils.demo import demo_settings
from glsim.train_utils.losses import focal_loss, make_objective
from glsim.train_utils.recipe import Recipe, learning_rate
from glsim.train_utils.schedule import make_optimizer


def test_a_confident_sample_has_a_finite_gradient() -> None:
    """1 - p_t is 0 in float32, and its power below 1 rises infinitely there."""
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0]), 0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(1, 2))


def test_focal_loss_of_shares_is_the_share_of_the_focal_loss_of_labels() -> None:
    logits, labels = torch.randn(5, 7), torch.randint(7, (5,))
    shares = F.one_hot(labels, 7).float()
    torch.testing.assert_close(focal_loss(logits, shares, 2.0), focal_loss(logits, labels, 2.0))


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


@pytest.mark.parametrize(("name", "value"), [("cm", True), ("mu", True), ("focal_gamma", 2.0)])
@pytest.mark.parametrize("model_name", ["transfg", "cal"])
def test_models_with_a_loss_of_their_own_refuse_another(model_name: str, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"--{name}: {model_name} has a loss of its own"):
        make_objective(Recipe(**{"model_name": model_name, name: value}), 3)


@pytest.mark.parametrize("name", ["mix_prob", "smoothing"])
def test_shares_that_are_none(name: str) -> None:
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(UserError, match=f"--{name} {value}: expected a number from 0 to 1"):
            make_objective(Recipe(**{name: value, "cm": True, "ls": True}), 3)


def make(opt: str, betas: list[float] | None = None) -> Any:
    return make_optimizer([nn.Parameter(torch.zeros(2, 2))], opt, 0.1, 0.9, 0.0, opt_betas=betas)


def test_optimizers_by_timms_names() -> None:
    assert tuple(make("adamw", [0.8, 0.9]).param_groups[0]["betas"]) == (0.8, 0.9)
    assert tuple(make("adan", [0.8, 0.9, 0.5]).param_groups[0]["betas"]) == (0.8, 0.9, 0.5)
    assert make("Lookahead_SGD").param_groups[0]["nesterov"]


NONE = [(opt, None) for opt in ("foo", "adamv", "lbfgs", "lookahead_foo", "lookahead_", "adahessian")]
BETAS = [("adamw", betas) for betas in ([0.9], [0.9, 0.99, 0.5], [0.9, 1.0], [-0.1, 0.9], [float("nan"), 0.9])]
BETAS += [("sgd", [0.9, 2.0]), ("adan", [0.9, 0.9])]


@pytest.mark.parametrize(("opt", "betas"), NONE + BETAS)
def test_optimizers_that_cannot_be(opt: str, betas: list[float] | None) -> None:
    message = f"--opt {opt}" if betas is None else f"--opt_betas {' '.join(map(str, betas))}: expected"
    with pytest.raises(UserError, match=message) as caught:
        make(opt, betas)
    assert "\n" not in str(caught.value)


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


def test_repeated_augmentation() -> None:
    order = repeated(lambda epoch: [4, 2, 0, 3, 1], 2)
    assert order(0) == [4, 4, 2, 2, 0]
    # 240 images, of which the released sampler takes none, are 240.
    assert len(repeated(lambda epoch: range(240), 3)(0)) == 240


@pytest.mark.parametrize(
    ("processes", "released", "expected"),
    [(1, False, 0.1 * 32 / 8), (1, True, 0.1 * 16 / 8), (4, False, 0.1 * 128 / 8), (4, True, 0.1 * 4 * 128 / 256)],
)
def test_base_lr(processes: int, released: bool, expected: float) -> None:
    recipe = Recipe(base_lr=0.1, batch_size=16, gradient_accumulation_steps=2, released=released)
    assert learning_rate(recipe, processes) == pytest.approx(expected)
    assert learning_rate(Recipe(lr=0.3, batch_size=16), processes) == 0.3
