"""common.ask: what a trained model is not asked for together; what a machine lacks for it."""

from pathlib import Path

import pytest
from scripts import run_script

from common.errors import UserError
from common.experiment import Options
from common.session import explain_machine
from glsim.tools.train import EXPERIMENT
from glsim.train_utils.recipe import Recipe


@pytest.mark.parametrize(
    ("mode", "value", "words"),
    [
        ("--predict", "a.png", ("--cache-resized", "kept")),
        ("--export", "a.pt2", ("--cache-resized", "kept")),
        ("--export", "a.pt2", ("--compile",)),
        ("--export", "a.pt2", ("--deterministic",)),
        ("--export", "a.pt2", ("--amp-backend", "apex")),
        ("--export", "a.pt2", ("--top", "3")),
        ("--export", "a.pt2", ("--out", "a.csv")),
    ],
)
@pytest.mark.parametrize("script", ["gft_food101.py", "ffvt/train.py", "glsim/tools/train.py"])
def test_an_option_that_does_nothing_is_refused(
    script: str, mode: str, value: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = ("--name", "t") if script == "ffvt/train.py" else ()
    outcome = run_script(script, *named, mode, value, *words)
    flag = words[0] if script == "gft_food101.py" else "--" + words[0][2:].replace("-", "_")
    assert (outcome.status, outcome.err.partition("error: ")[2]) == (
        1,
        f"{flag} does nothing with {mode}: leave it out\n",
    )
    assert not list(tmp_path.iterdir())


def test_what_is_as_without_it_is_no_fault(tmp_path: Path) -> None:
    words = ("--export", tmp_path / "a.pt2", "--no-compile", "--amp-backend", "native", "--output", tmp_path)
    assert "does nothing" not in run_script("gft_food101.py", *words).err


def test_a_worker_that_was_killed_is_a_sentence_in_the_programs_own_words() -> None:
    said = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"
    with pytest.raises(UserError, match=r"--cpu_workers 0$"), explain_machine(EXPERIMENT, Recipe(), Options()):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match=r"^another$"), explain_machine(EXPERIMENT, Recipe(), Options()):
        raise RuntimeError("another")
