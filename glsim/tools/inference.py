"""What is in images: the most probable classes, the crop, and what the model looks at.

    python tools/inference.py --ckpt_path ckpts/dafb_glsim.pth --images_path samples/others/dafb_rena_170785.jpg
        [--vis_mask_sq] [--vis_mask glsim_norm|rollout|...] [--vis_mask_pow] [--vis_mask_all]
    python tools/inference.py --ckpt_path ckpts/cub_glsim_224.pth --images_path samples/     a folder and those below it
    python tools/inference.py --ckpt_path ckpts/cub_glsim_224.pth --images_path test.csv     a list with a column `dir`
    python tools/inference.py --demo     digits, and without --ckpt_path a small model whose weights are random

The checkpoint is a file of the authors or of ours, or the folder of a run. Image and crop go side by side to
{results_dir}/{model}[_{patch}]/, in the folders that the images have, masks beside them, and what is printed to
predictions.csv there (an earlier one gets a number). Images that cannot be read are left out and named; the exit status
is then 1.
Masks: see glsim/tools/heatmap.py, make_mask. --released draws them as the released program does (docs/fidelity.md
GLSIM-7, GLSIM-8, GLSIM-9, GLSIM-10).
"""

import csv
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from common import dist
from common.amp import Precision
from common.data.images import Images
from common.data.loader import Batch, evaluation_batches, workers_explained
from common.data.tree import is_inside
from common.engine import logits_of
from common.errors import UserError
from common.files import keep_earlier, write_csv
from common.predict import find_images
from common.recipe import parse
from glsim.data_utils.datasets import read
from glsim.data_utils.transforms import mean_std
from glsim.model_utils.build import build_model
from glsim.model_utils.glsim import ViTGLSim
from glsim.tools import heatmap
from glsim.train_utils.demo import demo_settings, write_demo
from glsim.train_utils.recipe import Recipe
from glsim.train_utils.settings import Settings, switched_off
from glsim.train_utils.trained import Trained, load_trained
from glsim.train_utils.yaml_config import CONFIGS, read_config, read_configs

DEMO_IMAGES = 8
SETTINGS = {field.name for field in fields(Settings)} - {"cfg", "cfg_method", "ckpt_path"}


@dataclass
class Request(Settings):
    images_path: str | None = None  # an image, a folder, or a .csv list
    top: int = 3  # classes an image
    batch_size: int = 8  # images at a time
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of the model; masks are computed in fp32
    cpu_workers: int = 8  # processes that read images, and threads that write pictures, at most one a core
    results_dir: str = "results_inference"  # everything goes below it
    save_crops_only: bool = switched_off()  # image and crop alone; off: a figure that says the classes and has the mask
    vis_mask: str | None = None  # gls[im_norm], glsim_L, attention[_L], rollout[[_FROM]_TO], psm[_H], maws[_L], asim
    vis_mask_all: bool = False  # also draw one mask of each kind, in one figure
    vis_mask_sq: bool = False  # also draw the similarity of the patches alone, a square each
    vis_mask_pow: bool = False  # masks to the 4th power
    vis_mask_top: int | None = None  # masks are 1 in so many patches, the highest, and 0 elsewhere
    vis_mask_color: bool = switched_off()  # masks in colours; off: they darken the image
    released: bool = False  # masks as the released program computes them


@dataclass
class Running:
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    demo: bool = False  # handwritten digits
    output: str = "runs"  # the demo's digits go to OUTPUT/demo-data


def main(argv: list[str] | None = None) -> None:
    """The program; `argv` are the words of its command line."""
    try:
        request, running, given, _ = parse(Request, Running, __doc__ or "", argv, separator="_", configure=configure)
        check_positive(request, ("top", "batch_size", "vis_mask_top"))
        if request.cpu_workers < 0:
            raise UserError(f"--cpu_workers {request.cpu_workers}: expected 0 or more")
        device = dist.choose_device(running.device, dist.Launch())
        changes = settings_given(request, running, given)
        if request.ckpt_path is not None:
            trained = load_trained(request.ckpt_path, device, **changes)
        elif running.demo:
            trained = _untrained(changes, device)
        else:
            raise UserError("--ckpt_path: name a checkpoint, or the folder of a run; --demo does without")
        if running.demo and request.images_path is None:
            images = {Path(image.name): image for image in read(trained.settings).test.paths[:DEMO_IMAGES]}
        else:
            images = find(request.images_path, trained.settings)
        with workers_explained("--cpu_workers"):
            unreadable = infer(trained, images, request)
    except UserError as error:
        raise SystemExit(f"inference.py: error: {error}") from None
    if unreadable:
        raise SystemExit(f"inference.py: {unreadable} of {len(images)} images could not be read: see above")


