"""Cost of bringing an image: decoded and transformed by one core, beside torchvision's ImageFolder in the same run.

    python -m benchmarks.data                              every published transform, JPEGs of two sizes
    python -m benchmarks.data --only FFVT --rounds 31      those whose name contains a text

`floor` is ImageFolder with the same transform, `ours` what a data worker does: seeding, decoding, transform. Each image
goes through both in turn, from one seed; their tensors have to be equal. Rounds draw differently: their median counts.
Seconds are those of the processor, which other programs on the machine change little. The files are in the system's
page cache: what a disk or a network adds comes on top. FFVT's CIFAR has no files.
"""

import importlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import ImageFolder

import ffvt.data
import glsim.data_utils.transforms
from benchmarks.photographs import FOOD, write_photographs
from common.cli import parse
from common.data import Images, write_demo
from common.data.batches import seed_transforms
from common.data.images import Transform
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import CONFIGS, read_config

ROOT = Path(__file__).resolve().parents[1]
SIZES = (FOOD, (1024, 682))  # pixels; the others are those of iNaturalist photographs, say


@dataclass
class Recipe:
    images: int = 2  # files of each size
    rounds: int = 15  # each image goes through all ways so many times
    only: str = ""  # transforms whose name contains this text


@dataclass
class Options:
    """There is nothing more to choose."""


def published_transforms(folder: Path) -> dict[str, Transform]:
    """The transforms of all programs by name, those that are equal once; demo data are written below `folder`."""
    found: list[tuple[str, Transform]] = []
    for file in sorted(ROOT.glob("*_*.py")):
        script = importlib.import_module(file.stem)
        data_set = next(name for name in ("coco", "aircraft", "food101") if name in file.stem.lower())
        write_demo(data_set, folder)
        data = script.data(script.Recipe(data_root=str(folder)))
        found += [(f"GFT {file.stem} train", data.train.transform), (f"GFT {file.stem} test", data.test.transform)]
    for data_set, sizes in (("CUB", (448, 600)), ("cotton", (384, 500)), ("car", (448, 600)), ("INat2017", (304, 400))):
        train, test = ffvt.data.transforms(data_set, *sizes)
        found += [(f"FFVT {data_set} train", train), (f"FFVT {data_set} test", test)]
    for setting in ("ft_is224", "ft_is448"):
        for augmentation in ("weakaugs", "medaugs", "strongaugs"):
            files = [CONFIGS / "settings" / f"{setting}.yaml", CONFIGS / "augs" / f"{augmentation}.yaml"]
            values = {name: value for file in files for name, value in read_config(file).items()}
            train, test = glsim.data_utils.transforms.transforms(Settings(**values))
            name = f"GLSim {augmentation} {values['image_size']}"
            found += [(f"{name} train", train), (f"{name} test", test)]
    names: dict[str, tuple[str, Transform]] = {}
    for name, transform in found:
        names.setdefault(repr(transform), (name, transform))
    return dict(names.values())


def measure(root: Path, transform: Transform, rounds: int) -> dict[str, float]:
    """Processor seconds an image of `floor` and `ours`: the mean over the images of the median over the rounds."""
    floor = ImageFolder(str(root), transform)
    paths = [path for path, _ in floor.samples]
    names = [Path(path).name for path in paths]
    ours = Images("benchmark", "train", names, paths, [0] * len(paths), ["class"], transform)
    ways: dict[str, Any] = {"floor": floor, "ours": ours}
    seconds: dict[tuple[str, int], list[float]] = {(way, index): [] for way in ways for index in range(len(paths))}
    for number in range(rounds):
        for index in range(len(paths)):
            found = {}
            for way in ways if number % 2 else reversed(ways):  # who comes first alternates
                seed_transforms(number, index)
                found[way], spent = _bring(ways[way], index, None if way == "floor" else number)
                seconds[way, index].append(spent)
            if not torch.equal(found["ours"], found["floor"]):
                raise SystemExit(f"{paths[index]}: other pixels than ImageFolder's under {transform}")
    return {way: statistics.mean(statistics.median(seconds[way, index]) for index in range(len(paths))) for way in ways}


def _bring(images: Any, index: int, seed: int | None) -> tuple[Any, float]:
    """An image, and the processor seconds it took: seeding, which ours has to do for each, among them."""
    start = time.process_time()
    if seed is not None:
        seed_transforms(seed, index)
    image, _ = images[index]
    return image, time.process_time() - start


def main() -> None:
    recipe, _, _ = parse(Recipe, Options, __doc__ or "")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = {name: t for name, t in published_transforms(folder / "demo").items() if recipe.only in name}
        for size in SIZES:
            root = folder / f"{size[0]}x{size[1]}"
            write_photographs(root / "class", size, recipe.images)  # of one class, for ImageFolder
            print(f"\n{f'{size[0]} x {size[1]}, images/s':44}{'floor':>9}{'ours':>9}{'time':>7}")
            for title, transform in chosen.items():
                seconds = measure(root, transform, recipe.rounds)
                rates = f"{1 / seconds['floor']:9.1f}{1 / seconds['ours']:9.1f}"
                print(f"{title:44}{rates}{seconds['ours'] / seconds['floor']:7.3f}", flush=True)


if __name__ == "__main__":
    main()
