"""FGVC-Aircraft (Maji et al., arXiv 1306.5151), 100 variants, in the layout torchvision downloads.

Two readers: `aircraft` has the official splits, `air` those of FFVT, whose "train" is the official trainval.
"""

from pathlib import Path

from common.data.dataset_folder import DatasetFolder, Rows, read_images
from common.data.images import Images


def aircraft(root: str | Path, split: str) -> Images:
    """Reads one split: "train", "val", "trainval" or "test"; see `lists` and `read_images`."""
    return read_images("aircraft", root, split, lists)


def air(root: str | Path, split: str) -> Images:
    """Reads one split: "train" (the official trainval) or "test"; see `air_lists` and `read_images`."""
    return read_images("air", root, split, air_lists)


def lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """Images in the order of the official list, ids = official image ids; classes in the order of variants.txt."""
    file = f"data/images_variant_{split}.txt"
    classes, variant_of = folder.lines("data/variants.txt"), folder.by_id(file)
    odd = set(variant_of.values()) ^ set(classes)
    if odd:
        raise folder.wrong(file, f"and variants.txt do not name the same variants ({min(odd)})")
    labels = [classes.index(variant) for variant in variant_of.values()]
    return Rows([*variant_of], [f"data/images/{image}.jpg" for image in variant_of], labels), classes


def air_lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """From FFVT's lists data/{train,test}.txt where one of these is there, else the official ones.

    Nobody ships FFVT's lists; their labels may follow an order of their own. Elsewhere the official lists give the
    same images. Classes, order and ids as in `lists`.
    """
    if not any((folder.path / f"data/{name}.txt").exists() for name in ("train", "test")):
        return lists(folder, "trainval" if split == "train" else split)
    files, labels = folder.labelled(f"data/{split}.txt")
    rows = Rows([Path(file).stem for file in files], [f"data/images/{file}" for file in files], labels)
    return rows, folder.lines("data/variants.txt")
