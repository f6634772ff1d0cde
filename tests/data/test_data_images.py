"""common.data.images: decoding, validation, subsets, splits, transforms, fingerprints."""

import errno
import hashlib
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_kinds import EPS, KINDS, Kind
from PIL import Image, ImageFile
from tiny_trees import sentence, write_image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from common.data import BadImage, Data, Images, load_image, random_split
from common.data.images import image_size
from common.errors import UserError


def make(folder: Path, count: int = 6, **changes: Any) -> Images:
    """`count` images of two classes; nothing is written to disk."""
    arguments: dict[str, Any] = {
        "name": "toy",
        "split": "train",
        "ids": [f"id{number}" for number in range(count)],
        "paths": [folder / f"{number}.png" for number in range(count)],
        "labels": [number % 2 for number in range(count)],
        "classes": ["even", "odd"],
    }
    return Images(**(arguments | changes))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


# Every mode to RGB


def test_rgb_is_returned_as_stored(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = load_image(save(Image.fromarray(pixels), tmp_path / "a.png"))
    assert image.mode == "RGB"
    assert (np.asarray(image) == pixels).all()


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 100), ("LA", (100, 0)), ("LA", (100, 255))])
def test_grey_becomes_three_equal_channels(tmp_path: Path, mode: str, colour: Any) -> None:
    image = load_image(save(Image.new(mode, (4, 4), colour), tmp_path / "a.png"))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == ((255,) * 3 if mode == "1" else (100, 100, 100))


def test_alpha_is_dropped_and_the_colour_below_it_kept(tmp_path: Path) -> None:
    for alpha in (0, 128, 255):
        path = save(Image.new("RGBA", (4, 4), (10, 200, 30, alpha)), tmp_path / f"{alpha}.png")
        assert load_image(path).getpixel((1, 1)) == (10, 200, 30)


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_palette_with_and_without_transparency(tmp_path: Path, transparency: Any) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    path = save(image, tmp_path / "a.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns where transparency is lost unseen
        loaded = load_image(path)
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_of_a_png_is_kept(tmp_path: Path, mode: str) -> None:
    colour = 7 if mode == "L" else (7, 7, 7)
    path = save(Image.new(mode, (2, 2), colour), tmp_path / "a.png", transparency=colour)
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (7, 7, 7)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (16, 16), (200, 60, 20)).convert("CMYK"), tmp_path / "a.jpg", quality=100)
    assert np.abs(np.asarray(load_image(path)).astype(int) - (200, 60, 20)).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    image = load_image(save(Image.fromarray(levels), tmp_path / f"a.{suffix}"))
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_grey_levels_without_a_range_are_refused(tmp_path: Path) -> None:
    for number, levels in enumerate([np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70_000, np.int32)]):
        path = save(Image.fromarray(levels), tmp_path / f"{number}.tif")
        with pytest.raises(BadImage) as caught:
            load_image(path)
        sentence(caught.value, path, "grey levels")


# Every odd kind of file


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_becomes_of_a_kind_of_image(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind.check(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_size_of_an_image_is_read_from_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png_with_size(300, 200))  # without pixels
    assert image_size(tmp_path / "a.png") == (300, 200)
    (tmp_path / "b.png").write_bytes(_png_with_size(60_000, 60_000))
    (tmp_path / "c.png").write_bytes(EPS)
    os.mkfifo(tmp_path / "d.png")
    for name in "bcde":
        with pytest.raises(BadImage) as caught:
            image_size(tmp_path / f"{name}.png")
        sentence(caught.value, tmp_path / f"{name}.png")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadImage) as caught:
        load_image(tmp_path / "a.jpg")
    sentence(caught.value, tmp_path / "a.jpg", "Permission denied")


# Bad images


def _png_with_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind in ("truncated-jpeg", "truncated-png"):
        noise.save(path, format=kind.removeprefix("truncated-"))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "header-only":
        noise.save(path)
        path.write_bytes(path.read_bytes()[:4])
    elif kind == "bomb":
        path.write_bytes(_png_with_size(60_000, 60_000))
    elif kind == "folder":
        path.mkdir()
    return path


