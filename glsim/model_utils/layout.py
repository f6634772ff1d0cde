"""The names of the authors' checkpoints for the parameters of `ViTGLSim`."""

import re
from collections.abc import Iterable, Iterator

from common.models.authors_names import Entry, module, modules

# Modules of one block, ours and theirs, in the order of a released file.
BLOCK = (
    ("attn.qkv", "attn.proj_q"),
    ("attn.qkv", "attn.proj_k"),
    ("attn.qkv", "attn.proj_v"),
    ("attn.proj", "proj"),
    ("norm1", "norm1"),
    ("mlp.fc1", "pwff.fc1"),
    ("mlp.fc2", "pwff.fc2"),
    ("norm2", "norm2"),
)


def layout(keys: Iterable[str], head_of_each_token: bool) -> Iterator[Entry]:
    """List every parameter of the model that has the keys, in the authors' order.

    With `head_of_each_token` their files hold the head a second time, as part of what averages its logits.
    """
    keys = set(keys)
    yield Entry("class_token", "base_model.cls_token")
    yield Entry("anchor_class_token", "anchor_class_token")
    yield from module("base_model.patch_embed.proj", "patch_embedding")
    yield Entry("positional_embedding.pos_embedding", "base_model.pos_embed")
    for i in _blocks(keys, "base_model.blocks"):
        yield from modules(f"base_model.blocks.{i}.", f"encoder.blocks.{i}.", BLOCK)
    yield from module("base_model.norm", "encoder_norm")
    yield from module("reducer", "reducer")
    for i in _blocks(keys, "aggregator"):
        yield from modules(f"aggregator.{i}.", f"aggregator.blocks.{i}.", BLOCK)
    yield from module("aggregator_norm", "aggregator_norm")
    yield from module("head", "head")
    if head_of_each_token:
        yield from module("head", "head_reducer.0")


def _blocks(keys: set[str], prefix: str) -> list[int]:
    return sorted({int(match[1]) for key in keys if (match := re.match(rf"{prefix}\.(\d+)\.", key))})
