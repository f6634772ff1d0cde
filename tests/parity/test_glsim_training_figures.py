"""Schedules, losses and the training loop of GLSim's program against the figures that the released code computed."""

from typing import Any

import numpy as np
import pytest
import torch
from figures import assert_within, golden
from formula import check_figures, fill, fill_image
from tiny_run import InMemory, make_run, steps_of
from torch import Tensor, nn

from common.data.batches import Plan
from common.train.checkpoint import State, make_state, read_sums
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.tools.train import optimize
from glsim.train_utils.losses import make_objective
from glsim.train_utils.recipe import Recipe
from glsim.train_utils.schedule import make_optimizer, make_schedule

GOLDEN = golden("glsim_training")
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


def train(**changes: Any) -> tuple[State, list[float], list[float]]:
    """Two epochs as glsim/tools/train.py trains, on 12 images in a fixed order: losses, learning rates."""
    recipe = Recipe(**({"epochs": 2, "batch_size": 3, "lr": 0.05, "warmup_steps": 2} | changes))
    method: dict[str, Any] = {"dynamic_anchor": True, "dynamic_top": 4, "anchor_class_token": True, "reducer": "cls"}
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "image_size": 96, "num_classes": 10, "hidden_dropout_prob": 0.0}
    model = ViTGLSim(ViTConfig("vit_t16", aggregator=True, aggregator_norm=True, **method, **sizes))
    model.load_released({name: fill(name, value.shape) for name, value in model.released_state_dict().items()})
    labels = [(3 * sample + 1) % 10 for sample in range(12)]
    images = InMemory(fill_image(12, 3, 96, 96), labels, [str(number) for number in range(10)])
    parts = recipe.gradient_accumulation_steps
    run = make_run(images, recipe.batch_size * parts)
    plan = Plan(lambda epoch: range(12), 12, run.batch_size, parts)
    state = make_state(run, model, *optimize(recipe, model.parameters(), plan))
    losses, rates = [], []
    objective = make_objective(recipe, 10, recipe.released)
    for rate in steps_of(run, state, plan, recipe.epochs * plan.steps_per_epoch, objective, recipe.clip_grad):
        read_sums(state)
        losses.append(state.logged[0] / state.logged[2])
        state.logged = [0.0] * 3
        rates.append(rate)
    return state, losses, rates


@pytest.mark.parametrize("case", CASES)
def test_two_epochs_as_the_released_loop_trains(case: str) -> None:
    recorded = GOLDEN["trajectories"][case]
    state, losses, rates = train(**CASES[case], released=True)
    decays = [group["weight_decay"] for group in state.optimizer.param_groups]
    assert decays == [decay for _, decay in recorded["groups"]]
    each = CASES[case].get("gradient_accumulation_steps", 1)
    # Losses are of size 2 to 4. Eight updates pass their rounding on: those by unclipped gradients, of norm 60, most.
    assert_within(1e-4 if case == "no_clipping" else 2e-5, losses, np.reshape(recorded["losses"], (-1, each)).mean(1))
    assert_within(1e-8, rates, recorded["rates"][::each])  # recorded to 9 digits
    model: Any = state.model
    final = model.released_state_dict()
    for name, figures in recorded["final"].items():
        found = check_figures(final[name])
        for figure in ("sum", "abs_sum", "wsum"):  # weights move by 1e-2: what they started from is exact
            assert_within(2e-3, found[figure], figures[figure], (name, figure))
        assert_within(2e-6, final[name].flatten()[:4], figures["first"], name)


def test_accumulation_equals_the_large_batch() -> None:
    finals = [
        train(batch_size=batch, gradient_accumulation_steps=parts, lr=0.01)[0].model.state_dict()
        for batch, parts in ((6, 1), (3, 2))
    ]
    for name, value in finals[0].items():
        assert_within(1e-5, finals[1][name], value, name)


@pytest.mark.parametrize("name", GOLDEN["schedules"])
def test_schedules(name: str) -> None:
    recorded = GOLDEN["schedules"][name]
    settings: dict[str, Any] = {
        "t_in_epochs": "t_in_epochs" in name,
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
    assert_within(1e-9, [used[int(update)] for update in recorded["used"]], list(recorded["used"].values()))
    assert_within(1e-7, sum(used), recorded["sum_of_used"])
    if "t_in_epochs" not in name:  # our own side asks for the rate of update u at u
        described = rates(released=False)
        function = recorded["function"]
        assert_within(1e-9, [described[int(update)] for update in function], list(function.values()))


LOSSES: dict[str, tuple[float, dict[str, Any]]] = {  # share of the loss, options
    "cross_entropy": (1, {}),
    "label_smoothing_0.1 (timm LabelSmoothingCrossEntropy)": (1, {"ls": True}),
    "focal_gamma2": (1, {"released": True, "focal_gamma": 2.0}),
    "focal_gamma0.5": (1, {"released": True, "focal_gamma": 0.5}),
    # The released focal loss knows neither --smoothing, which is 0.1, nor --focal_alpha; ours does.
    "focal_gamma2_smoothing (ls=0.1)": (1, {"released": True, "focal_gamma": 2.0, "ls": True, "smoothing": 0.3}),
    "focal_gamma2 ": (0.5, {"focal_gamma": 2.0, "focal_alpha": 0.5}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    logits, labels = 4 * fill("ls_logits", (4, 10)), torch.tensor([0, 3, 3, 9])
    model: Any = lambda images: (images, "crops")  # noqa: E731  # logits come first

    def loss(released: bool = False, **settings: Any) -> Tensor:
        return make_objective(Recipe(**settings), 10, released)(model, logits, labels)[0]

    share, options = LOSSES[name]
    recorded = share * GOLDEN["losses"][name.strip()]
    assert_within(1e-6, loss(**options), recorded)
    if "smoothing" in options:
        assert abs(loss(**options | {"released": False}).item() - 0.25 * recorded) > 1e-3


def test_every_recorded_loss_and_trajectory_is_compared() -> None:
    assert {name.strip() for name in LOSSES} == set(GOLDEN["losses"]) - {"input"}
    assert set(CASES) == set(GOLDEN["trajectories"])
