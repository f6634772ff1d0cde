"""One builder for GLSim and everything that it is compared with, by `--model_name`."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

import timm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import UserError
from common.models.vit import freeze
from ffvt.model import CONFIGS as FFVT_CONFIGS
from ffvt.model import FFVT
from gft.model import GFT
from glsim.model_utils import transfg
from glsim.model_utils.cal import CAL
from glsim.model_utils.config import MODEL_NAMES, ViTConfig
from glsim.model_utils.glsim import ViTGLSim
from glsim.model_utils.resnet import NAMES as RESNETS
from glsim.model_utils.resnet import ResNet
from glsim.model_utils.timm_glsim import GLSimTimm, TimmConfig
from glsim.train_utils.settings import Settings

# Comparators with parts beside backbone and classifier, which start at random.
WITH_OWN_PARTS = ("transfg", "ffvt", "cal", "gft")
COMPARATORS = (*WITH_OWN_PARTS, *RESNETS)
GFT_BACKBONE = "vit_base_patch16_224.augreg2_in21k_ft_in1k"  # of the GFT scripts
# Google's .npz for models that are no timm model's own.
NPZ = {"vit_b16": "ViT-B_16", "vit_b32": "ViT-B_32", "vit_l16": "ViT-L_16", "vit_l32": "ViT-L_32"}
NPZ |= {"vit_h14": "ViT-H_14", "transfg": "ViT-B_16", "ffvt": "ViT-B_16"}
TIMM_PREFIX = "gls"  # glsvit_*, glsdeit*: GLSim around timm's model of the rest of the name
# Options of glsvit_* and glsdeit* alone, of vit_* alone, and of either.
OF_TIMM_ALONE = ("select_top_k", "token_drop", "adapter", "aggregator_type", "inference_crops")
OF_VIT_ALONE = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "representation_size"),
    *("layer_norm_eps", "attention_probs_dropout_prob", "hidden_dropout_prob", "encoder_norm", "debugging"),
)
OF_GLSIM = (
    *OF_TIMM_ALONE,
    *OF_VIT_ALONE,
    *("dynamic_anchor", "sim_metric", "anchor_random", "anchor_class_token", "crop_inclusive", "test_flip"),
    *("reducer", "aggregator", "aggregator_num_hidden_layers", "aggregator_norm", "classifier", "dynamic_top"),
)


def build_model(settings: Settings, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Return the model that the settings name, with fresh weights, or timm's (`pretrained`) where timm has them.

    Raises UserError for an unknown name, and for settings that the model has no use for.
    """
    name = settings.model_name
    if name != "cal":
        _refuse(settings, ("cal_single_crop",))
    if settings.freeze_backbone and name in WITH_OWN_PARTS:
        raise UserError(f"--freeze_backbone: {name} has parts that would stay random; say --no-freeze_backbone")
    if name in MODEL_NAMES:
        model: nn.Module = _build_vit(settings, num_classes, pretrained)
    elif name.startswith(TIMM_PREFIX):
        model = _build_timm_glsim(settings, num_classes, pretrained)
    elif name in COMPARATORS:
        model = _build_comparator(settings, num_classes, pretrained)
    else:
        model = _build_timm(settings, num_classes, pretrained)
    if settings.freeze_backbone:
        _freeze_backbone(model)
    return model


def top_patches(settings: Settings) -> int:
    """`dynamic_top`, doubled on dogs, as published."""
    return settings.dynamic_top * (2 if settings.dataset_name == "dogs" else 1)


def timm_arguments(settings: Settings) -> dict[str, Any]:
    """What a timm model, named by its own name, is built with, beside the number of classes."""
    arguments: dict[str, Any] = {"drop_path_rate": settings.sd} if settings.sd else {}
    config = timm.get_pretrained_cfg(settings.model_name)
    if config is not None and config.fixed_input_size:  # ViTs and their like: position embeddings are made to size
        arguments["img_size"] = settings.image_size
    return arguments | settings.model_kwargs


