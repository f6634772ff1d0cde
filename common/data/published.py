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
        also: the folder's name as the original archive unpacks it: looked for inside of `folder` and, where
            there is no `folder`, beside it.
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
    also: tuple[str, ...] = ()

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
        # Wah et al., CNS-TR-2011-001; images a class counted in the lists of the archive.
        Published(
            name="cub",
            title="CUB-200-2011",
            folder="CUB",
            tree="""\
CUB/images.txt                             `image-id path` a line
CUB/image_class_labels.txt                 `image-id class-id` a line
CUB/train_test_split.txt                   `image-id 1` a line for training, `image-id 0` for testing
CUB/classes.txt                            `class-id name` a line
CUB/images/<class>/<image>.jpg             11,788 images
(or CUB_200_2011/ as the archive unpacks, in CUB/ or beside it)""",
            classes=200,
            counts={"train": 5994, "test": 5794},
            per_class={"train": (29, 30), "test": (11, 30)},
            source="https://data.caltech.edu/records/65de6-vp158",
            downloads=False,
            also=("CUB_200_2011",),
        ),
        # Khosla et al., FGVC workshop at CVPR 2011.
        Published(
            name="dog",
            title="Stanford Dogs",
            folder="dog",
            tree="""\
dog/{train,test}_list.mat                  annotation_list (paths without .jpg), labels (1 to 120)
dog/Images/<class>/<image>.jpg             20,580 images""",
            classes=120,
            counts={"train": 12000, "test": 8580},
            per_class={"train": (100, 100)},
            source="http://vision.stanford.edu/aditya86/ImageNetDogs (images.tar and lists.tar)",
            downloads=False,
        ),
        # Krause et al., 3dRR workshop at ICCV 2013.
        Published(
            name="car",
            title="Stanford Cars",
            folder="car",
            tree="""\
car/devkit/cars_meta.mat                   class_names, in the order of their labels
car/devkit/cars_train_annos.mat            annotations (fields fname; class, 1 to 196)
car/cars_test_annos_withlabels.mat         the same, also found in car/devkit/
car/cars_{train,test}/<image>.jpg          16,185 images, also found in cars_train/cars_train/""",
            classes=196,
            counts={"train": 8144, "test": 8041},
            source="a copy of the original files (their host, ai.stanford.edu/~jkrause/cars, is gone)",
            downloads=False,
        ),
        # FGVC-Aircraft again as FFVT reads it: "train" is the official trainval.
        Published(
            name="air",
            title="FGVC-Aircraft",
            folder="air",
            tree="""\
air/data/variants.txt                      the classes in order, one a line
air/data/{train,test}.txt                  `image-id.jpg label` a line, labels 1 to 100 (the archive has no such lists:
                                           where neither is there, the official ones below are used)
air/data/images_variant_{trainval,test}.txt              `image-id variant` a line
air/data/images/<image-id>.jpg             10,000 images
(or fgvc-aircraft-2013b/ as the archive unpacks, in air/ or beside it)""",
            classes=100,
            counts={"train": 6667, "test": 3333},
            per_class={"train": (66, 67), "test": (33, 34)},
            source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
            also=("fgvc-aircraft-2013b",),
        ),
        # Van Horn et al., arXiv 1707.06642; the competition's test labels were never published.
        Published(
            name="inat2017",
            title="iNaturalist 2017",
            folder="INat2017",
            tree="""\
INat2017/{train,val}2017.json              images, annotations, categories
INat2017/train_val_images/<kind>/<species>/<image>.jpg    675,170 images""",
            classes=5089,
            counts={"train": 579184, "val": 95986},
            source=(
                "https://ml-inat-competition-datasets.s3.amazonaws.com/2017/train_val_images.tar.gz and "
                ".../2017/train_val2017.zip"
            ),
            downloads=False,
        ),
        # Yu et al., ICCV 2021 (ultra-fine-grained leaves), for both.
        *(
            Published(
                name=name,
                title=title,
                folder=name,
                tree=f"""\
{name + "/anno/{train,test}.txt":<42} `file label` a line, labels 1 to {classes}
{name + "/images/<file>":<42} {6 * classes:,} images""",
                classes=classes,
                counts={"train": 3 * classes, "test": 3 * classes},
                per_class={"train": (3, 3), "test": (3, 3)},
                source="https://maxwell.ict.griffith.edu.au/cvipl/UFG_dataset.html",
                downloads=False,
            )
            for name, title, classes in (("cotton", "Cotton80", 80), ("soyloc", "SoyLocal", 200))
        ),
        # Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, for both.
        *(
            Published(
                name=name,
                title=title,
                folder=f"{name}/{archive}",
                tree="\n".join(f"{name}/{archive}/{file}" for file in files),
                classes=classes,
                counts={"train": 50000, "test": 10000},
                per_class={"train": (50000 // classes,) * 2, "test": (10000 // classes,) * 2},
                source="https://www.cs.toronto.edu/~kriz/cifar.html (the Python version)",
                also=(archive,),
            )
            for name, title, archive, classes, files in (
                (
                    "cifar10",
                    "CIFAR-10",
                    "cifar-10-batches-py",
                    10,
                    ("data_batch_{1,2,3,4,5}", "test_batch", "batches.meta"),
                ),
                ("cifar100", "CIFAR-100", "cifar-100-python", 100, ("train", "test", "meta")),
            )
        ),
    )
}


def published(name: str) -> Published:
    """The entry of one data set, in capitals or not; UserError for a name that is not in the table."""
    if name.lower() not in DATA_SETS:
        raise UserError(f"There is no data set {name!r}; choose one of {', '.join(sorted(DATA_SETS))}.")
    return DATA_SETS[name.lower()]
