"""Stanford Cars (Krause et al., 3dRR workshop at ICCV 2013), 196 models, as its archives unpacked."""

from pathlib import Path

from common.data.dataset_folder import DatasetFolder, Rows, read_images
from common.data.images import Images

# Every place is tried; the one that a missing file is reported at comes last.
LISTS = {
    "train": ("cars_train_annos.mat", "devkit/cars_train_annos.mat"),
    "test": ("devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat"),
}


def car(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "test"; see `lists` and `read_images`."""
    return read_images("car", root, split, lists)


def lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """Images in the order of the list; classes in the order of class_names.

    Ids = folder and file name ("cars_train/00001.jpg"), because both splits count from 1. Kaggle's copies, nested as
    cars_train/cars_train/, are read as well.
    """
    (classes,) = folder.mat("devkit/cars_meta.mat", "class_names")
    file = folder.first(*LISTS[split])
    (entries,) = folder.mat(file, "annotations")
    if not all("class" in entry for entry in entries):
        raise folder.wrong(file, "has no labels")
    names = [entry["fname"] for entry in entries]
    folder.require_unique(file, names)
    labels = [folder.label(file, entry["fname"], entry["class"]) for entry in entries]
    images = folder.first(f"cars_{split}/cars_{split}", f"cars_{split}")
    return Rows([f"cars_{split}/{name}" for name in names], [f"{images}/{name}" for name in names], labels), classes
