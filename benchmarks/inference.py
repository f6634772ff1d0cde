"""How fast models answer: latency of one image at a time, images/s in batches, and what `--predict` makes of these.

    python -m benchmarks.inference                                  CPU, fp32, 224 px; two minutes at most on two cores
    python -m benchmarks.inference --sizes 224,448 --only GLSim     one model (and the plain ViT), two image sizes
    python -m benchmarks.inference --device cuda --precision bf16 --batch-size 32 --json out.json

The models are those of benchmarks.models, their weights random, and a plain timm ViT-B/16, which is 1. All of a size
take turns; a turn is some calls with one image and one with a batch, the images being at hand, and the first turn does
not count. p50 and p95 are taken over all calls with one image, images/s over the median batch. `--predict` reads JPEG
files of 500 x 375 pixels; beside it, by turns, stands the same model alone, on as many images at hand.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import transforms as T

from benchmarks import report
from benchmarks.models import RIVALS
from benchmarks.photographs import FOOD, write_photographs
from common import dist
from common.amp import Precision
from common.engine import Loading
from common.errors import UserError
from common.predict import Predictor
from common.provenance import device_name
from common.recipe import parse

PLAIN = "plain ViT"


@dataclass
class Recipe:
    sizes: str = "224"  # pixels, square; several: 224,448
    batch_size: int = 4  # images of a batch
    num_classes: int = 200  # of the classifier
    rounds: int = 3  # timed turns of each model, after one that is not
    calls: int = 6  # with one image, in a turn
    files: int = 16  # images that --predict is asked about, in a turn
    only: str = ""  # models whose name contains this text


@dataclass
class Options:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic
    workers: int = 2  # processes that read images for --predict
    json: str | None = None  # also write the figures to this file


class Asked:
    """A model in evaluation, and how long it took to answer."""

    def __init__(self, name: str, model: nn.Module, precision: Precision) -> None:
        self.name, self.model, self.precision = name, model.eval().to(precision.device), precision
        self.streaming: list[float] = []  # seconds
        self.batched: list[float] = []

    @torch.inference_mode()
    def seconds(self, images: Tensor) -> float:
        def answer() -> None:
            with self.precision.autocast():
                self.model(images)

        return timed(answer, self.precision.device)

    def turn(self, images: Tensor, calls: int, counts: bool) -> None:
        streaming = [self.seconds(images[:1]) for _ in range(calls)]
        batched = self.seconds(images)
        if counts:
            self.streaming += streaming
            self.batched.append(batched)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """The seconds that it takes, until the device has done it."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(size: int, recipe: Recipe, precision: Precision) -> list[dict[str, Any]]:
    """A line a model."""
    builders = [(PLAIN, RIVALS[0].floor), *((r.name, r.build) for r in RIVALS if recipe.only in r.name)]
    models = [Asked(name, build(size, recipe.num_classes), precision) for name, build in builders]
    images = torch.randn(recipe.batch_size, 3, size, size, device=precision.device)
    for number in range(recipe.rounds + 1):
        for model in models:
            model.turn(images, recipe.calls, counts=number > 0)
    return [line(model, size, recipe.batch_size) for model in models]


def line(model: Asked, size: int, batch_size: int) -> dict[str, Any]:
    shares = statistics.quantiles(model.streaming, n=20, method="inclusive")
    about = {"name": model.name, "size": size, "batch_size": batch_size}
    figures = {"p50_ms": 1000 * shares[9], "p95_ms": 1000 * shares[18]}
    return about | figures | {"images_per_s": batch_size / statistics.median(model.batched)}


def measure_prediction(size: int, recipe: Recipe, precision: Precision, workers: int) -> dict[str, Any]:
    """Images/s of --predict for the plain ViT, and of the model alone on the same batches."""
    asked = Asked(PLAIN, RIVALS[0].floor(size, recipe.num_classes), precision)
    steps = [T.Resize((size, size), T.InterpolationMode.BICUBIC), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]
    loading, names = Loading(workers, recipe.batch_size), [str(number) for number in range(recipe.num_classes)]
    predict = Predictor(asked.model, T.Compose(steps), names, precision.device, precision, loading)
    seconds: dict[str, list[float]] = {"predict": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), FOOD, recipe.files)
        batches = torch.randn(recipe.files, 3, size, size, device=precision.device).split(recipe.batch_size)
        for number in range(recipe.rounds + 1):
            found = timed(lambda: predict(paths, 5), precision.device), sum(map(asked.seconds, batches))
            if number > 0:
                seconds["predict"].append(found[0])
                seconds["bare"].append(found[1])
    rates = {name: recipe.files / statistics.median(values) for name, values in seconds.items()}
    return {"size": size, "batch_size": recipe.batch_size, "files": recipe.files, "workers": workers, **rates}


def main() -> None:
    recipe, options, *_ = parse(Recipe, Options, __doc__ or "")
    if recipe.only not in PLAIN and not any(recipe.only in rival.name for rival in RIVALS):
        raise SystemExit(f"--only {recipe.only}: expected a part of {', '.join(rival.name for rival in RIVALS)}")
    try:
        device = dist.choose_device(options.device, dist.Launch())
    except UserError as error:
        raise SystemExit(str(error)) from error
    precision = Precision(options.precision, device)
    print(f"{device_name(device)}, {options.precision}")
    lines, predictions = [], []
    for size in map(int, recipe.sizes.split(",")):
        print(f"\n{f'{size} px':26}{'one image: p50 ms':>18}{'p95 ms':>9}", end="")
        print(f"{f'batch {recipe.batch_size}: images/s':>24}{'ratio':>7}", flush=True)
        found = measure(size, recipe, precision)
        for one in found:
            print(f"{one['name']:26}{one['p50_ms']:18.1f}{one['p95_ms']:9.1f}{one['images_per_s']:24.2f}", end="")
            print(f"{one['images_per_s'] / found[0]['images_per_s']:7.2f}")
        asked = measure_prediction(size, recipe, precision, options.workers)
        print(
            f"--predict, {PLAIN}, batch {recipe.batch_size}: {asked['predict']:.2f} images/s from files, "
            f"{asked['bare']:.2f} of the model alone: {asked['predict'] / asked['bare']:.0%}",
            flush=True,
        )
        lines += found
        predictions.append(asked)
    about = {"device": device_name(device), "precision": options.precision}
    report.write(options.json, "inference", {"lines": lines, "predictions": predictions}, recipe=recipe, **about)


if __name__ == "__main__":
    main()
