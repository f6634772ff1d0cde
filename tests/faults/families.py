"""All fault cases, in the order of the table."""

import importlib
from typing import Any

from faults.cases import Case

FAMILIES = ("crash", "processes", "disk", "untrusted_weights", "untrusted_data", "numbers", "determinism", "offline")


def _modules() -> list[Any]:
    return [importlib.import_module(f"faults.{name}") for name in FAMILIES]


def all_cases() -> list[Case]:
    return [case for module in _modules() for case in module.cases()]


def about() -> list[str]:
    """What families have to say on the page below the table: their ABOUT, markdown with a heading of its own."""
    return [module.ABOUT.strip() + "\n" for module in _modules() if hasattr(module, "ABOUT")]
