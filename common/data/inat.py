"""iNaturalist 2017 (Van Horn et al., arXiv 1707.06642), 5,089 species, as its archives unpack."""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Fields, Tree

# What is read of an annotation file; an image has one annotation.
FIELDS: Fields = {
    "images": {"id": int, "file_name": str},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}


def inat2017(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "val".

    Images in the order of the file's `images`, ids = image ids, labels by the annotation with the image's id,
    classes in the order of their ids.

    Raises:
        UserError: the annotation file or a listed image is missing, or the file is damaged or contradictory.
    """
    tree = Tree(DATA_SETS["inat2017"], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    list_file = f"{split}2017.json"
    path = tree.path / list_file
    tables = tree.tables(list_file, "the annotation file", FIELDS)
    images = tables["images"]
    tree.require_unique(list_file, (file for _, file in images), "the image")
    categories = sorted(tables["categories"])
    number = {category: label for label, (category, _) in enumerate(categories)}
    category_of = dict(tables["annotations"])
    unknown = category_of.keys() - {image for image, _ in images}
    if unknown:
        raise tree.damaged(path, f"has an annotation with the unknown image_id {min(unknown)}")
    for image, _ in images:
        category = category_of.get(image)
        if category not in number:
            state = "no annotation" if category is None else f"the unknown category_id {category}"
            raise tree.damaged(path, f"has {state} for the image {image}")

    files = [file for _, file in images]
    tree.names("train_val_images", "the folder of the images")
    tree.require_images(list_file, ".", files)
    return Images(
        "inat2017",
        split,
        ids=[str(image) for image, _ in images],
        paths=[f"{tree.path}/{file}" for file in files],
        labels=[number[category_of[image]] for image, _ in images],
        classes=[name for _, name in categories],
    )
