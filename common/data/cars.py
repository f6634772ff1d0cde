"""Stanford Cars (Krause et al., 3dRR workshop at ICCV 2013), 196 models, as its archives unpacked."""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree

META = "devkit/cars_meta.mat"

# Every place is tried; the first that a missing file would be reported at comes last.
LISTS = {
    "train": ("cars_train_annos.mat", "devkit/cars_train_annos.mat"),
    "test": ("devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat"),
}


def car(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "test".

    Images in the order of the list, ids = folder and file name ("cars_train/00001.jpg": both splits count from 1),
    classes in the order of class_names. Kaggle's copies, nested as cars_train/cars_train/, are read as well.

    Raises:
        UserError: a list or image is missing, or a list is damaged or has no labels.
    """
    tree = Tree(DATA_SETS["car"], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    (classes,) = tree.mat(META, "the list of classes", "class_names")
    if not all(isinstance(name, str) for name in classes):
        raise tree.damaged(tree.path / META, "has a class_names that is no list of names")
    tree.require_unique(META, classes, "the class")

    list_file = tree.first(*LISTS[split])
    (annotations,) = tree.mat(list_file, f"the list of {split} images", "annotations")
    files, labels = [], []
    for position, entry in enumerate(annotations):
        # By name, not by place: cars_test_annos.mat has a box where this list has the class.
        file = entry.get("fname") if isinstance(entry, dict) else None
        if not isinstance(file, str) or "class" not in entry:
            raise tree.damaged(tree.path / list_file, f"has no fname and class in entry {position} of annotations")
        files.append(file)
        labels.append(tree.label(list_file, f"entry {position}", file, entry["class"], len(classes)))
    tree.require_unique(list_file, files, "the image")

    folder = tree.first(f"cars_{split}/cars_{split}", f"cars_{split}")
    tree.require_images(list_file, folder, files)
    return Images(
        "car",
        split,
        ids=[f"cars_{split}/{file}" for file in files],
        paths=[f"{tree.path / folder}/{file}" for file in files],
        labels=labels,
        classes=classes,
    )
