"""The shipped configurations: all that the published commands name, each readable and saying what it is named after."""

from pathlib import Path
from typing import Any

import pytest

from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import read_config

CONFIGS = Path(__file__).parents[2] / "glsim" / "configs"
# The data sets of the released configurations, those with medium augmentation alone apart.
BOTH = "aircraft cars cotton cub dafb dogs flowers food inat17 moe nabirds ncfm pets soy vegfru".split()  # noqa: SIM905
MEDIUM_ONLY = ["imagenet", "sketch"]
DATASETS = [*BOTH, *MEDIUM_ONLY]
EXPERIMENTS = [f"{name}_ft_is224_weakaugs" for name in BOTH] + [f"{name}_ft_is224_medaugs" for name in DATASETS]
WEAK = {"horizontal_flip": True}
MEDIUM = WEAK | {"ls": True, "smoothing": 0.1, "sd": 0.1, "re": 0.3, "trivial_aug": True}
STRONG = WEAK | {"ls": True, "smoothing": 0.1, "sd": 0.1, "re": 0.3, "random_resized_crop": True}
STRONG |= {"cm": True, "mu": True, "randaug": True}
AUGMENTATIONS = {"weak": WEAK, "med": MEDIUM, "strong": STRONG}


def read(name: str) -> dict[str, Any]:
    return read_config(CONFIGS / f"{name}.yaml")


def test_the_published_files_are_there_and_no_other() -> None:
    expected = {
        *EXPERIMENTS,
        *(f"datasets/{dataset}" for dataset in DATASETS),
        *(f"augs/{augs}augs" for augs in AUGMENTATIONS),
        *("settings/ft_is224", "settings/ft_is448", "methods/glsim", "methods/cal", "methods/gft"),
    }
    assert {str(file.relative_to(CONFIGS).with_suffix("")) for file in CONFIGS.rglob("*.*")} == expected


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_its_data_set_at_224_pixels_with_its_augmentation(experiment: str) -> None:
    dataset, _, _, augs = experiment.split("_")
    values = read(experiment)
    data = {name: values.pop(name) for name in read(f"datasets/{dataset}")}
    assert values == {"pretrained": True, "image_size": 224} | AUGMENTATIONS[augs.removesuffix("augs")]
    assert data["dataset_name"] == dataset
    assert data.get("custom_mean_std", False) == (dataset in ("dafb", "moe"))
    Settings(**data, **values)


def test_every_data_set_says_where_it_is() -> None:
    said = {dataset: read(f"datasets/{dataset}") for dataset in DATASETS}
    options = {"dataset_name", "dataset_root_path", "folder_train", "folder_val", "folder_test"}
    assert all(set(values) - {"custom_mean_std"} == options for values in said.values())
    roots = [values["dataset_root_path"] for values in said.values()]
    assert len(set(roots)) == len(roots)
    # Of the data sets that torchvision or its archive unpacks: the root and the images below it.
    unpacked = {
        "aircraft": "data/fgvc-aircraft-2013b/data/images",
        "cub": "data/CUB_200_2011/images",
        "flowers": "data/flowers-102/jpg",
        "food": "data/food-101/images",
        "nabirds": "data/nabirds/images",
        "pets": "data/oxford-iiit-pet/images",
    }
    for dataset, folder in unpacked.items():
        values = said[dataset]
        folders = {values[f"folder_{split}"] for split in ("train", "val", "test")}
        assert {f"{values['dataset_root_path']}/{below}" for below in folders} == {folder}


def test_methods() -> None:
    flags = dict.fromkeys(("dynamic_anchor", "anchor_class_token", "aggregator", "aggregator_norm"), True)
    assert read("methods/glsim") == {"classifier": "cls", "reducer": "cls", **flags}
    assert all(read(f"methods/{name}") == {"model_name": name} for name in ("cal", "gft"))
