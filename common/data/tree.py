"""A data set's folder on disk: reading its lists, checking its files, and saying what is wrong with it.

Every reader starts here, so that every missing or damaged file gives one sentence with what was looked for,
where, and where to get it.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common.data.published import Published
from common.errors import UserError


class Tree:
    """The folder of one published data set below a data root; its methods take paths relative to it."""

    def __init__(self, published: Published, root: str | Path) -> None:
        self.published = published
        # abspath, not resolve: the user must recognise the folder that was typed, links included.
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        self.path = self.root / published.folder

    def missing(self, what: str, where: Path, state: str = "is not there") -> UserError:
        """The error for something that is not there (or empty); `what` names it ("the list of classes")."""
        get = f"get {self.published.title} from {self.published.source} and unpack it to {self.path}"
        other = ", name the folder above it with --data-root"
        if self.published.downloads:
            other += ", or leave out --no-download to have it downloaded"
        return UserError(f"{self.published.title}: {what} was looked for at {where} and {state}; {get}{other}.")

    def damaged(self, where: Path, problem: str) -> UserError:
        """The error for something that is there and cannot be right; `problem` is a verb phrase."""
        return UserError(
            f"{self.published.title}: {where} {problem}; "
            f"remove it and get it again from {self.published.source}, or name another folder with "
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

    def text(self, relative: str, what: str) -> str:
        """A text file, decoded as UTF-8; UserError when it is missing, empty, unreadable or not text."""
        file = self.path / relative
        try:
            text = file.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise self.missing(what, file) from None
        except OSError as error:
            raise self.damaged(file, f"cannot be read ({error.strerror})") from error
        except UnicodeDecodeError:
            raise self.damaged(file, "is not a text file") from None
        if not text.strip():
            raise self.damaged(file, "is empty")
        return text

    def lines(self, relative: str, what: str) -> list[str]:
        """The non-blank lines of a list file, stripped; errors as in `text`."""
        # Split at line feeds only: splitlines() would also cut at characters that occur inside names.
        return [line.strip() for line in self.text(relative, what).split("\n") if line.strip()]

    def json(self, relative: str, what: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
        """A JSON file; errors as in `text`, and when it is cut short or not JSON."""
        text = self.text(relative, what)
        try:
            return json.loads(text, object_hook=object_hook)
        except (json.JSONDecodeError, RecursionError) as error:
            position = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            raise self.damaged(self.path / relative, f"is cut short or not JSON{position}") from None

    def require_unique(self, relative: str, values: Iterable[Any], what: str) -> None:
        """Raises UserError when a value occurs twice in the file `relative`; `what` names one value."""
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise self.damaged(self.path / relative, f"lists {what} {value} {count} times")

    def require_images(self, relative: str, listed: Sequence[str]) -> None:
        """Raises UserError when a listed file name is not in the folder `relative`."""
        present = self.names(relative, f"the folder of {len(listed):,} listed images")
        absent = [name for name in listed if name not in present]
        if absent:
            raise self.damaged(
                self.path / relative,
                f"lacks {len(absent):,} of the {len(listed):,} listed images, the first of them {absent[0]}",
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
