"""iNaturalist 2017 (Van Horn et al., arXiv 1707.06642), 5,089 species, as its archives unpack."""

from pathlib import Path

from common.data.dataset_folder import DatasetFolder, Rows, read_images
from common.data.images import Images


def inat2017(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "val"; see `lists` and `read_images`."""
    return read_images("inat2017", root, split, lists)


def lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """Images in the order of the file's `images`, ids = image ids, labels by the annotation with the image's id.

    Classes in the order of their category ids.
    """
    file = f"{split}2017.json"
    content = folder.json(file)
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    order = {category: label for label, category in enumerate(sorted(names))}
    category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
    images = content["images"]
    for image in images:
        if category_of.get(image["id"]) not in order:
            raise folder.wrong(file, f"has no annotation of a known category for the image {image['id']}")
    labels = [order[category_of[image["id"]]] for image in images]
    rows = Rows([str(image["id"]) for image in images], [image["file_name"] for image in images], labels)
    return rows, [names[category] for category in order]
