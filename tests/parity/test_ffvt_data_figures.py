"""The transforms of FFVT's data sets against the released ones on the image by formula."""

import re

import pytest
from figures import assert_close_at, assert_close_to_figures, golden
from formula import pil_image
from torchvision import transforms as T

from ffvt.data import transforms

GOLDEN = golden("ffvt_transforms")
CASES = pytest.mark.parametrize("case", [name for name in GOLDEN if name != "source"])


def of(case: str) -> tuple[T.Compose, T.Compose]:
    dataset, img_size, resize_size = case.split()
    return transforms(dataset, int(img_size), int(resize_size))


def spelled(transform: T.Compose) -> list[str]:
    """The steps as the released program's were recorded; torchvision's policy is not spelled as the released one."""
    words = [re.sub(r"^AutoAugment\(.*", "AutoAugment ImageNet Policy", str(step)) for step in transform.transforms]
    return [re.sub(r"\((0\.\d+), (0\.\d+), (0\.\d+)\)", r"[\1, \2, \3]", word) for word in words]


@CASES
def test_evaluation_pixels(case: str) -> None:
    pixels = of(case)[1](pil_image())
    assert_close_to_figures(pixels, GOLDEN[case]["out"])
    assert_close_at(pixels, GOLDEN[case]["probe"], 1e-6)


@CASES
def test_steps_and_their_order(case: str) -> None:
    train, test = of(case)
    assert spelled(test) == GOLDEN[case]["steps"]
    if "train_steps" in GOLDEN[case]:
        assert spelled(train) == GOLDEN[case]["train_steps"]
