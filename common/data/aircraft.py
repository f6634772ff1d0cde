"""FGVC-Aircraft (Maji et al., arXiv 1306.5151), 100 variants, in the layout torchvision downloads.

Two readers: `aircraft` has the official splits, `air` those of FFVT, whose "train" is the official trainval.
"""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree

VARIANTS = "data/variants.txt"


def aircraft(root: str | Path, split: str) -> Images:
    """Reads one split: "train", "val", "trainval" or "test".

    Classes in the order of variants.txt, images in the order of the official list, ids = official image ids.

    Raises:
        UserError: a list or image is missing, a list is damaged, or a variant has no image.
    """
    tree = _tree("aircraft", root, split)
    classes = _variants(tree)
    ids, files, labels = _official_list(tree, split, classes)
    return _images(tree, split, ids, files, labels, classes)


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
    own_lists = [f"data/{name}.txt" for name in ("train", "test")]
    if any((tree.path / path).exists() for path in own_lists):
        files, labels = tree.labelled(f"data/{split}.txt", f"the list of {split} images", len(classes))
        ids = [Path(file).stem for file in files]
    else:
        ids, files, labels = _official_list(tree, "trainval" if split == "train" else split, classes)
    return _images(tree, split, ids, files, labels, classes)


def _tree(name: str, root: str | Path, split: str) -> Tree:
    tree = Tree(DATA_SETS[name], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    return tree


def _variants(tree: Tree) -> list[str]:
    classes = tree.lines(VARIANTS, "the list of variants")
    tree.require_unique(VARIANTS, classes, "the variant")
    return classes


def _official_list(tree: Tree, split: str, classes: list[str]) -> tuple[list[str], list[str], list[int]]:
    """The ids, file names and labels of an official list."""
    list_file = f"data/images_variant_{split}.txt"
    ids, labels = [], []
    number_of = {variant: label for label, variant in enumerate(classes)}
    for number, line in enumerate(tree.lines(list_file, f"the list of {split} images"), start=1):
        image_id, _, variant = line.partition(" ")
        if variant not in number_of:
            raise tree.damaged(
                tree.path / list_file,
                f"has in line {number} no image id and variant of variants.txt ({line!r})",
            )
        ids.append(image_id)
        labels.append(number_of[variant])
    tree.require_unique(list_file, ids, "the image")
    tree.require_every_class(list_file, classes, labels)
    return ids, [f"{image_id}.jpg" for image_id in ids], labels


def _images(tree: Tree, split: str, ids: list[str], files: list[str], labels: list[int], classes: list[str]) -> Images:
    tree.require_images("data/images", files)
    folder = f"{tree.path / 'data/images'}/"
    return Images(tree.published.name, split, ids, [folder + file for file in files], labels, classes)
