"""Images as they are after decoding and the resize (and centre crop) that their transform begins with, kept on disk.

--cache-resized says where. What comes back has the pixels that would be computed, bit for bit: they are kept raw, with
a checksum and a digest of all that they depend on. An entry that is damaged, cut short or of a file that has changed is
made anew.

    DIR/224x224-<versions>/<two digits>/<image>.rgb        the last three names are hashes
"""

import errno
import hashlib
import itertools
import os
import secrets
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import PIL
import torchvision
from PIL import Image, features
from torchvision import transforms as T

from common.data.images import BadImage, Data, Images, Transform, image_size, load_image
from common.errors import UserError
from common.files import write_atomically

FORMAT = 1  # raised where `load_image` comes to give other pixels, or an entry is laid out otherwise
RESERVE = 2 << 30  # bytes of the disk that stay free, for checkpoints
CODECS = ("jpg", "libjpeg_turbo", "webp", "libtiff")  # libraries that decide what Pillow decodes
SAMPLED = 64  # images whose headers say how much room others take
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what fails for one entry and will for the next
ABANDONED = 3600  # seconds after which nobody is writing a temporary file any more

_HEAD = struct.Struct("<16sIII")  # digest of what the pixels depend on, width, height, CRC-32 of all else


@dataclass
class Keep:
    """Takes a path for the image, decoded and (where there is a `resize`) resized: kept, or made and kept.

    Picklable; any number of processes may use one folder.
    """

    folder: Path
    resize: T.Compose | None
    full: bool = False  # nothing more is kept

    def __call__(self, path: Path) -> Image.Image:
        try:
            status = os.stat(path)
        except OSError:
            return self._make(path)  # which says what is wrong
        # Nobody can set the time of the last change of any kind (ctime): a file that got its old size and time back is
        # found out too.
        depends = (os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, self.folder.name)
        digest = hashlib.blake2b(repr(depends).encode(), digest_size=16).digest()
        entry = self.entry(path)
        image = _read(entry, digest)
        if image is None:
            image = self._make(path)
            self._write(entry, digest, image)
        return image

    def entry(self, path: Path) -> Path:
        """Where an image is kept: one place whatever is in its file, so that a changed one takes no more room."""
        name = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.rgb"

    def bytes_each(self, images: Images) -> float:
        """What an entry takes on average, as the headers of some images say."""
        sizes = []
        for index in range(0, len(images), -(-len(images) // SAMPLED)):
            with suppress(BadImage):  # which is said when its turn comes
                sizes.append(image_size(images.path(index)))
        if self.resize is not None:
            sizes = [self.resize(Image.new("L", size)).size for size in sizes]
        return _HEAD.size + 3 * sum(width * height for width, height in sizes) / max(1, len(sizes))

    def count_absent(self, images: Images) -> int:
        """How many of the images have no entry."""
        there = {str(entry) for entry in self.folder.glob("*/*.rgb")}
        return sum(str(self.entry(images.path(index))) not in there for index in range(len(images)))

    def _make(self, path: Path) -> Image.Image:
        image = load_image(path)
        return image if self.resize is None else self.resize(image)

    def _write(self, entry: Path, digest: bytes, image: Image.Image) -> None:
        if self.full:
            return
        pixels = image.tobytes()
        head = _HEAD.pack(digest, *image.size, _checksum(digest, image.size, pixels))
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(entry.parent).free < RESERVE + len(pixels):
                self._stop(f"less than {_gigabytes(RESERVE)} are free in {self.folder}")
                return
            write_atomically(entry, lambda file: file.writelines((head, pixels)), durable=False)
        except (OSError, UserError) as error:
            # Any other fault is this entry's alone: somebody may be removing the folder.
            if getattr(error.__cause__ or error, "errno", None) in NO_ROOM:
                self._stop(error)

    def _stop(self, reason: object) -> None:
        self.full = True
        print(f"the cache of resized images takes no more ({reason}): this goes on without", file=sys.stderr)


def _read(entry: Path, digest: bytes) -> Image.Image | None:
    """The image of an entry that depends on just this; None where there is none, or it is damaged."""
    try:
        with open(entry, "rb", buffering=0) as file:
            head, pixels = file.read(_HEAD.size), file.read()
    except OSError:
        return None
    if len(head) < _HEAD.size:
        return None
    found, width, height, checksum = _HEAD.unpack(head)
    if found != digest or checksum != _checksum(digest, (width, height), pixels):
        return None
    return Image.frombytes("RGB", (width, height), pixels)


def _checksum(digest: bytes, size: tuple[int, int], pixels: bytes) -> int:
    return zlib.crc32(pixels, zlib.crc32(repr((digest, size)).encode()))


def _split_off(transform: Transform | None) -> tuple[T.Compose | None, Transform | None]:
    """What a transform that begins with a resize does before chance comes in, and the rest of it."""
    if not isinstance(transform, T.Compose) or type(transform.transforms[0]) is not T.Resize:
        return None, transform
    fixed = list(itertools.takewhile(lambda step: type(step) in (T.Resize, T.CenterCrop), transform.transforms))
    return T.Compose(fixed), T.Compose(transform.transforms[len(fixed) :])


class Cache:
    """The folder that --cache-resized names.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, place: str | Path, flag: str = "--cache-resized") -> None:
        self.place, self.flag = Path(os.path.abspath(Path(place).expanduser())), flag
        probe = self.place / f".writable.{secrets.token_hex(4)}.tmp"
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # somebody may be removing the folder
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{flag} {place}: nothing can be written there ({reason}); name another folder") from error

    def of(self, images: Images) -> Images:
        """The same images under the same transform, whose beginning is kept; those in memory (CIFAR) as they are."""
        keep = self._keep(images)
        return images if keep is None else images.brought(keep, _split_off(images.transform)[1])

    def of_all(self, data: Data) -> Data:
        """`of` each split."""
        return Data(self.of(data.train), self.of(data.val), self.of(data.test))

    def plan(self, data: Data) -> str:
        """A sentence on the room that the images of an experiment take; what was long abandoned is removed.

        Raises:
            UserError: the disk has too little of it.
        """
        _remove_abandoned(self.place)
        splits = (data.train, data.val) if data.selection == "test-selected" else (data.train, data.val, data.test)
        keeps = [(images, keep) for images in splits if (keep := self._keep(images)) is not None]
        if not keeps:
            return f"{self.flag} changes nothing: the images of {data.train.name} are in memory"
        sizes = [keep.bytes_each(images) for images, keep in keeps]
        needed = sum(len(images) * size for (images, _), size in zip(keeps, sizes, strict=True))
        free = shutil.disk_usage(self.place).free
        if needed > free - RESERVE:
            absent = sum(keep.count_absent(images) * size for (images, keep), size in zip(keeps, sizes, strict=True))
            if absent > free - RESERVE:
                raise UserError(
                    f"{self.flag} {self.place}: {_gigabytes(absent)} of images are still to come, {_gigabytes(free)} "
                    f"are free and {_gigabytes(RESERVE)} have to stay so; name a folder on another disk, make room "
                    "there, or leave the flag out"
                )
        whole = " and ".join(images.split for images, keep in keeps if keep.resize is None)
        note = f"; {whole} whole, because the transform does not begin with a resize" if whole else ""
        return f"{self.flag}: up to {_gigabytes(needed)} of images in {self.place}, {_gigabytes(free)} are free{note}"

    def _keep(self, images: Images) -> Keep | None:
        if images.decode is not load_image:
            return None
        resize, _ = _split_off(images.transform)
        return Keep(_folder(self.place, resize), resize)


def _remove_abandoned(place: Path) -> None:
    """Removes old temporary files of entries: nobody can tell whether writers on other machines live."""
    for temporary in place.glob("*/[0-9a-f][0-9a-f]/.*.tmp"):
        with suppress(OSError):  # it has got its name meanwhile, or somebody else removed it
            if temporary.stat().st_mtime < time.time() - ABANDONED:
                temporary.unlink()


def _folder(place: Path, resize: T.Compose | None) -> Path:
    """The folder of images that are resized in this way, by these versions."""
    versions = [PIL.__version__, torchvision.__version__, *map(features.version, CODECS)]
    depends = hashlib.blake2b(repr((FORMAT, repr(resize), versions)).encode(), digest_size=4).hexdigest()
    sizes = [step.size for step in resize.transforms] if resize is not None else []
    names = ["x".join(map(str, size)) if isinstance(size, Sequence) else str(size) for size in sizes]
    return place / "-".join([*(names or ["whole"]), depends])


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
