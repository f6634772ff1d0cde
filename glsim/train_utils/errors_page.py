"""Pictures of the images that a model gets wrong. C classes."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.data.images import Images
from common.train.log import say
from common.train.loop import logits_of
from common.train.metrics import Predictions
from common.train.precision import Precision
from glsim.train_utils.pictures import draw, save

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
    for earlier in folder.glob(ONE):
        earlier.unlink()
    shown = [_panel(images, error) for error in found[:ON_A_SHEET]]
    title = f"{images.name} {images.split}: {len(found)} errors, {len(shown)} shown"
    files = [folder / "errors.png"]
    save(draw(shown, math.ceil(math.sqrt(len(shown))), title), files[0])
    for error in found if each else ():
        files.append(folder / f"{error[1]:06d}_{Path(images.ids[error[1]]).stem}.png")
        save(draw([_panel(images, error)], 1, ""), files[-1])
    say(f"errors: {len(found)} of {len(predictions.index)} images, drawn in {folder}")
    return files


def _panel(images: Images, error: tuple[float, int, int]) -> tuple[str, np.ndarray]:
    probability, index, predicted = error
    image, label = images.with_transform(None)[index]
    true, taken_for = images.classes[label], images.classes[predicted]
    return f"{true} taken for {taken_for} ({probability:.1%})", np.asarray(image)
