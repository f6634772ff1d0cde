"""Data set name -> reader `(root, split) -> Images`, for the tools that treat all data sets alike."""

from collections.abc import Callable
from pathlib import Path

from common.data.aircraft import air, aircraft
from common.data.cars import car
from common.data.cifar import cifar10, cifar100
from common.data.coco import coco
from common.data.cub import cub
from common.data.dogs import dog
from common.data.food101 import food101
from common.data.images import Images
from common.data.inat import inat2017
from common.data.leaves import cotton, soyloc

READERS: dict[str, Callable[[str | Path, str], Images]] = {
    "air": air,
    "aircraft": aircraft,
    "car": car,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "coco": coco,
    "cotton": cotton,
    "cub": cub,
    "dog": dog,
    "food101": food101,
    "inat2017": inat2017,
    "soyloc": soyloc,
}
