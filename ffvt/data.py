"""The data sets of FFVT with the published transforms. Data lie in `{data_root}/{dataset}`.

Training: Resize to a square, RandomCrop, ColorJitter (CUB, dog, air) before or AutoAugment (car, INat2017) behind the
flip; test: Resize, CenterCrop. ImageNet mean and standard deviation. CIFAR: RandomResizedCrop, 0.5 everywhere.
"""

from typing import Any

from torchvision import transforms as T

from common import data as readers
from common.data import Data
from common.errors import UserError

# --dataset -> reader, training split, test split.
DATASETS: dict[str, tuple[Any, str, str]] = {
    "cifar10": (readers.cifar10, "train", "test"),
    "cifar100": (readers.cifar100, "train", "test"),
    "soyloc": (readers.soyloc, "train", "test"),
    "cotton": (readers.cotton, "train", "test"),
    "CUB": (readers.cub, "train", "test"),
    "dog": (readers.dog, "train", "test"),
    "car": (readers.car, "train", "test"),
    "air": (readers.air, "train", "test"),
    "INat2017": (readers.inat2017, "train", "val"),
}
JITTERED = {"CUB", "dog", "air"}
AUTO_AUGMENTED = {"car", "INat2017"}
# Crop and resize, in pixels, that the released code uses for these whatever the command line says.
RELEASED_SIZES = {"dog": (448, 600), "car": (448, 600), "INat2017": (304, 400)}


def read(dataset: str, data_root: str, img_size: int, resize_size: int, released: bool = False) -> Data:
    """The training and test images of `dataset`; the test images choose the best checkpoint too, as published.

    Sizes are in pixels. `released`: the sizes of RELEASED_SIZES instead of `resize_size`, where `img_size` is the crop
    there; at any other the released code fails. Raises UserError where data are missing or damaged, and where the crop
    is larger than the image.
    """
    reader, train_split, test_split = DATASETS[dataset]
    if released and RELEASED_SIZES.get(dataset, (0, 0))[0] == img_size:
        resize_size = RELEASED_SIZES[dataset][1]
    train_transform, test_transform = transforms(dataset, img_size, resize_size)
    train = reader(data_root, train_split).with_transform(train_transform)
    test = reader(data_root, test_split).with_transform(test_transform)
    return Data(train, test, test)


def transforms(dataset: str, img_size: int, resize_size: int) -> tuple[T.Compose, T.Compose]:
    """The transforms of training and of test."""
    if dataset.startswith("cifar"):
        tensor = [T.ToTensor(), T.Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))]
        crop = T.RandomResizedCrop((img_size, img_size), scale=(0.05, 1.0))
        return T.Compose([crop, *tensor]), T.Compose([T.Resize((img_size, img_size)), *tensor])
    if resize_size < img_size:
        raise UserError(f"--resize_size {resize_size}: expected at least --img_size {img_size}, which is cut out of it")
    resize = T.Resize((resize_size, resize_size))  # bilinear; the aspect ratio is not kept
    jitter = [T.ColorJitter(0.4, 0.4, 0.4)] if dataset in JITTERED else []
    policy = [T.AutoAugment(T.AutoAugmentPolicy.IMAGENET)] if dataset in AUTO_AUGMENTED else []
    tensor = [T.ToTensor(), T.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]
    crop = T.RandomCrop((img_size, img_size))
    train = T.Compose([resize, crop, *jitter, T.RandomHorizontalFlip(), *policy, *tensor])
    return train, T.Compose([resize, T.CenterCrop((img_size, img_size)), *tensor])
