"""--predict: what is on these pictures.

B images, C classes.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.data.batches import Readable, evaluation_batches
from common.data.images import Data, Images
from common.data.transforms import describe_transform, restore_transform
from common.errors import UserError
from common.export import export
from common.files import write_csv, write_text
from common.train import distributed
from common.train.log import say
from common.train.loop import loading, logits_of, out_of_memory_explained, ranking
from common.train.model import memory_format, place, trained_model
from common.train.run_folder import Checkpoint, Run

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def asked(options: Any) -> bool:
    """Whether a trained model is asked for something, and nothing is trained. UserError for options that contradict."""
    modes = [name for name in ("resume", "eval", "predict", "export") if getattr(options, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} exclude each other")
    if options.out is not None and Path(options.out).suffix not in (".csv", ".json"):
        raise UserError(f"--out {options.out}: expected a name that ends in .csv or .json")
    if options.export is not None and Path(options.export).suffix not in (".onnx", ".pt2"):
        raise UserError(f"--export {options.export}: expected a name that ends in .onnx (ONNX) or .pt2 (torch.export)")
    find_images(options.predict or [])  # refuses what is not there before any work is done
    return bool(modes) and modes != ["resume"]


def answer(
    run: Run,
    checkpoint: Checkpoint,
    build: Callable[[int], nn.Module],
    of_the_data: Callable[[], tuple[list[str], Any]],
) -> None:
    """--predict and --export. A bare file says neither class names nor test transform: `of_the_data` does."""
    info = checkpoint.info
    known = (info["classes"], restore_transform(info["preprocessing"])) if info else of_the_data()
    classes, transform = known
    say(f"model: {checkpoint.path}")
    model = trained_model(run, build, checkpoint, classes)
    if not distributed.is_main():
        return
    if run.options.export:
        export(run, model, classes, transform, describe_transform(transform))
        return
    paths = find_images(run.options.predict)
    with out_of_memory_explained(run):
        ranked = rank_images(run, place(run, model), transform, paths)
    write_predictions(paths, ranked, classes, run.options.out)


def of_data(data: Data) -> tuple[list[str], Any]:
    """Class names and test transform."""
    return data.classes, data.test.transform


@torch.inference_mode()
def rank_images(run: Run, model: nn.Module, transform: Any, paths: list[Path]) -> list[list[tuple[int, float]]]:
    """For each image the --top best (class, probability), best first."""
    images = Images("predict", "input", list(map(str, paths)), paths, [0] * len(paths), ["?"], transform)
    size, (workers, pinned) = run.options.eval_batch_size or run.batch_size, loading(run)
    layout = memory_format(model, run.device)
    model.eval()
    parts = []  # stay on the device, which would have to be waited for
    few = len(paths) <= size  # a worker brings whole batches
    for batch in Readable(evaluation_batches(images, size, 0, 1, 0 if few else workers, pinned)):
        with run.precision.autocast():
            logits = logits_of(
                model(batch.images.to(run.device, non_blocking=True, memory_format=layout))
            ).float()  # (B, C)
        best = ranking(logits, run.options.top)
        parts.append((best, logits.softmax(-1).gather(-1, best), logits.isfinite().all(-1)))
    best, values, finite = (torch.cat(part) for part in zip(*parts, strict=True))
    for path, known in zip(paths, finite.tolist(), strict=True):
        if not known:
            raise UserError(f"{path}: the model's output is not finite: its training has diverged, or it needs fp32")
    both = zip(best.tolist(), values.tolist(), strict=True)
    return [list(zip(numbers, probabilities, strict=True)) for numbers, probabilities in both]


def find_images(paths: Iterable[str]) -> list[Path]:
    """The image files among `paths`, and those in folders. UserError for a path that is not there or holds none."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if path.is_dir() and not inside:
            raise UserError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))})")
        if not path.exists():
            raise UserError(f"{path} does not exist: --predict takes image files and folders")
        found += inside if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def write_predictions(
    paths: list[Path], ranked: list[list[tuple[int, float]]], classes: list[str], out: str | None
) -> None:
    """Prints the predictions, and writes them to `out` (.csv: a row a guess; .json: an object a guess)."""
    heading, rows = ("path", "rank", "class", "name", "probability"), []
    for path, guesses in zip(paths, ranked, strict=True):
        print(f"{path}: " + ", ".join(f"{classes[number]} {probability:.1%}" for number, probability in guesses))
        rows += [(str(path), rank, number, classes[number], value) for rank, (number, value) in enumerate(guesses, 1)]
    if out is not None and Path(out).suffix == ".json":
        write_text(Path(out), json.dumps([dict(zip(heading, row, strict=True)) for row in rows], indent=1))
    elif out is not None:
        write_csv(Path(out), [heading, *rows])
