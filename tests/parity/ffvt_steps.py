"""FFVT's training loop on images by formula, as the released loop was recorded on them."""

from typing import Any

import torch
from formula import fill, fill_image
from torch import Tensor

from common.data.loader import Plan
from common.engine import Loading, Trainer
from common.experiment import Options
from ffvt.model import FFVT, Config
from ffvt.train import EXPERIMENT, Recipe, objective, optimize

CPU = torch.device("cpu")
TINY = Config(48, 96, 3, 4, dropout=0.0)


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
