"""The builder of GLSim's programs by the options of a command line. The released figures are in tests/parity."""

from typing import Any

import pytest
import torch
from torch import nn

from common.errors import UserError
from glsim.model_utils.build import build_model, timm_arguments
from glsim.train_utils.settings import Settings


def test_twice_the_patches_on_dogs_and_nowhere_after_them() -> None:
    small: dict[str, Any] = {"model_name": "vit_b16", "dynamic_anchor": True, "num_hidden_layers": 1}
    for data_set, patches in (("dogs", 16), ("cub", 8)):  # released: FFVT keeps the doubled number in the process
        model: Any = build_model(Settings(dataset_name=data_set, **small), 5)
        assert model.config.dynamic_top == patches


def trained(settings: Settings) -> set[str]:
    return {name for name, value in build_model(settings, 5).named_parameters() if value.requires_grad}


def test_freeze_backbone() -> None:
    small: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    method: dict[str, Any] = {"reducer": "cls", "aggregator": True, "aggregator_norm": True, "dynamic_anchor": True}
    vit = trained(Settings(model_name="vit_b16", freeze_backbone=True, **small, **method))
    assert {name.partition(".")[0] for name in vit} == {"aggregator", "aggregator_norm", "head"}
    for name, heads in (("vit_tiny_patch16_224", ["head"]), ("deit_tiny_distilled_patch16_224", ["head", "head_dist"])):
        settings = Settings(model_name=name, image_size=32, freeze_backbone=True, model_kwargs={"depth": 1})
        assert trained(settings) == {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def test_a_frozen_backbone_keeps_the_statistics_of_batchnorm() -> None:
    """And its names; what is trained, here the head with a BatchNorm of its own in front, goes on."""
    model: Any = build_model(Settings(model_name="resnet10t", freeze_backbone=True), 5)
    head = model.fc
    model.fc = nn.Sequential(nn.BatchNorm1d(head.in_features), head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, 32, 32)
    trained = model.train()(images)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"fc.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    model.fc = head
    assert model.state_dict().keys() == build_model(Settings(model_name="resnet10t"), 5).state_dict().keys()
    torch.testing.assert_close(model.train()(images), model.eval()(images))
    assert trained.requires_grad
    built: Any = build_model(Settings(model_name="resnet10t"), 5)
    built.train()(images)
    assert int(built.bn1.num_batches_tracked) == 1


def test_timm_models_by_name() -> None:
    settings = Settings(model_name="vit_tiny_patch16_224", image_size=48, sd=0.3, model_kwargs={"depth": 2})
    vit: Any = build_model(settings, 5)
    assert vit(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    cnn: nn.Module = build_model(Settings(model_name="resnet10t", image_size=48), 5)
    assert cnn(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    assert timm_arguments(settings) == {"drop_path_rate": 0.3, "img_size": 48, "depth": 2}
    assert timm_arguments(Settings(model_name="densenet121")) == {}


TIMM_VIT = "glsvit_tiny_patch16_224"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("transfg", {"dynamic_anchor": True}, "--dynamic_anchor True: transfg"),
    ("gft", {"aggregator": True}, "--aggregator True: gft"),
    ("vit_b16", {"select_top_k": True}, "--select_top_k True: vit_b16"),
    (TIMM_VIT, {"hidden_size": 64}, "--hidden_size 64"),
    ("densenet121", {"sd": 0.1}, "--sd 0.1"),
    ("resnet50", {"classifier": "cls_pool"}, "--classifier cls_pool"),
    ("vit_b16", {"cal_single_crop": True}, "--cal_single_crop True"),
    ("vit_bs16", {}, "--model_name vit_bs16: .*vit_b16.*gft"),
    ("vit_b16", {"dynamic_anchor": True, "dynamic_top": 197}, "dynamic_top 197: expected 1 to 196"),
    ("vit_b16", {"image_size": 225}, "image_size 225: expected a multiple of the patch size 16"),
    (TIMM_VIT, {"image_size": 225}, "225"),
    *((name, {"freeze_backbone": True}, f"--freeze_backbone: {name}") for name in ("transfg", "ffvt", "cal", "gft")),
    ("vit_t16", {"pretrained": True}, "weights for vit_t16: .*--ckpt_path"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_cannot_be_built_is_a_sentence(name: str, changes: dict[str, Any], message: str) -> None:
    settings = Settings(model_name=name, **changes)
    with pytest.raises(UserError, match=message):
        build_model(settings, 5, settings.pretrained)