def _build_vit(settings: Settings, num_classes: int, pretrained: bool) -> ViTGLSim:
    _refuse(settings, OF_TIMM_ALONE)
    if pretrained and settings.model_name not in NPZ:
        raise UserError(
            f"--pretrained: there are no published weights for {settings.model_name}: use --no-pretrained, or a file "
            "with --ckpt_path"
        )
    return ViTGLSim(ViTConfig(**(_options(settings, ViTConfig) | {"num_classes": num_classes} | settings.model_kwargs)))


def _build_timm_glsim(settings: Settings, num_classes: int, pretrained: bool) -> GLSimTimm:
    _refuse(settings, OF_VIT_ALONE)
    return GLSimTimm(pretrained=pretrained, num_classes=num_classes, **_options(settings, TimmConfig))


def _options(settings: Settings, config: type[ViTConfig] | type[TimmConfig]) -> dict[str, Any]:
    """The settings that the configuration of a model has too."""
    taken = {field.name for field in fields(config)} & {field.name for field in fields(Settings)}
    return {name: getattr(settings, name) for name in taken} | {"dynamic_top": top_patches(settings)}


def _build_comparator(settings: Settings, num_classes: int, pretrained: bool) -> nn.Module:
    name, size, kwargs = settings.model_name, settings.image_size, dict(settings.model_kwargs)
    pools = name in RESNETS and settings.classifier == "pool"  # as they do anyway
    _refuse(settings, [option for option in OF_GLSIM if not (pools and option == "classifier")])
    smoothing = settings.smoothing if settings.ls else 0.0
    if name == "transfg":
        slide_step = kwargs.pop("slide_step", 12)
        sizes = vars(transfg.CONFIGS["ViT-B_16"]) | kwargs
        return transfg.TransFG(sizes, size, num_classes, slide_step, smoothing, zero_head=False)
    if name == "ffvt":
        num_token = kwargs.pop("num_token", 24 if settings.dataset_name == "dogs" else 12)
        return FFVT(vars(FFVT_CONFIGS["ViT-B_16"]) | kwargs, size, num_classes, True, num_token)
    if name == "gft":
        backbone = kwargs.pop("backbone", GFT_BACKBONE)
        return GFT(backbone, num_classes, size, pretrained=pretrained, **({"drop_path_rate": settings.sd} | kwargs))
    if name == "cal":
        return CAL(num_classes, pretrained, settings.cal_single_crop, smoothing, **kwargs)
    return ResNet(name, num_classes, pretrained, **kwargs)


def _build_timm(settings: Settings, num_classes: int, pretrained: bool) -> nn.Module:
    _refuse(settings, OF_GLSIM)
    name = settings.model_name
    if not timm.is_model(name):
        known = ", ".join((*MODEL_NAMES, *COMPARATORS))
        raise UserError(f"--model_name {name}: there is no such model: choose {known}, gls* or timm's name")
    arguments = timm_arguments(settings)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    except TypeError as error:
        if settings.sd and "drop_path_rate" in str(error):
            raise UserError(f"--sd {settings.sd}: {name} has no such thing; say --sd 0") from error
        raise


def _refuse(settings: Settings, names: Collection[str]) -> None:
    """UserError for options of other models that were chosen."""
    for name in names:
        if getattr(settings, name) != getattr(Settings, name):
            raise UserError(
                f"--{name} {getattr(settings, name)}: {settings.model_name} has no such thing; leave it out"
            )


def _freeze_backbone(model: nn.Module) -> None:
    if isinstance(model, ViTGLSim):
        freeze(model.base_model)
    elif not isinstance(model, GLSimTimm):  # which keeps its adapters trained
        classifier: Any = model.get_classifier()  # type: ignore[operator]
        freeze(model)
        for module in classifier if isinstance(classifier, tuple) else (classifier,):  # two of distilled models
            module.requires_grad_(True)
        model.register_forward_pre_hook(_keep_statistics)


def _keep_statistics(model: nn.Module, _: Any) -> None:
    """Let BatchNorms that are frozen compute as in evaluation; of the whole model, as DDP replaces single ones."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()
