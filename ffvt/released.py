"""The names of the authors' checkpoints for an FFVT's parameters."""

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from common.errors import UserError
from common.models import released
from common.models.google_vit import block_entries
from common.models.released import Entry, module, modules

# Modules of one ResNet unit: ours and theirs, in the order of a released file.
UNIT = (
    ("norm1", "gn1"),
    ("conv1", "conv1"),
    ("norm2", "gn2"),
    ("conv2", "conv2"),
    ("norm3", "gn3"),
    ("conv3", "conv3"),
    ("downsample.conv", "downsample"),
    ("downsample.norm", "gn_proj"),
)


def to_released(state_dict: Mapping[str, Tensor], feature_fusion: bool) -> dict[str, Tensor]:
    """Return the state_dict of an FFVT under the authors' names, in their order."""
    return released.to_released(state_dict, _entries(state_dict, feature_fusion))


def from_released(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], feature_fusion: bool, source: object = "the checkpoint"
) -> dict[str, Tensor]:
    """Return a released state_dict under the names of the FFVT whose state_dict is `own`.

    Raises UserError, naming `source`, where entries are missing or unknown, or of a model with (or without) feature
    fusion, and where a query, key or value has another shape; other shapes are left to the caller.
    """
    fused = any(key.startswith("transformer.encoder.ff_last_layer.") for key in state_dict)
    if fused != feature_fusion and any(key.startswith("transformer.encoder.") for key in state_dict):
        how, do = ("with", "add") if fused else ("without", "leave out")
        raise UserError(f"{source} is of a model {how} feature fusion: {do} --feature_fusion")
    return released.from_released(state_dict, own, list(_entries(own, feature_fusion)), source)


def _entries(keys: Iterable[str], feature_fusion: bool) -> Iterator[Entry]:
    """List the parameters of the model that has the keys, and biases that it may not have, in the authors' order."""
    keys = set(keys)
    embeddings = "transformer.embeddings."
    yield Entry(embeddings + "position_embeddings", "base_model.pos_embed")
    yield Entry(embeddings + "cls_token", "base_model.cls_token")
    backbone, hybrid = "base_model.patch_embed.backbone.", embeddings + "hybrid_model."
    yield from modules(backbone + "stem.", hybrid + "root.", (("conv", "conv"), ("norm", "gn")))
    unit = re.compile(re.escape(backbone) + r"stages\.(\d+)\.blocks\.(\d+)\.")
    for stage, block in sorted({(int(m[1]), int(m[2])) for key in keys if (m := unit.match(key))}):
        theirs = f"{hybrid}body.block{stage + 1}.unit{block + 1}."
        yield from modules(f"{backbone}stages.{stage}.blocks.{block}.", theirs, UNIT)
    yield from module("base_model.patch_embed.proj", embeddings + "patch_embeddings")
    last = max(int(m[1]) for key in keys if (m := re.match(r"base_model\.blocks\.(\d+)\.", key)))
    yield from block_entries(last + 1, "ff_last_layer" if feature_fusion else None)
    yield from module(
        "base_model.norm", "transformer.encoder." + ("ff_encoder_norm" if feature_fusion else "encoder_norm")
    )
    yield from module("base_model.head", "head")
