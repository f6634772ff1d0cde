"""Pictures of the images that a model gets wrong. C classes."""

import math
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from common.data.images import Images, load_image
from common.engine import logits_of
from common.errors import UserError
from common.log import say
from common.metrics import Predictions

ON_A_SHEET = 64  # errors on the contact sheet, the most confident ones


@torch.inference_mode()
def draw_errors(
    model: nn.Module, images: Images, predictions: Predictions, device: torch.device, folder: Path, each: bool
) -> list[Path]:
    """Write `errors.png`, a contact sheet of the most confident errors, to the folder; `each`: a PNG an error too.

    Every picture says the true class, the predicted one and its probability. Returns the files.
    """
    wrong = predictions.index[predictions.ranked[:, 0] != predictions.label].tolist()
    model.eval()
    found: list[tuple[float, int, int]] = []  # probability, index in the split, predicted class
    for index in wrong:
        probability, predicted = logits_of(model(images[index][0][None].to(device))).float().softmax(-1).max(-1)
        found.append((float(probability), index, int(predicted)))
    found.sort(reverse=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [_write_sheet(images, found, folder / "errors.png")]
        for error in found if each else ():
            files.append(_write_one(images, error, folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): see --results_dir") from error
    say(f"errors: {len(found)} of {len(predictions.index)} images, drawn in {folder}")
    return files


def _title(images: Images, error: tuple[float, int, int]) -> str:
    probability, index, predicted = error
    true = images.classes[images.labels[index]]
    return f"{true}\ntaken for {images.classes[predicted]} ({probability:.1%})"


def _write_sheet(images: Images, found: list[tuple[float, int, int]], path: Path) -> Path:
    shown = found[:ON_A_SHEET]
    columns = max(1, math.ceil(math.sqrt(len(shown))))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(2.6 * columns, 3 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{images.name} {images.split}: {len(found)} errors, {len(shown)} shown")
    for place, error in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(load_image(images.path(error[1])))
        axes.set_title(_title(images, error), fontsize=7)
        axes.axis("off")
    FigureCanvasAgg(figure).print_png(path)
    return path


def _write_one(images: Images, error: tuple[float, int, int], folder: Path) -> Path:
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(load_image(images.path(error[1])))
    axes.set_title(_title(images, error), fontsize=9)
    axes.axis("off")
    path = folder / f"{error[1]:06d}_{images.path(error[1]).stem}.png"
    FigureCanvasAgg(figure).print_png(path)
    return path
