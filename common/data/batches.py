"""Batches: which samples a process sees at which optimizer step, and the DataLoaders that bring them.

Order and augmentation depend on seed, epoch and position alone, never on the number of workers or processes: the
global batch of a step is cut into equal shares for the processes, and each sample's random transforms are seeded by
its place in the epoch. A step number therefore says everything about where training stands.
"""

import atexit
import multiprocessing
import multiprocessing.util  # its own exit function must be registered first, to run after ours
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from common.data.images import BadImage, Images
from common.errors import UserError

Order = Callable[[int], Sequence[int]]  # epoch -> sample indices in that epoch's order


class Key(NamedTuple):
    """Names one sample of one epoch: its place in the epoch's order and its number in the split."""

    epoch: int
    position: int
    sample: int


class Batch(NamedTuple):
    images: Tensor  # (B, 3, height, width)
    labels: Tensor  # (B,)
    indices: list[int]  # B positions in the split
    unreadable: list[tuple[int, str]]  # (index, why) of images that could not be read; the others are above


def shuffled(count: int, seed: int) -> Order:
    """A new permutation each epoch."""

    def order(epoch: int) -> Sequence[int]:
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        return torch.randperm(count, generator=generator).tolist()

    return order


def seed_of(*numbers: int) -> int:
    """A well-mixed 63-bit seed from several small numbers; other numbers, or more of them, give another one."""
    # SeedSequence alone fills up with zeros: (seed, epoch) would be (seed, epoch, 0), the first sample of that epoch.
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*numbers: int) -> None:
    """Seeds torch (every device), NumPy and Python from `numbers`."""
    torch.manual_seed(seed_of(*numbers))
    seed_transforms(*numbers)


def seed_transforms(*numbers: int) -> None:
    """`seed_everything` for what draws on the CPU alone, at a tenth of its cost.

    `torch.manual_seed` also reaches for a device that nobody may have started, and notes the stack for that.
    """
    seed = seed_of(*numbers)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's mixup draws from NumPy's global generator
    random.seed(seed)


@dataclass(frozen=True)
class Plan:
    """Cuts an epoch's order into global batches and each of those into `size * accumulate` shares.

    `batch_size` is global (samples per optimizer step); the last batch of an epoch is shorter unless `drop_last`.
    """

    order: Order
    count: int  # samples in an epoch
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    size: int = 1
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def global_batch_size(self, step: int) -> int:
        start = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.count - start)

    def share(self, step: int, micro: int) -> tuple[int, int]:
        """(start, stop) inside the global batch of `step` for this process's micro-batch number `micro`."""
        shares, number = self.size * self.accumulate, self.rank * self.accumulate + micro
        samples = self.global_batch_size(step)
        return samples * number // shares, samples * (number + 1) // shares

    def weight(self, step: int, micro: int) -> float:
        """What this micro-batch's mean loss counts, so that averaging over processes gives the global batch's mean."""
        start, stop = self.share(step, micro)
        return (stop - start) * self.size / self.global_batch_size(step)

    def keys(self, step: int, micro: int, order: Sequence[int]) -> list[Key]:
        """The samples of one micro-batch. An empty share borrows the batch's first sample (its weight is 0):
        every process takes part in every step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        first = batch * self.batch_size
        start, stop = self.share(step, micro)
        places = range(first + start, first + max(stop, start + 1)) if start < stop else [first]
        return [Key(epoch, place, order[place]) for place in places]


class _Steps(Sampler[list[Key]]):
    """The micro-batches of steps start .. stop-1, across epochs, so that workers run ahead over an epoch's end."""

    def __init__(self, plan: Plan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, []
        for step in range(self.start, self.stop):
            if step // self.plan.steps_per_epoch != epoch:
                epoch = step // self.plan.steps_per_epoch
                order = list(self.plan.order(epoch))
            for micro in range(self.plan.accumulate):
                yield self.plan.keys(step, micro, order)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.plan.accumulate


class _Seeded(Dataset[Any]):
    """`images` addressed by Key: seeds the transforms by (seed, epoch, position); brings bad images along.

    It leaves the global generators seeded: the engine seeds them anew before each forward pass.
    """

    def __init__(self, images: Images, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: Key) -> Any:
        seed_transforms(self.seed, key.epoch, key.position)
        return _read(self.images, key.sample)


class _Plain(Dataset[Any]):
    """`images` addressed by index, bad images brought along; for evaluation."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Any:
        return _read(self.images, index)


def _read(images: Images, index: int) -> tuple[Any, int, int] | tuple[None, str, int]:
    try:
        image, label = images[index]
    except BadImage as error:
        return None, str(error), index
    return image, label, index


def _collate(samples: list[Any]) -> Batch:
    good = [sample for sample in samples if sample[0] is not None]
    unreadable = [(index, why) for image, why, index in samples if image is None]
    empty = torch.empty(0), torch.empty(0, dtype=torch.long)
    images, labels = default_collate([(image, label) for image, label, _ in good]) if good else empty
    return Batch(images, labels, [index for _, _, index in good], unreadable)


def _start_worker(_: int) -> None:
    # Ctrl-C and SIGTERM reach the whole process group: the training process decides, its workers go on until told.
    # A worker that died would raise in the training process at any line, in the middle of an update too.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _loader(dataset: Dataset[Any], batches: Any, workers: int, pin_memory: bool, stay: bool) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=stay and workers > 0,
    )


@atexit.register
def _end_workers() -> None:
    """Ends workers that an error left behind: multiprocessing would send SIGTERM, which they ignore, and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler raises when a worker is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def training_batches(
    images: Images, plan: Plan, seed: int, steps: range, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The micro-batches of all of `steps`, from one DataLoader. UserError where an image cannot be read."""
    steps_of = _Steps(plan, steps.start, steps.stop)
    return iter(Readable(_loader(_Seeded(images, seed), steps_of, workers, pin_memory, stay=False)))


def evaluation_batches(
    images: Images, batch_size: int, rank: int, size: int, workers: int, pin_memory: bool
) -> Iterable[Batch]:
    """Every `size`-th sample from `rank` on, in order: nothing is padded, each sample belongs to one process.

    It can be gone through again and again, and its workers wait for the next time: some published protocols evaluate
    every few seconds, and on two busy cores to start four workers took 0.6 to 1.1 s.
    """
    mine = range(rank, len(images), size)
    batches = [list(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]
    return _loader(_Plain(images), batches, workers, pin_memory, stay=True)


@dataclass(frozen=True)
class Readable:
    """Batches of which every image could be read; UserError, which names the file, for one that could not."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            for _, why in batch.unreadable:
                raise UserError(why)
            yield batch
