"""Images with labels: the one data set class of all readers, and what an experiment is given (`Data`)."""

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from common.errors import UserError

Transform = Callable[[Image.Image], Any]
Decode = Callable[[Path], Image.Image]

# Not whatever Pillow can open: for some formats it starts other programs, EPS's being an interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class BadImage(UserError):
    """An image file that cannot be decoded."""

    @classmethod
    def because(cls, path: str | Path, reason: str) -> "BadImage":
        """The error for one file; `reason` says what is wrong with it."""
        return cls(
            f"{path}: not readable as an image, {reason.rstrip('.')}; replace it (python -m common.data check NAME "
            "--decode lists all such files of a data set)"
        )


def load_image(path: str | Path) -> Image.Image:
    """Decodes a file of one of FORMATS to an RGB image of its own size.

    - Grey, palette, CMYK, YCbCr, ... become RGB as Pillow converts them.
    - Transparency is dropped: the colour stored below it is kept, as `Image.convert("RGB")` and so
      torchvision's loader and the published code do.
    - 16-bit grey: 0..65535 is scaled to 0..255 (Pillow alone would clip everything above 255 to white). Of 16-bit
      colours the high byte is taken.
    - EXIF orientation is ignored and of several frames the first is taken, also as the published code does.

    Raises:
        BadImage: missing, empty, truncated or not an image; of more pixels than Pillow's limit; or grey levels without
            a known range (floats, 32-bit integers beyond 16 bits).
    """
    with _opened(path) as image:
        image.load()
        return _to_rgb(image)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image in pixels, as the header says them; BadImage as `load_image`."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image of which only the header is read. What goes wrong with it in the block becomes a BadImage."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise BadImage.because(path, "there is no such file") from None
    except UnidentifiedImageError:
        empty = os.path.getsize(path) == 0
        reason = "the file is empty" if empty else f"its content is of none of the formats {', '.join(FORMATS)}"
        raise BadImage.because(path, reason) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything for damaged bytes
        raise BadImage.because(path, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16, I;16L, I;16B, and I, which older Pillow gives for 16-bit PNG
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its grey levels {levels.min()}..{levels.max()} are not 16-bit")
        image = Image.fromarray(((levels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its grey levels are floating-point numbers without a known range")
    elif "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
        # Through the alpha form first: the direct way warns (palette) or does not exist (premultiplied).
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


class Images(Dataset[tuple[Any, int]]):
    """Labelled images, decoded when asked for.

    `images[i]` is `(transform(image), label)` with an RGB PIL image; without a transform, the image itself.
    The object never changes: `subset` and `with_transform` give new ones, so that two subsets cannot come to
    share a transform by accident.

    Attributes:
        name: data set ("food101").
        split: split of it ("train", or "train (80 %, seed 42)").
        ids: unique ids of the original lists, in their order.
        labels: 0-based class of each image.
        classes: class names; position = label.

    Args:
        paths: the file of each image, or whatever else `decode` takes.
        decode: path -> RGB image; picklable, because worker processes get it.
    """

    def __init__(
        self,
        name: str,
        split: str,
        ids: Sequence[str],
        paths: Sequence[str | Path],
        labels: Sequence[int],
        classes: Sequence[str],
        transform: Transform | None = None,
        decode: Decode = load_image,
    ) -> None:
        self.name = name
        self.split = split
        self.ids = list(ids)
        self.labels = [int(label) for label in labels]
        self.classes = list(classes)
        self._transform = transform
        self._decode = decode
        # Strings: Path objects would weigh several times as much in every worker.
        self._files = [os.fspath(path) for path in paths]
        self._validate()

    def _validate(self) -> None:
        title, count = f"{self.name} {self.split}", len(self.ids)
        if not (count == len(self._files) == len(self.labels)):
            raise ValueError(f"{title}: {count} ids, {len(self._files)} paths, {len(self.labels)} labels")
        if not self.ids:
            raise UserError(f"{title}: there are no images in it; ask for more")
        if min(self.labels) < 0 or max(self.labels) >= len(self.classes):
            smallest, largest = min(self.labels), max(self.labels)
            raise UserError(f"{title}: labels {smallest}..{largest} do not fit {len(self.classes)} classes")
        if len(set(self.ids)) < count:
            repeated, times = Counter(self.ids).most_common(1)[0]
            raise UserError(f"{title}: the image {repeated} occurs {times} times; each may occur once")

    @property
    def transform(self) -> Transform | None:
        """What is applied to each image; read-only, see `with_transform`."""
        return self._transform

    @property
    def decode(self) -> Decode:
        """What makes an image of a path."""
        return self._decode

    @property
    def paths(self) -> list[Path]:
        """The file of each image (a new list: for one image take `path`)."""
        return [self.path(index) for index in range(len(self))]

    def path(self, index: int) -> Path:
        """The file of one image."""
        return Path(self._files[index])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._decode(self.path(index))
        return (image if self._transform is None else self._transform(image)), self.labels[index]

    def __repr__(self) -> str:
        return f"Images({self.name} {self.split}: {len(self):,} images, {len(self.classes)} classes)"

    def subset(self, indices: Iterable[int], split: str | None = None) -> "Images":
        """The images at `indices`, in that order, with the same classes and transform; `split` renames it.

        Raises:
            UserError: no index, or one that occurs twice.
        """
        chosen = [int(index) for index in indices]
        return Images(
            self.name,
            self.split if split is None else split,
            [self.ids[index] for index in chosen],
            [self._files[index] for index in chosen],
            [self.labels[index] for index in chosen],
            self.classes,
            self._transform,
            self._decode,
        )

    def with_transform(self, transform: Transform | None) -> "Images":
        """The same images under another transform; this object keeps its own."""
        other = copy.copy(self)
        other._transform = transform
        return other

    def fingerprint(self) -> dict[str, str | int]:
        """What a record says about the data: split, count, number of classes, and a hash.

        The hash is SHA-256 over the lines "id label" (each ended by a line feed, UTF-8), sorted: the same
        for the same images with the same labels in any order, on any machine.
        """
        lines = sorted(f"{id_} {label}\n" for id_, label in zip(self.ids, self.labels, strict=True))
        return {
            "split": self.split,
            "count": len(self),
            "classes": len(self.classes),
            "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
        }


def random_split(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Two parts at random: int(fraction * n) images, and the rest.

    Exactly the indices that `torch.utils.data.random_split` draws with a generator of that seed, so that a
    published split can be made again.

    Raises:
        UserError: a part would be empty.
    """
    first = int(fraction * len(images))
    if not 0 < first < len(images):
        title = f"{images.name} {images.split}"
        raise UserError(f"{title}: {len(images)} images cannot be split into {fraction:g} and the rest: one is empty")
    indices: Any = range(len(images))  # Any: it is no Dataset, but length and items are all that is used
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.utils.data.random_split(indices, [first, len(images) - first], generator)
    percent, rest = (f"{100 * part:.6g}" for part in (fraction, 1 - fraction))
    return (
        images.subset(one.indices, f"{images.split} ({percent} %, seed {seed})"),
        images.subset(other.indices, f"{images.split} (other {rest} %, seed {seed})"),
    )


@dataclass
class Data:
    """The three sets of one experiment, each with its own transform.

    Raises:
        UserError: their class lists differ, so a label would mean two things.
    """

    train: Images
    val: Images
    test: Images

    def __post_init__(self) -> None:
        for other in (self.val, self.test):
            if other.classes != self.train.classes:
                title = f"{self.train.name} {self.train.split} and {other.name} {other.split}"
                differing = sorted(set(other.classes) ^ set(self.train.classes))
                detail = f"only one of them has {differing[0]!r}" if differing else "they are in different order"
                raise UserError(f"{title} have different classes: {detail}")

    def limited(self, count: int | None) -> "Data":
        """The first `count` images of each split; none: all."""
        if count is None:
            return self
        parts = (images.subset(range(min(count, len(images)))) for images in (self.train, self.val, self.test))
        return Data(*parts)

    @property
    def classes(self) -> list[str]:
        """Class names; position = label."""
        return self.train.classes

    @property
    def selection(self) -> str:
        """Whether the best epoch is chosen on the split that is also reported."""
        same = (self.val.name, self.val.split) == (self.test.name, self.test.split)
        return "test-selected" if same else "validation-selected"
