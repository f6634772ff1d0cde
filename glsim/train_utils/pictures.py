"""Pictures, arrays (height, width, 3) of uint8, of what a model sees, with masks over them, in figures and files."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.files import write_atomically

PANEL = 2.6  # inches that a picture is wide in a figure
# OpenCV's JET, which the published figures have; matplotlib's `jet` is up to 30 of 255 levels away from it.
JET = LinearSegmentedColormap.from_list(
    "JET", [(0, "#000080"), (1 / 8, "blue"), (3 / 8, "cyan"), (5 / 8, "yellow"), (7 / 8, "red"), (1, "#800000")]
)


def to_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return the picture (height, width, 3), uint8, of a normalised image (3, height, width)."""
    levels = image.float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return (levels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def overlay(
    picture: np.ndarray,
    mask: np.ndarray,
    power: bool = False,
    top: int | None = None,
    color: bool = True,
    released: bool = False,
) -> np.ndarray:
    """Return the picture (height, width, 3), uint8, under the mask (rows, columns): half of it, half JET colours.

    Before, `power` raises the mask to the 4th power; `top` makes it 1 in so many patches, the highest, and 0 elsewhere.
    Without `color` the mask, scaled to 0..1, multiplies the picture; `released`: as it is. The product is stretched.
    """
    mask = mask.astype(np.float32)
    if top is not None:
        mask = (mask >= np.sort(mask, axis=None)[-min(top, mask.size)]).astype(np.float32)
    if power:
        mask = mask**4
    if not color:
        return _levels(_enlarged(mask if released else _scaled(mask), picture)[..., None] * picture)
    colors = JET(_enlarged(_levels(mask), picture))[..., :3]
    blend: np.ndarray = np.rint((picture + 255 * colors) / 2)
    return blend.astype(np.uint8)


def squares(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the mask (rows, columns) alone, as large as the picture (height, width, 3): a square a patch, in JET."""
    colors: np.ndarray = JET(_enlarged(_levels(mask), picture, Image.Resampling.NEAREST), bytes=True)  # with alpha
    return colors[..., :3]


def _scaled(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _levels(values: np.ndarray) -> np.ndarray:
    levels: np.ndarray = np.rint(_scaled(values) * 255)
    return levels.astype(np.uint8)


def _enlarged(mask: np.ndarray, picture: np.ndarray, how: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    height, width, _ = picture.shape
    return np.asarray(Image.fromarray(mask).resize((width, height), how))


def beside(pictures: Sequence[np.ndarray], axis: int = 1) -> np.ndarray:
    """Return the pictures, of one size, side by side, or below one another (`axis` 0)."""
    shape = list(pictures[0].shape)
    shape[axis] = math.ceil(shape[axis] / 64)
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis)


def draw(panels: Sequence[tuple[str, np.ndarray]], columns: int, title: str) -> Figure:
    """Return a figure of the panels, each a caption and a picture, in so many columns."""
    columns = max(1, min(columns, len(panels)))
    rows = math.ceil(len(panels) / columns)
    high, wide = panels[0][1].shape[:2] if panels else (1, 1)
    size = PANEL * columns, (PANEL * high / wide + 0.2) * rows + 0.2 * len(title.splitlines())
    figure = Figure(size, dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for place, (caption, picture) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(picture)
        axes.set_title(textwrap.fill(caption, 36), fontsize=9)
        axes.axis("off")
    return figure


def save(picture: np.ndarray | Figure, path: Path) -> None:
    """Write a PNG, and the folders above it. Raises UserError where that cannot be."""

    def write(file: BinaryIO) -> None:
        if isinstance(picture, Figure):
            picture.savefig(file, format="png")
        else:
            Image.fromarray(picture).save(file, "PNG")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror}): see --results_dir") from error
    write_atomically(path, write)
