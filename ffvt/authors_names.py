"""The names of the authors' checkpoints for an FFVT's parameters."""

import re
from collections.abc import Iterable, Iterator

from common.models.authors_names import Entry, module, modules
from common.models.google_vit import block_entries

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


def layout(keys: Iterable[str], feature_fusion: bool) -> Iterator[Entry]:
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
