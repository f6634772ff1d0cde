"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """Something the user can mend: one sentence that names the file or flag, what was expected and what to do.

    Programs print it without a traceback and exit non-zero; every other exception is a defect and keeps its traceback.
    """