BAD = ["empty", "text", "truncated-jpeg", "truncated-png", "header-only", "bomb", "folder", "missing"]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_in_one_sentence(tmp_path: Path, kind: str) -> None:
    path = bad_file(kind, tmp_path)
    images = Images("toy", "train", ["a"], [path], [0], ["only"])
    with pytest.raises(BadImage) as caught:
        images[0]
    assert isinstance(caught.value, UserError)
    assert caught.value.path == path
    sentence(caught.value, path, "--skip-bad-images")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.path) == (str(caught.value), path)


def test_truncated_images_stay_errors_for_everyone() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_bad_image_keeps_sentence_and_path_on_its_way_out_of_a_worker(tmp_path: Path) -> None:
    path = bad_file("truncated-jpeg", tmp_path)
    with pytest.raises(BadImage) as direct:
        load_image(path)
    wrapped = ExceptionWrapper(direct._excinfo, where="in DataLoader worker process 0")  # what a worker sends
    with pytest.raises(BadImage) as caught:
        wrapped.reraise()
    assert caught.value.path == path
    assert str(caught.value) == str(direct.value)


def test_a_fault_of_the_machine_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").touch()
    for error in (OSError(errno.EMFILE, "too many open files"), MemoryError()):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(type(error)) as caught:
            load_image(tmp_path / "a.jpg")
        assert caught.value is error


# The data set


def test_items_labels_paths(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / "deep" / f"{number}.png", (number, 0, 0))
    images = make(tmp_path / "deep", 3)
    assert len(images) == 3
    assert [images[i][0].getpixel((0, 0))[0] for i in range(3)] == [0, 1, 2]
    assert [images[i][1] for i in range(3)] == [0, 1, 0]
    assert type(images[1][1]) is int
    assert images.paths == [tmp_path / "deep" / f"{number}.png" for number in range(3)]
    assert images.path(2) == images.paths[2]
    assert images.transform is None


@pytest.mark.parametrize(
    "paths",
    [["a.png"], ["a.png", "b.png"], ["/x/a.png", "/x/ab.png"], ["/x/y/a.png", "/xy/a.png"], ["/x/a/b.png", "c.png"]],
)
def test_paths_survive_compact_storage(paths: list[str]) -> None:
    images = Images("toy", "s", [str(i) for i in range(len(paths))], paths, [0] * len(paths), ["only"])
    assert [os.fspath(path) for path in images.paths] == paths
    assert images.subset([len(paths) - 1]).paths == [Path(paths[-1])]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"ids": ["a"]}, "1 ids, 6 paths and 6 labels"),
        ({"ids": [], "paths": [], "labels": []}, "no images"),
        ({"labels": [0, 1, 0, 1, 0, 2]}, "labels 0..2 do not fit 2 classes"),
        ({"labels": [0, 1, 0, 1, 0, -1]}, "labels -1..1"),
        ({"ids": ["a", "b", "c", "d", "e", "b"]}, "b occurs 2 times"),
    ],
)
def test_inconsistent_arguments(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path, **changes)
    sentence(caught.value, "toy train", part)


def test_transforms_are_never_shared(tmp_path: Path) -> None:
    for number in range(6):
        write_image(tmp_path / f"{number}.png")
    base = make(tmp_path, transform=lambda image: "base")
    part = base.subset([0, 3])
    train, val = part.with_transform(lambda image: "train"), part.with_transform(None)
    assert [base[0][0], part[0][0], train[0][0]] == ["base", "base", "train"]
    assert isinstance(val[0][0], Image.Image)
    assert train.ids == val.ids == part.ids == ["id0", "id3"]
    with pytest.raises(AttributeError):
        train.transform = None  # type: ignore[misc]


def test_subset_keeps_order_and_classes_and_refuses_repetition(tmp_path: Path) -> None:
    images = make(tmp_path)
    part = images.subset([5, 1, 2], split="few")
    assert (part.ids, part.labels, part.classes, part.split) == (
        ["id5", "id1", "id2"],
        [1, 1, 0],
        ["even", "odd"],
        "few",
    )
    assert part.paths == [images.path(5), images.path(1), images.path(2)]
    assert images.subset(range(2)).split == "train"
    for indices in ([], [1, 1]):
        with pytest.raises(UserError):
            images.subset(indices)


def test_workers_get_it_pickled(tmp_path: Path) -> None:
    for number in range(6):
        write_image(tmp_path / f"{number}.png", (number, 0, 0))
    images = make(tmp_path, transform=v2.PILToTensor())
    images = pickle.loads(pickle.dumps(images))  # as a spawned worker gets it
    loader = DataLoader(images, batch_size=4, num_workers=1)
    batches = list(loader)
    assert torch.cat([labels for _, labels in batches]).tolist() == images.labels
    assert torch.cat([pixels for pixels, _ in batches])[:, 0, 0, 0].tolist() == list(range(6))


