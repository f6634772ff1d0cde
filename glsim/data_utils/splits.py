"""The csv files of a data set, made from its original annotation files: train_val, test, train, val, classid_classname.

A row is `class_id,dir`; class ids count from 0, `dir` is relative to the folder of the images.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from common.errors import UserError
from common.files import keep_earlier, write_atomically
from common.train.log import say
from glsim.data_utils.annotations import PUBLISHED, READERS, Annotations, Row, read_annotations
from glsim.data_utils.datasets import is_inside, read_list
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import CONFIGS, read_config

# Share of train_val that is for training.
FRACTION = 0.8
FRACTIONS = {"dafb": 0.05, "food": 0.2}


def settings_of(dataset_name: str) -> Settings:
    """The settings that the data set's own configuration file gives: where it lies, names of folders and files."""
    return Settings(**read_config(CONFIGS / "datasets" / f"{dataset_name}.yaml"))


def write_splits(dataset_name: str, root: str | Path) -> Annotations:
    """Writes the five csv files below `root` from the original annotation files there, and returns what these say.

    Data sets that are mere folders of images have no published split: the first 80 % of each class by file name are
    train_val; but a train_val.csv and test.csv that are there already, the published ones, stay. Other files that were
    there and differ get a number (train.1.csv).

    Raises:
        UserError: an annotation file or a listed image is missing, a file is damaged, or a csv cannot be written.
    """
    annotations = read(dataset_name, root)
    settings = settings_of(dataset_name)
    if annotations.num_train is None:
        train, val = split_rows(annotations.train_val, FRACTIONS.get(dataset_name, FRACTION))
    else:  # official
        train, val = annotations.train_val[: annotations.num_train], annotations.train_val[annotations.num_train :]
    for file, rows in (
        (settings.df_trainval, annotations.train_val),
        (settings.df_test, annotations.test),
        (settings.df_train, train),
        (settings.df_val, val),
    ):
        write_rows(Path(root) / file, rows)
    write_names(Path(root) / settings.df_classid_classname, annotations.names)
    return annotations


def read(dataset_name: str, root: str | Path) -> Annotations:
    """What the original files of any data set in `root` say; see `write_splits`."""
    if dataset_name not in PUBLISHED:
        raise UserError(f"there is no data set {dataset_name!r} to prepare: choose one of {', '.join(PUBLISHED)}")
    settings = settings_of(dataset_name)
    if dataset_name in READERS:
        return read_annotations(dataset_name, root, settings.folder_train)
    root = Path(root)
    train_val, names = image_folder(root / settings.folder_train)
    if settings.folder_test != settings.folder_train:
        test, test_names = image_folder(root / settings.folder_test)
        if test_names != names:
            odd = sorted(set(names.values()) ^ set(test_names.values()))
            raise UserError(
                f"{root / settings.folder_train} and {root / settings.folder_test}: expected the same classes in both, "
                f"but one has no folder {odd[0]}"
            )
        return Annotations(train_val, test, names)
    lists = [root / settings.df_trainval, root / settings.df_test]
    if not all(file.exists() for file in lists):
        return Annotations(*split_rows(train_val, FRACTION), names)
    train_val, test = ([*zip(found.labels, found.images, strict=True)] for found in map(read_list, lists))
    return Annotations(train_val, test, {class_id: image.partition("/")[0] for class_id, image in train_val + test})


def image_folder(folder: Path) -> tuple[list[Row], dict[int, str]]:
    """The images of a folder that has a folder for each class, and the names of these, which are numbered in order."""
    try:
        names, number = find_classes(folder)
        files = make_dataset(folder, number, IMG_EXTENSIONS)
    except OSError as error:
        problem = error.strerror or str(error).rstrip(".")
        raise UserError(f"{folder}: expected a folder of images for each class ({problem}); unpack it there") from error
    rows = [(class_id, Path(file).relative_to(folder).as_posix()) for file, class_id in files]
    for _, name in rows:
        # Linux takes any bytes for a name; those that are no UTF-8 come as halves of characters.
        if not is_inside(name) or not name.isprintable():
            raise UserError(f"{folder} has the file {name!r}, which no list can name: rename it")
    return rows, dict(enumerate(names))


def split_rows(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Two parts: of each class the first int(n * fraction) rows, and the others; both by class, then in their order."""
    if not 0 < fraction < 1:
        raise UserError(f"--train_percent {fraction:g}: expected a share between 0 and 1")
    of_class: dict[int, list[Row]] = {}
    for row in rows:
        of_class.setdefault(row[0], []).append(row)
    first: list[Row] = []
    others: list[Row] = []
    for _, own in sorted(of_class.items()):
        count = int(len(own) * fraction)
        first += own[:count]
        others += own[count:]
    return first, others


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Writes a list of images."""
    _write(file, [("class_id", "dir"), *rows])


def write_names(file: Path, names: Mapping[int, str]) -> None:
    """Writes the names of the classes."""
    _write(file, [("class_id", "class_name"), *sorted(names.items())])


def _write(file: Path, table: Iterable[tuple[object, str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    content = text.getvalue().encode()
    if file.is_file() and file.read_bytes() != content:  # the published one, it may be
        say(f"{file} had other lines: that file is now {keep_earlier(file)}")
    write_atomically(file, lambda opened: opened.write(content))
