"""JPEG files as costly to decode as those of photographs, made without any."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

FOOD = (500, 375)  # pixels of most of Food-101's photographs, say
DIFFERENT = 64  # of the files that one call writes


def photograph(size: tuple[int, int], number: int) -> Image.Image:
    """Waves of many lengths, the longer the stronger, and grain: a JPEG of quality 90 takes about 2.5 bits a pixel."""
    width, height = size
    draw = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / width
    colours = draw.normal(scale=0.05, size=(height, width, 1)).repeat(3, axis=2)
    for octave in range(1, 8):
        for channel in range(3):
            across, down, phase = draw.normal(size=3)
            wave = np.sin(2 * np.pi * (2**octave * (across * x + down * y) + phase))
            colours[..., channel] += wave / 2 ** (0.9 * octave)
    low, high = colours.min(), colours.max()
    return Image.fromarray(((colours - low) / (high - low) * 255).astype(np.uint8))


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """`count` files in a folder, which is made; beyond DIFFERENT they are copies."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if number < DIFFERENT:
            photograph(size, number).save(path, quality=90)
        else:
            shutil.copyfile(paths[number % DIFFERENT], path)
    return paths
