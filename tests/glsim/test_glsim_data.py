"""GLSim's transforms against the released ones on the formula image, and its csv files, good and bad."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import check_figures, pil_image
from PIL import Image
from torchvision import transforms as T

from common.data import write_demo
from common.errors import UserError
from glsim.data_utils.datasets import read
from glsim.data_utils.transforms import mean_std, resize_size, transforms
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import read_config

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "transforms_glsim.json").read_text())
CONFIGS = Path(__file__).parents[2] / "glsim" / "configs"


def experiment(name: str, **changes: Any) -> Settings:
    return Settings(**(read_config(CONFIGS / f"{name}.yaml") | changes))


CASES = {
    "cub_224": experiment("cub_ft_is224_weakaugs"),
    "cub_448": experiment("cub_ft_is224_weakaugs", image_size=448),
    "cars_224": experiment("cars_ft_is224_weakaugs"),
    "cub_224_test_resize_directly": experiment("cub_ft_is224_weakaugs", test_resize_directly=True),
    "dafb_224_custom_mean_std": experiment("dafb_ft_is224_weakaugs"),
    "cub_224_custom_mean_std": experiment("cub_ft_is224_weakaugs", custom_mean_std=True),
    "cub_224_deit_recipe": experiment("cub_ft_is224_weakaugs", deit_recipe=True),
    "cub_medaugs": experiment("cub_ft_is224_medaugs"),
    "ncfm_224": experiment("ncfm_ft_is224_weakaugs"),
    "cifar10_32": Settings(dataset_name="cifar10", image_size=32),
}


def spelled(transform: T.Compose) -> list[str]:
    return [str(step) for step in transform.transforms]


def train_steps(**changes: Any) -> list[str]:
    return spelled(transforms(Settings(**changes))[0])


def test_every_recorded_case_is_compared() -> None:
    assert set(CASES) == set(GOLDEN) - {"source"}


@pytest.mark.parametrize("case", CASES)
def test_evaluation_gives_the_released_pixels(case: str) -> None:
    recorded = GOLDEN[case]
    pixels = transforms(CASES[case])[1](pil_image())
    for place, value in recorded["probe"].items():
        channel, row, column = map(int, place.split(","))
        assert pixels[channel, row, column].item() == pytest.approx(value, abs=2e-6)
    ours = check_figures(pixels)
    assert ours["shape"] == recorded["out"]["shape"]
    for name in ("sum", "abs_sum", "l2", "wsum"):
        assert ours[name] == pytest.approx(recorded["out"][name], rel=1e-6, abs=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_released_ones_in_their_order(case: str) -> None:
    train, test = transforms(CASES[case])
    assert spelled(test) == GOLDEN[case]["steps"]
    assert resize_size(CASES[case]) == GOLDEN[case]["resize_size"]
    if case != "cub_224_deit_recipe":  # fails as released
        assert spelled(train) == GOLDEN[case]["train_steps"]


def test_mean_and_deviation_of_the_data_sets() -> None:
    assert mean_std(Settings(dataset_name="moe", custom_mean_std=True)) == ((0.5,) * 3, (0.5,) * 3)
    assert mean_std(Settings(dataset_name="moe")) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_recipe_of_deit() -> None:
    """Touvron et al., arXiv 2012.12877, table 9: RandAugment 9/0.5, random erasing 0.25; no colour jitter."""
    train, _ = transforms(experiment("dafb_ft_is224_medaugs", deit_recipe=True))
    crop, flip, randaug, _, normalize, erasing = train.transforms
    assert "size=(224, 224), scale=(0.08, 1.0), ratio=(0.75, 1.3333), interpolation=bicubic" in str(crop)
    assert isinstance(flip, T.RandomHorizontalFlip)
    assert re.search(r"RandAugment\(n=2, ops=.*m=9, mstd=0.5", str(randaug), re.DOTALL)
    assert (normalize.mean.tolist(), normalize.std.tolist()) == ([0.5] * 3, [0.5] * 3)
    assert (erasing.probability, erasing.per_pixel, erasing.max_count) == (0.25, True, 1)
    assert train(pil_image()).shape == (3, 224, 224)


def test_ways_of_cutting() -> None:
    square = "Resize(size=(300, 300), interpolation=bicubic, max_size=None, antialias=True)"
    cuts = {name: train_steps(**{name: True})[:-2] for name in ("random_resized_crop", "square_center_crop")}
    assert "size=(224, 224), scale=(0.08, 1.0)" in cuts["random_resized_crop"][0]
    assert "bicubic" in cuts["random_resized_crop"][0]
    assert len(cuts["random_resized_crop"]) == 1
    assert cuts["square_center_crop"] == [square, "CenterCrop(size=(224, 224))"]
    directly = "Resize(size=(224, 224), interpolation=bicubic, max_size=None, antialias=True)"
    assert train_steps(square_resize_random_crop=False)[:-2] == [directly]
    train, test = transforms(Settings(short_side_resize_random_crop=True))
    short = square.replace("(300, 300)", "300")
    assert spelled(train)[:-2] == [short, "RandomCrop(size=(224, 224), padding=None)"]
    assert spelled(test)[:-2] == [short, "CenterCrop(size=(224, 224))"]


def test_sizes_given_win_over_the_rule() -> None:
    settings = Settings(dataset_name="cars", resize_size=250)
    train, test = transforms(settings)
    assert (train.transforms[0].size, test.transforms[0].size) == ((250, 250), (250, 250))
    train, test = transforms(Settings(resize_size=250, test_resize_size=240))
    assert (train.transforms[0].size, test.transforms[0].size) == ((250, 250), (240, 240))


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"affine": True}, "RandomAffine(degrees=[-15.0, 15.0]"),
        ({"vertical_flip": True}, "RandomVerticalFlip(p=0.5)"),
        ({"aa": True}, "AutoAugment(policy=AutoAugmentPolicy.IMAGENET"),
        ({"randaug": True}, "RandAugment(num_ops=2, magnitude=9"),
        (
            {"jitter_prob": 0.3, "jitter_bcs": 0.25, "jitter_hue": 0.125},
            (
                "RandomApply(p=0.3ColorJitter(brightness=(0.75, 1.25), contrast=(0.75, 1.25), saturation=(0.75, 1.25), "
                "hue=(-0.125, 0.125)))"
            ),
        ),
        ({"blur": 0.4}, "RandomApply(p=0.4GaussianBlur(kernel_size=(23, 23), sigma=(0.1, 2.0)))"),
        ({"greyscale": 0.2}, "RandomGrayscale(p=0.2)"),
        ({"solarize_prob": 0.2, "solarize": 100}, "RandomSolarize(threshold=100,p=0.2)"),
        ({"re": 0.25, "re_sh": 0.2, "re_r1": 0.5}, "RandomErasing(p=0.25, scale=(0.02, 0.2), ratio=(0.5, 3.3)"),
    ],
)
def test_each_augmentation_alone(changes: dict[str, Any], step: str) -> None:
    train, test = transforms(Settings(**changes))
    without = spelled(transforms(Settings())[0])
    (added,) = (word for word in spelled(train) if word not in without)
    assert re.sub(r"\s*\n\s*", "", added).startswith(step)
    assert len(train.transforms) == len(without) + 1
    assert spelled(test) == spelled(transforms(Settings())[1])
    assert train(pil_image()).shape == (3, 224, 224)


def test_training_images_vary_and_test_images_do_not() -> None:
    for train, test in (transforms(CASES["cub_medaugs"]), transforms(CASES["cub_224_deit_recipe"])):
        torch.manual_seed(0)
        assert not torch.equal(train(pil_image()), train(pil_image()))
        assert torch.equal(test(pil_image()), test(pil_image()))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"resize_size": 200}, "--resize_size 200: expected at least --image_size 224"),
        ({"resize_size": 0}, "--resize_size 0: expected at least --image_size 224"),
        ({"test_resize_size": 200}, "--test_resize_size 200: expected at least --image_size 224"),
        ({"re": 30.0}, "--re 30.0: expected a number from 0 to 1"),
        ({"jitter_hue": 0.6}, "--jitter_hue 0.6: expected a number from 0 to 0.5"),
        ({"re": 0.3, "re_sh": 2.0}, "--re_sh 2.0: expected a number from 0.02 to 1"),
        ({"re": 0.3, "re_sh": 0.01}, "--re_sh 0.01: expected a number from 0.02 to 1"),
        ({"re": 0.3, "re_r1": 9.0}, "--re_r1 9.0: expected a number from 0.01 to 3.3"),
        ({"re": 0.3, "re_r1": 0.0}, "--re_r1 0.0: expected a number from 0.01 to 3.3"),
        ({"solarize": 300}, "--solarize 300: expected a number from 0 to 255"),
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        transforms(Settings(**changes))


# The csv files

LISTS = {
    "train.csv": "class_id,dir\n1,b/3.png\n0,a/1.png\n",
    "val.csv": "class_id,dir\n2,4 c.png\n0,a/2.png\n",
    "train_val.csv": "class_id,dir\n1,b/3.png\n0,a/1.png\n0,a/2.png\n2,4 c.png\n",
    "test.csv": "class_id,dir\n2,6.png\n1,b/5.png\n",
}
NAMES = 'class_id,class_name\n2,"Finch, zebra"\n0,001.Crow\n1,Été\n'


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Six images of three classes, each of one grey."""
    for name, text in LISTS.items():
        (tmp_path / name).write_text(text)
    for number, image in enumerate(("a/1", "a/2", "b/3", "4 c", "b/5", "6"), start=1):
        file = tmp_path / "images" / f"{image}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (number, number, number)).save(file)
    return Settings(dataset_name="birds", dataset_root_path=str(tmp_path), image_size=16, test_resize_directly=True)


