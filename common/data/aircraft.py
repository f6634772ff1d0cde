"""FGVC-Aircraft (Maji et al., arXiv 1306.5151), 100 variants, in the layout torchvision downloads.

Two readers: `aircraft` has the official splits, `air` those of FFVT, whose "train" is the official trainval.
"""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree

VARIANTS = "data/variants.txt"
OFFICIAL, OWN = "data/images_variant_{}.txt", "data/{}.txt"


def aircraft(root: str | Path, split: str) -> Images:
    """Reads one split: "train", "val", "trainval" or "test".

    Classes in the order of variants.txt, images in the order of the official list, ids = official image ids.

    Raises:
        UserError: a list or image is missing, a list is damaged, or a variant has no image.
    """
    tree = _tree("aircraft", root, split)
    classes = _variants(tree)
    list_file = OFFICIAL.format(split)
    ids, files, labels = _official_list(tree, list_file, classes)
    return _images(tree, split, list_file, ids, files, labels, classes)


def air(root: str | Path, split: str) -> Images:
    """Reads one split: "train" (the official trainval) or "test".

    From FFVT's lists data/{train,test}.txt where one of these is there, since their labels may follow an order of
    their own; nobody ships them, and elsewhere the official lists give the same images. Classes, order and ids as in
    `aircraft`.

    Raises:
        UserError: a list or image is missing, a list is damaged, or a variant has no image in an official list.
    """
    tree = _tree("air", root, split)
    classes = _variants(tree)
    if any((tree.path / OWN.format(name)).exists() for name in ("train", "test")):
        list_file = OWN.format(split)
        files, labels = tree.labelled(list_file, "the list of images", len(classes))
        ids = [Path(file).stem for file in files]
        tree.require_unique(list_file, ids, "the image")
    else:
        list_file = OFFICIAL.format("trainval" if split == "train" else split)
        ids, files, labels = _official_list(tree, list_file, classes)
    return _images(tree, split, list_file, ids, files, labels, classes)


def _tree(name: str, root: str | Path, split: str) -> Tree:
    tree = Tree(DATA_SETS[name], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    return tree


def _variants(tree: Tree) -> list[str]:
    classes = tree.lines(VARIANTS, "the list of variants")
    tree.require_unique(VARIANTS, classes, "the variant")
    return classes


def _official_list(tree: Tree, list_file: str, classes: list[str]) -> tuple[list[str], list[str], list[int]]:
    """The ids, file names and labels of an official list."""
    ids, labels = [], []
    number_of = {variant: label for label, variant in enumerate(classes)}
    for line, image_id, variant in tree.pairs(list_file, "the list of images", "image-id variant"):
        if variant not in number_of:
            raise tree.damaged(
                tree.path / list_file,
                f"gives in line {line} the image {image_id} {variant!r}, which is not in variants.txt",
            )
        ids.append(image_id)
        labels.append(number_of[variant])
    tree.require_unique(list_file, ids, "the image")
    tree.require_every_class(list_file, classes, labels)
    return ids, [f"{image_id}.jpg" for image_id in ids], labels


def _images(
    tree: Tree, split: str, list_file: str, ids: list[str], files: list[str], labels: list[int], classes: list[str]
) -> Images:
    tree.require_images(list_file, "data/images", files)
    folder = f"{tree.path / 'data/images'}/"
    return Images(tree.published.name, split, ids, [folder + file for file in files], labels, classes)
