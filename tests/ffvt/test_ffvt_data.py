"""The transforms of FFVT's data sets against the released ones on the formula image."""

import json
import re
from pathlib import Path

import pytest
import torch
from formula import check_figures, pil_image
from torchvision import transforms as T

from common.errors import UserError
from ffvt import data as ffvt_data
from ffvt.data import DATASETS, read, transforms

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ffvt_transforms.json").read_text())
CASES = [name for name in GOLDEN if name != "source"]


def of(case: str) -> tuple[T.Compose, T.Compose]:
    dataset, img_size, resize_size = case.split()
    return transforms(dataset, int(img_size), int(resize_size))


def spelled(transform: T.Compose) -> list[str]:
    """The steps as the released program's were recorded; torchvision's policy is not spelled as the released one."""
    words = [re.sub(r"^AutoAugment\(.*", "AutoAugment ImageNet Policy", str(step)) for step in transform.transforms]
    return [re.sub(r"\((0\.\d+), (0\.\d+), (0\.\d+)\)", r"[\1, \2, \3]", word) for word in words]


@pytest.mark.parametrize("case", CASES)
def test_evaluation_gives_the_released_pixels(case: str) -> None:
    recorded = GOLDEN[case]
    pixels = of(case)[1](pil_image())
    for place, value in recorded["probe"].items():
        channel, row, column = map(int, place.split(","))
        assert pixels[channel, row, column].item() == pytest.approx(value, abs=1e-6)
    ours = check_figures(pixels)
    assert ours["shape"] == recorded["out"]["shape"]
    for name in ("sum", "abs_sum", "l2", "wsum"):
        assert ours[name] == pytest.approx(recorded["out"][name], rel=1e-6, abs=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_released_ones_in_their_order(case: str) -> None:
    train, test = of(case)
    assert spelled(test) == GOLDEN[case]["steps"]
    if "train_steps" in GOLDEN[case]:
        assert spelled(train) == GOLDEN[case]["train_steps"]


def test_cifar_is_trained_on_random_crops() -> None:
    train, _ = transforms("cifar100", 224, 0)
    crop = train.transforms[0]
    assert isinstance(crop, T.RandomResizedCrop)
    assert (crop.size, crop.scale, crop.interpolation) == ((224, 224), (0.05, 1.0), T.InterpolationMode.BILINEAR)
    assert [type(step) for step in train.transforms[1:]] == [T.ToTensor, T.Normalize]


def test_training_images_vary() -> None:
    train, _ = of("CUB 224 300")
    torch.manual_seed(0)
    assert not torch.equal(train(pil_image()), train(pil_image()))


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"--resize_size 300: expected at least --img_size 448"):
        transforms("CUB", 448, 300)


@pytest.mark.parametrize("dataset", DATASETS)
def test_sizes_that_the_released_code_fixes(dataset: str, monkeypatch: pytest.MonkeyPatch, demo_output: Path) -> None:
    """dog, car and INat2017: whatever --resize_size says, at the one crop where the released code runs."""
    from common.data import write_demo

    write_demo(dataset.lower(), demo_output / "demo-data")
    fixed = ffvt_data.RELEASED_SIZES.get(dataset)
    for img_size in (304, 448):
        for released in (False, True):
            data = read(dataset, str(demo_output / "demo-data"), img_size, 500, released)
            sizes = [step.size for step in data.test.transform.transforms if isinstance(step, T.Resize)]
            expected = fixed[1] if released and fixed and fixed[0] == img_size else 500
            assert sizes == [(img_size, img_size) if dataset.startswith("cifar") else (expected, expected)]
            assert data.selection == "test-selected"


def test_the_lists_of_air_number_both_splits(tmp_path: Path) -> None:
    """FFVT's own lists may number the classes otherwise than the official ones: training and test agree."""
    from common.data import air, write_demo

    write_demo("air", tmp_path)
    data = tmp_path / "air" / "data"
    for split in ("train", "test"):
        images = air(tmp_path, split)
        lines = [f"{id_}.jpg {10 - label}" for id_, label in zip(images.ids, images.labels, strict=True)]
        (data / f"{split}.own").write_text("\n".join(lines))
    for split in ("train", "test"):
        (data / f"{split}.own").rename(data / f"{split}.txt")
    (data / "images_variant_trainval.txt").unlink()
    read_again = read("air", str(tmp_path), 16, 16)
    for images in (read_again.train, read_again.test):
        own = dict(line.split() for line in (data / f"{images.split}.txt").read_text().splitlines())
        assert images.labels == [int(own[f"{id_}.jpg"]) - 1 for id_ in images.ids]
