"""common.data.images: decoding, validation, subsets, splits, transforms, fingerprints."""

import hashlib
import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tiny_trees import sentence, write_image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from common.data import BadImage, Data, Images, load_image, random_split
from common.data.images import image_size
from common.errors import UserError

RED, BLUE = (200, 40, 20), (20, 40, 200)


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


# Decoding


def encoded(form: str, mode: str = "RGB", colour: Any = RED, **options: Any) -> bytes:
    """A picture of one colour; one of three numbers is converted to the mode."""
    picture = Image.new("RGB", (24, 16), colour).convert(mode) if isinstance(colour, tuple) else None
    file = io.BytesIO()
    (picture or Image.new(mode, (24, 16), colour)).save(file, form, **options)
    return file.getvalue()


def png_16_bit() -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = (b"\0" + struct.pack(">HHH", *(257 * value for value in RED)) * 24) * 16
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded("JPEG", exif=exif)


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), BLUE)]}
GOOD = {
    "progressive JPEG": (encoded("JPEG", progressive=True), RED),
    "grey": (encoded("PNG", "L", 90), (90, 90, 90)),
    "grey with alpha": (encoded("PNG", "LA", (90, 90, 90)), (90, 90, 90)),
    "1 bit": (encoded("PNG", "1", 1), (255, 255, 255)),
    "alpha": (encoded("PNG", "RGBA"), RED),
    "palette": (encoded("GIF", "P", (204, 51, 0)), (204, 51, 0)),
    "palette with a transparent colour": (encoded("PNG", "P", (204, 51, 0), transparency=180), (204, 51, 0)),
    "a transparent colour": (encoded("PNG", transparency=RED), RED),
    "CMYK": (encoded("JPEG", "CMYK", quality=95), RED),
    "16-bit grey": (encoded("PNG", "I;16", 90 * 257), (90, 90, 90)),
    "16-bit colours, the high byte of each": (png_16_bit(), RED),
    "animated GIF, first frame": (encoded("GIF", **FRAMES), RED),
    "animated WebP, first frame": (encoded("WEBP", lossless=True, **FRAMES), RED),
    "MPO, first picture": (encoded("MPO", **FRAMES), RED),
    "rotated by EXIF, not turned": (rotated(), RED),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_kind_of_image_becomes_rgb(kind: str, tmp_path: Path) -> None:
    """Whatever the suffix says; Pillow's warning of transparency that is lost would be an error."""
    content, colour = GOOD[kind]
    (tmp_path / "a.jpg").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(tmp_path / "a.jpg")
    assert (image.mode, image.size) == ("RGB", (24, 16))
    assert np.abs(np.asarray(image, dtype=int) - colour).max() <= 6
    assert image_size(tmp_path / "a.jpg") == (24, 16)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    assert np.asarray(load_image(tmp_path / f"a.{suffix}"))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n%%EndComments\n(%pipe%touch executed) (w) file\nshowpage\n"
BAD = {
    "truncated JPEG": (encoded("JPEG")[:-20], "runcated"),
    "truncated PNG": (encoded("PNG")[:60], "truncated"),
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "none of the formats"),
    "EPS, for which Pillow starts Ghostscript": (EPS, "none of the formats"),
    "32-bit grey": (encoded("TIFF", "I", 70_000), "grey levels"),
    "grey in floating point": (encoded("TIFF", "F", 0.5), "grey levels"),
    "missing": (None, "there is no such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_in_one_sentence(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, reason = BAD[kind]
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImage) as caught:
        Images("toy", "train", ["a"], [tmp_path / "a.jpg"], [0], ["only"])[0]
    sentence(caught.value, tmp_path / "a.jpg", reason, "python -m common.data check NAME --decode")
    assert not (tmp_path / "executed").exists()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as it leaves a worker
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False  # for everyone


# The data set


def test_items_labels_paths(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / "deep" / f"{number}.png", (number, 0, 0))
    images = make(tmp_path / "deep", 3)
    assert [(images[i][0].getpixel((0, 0))[0], images[i][1]) for i in range(len(images))] == [(0, 0), (1, 1), (2, 0)]
    assert images.paths == [tmp_path / "deep" / f"{number}.png" for number in range(3)]
    assert images.path(2) == images.paths[2]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
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


def test_subset_keeps_order_and_classes_and_refuses_repetition(tmp_path: Path) -> None:
    images = make(tmp_path)
    part = images.subset([5, 1, 2], split="few")
    assert (part.ids, part.labels, part.classes, part.split) == (
        ["id5", "id1", "id2"],
        [1, 1, 0],
        images.classes,
        "few",
    )
    assert part.paths == [images.path(5), images.path(1), images.path(2)]
    for indices in ([], [1, 1]):
        with pytest.raises(UserError):
            images.subset(indices)


def test_workers_get_it_pickled(tmp_path: Path) -> None:
    for number in range(6):
        write_image(tmp_path / f"{number}.png", (number, 0, 0))
    images = pickle.loads(pickle.dumps(make(tmp_path, transform=v2.PILToTensor())))  # as a spawned worker gets it
    batches = list(DataLoader(images, batch_size=4, num_workers=1))
    assert torch.cat([labels for _, labels in batches]).tolist() == images.labels
    assert torch.cat([pixels for pixels, _ in batches])[:, 0, 0, 0].tolist() == list(range(6))


# Splits


@pytest.mark.parametrize("seed", [0, 42])
def test_random_split_is_that_of_torch(tmp_path: Path, seed: int) -> None:
    images, state = make(tmp_path, 103), torch.get_rng_state()
    one, other = random_split(images, 0.8, seed)
    assert torch.equal(torch.get_rng_state(), state)
    expected = torch.utils.data.random_split(images, [82, 21], generator=torch.Generator().manual_seed(seed))
    assert one.ids == [f"id{index}" for index in expected[0].indices]
    assert other.ids == [f"id{index}" for index in expected[1].indices]
    assert (one.split, other.split) == (f"train (80 %, seed {seed})", f"train (other 20 %, seed {seed})")


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0, -0.5])
def test_random_split_without_two_parts(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UserError) as caught:
        random_split(make(tmp_path), fraction, 1)
    sentence(caught.value, "toy train", "6 images")


def test_data_names_its_selection_and_can_be_cut(tmp_path: Path) -> None:
    train, val, test = (make(tmp_path, split=split) for split in ("train", "val", "test"))
    assert Data(train, val, test).selection == "validation-selected"
    assert Data(train, test.with_transform(None), test).selection == "test-selected"
    few = Data(train, val, test).limited(2)
    assert [few.train.ids, few.val.ids, few.test.ids] == [["id0", "id1"]] * 3


@pytest.mark.parametrize(("classes", "part"), [(["even", "prime"], "'odd'"), (["odd", "even"], "different order")])
def test_data_refuses_other_classes(tmp_path: Path, classes: list[str], part: str) -> None:
    train, test = make(tmp_path), make(tmp_path, split="test", classes=classes)
    for sets in ((train, test, train), (train, train, test)):
        with pytest.raises(UserError) as caught:
            Data(*sets)
        sentence(caught.value, "toy test", part)


def test_fingerprint_by_hand() -> None:
    images = Images("toy", "s", ["b", "a/ü"], ["1", "2"], [1, 0], ["x", "y"])
    expected = hashlib.sha256("a/ü 0\nb 1\n".encode()).hexdigest()
    assert images.fingerprint() == {"split": "s", "count": 2, "classes": 2, "sha256": expected}
    assert images.subset([1, 0]).with_transform(len).fingerprint() == images.fingerprint()
