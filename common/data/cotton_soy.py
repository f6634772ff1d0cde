"""Cotton80 and SoyLocal (Yu et al., ICCV 2021): leaves of 80 cotton and 200 soybean cultivars, 3 + 3 images each."""

from pathlib import Path

from common.data.dataset_folder import DatasetFolder, Rows, read_images
from common.data.images import Images


def cotton(root: str | Path, split: str) -> Images:
    """Reads one split of Cotton80: "train" or "test"; see `lists` and `read_images`."""
    return read_images("cotton", root, split, lists)


def soyloc(root: str | Path, split: str) -> Images:
    """Reads one split of SoyLocal: "train" or "test"; see `lists` and `read_images`."""
    return read_images("soyloc", root, split, lists)


def lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """Images in the order of anno/{split}.txt, ids = file names.

    Cultivars have no names: the classes are "1", "2", ... to the largest label of both lists.
    """
    labelled = {part: folder.labelled(f"anno/{part}.txt") for part in ("train", "test")}
    files, labels = labelled[split]
    largest = max(max(labels) for _, labels in labelled.values())
    return Rows(files, [f"images/{file}" for file in files], labels), [str(number + 1) for number in range(largest + 1)]
