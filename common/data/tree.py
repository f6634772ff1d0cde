"""A data set's folder on disk: reading its lists, checking its files, and saying what is wrong with it.

Every reader starts here, so that every missing or damaged file gives one sentence with what was looked for,
where, and where to get it.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.data.json_lists import read_lists
from common.data.matlab import read_matlab
from common.data.published import Published
from common.errors import UserError
from common.files import open_plain

# A name that leads out of its folder, or could not be a line of a list.
_OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)|[\0-\x1f]")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")

Fields = Mapping[str, Mapping[str, type]]  # list of a JSON file -> what each of its entries has; the first is unique


def is_inside(name: str) -> bool:
    """Whether a list may name this file: below a folder, on one line."""
    return _OUTSIDE.search(name) is None


class Tree:
    """The folder of one published data set below a data root; its methods take paths relative to it.

    Attributes:
        root: the data root, absolute.
        path: the folder; one of the archive's own name (`Published.also`) where that is what is there.
    """

    def __init__(self, published: Published, root: str | Path) -> None:
        self.published = published
        # abspath, not resolve: the user must recognise the folder that was typed, links included.
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        # Inside first: a folder in which an archive was unpacked holds nothing else.
        inside = [f"{published.folder}/{name}" for name in published.also]
        places = [self.root / place for place in (*inside, published.folder, *published.also)]
        self.path = next((place for place in places if place.is_dir()), self.root / published.folder)

    def first(self, *relatives: str) -> str:
        """Of several places of one file or folder the first that exists, else the last."""
        return next((relative for relative in relatives if (self.path / relative).exists()), relatives[-1])

    def missing(self, what: str, where: Path, state: str = "is not there") -> UserError:
        """The error for something that is not there (or empty); `what` names it ("the list of classes")."""
        get = f"get {self.published.title} from {self.published.source} and unpack it to {self.path}"
        other = ", or name the folder above it with --data-root"
        if self.published.downloads:
            other = ", name the folder above it with --data-root, or leave out --no-download to have it downloaded"
        return UserError(f"{self.published.title}: {what} was looked for at {where} and {state}; {get}{other}.")

    def damaged(self, where: Path, problem: str) -> UserError:
        """The error for something that is there and cannot be right; `problem` is a verb phrase."""
        return UserError(
            f"{self.published.title}: {where} {problem}; "
            f"mend it, or remove it and get it again from {self.published.source}, or name another folder with "
            "--data-root."
        )

    def names(self, relative: str, what: str) -> set[str]:
        """Names of everything in a folder, listed once: 100,000 single questions take minutes on NFS.

        Raises:
            UserError: the folder is missing, empty or unreadable.
        """
        folder = self.path / relative
        try:
            names = set(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            raise self.missing(what, folder) from None
        except OSError as error:
            raise self.damaged(folder, f"cannot be listed ({error.strerror})") from error
        if not names:
            raise self.missing(what, folder, "is empty")
        return names

    def content(self, relative: str, what: str) -> bytes:
        """The bytes of a file; UserError when it is missing or unreadable."""
        with self.opened(relative, what) as file:
            return file.read()

    @contextmanager
    def opened(self, relative: str, what: str) -> Iterator[BinaryIO]:
        """A file to be read in the block; UserError when it is missing or unreadable."""
        file = self.path / relative
        try:
            with open_plain(file) as opened:
                yield opened
        except (FileNotFoundError, NotADirectoryError):
            raise self.missing(what, file) from None
        except OSError as error:
            raise self.damaged(file, f"cannot be read ({error.strerror})") from error

    def text(self, relative: str, what: str) -> str:
        """A text file, decoded as UTF-8; UserError when it is missing, empty, unreadable or not text."""
        try:
            # -sig: some editors put a byte order mark before the first line.
            text = self.content(relative, what).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise self.damaged(self.path / relative, "is not a text file") from None
        if not text.strip():
            raise self.damaged(self.path / relative, "is empty")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def lines(self, relative: str, what: str) -> list[str]:
        """The non-blank lines of a list file, stripped; errors as in `text`."""
        # Split at line feeds only: splitlines() would also cut at characters that occur inside names.
        return [line.strip() for line in self.text(relative, what).split("\n") if line.strip()]

    def pairs(self, relative: str, what: str, form: str, at_last: bool = False) -> list[tuple[int, str, str]]:
        """The non-blank lines of a list file: number, and the two parts left and right of the first space
        (`at_last`: the last).

        Raises:
            UserError: as in `text`, and when a line has one field only; `form` says what belongs there.
        """
        pairs = []
        for number, line in enumerate(self.text(relative, what).split("\n"), start=1):
            if not line.strip():
                continue
            first, *rest = line.strip().rsplit(maxsplit=1) if at_last else line.strip().split(maxsplit=1)
            if not rest:
                raise self.damaged(self.path / relative, f"has in line {number} no `{form}` ({line.strip()!r})")
            pairs.append((number, first, rest[0]))
        return pairs

    def labelled(self, relative: str, what: str, classes: int) -> tuple[list[str], list[int]]:
        """A list file of `file label` lines: the file names, and their 1-based labels as 0-based ones.

        Raises:
            UserError: as in `pairs` and `label`, and when a file is listed twice.
        """
        pairs = self.pairs(relative, what, "file label", at_last=True)
        self.require_unique(relative, (file for _, file, _ in pairs), "the image")
        labels = [self.label(relative, f"line {line}", file, value, classes) for line, file, value in pairs]
        return [file for _, file, _ in pairs], labels

    def label(self, relative: str, place: str, image: str, value: object, classes: int) -> int:
        """The 0-based form of a label of the file `relative`; UserError unless it is one of 1 to `classes`.

        `place` says where it stands there ("line 7").
        """
        digits = str(value)
        # Nine digits at most: int() refuses thousands of them.
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 10 and 1 <= int(digits) <= classes):
            raise self.damaged(
                self.path / relative,
                f"gives in {place} the image {image} the label {digits[:40]!r} where one of 1 to {classes} is expected",
            )
        return int(digits) - 1

    def mat(self, relative: str, what: str, *variables: str) -> list[list[Any]]:
        """Variables of a MATLAB file, each a list of numbers, strings, or (a struct array) dictionaries of them.

        Raises:
            UserError: the file is missing, unreadable, cut short or no MATLAB file of version 5 to 7.2, lacks a
                variable, or holds something else in it.
        """
        file = self.path / relative
        try:
            found = read_matlab(self.content(relative, what), variables)
        except ValueError as error:
            reason = f"is cut short or no MATLAB file (version 5 to 7.2) of a list ({error})"
            raise self.damaged(file, reason) from None
        lists = []
        for variable in variables:
            if not found.get(variable):
                raise self.damaged(file, f"has no list in the variable {variable}")
            try:
                lists.append([_plain(value) for value in found[variable]])
            except ValueError:
                raise self.damaged(file, f"has in the variable {variable} an entry that is not one value") from None
        return lists

    def json(self, relative: str, what: str) -> Any:
        """A JSON file; errors as in `text`, and when it is cut short or not JSON."""
        text = self.text(relative, what)
        try:
            content = json.loads(text)
            if _HALF_CHARACTER.search(text):  # without its other half it is no text: no file has such a name
                json.dumps(content, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # a ValueError: numbers of thousands of digits
            raise self._not_json(relative, error) from None
        return content

    def tables(self, relative: str, what: str, fields: Fields) -> dict[str, list[tuple[Any, ...]]]:
        """Lists of a JSON file by name, of each entry the values of the `fields` alone; errors as in `json`.

        Raises:
            UserError: a list is not there or empty, an entry lacks a field, or two have the same value of the first.
        """
        path = self.path / relative

        def maker(name: str) -> Callable[[int, Any], tuple[Any, ...]]:
            kinds = fields[name].items()

            def make(position: int, entry: Any) -> tuple[Any, ...]:
                values = []
                for field, kind in kinds:
                    value = entry.get(field) if isinstance(entry, dict) else None
                    if type(value) is not kind:  # not isinstance(): true and false are no ids
                        raise self.damaged(path, f"has no {field} in entry {position} of {name}")
                    if isinstance(value, str):
                        value.encode()  # a ValueError for half a character: no file has such a name
                    values.append(value)
                return tuple(values)

            return make

        try:
            with self.opened(relative, what) as file:
                lists = read_lists(file, {name: maker(name) for name in fields})
        except UnicodeDecodeError:
            raise self.damaged(path, "is not a text file") from None
        except EOFError:
            raise self.damaged(path, "is empty") from None
        except (ValueError, RecursionError) as error:
            raise self._not_json(relative, error) from None
        if lists is None:
            raise self.damaged(path, f"is not an object with a list of {next(iter(fields))}")
        for name, (key, *_) in fields.items():
            if not lists.get(name):
                raise self.damaged(path, f"has no list of {name}")
            self.require_unique(relative, (entry[0] for entry in lists[name]), f"in {name} the {key}")
        return lists

    def _not_json(self, relative: str, error: Exception) -> UserError:
        position = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        return self.damaged(self.path / relative, f"is cut short or not JSON{position}")

    def require_unique(self, relative: str, values: Iterable[Any], what: str) -> None:
        """Raises UserError when a value occurs twice in the file `relative`; `what` names one value."""
        for value, count in Counter(values).most_common(1):
            if count > 1:
                raise self.damaged(self.path / relative, f"lists {what} {value} {count} times")

    def require_images(self, list_file: str, relative: str, listed: Sequence[str]) -> None:
        """Raises UserError when a listed file is not in the folder `relative` or the folder below it that it names.

        So it does for a name that leads out of there (links inside do not count: whoever unpacked made them).
        """
        folders: dict[str, list[str]] = {}
        for path in listed:
            if not is_inside(path):
                raise self.damaged(
                    self.path / list_file, f"lists {path!r}, which is no file below {self.path / relative}"
                )
            folder, _, file = path.rpartition("/")
            folders.setdefault(folder, []).append(file)
        for folder, files in folders.items():
            place = f"{relative}/{folder}".rstrip("/")
            present = self.names(place, f"the folder of {len(files):,} listed images")
            absent = [file for file in files if file not in present]
            if absent:
                raise self.damaged(
                    self.path / place,
                    f"lacks {len(absent):,} of the {len(files):,} listed images, the first of them {absent[0]}",
                )

    def require_every_class(self, relative: str, classes: Sequence[str], labels: Iterable[int]) -> None:
        """Raises UserError when a class has no image in the file `relative`."""
        without = sorted(set(range(len(classes))) - set(labels))
        if without:
            raise self.damaged(
                self.path / relative,
                f"lists no image of {len(without)} of the {len(classes)} classes, "
                f"the first of them {classes[without[0]]!r}",
            )


def _plain(value: Any) -> Any:
    """What one element of a MATLAB array holds; ValueError when that is not one value."""
    while isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{len(value)} values")
        (value,) = value
    if isinstance(value, dict):  # an element of a struct array
        return {name: _plain(inner) for name, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
