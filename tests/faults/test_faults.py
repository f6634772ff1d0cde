"""The part of the fault cases that `make test` runs, each as a test of its own."""

from pathlib import Path

import pytest

from faults import families
from faults.cases import Case

QUICK = [case for case in families.all_cases() if case.quick]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.section} | {case.title}")
def test_promise_is_kept(case: Case, tmp_path: Path) -> None:
    assert case.check(tmp_path) >= 1
