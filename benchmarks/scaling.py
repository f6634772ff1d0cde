"""Throughput of training on 1, 2, ... processes of this machine, and what collectives and input take of it.

    python -m benchmarks.scaling                                         1 and 2 processes, ViT-S/16 on a CPU
    python -m benchmarks.scaling --processes 1,2,4,8 --model vit_base_patch16_224 --precision bf16 --batch-size 64

Each process trains on `--batch-size` images a step, whatever their number. Three kinds of steps take turns: `whole`
(JPEG files decoded and transformed by data workers, gradients averaged over the processes), `no input` (a batch that
is there) and `alone` (that, and gradients not averaged). Input takes what `whole` needs beyond `no input`, collectives
what `no input` needs beyond `alone`: both count what is not hidden behind other work. The median of the steps counts,
and of the processes the slowest. On a CPU each process computes on one thread.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torchvision import transforms as T

from benchmarks import report
from benchmarks.photographs import FOOD, write_photographs
from common import dist
from common.amp import Precision
from common.data.images import Images
from common.data.loader import Batch, Plan, shuffled, training_batches
from common.engine import cross_entropy, wrap
from common.errors import UserError
from common.provenance import device_name
from common.recipe import parse

KINDS = ("whole", "no input", "alone")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Recipe:
    model: str = "vit_small_patch16_224"  # timm model
    img_size: int = 224  # pixels, square
    batch_size: int = 4  # images a step of each process
    processes: str = "1,2"  # numbers of processes to measure
    steps: int = 5  # timed of each kind, after two that are not


@dataclass
class Options:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic
    workers: int = 1  # data-loading processes per training process
    json: str | None = None  # also write the figures to this file


class Worker:
    """One of the processes that train."""

    def __init__(self, recipe: Recipe, options: Options, folder: Path) -> None:
        launch = dist.detect()
        self.device = dist.choose_device(options.device, launch)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        dist.start(launch, self.device)
        self.precision = Precision(options.precision, self.device)
        self.model = wrap(timm.create_model(recipe.model, num_classes=200, img_size=recipe.img_size), self.device)
        self.optimizer = SGD(self.model.parameters(), lr=1e-5, momentum=0.9)
        self.batches = self._batches(recipe, options, folder)
        self.ready = next(self.batches)

    def _batches(self, recipe: Recipe, options: Options, folder: Path) -> Iterator[Batch]:
        paths = sorted(folder.glob("*.jpg"))
        augmented = T.Compose([T.RandomResizedCrop(recipe.img_size), T.RandomHorizontalFlip(), T.ToTensor()])
        labels = [number % 200 for number in range(len(paths))]
        names = [str(number) for number in range(200)]
        images = Images("photographs", "train", [path.name for path in paths], paths, labels, names, augmented)
        batch_size = recipe.batch_size * dist.size()
        plan = Plan(shuffled(len(paths), 0), len(paths), batch_size, 1, dist.rank(), dist.size(), drop_last=True)
        pinned = self.device.type == "cuda"
        return training_batches(images, plan, 0, range(recipe.steps + 3), options.workers, pinned)

    def step(self, kind: str) -> float:
        """Seconds of one step."""
        dist.maximum(0)  # all begin together
        self._wait()
        start = time.perf_counter()
        batch = next(self.batches) if kind == "whole" else self.ready
        assert batch.images is not None
        assert batch.labels is not None
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.labels))
        self._train(images, labels, averaged=kind != "alone")
        self._wait()
        return time.perf_counter() - start

    def _train(self, images: Tensor, labels: Tensor, averaged: bool) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        parallel = isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if parallel and not averaged else nullcontext():
            with self.precision.autocast():
                loss, _ = cross_entropy(self.model, images, labels)
            self.precision.backward(loss, self.optimizer)
        self.precision.step(self.optimizer, list(self.model.parameters()), None)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, recipe: Recipe) -> dict[str, Any]:
        kinds = KINDS if dist.size() > 1 else KINDS[:-1]
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(recipe.steps + 2):
            for kind in kinds:
                taken = self.step(kind)
                if number >= 2:
                    seconds[kind].append(taken)
        medians = dist.gather({kind: statistics.median(values) for kind, values in seconds.items()})
        slowest = {kind: max(one[kind] for one in medians) for kind in kinds}
        bare: nn.Module = getattr(self.model, "module", self.model)
        averaged = sum(p.numel() * p.element_size() for p in bare.parameters() if p.requires_grad)
        return {
            "processes": dist.size(),
            "seconds": slowest,
            "images_per_s": recipe.batch_size * dist.size() / slowest["whole"],
            "input": max(0.0, 1 - slowest["no input"] / slowest["whole"]),
            "collectives": max(
                0.0, (slowest["no input"] - slowest.get("alone", slowest["no input"])) / slowest["whole"]
            ),
            "gradient_bytes": averaged,
            "device": device_name(self.device),
        }


def launched(count: int, folder: Path) -> dict[str, Any]:
    """This program again, on `count` processes: what the first of them has found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += ["-m", "benchmarks.scaling", *sys.argv[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SCALING_FOLDER": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{count} processes could not be measured: what they said stands above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    recipe, options, *_ = parse(Recipe, Options, __doc__ or "")
    if "SCALING_FOLDER" in os.environ:
        worker = Worker(recipe, options, Path(os.environ["SCALING_FOLDER"]))
        figures = worker.measure(recipe)
        if dist.is_main():
            print(json.dumps(figures), flush=True)
        dist.stop()
        return
    counts = [int(word) for word in recipe.processes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), FOOD, recipe.batch_size * max(counts) * 4)
        lines = [launched(count, Path(folder)) for count in counts]
    print(f"{recipe.model}, {recipe.img_size} px, {recipe.batch_size} images a process, {options.precision}")
    print(f"{'processes':>9}{'step s':>9}{'images/s':>10}{'of linear':>11}{'input':>8}{'collectives':>13}")
    for line in lines:
        linear = line["images_per_s"] / line["processes"] / (lines[0]["images_per_s"] / lines[0]["processes"])
        print(f"{line['processes']:9}{line['seconds']['whole']:9.3f}{line['images_per_s']:10.2f}{linear:11.0%}", end="")
        print(f"{line['input']:8.1%}{line['collectives']:13.1%}")
    about = {"device": lines[0]["device"], "precision": options.precision, "workers": options.workers}
    report.write(options.json, "scaling", {"lines": lines}, recipe=recipe, **about)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
