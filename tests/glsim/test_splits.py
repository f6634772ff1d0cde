"""The csv files that are made from original annotation files: against recorded, published and independent ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_trees import GOLDEN, ROOT, WRITERS, recorded, rows_of, text_of, touch, write_recorded
from PIL import Image
from scipy.io import savemat

from common.data import aircraft, cub, dog, facts, food101, inat2017, write_demo
from common.errors import UserError
from glsim.data_utils.annotations import PUBLISHED, READERS
from glsim.data_utils.datasets import read
from glsim.data_utils.splits import image_folder, settings_of, split_rows, write_splits
from glsim.train_utils.yaml_config import CONFIGS

SPLITS = json.loads((ROOT / "tests/golden/glsim_data_split.json").read_text())
RECORDED = ["aircraft", "cars", "cotton", "cub", "dogs", "flowers", "food", "inat17", "nabirds", "pets"]
PUBLISHED_FILES = ROOT.parent / "shared/splits"


# As the original files name them, where the released code did not.
NAMES: dict[str, dict[int, str]] = {
    "cars": {0: "Make 000 Sedan 2012", 1: "Make 001 Sedan 2012", 195: "Make 195 Sedan 2012"},
    "dogs": {0: "n1-Chi", 1: "n2-Jap", 2: "n3-Box"},
    "pets": {0: "Abyssinian", 1: "american_bulldog", 36: "yorkshire_terrier"},
    "food": {0: "apple_pie", 1: "churros"},
    "aircraft": {number: f"Variant {number:03d}" for number in range(4)},
    "cotton": {0: "1", 1: "2", 79: "80"},
    "nabirds": dict(enumerate(("Common Eider", "Some Bird (Male)", "Oak Titmouse", "Dark-eyed Junco"))),
}


@pytest.mark.parametrize("name", RECORDED)
def test_files_equal_the_recorded_ones(name: str, tmp_path: Path) -> None:
    write_recorded(name, tmp_path / name)
    found = write_splits(name, tmp_path / name)
    for file, rows in zip(("train_val.csv", "test.csv"), recorded(name), strict=True):
        text = (tmp_path / name / file).read_bytes().decode()  # bytes: lines end as in the published files
        if name == "cotton":  # the order inside a class is that of a folder listing
            assert sorted(rows_of(text)) == sorted(rows)
            assert rows_of(text) == sorted(rows_of(text), key=lambda row: row[0])
        else:
            assert text == text_of(rows)
    assert found.names == NAMES.get(name, found.names)
    if "classid_classname.csv" in GOLDEN[name]:
        names, theirs = (tmp_path / name / "classid_classname.csv").read_text(), GOLDEN[name]["classid_classname.csv"]
        if name == "nabirds":  # numbered by a set there
            assert sorted(word for _, word in rows_of(theirs)) == sorted(NAMES[name].values())
            theirs = text_of([*NAMES[name].items()], "class_name")
        assert names == theirs


def test_leaves_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    leaves = [(0, f"{number}_train.png") for number in ("10_2", "10_10", "9_3")]
    touch(tmp_path / "soybean200_square", leaves, [(0, "9_1_test.png")])
    write_splits("soy", tmp_path)
    expected = [(8, "9_3_train.png"), (9, "10_2_train.png"), (9, "10_10_train.png")]
    assert (tmp_path / "train_val.csv").read_text() == text_of(expected)


def test_flowers_keep_their_official_validation_images(tmp_path: Path) -> None:
    train, val = (
        [(class_id, f"image_{n:05d}.jpg") for n in numbers] for class_id, numbers in ((7, (9, 3)), (2, (1, 5)))
    )
    WRITERS["flowers"](tmp_path, train + val, [(2, "image_00004.jpg")])
    write_splits("flowers", tmp_path)
    assert (tmp_path / "train.csv").read_text() == text_of(train)
    assert (tmp_path / "val.csv").read_text() == text_of(val)


@pytest.mark.parametrize("case", SPLITS["cases"])
def test_the_split_of_train_val_equals_the_recorded_one(case: str) -> None:
    figures = SPLITS["cases"][case]
    rows = [(class_id, image) for class_id, image in figures.get("input", SPLITS["interleaved"])]
    parts = split_rows(rows, figures["train_percent"])
    texts = [text_of(part) for part in parts]
    lost = {"one_based_ids_0.5": ["3,e\n", "3,f\n"], "gap_in_ids_0.5": ["3,e\n", "3,f\n"]}.get(case, ["", ""])
    assert texts == [figures["train.csv"] + lost[0], figures["val.csv"] + lost[1]]


@pytest.mark.parametrize(("name", "share"), [("cub", 0.8), ("food", 0.2), ("dafb", 0.05)])
def test_the_share_for_training_is_that_of_the_data_set(name: str, share: float, tmp_path: Path) -> None:
    images = [(class_id, f"{word}/{n:02d}.jpg") for class_id, word in enumerate("ab") for n in range(50)]
    if name in WRITERS:
        WRITERS[name](tmp_path, images, [(0, "a/t.jpg"), (1, "b/t.jpg")])
    else:
        touch(tmp_path / "data", images)
    train_val = write_splits(name, tmp_path).train_val
    train, val = (rows_of((tmp_path / file).read_text()) for file in ("train.csv", "val.csv"))
    for class_id in (0, 1):
        own = [row for row in train_val if row[0] == class_id]
        assert [row for row in train if row[0] == class_id] == own[: int(share * len(own))]
        assert [row for row in val if row[0] == class_id] == own[int(share * len(own)) :]


# The published files themselves, where this workplace has them.


def published(name: str, file: str) -> str:
    path = PUBLISHED_FILES / name / file
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path.read_text()


@pytest.mark.parametrize("name", ["aircraft", "cars", "cub", "flowers"])
def test_published_files_are_made_again_line_by_line(name: str, tmp_path: Path) -> None:
    files = {file: published(name, file) for file in ("train_val.csv", "test.csv", "train.csv", "val.csv")}
    if name == "cub":
        files["classid_classname.csv"] = published(name, "classid_classname.csv")
    WRITERS[name](tmp_path, rows_of(files["train_val.csv"]), rows_of(files["test.csv"]))
    write_splits(name, tmp_path)
    for file, text in files.items():
        assert (tmp_path / file).read_bytes() == text.encode(), file


@pytest.mark.parametrize("name", ["cotton", "soy"])
def test_published_leaves_are_made_again_but_for_the_order_inside_a_class(name: str, tmp_path: Path) -> None:
    train_val, test, train, val = (
        rows_of(published(name, f"{part}.csv")) for part in ("train_val", "test", "train", "val")
    )
    WRITERS[name](tmp_path, train_val, test)
    found = write_splits(name, tmp_path)
    assert sorted(found.train_val) == sorted(train_val)
    assert sorted(found.test) == sorted(test)
    assert split_rows(train_val, 0.8) == (train, val)


# Against the readers of common.data, which know nothing of csv files.


@pytest.mark.parametrize(
    ("name", "reader", "test"),
    [(*pair, "test") for pair in (("aircraft", aircraft), ("cub", cub), ("dogs", dog), ("food", food101))]
    + [("inat17", inat2017, "val")],
)
def test_demo_data_give_the_images_that_the_readers_of_common_give(
    name: str, reader: Callable, test: str, tmp_path: Path
) -> None:
    facts = PUBLISHED[name]
    write_demo(facts.name, tmp_path)
    settings = settings_of(name)
    settings.dataset_root_path = str(tmp_path / facts.folder)
    write_splits(name, settings.dataset_root_path)
    ours = read(settings)
    for images, split in ((ours.train, "trainval" if name == "aircraft" else "train"), (ours.test, test)):
        theirs = reader(tmp_path, split)
        assert (images.paths, images.labels, images.classes) == (theirs.paths, theirs.labels, theirs.classes)
    settings.train_trainval = False
    parts = read(settings)
    assert sorted(parts.train.ids + parts.val.ids) == sorted(ours.train.ids)


# Folders of images.

FISH = [(0, "ALB/1.jpg"), (0, "ALB/2.jpg"), (1, "BET/1.jpg"), (2, "DOL/3.JPG"), (2, "DOL/4.png")]


def test_a_class_is_its_folder_whatever_the_extensions(tmp_path: Path) -> None:
    rows = rows_of(GOLDEN["imagenet_style"]["imgs.csv"])
    touch(tmp_path, rows)
    (tmp_path / "a_cls/notes.txt").touch()
    found, names = image_folder(tmp_path)
    assert found == sorted(found, key=lambda row: (names[row[0]], row[1]))
    assert sorted(image for _, image in found) == sorted(image for _, image in rows)
    assert list(names.values()) == ["a_cls", "b_cls", "c_cls"]
    assert all(names[class_id] == image.partition("/")[0] for class_id, image in found)
    wrong = dict(rows_of(GOLDEN["imagenet_style"]["classid_classname.csv"]))
    assert [image for class_id, image in rows if wrong[class_id] != image.partition("/")[0]] == ["b_cls/z.png"]


def test_a_folder_without_a_test_set_keeps_a_fifth_of_each_class_for_it(tmp_path: Path) -> None:
    rows = [(class_id, f"{word}/{n}.jpg") for class_id, word in enumerate("ab") for n in range(10)]
    touch(tmp_path / "data", rows)
    found = write_splits("moe", tmp_path)
    assert found.train_val == [*rows[:8], *rows[10:18]]
    assert found.test == [*rows[8:10], *rows[18:]]
    settings = settings_of("moe")
    settings.dataset_root_path = str(tmp_path)
    assert read(settings).classes == ["a", "b"]


def test_published_lists_of_a_folder_stay(tmp_path: Path) -> None:
    touch(tmp_path / "data", FISH)
    renumbered = [(2 - class_id, image) for class_id, image in reversed(FISH)]
    texts = {"train_val.csv": text_of(renumbered[1:]), "test.csv": text_of(renumbered[:1])}
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    found = write_splits("ncfm", tmp_path)
    assert {file: (tmp_path / file).read_text() for file in texts} == texts
    assert found.names == {0: "DOL", 1: "BET", 2: "ALB"}
    assert rows_of((tmp_path / "train.csv").read_text()) == [(2, "ALB/2.jpg")]


def test_imagenet_has_a_folder_for_the_test(tmp_path: Path) -> None:
    touch(tmp_path / "train", FISH)
    touch(tmp_path / "val", FISH[1:])
    found = write_splits("imagenet", tmp_path)
    assert (found.train_val, found.test) == (FISH, FISH[1:])
    touch(tmp_path / "val", [(3, "YFT/9.jpg")])
    with pytest.raises(UserError, match=r"/train and .*/val: expected the same classes in both.* no folder YFT"):
        write_splits("imagenet", tmp_path)


def test_every_configured_data_set_can_be_prepared() -> None:
    names = {file.stem for file in (CONFIGS / "datasets").glob("*.yaml")}
    assert names == set(PUBLISHED)
    assert {name for name in names if settings_of(name).dataset_name != name} == set()
    assert set(WRITERS) == set(READERS)
    assert PUBLISHED["dogs"] == facts("dog")


# Bad input.


def damage_text(file: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda root: (root / file).write_text((root / file).read_text().replace(old, new))


def remove(file: str) -> Callable[[Path], object]:
    return lambda root: (root / file).unlink()


DOGS = {"annotation_list": [[1, 2]], "labels": [[1, 2]]}
CARS = {"annotations": [[1, 2]], "class_names": [["a"]]}
BAD = [
    ("cub", remove("classes.txt"), "classes.txt .*data.caltech.edu"),
    ("cub", damage_text("classes.txt", "3 010.Red\n", ""), "gives the image .* '3'"),
    ("cub", damage_text("train_test_split.txt", " 1\n", " 2\n"), "'2' where `image-id 1 or 0`"),
    ("cub", damage_text("images.txt", "7919 001.Black/a_1.png\n", ""), r"do not list the same 1 images \(7919\)"),
    ("cub", remove("images/002.Laysan/b_2.png"), "b_2.png"),
    ("cub", damage_text("images.txt", "a_2", "a_1"), "001.Black/a_1.png"),
    ("nabirds", remove("images.txt"), "get NABirds from https://dl.allaboutbirds.org/nabirds"),
    ("aircraft", damage_text("data/images_variant_test.txt", " Variant 000", ""), "images_variant_test.txt"),
    ("aircraft", remove("data/images/9999999.jpg"), "9999999.jpg"),
    ("pets", damage_text("annotations/test.txt", " 37 ", " 38 "), "yorkshire_terrier_9 the label '38'"),
    ("food", damage_text("meta/test.json", "{", "[{"), "test.json is cut short or not JSON"),
    ("food", damage_text("meta/test.json", '["churros/7"]', "3"), "test.json is not an object"),
    ("inat17", damage_text("val2017.json", '"category_id": 17', '"category_id": 9999'), "no annotation of a known"),
    ("dogs", lambda root: (root / "test_list.mat").write_bytes(b"MATLAB"), "test_list.mat is cut short"),
    ("dogs", lambda root: savemat(root / "test_list.mat", DOGS), "test_list.mat has no annotation_list"),
    ("cars", lambda root: savemat(root / "cars_annos.mat", CARS), "has no path, class and test flag in entry 0"),
    ("flowers", lambda root: savemat(root / "imagelabels.mat", {"labels": [[1, 1]]}), "image 4, which imagelabels.mat"),
    ("flowers", remove("setid.mat"), "get Oxford Flowers from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BAD)
def test_bad_annotations_are_one_sentence(
    name: str, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write_recorded(name, tmp_path / name)
    damage(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        write_splits(name, tmp_path / name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / name / "train_val.csv").exists()


def test_places_without_data_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere .*--dataset_root_path"):
        write_splits("cub", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"/data: expected a folder of images for each class \(No such file"):
        write_splits("moe", tmp_path)
    touch(tmp_path / "data", [(0, "one/notes.txt")])
    with pytest.raises(UserError, match=r"/data: expected a folder .* \(Found no valid file for the classes one"):
        write_splits("moe", tmp_path)
    (tmp_path / "cotton_square_new").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "cotton_square_new/leaf.png")
    with pytest.raises(UserError, match=r"has not both images of the form 1_2_train\.png and 1_2_test\.png"):
        write_splits("cotton", tmp_path)
    with pytest.raises(UserError, match="there is no data set 'cats' to prepare: choose one of aircraft, "):
        write_splits("cats", tmp_path)


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    write_recorded("pets", tmp_path / "pets")
    (tmp_path / "pets/val.csv").mkdir()
    with pytest.raises(UserError, match=r"pets/val\.csv could not be written"):
        write_splits("pets", tmp_path / "pets")


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 80, float("nan")])
def test_a_share_is_between_0_and_1(fraction: float) -> None:
    with pytest.raises(UserError, match=r"--train_percent .*: expected a share between 0 and 1"):
        split_rows([(0, "a")], fraction)


def test_files_that_were_there_and_differ_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published csv files of a data set may hold another split than the tools make."""
    write_demo("cub", tmp_path)
    root = tmp_path / "CUB"
    write_splits("cub", root)
    made = {path.name: path.read_bytes() for path in root.glob("*.csv")}
    published = b"class_id,dir\n0,theirs.jpg\n"
    (root / "train.csv").write_bytes(published)
    capsys.readouterr()
    write_splits("cub", root)
    assert (root / "train.1.csv").read_bytes() == published
    assert {path.name: path.read_bytes() for path in root.glob("*.csv") if path.name != "train.1.csv"} == made
    said = capsys.readouterr().out
    assert said == f"{root / 'train.csv'} had other lines: that file is now {root / 'train.1.csv'}\n"
