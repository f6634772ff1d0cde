"""common.determinism: what is switched on, that it is switched off again, and what a record says of it."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT

from common.determinism import WORKSPACE, arithmetic, make_deterministic, settings_kept
from common.errors import UserError
from common.experiment import Options


def settings() -> dict[str, Any]:
    found = arithmetic(workers=0)
    assert found["cublas_workspace"] == os.environ.get(WORKSPACE)
    return found


@pytest.fixture
def otherwise(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings that are not PyTorch's defaults, to be found again afterwards."""
    monkeypatch.setenv(WORKSPACE, ":0:0")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    return settings()


def test_everything_is_on_inside_and_as_before_outside(otherwise: dict[str, Any]) -> None:
    with settings_kept():
        make_deterministic()
        inside = settings()
    wanted = {"deterministic_algorithms": True, "cudnn_deterministic": True, "cudnn_benchmark": False}
    assert inside == otherwise | wanted | {"cublas_workspace": ":4096:8"}
    assert settings() == otherwise


def test_everything_is_as_before_after_an_error_too(otherwise: dict[str, Any]) -> None:
    def work() -> None:
        with settings_kept():
            make_deterministic()
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert settings() == otherwise


def test_a_workspace_that_repeats_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with settings_kept():
        make_deterministic()
        assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.delenv(WORKSPACE)
    with settings_kept():
        make_deterministic()
        assert os.environ[WORKSPACE] == ":4096:8"
    assert WORKSPACE not in os.environ


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    def work(deterministic: bool) -> None:
        with settings_kept():
            if deterministic:
                make_deterministic()
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    with pytest.raises(UserError, match="--deterministic: put_ has no deterministic form") as told:
        work(deterministic=True)
    assert "\n" not in str(told.value)
    work(deterministic=False)
    with pytest.raises(RuntimeError, match="another fault"), settings_kept():
        raise RuntimeError("another fault")


def test_a_record_says_threads_workers_and_precision_of_matmul() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, tf32 in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            found = arithmetic(workers=3)
            assert (found["float32_matmul_precision"], found["tf32_in_matmul"]) == (precision, tf32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found["threads"], found["workers"]) == (torch.get_num_threads(), 3)


def test_it_is_off_unless_asked_for() -> None:
    assert Options().deterministic is False


@pytest.mark.parametrize("program", ["gft_food101.py", "ffvt/train.py", "glsim/tools/train.py"])
def test_every_program_has_the_flag(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(ROOT, program)), run_name="__main__")
    assert "--deterministic" in capsys.readouterr().out
