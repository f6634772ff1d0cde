"""Pictures of the images that a model gets wrong. C classes."""

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from common.amp import Precision
from common.data.images import Images
from common.engine import logits_of
from common.errors import UserError
from common.log import say
from common.metrics import Predictions

ON_A_SHEET = 64  # errors on the contact sheet, the most confident ones
ONE = "[0-9]" * 6 + "_*.png"  # files of single errors


@torch.inference_mode()
def draw_errors(
    model: nn.Module,
    images: Images,
    predictions: Predictions,
    device: torch.device,
    precision: Precision,
    folder: Path,
    each: bool,
) -> list[Path]:
    """Write `errors.png`, a contact sheet of the most confident errors, to the folder; `each`: a PNG an error too.

    Every picture says the true class, the predicted one and its probability, which is computed again. The pictures of
    an earlier call give way. Returns the files.
    """
    wrong = predictions.ranked[:, 0] != predictions.label
    model.eval()
    found: list[tuple[float, int, int]] = []  # probability, index in the split, predicted class
    for index, predicted in zip(predictions.index[wrong].tolist(), predictions.ranked[wrong, 0].tolist(), strict=True):
        with precision.autocast():
            logits = logits_of(model(images[index][0][None].to(device)))  # (1, C)
        found.append((float(logits.float().softmax(-1)[0, predicted]), index, predicted))
    found.sort(reverse=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob(ONE):
            earlier.unlink()
        files = [_write_sheet(images, found, folder / "errors.png")]
        for error in found if each else ():
            files.append(_write_one(images, error, folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): see --results_dir") from error
    say(f"errors: {len(found)} of {len(predictions.index)} images, drawn in {folder}")
    return files


def _draw(axes: Any, images: Images, error: tuple[float, int, int], fontsize: int) -> None:
    probability, index, predicted = error
    image, label = images.with_transform(None)[index]
    axes.imshow(image)
    true, taken_for = images.classes[label], images.classes[predicted]
    axes.set_title(f"{true}\ntaken for {taken_for} ({probability:.1%})", fontsize=fontsize)
    axes.axis("off")


def _write_sheet(images: Images, found: list[tuple[float, int, int]], path: Path) -> Path:
    shown = found[:ON_A_SHEET]
    columns = max(1, math.ceil(math.sqrt(len(shown))))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(2.6 * columns, 3 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{images.name} {images.split}: {len(found)} errors, {len(shown)} shown")
    for place, error in enumerate(shown):
        _draw(figure.add_subplot(rows, columns, place + 1), images, error, fontsize=7)
    FigureCanvasAgg(figure).print_png(path)
    return path


def _write_one(images: Images, error: tuple[float, int, int], folder: Path) -> Path:
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    _draw(figure.add_subplot(), images, error, fontsize=9)
    path = folder / f"{error[1]:06d}_{Path(images.ids[error[1]]).stem}.png"
    FigureCanvasAgg(figure).print_png(path)
    return path
