"""GLSim's transforms, option by option, and its csv files, good and bad. The released figures: tests/parity."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import pil_image
from PIL import Image
from torchvision import transforms as T

from common.data import write_demo
from common.errors import UserError
from glsim.data_utils.datasets import read
from glsim.data_utils.transforms import mean_std, transforms
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import read_config

CONFIGS = Path(__file__).parents[2] / "glsim" / "configs"


def experiment(name: str, **changes: Any) -> Settings:
    return Settings(**(read_config(CONFIGS / f"{name}.yaml") | changes))


def spelled(transform: T.Compose) -> list[str]:
    return [str(step) for step in transform.transforms]


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


def resize(size: object) -> str:
    return f"Resize(size={size}, interpolation=bicubic, max_size=None, antialias=True)"


RANDOM, CENTER = "RandomCrop(size=(224, 224), padding=None)", "CenterCrop(size=(224, 224))"


@pytest.mark.parametrize(
    ("changes", "train", "test"),
    [
        ({"square_center_crop": True}, [resize((300, 300)), CENTER], None),
        ({"square_resize_random_crop": False}, [resize((224, 224))], None),
        ({"short_side_resize_random_crop": True}, [resize(300), RANDOM], [resize(300), CENTER]),
        # Sizes given win over the rule.
        ({"resize_size": 250, "test_resize_size": 240}, [resize((250, 250)), RANDOM], [resize((240, 240)), CENTER]),
        ({"dataset_name": "cars", "resize_size": 250}, [resize((250, 250)), RANDOM], [resize((250, 250)), CENTER]),
    ],
)
def test_ways_of_cutting(changes: dict[str, Any], train: list[str], test: list[str] | None) -> None:
    ours = transforms(Settings(**changes))
    assert spelled(ours[0])[: len(train)] == train
    assert len(spelled(ours[0])) == len(train) + 2
    assert test is None or spelled(ours[1])[:-2] == test


def test_a_random_resized_crop() -> None:
    (crop, *_) = spelled(transforms(Settings(random_resized_crop=True))[0])
    assert "size=(224, 224), scale=(0.08, 1.0)" in crop
    assert "bicubic" in crop


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
    medium, deit = experiment("cub_ft_is224_medaugs"), experiment("cub_ft_is224_weakaugs", deit_recipe=True)
    for train, test in (transforms(medium), transforms(deit)):
        torch.manual_seed(0)
        assert not torch.equal(train(pil_image()), train(pil_image()))
        assert torch.equal(test(pil_image()), test(pil_image()))


@pytest.mark.parametrize(
    "changes",
    [
        *({"resize_size": size} for size in (200, 0)),
        {"test_resize_size": 200},
        {"re": 30.0},
        {"jitter_hue": 0.6},
        *(
            {name: value, "re": 0.3}
            for name, value in (("re_sh", 2.0), ("re_sh", 0.01), ("re_r1", 9.0), ("re_r1", 0.0))
        ),
        {"solarize": 300},
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any]) -> None:
    name, value = next(iter(changes.items()))
    with pytest.raises(UserError, match=f"--{name} {value}: expected"):
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
    assert (data.selection, data.classes) == ("test-selected", ["0", "1", "2"])
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
NOT_BELOW = r"test\.csv, line 2: expected an image below"
BAD: list[tuple[str, str | bytes | None, str]] = [
    ("test.csv", None, r"test\.csv is not there: .*prepare_datasets\.sh.* --dataset_root_path"),
    ("test.csv", "", r"test\.csv: expected the header class_id,dir in line 1"),
    ("test.csv", "0,6.png\n", r"header class_id,dir in line 1, found '0,6\.png'"),
    ("test.csv", "class_id,file\n0,6.png\n", r"found 'class_id,file'"),
    ("test.csv", HEADER, r"test\.csv lists no image"),
    ("test.csv", HEADER + "1,b/5.png\n6.png\n", r"test\.csv, line 3: expected the 2 fields"),
    *(("test.csv", f"{HEADER}{word},6.png\n", f"line 2: .*'{word}'") for word in ("two", "-1", "1.0", "9999999999")),
    ("test.csv", HEADER + "3,6.png\n", r"test\.csv, line 2 has an image of class 3, .*train_val\.csv"),
    ("test.csv", HEADER + "1,6.png\n2,b/5.png\n1,6.png\n", r"test\.csv lists 6\.png in line 2 and in line 4"),
    *(("test.csv", f"{HEADER}1,{word}\n", NOT_BELOW) for word in ("b/../6.png", "/etc/passwd", "")),
    ("test.csv", HEADER + "1,b\0/5.png\n", rf"{NOT_BELOW}|cannot be read as csv"),
    ("test.csv", HEADER + "1,b/no.png\n", r"images lacks b/no\.png of .*test\.csv; .*--folder_test"),
    ("train_val.csv", HEADER + "0,a/x.png\n2,q/y.png\n1,z.png\n2,6.png\n", r"lacks a/x\.png and 2 more of the 4"),
    ("train_val.csv", HEADER + "1,a/1.png\n2,b/3.png\n", r"none of class 0 in .*train_val\.csv"),
    ("train_val.csv", HEADER + '0,"a/1.png\n', r"train_val\.csv cannot be read as csv"),
    ("train_val.csv", "class_id,dir\n0,é.png\n".encode("latin1"), r"train_val\.csv cannot be read as csv"),
    ("classid_classname.csv", "class_id,dir\n", r"classname\.csv: expected the header class_id,class_name"),
    ("classid_classname.csv", NAMES + "1,Jay\n", r"classname\.csv, line 5: class 1"),
    ("classid_classname.csv", "class_id,class_name\n0,Crow\n2,Finch\n", r"classname\.csv has no name of class 1"),
]


@pytest.mark.parametrize(("file", "text", "sentence"), BAD)
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
