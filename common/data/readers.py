"""Data set name -> reader `(root, split) -> Images`, for the tools that treat all data sets alike."""

from collections.abc import Callable
from pathlib import Path

from common.data.aircraft import aircraft
from common.data.coco import coco
from common.data.food101 import food101
from common.data.images import Images

READERS: dict[str, Callable[[str | Path, str], Images]] = {
    "aircraft": aircraft,
    "coco": coco,
    "food101": food101,
}
