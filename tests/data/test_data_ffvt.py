"""The data sets that FFVT adds: against the released readers' figures, joins by id, every kind of damage."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ffvt_trees import (
    GOLDEN,
    VARIANTS,
    WRITERS,
    save,
    write_car,
    write_car_list,
    write_cub,
    write_dog,
    write_dog_list,
    write_leaves,
)
from tiny_trees import AIRCRAFT_LISTS, cut, overwrite, remove, sentence, write_aircraft

from common import data as readers
from common.data import air, aircraft, car, cotton, cub, dog, facts
from common.errors import UserError

FOLDERS = {"cub": "images", "dog": "Images", "cotton": "images", "soyloc": "images", "air": "..", "inat2017": "."}


@pytest.mark.parametrize(("name", "split"), [(name, split) for name in WRITERS for split in GOLDEN[name]])
def test_equals_the_released_reader(tmp_path: Path, name: str, split: str) -> None:
    folder = WRITERS[name](tmp_path)
    images = getattr(readers, name)(tmp_path, split)
    base = (folder / FOLDERS.get(name, f"cars_{split}")).resolve()
    found = [
        [path.relative_to(base).as_posix(), label] for path, label in zip(images.paths, images.labels, strict=True)
    ]
    assert found == GOLDEN[name][split]
    assert (images.name, images.split) == (name, split)
    for index, label in enumerate(images.labels):  # grey and transparent ones among them
        image, item_label = images[index]
        assert [*image.size, image.mode] == GOLDEN["image"]
        assert item_label == label


NUMBERS = [str(number) for number in range(1, 81)]
CONTENT = {  # all classes, and the ids of the second split
    "cub": (["001.Black", "002.Laysan", "010.Red"], ["2", "4", "5"]),
    "dog": (["n1-Chi", "n2-Jap", "n3-Box"], ["n2-Jap/n2_5", "n3-Box/n3_8"]),
    "cotton": (NUMBERS, ["1_6_test.png", "2_2_test.png", "80_1_test.png"]),
    "soyloc": (NUMBERS, ["1_6_test.png", "2_2_test.png", "80_1_test.png"]),
    "car": ([f"Make {n:03d} Sedan 2012" for n in range(196)], ["cars_test/00001.jpg", "cars_test/00002.jpg"]),
    "air": (VARIANTS, ["1514522", "0747566"]),
    "inat2017": ([f"species {n}" for n in range(5089)], ["100", "101"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_both_splits_have_all_classes(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    classes, ids = CONTENT[name]
    train, test = (getattr(readers, name)(tmp_path, split) for split in GOLDEN[name])
    assert train.classes == test.classes == classes
    assert test.ids == ids


# Joins


def test_cub_joins_by_id(tmp_path: Path) -> None:
    folder = write_cub(tmp_path)
    before = cub(tmp_path, "train")
    for number, name in enumerate(("image_class_labels.txt", "train_test_split.txt", "classes.txt"), start=1):
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join(lines[number:] + lines[:number]))
    after = cub(tmp_path, "train")
    assert after.fingerprint() == before.fingerprint()
    assert (after.ids, after.paths, after.classes) == (before.ids, before.paths, before.classes)
    lines = (folder / "images.txt").read_text().splitlines()
    (folder / "images.txt").write_text("\n".join(reversed(lines)))
    assert cub(tmp_path, "train").ids == before.ids[::-1]
    assert cub(tmp_path, "train").fingerprint() == before.fingerprint()


def test_class_ids_of_cub_are_numbers(tmp_path: Path) -> None:
    folder = write_cub(tmp_path)
    (folder / "classes.txt").write_text("10 010.Red\n9 009.White\n1 001.Black\n2 002.Laysan\n")
    (folder / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n5 10\n6 10\n")
    assert cub(tmp_path, "train").classes == ["001.Black", "002.Laysan", "009.White", "010.Red"]
    assert cub(tmp_path, "train").labels == [0, 1, 3]


def test_breeds_are_numbered_over_both_lists_and_gaps_keep_their_label(tmp_path: Path) -> None:
    folder = write_dog(tmp_path)
    save(folder / "Images/n9-Pug/n9_1.jpg")
    write_dog_list(folder, "test", [("n9-Pug/n9_1", 5)])
    assert dog(tmp_path, "train").classes == ["n1-Chi", "2", "n3-Box", "4", "n9-Pug"]
    assert dog(tmp_path, "train").labels == [0, 0, 2]


def test_numbers_of_matlab_are_often_doubles(tmp_path: Path) -> None:
    folder = write_dog(tmp_path)
    write_dog_list(folder, "train", [("n1-Chi/n1_10", 1.0), ("n3-Box/n3_7", 3.0)], labels=np.array([[1.0, 3.0]]))
    assert dog(tmp_path, "train").labels == [0, 2]
    write_car_list(write_car(tmp_path) / "devkit/cars_train_annos.mat", [("00001.jpg", 196.0)])
    assert car(tmp_path, "train").labels == [195]


# Air: FFVT's lists, or the official ones


def write_official(root: Path) -> Path:
    """The official archive under FFVT's name."""
    folder = write_aircraft(root).parent
    return folder.rename(folder.with_name("air"))


