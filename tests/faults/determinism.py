"""Equal runs: the same command twice, other workers, other habits of logging and evaluating."""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from common.data.images import Images
from common.data.loader import Plan, evaluation_batches, seed_of, shuffled, training_batches
from common.engine import Trainer
from faults.cases import COMMON, ENTRIES, FFVT, GFT, GLSIM, Case
from faults.inside import (
    DATA,
    assert_equal,
    assert_same_run,
    assert_same_training,
    demo_data,
    done,
    home,
    record,
    run,
    sentence,
    state,
    stopped_after,
)

SECTION = "Determinism"
ABOUT = """
## About determinism

All of it was run on a CPU. On CUDA, where `--deterministic` also turns cuDNN's search for the fastest algorithm off and
fixes cuBLAS's workspace, equality of two runs was not tried. Runs on different machines, numbers of threads or of
processes, or versions of PyTorch may differ in the last bits, and need not be equal.
"""
PROGRAMS = ENTRIES[:3]
# Dropout in every model: GFT's demo has stochastic depth, the others' have none of it.
SIZES = ("hidden_size=64", "mlp_dim=128", "num_heads=4", "num_layers=4", "patch_size=4")
DROPOUT = {
    GFT: (),
    FFVT: ("--model-kwargs", *SIZES, "dropout=0.2"),
    GLSIM: ("--hidden_dropout_prob", "0.2"),
}
# Reports, saves and evaluations that the usual run does not have, or has and this one not.
HABITS = {
    GFT: ("--log-every", "4", "--save-every", "1", "--eval-batch-size", "7"),
    FFVT: ("--log-every", "3", "--save-every", "1", "--eval_every", "1", "--eval_batch_size", "7"),
    GLSIM: ("--log_freq", "4", "--save-every", "1", "--eval_freq", "2"),
}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for a block; the demo would take one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with mock.patch("torch.set_num_threads"):
            yield
    finally:
        torch.set_num_threads(before)


def _run_again(entry: str, folder: Path) -> int:
    words = (*DROPOUT[entry], "--deterministic")
    first = _twice(entry, folder, words, threads=1)
    another = done(run(entry, home(folder / "another"), *words, "--seed", "7"))
    assert not torch.equal(_weight(another), _weight(first))
    return 1


def _two_threads(entry: str, folder: Path) -> int:
    _twice(entry, folder, (*DROPOUT[entry], "--deterministic", *_one_evaluation(entry)), threads=2)
    return 1


def _twice(entry: str, folder: Path, words: tuple[str, ...], threads: int) -> Path:
    with _threads(threads):
        first, again = (done(run(entry, home(folder / name), *words)) for name in ("first", "again"))
    assert_same_run(again, first)
    arithmetic = record(first)["arithmetic"]
    assert arithmetic["deterministic_algorithms"], arithmetic
    assert arithmetic["threads"] == threads, arithmetic
    assert not torch.are_deterministic_algorithms_enabled()
    return first


def _weight(folder: Path) -> Tensor:
    """The largest parameter: certainly no constant."""
    return max(state(folder)["model"].values(), key=lambda value: value.numel())


def _other_workers(entry: str, folder: Path, workers: int) -> int:
    alone = done(run(entry, home(folder / "alone"), *DROPOUT[entry]))
    assert_same_run(done(run(entry, home(folder / "workers"), *DROPOUT[entry], workers=workers)), alone)
    return 1


def _other_habits(entry: str, folder: Path) -> int:
    usual = done(run(entry, home(folder / "usual"), *DROPOUT[entry]))
    assert_same_training(done(run(entry, home(folder / "habits"), *DROPOUT[entry], *HABITS[entry])), usual)
    return 1


def _interrupted(entry: str, folder: Path) -> int:
    """Stopped after an evaluation, in the middle of an epoch; evaluated, asked for predictions, and resumed."""
    words = (*DROPOUT[entry], "--deterministic")
    whole = done(run(entry, home(folder / "whole"), *words))
    place = home(folder / "stopped")
    with stopped_after(7):
        stopped = run(entry, place, *words)
    assert stopped.status == 0, stopped.err
    assert state(stopped.folder)["step"] == 7
    assert not (stopped.folder / "record.json").exists()
    pictures = next((demo_data() / DATA[entry] / "images").iterdir())
    evaluated = run(entry, place, *DROPOUT[entry], "--eval", stopped.folder)
    assert evaluated.status == 0, evaluated.err
    predicted = run(entry, place, *DROPOUT[entry], "--checkpoint", stopped.folder, "--predict", pictures)
    assert predicted.status == 0, predicted.err
    assert predicted.out.count("%") > 50
    resumed = run(entry, place, *DROPOUT[entry], "--resume", stopped.folder, workers=1)
    assert resumed.status == 0, resumed.err
    assert_same_run(stopped.folder, whole)
    assert record(stopped.folder)["arithmetic"]["deterministic_algorithms"]
    return 1


