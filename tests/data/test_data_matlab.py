"""common.data.matlab: against SciPy on files that SciPy and MATLAB wrote; bombs and damage."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from common.data.matlab import MOST_BYTES, MOST_VALUES, read_matlab

OF_MATLAB = Path(scipy.io.__file__).parent / "matlab/tests/data"
# Not the kinds of a list: complex numbers, sparse arrays, objects, functions; and an array of structs without fields.
OTHER_KINDS = ("complex", "struct_6", "struct_7", "sparse", "object", "func", "empty_struct")


def saved(variables: dict[str, Any], compressed: bool = True) -> bytes:
    file = io.BytesIO()
    savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def flat(value: Any) -> Any:
    """What SciPy read, as `read_matlab` gives it."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.names:
        return [{name: flat(entry[name]) for name in value.dtype.names} for entry in value.ravel()]
    return [flat(entry) for entry in value.ravel()] if value.dtype == object else value.ravel().tolist()


def test_files_that_matlab_wrote() -> None:
    files = [
        file
        for file in sorted(OF_MATLAB.glob("test*_[67]*.mat"))
        if not any(kind in file.name for kind in OTHER_KINDS) and "hdf5" not in file.name
    ]
    if not files:
        pytest.skip("this SciPy was installed without its tests")
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {name: flat(value) for name, value in loadmat(file).items() if not name.startswith("__")}
        assert repr(read_matlab(file.read_bytes(), list(expected))) == repr(expected), file.name


TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=9
)
TEXTS = TEXTS.filter(lambda text: text.isascii() or all(ord(character) < 2**16 for character in text))
NUMBERS = st.one_of(st.integers(-(2**31), 2**31), st.floats(allow_nan=False), st.booleans().map(np.uint8))


def cells(values: list[Any]) -> np.ndarray:
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(NUMBERS, min_size=1, max_size=7),
    st.integers(1, 3),
    st.lists(st.one_of(TEXTS, NUMBERS, st.lists(TEXTS, min_size=1, max_size=3).map(cells)), min_size=1, max_size=5),
    st.lists(st.tuples(TEXTS, NUMBERS), min_size=1, max_size=4),
    st.booleans(),
)
def test_files_that_scipy_wrote(
    numbers: list[Any], rows: int, mixed: list[Any], entries: list[tuple[str, Any]], compressed: bool
) -> None:
    structs = np.empty((1, len(entries)), dtype=[("fname", object), ("class", object)])
    structs[0] = entries
    variables = {"numbers": np.array([numbers] * rows), "cells": cells(mixed), "structs": structs, "text": "a b"}
    content = saved(variables, compressed)
    expected = loadmat(io.BytesIO(content))
    assert repr(read_matlab(content, list(variables))) == repr({name: flat(expected[name]) for name in variables})
    assert list(read_matlab(content, ["structs"])) == ["structs"]


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def variable(kind: int, shape: tuple[int, ...], content: bytes) -> bytes:
    """A file of the variable `x`, which is not compressed."""
    sizes = struct.pack(f"<{len(shape)}i", *shape)
    inside = element(6, struct.pack("<II", kind, 0)) + element(5, sizes) + element(1, b"x") + content
    return b"MATLAB".ljust(124) + b"\x00\x01IM" + element(14, inside)


def compressed(content: bytes, said: int | None = None) -> bytes:
    """The same, compressed; `said` is what the variable says of its size."""
    inside = content[128:]
    inside = inside if said is None else inside[:4] + struct.pack("<I", said) + inside[8:]
    packed = zlib.compress(inside, 1)
    return content[:128] + struct.pack("<II", 15, len(packed)) + packed


CELL, CHAR, DOUBLE = 1, 4, 6
HOLLOW = element(14, b"")
DEEP = HOLLOW
for _ in range(20):
    DEEP = element(
        14, element(6, struct.pack("<II", CELL, 0)) + element(5, struct.pack("<2i", 1, 1)) + element(1, b"") + DEEP
    )

REFUSED = {
    "empty": (b"", "no header"),
    "version 7.3": (bytes(124) + b"\x00\x02IM", "not of a version before 7.3"),
    "fewer elements than it says": (variable(DOUBLE, (9, 1), element(9, bytes(64))), "more or fewer elements"),
    "2^62 cells": (variable(CELL, (2**31 - 1, 2**31 - 1), HOLLOW), f"more than {MOST_VALUES:,} values"),
    "many cells": (variable(CELL, (MOST_VALUES, 1), HOLLOW * MOST_VALUES), f"more than {MOST_VALUES:,} values"),
    "many numbers": (
        compressed(variable(DOUBLE, (MOST_VALUES, 1), element(2, bytes(MOST_VALUES)))),
        f"more than {MOST_VALUES:,} values",
    ),
    "deep": (variable(CELL, (1, 1), DEEP), "too deep"),
    "negative size": (variable(DOUBLE, (-1, 1), element(9, b"")), "no array"),
    "fields of no width": (variable(2, (1024, 1), element(5, bytes(4)) + element(1, b"abc")), "no field names"),
    "complex": (variable(DOUBLE | 0x800, (1, 1), element(9, bytes(8)) * 2), "an array of class 6"),
    "sparse": (variable(5, (1, 1), b""), "an array of class 5"),
    "half a character": (variable(CHAR, (1, 1), element(4, b"\x00\xd8")), "codec can't decode"),
    "a bomb": (
        compressed(variable(DOUBLE, (MOST_BYTES, 1), element(2, bytes(MOST_BYTES)))),
        "more than 12,582,912 bytes",
    ),
    "shorter than it says": (compressed(variable(DOUBLE, (1, 1), element(9, bytes(8))), 10_000), "cut short"),
    "longer than it says": (compressed(variable(DOUBLE, (1, 1), element(9, bytes(800))), 64), "longer than it says"),
    "wrong checksum": (compressed(variable(DOUBLE, (1, 1), element(9, bytes(8))))[:-1] + b"\x99", "damaged compressed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    content, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        read_matlab(content, ["x"])


@pytest.mark.parametrize("data_type", [8, 14, 99])
@pytest.mark.parametrize(("kind", "reason"), [(DOUBLE, "no numbers but"), (CHAR, "no text but")])
def test_data_types_that_there_are_not(kind: int, reason: str, data_type: int) -> None:
    """`scipy.io.loadmat` (1.17.1) ends the interpreter by a segmentation fault on each of these files of 200 bytes."""
    content = variable(kind, (1, 1), element(data_type, bytes(8)))
    for case in (content, compressed(content)):
        with pytest.raises(ValueError, match=f"{reason} the data type {data_type}$"):
            read_matlab(case, ["x"])


def test_a_variable_that_nobody_asks_for_is_not_unpacked() -> None:
    content = REFUSED["a bomb"][0] + saved({"y": [1, 2]})[128:]
    assert read_matlab(content, ["y"]) == {"y": [1, 2]}


def test_every_cut_is_refused() -> None:
    content = saved({"x": cells(["a", "bc"])}, compressed=False)
    for length in range(129, len(content)):
        with pytest.raises(ValueError, match="cut short"):
            read_matlab(content[:length], ["x"])
