"""What the authors of each data set published about it: one table for readers, checks and error messages.

A later data set adds one entry to `DATA_SETS`; nothing else needs to know its counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import UserError


@dataclass(frozen=True)
class Published:
    """One data set as published.

    Attributes:
        name: what the command line calls it.
        title: what its authors call it.
        folder: its folder below the data root.
        tree: the files the reader needs, for people.
        classes: number of classes.
        counts: split -> number of images.
        source: where it comes from, as the object of "get it from".
        per_class: split -> (smallest, largest) number of images a class has, where that is published.
        downloads: whether `common.data.prepare` can fetch it.
    """

    name: str
    title: str
    folder: str
    tree: str
    classes: int
    counts: Mapping[str, int]
    source: str
    per_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    downloads: bool = True

    def require_split(self, split: str) -> None:
        """Raises UserError when the data set has no such split."""
        if split not in self.counts:
            raise UserError(f"{self.title} has the splits {', '.join(self.counts)}, not {split!r}.")


DATA_SETS: dict[str, Published] = {
    published.name: published
    for published in (
        # Maji et al., arXiv 1306.5151; 100 images a variant, the lists of 2013b.
        Published(
            name="aircraft",
            title="FGVC-Aircraft",
            folder="fgvc-aircraft-2013b",
            tree="""\
fgvc-aircraft-2013b/data/variants.txt            the classes in order, one a line
fgvc-aircraft-2013b/data/images_variant_{train,val,trainval,test}.txt    `image-id variant` a line
fgvc-aircraft-2013b/data/images/<image-id>.jpg   10,000 images""",
            classes=100,
            counts={"train": 3334, "val": 3333, "trainval": 6667, "test": 3333},
            per_class={"trainval": (66, 67), "test": (33, 34)},
            source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        ),
        # Bossard et al., ECCV 2014.
        Published(
            name="food101",
            title="Food-101",
            folder="food-101",
            tree="""\
food-101/meta/{train,test}.json            {class: [class/image-id, ...]}
food-101/meta/classes.txt                  one class a line (compared with the json where present)
food-101/images/<class>/<image-id>.jpg     101,000 images""",
            classes=101,
            counts={"train": 75750, "test": 25250},
            per_class={"train": (750, 750), "test": (250, 250)},
            source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        ),
        # Lin et al., arXiv 1405.0312. Images with at least one annotation, of 118,287 and 5,000.
        Published(
            name="coco",
            title="COCO 2017",
            folder="coco",
            tree="""\
coco/annotations/instances_{train,val}2017.json
coco/train2017/<image>.jpg                 118,287 images, 117,266 with an annotation
coco/val2017/<image>.jpg                   5,000 images, 4,952 with an annotation""",
            classes=80,
            counts={"train2017": 117266, "val2017": 4952},
            source=(
                "http://images.cocodataset.org/zips/train2017.zip, .../zips/val2017.zip and "
                ".../annotations/annotations_trainval2017.zip"
            ),
        ),
    )
}


def published(name: str) -> Published:
    """The entry of one data set; UserError for a name that is not in the table."""
    if name not in DATA_SETS:
        raise UserError(f"There is no data set {name!r}; choose one of {', '.join(sorted(DATA_SETS))}.")
    return DATA_SETS[name]
