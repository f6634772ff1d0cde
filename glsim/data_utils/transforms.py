"""The published transforms: an RGB PIL image becomes a normalised tensor (3, S, S), S = image_size.

The options are those of `glsim.train_utils.settings.Settings`, by name.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.data import create_transform as timm_transform
from torchvision import transforms as T

from common.errors import UserError
from glsim.train_utils.settings import Settings

BICUBIC, BILINEAR = T.InterpolationMode.BICUBIC, T.InterpolationMode.BILINEAR
CIFAR = ("cifar10", "cifar100")
# Data sets whose images are resized to 8/7 of the crop, not to 1.34 times it.
TIGHT = ("cars", "ncfm", *CIFAR)
# custom_mean_std: 0.5 of these; of every other data set what was recorded on CUB, although it is not CUB's own.
HALF = ("dafb", "moe")
CUSTOM_MEAN, CUSTOM_STD = (0.3659524, 0.42010019, 0.41562049), (0.07625843, 0.04599726, 0.06182727)
# Options, and the least and the largest value that they can have.
LIMITS: dict[str, tuple[float, float]] = dict.fromkeys(
    ("jitter_prob", "blur", "greyscale", "solarize_prob", "re"), (0, 1)
)
LIMITS |= {"jitter_hue": (0, 0.5), "solarize": (0, 255), "re_sh": (0.02, 1), "re_r1": (0.01, 3.3)}

Colour = tuple[float, float, float]


def transforms(settings: Settings) -> tuple[T.Compose, T.Compose]:
    """The transforms of training and of test.

    With `deit_recipe` training takes DeiT's own (arXiv 2012.12877, table 9) and none of the other augmentations: as
    released the option fails. Raises UserError for a crop larger than what it is cut from, and for a value outside of
    its range.
    """
    for name, (least, most) in LIMITS.items():
        if not least <= getattr(settings, name) <= most:
            raise UserError(f"--{name} {getattr(settings, name)}: expected a number from {least} to {most}")
    mean, std = mean_std(settings)
    tensor = [T.ToTensor(), T.Normalize(mean, std)]
    test = T.Compose([*_test_cut(settings), *tensor])
    if settings.deit_recipe:
        train = timm_transform(
            settings.image_size,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            mean=mean,
            std=std,
            re_prob=0.25,
            re_mode="pixel",
        )
        return train, test
    erasing = T.RandomErasing(settings.re, scale=(0.02, settings.re_sh), ratio=(settings.re_r1, 3.3))
    erased = [erasing] if settings.re else []
    return T.Compose([*_train_cut(settings), *_augmentations(settings), *tensor, *erased]), test


def mean_std(settings: Settings) -> tuple[Colour, Colour]:
    """The mean and the standard deviation of each colour that images are normalised by."""
    if not settings.custom_mean_std:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if settings.dataset_name in HALF:
        return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
    return CUSTOM_MEAN, CUSTOM_STD


def resize_size(settings: Settings) -> int:
    """The pixels that an image is resized to before it is cut."""
    if settings.resize_size is not None:
        return settings.resize_size
    tight = settings.dataset_name in TIGHT
    return int(settings.image_size / 0.875) if tight else int(1.34 * settings.image_size)


def _train_cut(settings: Settings) -> list[Any]:
    """The first of the ways of cutting that is on; of none, the whole image."""
    size = (settings.image_size, settings.image_size)
    if settings.random_resized_crop:
        return [T.RandomResizedCrop(size, interpolation=BICUBIC)]
    if settings.short_side_resize_random_crop:
        return [_resize(settings, resize_size(settings), "resize_size"), T.RandomCrop(size)]
    if settings.square_center_crop:
        return [_resize(settings, resize_size(settings), "resize_size"), T.CenterCrop(size)]
    if settings.square_resize_random_crop:
        return [_resize(settings, resize_size(settings), "resize_size"), T.RandomCrop(size)]
    return [T.Resize(size, BICUBIC)]


def _test_cut(settings: Settings) -> list[Any]:
    size = (settings.image_size, settings.image_size)
    if settings.test_resize_directly:
        return [T.Resize(size, BICUBIC)]
    if settings.dataset_name in CIFAR:
        return [T.Resize(settings.image_size)]
    if settings.deit_recipe:
        return [T.Resize(int(settings.image_size / 0.875), BICUBIC), T.CenterCrop(size)]
    if settings.test_resize_size is None:
        return [_resize(settings, resize_size(settings), "resize_size"), T.CenterCrop(size)]
    return [_resize(settings, settings.test_resize_size, "test_resize_size"), T.CenterCrop(size)]


def _resize(settings: Settings, pixels: int, option: str) -> T.Resize:
    """To a square of `pixels`, or the short side to them; UserError, naming `option`, where no crop fits in."""
    if pixels < settings.image_size:
        raise UserError(
            f"--{option} {pixels}: expected at least --image_size {settings.image_size}, which is cut out of it"
        )
    return T.Resize(pixels if settings.short_side_resize_random_crop else (pixels, pixels), BICUBIC)


def _augmentations(settings: Settings) -> list[Any]:
    """What is on of the augmentations, in the order of the published options.

    Nothing is recorded of how far `affine` and `blur` go: the blur is SimCLR's (arXiv 2002.05709, appendix A), a tenth
    of the image wide.
    """
    bcs = settings.jitter_bcs
    blur_width = settings.image_size // 20 * 2 + 1
    choices = [
        (settings.affine, T.RandomAffine(15, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=BILINEAR)),
        (settings.horizontal_flip, T.RandomHorizontalFlip()),
        (settings.vertical_flip, T.RandomVerticalFlip()),
        (settings.aa, T.AutoAugment()),
        (settings.randaug, T.RandAugment()),
        (settings.trivial_aug, T.TrivialAugmentWide()),
        (
            settings.jitter_prob,
            T.RandomApply([T.ColorJitter(bcs, bcs, bcs, settings.jitter_hue)], settings.jitter_prob),
        ),
        (settings.blur, T.RandomApply([T.GaussianBlur(blur_width)], settings.blur)),
        (settings.greyscale, T.RandomGrayscale(settings.greyscale)),
        (settings.solarize_prob, T.RandomSolarize(settings.solarize, settings.solarize_prob)),
    ]
    return [transform for on, transform in choices if on]