def test_the_published_split(settings: Settings) -> None:
    data = read(settings)
    assert data.train.ids == ["b/3.png", "a/1.png", "a/2.png", "4 c.png"]
    assert data.train.labels == [1, 0, 0, 2]
    assert (data.test.ids, data.test.labels) == (["6.png", "b/5.png"], [2, 1])
    assert (data.train.name, data.train.split, data.test.split) == ("birds", "train_val", "test")
    assert data.selection == "test-selected"
    assert data.classes == ["0", "1", "2"]


def test_train_and_val_apart(settings: Settings) -> None:
    settings.train_trainval = False
    data = read(settings)
    assert data.train.ids + data.val.ids == ["b/3.png", "a/1.png", "4 c.png", "a/2.png"]
    assert [data.train.split, data.val.split, data.test.split] == ["train", "val", "test"]
    assert data.selection == "validation-selected"
    assert spelled(data.val.transform) == spelled(data.test.transform) != spelled(data.train.transform)
    # val may have a class that train has none of: the published split rule leaves small classes to it.
    assert set(data.val.labels) - set(data.train.labels) == {2}


def test_names_of_classes(settings: Settings, tmp_path: Path) -> None:
    """By id, not by line; as Excel writes them, and with names of classes that have no images here."""
    text = "\ufeff" + (NAMES + "3,Owl\n").replace("\n", "\r\n")
    (tmp_path / "classid_classname.csv").write_bytes(text.encode())
    assert read(settings).classes == ["001.Crow", "Été", "Finch, zebra"]