def configure(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Settings that the configuration files say; they may be files of a training."""
    return {name: value for name, value in read_configs(dict(given), Recipe).items() if name in SETTINGS}


def check_positive(request: Settings, names: Iterable[str]) -> None:
    """Raise UserError for one of these numbers, where it is given, below 1."""
    for name in names:
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected 1 or more")


def settings_given(request: Settings, running: Running, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Settings that --demo, the configuration files and the command line say, the last winning.

    With --demo the digits are written. What it says of a model is not said of a checkpoint.
    """
    changes = configure(given)
    if running.demo:
        demo = demo_settings(request, given, Path(running.output))
        of_data = {name: value for name, value in demo.items() if name.startswith(("dataset_", "folder_"))}
        changes |= demo if request.ckpt_path is None else of_data
    changes |= given
    if running.demo:
        write_demo(Path(changes["dataset_root_path"]))
    return {name: value for name, value in changes.items() if name in SETTINGS}


def _untrained(changes: dict[str, Any], device: torch.device) -> Trained:
    """The demo's model."""
    print("note: the demo's model has random weights, what it says means nothing; --ckpt_path names a trained one")
    settings = Settings(**(read_config(CONFIGS / "methods" / "glsim.yaml") | changes))
    torch.manual_seed(0)
    data = read(settings)
    model = build_model(settings, len(data.classes)).eval().to(device)
    transform: Any = data.test.transform
    return Trained(model, settings, data.classes, transform, settings.model_name)


def find(images_path: str | None, settings: Settings) -> dict[Path, Path]:
    """Return the image files that --images_path means, by their names in its folder or list.

    A name in a list is that of a file below the list's folder, or below the folder of test images there or in the data
    set. Raises UserError where there is no image, and for a list without names of images below its folder.
    """
    if images_path is None:
        raise UserError("--images_path: name an image, a folder, or a .csv list of images")
    path = Path(images_path)
    if path.is_dir():
        return {file.relative_to(path): file for file in find_images([images_path])}
    if not path.is_file():
        raise UserError(f"--images_path {path} does not exist: expected an image, a folder, or a .csv list of images")
    if path.suffix.lower() != ".csv":
        return {Path(path.name): path}
    folder = settings.folder_test
    roots = (path.parent, path.parent / folder, Path(settings.dataset_root_path) / folder)
    files = {}
    for name in _listed(path):
        here = [root / name for root in roots]
        files[name] = next(filter(os.path.isfile, here), here[0])
    return files


def _listed(path: Path) -> list[Path]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            if "dir" not in (rows.fieldnames or ()):
                raise UserError(f"{path} has no column `dir`: expected a line `class_id,dir`, then a line an image")
            names = [row["dir"] or "" for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as csv ({getattr(error, 'strerror', None) or error})") from error
    for name in names:
        if not Path(name).name or not is_inside(name):
            raise UserError(f"{path} lists {name!r}: expected an image below the folder of the images")
    if not names:
        raise UserError(f"{path} lists no image")
    return [Path(name) for name in names]


class View(NamedTuple):
    """What there is to show of one image."""

    seen: list[np.ndarray]  # the image as the model sees it, and the crop where it makes one
    masks: dict[str, np.ndarray]  # (rows, columns), by name


@torch.inference_mode()
def infer(trained: Trained, images: dict[Path, Path], request: Request) -> int:
    """Print the classes of the images, write what the request asks for, and return how many could not be read."""
    model, classes = trained.model, trained.classes
    folder = Path(request.results_dir) / folder_name(trained)
    stems = Counter(name.with_suffix("") for name in images)  # images may differ in the suffix alone
    rows: list[tuple[Any, ...]] = [("path", "rank", "class", "name", "probability")]
    names, unreadable = list(images), 0
    precision = Precision(request.precision, next(model.parameters()).device)
    with _writing(_writers(request, len(images))) as write:
        for batch in _batches(trained, images, request, pinned=precision.device.type == "cuda"):
            for _, why in batch.unreadable:
                print(why.partition(";")[0], file=sys.stderr)
            unreadable += len(batch.unreadable)
            if batch.images is None:
                continue
            inputs = batch.images.to(precision.device, non_blocking=True)  # (B, 3, S, S)
            with precision.autocast():
                output = model(inputs)
            best = logits_of(output).float().softmax(-1).topk(min(request.top, len(classes)))
            guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            views = _views(trained, inputs, output, request)
            for index, (numbers, values), view in zip(batch.indices, guesses, views, strict=True):
                name = names[index]
                text = [f"{classes[number]} {value:.1%}" for number, value in zip(numbers, values, strict=True)]
                print(f"{images[name]}: {', '.join(text)}")
                for rank, (number, value) in enumerate(zip(numbers, values, strict=True), 1):
                    rows.append((images[name], rank, number, classes[number], value))
                stem = name.with_suffix("") if stems[name.with_suffix("")] == 1 else name
                write(view, "\n".join(text), str(folder / stem), request)
    if len(rows) > 1:
        keep_earlier(folder / "predictions.csv")
        write_csv(folder / "predictions.csv", rows)
        print(f"pictures and predictions.csv: {folder}")
    return unreadable


def _batches(trained: Trained, images: dict[Path, Path], request: Request, pinned: bool) -> Iterator[Batch]:
    """The images in their order."""
    names, files = list(map(str, images)), list(images.values())
    asked = Images("inference", "input", names, files, [0] * len(files), ["?"], trained.transform)
    return iter(evaluation_batches(asked, request.batch_size, 0, 1, _helpers(request, len(files)), pinned))


def _helpers(request: Request, count: int) -> int:
    """How many help with so many images: none with a single batch, as they read whole ones."""
    return min(request.cpu_workers, os.cpu_count() or 1) if count > request.batch_size else 0


def _writers(request: Request, count: int) -> int:
    """As many threads as helpers; none for Matplotlib's figures, which are for one thread."""
    return _helpers(request, count) if request.save_crops_only and not request.vis_mask_all else 0


@contextmanager
def _writing(threads: int) -> Iterator[Callable[..., object]]:
    """`_write`, its calls being taken by threads: PNG's compression, the most of it, needs no lock of Python's.

    All is written at the end of the block. Without threads a call returns when it is done.
    """
    if not threads:
        yield _write
        return
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def write(*given: Any) -> None:
            waiting.append(pool.submit(_write, *given))
            if len(waiting) > 2 * threads:  # a slow disk must not fill the memory
                waiting.popleft().result()

        yield write
        for written in waiting:
            written.result()


def folder_name(trained: Trained) -> str:
    """As the authors call it: the model, and where it crops the size of its patches."""
    anchor = trained.model.config.anchor_size if isinstance(trained.model, ViTGLSim) else None
    return trained.name if anchor is None else f"{trained.name}_{anchor}"


def _views(trained: Trained, inputs: Tensor, output: Any, request: Request) -> Iterator[View]:
    seen = [inputs]
    if isinstance(output, tuple) and output[1].shape == inputs.shape:
        seen.append(output[1])
    names = {request.vis_mask} if request.vis_mask else set()
    names |= {"glsim_norm"} if request.vis_mask_sq else set()
    names |= set(heatmap.MASKS) if request.vis_mask_all else set()
    masks = {}
    if names:
        evidence = heatmap.gather(trained.model, inputs)
        for name in names:
            masks[name] = heatmap.make_mask(evidence, name, request.released).unflatten(1, evidence.grid).cpu().numpy()
    mean, std = mean_std(trained.settings)
    for i in range(len(inputs)):
        pictures = [heatmap.to_picture(images[i], mean, std) for images in seen]
        yield View(pictures, {name: mask[i] for name, mask in masks.items()})


def _write(view: View, text: str, stem: str, request: Request) -> None:
    def drawn(name: str) -> np.ndarray:
        how = request.vis_mask_pow, request.vis_mask_top, request.vis_mask_color, request.released
        return heatmap.overlay(view.seen[0], view.masks[name], *how)

    panels = list(zip(("image", "crop"), view.seen, strict=False))
    if request.save_crops_only:
        heatmap.save(heatmap.beside(view.seen), Path(f"{stem}.png"))
    else:
        masks = [(request.vis_mask, drawn(request.vis_mask))] if request.vis_mask else []
        heatmap.save(heatmap.draw([*panels, *masks], 3, text), Path(f"{stem}.png"))
    if request.vis_mask:
        heatmap.save(drawn(request.vis_mask), Path(f"{stem}_{request.vis_mask}.png"))
    if request.vis_mask_sq:
        heatmap.save(heatmap.squares(view.seen[0], view.masks["glsim_norm"]), Path(f"{stem}_similarity.png"))
    if request.vis_mask_all:
        panels += [(name, drawn(name)) for name in heatmap.MASKS]
        heatmap.save(heatmap.draw(panels, 4, text), Path(f"{stem}_masks.png"))


if __name__ == "__main__":
    main()
