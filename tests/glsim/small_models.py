"""GLSim's models and its comparators as small as their tests need them, with weights by formula."""

import re

import torch
from formula import fill, fill_image, fill_state_dict
from torch import nn

from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.model_utils.cal import CAL
from glsim.model_utils.timm_glsim import GLSimTimm
from glsim.model_utils.transfg import TransFG

LABELS = torch.tensor([3, 7])
METHOD = {"dynamic_anchor": True, "anchor_class_token": True, "reducer": "cls"}
METHOD |= {"aggregator": True, "aggregator_norm": True}

# vit_*: 4 x 4 patches, 2 blocks, a crop around 3 patches.
SMALL = {"model_name": "vit_t16", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
SMALL |= {"num_hidden_layers": 2, "num_classes": 10, "image_size": 64}
SMALL_METHOD = {**SMALL, **METHOD, "dynamic_top": 3}
KINDS = {
    "method": SMALL_METHOD,
    "plain": SMALL,
    "plain_cls_token_alone": {**SMALL, "reducer": "cls"},
    "no_reducer": {**SMALL_METHOD, "reducer": None},
    "no_aggregator": {**SMALL_METHOD, "aggregator": False, "aggregator_norm": False},
    "two_aggregator_blocks": {**SMALL_METHOD, "aggregator_num_hidden_layers": 2},
    "wider": {**SMALL_METHOD, "representation_size": 128},
    "avg_cls": {**SMALL_METHOD, "classifier": "avg_cls"},
    "max_cls": {**SMALL_METHOD, "classifier": "max_cls"},
    "pool": {**SMALL, "classifier": "pool"},
    "no_encoder_norm": {**SMALL_METHOD, "encoder_norm": False},
    "stochastic_depth": {**SMALL_METHOD, "sd": 0.1},
}

# glsvit_*, glsdeit*: timm's models, every way that they are put together.
SIZES = {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2}
WITH_CLS = {
    "vit": "vit_tiny_patch16_224",
    "untagged_and_tagged": "vit_base_patch16_224.dino",
    "clip": "vit_base_patch16_clip_224",
    "deit3": "deit3_small_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
    "registers": "vit_small_patch14_reg4_dinov2",
    "dinov2_giant": "vit_giant_patch14_reg4_dinov2",
    "parallel": "vit_small_patch16_18x2_224",
}
WITHOUT_CLS = {
    "gap": "vit_base_patch16_gap_224",
    "gap_norm_behind": "vit_medium_patch16_reg4_gap_256",
    "norm_behind_branches": "vit_base_patch16_rpn_224",
    "siglip": "vit_base_patch16_siglip_224",
}
NAMES = {**WITH_CLS, **WITHOUT_CLS, "distilled": "deit_tiny_distilled_patch16_224"}
NO_AGGREGATOR = METHOD | {"aggregator": False, "aggregator_norm": False}
OPTIONS = {
    "plain": {},
    "method": METHOD,
    "no_aggregator": NO_AGGREGATOR,
    "no_aggregator_pool": NO_AGGREGATOR | {"classifier": "pool"},
    "no_reducer": METHOD | {"reducer": None, "classifier": "cls_pool"},
    "select_top_k": METHOD | {"select_top_k": True},
    "two_convolutions": METHOD | {"aggregator_type": "conv", "aggregator_num_hidden_layers": 2},
    "dwsc": METHOD | {"aggregator_type": "dwsc"},
    "inference_crops_off": METHOD | {"inference_crops": False},
    "adapter": METHOD | {"adapter": "bottleneck"},
    "token_drop": METHOD | {"token_drop": 0.25},
    "stochastic_depth": METHOD | {"sd": 0.1, "aggregator_num_hidden_layers": 2},
}


def fill_released(model):
    """Fill a model by the keys that its entries have in a released file."""
    entries = model.released_state_dict().items()
    model.load_released({key: fill(key, value.shape) if value.is_floating_point() else value for key, value in entries})
    return model.eval()


def vit_glsim(kind="method", **others):
    return fill_released(ViTGLSim(ViTConfig(**{**KINDS[kind], **others})))


def timm_glsim(kind="vit", **options):
    size = 4 * int(re.search(r"patch(\d+)", NAMES[kind])[1])
    options = {"dynamic_top": 3, "num_classes": 10, "image_size": size, "model_kwargs": SIZES, **options}
    model = GLSimTimm(f"gls{NAMES[kind]}", **options)
    fill_state_dict(model)
    return model.eval()


def transfg(img_size=64, step=12, num_classes=10, smoothing=0.0, **sizes):
    sizes = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "num_layers": 4, **sizes}
    return fill_released(TransFG(sizes, img_size, num_classes, step, smoothing))


def cal(num_classes=10, seed=0, **arguments):
    """With attention of its own for every place: BatchNorm's scales differ from channel to channel."""
    torch.manual_seed(seed)
    model = CAL(num_classes, **{"backbone": "resnet18", "num_maps": 4, **arguments})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def images(batch=2, size=64):
    return fill_image(batch, 3, size, size)


def images_for(model, batch=2):
    """Images of the size that the model takes."""
    options = getattr(model, "options", model.config)
    return images(batch, getattr(options, "image_size", 64))
