"""COCO 2017 (Lin et al., arXiv 1405.0312) as single-label classification, from the annotation file alone.

An image's label is the category of the first annotation that the file lists for it. Categories are numbered in
the order of their ids, which have gaps (80 categories, ids 1 to 90). Images without an
annotation are dropped.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from common.data.images import Images
from common.data.published import DATA_SETS
from common.data.tree import Fields, Tree
from common.errors import UserError
from common.files import open_plain, write_text

# Raised whenever the content of the index changes its meaning: older ones are then built anew.
INDEX_FORMAT = 1
ANNOTATIONS = "annotations/instances_{}.json"
# What is read of it: polygons, which are most of the file, are not kept.
FIELDS: Fields = {
    "images": {"id": int, "file_name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}
LISTS = {"ids": int, "files": str, "labels": int, "classes": str, "unlabelled": str}  # in an index


def coco(root: str | Path, split: str) -> Images:
    """Reads one split: "train2017" or "val2017".

    Images in the order of the annotation file's `images`, ids = image ids. No image is decoded. What was
    read is kept beside the annotation file in `instances_{split}.index.json`, because parsing 450 MB of JSON
    takes many seconds; the index is used while the annotation file keeps its size and modification time.

    Raises:
        UserError: the annotation file or a listed image is missing, or the file is damaged or contradictory.
    """
    tree = Tree(DATA_SETS["coco"], root)
    tree.published.require_split(split)
    tree.names(".", "the folder of the data set")
    index = _index(tree, split)
    tree.require_images(ANNOTATIONS.format(split), split, index["files"] + index["unlabelled"])
    folder = f"{tree.path / split}/"
    return Images(
        "coco",
        split,
        ids=[str(image_id) for image_id in index["ids"]],
        paths=[folder + file for file in index["files"]],
        labels=index["labels"],
        classes=index["classes"],
    )


def _index(tree: Tree, split: str) -> dict[str, Any]:
    """The index of a split: from its file when that is current, else built and, where possible, written."""
    annotations = ANNOTATIONS.format(split)
    path = tree.path / annotations
    try:
        stat = path.stat()
    except OSError:
        raise tree.missing("the annotation file", path) from None
    key = {"format": INDEX_FORMAT, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    index_path = path.with_name(f"instances_{split}.index.json")
    index = _read_index(index_path, key)
    if index is None:
        index = {"key": key, **_build_index(tree, annotations)}
        # A read-only folder or a full disk costs time at the next start, nothing else.
        with contextlib.suppress(OSError, UserError):
            write_text(index_path, json.dumps(index))
    return index


def _read_index(path: Path, key: dict[str, int]) -> dict[str, Any] | None:
    """The index file's content; None where it is absent, stale or damaged and has to be built anew."""
    try:
        with open_plain(path) as file:
            index = json.loads(file.read())
        json.dumps(index, ensure_ascii=False).encode()  # a ValueError for half a character
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(index, dict) or index.get("key") != key:
        return None
    for name, kind in LISTS.items():
        values = index.get(name)
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            return None
    ids, labels = index["ids"], index["labels"]
    right = 0 < len(set(ids)) == len(ids) == len(index["files"]) == len(labels)
    return index if right and min(labels) >= 0 and max(labels) < len(index["classes"]) else None


def _build_index(tree: Tree, annotations: str) -> dict[str, Any]:
    """Reads the annotation file: ids, file names and labels of the labelled images; names of the others."""
    path = tree.path / annotations
    tables = tree.tables(annotations, "the annotation file", FIELDS)
    categories = sorted(tables["categories"])
    classes = [name for _, name in categories]
    tree.require_unique(annotations, classes, "the category name")
    number = {category: label for label, (category, _) in enumerate(categories)}
    known = {image for image, _ in tables["images"]}
    label_of: dict[int, int] = {}
    for box, image, category in tables["annotations"]:
        for field, value, values in (("image_id", image, known), ("category_id", category, number)):
            if value not in values:
                raise tree.damaged(path, f"has annotation {box} with the unknown {field} {value}")
        label_of.setdefault(image, number[category])
    if not label_of:
        raise tree.damaged(path, "has no annotation of any image")
    labelled = [(image, file) for image, file in tables["images"] if image in label_of]
    return {
        "ids": [image for image, _ in labelled],
        "files": [file for _, file in labelled],
        "labels": [label_of[image] for image, _ in labelled],
        "classes": classes,
        "unlabelled": [file for image, file in tables["images"] if image not in label_of],
    }
