"""The data sets that FFVT adds: against the released readers' figures, joins by id, every kind of damage."""

import json
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
    cells,
    inat_content,
    save,
    write_air,
    write_car,
    write_car_list,
    write_cub,
    write_dog,
    write_dog_list,
    write_inat,
    write_leaves,
)
from PIL import Image
from scipy.io import savemat
from tiny_trees import AIRCRAFT_LISTS, cut, empty_folder, overwrite, remove, sentence, write_aircraft

from common.data import air, aircraft, car, cotton, cub, dog, inat2017
from common.data.published import DATA_SETS
from common.data.readers import READERS
from common.errors import UserError

FOLDERS = {"cub": "images", "dog": "Images", "cotton": "images", "soyloc": "images", "air": "..", "inat2017": "."}


@pytest.mark.parametrize(("name", "split"), [(name, split) for name in WRITERS for split in GOLDEN[name]])
def test_equals_the_released_reader(tmp_path: Path, name: str, split: str) -> None:
    folder = WRITERS[name](tmp_path)
    images = READERS[name](tmp_path, split)
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


@pytest.mark.parametrize("name", WRITERS)
def test_both_splits_have_the_same_classes(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    train, test = (READERS[name](tmp_path, split) for split in GOLDEN[name])
    assert train.classes == test.classes
    assert len(train.classes) == {"cub": 3, "dog": 3, "soyloc": 80}.get(name, DATA_SETS[name].classes)


def test_classes(tmp_path: Path) -> None:
    for write in WRITERS.values():
        write(tmp_path)
    assert cub(tmp_path, "train").classes == ["001.Black", "002.Laysan", "010.Red"]
    assert dog(tmp_path, "train").classes == ["n1-Chi", "n2-Jap", "n3-Box"]
    assert cotton(tmp_path, "train").classes == [str(number) for number in range(1, 81)]
    assert car(tmp_path, "train").classes[13] == "Make 013 Sedan 2012"
    assert air(tmp_path, "train").classes == VARIANTS
    assert inat2017(tmp_path, "train").classes[5088] == "species 5088"


def test_ids(tmp_path: Path) -> None:
    for write in WRITERS.values():
        write(tmp_path)
    assert cub(tmp_path, "test").ids == ["2", "4", "5"]
    assert dog(tmp_path, "test").ids == ["n2-Jap/n2_5", "n3-Box/n3_8"]
    assert cotton(tmp_path, "test").ids == ["1_6_test.png", "2_2_test.png", "80_1_test.png"]
    assert car(tmp_path, "test").ids == ["cars_test/00001.jpg", "cars_test/00002.jpg"]
    assert air(tmp_path, "test").ids == ["1514522", "0747566"]
    assert inat2017(tmp_path, "val").ids == ["100", "101"]


@pytest.mark.parametrize("name", WRITERS)
def test_no_image_is_decoded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name](tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", fail)
    assert len(READERS[name](tmp_path, "train")) >= 3


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


def test_the_lists_of_the_cub_demo_have_orders_of_their_own(demo_root: Path) -> None:
    def ids(name: str) -> list[str]:
        return [line.split()[0] for line in (demo_root / "CUB" / name).read_text().splitlines()]

    listed = [ids(name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")]
    assert sorted(listed[0]) == sorted(listed[1]) == sorted(listed[2])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(a == b for a, b in zip(listed[one], listed[other], strict=True)) < 20


def test_class_ids_of_cub_are_numbers(tmp_path: Path) -> None:
    folder = write_cub(tmp_path)
    write = overwrite("classes.txt", "10 010.Red\n9 009.White\n1 001.Black\n2 002.Laysan\n")
    write(folder)
    (folder / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n5 10\n6 10\n")
    assert cub(tmp_path, "train").classes == ["001.Black", "002.Laysan", "009.White", "010.Red"]
    assert cub(tmp_path, "train").labels == [0, 1, 3]


def test_a_gap_in_the_breeds_keeps_the_labels(tmp_path: Path) -> None:
    folder = write_dog(tmp_path)
    write_dog_list(folder, "test", [("n3-Box/n3_8", 3)])
    assert dog(tmp_path, "train").classes == ["n1-Chi", "2", "n3-Box"]
    assert dog(tmp_path, "train").labels == [0, 0, 2]


def test_the_breeds_of_both_lists_count(tmp_path: Path) -> None:
    folder = write_dog(tmp_path)
    save(folder / "Images/n9-Pug/n9_1.jpg")
    write_dog_list(folder, "test", [("n9-Pug/n9_1", 5)])
    assert dog(tmp_path, "train").classes == ["n1-Chi", "2", "n3-Box", "4", "n9-Pug"]


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


def test_the_demo_of_air_and_of_aircraft_are_the_same(demo_root: Path) -> None:
    for split, official in (("train", "trainval"), ("test", "test")):
        one, other = air(demo_root, split), aircraft(demo_root, official)
        assert (one.ids, one.labels, one.classes) == (other.ids, other.labels, other.classes)


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
    expected = READERS[name](tmp_path, "train").fingerprint()
    beside = folder.rename(tmp_path / archive)
    assert READERS[name](tmp_path, "train").fingerprint() == expected
    folder.mkdir()
    beside.rename(folder / archive)
    images = READERS[name](tmp_path, "train")
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
@pytest.mark.parametrize("state", ["no root", "no folder", "empty folder", "a file"])
def test_no_data(tmp_path: Path, name: str, state: str) -> None:
    root, facts = tmp_path / "data", DATA_SETS[name]
    place = root / facts.folder
    if state != "no root":
        root.mkdir()
    if state == "empty folder":
        place.mkdir(parents=True)
    if state == "a file":
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    with pytest.raises(UserError) as caught:
        READERS[name](root, "train")
    text = sentence(caught.value, facts.title, place, facts.source, "--data-root")
    assert ("--no-download" in text) == facts.downloads


@pytest.mark.parametrize("name", sorted({*WRITERS, "cifar10", "cifar100"}))
def test_an_unknown_split_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        READERS[name](tmp_path, "validation")
    sentence(caught.value, DATA_SETS[name].title, "'validation'", "train, ")


# Damage: what is done to the folder, the file that the sentence has to name, and what it has to say.

Damage = dict[str, tuple[Callable[[Path], Any], str, str]]

LABELS, SPLITS = "image_class_labels.txt", "train_test_split.txt"
CUB_DAMAGE: Damage = {
    "images.txt missing": (remove("images.txt"), "images.txt", "is not there"),
    "labels missing": (remove(LABELS), LABELS, "is not there"),
    "split missing": (remove(SPLITS), SPLITS, "is not there"),
    "classes missing": (remove("classes.txt"), "classes.txt", "is not there"),
    "labels empty": (overwrite(LABELS, "\n"), LABELS, "is empty"),
    "labels binary": (overwrite(LABELS, b"\xff\xd8"), LABELS, "is not a text file"),
    "labels cut at a line": (overwrite(LABELS, "1 1\n2 1\n3 2\n4 2\n"), LABELS, "lacks 2 images, the first of them"),
    "labels cut in a line": (
        overwrite(LABELS, "1 1\n2 1\n3 2\n4 2\n5 3\n6"),
        LABELS,
        "in line 6 no `image-id class-id`",
    ),
    "labels of another id": (overwrite(LABELS, "1 1\n2 1\n3 2\n4 2\n5 3\n6 3\n7 3\n"), LABELS, "the id 7"),
    "split of fewer": (overwrite(SPLITS, "1 1\n2 0\n4 0\n5 0\n6 1\n"), SPLITS, "the id 3"),
    "id twice": (overwrite(LABELS, "1 1\n2 1\n3 2\n4 2\n5 3\n6 3\n3 1\n"), LABELS, "lists the id 3 2 times"),
    "image id twice": (overwrite("images.txt", "1 a/1.png\n1 a/2.png\n"), "images.txt", "lists the id 1 2 times"),
    "image twice": (overwrite("images.txt", "1 a/1.png\n2 a/1.png\n"), "images.txt", "the image a/1.png 2 times"),
    "label unknown": (overwrite(LABELS, "1 1\n2 1\n3 2\n4 2\n5 3\n6 4\n"), LABELS, "the image 6 the class '4'"),
    "label no number": (overwrite(LABELS, "1 1\n2 1\n3 b\n4 2\n5 3\n6 3\n"), LABELS, "the image 3 the class 'b'"),
    "class no number": (overwrite("classes.txt", "1 a\nb b\n"), "classes.txt", "class id 'b'"),
    "class twice": (overwrite("classes.txt", "1 a\n1 b\n"), "classes.txt", "the id 1 2 times"),
    "split neither": (overwrite(SPLITS, "1 1\n2 0\n3 2\n4 0\n5 0\n6 1\n"), SPLITS, "the image 3 '2'"),
    "no training image": (overwrite(SPLITS, "1 0\n2 0\n3 0\n4 0\n5 0\n6 0\n"), SPLITS, "lists no train image"),
    "images missing": (remove("images"), "images", "is not there"),
    "images empty": (empty_folder("images"), "images", "is empty"),
    "class folder missing": (remove("images/010.Red"), "images/010.Red", "is not there"),
    "image missing": (remove("images/001.Black/a_1.png"), "images/001.Black", "lacks 1 of the 1 listed images"),
}

DOG_TRAIN = [("n1-Chi/n1_10", 1), ("n1-Chi/n1_11", 1), ("n3-Box/n3_7", 3)]


def _dog(rows: list[tuple[Any, Any]] = DOG_TRAIN, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_dog_list(folder, "train", rows, **changes)


LIST = "train_list.mat"
DOG_DAMAGE: Damage = {
    "list missing": (remove(LIST), LIST, "is not there"),
    "other list missing": (remove("test_list.mat"), "test_list.mat", "is not there"),
    "list a folder": (lambda folder: (folder / LIST).unlink() or (folder / LIST).mkdir(), LIST, "cannot be read"),
    "list empty": (overwrite(LIST, ""), LIST, "is cut short or no MATLAB file"),
    "list cut short": (cut(LIST, 50), LIST, "is cut short or no MATLAB file"),
    "list a page": (overwrite(LIST, "<html>404</html>" * 20), LIST, "is cut short or no MATLAB file"),
    "list of version 7.3": (
        overwrite(LIST, b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"),
        LIST,
        "no MATLAB file (version 5 to 7.2)",
    ),
    "no labels": (_dog(labels=None), LIST, "has no list in the variable labels"),
    "labels empty": (_dog(labels=np.zeros((0, 1))), LIST, "has no list in the variable labels"),
    "no annotations": (_dog(annotation_list=None), LIST, "has no list in the variable annotation_list"),
    "fewer labels": (_dog(labels=np.array([[1], [1]])), LIST, "3 entries in annotation_list and 2 labels"),
    "label 0": (
        _dog([*DOG_TRAIN, ("n3-Box/n3_8", 0)]),
        LIST,
        "the image n3-Box/n3_8 the label '0' where one of 1 to 120",
    ),
    "label 121": (_dog([*DOG_TRAIN, ("n3-Box/n3_8", 121)]), LIST, "the label '121'"),
    "label and a half": (_dog(labels=np.array([[1.0], [1.5], [3.0]])), LIST, "the image n1-Chi/n1_11 the label '1.5'"),
    "label not a number": (_dog(labels=np.array([[1.0], [np.nan], [3.0]])), LIST, "the label 'nan'"),
    "label a list": (_dog(labels=cells([[1], [2, 3], [3]])), LIST, "variable labels an entry that is not one value"),
    "name a number": (
        _dog(annotation_list=cells([1, 2, 3])),
        LIST,
        "has in annotation_list 1, which is no class/image",
    ),
    "name without folder": (_dog([("n1_10", 1)]), LIST, "'n1_10'"),
    "image twice": (_dog([DOG_TRAIN[0], DOG_TRAIN[0]]), LIST, "the image n1-Chi/n1_10 2 times"),
    "two folders for a label": (_dog([*DOG_TRAIN, ("n2-Jap/n2_6", 1)]), LIST, "the label 1, which is that of n1-Chi"),
    "images missing": (remove("Images"), "Images", "is not there"),
    "image missing": (remove("Images/n1-Chi/n1_11.jpg"), "Images/n1-Chi", "lacks 1 of the 2 listed images"),
}

ANNOS, META = "devkit/cars_train_annos.mat", "devkit/cars_meta.mat"


def _car(rows: list[tuple[Any, Any]], label_field: str = "class") -> Callable[[Path], None]:
    return lambda folder: write_car_list(folder / ANNOS, rows, label_field)


def _meta(**variables: Any) -> Callable[[Path], None]:
    return lambda folder: savemat(folder / META, variables)


CAR_DAMAGE: Damage = {
    "devkit missing": (remove("devkit"), META, "is not there"),
    "list missing": (remove(ANNOS), ANNOS, "is not there"),
    "list cut short": (cut(ANNOS, 50), ANNOS, "is cut short or no MATLAB file"),
    "meta cut short": (cut(META, 50), META, "is cut short or no MATLAB file"),
    "meta without names": (_meta(names=cells(["a"])), META, "no list in the variable class_names"),
    "meta of numbers": (_meta(class_names=cells([1, 2])), META, "no list of names"),
    "class twice": (_meta(class_names=cells(["a", "a"])), META, "the class a 2 times"),
    "fewer classes": (_meta(class_names=cells(["a", "b"])), ANNOS, "the image 00001.jpg the label '14'"),
    "list without labels": (_car([("00001.jpg", 5)], "bbox_y1"), ANNOS, "has no fname and class in entry 0"),
    "list of numbers": (lambda folder: savemat(folder / ANNOS, {"annotations": [[1]]}), ANNOS, "no fname and class"),
    "name a number": (_car([("00001.jpg", 5), (3, 5)]), ANNOS, "has no fname and class in entry 1"),
    "label 0": (_car([("00001.jpg", 0)]), ANNOS, "the image 00001.jpg the label '0' where one of 1 to 196"),
    "label 197": (_car([("00001.jpg", 197)]), ANNOS, "the label '197'"),
    "label a text": (_car([("00001.jpg", "sedan")]), ANNOS, "the label 'sedan'"),
    "label empty": (_car([("00001.jpg", [])]), ANNOS, "an entry that is not one value"),
    "image twice": (_car([("00001.jpg", 5), ("00001.jpg", 6)]), ANNOS, "the image 00001.jpg 2 times"),
    "images missing": (remove("cars_train"), "cars_train", "is not there"),
    "images empty": (empty_folder("cars_train"), "cars_train", "is empty"),
    "image missing": (
        remove("cars_train/00003.jpg"),
        "cars_train",
        "lacks 1 of the 3 listed images, the first of them",
    ),
}

COTTON = "anno/train.txt"
COTTON_DAMAGE: Damage = {
    "list missing": (remove(COTTON), COTTON, "is not there"),
    "other list missing": (remove("anno/test.txt"), "anno/test.txt", "is not there"),
    "list empty": (overwrite(COTTON, ""), COTTON, "is empty"),
    "no label": (overwrite(COTTON, "1_5_train.png 1\n\n1_3_train.png\n"), COTTON, "in line 3 no `file label`"),
    "label no number": (overwrite(COTTON, "1_5_train.png one\n"), COTTON, "the image 1_5_train.png the label 'one'"),
    "label 0": (overwrite(COTTON, "1_5_train.png 0\n"), COTTON, "the label '0' where one of 1 to 80"),
    "label negative": (overwrite(COTTON, "1_5_train.png -1\n"), COTTON, "the label '-1'"),
    "label 81": (overwrite(COTTON, "1_5_train.png 81\n"), COTTON, "the label '81'"),
    "label in other digits": (overwrite(COTTON, "1_5_train.png ٣\n"), COTTON, "the label '٣'"),
    "label endless": (overwrite(COTTON, f"1_5_train.png {'9' * 5000}\n"), COTTON, "the label '999"),
    "image twice": (overwrite(COTTON, "1_5_train.png 1\n1_5_train.png 2\n"), COTTON, "1_5_train.png 2 times"),
    "images missing": (remove("images"), "images", "is not there"),
    "image missing": (
        remove("images/80_2_train.png"),
        "images",
        "of the 4 listed images, the first of them 80_2_train.png",
    ),
}

AIR_DAMAGE: Damage = {
    "variants missing": (remove("data/variants.txt"), "data/variants.txt", "is not there"),
    "variant twice": (overwrite("data/variants.txt", "a\na\n"), "data/variants.txt", "the variant a 2 times"),
    "no label": (overwrite("data/train.txt", "1025794.jpg\n"), "data/train.txt", "in line 1 no `file label`"),
    "label 101": (overwrite("data/train.txt", "1025794.jpg 101\n"), "data/train.txt", "the label '101'"),
    "no list at all": (
        lambda folder: [(folder / f"data/{split}.txt").unlink() for split in ("train", "test")],
        "data/images_variant_trainval.txt",
        "is not there",
    ),
    "image missing": (remove("data/images/1340192.jpg"), "data/images", "lacks 1 of the 3 listed images"),
}


def _inat(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = inat_content("train")
        change(content)
        (folder / JSON).write_text(json.dumps(content))

    return damage


JSON = "train2017.json"
INAT_DAMAGE: Damage = {
    "json missing": (remove(JSON), JSON, "is not there"),
    "json cut short": (cut(JSON, 10), JSON, "is cut short or not JSON"),
    "json a list": (overwrite(JSON, "[]"), JSON, "is not an object"),
    "no images": (_inat(lambda c: c.pop("images")), JSON, "has no list of images"),
    "no annotations": (_inat(lambda c: c["annotations"].clear()), JSON, "has no list of annotations"),
    "no categories": (_inat(lambda c: c.pop("categories")), JSON, "has no list of categories"),
    "image without a name": (
        _inat(lambda c: c["images"][1].pop("file_name")),
        JSON,
        "no file_name in entry 1 of images",
    ),
    "category a text": (
        _inat(lambda c: c["annotations"][0].update(category_id="5")),
        JSON,
        "no category_id in entry 0 of annotations",
    ),
    "image id twice": (_inat(lambda c: c["images"][1].update(id=100)), JSON, "in images the id 100 2 times"),
    "image twice": (_inat(lambda c: c["images"].append(c["images"][0] | {"id": 7})), JSON, "A b/1.jpg 2 times"),
    "two annotations": (
        _inat(lambda c: c["annotations"].append(c["annotations"][0])),
        JSON,
        "in annotations the image_id 102 2 times",
    ),
    "category twice": (_inat(lambda c: c["categories"][0].update(id=3)), JSON, "in categories the id 3 2 times"),
    "unknown image": (_inat(lambda c: c["images"].pop(0)), JSON, "the unknown image_id 100"),
    "unknown category": (
        _inat(lambda c: c["annotations"][0].update(category_id=5089)),
        JSON,
        "the unknown category_id 5089 for the image 102",
    ),
    "no annotation": (_inat(lambda c: c["annotations"].pop(0)), JSON, "no annotation for the image 102"),
    "images missing": (remove("train_val_images"), "train_val_images", "is not there"),
    "species missing": (remove("train_val_images/Aves/C d"), "train_val_images/Aves/C d", "is not there"),
    "image missing": (remove("train_val_images/Fungi/E f/3.jpg"), "train_val_images/Fungi/E f", "is empty"),
}

DAMAGE: dict[str, tuple[Callable[[Path], Path], Damage]] = {
    "air": (write_air, AIR_DAMAGE),
    "car": (write_car, CAR_DAMAGE),
    "cotton": (write_leaves, COTTON_DAMAGE),
    "cub": (write_cub, CUB_DAMAGE),
    "dog": (write_dog, DOG_DAMAGE),
    "inat2017": (write_inat, INAT_DAMAGE),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in DAMAGE.items() for kind in kinds])
def test_damage_is_one_sentence(tmp_path: Path, name: str, kind: str) -> None:
    write, kinds = DAMAGE[name]
    damage, relative, part = kinds[kind]
    folder = write(tmp_path)
    damage(folder)
    with pytest.raises(UserError) as caught:
        READERS[name](tmp_path, "train")
    sentence(caught.value, folder / relative, part, DATA_SETS[name].source, "--data-root")


def test_absent_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    folder = write_leaves(tmp_path)
    for name in ("1_3_train.png", "80_2_train.png"):
        (folder / "images" / name).unlink()
    with pytest.raises(UserError) as caught:
        cotton(tmp_path, "train")
    sentence(caught.value, folder / "images", "lacks 2 of the 4 listed images, the first of them 1_3_train.png")
