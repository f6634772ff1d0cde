"""Cost of bringing an image: decoded and transformed by one core, beside torchvision's ImageFolder in the same run.

    python -m benchmarks.data                              every published transform, JPEGs of two sizes
    python -m benchmarks.data --only FFVT --rounds 31      those whose name contains a text
    python -m benchmarks.data --coco                       the start of COCO at its real size instead

`floor` is ImageFolder with the same transform, `ours` what a data worker does: seeding, checks, decoding, transform.
`first` and `kept` are that with --cache-resized: an epoch that fills the folder, and a later one. Each image goes
through all four in turn, from one seed; their tensors have to be equal. Rounds draw differently: their median counts.
Seconds are those of the processor, which other programs on the machine change little. The files are in the system's
page cache: what a disk or a network adds comes on top. FFVT's CIFAR has no files.

COCO: an annotation file of train2017's size is indexed, and the index read again, each in a process of its own;
`MB` is by how much its memory grew at the peak.
"""

import importlib
import json
import multiprocessing
import random
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import ImageFolder

import ffvt.data
import glsim.data_utils.transforms
from benchmarks import report
from benchmarks.models import Memory
from benchmarks.photographs import FOOD, write_photographs
from common.data import Images, coco, write_demo
from common.data.images import Transform
from common.data.kept import Cache
from common.data.loader import seed_transforms
from common.provenance import device_name
from common.recipe import parse
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import CONFIGS, read_config

ROOT = Path(__file__).resolve().parents[1]
SIZES = (FOOD, (1024, 682))  # pixels; the others are those of iNaturalist photographs, say
COCO_IMAGES, COCO_UNLABELLED, COCO_BOXES = 118_287, 1_021, 860_001  # of train2017
WAYS = ("floor", "ours", "first", "kept")


@dataclass
class Recipe:
    images: int = 2  # files of each size
    rounds: int = 15  # each image goes through all ways so many times
    only: str = ""  # transforms whose name contains this text
    coco: bool = False  # measure the start of COCO instead


@dataclass
class Options:
    json: str | None = None  # also write the figures to this file


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


def measure(root: Path, transform: Transform, rounds: int, scratch: Path) -> dict[str, float]:
    """Processor seconds an image in each of WAYS: the mean over the images in `root` of the median over the rounds."""
    floor = ImageFolder(str(root), transform)
    paths = [path for path, _ in floor.samples]
    names = [Path(path).name for path in paths]
    ours = Images("benchmark", "train", names, paths, [0] * len(paths), ["class"], transform)
    seconds: dict[tuple[str, int], list[float]] = {(way, index): [] for way in WAYS for index in range(len(paths))}
    for number in range(rounds):
        place = scratch / "kept"
        cached = Cache(place).of(ours)
        for index in range(len(paths)):
            # Who comes first alternates; what is kept has to be made before.
            order = ("floor", "ours", "first", "kept") if number % 2 else ("first", "kept", "ours", "floor")
            found = {}
            for way in order:
                images: Any = {"floor": floor, "ours": ours}.get(way, cached)
                seed_transforms(number, index)
                found[way], spent = _bring(images, index, None if way == "floor" else number)
                seconds[way, index].append(spent)
            if not all(torch.equal(found[way], found["floor"]) for way in WAYS):
                raise SystemExit(f"{paths[index]}: the ways lead to different pixels under {transform}")
        shutil.rmtree(place)
    return {way: statistics.mean(statistics.median(seconds[way, index]) for index in range(len(paths))) for way in WAYS}


def _bring(images: Any, index: int, seed: int | None) -> tuple[Any, float]:
    """An image, and the processor seconds it took: seeding, which ours has to do for each, among them."""
    start = time.process_time()
    if seed is not None:
        seed_transforms(seed, index)
    image, _ = images[index]
    return image, time.process_time() - start