def test_air_is_built_from_the_official_lists(tmp_path: Path) -> None:
    data = write_official(tmp_path) / "data"
    write_aircraft(tmp_path)
    built = air(tmp_path, "train")
    assert built.ids == [line[:7] for line in AIRCRAFT_LISTS["trainval"].splitlines()]
    for split, official in (("train", "trainval"), ("test", "test")):
        ours, theirs = air(tmp_path, split), aircraft(tmp_path, official)
        assert (ours.ids, ours.labels, ours.classes) == (theirs.ids, theirs.labels, theirs.classes)
        assert ours.path(0).is_relative_to(data)
    # The same lists in FFVT's form.
    for split, official in (("train", "trainval"), ("test", "test")):
        images = aircraft(tmp_path, official)
        rows = zip(images.ids, images.labels, strict=True)
        (data / f"{split}.txt").write_text("".join(f"{id_}.jpg {label + 1}\n" for id_, label in rows))
    assert air(tmp_path, "train").fingerprint() == built.fingerprint()
    assert air(tmp_path, "train").paths == built.paths


def test_lists_of_ffvt_come_in_pairs(tmp_path: Path) -> None:
    data = write_official(tmp_path) / "data"
    (data / "train.txt").write_text("0000003.jpg 1\n0000001.jpg 2\n")
    assert air(tmp_path, "train").labels == [0, 1]  # as the list says
    with pytest.raises(UserError) as caught:
        air(tmp_path, "test")
    sentence(caught.value, data / "test.txt", "is not there")


# Folders


@pytest.mark.parametrize(("name", "archive"), [("cub", "CUB_200_2011"), ("air", "fgvc-aircraft-2013b")])
def test_an_archive_under_its_own_name(tmp_path: Path, name: str, archive: str) -> None:
    folder = WRITERS[name](tmp_path)
    expected = getattr(readers, name)(tmp_path, "train").fingerprint()
    beside = folder.rename(tmp_path / archive)
    assert getattr(readers, name)(tmp_path, "train").fingerprint() == expected
    folder.mkdir()
    beside.rename(folder / archive)
    images = getattr(readers, name)(tmp_path, "train")
    assert images.fingerprint() == expected
    assert images.path(0).is_relative_to(folder / archive)


def test_the_folder_of_ffvt_comes_before_one_beside_it(tmp_path: Path) -> None:
    shutil.copytree(write_cub(tmp_path), tmp_path / "CUB_200_2011")
    assert cub(tmp_path, "train").path(0).is_relative_to(tmp_path / "CUB")


def test_cars_as_kaggle_nests_them(tmp_path: Path) -> None:
    folder = write_car(tmp_path)
    expected = {split: car(tmp_path, split).fingerprint() for split in ("train", "test")}
    for split in ("train", "test"):
        (folder / f"cars_{split}").rename(folder / "aside")
        (folder / f"cars_{split}").mkdir()
        (folder / "aside").rename(folder / f"cars_{split}/cars_{split}")
    (folder / "cars_test_annos_withlabels.mat").rename(folder / "devkit/cars_test_annos_withlabels.mat")
    (folder / "devkit/cars_train_annos.mat").rename(folder / "cars_train_annos.mat")
    for split, fingerprint in expected.items():
        images = car(tmp_path, split)
        assert images.fingerprint() == fingerprint
        assert images[0][0].mode == "RGB"


# Lines


def test_lines_need_not_end_as_expected(tmp_path: Path) -> None:
    """No final newline, carriage returns, blank lines, tabs, a byte order mark."""
    folder = write_leaves(tmp_path)
    expected = cotton(tmp_path, "train").fingerprint()
    path = folder / "anno/train.txt"
    text = path.read_text()
    for changed in (text.rstrip("\n"), text.replace("\n", "\r\n"), text.replace("\n", "\n\n"), text.replace(" ", "\t")):
        for mark in ("", "\ufeff"):
            path.write_bytes((mark + changed).encode())
            assert cotton(tmp_path, "train").fingerprint() == expected
    folder = write_cub(tmp_path)
    before = cub(tmp_path, "train")
    for path in folder.glob("*.txt"):
        path.write_bytes(path.read_text().rstrip("\n").replace("\n", "\r\n").encode())
    assert cub(tmp_path, "train").fingerprint() == before.fingerprint()
    assert (cub(tmp_path, "train").paths, cub(tmp_path, "train").classes) == (before.paths, before.classes)


