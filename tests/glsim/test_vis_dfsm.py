"""glsim/tools/vis_dfsm.py: the figure of random images and their masks, by models from everywhere, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formula import fill_npz, vit_spec
from PIL import Image

from common.data import Images
from glsim.data_utils.datasets import read
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.tools import heatmap, vis_dfsm
from glsim.train_utils import pictures
from glsim.train_utils.demo import write_demo
from glsim.train_utils.settings import Settings

CONFIGS = Path(__file__).parents[2] / "glsim" / "configs"
PUBLISHED = ("--serial", 52, "--batch_size", 4, "--vis_cols", 4, "--cfg", CONFIGS / "nabirds_ft_is224_weakaugs.yaml")
# The published model, thinner.
MODEL = ("--model_name", "glsvit_base_patch14_dinov2.lvd142m", "--image_size", 56)
THIN = ("--model_kwargs", "depth=12", "embed_dim=48", "num_heads=3")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Figures = list[tuple[list[tuple[str, np.ndarray]], int, str]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    write_demo(output / "demo-data" / "CUB")
    return output


@pytest.fixture(autouse=True)
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figures:
    """What is drawn: panels, columns, title. Programs write where they are started."""
    monkeypatch.chdir(tmp_path)
    drawn: Figures = []
    draw = vis_dfsm.draw

    def follow(*given: Any) -> Any:
        drawn.append(given)
        return draw(*given)

    monkeypatch.setattr(vis_dfsm, "draw", follow)
    return drawn


def run(digits: Path, *words: object) -> None:
    vis_dfsm.main([*map(str, words), "--demo", "--output", str(digits), "--device", "cpu"])


def digits_of(digits: Path, size: int) -> Images:
    root = str(digits / "demo-data" / "CUB")
    sizes = {"image_size": size, "resize_size": size, "test_resize_size": size}
    return read(Settings(dataset_name="cub", dataset_root_path=root, **sizes)).test  # type: ignore[arg-type]


def halves(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    side = picture.shape[1]
    return picture[:side], picture[-side:]


@pytest.mark.parametrize("words", [("gls", "--vis_mask_pow"), ("attention_11",), ("rollout_0_12",)])
def test_published_commands(digits: Path, figures: Figures, words: tuple[str, ...], capsys: Any) -> None:
    run(digits, *PUBLISHED, *MODEL, "--vis_mask", *words, *THIN)
    path = Path(f"results_inference/cub_glsvit_base_patch14_dinov2.lvd142m_{words[0]}_52.png")
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    with Image.open(path) as image:
        assert image.width > 1000
    [(panels, columns, title)] = figures
    assert (len(panels), columns) == (4, 4)
    assert title == f"{words[0]} of glsvit_base_patch14_dinov2.lvd142m on cub, test"
    images = digits_of(digits, 56)
    known = {pictures.to_picture(images[i][0], *IMAGENET).tobytes(): i for i in range(len(images))}
    found = [known[halves(panel)[0].tobytes()] for _, panel in panels]
    assert len(set(found)) == 4
    assert [caption for caption, _ in panels] == [images.classes[images.labels[i]] for i in found]


def test_pretrained_weights_are_those_of_google(digits: Path, figures: Figures, tmp_path: Path) -> None:
    fill_npz(tmp_path / "ViT-B_16.npz", vit_spec())
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 4}
    words = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    words += ["--image_size", 64, "--model_kwargs", "patch_size=16", "--weights_dir", tmp_path, "--pretrained"]
    run(digits, "--batch_size", 1, "--vis_mask", "psm", *words)
    model = ViTGLSim(ViTConfig("vit_b16", image_size=64, num_classes=10, **sizes)).eval()  # type: ignore[arg-type]
    model.load_npz(tmp_path / "ViT-B_16.npz")
    [([(_, panel)], _, _)] = figures
    picture, below = halves(panel)
    images = digits_of(digits, 64)
    inputs = next(image for image, _ in images if (pictures.to_picture(image, *IMAGENET) == picture).all())
    mask = heatmap.make_mask(heatmap.gather(model, inputs[None]), "psm")[0].view(4, 4).numpy()
    np.testing.assert_array_equal(below, pictures.overlay(picture, mask))
