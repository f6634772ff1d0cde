"""requirements.lock and requirements-test.lock are in step with the ranges, hashed, and what make installs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
RUNTIME, TEST = "requirements.lock", "requirements-test.lock"
PIN = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][\w.+!]*( ; [^\\]+)? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
ENVIRONMENTS = [
    {
        "python_version": f"3.{minor}",
        "python_full_version": f"3.{minor}.1",
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    for minor in range(10, 15)
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]


def lines(lock: str) -> list[str]:
    return [
        line for line in (ROOT / lock).read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")
    ]


def pins(lock: str) -> list[Requirement]:
    return [Requirement(line.rstrip(" \\")) for line in lines(lock) if not line.startswith(" ")]


def versions(lock: str, environment: dict[str, str]) -> dict[str, str]:
    """What the lock installs there."""
    found: dict[str, str] = {}
    for pin in pins(lock):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in found, f"{pin.name} is pinned twice for one environment"
            found[pin.name] = str(pin.specifier).removeprefix("==")
    return found


def ranges(lock: str) -> list[Requirement]:
    wanted = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    if lock == TEST:
        project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
        extras = project["project"]["optional-dependencies"]
        wanted += [line for name in ("test", "demo", "export", "maintain") for line in extras[name]]
        wanted += project["build-system"]["requires"]
    return [Requirement(line) for line in wanted]


@pytest.mark.parametrize("lock", [RUNTIME, TEST])
def test_every_line_is_a_pin_or_a_hash_of_it(lock: str) -> None:
    """So there is no address of an index, no local path, no option, and nothing that is not hashed."""
    found = lines(lock)
    for line, after in zip(found, [*found[1:], ""], strict=True):
        assert (HASH if line.startswith(" ") else PIN).fullmatch(line), line
        assert line.endswith("\\") == after.startswith(" "), f"{line} is not followed by its hashes, or by too much"


@pytest.mark.parametrize("lock", [RUNTIME, TEST])
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: "{python_version}-{platform_machine}".format(**e))
def test_every_range_holds_its_pin(lock: str, environment: dict[str, str]) -> None:
    locked = versions(lock, environment)
    for wanted in ranges(lock):
        if wanted.marker is None or wanted.marker.evaluate(environment):
            name = wanted.name.lower().replace("_", "-")
            assert name in locked, f"{wanted} is not in {lock}: run `make lock`"
            assert locked[name] in wanted.specifier, (
                f"{lock} has {name} {locked[name]}, outside {wanted}: run `make lock`"
            )


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: "{python_version}-{platform_machine}".format(**e))
def test_what_runs_is_what_was_tested(environment: dict[str, str]) -> None:
    assert versions(RUNTIME, environment).items() <= versions(TEST, environment).items()


def installations(*words: str) -> list[str]:
    """The commands by which make installs packages, none of which is run."""
    command = ["make", "--dry-run", "--always-make", ".venv/.tested", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "LOCK"))}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if "pip install" in line]


def test_make_installs_nothing_but_the_locks() -> None:
    commands = installations()
    assert [command.split()[-1] for command in commands] == [RUNTIME, TEST]
    assert all("--require-hashes --no-deps -r" in command for command in commands)


def test_the_ranges_are_taken_where_that_was_said() -> None:
    assert [command.split()[-1] for command in installations("LOCK=")] == [
        "requirements.txt",
        "'.[test,demo,export,maintain]'",
    ]
