"""FFVT's schedules and training loop against the figures that the released loop computed."""

from typing import Any

import pytest
from figures import assert_close_to_figures, assert_within, golden
from parity.ffvt_steps import formula_images, train

from common.train.loop import evaluate
from ffvt.train import Recipe, rate_factor

GOLDEN = golden("ffvt_training")
# case of the recorded trajectories: what differs from the setting named in the file
CASES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "linear": {"decay_type": "linear"},
    "smoothing_0.1": {"smoothing_value": 0.1},
    "weight_decay_0.01": {"weight_decay": 0.01},
    "clip_0.1": {"max_grad_norm": 0.1},
    "accumulation_2": {"gradient_accumulation_steps": 2, "num_steps": 4},
}


@pytest.mark.parametrize("case", GOLDEN["trajectories"])
def test_steps_as_the_released_loop_trains(case: str) -> None:
    recorded = GOLDEN["trajectories"][case]
    recipe = Recipe("t", **({"learning_rate": 0.05, "warmup_steps": 2, "num_steps": 6} | CASES[case]))
    parts = recipe.gradient_accumulation_steps
    run, state, steps = train(recipe, batch_size=3 * parts)
    model: Any = state.model
    losses: list[float] = []
    model.register_forward_hook(
        lambda model, inputs, output: losses.append(output[0].item()) if model.training else None
    )
    rates, accuracies = [], []
    for rate in steps:
        rates.append(rate)
        if state.step % 3 == 0:
            _, predictions = evaluate(run, model, formula_images(4))  # type: ignore[arg-type]
            accuracies.append([state.step, float((predictions.ranked[:, 0] == predictions.label).mean())])
    # The released loop reports the loss of the last micro-batch, and the rate of the update that comes next.
    assert_within(2e-5, losses[parts - 1 :: parts], recorded["train_loss"], "losses")
    rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates[0] == 0
    assert_within(1e-9, rates[1:], recorded["logged_lr"], "rates")
    assert accuracies == recorded["test_accuracy"]
    released = model.released_state_dict()
    for name, figures in recorded["final_params"].items():
        assert_close_to_figures(released[name], figures, sums=5e-7, first=1e-5, what=name)


@pytest.mark.parametrize("schedule", GOLDEN["schedules"])
def test_schedules(schedule: str) -> None:
    """At every recorded step of 10,000 of which 500 warm up, of a peak of 0.02; and all of a short one."""
    recorded = GOLDEN["schedules"][schedule]
    decay = "cosine" if "Cosine" in schedule else "linear"
    if schedule.endswith("lr1_warm3_total10_steps0to12"):
        assert_within(1e-8, [rate_factor(step, 3, 10, decay) for step in range(13)], recorded)
        return
    rates = [0.02 * rate_factor(int(step), 500, 10000, decay) for step in recorded]
    assert_within(1e-10, rates, list(recorded.values()))
