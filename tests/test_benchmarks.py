"""What the benchmarks measure, on models that take no time."""

import pytest
import timm
import torch
from torch import nn

from benchmarks.models import PLAN, RIVALS, Rival, Setting, measure, operations_of, show
from common.train.precision import Precision
from gft import GFT

BACKBONE = "vit_tiny_patch16_224"
TINY = {"embed_dim": 48, "num_heads": 3, "depth": 9}


def plain(size: int, classes: int) -> nn.Module:
    return timm.create_model(BACKBONE, num_classes=classes, img_size=size, **TINY)


def released(size: int, classes: int) -> nn.Module:
    return GFT(BACKBONE, classes, size, released=True, **TINY)


def test_a_group_is_a_floor_with_the_models_that_stand_on_it() -> None:
    setting = Setting(64, 2, 7, torch.device("cpu"), Precision("fp32", torch.device("cpu")))
    rivals = [Rival("GFT released", released, plain), Rival("the floor again", plain, plain)]
    group = measure(rivals, setting, (2, 1), compiled=False, peak=1e9)
    gft, again = group["models"]
    assert (gft["name"], again["name"]) == ("GFT released", "the floor again")
    assert (group["size"], group["batch_size"]) == (64, 2)
    assert gft["direct"] is not None
    assert again["direct"] is None  # nothing of it could be spared
    for figures in (group["floor"], gft["ours"], gft["direct"], again["ours"]):
        for kind in ("train", "eval"):
            found = figures[kind]
            assert found["seconds"] > 0
            assert found["images_per_s"] == pytest.approx(2 / found["seconds"])
    # Of 9 blocks it computes 7, and CLS's row of another: so does it of the operations, by their share of the device's.
    operations = {name: operations_of(build(64, 7), setting) for name, build in {"o": released, "f": plain}.items()}
    assert 7.2 / 9 < operations["o"]["eval"] / operations["f"]["eval"] < 7.6 / 9
    share = group["floor"]["eval"]["peak_share"] * group["floor"]["eval"]["seconds"]
    assert share == pytest.approx(operations["f"]["eval"] / 1e9)
    rows = show(group).splitlines()
    assert [row[:28].strip() for row in rows] == ["plain ViT", "GFT released", "direct formulation", "the floor again"]
    assert float(rows[0][37:44]) == 1.0  # its own ratio


def test_the_plan_names_every_model() -> None:
    assert {name for *_, names in PLAN for name in names} == {rival.name for rival in RIVALS}
