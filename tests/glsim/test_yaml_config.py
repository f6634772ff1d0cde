"""Configuration files: what they say, what wins, and what is wrong with them."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
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
    ("text", "names"),
    [
        ("image_sise: 3", "image_sise"),
        ("cfg: other.yaml", "cfg"),
        ("image_size: 2.5", "image_size"),
        ("pretrained: 1", "pretrained"),
        ("sim_metric: cosine", "sim_metric"),
        ("lr: fast", "lr"),
        ("opt_betas: [a, b]", "opt_betas"),
        ("- a", "lines"),
        ("dataset_name: 'open", "YAML"),
        ("defaults: [none.yaml]", "none.yaml"),
        (f"{WITHOUT_EFFECT[0]}: 1", WITHOUT_EFFECT[0]),
        *((f"{name}: 1", name) for name in ELSEWHERE),
    ],
)
def test_what_is_wrong_is_a_sentence_that_names_file_and_key(tmp_path: Path, text: str, names: str) -> None:
    with pytest.raises(UserError, match=names) as caught:
        read_config(write(tmp_path, top=text), Recipe)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
