"""Stanford Dogs (Khosla et al., FGVC workshop at CVPR 2011), 120 breeds, as its archives unpack."""

from pathlib import Path

from common.data.dataset_folder import DatasetFolder, Rows, read_images
from common.data.images import Images


def dog(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "test"; see `lists` and `read_images`."""
    return read_images("dog", root, split, lists)


def lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """Images in the order of the list, ids = its annotation_list ("n02085620-Chihuahua/n02085620_5927").

    Classes are named by their folders, up to the largest label of both lists; one without images by its label alone.
    """
    rows: dict[str, Rows] = {}
    names: dict[int, str] = {}
    for part in ("train", "test"):
        file = f"{part}_list.mat"
        ids, numbers = folder.mat(file, "annotation_list", "labels")
        labels = [folder.label(file, *pair) for pair in zip(ids, numbers, strict=True)]
        for image, label in zip(ids, labels, strict=True):
            breed = image.partition("/")[0]
            if names.setdefault(label, breed) != breed:
                raise folder.wrong(file, f"gives {image} the label {label + 1}, which is that of {names[label]}")
        folder.require_unique(file, ids)
        rows[part] = Rows(ids, [f"Images/{image}.jpg" for image in ids], labels)
    return rows[split], [names.get(label, str(label + 1)) for label in range(max(names) + 1)]