def test_images_are_what_the_list_says(settings: Settings) -> None:
    """Each through the transform of its split; training crops are cut from a larger square."""
    data = read(settings)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in mean_std(settings))
    for images, greys in ((data.train, [3, 1, 2, 4]), (data.test, [6, 5])):
        for index, grey in enumerate(greys):
            pixels, _ = images[index]
            assert torch.allclose((pixels * std + mean) * 255, torch.full((3, 16, 16), float(grey)), atol=1e-3)
    assert [type(step).__name__ for step in data.train.transform.transforms[:2]] == ["Resize", "RandomCrop"]
    assert isinstance(data.test.transform.transforms[1], T.ToTensor)


def test_folders_and_lists_by_other_names(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "pictures")
    (tmp_path / "test.csv").rename(tmp_path / "exam.csv")
    (tmp_path / "others").symlink_to("pictures")
    settings.df_test, settings.train_trainval = "exam.csv", False
    settings.folder_train, settings.folder_val, settings.folder_test = "pictures", "others", "pictures"
    data = read(settings)
    assert data.train.path(0) == tmp_path / "pictures" / "b" / "3.png"
    assert data.val.path(0) == tmp_path / "others" / "4 c.png"
    assert data.test.path(1) == tmp_path / "pictures" / "b" / "5.png"


def test_columns_are_found_by_name(settings: Settings, tmp_path: Path) -> None:
    """As pandas reads them, which the released code did: any order, and others beside them."""
    (tmp_path / "test.csv").write_text("dir,width,class_id\n6.png,20,2\n\nb/5.png,20,1\n")
    data = read(settings)
    assert (data.test.ids, data.test.labels) == (["6.png", "b/5.png"], [2, 1])


def test_a_folder_is_listed_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    original: Callable[[str], list[str]] = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: (listed.append(str(folder)), original(folder))[1])
    read(settings)
    assert len(listed) == len(set(listed)) == 3


