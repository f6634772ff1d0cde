"""Configuration files: what they say, what wins, and what is wrong with them."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.experiment import Options
from common.recipe import check_value
from glsim.train_utils.recipe import Recipe
from glsim.train_utils.yaml_config import ELSEWHERE, WITHOUT_EFFECT, read_config, read_configs


def write(folder: Path, **files: str) -> Path:
    """Write `name.yaml` files; return the path of top.yaml."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "top.yaml"


def test_a_files_own_values_win_over_its_defaults_and_later_defaults_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("defaults: [../c.yaml]\nsd: 0.2\nsmoothing: 0.3\n")
    top = write(
        tmp_path,
        top="defaults: [a.yaml, sub/b.yaml]\nimage_size: 448\n",
        a="sd: 0.1\nre: 0.5\nimage_size: 224\n",
        c="smoothing: 0.4\nls: true\n",
    )
    assert read_config(top) == {"sd": 0.2, "re": 0.5, "image_size": 448, "smoothing": 0.3, "ls": True}


def test_a_file_may_be_named_twice_and_be_empty(tmp_path: Path) -> None:
    """Only a way back to the file itself is a circle."""
    assert read_config(write(tmp_path, top="defaults: [a.yaml, b.yaml]", a="defaults: [b.yaml]", b="")) == {}


def test_cfg_method_wins_over_cfg(tmp_path: Path) -> None:
    write(tmp_path, top="sd: 0.1\nls: true", method="sd: 0.2")
    given = {"cfg": str(tmp_path / "top.yaml"), "cfg_method": str(tmp_path / "method.yaml")}
    assert read_configs(given) == {"sd": 0.2, "ls": True}
    assert read_configs({}) == {}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lr: 1e-2", {"lr": 0.01}),  # a word to YAML
        ("lr: 1", {"lr": 1.0}),
        ("clip_grad: null", {"clip_grad": None}),
        ("reducer: cls", {"reducer": "cls"}),
        ("opt_betas: [0.9, 0.99]", {"opt_betas": [0.9, 0.99]}),
        ("opt_betas: null", {"opt_betas": None}),
        ("model_kwargs: {depth: 2}", {"model_kwargs": {"depth": 2}}),
    ],
)
def test_values(tmp_path: Path, text: str, values: dict[str, Any]) -> None:
    found = read_config(write(tmp_path, top=text), Recipe)
    assert found == values
    assert [type(value) for value in found.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"top\.yaml does not exist: expected a configuration file"),
        ({"top": "defaults: [a.yaml]"}, r"a\.yaml does not exist"),
        ({"top": "defaults: [a.yaml]", "a": "defaults: [top.yaml]"}, r"top\.yaml: its defaults lead back"),
        ({"top": "defaults: [top.yaml]"}, r"top\.yaml: its defaults lead back"),
        ({"top": "defaults: a.yaml"}, r"top\.yaml: defaults: expected a list"),
        ({"top": "image_sise: 3"}, r"top\.yaml: there is no option 'image_sise'; did you mean image_size\?"),
        ({"top": "cfg: other.yaml"}, r"top\.yaml: cfg belongs on the command line; .*`defaults:`"),
        ({"top": "cfg_method: other.yaml"}, r"top\.yaml: cfg_method belongs on the command line; .*`defaults:`"),
        ({"top": "1: 2"}, r"top\.yaml: there is no option 1"),
        ({"top": "image_size: big"}, r"top\.yaml: image_size: 'big' is of the wrong type.*expected an integer"),
        ({"top": "image_size: 2.5"}, "expected an integer"),
        ({"top": "image_size: true"}, "expected an integer"),
        ({"top": "pretrained: 1"}, "pretrained: 1 is of the wrong type.*expected true or false"),
        ({"top": "sim_metric: cosine"}, "expected cos or l1 or l2"),
        ({"top": "lr: fast"}, "lr: 'fast' is of the wrong type.*expected a number"),
        ({"top": "dataset_name: 7"}, "expected text"),
        ({"top": "lr: 2024-11-05"}, "lr: .*expected a number"),
        ({"top": "lr: 2024-13-45"}, r"top\.yaml is not YAML \(month must be in 1\.\.12"),
        ({"top": f"lr: 1{400 * '0'}"}, "expected a number"),
        ({"top": "opt_betas: 0.9"}, "opt_betas: 0.9 is of the wrong type.*expected a list of numbers or null"),
        ({"top": "opt_betas: [a, b]"}, r"opt_betas: \['a', 'b'\] is of the wrong type.*expected a list of numbers"),
        ({"top": "opt_betas: [0.9, true]"}, "expected a list of numbers"),
        ({"top": "model_kwargs: 3"}, "expected a mapping"),
        ({"top": "- a\n- b"}, r"top\.yaml: expected `name: value` lines, found a list"),
        ({"top": "dataset_name: 'open"}, r"top\.yaml is not YAML"),
    ],
)
def test_what_is_wrong_is_a_sentence(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_config(write(tmp_path, **files), Recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_released_options_without_effect_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no effect in GLSim"):
        read_config(write(tmp_path, top=f"{name}: 1"), Recipe)


@pytest.mark.parametrize(("name", "where"), ELSEWHERE.items())
def test_released_options_that_are_elsewhere_are_named(tmp_path: Path, name: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(write(tmp_path, top=f"{name}: 1"), Recipe)
    assert str(caught.value) == f"{tmp_path / 'top.yaml'}: {name} {where}"


def test_elsewhere_says_where() -> None:
    assert ELSEWHERE["project_name"] == "belongs to Weights & Biases, which is off unless --wandb"
    assert "--save_every" in ELSEWHERE["save_freq"]
    assert ELSEWHERE["lr_noise"].startswith("is not supported")


def test_check_value_names_the_source() -> None:
    smoothing = check_value("x.pth", "smoothing", 1, Recipe)
    assert (smoothing, type(smoothing)) == (1.0, float)
    betas = check_value("x.pth", "opt_betas", [0, "1e-1"], Recipe)
    assert betas == [0.0, 0.1]
    assert type(betas[0]) is float
    with pytest.raises(
        UserError, match=r"^x\.pth: image_size: '224' is of the wrong type or no choice: expected an int"
    ):
        check_value("x.pth", "image_size", "224", Recipe)
    assert check_value("model.json", "predict", ["a.png"], Options) == ["a.png"]
    with pytest.raises(UserError, match=r"^model\.json: predict: 1 is .* expected a list of texts or null"):
        check_value("model.json", "predict", 1, Options)
