"""Image files of every odd kind, and what `common.data.load_image` makes of them."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.data.images import MAX_PIXELS, MAX_RATIO, MAX_SCANS, BadImage, load_image
from common.errors import on_one_line

RED, BLUE = (200, 40, 20), (20, 40, 200)
SIZE = (24, 16)  # width, height


@dataclass(frozen=True)
class Kind:
    name: str
    done: str  # what becomes of it, for the page
    make: Callable[[Path], object]  # writes the file
    pixel: tuple[int, int, int] | None = None  # about the colour at (0, 0); none: it is refused
    size: tuple[int, int] = SIZE
    reason: str = ""  # a part of the sentence that refuses it

    def check(self, folder: Path) -> None:
        """Makes the file; AssertionError where something else becomes of it."""
        path = folder / "image.jpg"
        self.make(path)
        try:
            image = load_image(path)
        except BadImage as error:
            sentence = str(error)
            assert self.pixel is None, sentence
            assert self.reason in sentence, sentence
            assert sentence.startswith(f"{path}: not readable as an image, "), sentence
            assert on_one_line(sentence), sentence
            return
        assert self.pixel is not None, f"{self.name} was read"
        assert (image.mode, image.size) == ("RGB", self.size), image
        difference = np.abs(np.subtract(image.getpixel((0, 0)), self.pixel)).max()  # type: ignore[arg-type]
        assert difference <= 6, image.getpixel((0, 0))


def _saved(form: str, mode: str = "RGB", colour: Any = RED, size: tuple[int, int] = SIZE, **options: Any) -> Any:
    """A function that writes a picture of one colour."""

    def make(path: Path) -> None:
        picture = Image.new("RGB", size, colour).convert(mode) if isinstance(colour, tuple) else None
        (picture or Image.new(mode, size, colour)).save(path, format=form, **options)

    return make


def _bytes(content: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content())


def encoded(form: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture or Image.new("RGB", SIZE, RED)).save(file, format=form, **options)
    return file.getvalue()


def _frames() -> dict[str, Any]:
    return {"save_all": True, "append_images": [Image.new("RGB", SIZE, BLUE)]}


def png(width: int, height: int, rows: bytes, depth: int = 8, colours: int = 2, *before: tuple[bytes, bytes]) -> bytes:
    """A PNG of these compressed rows; `before` them further chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    chunks = ((b"IHDR", header), *before, (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, content) for name, content in chunks)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _black_png(width: int, height: int) -> bytes:
    """Complete: a byte for 8 pixels, and a thousandth of that."""
    return png(width, height, zlib.compress(bytes((1 + (width + 7) // 8) * height), 1), 1, 0)


def _png_16_bit_colour() -> bytes:
    row = b"\0" + struct.pack(">HHH", *(257 * value for value in RED)) * SIZE[0]
    return png(*SIZE, zlib.compress(row * SIZE[1]), 16)


def _png_with(name: bytes, head: bytes) -> bytes:
    """With a chunk of 64 MiB of zeros, compressed."""
    rows = zlib.compress((b"\0" + bytes(RED) * SIZE[0]) * SIZE[1])
    return png(*SIZE, rows, 8, 2, (name, head + zlib.compress(bytes(64 << 20))))


def _without_adobe() -> bytes:
    """A CMYK JPEG as programs other than Adobe's write it: no APP14."""
    content = encoded("JPEG", Image.new("RGB", SIZE, RED).convert("CMYK"), quality=95)
    at = content.index(b"\xff\xee")
    return content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded("JPEG", exif=exif)


def _many_scans() -> bytes:
    content = encoded("JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * MAX_SCANS + content[-2:]


def _with_a_film() -> bytes:
    """A JPEG with other data behind its end, as phones append a film: in them stands by chance what begins a scan."""
    return encoded("JPEG") + b"\xff\xda" * (MAX_SCANS + 1)


def _gif_header(width: int, height: int) -> bytes:
    content = bytearray(encoded("GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    at = content.index(b"\x2c")
    content[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(content)


def _tiff_header(width: int, height: int) -> bytes:
    content = bytearray(encoded("TIFF", compression="tiff_deflate"))
    (at,) = struct.unpack("<I", content[4:8])
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(content[at : at + 2], "little"), 12):
        value = {256: width, 257: height, 278: height}.get(int.from_bytes(content[entry : entry + 2], "little"))
        if value is not None:
            content[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(content)


def _webp_header(width: int, height: int) -> bytes:
    content = bytearray(encoded("WEBP", lossless=True))
    at = content.index(b"VP8L") + 9
    bits = (width - 1) | (height - 1) << 14 | int.from_bytes(content[at : at + 4], "little") & ~((1 << 28) - 1)
    content[at : at + 4] = bits.to_bytes(4, "little")
    return bytes(content)


def _link(path: Path) -> None:
    _saved("PNG")(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _socket(path: Path) -> None:
    # Relative: the name of a socket has 107 bytes at most.
    with _inside(path.parent), socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n%%EndComments\n(%pipe%touch executed) (w) file\nshowpage\n"
_NO_FORMAT = "its content is of none of the formats"
_BOMB = f"are more than {MAX_PIXELS:,}"
_NO_FILE = "a pipe, a socket or a device"
_WIDE = (MAX_RATIO * 3, 3)
_refused = "refused"

KINDS = (
    Kind("RGB, JPEG or progressive JPEG", "as stored", _saved("JPEG", progressive=True), RED),
    Kind("grey", "three equal channels", _saved("PNG", "L", 90), (90, 90, 90)),
    Kind("grey with alpha", "alpha dropped", _saved("PNG", "LA", (90, 90, 90)), (90, 90, 90)),
    Kind("black and white, 1 bit", "0 and 255", _saved("PNG", "1", 1), (255, 255, 255)),
    Kind("RGB with alpha", "alpha dropped, the colour below it kept", _saved("PNG", "RGBA"), RED),
    Kind("palette", "its colours", _saved("GIF", "P"), (204, 51, 0)),
    Kind(
        "palette with a transparent colour",
        "its colours, that one too",
        _saved("PNG", "P", transparency=180),
        (204, 51, 0),
    ),
    Kind("CMYK JPEG of Adobe", "as Pillow converts it", _saved("JPEG", "CMYK", quality=95), RED),
    Kind("CMYK JPEG without Adobe's mark", "taken for Adobe's, inverted", _bytes(_without_adobe), RED),
    Kind("16-bit grey", "scaled from 0..65535 to 0..255", _saved("PNG", "I;16", 90 * 257), (90, 90, 90)),
    Kind("16-bit colours", "the high byte of each", _bytes(_png_16_bit_colour), RED),
    Kind("32-bit grey beyond 16 bits, or floating point", _refused, _saved("TIFF", "I", 70_000), reason="grey levels"),
    Kind("animated GIF", "the first frame", _saved("GIF", **_frames()), RED),
    Kind("animated PNG", "the first frame", _saved("PNG", **_frames()), RED),
    Kind("animated WebP", "the first frame", _saved("WEBP", lossless=True, **_frames()), RED),
    Kind("TIFF of several pages", "the first", _saved("TIFF", **_frames()), RED),
    Kind("MPO (of a stereo camera)", "the first picture", _saved("MPO", **_frames()), RED),
    Kind("rotated by EXIF", "as stored, not turned: so the published code has it", _bytes(_rotated), RED),
    Kind("another suffix than its format", "goes by the content", _saved("WEBP", lossless=True), RED),
    Kind("1 x 1 pixel", "as stored", _saved("PNG", size=(1, 1)), RED, (1, 1)),
    Kind(f"one side {MAX_RATIO} times the other", "as stored", _saved("PNG", size=_WIDE), RED, _WIDE),
    Kind(
        f"one side more than {MAX_RATIO} times the other",
        "refused: a resize of the short side to 600 pixels would make 36 million of 1 x 60,000",
        _saved("PNG", size=(1, MAX_RATIO + 1)),
        reason="one side is over",
    ),
    Kind(
        f"exactly {MAX_PIXELS:,} pixels",
        "as stored",
        _bytes(lambda: _black_png(8192, MAX_PIXELS // 8192)),
        (0, 0, 0),
        (8192, MAX_PIXELS // 8192),
    ),
    Kind("one row more", _refused, _bytes(lambda: _black_png(8192, MAX_PIXELS // 8192 + 1)), reason=_BOMB),
    Kind("PNG whose header says 60,000 x 60,000", _refused, _bytes(lambda: png(60000, 60000, b"")), reason="exceeds"),
    Kind("GIF whose header says 9,000 x 9,000", _refused, _bytes(lambda: _gif_header(9000, 9000)), reason=_BOMB),
    Kind("TIFF whose header says 9,000 x 9,000", _refused, _bytes(lambda: _tiff_header(9000, 9000)), reason=_BOMB),
    Kind("WebP whose header says 9,000 x 9,000", _refused, _bytes(lambda: _webp_header(9000, 9000)), reason=_BOMB),
    Kind("JPEG with a film behind it", "as stored", _bytes(_with_a_film), RED),
    Kind("JPEG of more than 32 scans", "refused: each goes over all pixels", _bytes(_many_scans), reason="scans"),
    Kind("PNG with 64 MiB of text", _refused, _bytes(lambda: _png_with(b"zTXt", b"a\0\0")), reason="too large"),
    Kind(
        "PNG with a colour profile of 64 MiB",
        _refused,
        _bytes(lambda: _png_with(b"iCCP", b"a\0\0")),
        reason="too large",
    ),
    Kind("truncated JPEG", _refused, _bytes(lambda: encoded("JPEG")[:-20]), reason="runcated"),
    Kind("truncated PNG", _refused, _bytes(lambda: encoded("PNG")[:60]), reason="truncated"),
    Kind("empty file", _refused, _bytes(bytes), reason="the file is empty"),
    Kind("text", _refused, _bytes(lambda: b"<html>404</html>"), reason=_NO_FORMAT),
    Kind(
        "EPS, PDF, any other format",
        "refused: Pillow starts Ghostscript for EPS",
        _bytes(lambda: EPS),
        reason=_NO_FORMAT,
    ),
    Kind("no file", _refused, lambda path: None, reason="there is no such file"),
    Kind("folder", _refused, Path.mkdir, reason="Is a directory"),
    Kind("named pipe", "refused, not waited for", os.mkfifo, reason=_NO_FILE),
    Kind("socket", _refused, _socket, reason="No such device or address"),
    Kind("device", _refused, lambda path: path.symlink_to("/dev/zero"), reason=_NO_FILE),
    Kind("link to an image", "followed: data sets on clusters are links", _link, RED),
    Kind("link to itself", _refused, lambda path: path.symlink_to(path), reason="symbolic links"),
)


def about() -> str:
    rows = "\n".join(f"| {kind.name} | {kind.done} |" for kind in KINDS)
    return f"## Images: what is done with each kind\n\n| file | what is done |\n|---|---|\n{rows}\n"
