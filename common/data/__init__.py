"""Data sets: readers, checks, downloads and the demo data. Transforms are the scripts' own."""

from common.data.aircraft import aircraft
from common.data.coco import coco
from common.data.demo import write_demo
from common.data.food101 import food101
from common.data.images import BadImage, Data, Images, load_image, random_split
from common.data.prepare import prepare

__all__ = [
    "BadImage",
    "Data",
    "Images",
    "aircraft",
    "coco",
    "food101",
    "load_image",
    "prepare",
    "random_split",
    "write_demo",
]
