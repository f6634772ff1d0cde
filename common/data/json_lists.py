"""The lists of a JSON file, entry by entry: as one object COCO's 450 MB of annotations would take a GB and more."""

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, TextIO, TypeVar

T = TypeVar("T")

CHUNK = 1 << 20  # characters that are read at once
_SPACE = re.compile(r"[ \t\n\r]*")
_CUT = 16  # characters: no word, escape or end of a number that the end of a window may cut is longer
_BEHIND = frozenset(",]}: \t\n\r")  # what may follow a value
_decode = json.JSONDecoder().raw_decode


def read_lists(file: BinaryIO, makers: Mapping[str, Callable[[int, Any], T]]) -> dict[str, list[T]] | None:
    """Those of the lists named in `makers` that the object in a file has, each entry as made of position and content.

    As for `json.load`, the last of several values of one name counts. None where the file holds no object.

    Raises:
        ValueError: the file is no JSON text; as JSONDecodeError it knows the line.
        EOFError: there is nothing in the file, which is closed in the end.
    """
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:  # -sig: some editors begin with a byte order mark
        return _read(_Text(text), makers)


def _read(text: "_Text", makers: Mapping[str, Callable[[int, Any], T]]) -> dict[str, list[T]] | None:
    if not text.next():
        raise EOFError
    lists: dict[str, list[T]] | None = None
    if text.next() == "{":
        lists = {}
        text.skip("{")
        more = text.next() != "}" or text.skip("}") != "}"
        while more:
            text.expect('"')
            name = text.value()
            text.skip(":")
            if name in makers and text.next() == "[":
                lists[name] = list(text.entries(makers[name]))
            else:
                text.value()
                lists.pop(name, None)
            more = text.skip(",}") == ","
    else:
        text.value()
    if text.next():
        raise text.wrong("extra data")
    return lists


class _Text:
    """A window on a text, which moves on and grows as far as one value needs."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.window, self.at, self.lines = "", 0, 0  # lines before the window

    def next(self) -> str:
        """The next character but white space; it stays. None at the end."""
        while True:
            self.at = _SPACE.match(self.window, self.at).end()  # type: ignore[union-attr]  # it matches nothing too
            if self.at < len(self.window):
                return self.window[self.at]
            if not self._grow():
                return ""

    def expect(self, characters: str) -> str:
        """The next character, which has to be one of these; it stays."""
        found = self.next()
        if not found or found not in characters:
            raise self.wrong(f"expecting one of {characters}")
        return found

    def skip(self, characters: str) -> str:
        """`expect`, and goes over it."""
        found = self.expect(characters)
        self.at += 1
        return found

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = _decode(self.window, self.at)
            except json.JSONDecodeError as error:
                unfinished = self._at_end(error.pos) or error.msg.startswith("Unterminated string")
                if unfinished and self._grow():
                    continue
                error.lineno += self.lines
                raise
            # A number may go on beyond the window, as 1.5 does after 1 and after "1.".
            if self.window[end : end + 1] in _BEHIND or not self._at_end(end) or not self._grow():
                self.at = end
                return value

    def entries(self, make: Callable[[int, Any], T]) -> Iterator[T]:
        """What is made of the entries of the list that comes next."""
        self.skip("[")
        more = self.next() != "]" or self.skip("]") != "]"
        position = 0
        while more:
            yield make(position, self.value())
            position += 1
            more = self.skip(",]") == ","

    def wrong(self, problem: str) -> json.JSONDecodeError:
        error = json.JSONDecodeError(problem, self.window, self.at)
        error.lineno += self.lines
        return error

    def _at_end(self, place: int) -> bool:
        """Whether what stands there may be another thing once the window has grown."""
        return place > len(self.window) - _CUT

    def _grow(self) -> bool:
        """Takes in as much again, and lets go of what was read; whether there was more."""
        rest = self.window[self.at :]
        new = self.file.read(max(CHUNK, len(rest)))
        if not new:
            return False
        self.lines += self.window.count("\n", 0, self.at)
        self.window, self.at = rest + new, 0
        return True
