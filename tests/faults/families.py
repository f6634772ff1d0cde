"""All fault cases, in the order of the table."""

import importlib

from faults.cases import Case

FAMILIES = ("crash", "processes", "disk", "untrusted_weights", "untrusted_data", "numbers", "determinism", "offline")


def all_cases() -> list[Case]:
    return [case for name in FAMILIES for case in importlib.import_module(f"faults.{name}").cases()]
