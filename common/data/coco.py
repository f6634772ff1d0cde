"""COCO 2017 (Lin et al., arXiv 1405.0312) as single-label classification, from the annotation file alone.

An image's label is the category of the first annotation that the file lists for it. Categories are numbered in the
order of their ids, which have gaps (80 categories, ids 1 to 90). Images without an annotation are dropped.
"""

import contextlib
import json
from pathlib import Path

from common.data.dataset_folder import DatasetFolder, Rows, read_images
from common.data.images import Images
from common.errors import UserError
from common.files import write_text


def coco(root: str | Path, split: str) -> Images:
    """Reads one split: "train2017" or "val2017"; see `lists` and `read_images`."""
    return read_images("coco", root, split, lists)


def lists(folder: DatasetFolder, split: str) -> tuple[Rows, list[str]]:
    """Images in the order of the annotation file's `images`, ids = image ids.

    What was read is kept beside the annotation file in instances_{split}.index.json, because parsing 450 MB takes many
    seconds and some GB. The index is used while the annotation file keeps its size and modification time.
    """
    file = f"annotations/instances_{split}.json"
    path = folder.path / file
    if not path.is_file():
        raise folder.wrong(file, "is not there")
    kept, key = path.with_suffix(".index.json"), [2, path.stat().st_size, path.stat().st_mtime_ns]  # 2: its format
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        index = json.loads(kept.read_text(encoding="utf-8"))
        if index["key"] == key:
            return Rows(*index["rows"]), index["classes"]
    rows, classes = _parse(folder, file, split)
    with contextlib.suppress(OSError, UserError):  # a read-only folder costs time at the next start, nothing else
        write_text(kept, json.dumps({"key": key, "rows": rows, "classes": classes}))
    return rows, classes


def _parse(folder: DatasetFolder, file: str, split: str) -> tuple[Rows, list[str]]:
    content = folder.json(file)
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    order = {category: label for label, category in enumerate(sorted(names))}
    label_of: dict[int, int] = {}
    for box in content["annotations"]:
        if box["category_id"] not in order:
            raise folder.wrong(file, f"has annotation {box['id']} of the unknown category {box['category_id']}")
        label_of.setdefault(box["image_id"], order[box["category_id"]])
    images = [image for image in content["images"] if image["id"] in label_of]
    ids, files = [str(image["id"]) for image in images], [f"{split}/{image['file_name']}" for image in images]
    return Rows(ids, files, [label_of[image["id"]] for image in images]), [names[category] for category in order]
