"""FGVC-Aircraft (Maji et al., arXiv 1306.5151), 100 variants, in the layout torchvision downloads."""

from pathlib import Path

from torchvision.datasets import FGVCAircraft

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree


def aircraft(root: str | Path, split: str) -> Images:
    """Reads one split: "train", "val", "trainval" or "test".

    Classes in the order of variants.txt, images in the order of the official list, ids = official image ids.

    Raises:
        UserError: a list or image is missing, a list is damaged, or a variant has no image.
    """
    tree = Tree(DATA_SETS["aircraft"], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    variants_file, list_file = "data/variants.txt", f"data/images_variant_{split}.txt"

    # All that torchvision's reader would answer with a KeyError, or not at all, is refused first.
    classes = tree.lines(variants_file, "the list of variants")
    tree.require_unique(variants_file, classes, "the variant")
    ids = []
    known = set(classes)
    for number, line in enumerate(tree.lines(list_file, f"the list of {split} images"), start=1):
        image_id, _, variant = line.partition(" ")
        if variant not in known:
            raise tree.damaged(
                tree.path / list_file,
                f"has in line {number} no image id and variant of variants.txt ({line!r})",
            )
        ids.append(image_id)
    tree.require_unique(list_file, ids, "the image")
    tree.require_images("data/images", [f"{image_id}.jpg" for image_id in ids])

    source = FGVCAircraft(tree.root, split=split, annotation_level="variant", download=False)
    tree.require_every_class(list_file, classes, source._labels)
    return Images("aircraft", split, ids, source._image_files, source._labels, source.classes)
