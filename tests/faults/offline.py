"""Nothing asks for the network but what was asked to: not imports, not local files, not the demos."""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scripts import ROOT

from faults.cases import COMMON, FFVT, GFT, GLSIM, Case
from faults.crash_runs import PROGRAMS, reference, server
from faults.disk import evaluation, folder_of, prediction, some_pictures

SECTION = "No network"
WRAPPER = str(Path(__file__).with_name("offline_run.py"))
# A hub's client counts its users where it may, and asks it for every file where it is not told to leave it.
VARIABLES = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_XET")
IMPORT_ALL = """
import importlib, pkgutil, runpy, sys
from pathlib import Path
import common, ffvt, glsim
names = []
for package in (common, ffvt, glsim):
    names += [name for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
scripts = [path.stem for path in Path(sys.argv[1]).glob("*_*.py")]
for name in names + scripts:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names), len(scripts))
"""


def imports(folder: Path) -> int:
    """Every module in one process, without the variables with which a user could close the network."""
    (folder / "all.py").write_text(IMPORT_ALL)
    report = folder / "report"
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    ended = subprocess.run(
        [sys.executable, "-m", "faults.offline_run", str(report), str(folder / "all.py"), str(ROOT)],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HOME": str(folder)},
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    assert report.read_text() == ""
    modules, scripts = map(int, ended.stdout.split()[-2:])
    assert scripts == 21
    assert modules > 60
    return modules + scripts


def closed(folder: Path, words: Sequence[str]) -> str:
    """Runs a program to which the network is closed; returns what it tried."""
    report = folder / "report"
    ended = server().run([WRAPPER, str(report), *words], folder, None)
    assert (ended.status, ended.err) == (0, ""), ended
    return report.read_text()


def programs(entry: str, folder: Path) -> int:
    """A demo trained, also from a file of weights, evaluated and asked."""
    program, like = PROGRAMS[entry], reference(entry)
    (folder / "runs").mkdir()
    (folder / "runs/demo-data").symlink_to(like.home / "runs/demo-data")
    finished = folder_of(like.home, program)
    weights = str(finished / "best.safetensors")
    from_file = {
        GFT: ["--weights", weights],
        FFVT: ["--pretrained_dir", weights],
        GLSIM: ["--ckpt_path", weights, "--transfer_learning"],
    }[entry]
    tried = [
        closed(folder, words)
        for words in (
            program.start(workers=2),
            [*program.start(workers=0), *from_file],
            evaluation(program, finished),
            prediction(program, finished, some_pictures(like.home)),
        )
    ]
    assert tried == [""] * 4, tried
    return 4


def the_guard(folder: Path) -> int:
    """The other rows mean something: what asks for the network is heard and refused."""
    program = """
import socket, urllib.request
for attempt in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=5),
    lambda: socket.getaddrinfo("huggingface.co", 443),
    lambda: urllib.request.urlopen("https://huggingface.co", timeout=5),
):
    try:
        attempt()
    except OSError as error:
        assert "the network is closed" in str(error), error
    else:
        raise SystemExit("not refused")
with socket.create_server(("127.0.0.1", 0)) as own:
    socket.create_connection(own.getsockname()).close()
"""
    (folder / "asks.py").write_text(program)
    tried = closed(folder, [str(folder / "asks.py")]).splitlines()
    assert len(tried) == 3, tried
    return 3


def cases() -> list[Case]:
    promise = "nothing is asked of the network"
    case = partial(Case, SECTION, promise=promise)
    rows = [
        Case(SECTION, "a program asks for the network", COMMON, "heard and refused by this test", "", the_guard, True),
        case("every module and script is imported", COMMON, name="", check=imports, quick=True),
    ]
    for entry in (GFT, FFVT, GLSIM):
        fault = "a demo is trained, also from a local file, evaluated and asked"
        rows.append(case(fault, entry, name="", check=partial(programs, entry), quick=entry == GFT))
    return rows