def write_coco(root: Path, images: int, unlabelled: int, boxes: int) -> Path:
    """COCO's train2017 with polygons of the usual length and images of no bytes; its annotation file."""
    folder = root / "coco" / "train2017"
    folder.mkdir(parents=True)
    file = root / "coco" / "annotations" / "instances_train2017.json"
    file.parent.mkdir()
    draw = random.Random(0)
    polygons = [json.dumps([[round(draw.uniform(0, 640), 2) for _ in range(54)]]) for _ in range(97)]
    with open(file, "w", encoding="utf-8") as text:
        text.write('{"info": {}, "licenses": [], "images": [')
        for number in range(1, images + 1):
            name = f"{number:012d}.jpg"
            (folder / name).touch()
            image = {"license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}"}
            image |= {"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": number}
            text.write(("" if number == 1 else ", ") + json.dumps(image))
        text.write('], "annotations": [')
        for number in range(boxes):
            image_id, category_id = 1 + number % (images - unlabelled), 1 + number % 80
            text.write(("" if number == 0 else ", ") + f'{{"segmentation": {polygons[number % 97]}, "area": 702.1, ')
            text.write(f'"iscrowd": 0, "image_id": {image_id}, "bbox": [473.07, 395.93, 38.65, 28.67], ')
            text.write(f'"category_id": {category_id}, "id": {number + 1}}}')
        categories = [{"supercategory": "thing", "id": number, "name": f"thing {number}"} for number in range(1, 81)]
        text.write(f'], "categories": {json.dumps(categories)}}}')
    return file


def start_coco(root: str) -> dict[str, float | int | None]:
    """What reading the split takes: seconds on the clock, bytes of memory at the peak, number of images."""
    memory = Memory(torch.device("cpu"))
    memory.start()
    start = time.perf_counter()
    images = coco(root, "train2017")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory.rise(), "images": len(images)}


def measure_coco(folder: Path) -> dict[str, dict[str, float | int | None]]:
    """`start_coco` without an index and with it, each in a new process."""
    write_coco(folder, COCO_IMAGES, COCO_UNLABELLED, COCO_BOXES)
    found = {}
    for what in ("index built", "index read"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found[what] = process.submit(start_coco, str(folder)).result()
    return found


def show(name: str, seconds: dict[str, float]) -> str:
    """A row of the table: images a second, time beside the floor's, and what the kept images gain over ours."""
    rate = {way: 1 / spent for way, spent in seconds.items()}
    return (
        f"{name:44}{rate['floor']:9.1f}{rate['ours']:9.1f}{seconds['ours'] / seconds['floor']:7.3f}"
        f"{rate['first']:9.1f}{rate['kept']:9.1f}{seconds['ours'] / seconds['kept']:7.2f}"
    )


def main() -> None:
    recipe, options, *_ = parse(Recipe, Options, __doc__ or "")
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    started: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = {name: t for name, t in published_transforms(folder / "demo").items() if recipe.only in name}
        for size in () if recipe.coco else SIZES:
            root = folder / f"{size[0]}x{size[1]}"
            write_photographs(root / "class", size, recipe.images)  # of one class, for ImageFolder
            head = f"{'floor':>9}{'ours':>9}{'time':>7}{'first':>9}{'kept':>9}{'gain':>7}"
            print(f"\n{f'{size[0]} x {size[1]}, images/s':44}{head}")
            for title, transform in chosen.items():
                seconds = measure(root, transform, recipe.rounds, folder)
                print(show(title, seconds), flush=True)
                lines.append({"name": title, "size": size, "seconds": seconds})
        if recipe.coco:
            started = measure_coco(folder)
            for what, found in started.items():
                grown = "-" if found["bytes"] is None else f"{found['bytes'] / 2**20:,.0f}"
                print(f"COCO, {what}: {found['seconds']:.1f} s, {grown} MB, {found['images']:,} images")
    figures = {"lines": lines, "coco": started}
    report.write(options.json, "data", figures, recipe=recipe, device=device_name(torch.device("cpu")))


if __name__ == "__main__":
    main()