def test_cifar_has_files_of_its_own(tmp_path: Path) -> None:
    write_demo("cifar100", tmp_path)
    settings = Settings(dataset_name="cifar100", dataset_root_path=str(tmp_path), image_size=32)
    data = read(settings)
    assert [data.train.split, data.val.split, data.test.split] == ["train", "test", "test"]
    assert data.train[0][0].shape == data.test[0][0].shape == (3, 32, 32)
    settings.train_trainval = False
    with pytest.raises(UserError, match=r"--train_trainval: cifar100 is not split into train and val"):
        read(settings)


HEADER = "class_id,dir\n"


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("test.csv", None, r"test\.csv is not there: .*prepare_datasets\.sh.*, copy .* --dataset_root_path"),
        ("test.csv", "", r"test\.csv: expected the header class_id,dir in line 1, found ''"),
        ("test.csv", "0,6.png\n", r"test\.csv: expected the header class_id,dir in line 1, found '0,6\.png'"),
        ("test.csv", "class_id,file\n0,6.png\n", r"found 'class_id,file'"),
        ("test.csv", HEADER, r"test\.csv lists no image"),
        ("test.csv", HEADER + "1,b/5.png\n6.png\n", r"test\.csv, line 3: expected the 2 fields .* found 1"),
        ("test.csv", HEADER + "two,6.png\n", r"test\.csv, line 2: expected a class_id of 0 or more, found 'two'"),
        ("test.csv", HEADER + "-1,6.png\n", r"found '-1'"),
        ("test.csv", HEADER + "1.0,6.png\n", r"found '1\.0'"),
        ("test.csv", HEADER + "9999999999,6.png\n", r"found '9999999999'"),
        ("test.csv", HEADER + "3,6.png\n", r"test\.csv, line 2 has an image of class 3, .* none in .*train_val\.csv"),
        ("test.csv", HEADER + "1,6.png\n2,b/5.png\n1,6.png\n", r"test\.csv lists 6\.png in line 2 and in line 4"),
        ("test.csv", HEADER + "1,b/../6.png\n", r"test\.csv, line 2: expected an image below .* 'b/\.\./6\.png'"),
        ("test.csv", HEADER + "1,/etc/passwd\n", r"line 2: expected an image below .* '/etc/passwd'"),
        ("test.csv", HEADER + "1,b\0/5.png\n", r"line 2: expected an image below .*x00|cannot be read as csv"),
        ("test.csv", HEADER + "1,\n", r"line 2: expected an image below .* ''"),
        (
            "test.csv",
            HEADER + "1,b/no.png\n",
            r"images lacks b/no\.png of the 1 images of .*test\.csv; .*--folder_test",
        ),
        ("train_val.csv", HEADER + "0,a/x.png\n2,q/y.png\n1,z.png\n2,6.png\n", r"lacks a/x\.png and 2 more of the 4"),
        (
            "train_val.csv",
            HEADER + "0,a/1.png\n1,b/3.png\n3,4 c.png\n2,a/2.png\n5,6.png\n",
            r"class 5 and none of class 4",
        ),
        ("train_val.csv", HEADER + "1,a/1.png\n2,b/3.png\n", r"class 1 and none of class 0 in .*train_val\.csv"),
        ("train_val.csv", HEADER + '0,"a/1.png\n', r"train_val\.csv cannot be read as csv"),
        ("train_val.csv", "class_id,dir\n0,é.png\n".encode("latin1"), r"train_val\.csv cannot be read as csv"),
        ("classid_classname.csv", "class_id,dir\n", r"classname\.csv: expected the header class_id,class_name"),
        ("classid_classname.csv", NAMES + "1,Jay\n", r"classname\.csv, line 5: class 1 has a name already"),
        (
            "classid_classname.csv",
            "class_id,class_name\n0,Crow\n2,Finch\n",
            r"classname\.csv has no name of class 1, and there are images of it in .*train_val\.csv",
        ),
    ],
)
def test_bad_files_are_one_sentence(
    settings: Settings, tmp_path: Path, file: str, text: str | bytes | None, sentence: str
) -> None:
    (tmp_path / file).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence) as caught:
        read(settings)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_one_sentence(settings: Settings) -> None:
    settings.folder_test = "pictures"
    with pytest.raises(UserError, match=r"pictures is no folder: expected the images of .*test\.csv; .*--folder_test"):
        read(settings)