def _grey_of_name(path: Path) -> Image.Image:
    return Image.new("RGB", (2, 2), (int(path.name),) * 3)


def test_decode_takes_the_place_of_reading_files(tmp_path: Path) -> None:
    paths = [f"nowhere/{level}" for level in (10, 20, 30)]
    images = make(tmp_path, 3, paths=paths, decode=_grey_of_name, transform=lambda image: image.getpixel((0, 0))[0])
    assert [images[index] for index in range(3)] == [(10, 0), (20, 1), (30, 0)]
    part = images.subset([2, 0])
    assert [part[index][0] for index in range(2)] == [30, 10]
    again = pickle.loads(pickle.dumps(part.with_transform(v2.PILToTensor())))
    assert again[0][0][0, 0, 0] == 30
    assert images.fingerprint() == make(tmp_path, 3).fingerprint()


def test_pickled_size_is_near_the_bare_names() -> None:
    ids = [f"apple_pie/{number:07d}" for number in range(10_000)]
    images = Images("food101", "train", ids, [f"/a/long/way/to/food-101/{id_}.jpg" for id_ in ids], [0] * 10_000, ["x"])
    assert len(pickle.dumps(images)) < 70 * 10_000


# Splits


@pytest.mark.parametrize("seed", [0, 42])
def test_random_split_is_that_of_torch(tmp_path: Path, seed: int) -> None:
    images = make(tmp_path, 103)
    one, other = random_split(images, 0.8, seed)
    expected = torch.utils.data.random_split(images, [82, 21], generator=torch.Generator().manual_seed(seed))
    assert one.ids == [f"id{index}" for index in expected[0].indices]
    assert other.ids == [f"id{index}" for index in expected[1].indices]
    assert one.labels == [index % 2 for index in expected[0].indices]
    assert set(one.ids) | set(other.ids) == set(images.ids)
    assert (one.split, other.split) == (f"train (80 %, seed {seed})", f"train (other 20 %, seed {seed})")


def test_random_split_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    random_split(make(tmp_path), 0.5, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0, 1.5, -0.5])
def test_random_split_without_two_parts(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UserError) as caught:
        random_split(make(tmp_path), fraction, 1)
    sentence(caught.value, "toy train", "6 images")


def test_data_names_its_selection(tmp_path: Path) -> None:
    train, val, test = (make(tmp_path, split=split) for split in ("train", "val", "test"))
    assert Data(train, val, test).selection == "validation-selected"
    assert Data(train, test.with_transform(None), test).selection == "test-selected"
    assert Data(train, val, test).classes == ["even", "odd"]


@pytest.mark.parametrize(("classes", "part"), [(["even", "prime"], "'odd'"), (["odd", "even"], "different order")])
def test_data_refuses_other_classes(tmp_path: Path, classes: list[str], part: str) -> None:
    train, test = make(tmp_path), make(tmp_path, split="test", classes=classes)
    for sets in ((train, test, train), (train, train, test)):
        with pytest.raises(UserError) as caught:
            Data(*sets)
        sentence(caught.value, "toy test", part)


# Fingerprints


def test_fingerprint_by_hand(tmp_path: Path) -> None:
    images = Images("toy", "s", ["b", "a/ü"], ["1", "2"], [1, 0], ["x", "y"])
    expected = hashlib.sha256("a/ü 0\nb 1\n".encode()).hexdigest()
    assert images.fingerprint() == {"split": "s", "count": 2, "classes": 2, "sha256": expected}


def test_fingerprint_ignores_order_place_and_transform_only(tmp_path: Path) -> None:
    images = make(tmp_path)
    print_ = images.fingerprint()
    assert images.subset([3, 1, 5, 0, 2, 4]).with_transform(len).fingerprint() == print_
    assert make(tmp_path / "elsewhere").fingerprint() == print_
    for other in (
        images.subset(range(5)),
        make(tmp_path, labels=[0, 1, 0, 1, 1, 0]),
        make(tmp_path, ids=list("abcdef")),
    ):
        assert other.fingerprint()["sha256"] != print_["sha256"]