def _no_deterministic_form(entry: str, folder: Path) -> int:
    """`put_` has none on any device."""
    count = Trainer._count

    def counting(self: Trainer, *values: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        count(self, *values)

    with mock.patch.object(Trainer, "_count", counting):
        done(run(entry, home(folder / "without"), *_one_evaluation(entry)))
        said = sentence(run(entry, home(folder / "with"), *_one_evaluation(entry), "--deterministic"))
    assert "--deterministic: put_ has no deterministic form on this device" in said
    return 1


def _one_evaluation(entry: str) -> tuple[str, ...]:
    return {GFT: ("--epochs", "1"), FFVT: ("--num_steps", "2"), GLSIM: ("--epochs", "1")}[entry]


def _noisy(image: Image.Image) -> Tensor:
    """A transform that draws from every generator there is."""
    noise = torch.rand(4).double().tolist() + np.random.rand(4).tolist()  # noqa: NPY002
    noise += [random.random() for _ in range(4)]
    return TF.to_tensor(image).double() + torch.tensor(noise).sum()


def _digits(count: int, transform: Callable[[Image.Image], Tensor]) -> Images:
    files = sorted((demo_data() / "food-101" / "images").rglob("*.jpg"))[:count]
    return Images("digits", "train", [str(file) for file in files], files, [0] * count, ["a", "b"], transform)


def _pixels(images: Images, workers: int, size: int, accumulate: int, steps: range) -> dict[tuple[int, int], Tensor]:
    """(step, image) -> pixels, of all processes together."""
    found = {}
    for rank in range(size):
        plan = Plan(shuffled(len(images), 3), len(images), 12, accumulate, rank, size)
        batches = training_batches(images, plan, 3, steps, workers, pin_memory=False)
        for step, micro in itertools.product(steps, range(accumulate)):
            batch = next(batches)
            assert batch.images is not None
            if plan.weight(step, micro) > 0:
                found |= {(step, index): image for index, image in zip(batch.indices, batch.images, strict=True)}
    return found


def _pixel_equal(folder: Path) -> int:
    images = _digits(58, _noisy)
    whole = _pixels(images, 0, 1, 1, range(10))
    assert len(whole) == 2 * 58
    trials = 0
    for workers, size, start in itertools.product((0, 1, 3), (1, 2, 3), (0, 3, 7)):
        found = _pixels(images, workers, size, 1 + trials % 2, range(start, 10))
        assert_equal(found, {key: value for key, value in whole.items() if key[0] >= start})
        trials += 1
    return trials


def _no_number_twice(folder: Path) -> int:
    """Whatever draws anywhere draws from another seed: orders, samples of every epoch, steps of every process."""
    seeds = [seed_of(3, epoch) for epoch in range(50)]
    seeds += [seed_of(3, epoch, position) for epoch in range(50) for position in range(200)]
    seeds += [seed_of(3, step, micro, rank) for step in range(500) for micro in range(4) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    pixels = _pixels(_digits(120, _noise), 3, 1, 1, range(20))
    assert len({value.item() for value in pixels.values()}) == len(pixels)
    return len(seeds) + len(pixels)


def _noise(_: Image.Image) -> Tensor:
    return torch.rand((), dtype=torch.double) + np.random.rand() + random.random()  # noqa: NPY002


def _evaluation_draws_nothing(folder: Path) -> int:
    """Its batches are those of the list, whoever brings them."""
    images = _digits(40, TF.to_tensor)
    for workers in (0, 1, 3):
        batches = list(evaluation_batches(images, 7, 0, 1, workers, pin_memory=False))
        assert [index for batch in batches for index in batch.indices] == list(range(40))
        assert_equal([image for batch in batches for image in batch.images], [images[index][0] for index in range(40)])
    return 3


def cases() -> list[Case]:
    def row(
        fault: str, promise: str, check: Callable[..., int], quick: tuple[str, ...] = (), **more: Any
    ) -> list[Case]:
        return [
            Case(SECTION, fault, entry, promise, "", partial(check, entry, **more), entry in quick)
            for entry in PROGRAMS
        ]

    same = "bit-identical weights, log and figures"
    found = row("the same command again, --deterministic, with dropout", same, _run_again, quick=(FFVT,))
    found += row("again on two threads, --deterministic, with dropout", same, _two_threads)
    for workers in (1, 2):
        title = f"{workers} data worker{'s' * (workers > 1)} instead of none"
        found += row(title, same, _other_workers, quick=(GLSIM,) * (workers == 2), workers=workers)
    found += row(
        "stopped, evaluated, asked for predictions, resumed with other workers", same, _interrupted, quick=(GFT,)
    )
    found += row("logged, saved and evaluated at other times", "bit-identical weights", _other_habits)
    found += row(
        "an operation without a deterministic form, --deterministic", "a sentence that names it", _no_deterministic_form
    )
    common = [
        ("random transforms, other workers, processes and starts", "pixel-equal batches", _pixel_equal),
        ("seeds of orders, samples and steps", "none occurs twice", _no_number_twice),
        ("evaluation with other workers", "the same images in the same order", _evaluation_draws_nothing),
    ]
    for fault, promise, check in common:
        quick = check is not _pixel_equal  # tests/test_engine.py has a part of it
        found.append(Case(SECTION, fault, COMMON, promise, "", check, quick))
    return found
