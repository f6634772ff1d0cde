"""Variables of MATLAB files, versions 5 to 7.2, without SciPy: its reader can crash the interpreter on damaged bytes.

What the lists of data sets hold is read: numbers, strings, cell and struct arrays. The format is that of MathWorks'
"MAT-File Format" (2018), chapter 1.
"""

import math
import struct
import zlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

# What a compressed variable may unpack to, in bytes, and hold, in arrays and their elements: bounds of the memory that
# a small file can take. The largest list, of the 16,185 images of Stanford Cars, has 8 MiB and 240,000.
MOST_BYTES, MOST_VALUES = 12 * 2**20, 2**19
DEPTH = 8  # cells and structs inside each other; a list has 2

_MATRIX, _COMPRESSED = 14, 15  # data types
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _CHAR, _NUMERIC = 1, 2, 4, range(6, 16)  # array classes
_COMPLEX = 0x800
_HEADER = 128
_NAMED = 1024  # the bytes of a variable that surely hold its name


class _Array(NamedTuple):
    kind: int  # array class
    complex: bool
    shape: tuple[int, ...]
    name: str


def read_matlab(content: bytes, variables: Collection[str]) -> dict[str, list[Any]]:
    """Those of the `variables` that the content of a file holds.

    An array becomes the flat list of its elements, row by row: numbers, strings (a row of characters is one), a list
    for each cell, a dictionary of lists for each struct.

    Raises:
        ValueError: it is no such file, is cut short, or holds something else in a variable.
    """
    if len(content) < _HEADER or content[126:128] not in (b"IM", b"MI"):
        raise ValueError("no header of a MATLAB file")
    order = "<" if content[126:128] == b"IM" else ">"
    if struct.unpack(f"{order}H", content[124:126]) != (0x0100,):
        raise ValueError("not of a version before 7.3")
    found = {}
    elements = _Reader(content, order, _HEADER, len(content))
    while elements.at < elements.end:
        kind, start, end = elements.element()
        if kind == _MATRIX:
            name = _Reader(content, order, start, end).array().name
        else:
            variable = _Variable(content[start:end], order)
            name = _reader(variable.first(_NAMED), order).array().name
        if name in variables:
            reader = _Reader(content, order, start, end) if kind == _MATRIX else _reader(variable.whole(), order)
            found[name] = reader.values(DEPTH, [MOST_VALUES])
    return found


def _reader(content: bytearray, order: str) -> "_Reader":
    return _Reader(content, order, 0, len(content))


class _Variable:
    """A compressed matrix element, unpacked as far as it is asked for."""

    def __init__(self, data: bytes, order: str) -> None:
        self.stream, self.packed, self.content = zlib.decompressobj(), data, bytearray()
        if len(self.first(8)) < 8:
            raise ValueError("cut short")
        kind, self.size = struct.unpack(f"{order}II", self.content)
        if kind != _MATRIX:
            raise ValueError("no matrix inside of compressed bytes")
        self.content.clear()

    def first(self, count: int) -> bytearray:
        """At least so many bytes from the front, or all where there are not so many."""
        try:
            while len(self.content) < count and not self.stream.eof and self.packed:
                # In parts: zlib would keep all of it twice.
                self.content += self.stream.decompress(self.packed, min(count - len(self.content), 1 << 20))
                self.packed = self.stream.unconsumed_tail
        except zlib.error as error:
            raise ValueError("damaged compressed bytes") from error
        return self.content

    def whole(self) -> bytearray:
        """All bytes, of which there are as many as the element says: nothing more is unpacked."""
        if self.size > MOST_BYTES:
            raise ValueError(f"a variable of more than {MOST_BYTES:,} bytes")
        content = self.first(self.size + 1)  # zlib compares its checksum at the end
        if len(content) != self.size or not self.stream.eof:
            raise ValueError("a variable that is cut short, or longer than it says")
        return content


