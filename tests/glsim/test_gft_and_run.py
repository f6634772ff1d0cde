"""GFT under GLSim's training program, and scripts/run.sh: the released interface."""

import os
import subprocess
from pathlib import Path

import pytest
from scripts import ROOT, run_script

RUN = ROOT / "glsim" / "scripts" / "run.sh"
GLSIM = "--model_name vit_b16 --classifier cls --cfg_method configs/methods/glsim.yaml"


def test_gft_trains_two_steps_on_the_demo_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    method = ROOT / "glsim" / "configs" / "methods" / "gft.yaml"
    words = ("--cfg_method", method, "--demo", "--epochs", 1, "--batch_size", 8, "--limit", 16)
    trained = run_script("glsim/tools/train.py", *map(str, words), "--cpu_workers", "0", "--device", "cpu")
    assert trained.status == 0, trained.err
    assert trained.record["recipe"]["model_name"] == "gft"
    checkpoint = tmp_path / "results_train" / "demo_cub_gft_0" / "gft_best.pth"
    words_ = ("--demo", "--ckpt_path", str(checkpoint), "--vis_mask", "attention", "--device", "cpu")
    answered = run_script("glsim/tools/inference.py", *words_)
    assert answered.status == 0, answered.err
    assert len(list(Path("results_inference/gft").glob("*_attention.png"))) == 8


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    variables = os.environ | environment
    return subprocess.run([RUN, *words], cwd="/", env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--run",), [f"--serial 1 --cfg configs/cub_ft_is224_medaugs.yaml --seed 1 --lr 0.003 {GLSIM}"]),
        (
            ("--run_seed", "--lr", "0.01", "--model_name", "gft", "--dataset_name", "dogs", "--weak_augs", "--is_448"),
            [
                f"--serial 1 --cfg configs/dogs_ft_is224_weakaugs.yaml --seed {seed} --lr 0.01 --model_name gft "
                "--image_size 448"
                for seed in (1, 10, 100)
            ],
        ),
        (
            ("--run_lr", "--serial", "5"),
            [
                f"--serial 5 --cfg configs/cub_ft_is224_medaugs.yaml --seed 1 --lr {rate} {GLSIM} --train_trainval"
                for rate in ("0.03", "0.01", "0.003", "0.001")
            ],
        ),
    ],
)
def test_run_starts_the_released_commands(words: tuple[str, ...], expected: list[str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "started: $*"\n')
    python.chmod(0o755)
    printed = [f"python tools/train.py {line}" for line in expected]
    assert run(*words, "--dry-run").stdout.splitlines() == printed
    started = [f"started: tools/train.py {line}" for line in expected]
    done = run(*words, PYTHON=str(python))
    assert done.stdout.splitlines() == [line for pair in zip(printed, started, strict=True) for line in pair]


@pytest.mark.parametrize("words", [(), ("cub",), ("--dry-run",)])
def test_run_says_what_is_missing(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
