"""Food-101 (Bossard et al., ECCV 2014), 101 dishes, in the layout torchvision downloads."""

from pathlib import Path

from common.data.dataset_folder import DatasetFolder, Rows, read_images
from common.data.images import Images


def food101(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "test"; see `lists` and `read_images`."""
    return read_images("food101", root, split, lists)


def lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """Images in the order of meta/{split}.json, ids as there ("class/image-id"); classes in alphabetical order."""
    listed = folder.json(f"meta/{split}.json")
    classes = sorted(listed)
    ids = [image for images in listed.values() for image in images]
    labels = [classes.index(name) for name, images in listed.items() for _ in images]
    return Rows(ids, [f"images/{image}.jpg" for image in ids], labels), classes
