"""Schedules, losses and the training loop of GLSim's program against the figures that the released code computed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formula import check_figures, fill, fill_image
from torch import Tensor, nn

from common.data.loader import Plan
from common.engine import Loading, Trainer, logits_of
from common.errors import UserError
from common.experiment import Options
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.model_utils.build import build_model
from glsim.tools.train import EXPERIMENT, repeated
from glsim.train_utils.demo import demo_settings
from glsim.train_utils.losses import focal_loss, make_objective
from glsim.train_utils.recipe import Recipe, learning_rate
from glsim.train_utils.schedule import make_optimizer, make_schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glsim_training.json").read_text())
CPU = torch.device("cpu")
# case of the recorded trajectories: what differs from the setting named in the file
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no_clipping": {"clip_grad": None},  # as the released code trains without fp16
    "accumulation_2": {"gradient_accumulation_steps": 2},
    "linear": {"sched": "linear"},
    "step": {"sched": "step", "decay_epochs": 1},
    "label_smoothing": {"ls": True},
    "weight_decay": {"weight_decay": 0.05},
}


class FormulaImages:
    """Images by formula, sample s of class (3 s + 1) mod 10, in the place of a data set."""

    split, classes = "formula", [str(number) for number in range(10)]

    def __init__(self, count: int, batch: int) -> None:
        self.images = fill_image(count, 3, 96, 96)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], (3 * index + 1) % 10


def formula_model() -> ViTGLSim:
    config = ViTConfig(
        "vit_t16",
        num_hidden_layers=3,
        image_size=96,
        dynamic_anchor=True,
        dynamic_top=4,
        anchor_class_token=True,
        reducer="cls",
        aggregator=True,
        aggregator_norm=True,
        hidden_dropout_prob=0.0,
        num_classes=10,
    )
    model = ViTGLSim(config)
    model.load_released({name: fill(name, value.shape) for name, value in model.released_state_dict().items()})
    return model


def make_trainer(recipe: Recipe) -> Trainer:
    """The trainer that common.run would make of `recipe`, on 12 images in a fixed order."""
    images: Any = FormulaImages(12, 3)
    model = formula_model()
    batch = EXPERIMENT.global_batch_size(recipe)
    plan = Plan(lambda epoch: range(12), 12, batch, recipe.gradient_accumulation_steps)
    optimizer, scheduler = EXPERIMENT.optimizer(recipe, model, plan)
    return Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        precision=EXPERIMENT.precision(recipe, Options(), CPU),
        images=images,
        plan=plan,
        steps=EXPERIMENT.steps(recipe, plan),
        device=CPU,
        loading=Loading(),
        objective=EXPERIMENT.objective_of(recipe, 10),
        clip_grad=EXPERIMENT.max_norm(recipe),
        schedule_per=EXPERIMENT.schedule_per,
    )


@pytest.mark.parametrize("case", CASES)
def test_two_epochs_as_the_released_loop_trains(case: str) -> None:
    recorded, changes = GOLDEN["trajectories"][case], CASES[case]
    recipe = Recipe(**({"epochs": 2, "batch_size": 3, "lr": 0.05, "warmup_steps": 2, "released": True} | changes))
    trainer = make_trainer(recipe)
    groups = [[len(g["params"]), g["weight_decay"]] for g in trainer.optimizer.param_groups]
    assert [decay for _, decay in groups] == [decay for _, decay in recorded["groups"]]
    losses, rates = [], []
    for _ in trainer.run():
        sums = trainer.report()
        losses.append(sums["loss"] / sums["samples"])
        rates.append(trainer.rate)
    each = recipe.gradient_accumulation_steps
    expected = np.reshape(recorded["losses"], (-1, each)).mean(1)
    np.testing.assert_allclose(losses, expected, rtol=5e-6, atol=2e-5)
    np.testing.assert_allclose(rates, recorded["rates"][::each], rtol=1e-6)
    model: Any = trainer.model
    final = model.released_state_dict()
    for name, figures in recorded["final"].items():
        found = check_figures(final[name])
        for figure in ("sum", "abs_sum", "wsum"):
            assert found[figure] == pytest.approx(figures[figure], rel=2e-5, abs=2e-3), (name, figure)
        np.testing.assert_allclose(final[name].flatten()[:4], figures["first"], atol=2e-6)


@pytest.mark.parametrize("name", GOLDEN["schedules"])
def test_schedules(name: str) -> None:
    recorded = GOLDEN["schedules"][name]
    in_epochs = "t_in_epochs" in name
    settings: dict[str, Any] = {
        "t_in_epochs": in_epochs,
        "warmup_steps": 0 if "steps0" in name else 50,
        "warmup_epochs": 2,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "decay_epochs": 2 if name == "step_decay_epochs2" else 30,
        "decay_rate": 0.1,
    }

    def rates(released: bool) -> list[float]:
        optimizer = make_optimizer([nn.Parameter(torch.zeros(2))], "sgd", 0.01, 0.9, 0.0)
        schedule = make_schedule(optimizer, name.split("_")[0], 5, 100, 1, released, **settings)
        used = []
        for update in range(500):
            used.append(optimizer.param_groups[0]["lr"])
            schedule.step_update(update + 1)
            if (update + 1) % 100 == 0:
                schedule.step((update + 1) // 100)
        return used

    used = rates(released=True)
    for update, rate in recorded["used"].items():
        assert used[int(update)] == pytest.approx(rate, abs=1e-9), update
    assert sum(used) == pytest.approx(recorded["sum_of_used"], abs=1e-7)
    if not in_epochs:  # our own side asks for the rate of update u at u
        described = rates(released=False)
        for update, rate in recorded["function"].items():
            assert described[int(update)] == pytest.approx(rate, abs=1e-9), update


def test_losses() -> None:
    recorded = GOLDEN["losses"]
    logits, labels = 4 * fill("ls_logits", (4, 10)), torch.tensor([0, 3, 3, 9])
    model: Any = lambda images: (images, "crops")  # noqa: E731  # logits come first

    def loss(released: bool = False, **settings: Any) -> float:
        return float(make_objective(Recipe(**settings), 10, released)(model, logits, labels)[0])

    assert loss() == pytest.approx(recorded["cross_entropy"], abs=1e-6)
    smoothed = recorded["label_smoothing_0.1 (timm LabelSmoothingCrossEntropy)"]
    assert loss(ls=True) == pytest.approx(smoothed, abs=1e-6)
    assert loss(True, focal_gamma=2.0) == pytest.approx(recorded["focal_gamma2"], abs=1e-6)
    assert loss(True, focal_gamma=0.5) == pytest.approx(recorded["focal_gamma0.5"], abs=1e-6)
    # The released focal loss knows neither --smoothing, which is 0.1, nor --focal_alpha; ours does.
    released = loss(True, focal_gamma=2.0, ls=True, smoothing=0.3)
    assert released == pytest.approx(recorded["focal_gamma2_smoothing (ls=0.1)"], abs=1e-6)
    assert loss(focal_gamma=2.0, focal_alpha=0.5) == pytest.approx(0.5 * recorded["focal_gamma2"], abs=1e-6)
    assert loss(focal_gamma=2.0, ls=True, smoothing=0.3) != pytest.approx(0.25 * released, abs=1e-3)


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


@pytest.mark.parametrize(
    ("opt", "betas", "message"),
    [
        ("foo", None, r"--opt foo: timm has no such optimizer; .*"),
        ("adamv", None, r"--opt adamv: timm has no such optimizer; did you mean adam\w*\?"),
        ("lbfgs", None, r"--opt lbfgs: timm has no such optimizer"),
        ("lookahead_foo", None, r"--opt lookahead_foo: timm has no such optimizer"),
        ("lookahead_", None, r"--opt lookahead_: timm has no such optimizer"),
        ("adahessian", None, r"--opt adahessian needs second derivatives"),
        ("lookahead_adahessian", None, r"--opt lookahead_adahessian needs second derivatives"),
        ("adamw", [0.9], r"--opt_betas 0\.9: expected 2 numbers from 0 to less than 1 for adamw"),
        ("adamw", [0.9, 0.99, 0.5], r"--opt_betas 0\.9 0\.99 0\.5: expected 2 numbers"),
        ("adamw", [0.9, 1.0], r"--opt_betas 0\.9 1\.0: expected 2 numbers"),
        ("adamw", [-0.1, 0.9], r"--opt_betas -0\.1 0\.9: expected 2 numbers"),
        ("adamw", [float("nan"), 0.9], r"--opt_betas nan 0\.9: expected 2 numbers"),
        ("sgd", [0.9, 2.0], r"--opt_betas 0\.9 2\.0: expected 2 numbers"),
        ("adan", [0.9, 0.9], r"--opt_betas 0\.9 0\.9: expected 3 numbers"),
    ],
)
def test_optimizers_that_cannot_be(opt: str, betas: list[float] | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(opt, betas)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("densenet121", {"image_size": 64}),
        ("convnext_atto", {"image_size": 64}),
        ("vit_tiny_patch16_224", {"image_size": 64}),
        ("vit_b16", {"image_size": 16, "dynamic_top": 4}),
        ("glsvit_tiny_patch16_224", {"image_size": 64, "dynamic_top": 4}),
        ("transfg", {"image_size": 16}),
        ("ffvt", {"image_size": 16}),
        ("cal", {"image_size": 32}),
        ("resnet101", {"image_size": 32}),
    ],
)
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


def test_accumulation_equals_the_large_batch() -> None:
    finals = []
    for batch, parts in ((6, 1), (3, 2)):
        recipe = Recipe(epochs=2, batch_size=batch, gradient_accumulation_steps=parts, lr=0.01, warmup_steps=2)
        trainer = make_trainer(recipe)
        for _ in trainer.run():
            pass
        finals.append(trainer.model.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, atol=2e-6, rtol=1e-5)
