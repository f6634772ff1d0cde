"""Food-101 (Bossard et al., ECCV 2014), 101 dishes, in the layout torchvision downloads."""

from pathlib import Path

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Tree


def food101(root: str | Path, split: str) -> Images:
    """Reads one split: "train" or "test".

    Classes in alphabetical order, images in the order of meta/{split}.json, ids = "class/image-id" as there.

    Raises:
        UserError: a list, a class folder or an image is missing, or a list is damaged.
    """
    tree = Tree(DATA_SETS["food101"], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    list_file = f"meta/{split}.json"
    listed = tree.json(list_file, f"the list of {split} images")
    _check_list(tree, list_file, listed)
    tree.names("images", "the folder of the images")
    classes = sorted(listed)
    number_of = {name: label for label, name in enumerate(classes)}
    ids = [id_ for ids in listed.values() for id_ in ids]
    labels = [number_of[name] for name, ids in listed.items() for _ in ids]
    tree.require_images(list_file, "images", [f"{id_}.jpg" for id_ in ids])
    return Images("food101", split, ids, [f"{tree.path / 'images'}/{id_}.jpg" for id_ in ids], labels, classes)


def _check_list(tree: Tree, list_file: str, listed: object) -> None:
    """Refuses a meta file that is not {class: [class/id, ...]} with an image for every class."""
    path = tree.path / list_file
    if not isinstance(listed, dict) or not listed:
        raise tree.damaged(path, "is not an object of class names and lists of images")
    for name, ids in listed.items():
        if not isinstance(ids, list) or not ids:
            raise tree.damaged(path, f"lists no image of the class {name!r}")
        for id_ in ids:
            if not isinstance(id_, str) or not id_.startswith(f"{name}/"):
                raise tree.damaged(path, f"lists {id_!r} under the class {name!r}, where {name + '/...'!r} belongs")
    tree.require_unique(list_file, (id_ for ids in listed.values() for id_ in ids), "the image")
    # A class that was lost from the json leaves no other trace; classes.txt comes in the same archive.
    if (tree.path / "meta/classes.txt").exists():
        classes = set(tree.lines("meta/classes.txt", "the list of classes"))
        differing = sorted(classes ^ set(listed))
        if differing:
            raise tree.damaged(path, f"and classes.txt beside it do not name the same classes ({differing[0]!r})")