class _Reader:
    """Reads data elements from `at` to `end` of the data, each a type, a length and so many bytes."""

    def __init__(self, data: bytes | bytearray, order: str, at: int, end: int) -> None:
        self.data, self.order, self.at, self.end = data, order, at, end

    def element(self) -> tuple[int, int, int]:
        """Data type, start and end of the next element, which is left behind."""
        at = self.at + 8
        if at > self.end:
            raise ValueError("cut short")
        kind, size = struct.unpack_from(f"{self.order}II", self.data, self.at)
        if kind >> 16:  # the small form: both numbers in one, and the bytes in four
            self.at = at
            return kind & 0xFFFF, at - 4, at - 4 + min(kind >> 16, 4)
        if at + size > self.end:
            raise ValueError("cut short")
        # Compressed elements are the only ones that are not padded.
        self.at = min(at + size + (-size % 8 if kind != _COMPRESSED else 0), self.end)
        return kind, at, at + size

    def numbers(self) -> Sequence[int | float]:
        kind, start, end = self.element()
        if kind not in _NUMBERS:
            raise ValueError(f"no numbers but the data type {kind}")
        width = struct.calcsize(f"={_NUMBERS[kind]}")
        return struct.unpack_from(f"{self.order}{(end - start) // width}{_NUMBERS[kind]}", self.data, start)

    def text(self) -> str:
        kind, start, end = self.element()
        if kind not in _TEXTS:
            raise ValueError(f"no text but the data type {kind}")
        wide = _TEXTS[kind] in ("utf-16", "utf-32")
        return str(self.data[start:end], _TEXTS[kind] + {"<": "-le", ">": "-be"}[self.order] * wide)

    def array(self) -> _Array:
        """What a matrix element begins with."""
        flags, shape = self.numbers(), self.numbers()
        if len(flags) != 2 or not 2 <= len(shape) <= 32:
            raise ValueError("no array")
        flag, *_ = flags
        sizes = tuple(size for size in shape if isinstance(size, int) and size >= 0)
        if not isinstance(flag, int) or len(sizes) != len(shape):
            raise ValueError("no array")
        return _Array(flag & 0xFF, bool(flag & _COMPLEX), sizes, self.text())

    def values(self, depth: int, left: list[int]) -> list[Any]:
        """The elements of the array that this is; `left` counts down how many there may be in all."""
        if self.at == self.end:  # how an empty array inside another one may be written
            return []
        array = self.array()
        count = math.prod(array.shape)
        left[0] -= 1 + (count if array.kind != _CHAR else 0)
        if left[0] < 0:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        if array.kind == _CHAR:
            return _rows(self.text() if count else "", array.shape)
        if array.kind in _NUMERIC and not array.complex:
            return _row_by_row(list(self.numbers()), array.shape)
        if array.kind == _CELL:
            return _row_by_row([self._inner(depth, left) for _ in range(count)], array.shape)
        if array.kind == _STRUCT:
            names = self._field_names()
            structs = [{name: self._inner(depth, left) for name in names} for _ in range(count)]
            return _row_by_row(structs, array.shape)
        raise ValueError(f"an array of class {array.kind}")

    def _inner(self, depth: int, left: list[int]) -> list[Any]:
        """The elements of an array inside of another one."""
        kind, start, end = self.element()
        if kind != _MATRIX or not depth:
            raise ValueError("no array, or arrays too deep inside each other")
        return _Reader(self.data, self.order, start, end).values(depth - 1, left)

    def _field_names(self) -> list[str]:
        width = self.numbers()
        text = self.text()
        step = width[0] if len(width) == 1 else 0
        # A struct without fields could have any number of elements.
        if not isinstance(step, int) or not 0 < step <= len(text):
            raise ValueError("no field names")
        return [text[start : start + step].partition("\0")[0] for start in range(0, len(text), step)]


def _row_by_row(elements: list[Any], shape: Sequence[int]) -> list[Any]:
    """Elements in MATLAB's order, column by column, in ours."""
    if len(elements) != math.prod(shape):
        raise ValueError("more or fewer elements than the size of the array says")
    if sum(size != 1 for size in shape) < 2:
        return elements
    order = np.arange(len(elements)).reshape(shape, order="F").ravel()
    return [elements[position] for position in order]


def _rows(text: str, shape: Sequence[int]) -> list[str]:
    """The strings of a character array."""
    if not text:
        return []
    if math.prod(shape[:-1]) == 1:
        return [text]
    characters = _row_by_row(list(text), shape)
    return ["".join(characters[start : start + shape[-1]]) for start in range(0, len(text), shape[-1])]
