"""Demo data, written once for all data tests; a test that changes it copies it first."""

from pathlib import Path

import pytest

from common.data.demo import write_demo
from common.data.facts import data_sets


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    for name in sorted(data_sets()):  # air before aircraft, whose folder it would take for its own
        write_demo(name, root)
    return root
