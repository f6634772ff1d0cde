"""CUB-200-2011 (Wah et al., CNS-TR-2011-001), 200 birds, as its archive unpacks."""

from pathlib import Path

from common.data.dataset_folder import DatasetFolder, Rows, read_images
from common.data.images import Images


def cub(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "test"; see `lists` and `read_images`."""
    return read_images("cub", root, split, lists)


def lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """Images in the order of images.txt, ids = image ids; the other lists are joined by id, whatever their order.

    Classes in the order of their ids, named as in classes.txt ("001.Black_footed_Albatross").
    """
    path_of, class_of, part_of, name_of = (
        folder.by_id(f"{name}.txt") for name in ("images", "image_class_labels", "train_test_split", "classes")
    )
    for name, values, allowed in (
        ("image_class_labels.txt", class_of, set(name_of)),
        ("train_test_split.txt", part_of, {"0", "1"}),
    ):
        odd = path_of.keys() ^ values.keys()
        if odd:
            raise folder.wrong(name, f"and images.txt do not list the same images (id {min(odd)})")
        for image, value in values.items():
            if value not in allowed:
                raise folder.wrong(name, f"gives the image {image} {value!r}, which is none of {len(allowed)} values")
    order = sorted(name_of, key=int)
    ids = [image for image in path_of if part_of[image] == ("1" if split == "train" else "0")]
    labels = [order.index(class_of[image]) for image in ids]
    return Rows(ids, [f"images/{path_of[image]}" for image in ids], labels), [name_of[number] for number in order]
