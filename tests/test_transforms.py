"""common.data.transforms: a test transform as JSON, and back."""

import json

import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from common.data.transforms import describe_transform, restore_transform


@pytest.mark.parametrize("size", [12, (12, 9), [10, 10]])
@pytest.mark.parametrize("how", [T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC])
def test_restored_from_json_it_gives_the_same_image(size: int | tuple[int, int], how: T.InterpolationMode) -> None:
    steps = [T.Resize(size, how), T.CenterCrop(8), T.ToTensor(), T.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))]
    described = describe_transform(T.Compose(steps))
    restored = restore_transform(json.loads(json.dumps(described)))
    picture = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    assert torch.equal(restored(picture), T.Compose(steps)(picture))
    assert describe_transform(restored) == described


def test_a_random_step_is_no_test_transform() -> None:
    with pytest.raises(TypeError, match="RandomCrop"):
        describe_transform(T.Compose([T.RandomCrop(8), T.ToTensor()]))
