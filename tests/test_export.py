"""common.export: the files of a tiny model answer as the model does."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import transforms as T

from common.data.transforms import describe_transform
from common.errors import UserError
from common.export import export

TRANSFORM = T.Compose([T.Resize((8, 6)), T.ToTensor()])
CLASSES = ["a", "b", "c"]


class Pair(nn.Module):
    """Logits and something more, as GLSim has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(images), images


def write(path: Path, model: nn.Module) -> None:
    run: Any = SimpleNamespace(options=SimpleNamespace(export=str(path)), weights={"source": "none"})
    export(run, model, CLASSES, TRANSFORM, describe_transform(TRANSFORM))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_for_any_number_of_images(suffix: str, tmp_path: Path) -> None:
    model, path, images = Pair().eval(), tmp_path / f"m{suffix}", torch.rand(5, 3, 8, 6)
    write(path, model)
    about = json.loads((tmp_path / f"m{suffix}.json").read_text(encoding="utf-8"))
    assert (about["classes"], about["input"]["shape"], about["preprocessing"]) == (
        *(CLASSES, ["batch", 3, 8, 6]),
        describe_transform(TRANSFORM),
    )
    assert about["largest_difference"] <= 1e-5
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(path).module()(images), model(images)[0])
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.json"}


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path: Path) -> None:
    model = Pair()
    nn.init.constant_(model.head[3].bias, float("nan"))
    (tmp_path / "m.pt2").write_text("before")
    with pytest.raises(UserError, match=r"m\.pt2"):
        write(tmp_path / "m.pt2", model)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]
