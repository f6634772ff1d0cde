"""The transforms and readers of FFVT's data sets beyond what is recorded of them."""

from pathlib import Path

import pytest
import torch
from data.ffvt_trees import WRITERS
from formula import pil_image
from torchvision import transforms as T

from common.data import air
from common.errors import UserError
from ffvt import data as ffvt_data
from ffvt.data import DATASETS, read, transforms


def test_cifar_is_trained_on_random_crops() -> None:
    train, _ = transforms("cifar100", 224, 0)
    crop = train.transforms[0]
    assert isinstance(crop, T.RandomResizedCrop)
    assert (crop.size, crop.scale, crop.interpolation) == ((224, 224), (0.05, 1.0), T.InterpolationMode.BILINEAR)
    assert [type(step) for step in train.transforms[1:]] == [T.ToTensor, T.Normalize]


def test_training_images_vary() -> None:
    train, _ = transforms("CUB", 224, 300)
    torch.manual_seed(0)
    assert not torch.equal(train(pil_image()), train(pil_image()))


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"--resize_size 300: expected at least --img_size 448"):
        transforms("CUB", 448, 300)


@pytest.mark.parametrize("dataset", [dataset for dataset in DATASETS if not dataset.startswith("cifar")])
def test_sizes_that_the_released_code_fixes(dataset: str, tmp_path: Path) -> None:
    """dog, car and INat2017: whatever --resize_size says, at the one crop where the released code runs."""
    WRITERS[dataset.lower()](tmp_path)
    fixed = ffvt_data.RELEASED_SIZES.get(dataset)
    for img_size in (304, 448):
        for released in (False, True):
            data = read(dataset, str(tmp_path), img_size, 500, released)
            assert isinstance(data.test.transform, T.Compose)
            sizes = [step.size for step in data.test.transform.transforms if isinstance(step, T.Resize)]
            expected = fixed[1] if released and fixed and fixed[0] == img_size else 500
            assert sizes == [(expected, expected)]
            assert data.selection == "test-selected"


def test_the_lists_of_air_number_both_splits(tmp_path: Path) -> None:
    """FFVT's own lists may number the classes otherwise than the official ones: training and test agree."""
    WRITERS["air"](tmp_path)
    own = {}
    for split in ("train", "test"):
        images = air(tmp_path, split)
        own[split] = [99 - label for label in images.labels]
        lines = [f"{id_}.jpg {label + 1}" for id_, label in zip(images.ids, own[split], strict=True)]
        (tmp_path / f"air/data/{split}.txt").write_text("\n".join(lines))
    again = read("air", str(tmp_path), 16, 16)
    assert {"train": again.train.labels, "test": again.test.labels} == own
