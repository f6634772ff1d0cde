"""A data set's folder: its lists, read so that every missing or wrong file is one sentence with where to get it."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.io import loadmat

from common.data.facts import Facts, facts
from common.data.images import Images
from common.errors import UserError


class Rows(NamedTuple):
    """The images of a split, in the order of its list."""

    ids: list[str]  # unique
    files: list[str]  # relative to the data set's folder
    labels: list[int]  # from 0


class DatasetFolder:
    """The folder of one data set below a data root; file names are relative to it. All methods raise UserError.

    Attributes:
        root: the data root, absolute.
        path: the folder; one of the archive's own name (`Facts.also`) where that is what is there.
        flag: the option that names the root.
    """

    def __init__(self, facts: Facts, root: str | Path, flag: str = "--data-root") -> None:
        # abspath, not resolve: the user must recognise the folder that was typed, links included.
        self.facts, self.root, self.flag = facts, Path(os.path.abspath(Path(root).expanduser())), flag
        # Inside first: a folder in which an archive was unpacked holds nothing else.
        places = [*(f"{facts.folder}/{name}" for name in facts.also), facts.folder, *facts.also]
        self.path = next(
            (self.root / place for place in places if (self.root / place).is_dir()), self.root / facts.folder
        )

    def wrong(self, file: str | Path, problem: str) -> UserError:
        """The error for a file that is missing or cannot be right; `problem` is a verb phrase."""
        return UserError(
            f"{self.facts.title}: {self.path / file} {problem}; get {self.facts.title} from {self.facts.source} and "
            f"unpack it to {self.path}, or name another folder with {self.flag}"
        )

    def first(self, *files: str) -> str:
        """The first of several places of one file that exists, else the last."""
        return next((file for file in files if (self.path / file).exists()), files[-1])

    def text(self, file: str) -> str:
        try:
            text = (self.path / file).read_text(encoding="utf-8-sig")  # -sig: some editors begin with a byte order mark
        except (FileNotFoundError, NotADirectoryError):
            raise self.wrong(file, "is not there") from None
        except (OSError, UnicodeDecodeError) as error:
            raise self.wrong(file, f"cannot be read ({error})") from error
        if not text.strip():
            raise self.wrong(file, "is empty")
        return text

    def lines(self, file: str) -> list[str]:
        """The lines with something in them, stripped."""
        # Not splitlines(), which also cuts at characters that occur inside names.
        return [line.strip() for line in self.text(file).split("\n") if line.strip()]

    def pairs(self, file: str, at_last: bool = False) -> list[tuple[str, str]]:
        """Lines of two fields, cut at the first space (`at_last`: the last)."""
        pairs = []
        for line in self.lines(file):
            fields = line.rsplit(maxsplit=1) if at_last else line.split(maxsplit=1)
            if len(fields) != 2:
                raise self.wrong(file, f"has the line {line!r} where two fields are expected")
            pairs.append((fields[0], fields[1]))
        return pairs

    def by_id(self, file: str) -> dict[str, str]:
        """Lines `id value`, each id once."""
        pairs = self.pairs(file)
        self.require_unique(file, (first for first, _ in pairs))
        return dict(pairs)

    def labelled(self, file: str) -> tuple[list[str], list[int]]:
        """Lines `image label`, labels from 1: the images, each once, and the labels from 0."""
        pairs = self.pairs(file, at_last=True)
        self.require_unique(file, (image for image, _ in pairs))
        return [image for image, _ in pairs], [self.label(file, image, label) for image, label in pairs]

    def label(self, file: str, image: str, value: object) -> int:
        """A label from 1, which `file` gives an image, as one from 0."""
        digits = str(value).removesuffix(".0")  # MATLAB counts in floats
        if not digits.isdecimal() or not 1 <= int(digits) <= self.facts.classes:
            expected = f"where one of 1 to {self.facts.classes} is expected"
            raise self.wrong(file, f"gives the image {image} the label {digits!r} {expected}")
        return int(digits) - 1

    def json(self, file: str) -> Any:
        try:
            return json.loads(self.text(file))
        except ValueError as error:
            raise self.wrong(file, f"is cut short or not JSON ({error})") from error

    def mat(self, file: str, *variables: str) -> list[list[Any]]:
        """Variables of a MATLAB file, each a list of numbers, texts or (a struct array) dictionaries of these."""
        try:
            content = loadmat(self.path / file, simplify_cells=True)
            return [np.atleast_1d(content[variable]).tolist() for variable in variables]  # one entry alone is no list
        except FileNotFoundError:
            raise self.wrong(file, "is not there") from None
        except Exception as error:  # SciPy raises nearly anything for a damaged file
            reason = f"is cut short or no MATLAB file with {' and '.join(variables)} ({error})"
            raise self.wrong(file, reason) from error

    def require_unique(self, file: str, values: Iterable[Any]) -> None:
        for value, count in Counter(values).most_common(1):
            if count > 1:
                raise self.wrong(file, f"lists {value} {count} times")

    def require_images(self, files: Sequence[str]) -> None:
        """All these files are there. Each folder is listed once: 100,000 single questions take minutes on NFS."""
        present: dict[str, set[str]] = {}
        for file in files:
            parent = file.rpartition("/")[0]
            if parent not in present:
                if parent.startswith("/") or ".." in parent.split("/"):
                    raise self.wrong(file, "is listed, but does not lie below the data set's folder")
                place = self.path / parent
                present[parent] = set(os.listdir(place)) if place.is_dir() else set()
        absent = [file for file in files if file.rpartition("/")[2] not in present[file.rpartition("/")[0]]]
        if absent:
            raise self.wrong(absent[0], f"is not there ({len(absent):,} of {len(files):,} listed images are missing)")


def read_images(
    name: str, root: str | Path, split: str, lists: Callable[[DatasetFolder, str], tuple[Rows, list[str]]]
) -> Images:
    """One split of a data set from its `lists`, after a look whether all its images are there.

    Raises:
        UserError: a list or image is missing, a list is damaged, or there is no such split.
    """
    folder = open_folder(name, root, split)
    rows, classes = lists(folder, split)
    folder.require_images(rows.files)
    return Images(name, split, rows.ids, [f"{folder.path}/{file}" for file in rows.files], rows.labels, classes)


def open_folder(name: str, root: str | Path, split: str) -> DatasetFolder:
    """The folder of a data set that has this split."""
    data_set = facts(name)
    if split not in data_set.counts:
        raise UserError(f"{data_set.title} has the splits {', '.join(data_set.counts)}, not {split!r}")
    return DatasetFolder(data_set, root)
