"""FFVT's training loop on images by formula, as the released loop was recorded on them."""

from collections.abc import Iterator
from pathlib import Path

from formula import fill, fill_image
from tiny_run import CPU, InMemory, make_run, steps_of

from common.cli import Options
from common.data.batches import Plan
from common.train.checkpoint import State, make_state
from common.train.run_folder import Run
from ffvt.model import FFVT, Config
from ffvt.train import Recipe, make_precision, objective, optimize

TINY = Config(48, 96, 3, 4, dropout=0.0)


def formula_images(count: int) -> InMemory:
    """Sample s is of class (3 s + 1) mod 10."""
    labels = [(3 * sample + 1) % 10 for sample in range(count)]
    return InMemory(fill_image(count, 3, 64, 64), labels, [str(number) for number in range(10)])


def formula_model(smoothing: float = 0.0) -> FFVT:
    model = FFVT(TINY, 64, 10, True, 3, smoothing)
    model.load_released({name: fill(name, value.shape) for name, value in model.released_state_dict().items()})
    return model


def train(recipe: Recipe, batch_size: int) -> tuple[Run, State, Iterator[float]]:
    """`recipe` as ffvt/train.py trains it, on 12 images in a fixed order; the iterator does a step, says its rate."""
    precision = make_precision(recipe, Options(), CPU)
    run = make_run(formula_images(12), batch_size, Path(), precision, eval_batch_size=2)
    optimizer, scheduler = optimize(recipe, (model := formula_model(recipe.smoothing_value)).parameters())
    state = make_state(run, model, optimizer, scheduler)
    plan = Plan(lambda epoch: range(12), 12, batch_size, recipe.gradient_accumulation_steps)
    return run, state, steps_of(run, state, plan, recipe.num_steps, objective, recipe.max_grad_norm)
