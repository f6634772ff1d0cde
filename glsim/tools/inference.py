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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common.cli import Flags, parse
from common.data.batches import evaluation_batches
from common.data.images import Images
from common.errors import UserError
from common.files import keep_earlier, write_csv
from common.predict import find_images
from common.train import distributed
from common.train.precision import Precision
from glsim.data_utils.datasets import is_inside, read
from glsim.data_utils.transforms import mean_std
from glsim.model_utils.glsim import ViTGLSim
from glsim.tools.heatmap import MASKS, masks_of
from glsim.train_utils.pictures import beside, draw, overlay, save, squares, to_picture
from glsim.train_utils.recipe import MAY_BE_ZERO
from glsim.train_utils.settings import Settings, switched_off
from glsim.train_utils.trained import Running, Trained, configure, load_trained, not_trained, settings_given
from glsim.train_utils.yaml_config import CONFIGS, read_config

DEMO_IMAGES = 8


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


def main(argv: list[str] | None = None) -> None:
    """The program; `argv` are the words of its command line."""
    try:
        request, running, given = parse(
            Request, Running, __doc__ or "", argv, flag=Flags("_"), may_be_zero=MAY_BE_ZERO, configure=configure
        )
        device = distributed.choose_device(running.device, distributed.Launch())
        changes = settings_given(request, running, given)
        if request.ckpt_path is not None:
            trained = load_trained(request.ckpt_path, device, **changes)
        elif running.demo:
            trained = not_trained(Settings(**(read_config(CONFIGS / "methods" / "glsim.yaml") | changes)), device)
        else:
            raise UserError("--ckpt_path: name a checkpoint, or the folder of a run; --demo does without")
        if running.demo and request.images_path is None:
            images = {Path(image.name): Path(image) for image in read(trained.settings).test.paths[:DEMO_IMAGES]}
        else:
            images = find(request.images_path, trained.settings)
        unreadable = infer(trained, images, request)
    except UserError as error:
        raise SystemExit(f"inference.py: error: {error}") from None
    if unreadable:
        raise SystemExit(f"inference.py: {unreadable} of {len(images)} images could not be read: see above")


def find(images_path: str | None, settings: Settings) -> dict[Path, Path]:
    """Return the image files that --images_path means, by their names in its folder or list.

    A name in a list is that of a file below the list's folder, or below the folder of test images there or in the data
    set. Raises UserError where there is no image, and for a list with names of images elsewhere.
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
    with open(path, newline="", encoding="utf-8-sig") as lines:
        names = [row.get("dir") or "" for row in csv.DictReader(lines)]
    if not names or not all(Path(name).name and is_inside(name) for name in names):
        raise UserError(f"{path}: expected a column `dir` of images below their folder, behind a line `class_id,dir`")
    folder = settings.folder_test
    roots = (path.parent, path.parent / folder, Path(settings.dataset_root_path) / folder)
    files = {}
    for name in names:
        here = [root / name for root in roots]
        files[Path(name)] = next(filter(os.path.isfile, here), here[0])
    return files


class View(NamedTuple):
    """What there is to show of one image."""

    seen: list[np.ndarray]  # the image as the model sees it, and the crop where it makes one
    masks: dict[str, np.ndarray]  # (rows, columns), by name
    text: str  # classes and probabilities, one a line
    stem: str  # of the files


def infer(trained: Trained, images: dict[Path, Path], request: Request) -> int:
    """Print the classes of the images, write what the request asks for, and return how many could not be read."""
    folder = Path(request.results_dir) / folder_name(trained)
    stems = Counter(name.with_suffix("") for name in images)  # images may differ in the suffix alone
    names, files, unreadable = list(images), list(images.values()), 0
    rows: list[tuple[Any, ...]] = [("path", "rank", "class", "name", "probability")]
    precision = Precision(request.precision, trained.device)
    wanted = {request.vis_mask} if request.vis_mask else set()
    wanted |= {"glsim_norm"} if request.vis_mask_sq else set()
    wanted |= set(MASKS) if request.vis_mask_all else set()
    mean, std = mean_std(trained.settings)
    helpers = min(request.cpu_workers, os.cpu_count() or 1) if len(files) > request.batch_size else 0
    asked = Images("inference", "input", list(map(str, names)), files, [0] * len(files), ["?"], trained.transform)
    pinned = trained.device.type == "cuda"
    # PNG's compression, the most of writing, holds no lock of Python's; Matplotlib's figures are for one thread.
    threads = helpers if request.save_crops_only and not request.vis_mask_all else 1
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for batch in evaluation_batches(asked, request.batch_size, 0, 1, helpers, pinned):
            for _, why in batch.unreadable:
                print(why.partition(";")[0], file=sys.stderr)
            unreadable += len(batch.unreadable)
            if batch.images is None:
                continue
            inputs = batch.images.to(trained.device, non_blocking=True)  # (B, 3, S, S)
            answer = trained.answer(inputs, request.top, precision)
            masks = masks_of(trained.model, inputs, wanted, request.released)
            views = []
            for i, index in enumerate(batch.indices):
                name, best = names[index], answer.classes[i]
                said = [f"{trained.classes[number]} {probability:.1%}" for number, probability in best]
                print(f"{files[index]}: {', '.join(said)}")
                for rank, (number, probability) in enumerate(best, 1):
                    rows.append((files[index], rank, number, trained.classes[number], probability))
                seen = [to_picture(some[i], mean, std) for some in (inputs, answer.crops) if some is not None]
                stem = name.with_suffix("") if stems[name.with_suffix("")] == 1 else name
                of_image = {kind: mask[i] for kind, mask in masks.items()}
                views.append(View(seen, of_image, "\n".join(said), str(folder / stem)))
            list(pool.map(lambda view: _write(view, request), views))
    if len(rows) > 1:
        keep_earlier(folder / "predictions.csv")
        write_csv(folder / "predictions.csv", rows)
        print(f"pictures and predictions.csv: {folder}")
    return unreadable


def folder_name(trained: Trained) -> str:
    """As the authors call it: the model, and where it crops the size of its patches."""
    anchor = trained.model.config.anchor_size if isinstance(trained.model, ViTGLSim) else None
    return trained.settings.model_name if anchor is None else f"{trained.settings.model_name}_{anchor}"


def _write(view: View, request: Request) -> None:
    def drawn(name: str) -> np.ndarray:
        how = request.vis_mask_pow, request.vis_mask_top, request.vis_mask_color, request.released
        return overlay(view.seen[0], view.masks[name], *how)

    panels = list(zip(("image", "crop"), view.seen, strict=False))
    if request.save_crops_only:
        save(beside(view.seen), Path(f"{view.stem}.png"))
    else:
        masks = [(request.vis_mask, drawn(request.vis_mask))] if request.vis_mask else []
        save(draw([*panels, *masks], 3, view.text), Path(f"{view.stem}.png"))
    if request.vis_mask:
        save(drawn(request.vis_mask), Path(f"{view.stem}_{request.vis_mask}.png"))
    if request.vis_mask_sq:
        save(squares(view.seen[0], view.masks["glsim_norm"]), Path(f"{view.stem}_similarity.png"))
    if request.vis_mask_all:
        panels += [(name, drawn(name)) for name in MASKS]
        save(draw(panels, 4, view.text), Path(f"{view.stem}_masks.png"))


if __name__ == "__main__":
    main()
