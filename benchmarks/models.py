"""Cost of a training step and of evaluation, beside a plain ViT-B/16 of the same size in the same run.

    python -m benchmarks.models                     CPU or GPU, fp32, 224 px, batch 8
    python -m benchmarks.models --batch-size 64 --precision bf16 --json out.json

The contenders take turns, so that a slower minute of the machine meets all of them; the median of the rounds counts.
Only ratios inside one run mean anything.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from common import dist
from common.amp import Precision
from common.files import write_text
from common.models import GFT, TransFG
from common.provenance import device_name
from common.recipe import parse
from ffvt.model import CONFIGS, FFVT

BACKBONE = "vit_base_patch16_224"
FLOOR = "plain ViT-B/16"


@dataclass
class Recipe:
    batch_size: int = 8  # images a step
    img_size: int = 224  # pixels, square
    num_classes: int = 100  # of the classifier
    rounds: int = 3  # timed turns of each contender, after one that is not timed


@dataclass
class Options:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic
    json: str | None = None  # also write the figures to this file


def contenders(recipe: Recipe) -> dict[str, Callable[[], nn.Module]]:
    """Name -> how to build it; the plain ViT first."""
    size, classes = recipe.img_size, recipe.num_classes
    return {
        FLOOR: lambda: timm.create_model(BACKBONE, num_classes=classes, img_size=size),
        "GFT described": lambda: GFT(BACKBONE, classes, size),
        "GFT released": lambda: GFT(BACKBONE, classes, size, released=True),
        "TransFG (GFT repository)": lambda: TransFG(BACKBONE, classes, size),
        "FFVT": lambda: FFVT(CONFIGS["ViT-B_16"], size, classes),
        "FFVT without fusion": lambda: FFVT(CONFIGS["ViT-B_16"], size, classes, feature_fusion=False),
    }


class Contender:
    """One model with its optimizer, one turn at a time."""

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device, precision: Precision) -> None:
        self.model, self.device, self.precision = model.to(device), device, precision
        self.optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.05)
        self.images = torch.randn(recipe.batch_size, 3, recipe.img_size, recipe.img_size, device=device)
        self.labels = torch.randint(recipe.num_classes, (recipe.batch_size,), device=device)
        self.train_seconds: list[float] = []
        self.eval_seconds: list[float] = []

    def turn(self, timed: bool) -> None:
        train, evaluation = self._timed(self._train), self._timed(self._evaluate)
        if timed:
            self.train_seconds.append(train)
            self.eval_seconds.append(evaluation)

    def _timed(self, work: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            loss = F.cross_entropy(self.model(self.images), self.labels)
        self.precision.backward(loss, self.optimizer)
        self.precision.step(self.optimizer, self.model.parameters(), clip_grad=None)

    @torch.inference_mode()
    def _evaluate(self) -> None:
        self.model.eval()
        with self.precision.autocast():
            self.model(self.images)


def main() -> None:
    recipe, options, *_ = parse(Recipe, Options, __doc__ or "")
    device = dist.choose_device(options.device, dist.Launch())
    rivals = {
        name: Contender(build(), recipe, device, Precision(options.precision, device))
        for name, build in contenders(recipe).items()
    }
    for number in range(recipe.rounds + 1):
        for rival in rivals.values():
            rival.turn(timed=number > 0)
    figures = {
        name: {
            "train_seconds": statistics.median(rival.train_seconds),
            "eval_seconds": statistics.median(rival.eval_seconds),
        }
        for name, rival in rivals.items()
    }
    floor = figures[FLOOR]
    print(f"{device_name(device)}, {options.precision}, {recipe.img_size} px, batch {recipe.batch_size}")
    print(f"{'':26}{'train s':>9}{'ratio':>7}{'img/s':>8}{'eval s':>9}{'ratio':>7}{'img/s':>8}")
    for name, row in figures.items():
        cells = ""
        for kind in ("train_seconds", "eval_seconds"):
            seconds, base = row[kind], floor[kind]
            cells += f"{seconds:9.3f}{seconds / base:7.2f}{recipe.batch_size / seconds:8.1f}"
        print(f"{name:26}{cells}")
    if options.json:
        write_text(Path(options.json), json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
