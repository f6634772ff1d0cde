"""A data set's folder on disk: reading its lists, checking its files, and saying what is wrong with it.

Every reader starts here, so that every missing or damaged file gives one sentence with what was looked for,
where, and where to get it.
"""

import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.data.published import Published
from common.errors import UserError

Content = TypeVar("Content")


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

    def _read(self, relative: str, what: str, read: Callable[[Path], Content]) -> Content:
        file = self.path / relative
        try:
            return read(file)
        except (FileNotFoundError, NotADirectoryError):
            raise self.missing(what, file) from None
        except OSError as error:
            raise self.damaged(file, f"cannot be read ({error.strerror})") from error

    def text(self, relative: str, what: str) -> str:
        """A text file, decoded as UTF-8; UserError when it is missing, empty, unreadable or not text."""
        try:
            # -sig: some editors put a byte order mark before the first line.
            text = self._read(relative, what, lambda file: file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            raise self.damaged(self.path / relative, "is not a text file") from None
        if not text.strip():
            raise self.damaged(self.path / relative, "is empty")
        return text

    def lines(self, relative: str, what: str) -> list[str]:
        """The non-blank lines of a list file, stripped; errors as in `text`."""
        # Split at line feeds only: splitlines() would also cut at characters that occur inside names.
        return [line.strip() for line in self.text(relative, what).split("\n") if line.strip()]

    def pairs(self, relative: str, what: str, form: str, at_last: bool = False) -> list[tuple[str, str]]:
        """The non-blank lines of a list file, each cut in two at its first space (`at_last`: its last).

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
            pairs.append((first, rest[0]))
        return pairs

    def labelled(self, relative: str, what: str, classes: int) -> tuple[list[str], list[int]]:
        """A list file of `file label` lines: the file names, and their 1-based labels as 0-based ones.

        Raises:
            UserError: as in `pairs` and `label`, and when a file is listed twice.
        """
        pairs = self.pairs(relative, what, "file label", at_last=True)
        files = [file for file, _ in pairs]
        self.require_unique(relative, files, "the image")
        return files, [self.label(relative, file, value, classes) for file, value in pairs]

    def label(self, relative: str, image: str, value: object, classes: int) -> int:
        """The 0-based form of a label of the file `relative`; UserError unless it is one of 1 to `classes`."""
        digits = str(value)
        # Nine digits at most: int() refuses thousands of them.
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 10 and 1 <= int(digits) <= classes):
            raise self.damaged(
                self.path / relative,
                f"gives the image {image} the label {digits[:40]!r} where one of 1 to {classes} is expected",
            )
        return int(digits) - 1

    def mat(self, relative: str, what: str, *variables: str) -> list[list[Any]]:
        """Variables of a MATLAB file, each a list of numbers, strings, or (a struct array) dictionaries of them.

        Raises:
            UserError: the file is missing, unreadable, cut short or no MATLAB file before version 7.3, lacks a
                variable, or holds something else in it.
        """
        from scipy.io import loadmat  # here: most readers do not need it

        file = self.path / relative
        content = self._read(relative, what, Path.read_bytes)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an unreadable variable: refused below
                found = loadmat(io.BytesIO(content), variable_names=variables)
        except Exception as error:
            # scipy answers damaged bytes with whatever it trips over: zlib.error, TypeError, MemoryError, ...
            raise self.damaged(file, "is cut short or no MATLAB file (before version 7.3)") from error
        lists = []
        for variable in variables:
            values = found.get(variable)
            if not isinstance(values, np.ndarray) or not values.size:
                raise self.damaged(file, f"has no list in the variable {variable}")
            try:
                lists.append([_plain(value) for value in values.ravel()])
            except ValueError:
                raise self.damaged(file, f"has in the variable {variable} an entry that is not one value") from None
        return lists

    def json(self, relative: str, what: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
        """A JSON file; errors as in `text`, and when it is cut short or not JSON."""
        text = self.text(relative, what)
        try:
            return json.loads(text, object_hook=object_hook)
        except (json.JSONDecodeError, RecursionError) as error:
            position = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            raise self.damaged(self.path / relative, f"is cut short or not JSON{position}") from None

    def table(
        self, relative: str, content: Any, name: str, fields: dict[str, type], key: str = "id"
    ) -> list[dict[str, Any]]:
        """The list `name` in the content of a JSON file.

        Raises:
            UserError: there is no such list, an entry lacks one of the `fields`, or two have the same `key`.
        """
        path = self.path / relative
        if not isinstance(content, dict):
            raise self.damaged(path, f"is not an object with a list of {name}")
        table = content.get(name)
        if not isinstance(table, list) or not table:
            raise self.damaged(path, f"has no list of {name}")
        for position, entry in enumerate(table):
            for field, kind in fields.items():
                # type(), not isinstance(): true and false are no ids.
                if not isinstance(entry, dict) or type(entry.get(field)) is not kind:
                    raise self.damaged(path, f"has no {field} in entry {position} of {name}")
        self.require_unique(relative, (entry[key] for entry in table), f"in {name} the {key}")
        return table

    def require_unique(self, relative: str, values: Iterable[Any], what: str) -> None:
        """Raises UserError when a value occurs twice in the file `relative`; `what` names one value."""
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise self.damaged(self.path / relative, f"lists {what} {value} {count} times")

    def require_images(self, relative: str, listed: Sequence[str]) -> None:
        """Raises UserError when a listed file is not in the folder `relative` or the folder below it that it names."""
        folders: dict[str, list[str]] = {}
        for path in listed:
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
    """What one cell of a MATLAB array holds; ValueError when that is not one value."""
    if isinstance(value, np.void):  # an entry of a struct array
        return {name: _plain(value[name]) for name in value.dtype.names or ()}
    # item(), not int() or str(): NumPy 2.4 refuses arrays there, even those of one element.
    while isinstance(value, np.ndarray | np.generic):
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() else value
