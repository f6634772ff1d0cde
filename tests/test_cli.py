"""common.cli: a dataclass becomes a command line."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from common.cli import TURNS_OFF, Flags, Options, parse
from common.errors import UserError
from common.predict import asked


@dataclass
class Recipe:
    name: str  # names the run
    img_size: int = 224  # pixels
    lr: float = 0.1  # learning rate, 5 % of
    # nothing of this is help
    decay: Literal["cosine", "linear"] = "cosine"  # how it falls
    clip: float | None = None  # of the gradient
    kind: Literal["a", "b"] | None = "a"  # or none
    fp16: bool = False  # half precision
    flip: bool = True  # mirror images
    crop: bool = field(default=True, metadata={TURNS_OFF: True})  # cut images
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of Adam
    seed: int = 0  # of all
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # more


def read(*words: str, **how: Any) -> tuple[Any, Any, dict[str, Any]]:
    return parse(Recipe, Options, "A program.", ["--name=x", *words], **how)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--img-size", "96"], "img_size", 96),
        (["--img_size=96"], "img_size", 96),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--decay", "linear"], "decay", "linear"),
        (["--clip", "2"], "clip", 2.0),
        (["--clip", "None"], "clip", None),
        (["--kind", "none"], "kind", None),
        (["--fp16"], "fp16", True),
        (["--no-flip"], "flip", False),
        (["--no_flip"], "flip", False),
        (["--crop"], "crop", False),
        (["--no-crop"], "crop", False),
        (["--betas", "0.5", "0.6"], "betas", [0.5, 0.6]),
        (["--model-kwargs", "depth=9", "act=gelu"], "model_kwargs", {"depth": 9, "act": "gelu"}),
        (["--model-kwargs", "size=(1,2)"], "model_kwargs", {"size": (1, 2)}),
        (["--model_kwargs"], "model_kwargs", {}),
        (["--resume"], "resume", "newest"),
        (["--resume", "runs/a_b-c"], "resume", "runs/a_b-c"),
        (["--predict", "a_b.jpg", "c"], "predict", ["a_b.jpg", "c"]),
        (["--workers", "0"], "workers", 0),
        (["--no-download"], "download", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("separator", ["-", "_"])
def test_every_annotation(words: list[str], name: str, value: Any, separator: str) -> None:
    recipe, options, given = read(*words, flag=Flags(separator))
    assert vars(recipe)[name] == value if name in vars(recipe) else vars(options)[name] == value
    assert given == {"name": "x", name: value}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--img-sice", "9"], "did you mean --img-size"),
        (["--img", "9"], "unrecognized"),  # no abbreviation: it may be another's whole name tomorrow
        (["--img-size", "9.5"], "invalid int value"),
        (["--clip", "x"], "invalid float value"),
        (["--decay", "none"], "invalid choice"),
        (["--no-fp16"], "unrecognized"),
        (["--model-kwargs", "depth"], "KEY=VALUE"),
        (["--serial", "1"], "--serial is a flag of another program"),
        (["--top", "1"], "unrecognized"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(*words, without=["top"], known={"serial": "is a flag of another program"})
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("words", [["--lr=0"], ["--lr=-1"], ["--lr=nan"], ["--clip=inf"], ["--seed=-1"], ["--limit=0"]])
def test_numbers_that_mean_nothing(words: list[str]) -> None:
    with pytest.raises(UserError, match=words[0].partition("=")[0]):
        read(*words)


def test_typed_wins_over_configured_wins_over_defaults() -> None:
    recipe, _, given = read("--lr=3", "--no-fp16", configure=lambda typed: {"lr": 2.0, "fp16": True, "img_size": 32})
    assert (recipe.lr, recipe.fp16, recipe.img_size, recipe.decay) == (3.0, False, 32, "cosine")
    assert given == {"name": "x", "lr": 3.0, "fp16": False}


def test_help_says_each_comment_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        r"--name S names the run \[required\]",
        r"learning rate, 5 % of \[0\.1\]",
        r"--flip, --no-flip mirror images \[on\]",
    ):
        assert re.search(part, text), part
    assert "nothing of this" not in text


def test_one_thing_at_a_time() -> None:
    assert not any(asked(Options(**mode)) for mode in ({}, {"resume": "auto"}))
    assert all(asked(Options(**mode)) for mode in ({"eval": "a"}, {"export": "b.onnx"}))
    for wrong in ({"eval": "a", "export": "b.pt2"}, {"out": "a.txt"}, {"export": "model.bin"}):
        with pytest.raises(UserError, match="--"):
            asked(Options(**wrong))
