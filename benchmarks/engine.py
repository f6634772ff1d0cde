"""What our training loop costs: its step beside a bare PyTorch loop over the same batches, in one run.

    python -m benchmarks.engine                                              CPU, ViT-B/16 at 224 px, about a minute
    python -m benchmarks.engine --model densenet169 --device cuda --precision bf16 --batch-size 64

The bare loop is forward, cross-entropy, backward and the same fused optimizer, with autocast where it is asked for.
Ours (common.train.loop.update) also seeds each step, takes its batches from a DataLoader (of images in memory, without
workers), and counts loss and accuracy. Both take turns, so that a slower minute of the machine meets both; the fastest
turn of each counts. CPU s is processor time, which other programs disturb less.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from common.cli import Flags, parse
from common.cli import Options as CommonOptions
from common.data.batches import Plan, training_batches
from common.errors import UserError
from common.train import distributed
from common.train.checkpoint import make_state
from common.train.loop import cross_entropy, update
from common.train.model import memory_format, place
from common.train.precision import Precision
from common.train.record import device_name
from common.train.run_folder import Run


@dataclass
class Recipe:
    model: str = "vit_base_patch16_224"  # timm's name
    img_size: int = 224  # pixels, square
    batch_size: int = 4  # images a step
    num_classes: int = 200  # of the classifier
    rounds: int = 7  # timed turns of each, after one that is not
    steps: int = 1  # optimizer steps a turn


@dataclass
class Options:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic
    compile: bool = False  # torch.compile the model


class InMemory:
    """Images and labels that need no reading; stands in for common.data's Images."""

    split = "memory"

    def __init__(self, recipe: Recipe) -> None:
        draw = torch.Generator().manual_seed(0)
        count = 2 * recipe.batch_size
        self.images = torch.randn(count, 3, recipe.img_size, recipe.img_size, generator=draw)
        self.labels = torch.randint(recipe.num_classes, (count,), generator=draw)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def build(recipe: Recipe, run: Run) -> tuple[nn.Module, SGD]:
    torch.manual_seed(0)
    model = place(run, timm.create_model(recipe.model, num_classes=recipe.num_classes))
    return model, SGD(model.parameters(), lr=1e-5, momentum=0.9, fused=True)


def bare_steps(
    model: nn.Module, optimizer: SGD, data: InMemory, precision: Precision, batch_size: int
) -> Iterator[Tensor]:
    """The loop that a tutorial would write, on batches that lie on the device."""
    device, layout = precision.device, memory_format(model, precision.device)
    batches = [
        (images.to(device, memory_format=layout), labels.to(device))
        for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True)
    ]
    model.train()
    while True:
        for images, labels in batches:
            optimizer.zero_grad(set_to_none=True)
            with precision.autocast():
                loss = F.cross_entropy(model(images).float(), labels)
            precision.scaler.scale(loss).backward()
            precision.scaler.step(optimizer)
            precision.scaler.update()
            yield loss


def timed(take: Callable[[], Any], steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds a step by the clock, and of the processors."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    wall, processors = time.perf_counter(), time.process_time()
    for _ in range(steps):
        take()
    wait()
    return (time.perf_counter() - wall) / steps, (time.process_time() - processors) / steps


def measure(recipe: Recipe, options: Options, device: torch.device) -> dict[str, Any]:
    """Seconds a step of the bare loop and of ours, and what ours takes more, as a share."""
    data: Any = InMemory(recipe)
    settings = CommonOptions(precision=options.precision, compile=options.compile)
    run = Run("engine", "benchmarks/engine.py", Path(), recipe, settings, {}, Flags(), device)
    bare = bare_steps(*build(recipe, run), data, Precision(options.precision, device), recipe.batch_size)
    model, optimizer = build(recipe, run)
    run.precision = Precision(options.precision, device)
    state = make_state(run, model, optimizer, None)
    plan = Plan(lambda _: range(len(data)), len(data), recipe.batch_size)
    batches = training_batches(data, plan, 0, range(recipe.steps * (recipe.rounds + 1)), 0, device.type == "cuda")
    turns: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
    for _ in range(recipe.rounds + 1):
        turns["bare"].append(timed(lambda: next(bare), recipe.steps, device))
        step = partial(update, run, state, model, plan, batches, cross_entropy, None)
        turns["ours"].append(timed(step, recipe.steps, device))
    found: dict[str, Any] = {}
    for number, clock in enumerate(("seconds", "cpu_seconds")):
        fastest = {name: min(turn[number] for turn in all_turns[1:]) for name, all_turns in turns.items()}
        found[clock] = fastest | {"overhead": fastest["ours"] / fastest["bare"] - 1}
    return found


def main() -> None:
    recipe, options, _ = parse(Recipe, Options, __doc__ or "")
    try:
        device = distributed.choose_device(options.device, distributed.Launch())
    except UserError as error:
        raise SystemExit(str(error)) from error
    found = measure(recipe, options, device)
    print(
        f"{device_name(device)}, {options.precision}, {recipe.model}, {recipe.img_size} px, batch {recipe.batch_size}"
    )
    print(f"{'':12}{'step s':>9}{'CPU s':>9}")
    for name in ("bare", "ours"):
        print(f"{name:12}{found['seconds'][name]:9.4f}{found['cpu_seconds'][name]:9.4f}")
    print(f"{'overhead':12}{found['seconds']['overhead']:9.1%}{found['cpu_seconds']['overhead']:9.1%}")


if __name__ == "__main__":
    main()
