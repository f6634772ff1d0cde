"""Stanford Dogs (Khosla et al., FGVC workshop at CVPR 2011), 120 breeds, as its archives unpack."""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree

LISTS = {"train": "train_list.mat", "test": "test_list.mat"}


def dog(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "test".

    Images in the order of the list, ids = the entries of its annotation_list ("n02085620-Chihuahua/n02085620_5927").
    Classes are named by their folders, up to the largest label of both lists; one without images is named by its
    label alone.

    Raises:
        UserError: a list or image is missing, a list is damaged, or a label stands for two folders.
    """
    tree = Tree(DATA_SETS["dog"], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    lists = {part: _read_list(tree, part) for part in LISTS}
    folders: dict[int, str] = {}
    for part, (ids, labels) in lists.items():
        for image_id, label in zip(ids, labels, strict=True):
            folder = image_id.partition("/")[0]
            if folders.setdefault(label, folder) != folder:
                raise tree.damaged(
                    tree.path / LISTS[part],
                    f"gives the image {image_id} the label {label + 1}, which is that of {folders[label]}",
                )
    classes = [folders.get(label, str(label + 1)) for label in range(max(folders) + 1)]
    ids, labels = lists[split]
    tree.names("Images", "the folder of the images")
    tree.require_images(LISTS[split], "Images", [f"{image_id}.jpg" for image_id in ids])
    return Images("dog", split, ids, [f"{tree.path / 'Images'}/{image_id}.jpg" for image_id in ids], labels, classes)


def _read_list(tree: Tree, part: str) -> tuple[list[str], list[int]]:
    """The ids and 0-based labels of a list."""
    file = LISTS[part]
    ids, labels = tree.mat(file, f"the list of {part} images", "annotation_list", "labels")
    if len(ids) != len(labels):
        raise tree.damaged(tree.path / file, f"has {len(ids):,} entries in annotation_list and {len(labels):,} labels")
    for image_id in ids:
        if not isinstance(image_id, str) or "/" not in image_id:
            raise tree.damaged(tree.path / file, f"has in annotation_list {image_id!r}, which is no class/image")
    tree.require_unique(file, ids, "the image")
    classes = tree.published.classes
    return ids, [
        tree.label(file, f"entry {position}", *pair, classes)
        for position, pair in enumerate(zip(ids, labels, strict=True))
    ]
