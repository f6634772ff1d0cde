"""iNaturalist 2017 (Van Horn et al., arXiv 1707.06642), 5,089 species, as its archives unpack."""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree


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
    content = tree.json(list_file, "the annotation file")
    images = tree.table(list_file, content, "images", {"id": int, "file_name": str})
    annotations = tree.table(list_file, content, "annotations", {"image_id": int, "category_id": int}, key="image_id")
    categories = tree.table(list_file, content, "categories", {"id": int, "name": str})
    del content
    tree.require_unique(list_file, (image["file_name"] for image in images), "the image")

    categories.sort(key=lambda category: category["id"])
    number = {category["id"]: label for label, category in enumerate(categories)}
    category_of = {annotation["image_id"]: annotation["category_id"] for annotation in annotations}
    unknown = category_of.keys() - {image["id"] for image in images}
    if unknown:
        raise tree.damaged(path, f"has an annotation with the unknown image_id {min(unknown)}")
    for image in images:
        category = category_of.get(image["id"])
        if category not in number:
            state = "no annotation" if category is None else f"the unknown category_id {category}"
            raise tree.damaged(path, f"has {state} for the image {image['id']}")

    files = [image["file_name"] for image in images]
    tree.names("train_val_images", "the folder of the images")
    tree.require_images(list_file, ".", files)
    return Images(
        "inat2017",
        split,
        ids=[str(image["id"]) for image in images],
        paths=[f"{tree.path}/{file}" for file in files],
        labels=[number[category_of[image["id"]]] for image in images],
        classes=[category["name"] for category in categories],
    )
