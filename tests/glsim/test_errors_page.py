"""The pictures of errors: which classes and probabilities they say, of which images, in which files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor, nn

from common.data import Images
from common.train.metrics import Predictions
from common.train.precision import Precision
from glsim.train_utils.errors_page import draw_errors

CPU = torch.device("cpu")


class Colours(nn.Module):
    """Logits (B, 3): a linear layer on the mean of each channel; autocast computes it in its own type."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data = scale * torch.eye(3)
        self.types: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(images.mean((-1, -2)))
        self.types.append(logits.dtype)
        return logits


def predictions(labels: list[int], predicted: list[int]) -> Predictions:
    ranked = np.array([[first, (first + 1) % 3] for first in predicted])
    return Predictions(np.arange(len(labels)), np.array(labels), ranked, np.zeros(len(labels)))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """A red, a green, a blue and a dark image of classes 0, 0, 0, 1, in folders of the same file names."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (102, 100, 0)]
    ids = [f"{number}.folder/a.b.png" for number in range(4)]
    for id_, colour in zip(ids, colours, strict=True):
        (tmp_path / id_).parent.mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / id_)
    paths = [tmp_path / id_ for id_ in ids]
    return Images("birds", "test", ids, paths, [0, 0, 0, 1], ["red", "green", "blue"], transform=tensor)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The title of each picture, and its pixel in the middle."""
    shown: list[tuple[int, ...]] = []
    found: list[tuple[str, tuple[int, ...]]] = []

    def imshow(self: Axes, image: Any) -> None:
        shown.append(tuple(image[4, 4]))

    def set_title(self: Axes, title: str, **kwargs: Any) -> None:
        found.append((title, shown[-1]))

    monkeypatch.setattr(Axes, "imshow", imshow)
    monkeypatch.setattr(Axes, "set_title", set_title)
    return found


def draw(images: Images, said: Predictions, folder: Path, each: bool = False, **kwargs: Any) -> list[Path]:
    model = kwargs.get("model", Colours())
    return draw_errors(model, images, said, CPU, Precision(kwargs.get("precision", "fp32"), CPU), folder, each)


def test_the_class_is_that_of_the_evaluation(images: Images, drawn: list[Any], tmp_path: Path) -> None:
    """The model itself takes the last image for red, which is its second guess; the others it says right."""
    said = predictions([0, 0, 0, 1], [0, 1, 2, 2])
    files = draw(images, said, tmp_path / "errors", model=Colours(10.0))
    assert [file.name for file in files] == ["errors.png"]
    logits = 10 * torch.tensor([[0, 250, 0], [0, 0, 250], [102, 100, 0]]) / 255
    green, blue, dark = logits.softmax(-1)[[0, 1, 2], [1, 2, 2]].tolist()
    assert {title for title, _ in drawn[:2]} == {
        f"red taken for green ({green:.1%})",
        f"red taken for blue ({blue:.1%})",
    }
    assert drawn[2] == (f"green taken for blue ({dark:.1%})", (102, 100, 0))
    assert len(drawn) == 3


def test_only_the_files_of_this_call_are_there(images: Images, tmp_path: Path) -> None:
    folder = tmp_path / "errors"
    files = draw(images, predictions([0, 0, 0, 1], [0, 1, 2, 1]), folder, each=True)
    names = {"errors.png", "000001_a.b.png", "000002_a.b.png"}
    assert {file.name for file in files} == {file.name for file in folder.iterdir()} == names
    for name in ("mine.png", "12_mine.png", "notes.txt"):
        (folder / name).touch()
    draw(images, predictions([0, 0, 0, 1], [0, 0, 1, 1]), folder, each=True)
    kept = {"mine.png", "12_mine.png", "notes.txt"}
    assert {file.name for file in folder.iterdir()} == {"errors.png", "000002_a.b.png"} | kept
    draw(images, predictions([0, 0, 0, 1], [0, 0, 0, 1]), folder)
    assert {file.name for file in folder.iterdir()} == {"errors.png"} | kept
