"""common.data.json_lists: what `json.load` says of the same text, wherever the window on it ends, in less memory."""

import io
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import json_lists
from common.data.json_lists import read_lists

ENTRIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(
    st.sampled_from(["images", "other", "boxes", 'ä\\"']), st.lists(ENTRIES, max_size=5) | ENTRIES
)


def lists(content: bytes) -> dict[str, list[Any]] | None:
    return read_lists(
        io.BytesIO(content), dict.fromkeys(("images", "boxes"), lambda position, entry: (position, entry))
    )


def expected(content: bytes) -> dict[str, list[Any]] | None:
    whole = json.loads(content.decode("utf-8-sig"))
    if not isinstance(whole, dict):
        return None
    found = {name: whole[name] for name in ("images", "boxes") if isinstance(whole.get(name), list)}
    return {name: [*enumerate(entries)] for name, entries in found.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(OBJECTS | ENTRIES, st.sampled_from([1, 2, 7, 64]), st.sampled_from([None, 1]), st.booleans())
def test_equals_json_wherever_the_window_ends(whole: Any, chunk: int, indent: int | None, ascii_only: bool) -> None:
    content = json.dumps(whole, indent=indent, ensure_ascii=ascii_only).encode(errors="replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "CHUNK", chunk)
        assert lists(content) == expected(content)


@pytest.mark.parametrize(
    "text",
    [
        '{"images": [1, 2]', '{"images": [1, 2}', '{"images": [1 2]}', '{"images": [1, 2],}', '{"images" [1]}', "x",
        '{"images": [1,]}', '{"images": [1]} x', '{"images": [{"a": }]}', '{"images": ["a', '{"images": [tru', "[1, 2",
        '{"images": [\n1,\n x]}', '{"other": [\n1,\n x], "images": []}', "{1: 2}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 1000])
def test_what_is_no_json_is_refused_with_its_line(text: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "CHUNK", chunk)
    with pytest.raises(json.JSONDecodeError) as by_json:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        lists(text.encode())
    assert found.value.lineno == by_json.value.lineno


WHOLE = (
    '{"other": [true, null, -Infinity, NaN, -1.25e+300], \n"images": [{\n"a": "\\ud83d\\ude00 \\"", "b": {}}, -0.5]}'
)


def outcome(read: Callable[[bytes], Any], content: bytes) -> Any:
    """The line of an error, or what was read: as text, because NaN is not equal to itself."""
    try:
        return repr(read(content))
    except json.JSONDecodeError as error:
        return error.lineno


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
def test_any_one_character_that_is_missing_or_wrong(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "CHUNK", chunk)
    for at in range(len(WHOLE)):
        for instead in ("", "x", '"', "]", "1", "\\", WHOLE[at]):
            content = (WHOLE[:at] + instead + WHOLE[at + 1 :]).encode()
            assert outcome(lists, content) == outcome(expected, content), content


class Counted(io.BytesIO):
    """Counts the bytes that are read of it."""

    count = 0

    def read1(self, size: int | None = -1, /) -> bytes:
        found = super().read1(size)
        self.count += len(found)
        return found


@pytest.mark.parametrize(
    "start",
    [
        '{"images": [{"id": 1,, ',
        '{"images": [1x, ',
        '{"images": ["a"b, ',
        '{"images": [tru, ',
        '{"images": [1.x, ',
        '{"a": ["\n", ',
    ],
)
def test_an_early_error_is_told_early(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not after the whole file, 450 MB perhaps, has been taken into memory."""
    monkeypatch.setattr(json_lists, "CHUNK", 100)
    file = Counted(start.encode() + b"1, " * 100_000)
    with pytest.raises(json.JSONDecodeError):
        read_lists(file, {"images": lambda _, entry: entry})
    assert 0 < file.count < 30_000


def test_of_several_values_of_a_name_the_last_counts() -> None:
    for text in ('{"images": [1], "images": [2]}', '{"images": [1], "images": 2}', '{"images": 1, "images": [2]}'):
        assert lists(text.encode()) == expected(text.encode())


def test_a_byte_order_mark_and_an_empty_file() -> None:
    assert lists(b'\xef\xbb\xbf{"images": [1]}') == {"images": [(0, 1)]}
    for text in (b"", b" \n"):
        with pytest.raises(EOFError):
            lists(text)


def test_what_is_not_kept_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of 3 MB, of which the ids stay: with `json.load` all of them would be there at once."""
    monkeypatch.setattr(json_lists, "CHUNK", 1 << 14)
    entries = b", ".join(
        b'{"id": %d, "polygon": [%s]}' % (number, b", ".join([b"1.5"] * 600)) for number in range(1000)
    )
    file = io.BytesIO(b'{"boxes": [' + entries + b"]}")
    assert len(entries) > 3e6
    tracemalloc.start()
    found = read_lists(file, {"boxes": lambda _, entry: entry["id"]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == {"boxes": [*range(1000)]}
    assert peak < 1e6
