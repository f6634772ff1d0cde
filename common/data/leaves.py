"""Cotton80 and SoyLocal (Yu et al., ICCV 2021): leaves of 80 cotton and 200 soybean cultivars, 3 + 3 images each."""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree


def cotton(root: str | Path, split: str) -> Images:
    """Reads one split of Cotton80: "train" or "test"; see `_leaves`."""
    return _leaves("cotton", root, split)


def soyloc(root: str | Path, split: str) -> Images:
    """Reads one split of SoyLocal: "train" or "test"; see `_leaves`."""
    return _leaves("soyloc", root, split)


def _leaves(name: str, root: str | Path, split: str) -> Images:
    """Reads one split of either data set.

    Images in the order of anno/{split}.txt, ids = file names. Cultivars have no names: the classes are "1", "2", ...
    to the largest label of both lists.

    Raises:
        UserError: a list or a listed image is missing, or a list is damaged.
    """
    tree = Tree(DATA_SETS[name], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    lists = {
        part: tree.labelled(f"anno/{part}.txt", f"the list of {part} images", tree.published.classes)
        for part in ("train", "test")
    }
    classes = [str(number + 1) for number in range(1 + max(max(labels) for _, labels in lists.values()))]
    files, labels = lists[split]
    tree.require_images(f"anno/{split}.txt", "images", files)
    folder = f"{tree.path / 'images'}/"
    return Images(name, split, files, [folder + file for file in files], labels, classes)
