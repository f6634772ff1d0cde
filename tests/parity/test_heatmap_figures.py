"""Masks and overlays against the figures of the released tools."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from figures import assert_within, golden
from formula import check_figures, fill, fill_image
from torch import Tensor

from glsim.tools.heatmap import Evidence, make_mask
from glsim.train_utils.pictures import overlay, to_picture

GOLDEN = golden("heatmap")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RELEASED_ONLY = ("rollout", "psm_1", "attention", "attention_11")  # what the default computes as its name says


def recorded(depth: int, key: str = "scores", batch: int = 1) -> Evidence:
    """The recorded inputs: raw scores are those of these queries and of unit vectors as keys."""
    scores = [6 * fill(f"{key}_{block}", (batch, 3, 17, 17)) for block in range(depth)]
    keys = torch.eye(17).expand(batch, 3, 17, 17)
    tokens = fill("btokens" if key == "bscores" else "tokens", (batch, 17, 32))
    blocks = [fill(f"tokens_{block}", (batch, 17, 32)) for block in range(depth)]
    return Evidence(tokens, blocks, [(some * 17**0.5, keys) for some in scores], 1, True, (4, 4))


def masks() -> Iterator[tuple[str, str, bool, Any]]:
    """Which input, mask and side, and what was recorded of it."""
    for name, figures in GOLDEN["masks"].items():
        yield "12", name, True, figures
        if name not in RELEASED_ONLY:
            yield "12", name, False, figures
    for depth, figures in GOLDEN["rollout_of_4"].items():
        yield "4", f"rollout_{depth}", False, figures
        yield "4", f"rollout_0_{depth}", False, figures
    for head, figures in enumerate(GOLDEN["psm_of_4_rows"]):
        yield "4", f"psm_{head}", False, figures
    for head, figures in GOLDEN["psm_of_4"].items():
        yield "4", f"psm_{head}", True, figures
    yield "4", "psm", False, GOLDEN["psm_of_4"]["0"]
    yield "4", "attention_0", False, GOLDEN["attention_of_4_meant"]
    for block, figures in GOLDEN["attention_of_4"].items():
        yield "4", f"attention_{block}", True, figures
    for block, figures in GOLDEN["maws_of_4"].items():
        yield "4", f"maws_{block}", False, figures
    yield "4", "asim", False, GOLDEN["asim_of_4"]
    names = {"attention": "attention_0", "gls_with_cls": "gls"}  # as released, where no number says so
    for name, figures in GOLDEN["vis_dfsm"].items():
        yield "batch", names.get(name, name), False, figures


@pytest.mark.parametrize(("inputs", "name", "released", "figures"), [*masks()])
def test_masks(inputs: str, name: str, released: bool, figures: Any) -> None:
    evidence = recorded(4, "bscores", batch=2) if inputs == "batch" else recorded(int(inputs))
    mask = make_mask(evidence, name, released)
    assert mask.shape == (len(evidence.tokens), 16)
    assert_within(1e-6, mask, torch.tensor(figures).view_as(mask))


@pytest.mark.parametrize("name", RELEASED_ONLY)
def test_masks_that_were_wrong_are_not_the_default(name: str) -> None:
    assert not torch.allclose(make_mask(recorded(12), name), torch.tensor(GOLDEN["masks"][name]), rtol=0, atol=1e-5)


def wrapped_picture() -> np.ndarray:
    """The recorded image, whose levels beyond 0..255 wrap around as in the released program."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return ((fill_image(1, 3, 64, 64)[0] * std + mean) * 255).long().numpy().astype(np.uint8).transpose(1, 2, 0)


def assert_picture(picture: np.ndarray, figures: dict[str, Any], off: float) -> None:
    """Compare with a recorded picture, from which a level may be `off` by so much on average, and by 1 at most."""
    ours: Any = check_figures(torch.from_numpy(picture.astype(np.float64)))
    assert ours["shape"] == figures["shape"]
    for name in ("sum", "wsum"):
        assert_within(off * picture.size, ours[name], figures[name], name)
    assert_within(off * picture.size**0.5, ours["l2"], figures["l2"])
    assert_within(1 if off > 0.01 else 0, picture.ravel()[:8].astype(float), figures["first"])


def one(mask: Tensor) -> np.ndarray:
    return mask[0].view(4, 4).numpy()


@pytest.mark.parametrize("name", GOLDEN["images"])
def test_pictures_of_masks(name: str) -> None:
    mask = one(make_mask(recorded(12), name, released=True))
    assert_picture(
        overlay(wrapped_picture(), mask), GOLDEN["images"][name], off=0.1
    )  # OpenCV's resize differs a little


@pytest.mark.parametrize("name", GOLDEN["apply_mask"])
def test_overlays(name: str) -> None:
    top, power, color = (word[-1] == "1" for word in name.split("_"))
    mask = one(make_mask(recorded(4), "glsim_norm"))
    picture = overlay(wrapped_picture(), mask, power, 8 if top else None, color, released=True)
    assert_picture(picture, GOLDEN["apply_mask"][name], off=0.03 if color else 1e-5)


@pytest.mark.parametrize(("name", "mean_std"), [("", IMAGENET), ("_custom", ((0.5,) * 3, (0.5,) * 3))])
def test_pictures_are_clipped(name: str, mean_std: Any) -> None:
    picture = to_picture(fill_image(1, 3, 64, 64)[0], *mean_std)
    assert picture.shape == (64, 64, 3)
    first = np.array(GOLDEN[f"inverse_normalize{name}"]["first"]).clip(0, 1) * 255
    np.testing.assert_array_equal(picture[0, :8, 0], np.rint(first))
    assert (wrapped_picture() != picture).any()
