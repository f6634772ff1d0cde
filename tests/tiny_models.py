"""Every kind of model of this repository, as small as it can be, for tests of what runs around a model.

Models that have a ResNet-50 or 18 in them have timm's smallest here; what they do with it stays.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import timm
from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.nn import functional as F

from common.train.loop import Objective, logits_of
from ffvt.model import FFVT
from gft import GFT, TransFG
from glsim.model_utils import transfg
from glsim.model_utils.cal import CAL
from glsim.model_utils.config import ViTConfig
from glsim.model_utils.glsim import ViTGLSim
from glsim.model_utils.resnet import ResNet
from glsim.model_utils.timm_glsim import GLSimTimm

CLASSES = 3
SIZE = 32  # pixels
BACKBONE = "vit_base_patch16_224"
VIT: dict[str, Any] = dict(patch_size=8, embed_dim=16, num_heads=2)
GOOGLE = dict(hidden_size=16, mlp_dim=32, num_heads=2, num_layers=2)
CROPPING = dict(dynamic_anchor=True, dynamic_top=2, reducer="cls", aggregator=True, aggregator_norm=True)
GLSIM = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)


def _vit(name: str) -> nn.Module:
    return timm.create_model(name, img_size=SIZE, num_classes=CLASSES, depth=2, drop_path_rate=0.1, **VIT)


def _resnetv2() -> nn.Module:
    return ResNetV2((1, 1, 1, 1), (128, 128, 128, 128), CLASSES, stem_chs=32, conv_layer=StdConv2d)


def _cal() -> nn.Module:
    model = CAL(CLASSES, backbone="resnet18", num_maps=2)
    model.base_model = timm.create_model("resnet10t", num_classes=0, global_pool="")
    return model


def _resnet() -> nn.Module:
    model = ResNet("resnet50", CLASSES)
    model.base_model = timm.create_model("resnet10t", num_classes=CLASSES)
    return model


MODELS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "GFT described": lambda: GFT(BACKBONE, CLASSES, SIZE, depth=9, **VIT),
        "GFT released": lambda: GFT(BACKBONE, CLASSES, SIZE, released=True, depth=9, **VIT),
        "TransFG of GFT": lambda: TransFG(BACKBONE, CLASSES, SIZE, num_parts=4, depth=9, **VIT),
        "ViT": lambda: _vit(BACKBONE),
        "DeiT": lambda: _vit("deit_base_patch16_224"),
        "DenseNet": lambda: timm.create_model(
            "densenet169", num_classes=CLASSES, growth_rate=8, block_config=(1, 1, 1)
        ),
        "ResNet-18": lambda: timm.create_model("resnet18", num_classes=CLASSES),
        "ResNetV2": _resnetv2,
        "FFVT": lambda: FFVT(GOOGLE | {"patch_size": 8}, SIZE, CLASSES, num_token=3),
        "FFVT without fusion": lambda: FFVT(GOOGLE | {"patch_size": 8}, SIZE, CLASSES, feature_fusion=False),
        "FFVT hybrid": lambda: FFVT(GOOGLE | {"resnet_layers": (1, 1, 1)}, SIZE, CLASSES, num_token=2),
        "GLSim": lambda: ViTGLSim(ViTConfig("vit_b16", image_size=SIZE, num_classes=CLASSES, **CROPPING, **GLSIM)),
        "GLSimTimm": lambda: GLSimTimm(
            f"gls{BACKBONE}", image_size=SIZE, num_classes=CLASSES, model_kwargs=dict(depth=1, **VIT), **CROPPING
        ),
        "TransFG": lambda: transfg.TransFG(GOOGLE | {"patch_size": 8}, SIZE, CLASSES, slide_step=6),
        "CAL": _cal,
        "ResNet-50": _resnet,
    }
)


def objective_of(model: nn.Module) -> Objective:
    """What the model's own program minimises, for batches that are not mixed."""
    return _own if isinstance(model, FFVT | transfg.TransFG | CAL) else _cross_entropy


def _own(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss, logits = model(images, labels)
    return loss, logits


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits_of(model(images))
    return F.cross_entropy(logits.float(), labels), logits
