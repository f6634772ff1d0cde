"""common.recipe: a dataclass as a command line; what is written here by hand is what argparse must make of it."""

import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from common.recipe import OPTIONAL_VALUE, field_comments, parse


@dataclass
class Recipe:
    """A docstring: it has no comment."""

    epochs: int = 30  # passes over the data
    lr: float = 1e-5  # 50% of the published one, 100 %(s) honest
    name: str = "vit.tag"  # of the model # with a second mark
    kind: Literal["cosine", "step"] = "cosine"  # which schedule
    seed: int | None = 42  # none: drawn
    weight_decay: float | None = None
    path: str | None = None  # a path
    flip: bool = False  # mirror
    amp: bool = True  # on by default
    words: list[str] = field(default_factory=list)  # any number
    images: list[str] | None = None  # files
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # more arguments
    wrapped_by_a_formatter: bool = (
        False  # so long a comment that the formatter wraps the field: it is then not on the first line of the field
    )
    # A comment of its own line belongs to nothing.
    last: int = 1  # last

    def method(self) -> int:
        epochs: int = 3  # not a field
        return epochs


@dataclass
class Running:
    device: str = "auto"  # where
    resume: str | None = field(default=None, metadata={OPTIONAL_VALUE: "the newest"})  # go on


def given(*words: str) -> dict[str, Any]:
    return parse(Recipe, Running, "", list(words))[2]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that these words are refused with."""
    with pytest.raises(SystemExit) as leaving:
        parse(Recipe, Running, "", list(words))
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


def test_without_words_everything_is_the_default() -> None:
    recipe, options, overrides, chosen = parse(Recipe, Running, "", [])
    assert (recipe, options, overrides, chosen) == (Recipe(), Running(), {}, {})


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--epochs", "2"], "epochs", 2),
        (["--epochs=2"], "epochs", 2),
        (["--lr", "1e-4"], "lr", 1e-4),
        (["--lr=-0.5"], "lr", -0.5),
        (["--name", "a_b-c"], "name", "a_b-c"),
        (["--name=--a_b=c"], "name", "--a_b=c"),
        (["--name", "none"], "name", "none"),
        (["--kind", "step"], "kind", "step"),
        (["--seed", "7"], "seed", 7),
        (["--seed", "none"], "seed", None),
        (["--seed=None"], "seed", None),
        (["--weight-decay", "0.1"], "weight_decay", 0.1),
        (["--weight_decay", "none"], "weight_decay", None),
        (["--weight_decay=0.1"], "weight_decay", 0.1),
        (["--path", "a_b"], "path", "a_b"),
        (["--path=none"], "path", None),
        (["--flip"], "flip", True),
        (["--amp"], "amp", True),
        (["--no-amp"], "amp", False),
        (["--no_amp"], "amp", False),
        (["--words", "a", "b_c", "none"], "words", ["a", "b_c", "none"]),
        (["--images", "x.jpg"], "images", ["x.jpg"]),
        (["--model-kwargs"], "model_kwargs", {}),
        (["--wrapped_by_a_formatter"], "wrapped_by_a_formatter", True),
    ],
)
def test_every_kind_of_field(words: list[str], name: str, value: Any) -> None:
    recipe, options, overrides, chosen = parse(Recipe, Running, "", words)
    assert overrides == {name: value}
    assert type(overrides[name]) is type(value)
    assert recipe == Recipe(**{name: value})
    assert (options, chosen) == (Running(), {})


def test_options_are_no_overrides() -> None:
    recipe, options, overrides, chosen = parse(Recipe, Running, "", ["--device", "cpu", "--epochs", "1"])
    assert (options, overrides, recipe) == (Running(device="cpu"), {"epochs": 1}, Recipe(epochs=1))
    assert chosen == {"device": "cpu"}


def test_a_default_that_was_given_is_told_from_one_that_was_not() -> None:
    assert parse(Recipe, Running, "", ["--device", Running().device])[3] == {"device": Running().device}


def test_a_flag_that_may_stand_alone() -> None:
    for words, value in (
        (["--resume"], "the newest"),
        (["--resume", "d"], "d"),
        ([], None),
        (["--resume", "none"], None),
    ):
        assert parse(Recipe, Running, "", words)[1].resume == value


def test_key_value_words() -> None:
    words = ["depth=9", "act_layer=gelu", "ratio=0.5", "on=True", "none=None", "sizes=(2, 3)", "text='a b'", "eq=a=b"]
    assert given("--model-kwargs", *words) == {
        "model_kwargs": {
            "depth": 9,
            "act_layer": "gelu",
            "ratio": 0.5,
            "on": True,
            "none": None,
            "sizes": (2, 3),
            "text": "a b",
            "eq": "a=b",
        }
    }


@pytest.mark.parametrize("text", ["{1, 2}", "b'x'", "1j", "(" * 5000, "__import__('os').getcwd()", "", "[1", "-"])
def test_a_value_that_json_cannot_hold_or_python_not_read_is_a_word(text: str) -> None:
    assert given("--model-kwargs", f"a={text}") == {"model_kwargs": {"a": text}}


@pytest.mark.parametrize("flag", [["--local-rank", "1"], ["--local_rank", "1"], ["--local-rank=1"], ["--local_rank=1"]])
def test_the_launchers_rank_is_ignored(flag: list[str]) -> None:
    recipe, options, overrides, chosen = parse(Recipe, Running, "", [*flag, "--epochs", "3"])
    assert (recipe, options, overrides, chosen) == (Recipe(epochs=3), Running(), {"epochs": 3}, {})


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--epochs", "many"], ["--epochs", "invalid int value", "'many'"]),
        (["--epochs", "1.5"], ["--epochs", "invalid int value"]),
        (["--seed", "soon"], ["--seed", "invalid int value", "'soon'"]),
        (["--weight-decay", "x"], ["--weight-decay", "invalid float value"]),
        (["--epochs"], ["--epochs", "expected one argument"]),
        (["--kind", "linear"], ["--kind", "invalid choice", "linear", "cosine", "step"]),
        (["--model-kwargs", "depth"], ["--model-kwargs", "KEY=VALUE", "'depth'"]),
        (["--model-kwargs", "=3"], ["KEY=VALUE"]),
        (["--flip=yes"], ["--flip"]),
        (["--epoch", "2"], ["--epoch 2", "did you mean --epochs?"]),
        (["--weigth_decay=2"], ["--weigth-decay=2", "did you mean --weight-decay?"]),
        (["--qqqq"], ["--qqqq", "--help"]),
        (["stray"], ["stray", "--help"]),
        (["two\nlines"], ["two lines"]),
        (["--words"], ["--words"]),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    line = refusal(capsys, *words)
    for part in parts:
        assert part in line


def test_no_hint_where_nothing_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in refusal(capsys, "--qqqq")


def test_comments_are_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(Recipe, Running, "What it is: 90 % of it.", ["--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "What it is: 90 % of it.",
        "--epochs N passes over the data [30]",
        "--lr X 50% of the published one, 100 %(s) honest [1e-05]",
        "--name S of the model # with a second mark [vit.tag]",
        "--kind {cosine,step} which schedule [cosine]",
        "--seed N none: drawn [42]",
        "--weight-decay X [none]",
        "--flip mirror [off]",
        "--amp, --no-amp on by default [on]",
        "--words X [X ...] any number [none]",
        "more arguments [none]",
        "is then not on the first line of the field [off]",
        "--last N last [1]",
        "--resume [S] go on [none]",
    ):
        assert part in text
    assert "--local-rank N torch.distributed.launch passes it" in text


def test_comments_are_taken_from_fields_alone() -> None:
    comments = field_comments(Recipe)
    assert list(comments) == [known.name for known in fields(Recipe)]
    assert comments["epochs"] == "passes over the data"
    assert comments["weight_decay"] == ""


def test_without_source_there_is_no_help_but_flags() -> None:
    space: dict[str, Any] = {"__name__": "made_up"}
    exec("from dataclasses import dataclass\n@dataclass\nclass Bare:\n    x: int = 1\n", space)
    assert field_comments(space["Bare"]) == {}
    assert parse(space["Bare"], Running, "", ["--x", "2"])[2] == {"x": 2}


def test_an_annotation_without_a_flag_is_named() -> None:
    @dataclass
    class Odd:
        pair: tuple[int, int] = (1, 2)

    with pytest.raises(TypeError, match="tuple"):
        parse(Odd, Running, "", [])


def test_the_exit_status_of_a_real_process(tmp_path: Path) -> None:
    script = tmp_path / "some_script.py"
    script.write_text(
        "from dataclasses import dataclass\nfrom common.recipe import parse\n\n"
        "@dataclass\nclass A:\n    epochs: int = 1  # how many\n\n"
        "@dataclass\nclass B:\n    device: str = 'auto'  # where\n\n"
        "print(parse(A, B, 'text')[2])\n"
    )
    root = str(Path(__file__).parent.parent)

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(script), *words]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root}, check=False)

    assert (run("--epochs", "3").returncode, run("--epochs", "3").stdout) == (0, "{'epochs': 3}\n")
    assert "how many [1]" in run("--help").stdout
    wrong = run("--epoch", "3")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.splitlines() == [
        "some_script.py: error: unrecognized arguments: --epoch 3; did you mean --epochs? --help lists every flag"
    ]


@dataclass
class Published:
    """A command line published with underscores, one of its flags required."""

    name: str  # of the run
    num_steps: int = 10000  # updates
    batch_size: int = 8  # images


def test_a_published_command_line_with_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--name", "a_b-c", "--num_steps", "5", "--batch-size=4", "--no-amp", "--local-rank=0"]
    recipe, options, overrides, chosen = parse(Published, Switched, "", words, {"eval_batch_size"}, separator="_")
    assert recipe == Published("a_b-c", num_steps=5, batch_size=4)
    assert (options.amp, overrides, chosen) == (False, vars(recipe), {"amp": False})
    for wrong, parts in (
        (["--num_steps", "5"], ("required", "--name")),
        (["--name", "t", "--eval_batch_size", "5"], ("--eval_batch_size",)),
        (["--name", "t", "--num-stepz", "5"], ("did you mean --num_steps?",)),
    ):
        with pytest.raises(SystemExit) as leaving:
            parse(Published, Switched, "", wrong, {"eval_batch_size"}, separator="_")
        assert leaving.value.code == 2
        line = capsys.readouterr().err
        assert all(part in line for part in parts)
    with pytest.raises(SystemExit):
        parse(Published, Switched, "", ["--help"], {"eval_batch_size"}, separator="_")
    text = " ".join(capsys.readouterr().out.split())
    assert "--name S of the run [required]" in text
    assert "--num_steps N updates [10000]" in text
    assert "--local_rank N" in text
    assert "eval" not in text


@dataclass
class Switched:
    amp: bool = True  # mixed precision
    eval_batch_size: int = 8  # what the recipe has by the same name
