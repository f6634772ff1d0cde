"""Data sets: readers, checks, downloads and the demo data. Transforms are the scripts' own."""

from common.data.aircraft import air, aircraft
from common.data.cars import car
from common.data.cifar import cifar10, cifar100
from common.data.coco import coco
from common.data.cotton_soy import cotton, soyloc
from common.data.cub import cub
from common.data.demo import write_demo
from common.data.dogs import dog
from common.data.download import prepare
from common.data.facts import facts
from common.data.food101 import food101
from common.data.images import BadImage, Data, Images, load_image, random_split
from common.data.inat2017 import inat2017

__all__ = [
    "BadImage",
    "Data",
    "Images",
    "air",
    "aircraft",
    "car",
    "cifar10",
    "cifar100",
    "coco",
    "cotton",
    "cub",
    "dog",
    "facts",
    "food101",
    "inat2017",
    "load_image",
    "prepare",
    "random_split",
    "soyloc",
    "write_demo",
]
