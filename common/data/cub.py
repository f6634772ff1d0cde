"""CUB-200-2011 (Wah et al., CNS-TR-2011-001), 200 birds, as its archive unpacks."""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree

IMAGES, LABELS, SPLITS, CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"


def cub(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "test".

    Images in the order of images.txt, ids = image ids; the other lists are joined by id, whatever their order.
    Classes in the order of their ids, named as in classes.txt ("001.Black_footed_Albatross").

    Raises:
        UserError: a list or image is missing, a list is damaged, or the lists name different images.
    """
    tree = Tree(DATA_SETS["cub"], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    path_of = _by_id(tree, IMAGES, "the list of images", "image-id path")
    tree.require_unique(IMAGES, path_of.values(), "the image")
    class_of = _by_id(tree, LABELS, "the list of labels", "image-id class-id")
    part_of = _by_id(tree, SPLITS, "the list of training and test images", "image-id 1 or 0")
    name_of = _by_id(tree, CLASSES, "the list of classes", "class-id name")
    _check_ids(tree, LABELS, path_of, class_of)
    _check_ids(tree, SPLITS, path_of, part_of)
    for image_id, part in part_of.items():
        if part not in ("0", "1"):
            raise tree.damaged(tree.path / SPLITS, f"gives the image {image_id} {part!r} where 1 or 0 is expected")
    for class_id in name_of:
        if not (class_id.isascii() and class_id.isdecimal() and len(class_id) < 10):
            raise tree.damaged(tree.path / CLASSES, f"has the class id {class_id[:40]!r}, which is not a whole number")
    label_of = {class_id: label for label, class_id in enumerate(sorted(name_of, key=int))}
    for image_id, class_id in class_of.items():
        if class_id not in label_of:
            listed = tree.pairs(LABELS, "the list of labels", "image-id class-id")
            line = next(line for line, id_, _ in listed if id_ == image_id)
            raise tree.damaged(
                tree.path / LABELS,
                f"gives in line {line} the image {image_id} the class {class_id[:40]!r}, which is not in classes.txt",
            )
    tree.names("images", "the folder of the images")
    ids = [image_id for image_id in path_of if part_of[image_id] == ("1" if split == "train" else "0")]
    if not ids:
        raise tree.damaged(tree.path / SPLITS, f"lists no {split} image")
    files = [path_of[image_id] for image_id in ids]
    tree.require_images(IMAGES, "images", files)
    return Images(
        "cub",
        split,
        ids,
        paths=[f"{tree.path / 'images'}/{file}" for file in files],
        labels=[label_of[class_of[image_id]] for image_id in ids],
        classes=[name_of[class_id] for class_id in label_of],
    )


def _by_id(tree: Tree, relative: str, what: str, form: str) -> dict[str, str]:
    """A list file of `id value` lines, refused when an id occurs twice."""
    pairs = tree.pairs(relative, what, form)
    tree.require_unique(relative, (id_ for _, id_, _ in pairs), "the id")
    return {id_: value for _, id_, value in pairs}


def _check_ids(tree: Tree, relative: str, path_of: dict[str, str], table: dict[str, str]) -> None:
    """Refuses a list that has not one line for each image of images.txt."""
    for these, others, problem in ((path_of, table, "lacks"), (table, path_of, "has, and images.txt has not,")):
        odd = [image_id for image_id in these if image_id not in others]
        if odd:
            raise tree.damaged(
                tree.path / relative, f"{problem} {len(odd):,} images, the first of them the id {odd[0]}"
            )
