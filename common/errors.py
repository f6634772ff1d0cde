"""The one exception that is meant for the user's eyes, and how values from a file appear in it."""

import reprlib
import unicodedata

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's names of the kinds of letters that are not shown as they are
LONGEST = 2000  # characters of a sentence; a damaged file can hold names without end


class UserError(Exception):
    """Something the user can mend: one sentence that names the file or flag, what was expected and what to do.

    Programs print it without a traceback and exit non-zero; every other exception is a defect and keeps its traceback.
    Line ends and control codes, which words of a file may bring, are shown escaped.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(_shortened("".join(map(_shown, _shortened(sentence)))))


def on_one_line(text: str) -> bool:
    """Whether no letter of it is a control code, a line end or half of a character."""
    return text.isprintable() or not any(unicodedata.category(letter) in HIDDEN for letter in text)


def _shown(letter: str) -> str:
    return letter if on_one_line(letter) else ascii(letter)[1:-1]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 5 :]}"


def brief(value: object) -> str:
    """`repr` of a value from a file, cut short: a few bytes of YAML or a pickle can make a list of a billion."""
    return _BRIEF.repr(value)


class _Brief(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 1000 else f"<an integer of {value.bit_length()} bits>"


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 200, 200
