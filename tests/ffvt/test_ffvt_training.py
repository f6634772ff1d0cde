"""FFVT's schedules and training loop against the figures that the released loop computed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import check_figures, fill, fill_image
from torch import Tensor

from common.amp import Precision
from common.data.loader import Plan
from common.engine import Loading, Trainer, evaluate
from common.experiment import Options
from ffvt.model import FFVT, Config
from ffvt.train import EXPERIMENT, Recipe, objective, optimize, rate_factor

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ffvt_training.json").read_text())
CPU = torch.device("cpu")
TINY = Config(48, 96, 3, 4, dropout=0.0)
# case of the recorded trajectories: what differs from the setting named in the file
CASES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "linear": {"decay_type": "linear"},
    "smoothing_0.1": {"smoothing_value": 0.1},
    "weight_decay_0.01": {"weight_decay": 0.01},
    "clip_0.1": {"max_grad_norm": 0.1},
    "accumulation_2": {"gradient_accumulation_steps": 2, "num_steps": 4},
}


class FormulaImages:
    """Images by formula, sample s of class (3 s + 1) mod 10, in the place of a data set."""

    split, classes = "formula", [str(number) for number in range(10)]

    def __init__(self, count: int) -> None:
        self.images = fill_image(count, 3, 64, 64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], (3 * index + 1) % 10


def formula_model(smoothing: float = 0.0) -> FFVT:
    model = FFVT(TINY, 64, 10, True, 3, smoothing)
    model.load_released({name: fill(name, value.shape) for name, value in model.released_state_dict().items()})
    return model


def make_trainer(recipe: Recipe, batch_size: int) -> Trainer:
    """The trainer that common.run would make of `recipe`, on 12 images in a fixed order."""
    images: Any = FormulaImages(12)
    model = formula_model(recipe.smoothing_value)
    optimizer, scheduler = optimize(recipe, model.parameters())
    return Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        precision=EXPERIMENT.precision(recipe, Options(), CPU),
        images=images,
        plan=Plan(lambda epoch: range(12), 12, batch_size, recipe.gradient_accumulation_steps),
        steps=recipe.steps,
        device=CPU,
        loading=Loading(),
        objective=objective,
        clip_grad=EXPERIMENT.max_norm(recipe),
        schedule_per=EXPERIMENT.schedule_per,
    )


@pytest.mark.parametrize("case", CASES)
def test_six_steps_as_the_released_loop_trains(case: str) -> None:
    recorded = GOLDEN["trajectories"][case]
    recipe = Recipe("t", **({"learning_rate": 0.05, "warmup_steps": 2, "num_steps": 6} | CASES[case]))
    trainer = make_trainer(recipe, batch_size=3 * recipe.gradient_accumulation_steps)
    losses: list[float] = []
    count = trainer._count

    def remember(loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        losses.append(loss.item())
        count(loss, logits, labels)

    trainer._count = remember  # type: ignore[method-assign]
    rates, accuracies = [], []
    test: Any = FormulaImages(4)
    for step in trainer.run():
        rates.append(trainer.rate)
        if step % 3 == 0:
            predictions = evaluate(trainer.model, test, CPU, trainer.precision, Loading(eval_batch_size=2))
            accuracies.append([step, float((predictions.ranked[:, 0] == predictions.label).mean())])
    # The released loop reports the loss of the last micro-batch, and the rate of the update that comes next.
    assert losses[recipe.gradient_accumulation_steps - 1 :: recipe.gradient_accumulation_steps] == pytest.approx(
        recorded["train_loss"], abs=2e-5
    )
    rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] == 0
    assert rates[1:] == pytest.approx(recorded["logged_lr"], abs=1e-9)
    assert accuracies == recorded["test_accuracy"]
    released = trainer.model.released_state_dict()  # type: ignore[operator]
    for name, figures in recorded["final_params"].items():
        ours = check_figures(released[name])
        assert ours["shape"] == figures["shape"]
        for key in ("sum", "abs_sum", "l2", "wsum"):
            assert ours[key] == pytest.approx(figures[key], abs=1e-4), (name, key)
        assert released[name].flatten()[:4].tolist() == pytest.approx(figures["first"], abs=1e-5)


def test_no_gradient_of_one_epoch_leaks_into_the_next() -> None:
    """The released loop leaves the micro-batches that an epoch has over in .grad, and the next update takes them in."""
    recipe = Recipe("t", num_steps=4, warmup_steps=1, gradient_accumulation_steps=3, max_grad_norm=1e9)
    trainer = make_trainer(recipe, batch_size=9)  # two steps an epoch, of 9 and 3 images
    steps = trainer.run()
    assert [next(steps), next(steps)] == [1, 2]
    before = copy.deepcopy(trainer.model)
    assert next(steps) == 3
    before.train()(trainer.images.images[:9], torch.tensor([(3 * s + 1) % 10 for s in range(9)]))[0].backward()
    for one, other in zip(before.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_accumulation_equals_the_large_batch() -> None:
    recipes = [
        Recipe("t", learning_rate=0.05, warmup_steps=1, num_steps=4, gradient_accumulation_steps=parts)
        for parts in (1, 2)
    ]
    whole, parts = (make_trainer(recipe, batch_size=6) for recipe in recipes)
    for trainer in (whole, parts):
        assert list(trainer.run()) == [1, 2, 3, 4]
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    sums = [trainer.report() for trainer in (whole, parts)]
    assert sums[0]["loss"] == pytest.approx(sums[1]["loss"], abs=1e-5)


@pytest.mark.parametrize("decay", ["Cosine", "Linear"])
def test_schedules_at_every_recorded_step(decay: str) -> None:
    recorded = GOLDEN["schedules"][f"Warmup{decay}Schedule"]
    for step, rate in recorded.items():
        assert 0.02 * rate_factor(int(step), 500, 10000, decay.lower()) == pytest.approx(rate, rel=1e-7, abs=1e-10)
    short = GOLDEN["schedules"][f"Warmup{decay}Schedule_lr1_warm3_total10_steps0to12"]
    assert [rate_factor(step, 3, 10, decay.lower()) for step in range(13)] == pytest.approx(short, abs=1e-8)


def test_without_warm_up() -> None:
    assert rate_factor(0, 0, 10, "cosine") == 1
    assert rate_factor(0, 0, 10, "linear") == 1


def test_static_and_dynamic_loss_scale() -> None:
    model = formula_model()
    optimizer, _ = optimize(Recipe("t"), model.parameters())
    for scale, expected in ((0.0, 2.0**20), (1024.0, 1024.0)):
        precision: Precision = EXPERIMENT.precision(Recipe("t", loss_scale=scale), Options(precision="fp16"), CPU)
        assert precision.scaler.get_scale() == expected
        model(fill_image(2, 3, 64, 64), torch.tensor([3, 7]))[0].backward()
        model.base_model.cls_token.grad.fill_(float("inf"))
        precision.scaler.scale(torch.ones(()))  # as backward does, before the step
        assert precision.step(optimizer, model.parameters(), 1.0)
        assert precision.scaler.get_scale() == (scale if scale else expected / 2)
