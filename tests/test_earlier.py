"""common.earlier: checkpoints that do and do not say what model they are of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.earlier import Checkpoint, find_checkpoint, trained_model
from common.errors import UserError
from common.experiment import Experiment, Options


@dataclass
class Recipe:
    model: str = "linear"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str = "none"
    released: bool = False


def _nothing(*_: Any) -> Any:
    raise AssertionError("neither data nor an optimizer is needed")


EXPERIMENT = Experiment(Recipe, _nothing, lambda recipe, classes: nn.Linear(2000, 1000), _nothing, "food101", {})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A bare file of another, smaller model."""
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    return find_checkpoint(EXPERIMENT, Recipe(), Options(eval=str(path)), {})


def test_a_bare_file_of_a_smaller_model_is_said_to_be_of_another(checkpoint: Checkpoint) -> None:
    """The script says what model it is, not the file: its size is no measure."""
    assert not checkpoint.described
    with pytest.raises(UserError, match="belongs to another model than this Linear"):
        trained_model(EXPERIMENT, checkpoint, 1000)


def test_a_described_model_is_no_larger_than_its_weights(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="describes no model that can be built here"):
        trained_model(EXPERIMENT, checkpoint._replace(described=True), 1000)
