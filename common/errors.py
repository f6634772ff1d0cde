"""The one exception that is meant for the user's eyes."""

LONGEST = 2000  # characters of a sentence


class UserError(Exception):
    """Something the user can mend: one sentence that names the file or flag, what was expected and what to do.

    Programs print it without a traceback and exit with status 1. Every other exception is a defect and keeps its
    traceback. Line ends and control codes are shown escaped.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence[:LONGEST]))