def test_names_with_spaces(tmp_path: Path) -> None:
    folder = write_leaves(tmp_path)
    save(folder / "images/a leaf  1.png")
    (folder / "anno/test.txt").write_text("a leaf  1.png 2\n")
    assert cotton(tmp_path, "test").paths == [folder / "images/a leaf  1.png"]
    folder = write_cub(tmp_path)
    (folder / "images/010.Red/c_2.png").rename(folder / "images/010.Red/c  2.png")
    (folder / "images.txt").write_text((folder / "images.txt").read_text().replace("c_2", "c  2"))
    (folder / "classes.txt").write_text("1 001.Black\n2 002.Laysan\n3 010.Dark Red\n")
    images = cub(tmp_path, "train")
    assert images.paths[-1] == folder / "images/010.Red/c  2.png"
    assert images.classes[-1] == "010.Dark Red"


# Nothing there


@pytest.mark.parametrize("name", sorted({*WRITERS, "cifar10", "cifar100"}))
@pytest.mark.parametrize("state", ["no root", "empty folder", "a file"])
def test_no_data(tmp_path: Path, name: str, state: str) -> None:
    root, place = tmp_path / "data", tmp_path / "data" / facts(name).folder
    if state != "no root":
        place.parent.mkdir(parents=True)
        place.mkdir() if state == "empty folder" else place.touch()
    with pytest.raises(UserError) as caught:
        getattr(readers, name)(root, "train")
    sentence(caught.value, place, facts(name).source, "--data-root")


# Damage: what is done to the folder, and the file that the sentence has to name.

Damage = Callable[[Path], Any]
LABELS, SPLITS = "image_class_labels.txt", "train_test_split.txt"
LIST, ANNOS, META = "train_list.mat", "devkit/cars_train_annos.mat", "devkit/cars_meta.mat"
COTTON, JSON = "anno/train.txt", "train2017.json"
DOG_TRAIN = [("n1-Chi/n1_10", 1), ("n1-Chi/n1_11", 1), ("n3-Box/n3_7", 3)]


def removed(*files: str) -> list[tuple[Damage, str]]:
    return [(remove(file), file) for file in files]


def written(file: str, *contents: str | bytes) -> list[tuple[Damage, str]]:
    return [(overwrite(file, content), file) for content in contents]


def dogs(*rows: tuple[Any, Any], **changes: Any) -> tuple[Damage, str]:
    return lambda folder: write_dog_list(folder, "train", [*DOG_TRAIN, *rows], **changes), LIST


def cars(*rows: tuple[Any, Any], label_field: str = "class") -> tuple[Damage, str]:
    return lambda folder: write_car_list(folder / ANNOS, list(rows), label_field), ANNOS


def cub_lines(*seconds: object) -> str:
    """A list of the six images with these second columns."""
    return "".join(f"{number} {second}\n" for number, second in enumerate(seconds, start=1))


DAMAGE: dict[str, list[tuple[Damage, str]]] = {
    "cub": [
        *removed("images.txt", LABELS, SPLITS, "classes.txt", "images/001.Black/a_1.png"),
        *written(LABELS, "\n", b"\xff\xd8", cub_lines(1, 1, 2, 2), cub_lines(1, 1, 2, 2, 3, 4)),
        *written(SPLITS, cub_lines(1, 0, 2, 0, 0, 1)),
        *written("images.txt", "1 a/1.png\n1 a/2.png\n"),
    ],
    "dog": [
        *removed(LIST, "test_list.mat", "Images/n1-Chi/n1_11.jpg"),
        *((cut(LIST, 50), LIST), *written(LIST, "", "<html>404</html>" * 20)),
        *(dogs(annotation_list=None), dogs(DOG_TRAIN[0]), dogs(("n2-Jap/n2_6", 1))),
        *(dogs(("n3-Box/n3_8", label)) for label in (0, 121)),
    ],
    "car": [
        *removed(META, ANNOS, "cars_train/00003.jpg"),
        *((cut(file, 50), file) for file in (ANNOS, META)),
        cars(("00001.jpg", 5), ("00002.jpg", 5), label_field="bbox_y1"),
        *(cars(("00002.jpg", 7), ("00001.jpg", label)) for label in (0, 197, "sedan")),
    ],
    "cotton": [
        *removed(COTTON, "anno/test.txt", "images/80_2_train.png"),
        *written(COTTON, "", "1_5_train.png 1\n1_5_train.png 2\n"),
        *written(COTTON, *(f"1_5_train.png {label}\n" for label in ("one", 0, -1, 81))),
    ],
    "air": [
        *removed("data/variants.txt", "data/images/1340192.jpg"),
        *written("data/train.txt", "1025794.jpg\n", "1025794.jpg 101\n"),
    ],
    "inat2017": [*removed(JSON, "train_val_images/Fungi/E f/3.jpg"), (cut(JSON, 10), JSON)],
}


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, kinds in DAMAGE.items() for n in range(len(kinds))])
def test_damage_is_one_sentence(tmp_path: Path, name: str, number: int) -> None:
    damage, named = DAMAGE[name][number]
    folder = WRITERS[name](tmp_path)
    damage(folder)
    with pytest.raises(UserError) as caught:
        getattr(readers, name)(tmp_path, "train")
    sentence(caught.value, folder / named, facts(name).source, "--data-root")
