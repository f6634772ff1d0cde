"""The names that the authors' checkpoints have for the parameters of a timm ViT, there and back."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError

# Modules of one block and of one ResNet unit: ours and theirs, in the order of a released file.
BLOCK = (
    ("norm1", "attention_norm"),
    ("norm2", "ffn_norm"),
    ("mlp.fc1", "ffn.fc1"),
    ("mlp.fc2", "ffn.fc2"),
    ("attn.qkv", "attn.query"),
    ("attn.qkv", "attn.key"),
    ("attn.qkv", "attn.value"),
    ("attn.proj", "attn.out"),
)
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
QKV = ("query", "key", "value")


class Entry(NamedTuple):
    """One released tensor and where it lies: the whole of our tensor, or one of the three parts of a qkv."""

    released: str
    ours: str
    part: int | None


def to_released(state_dict: Mapping[str, Tensor], feature_fusion: bool) -> dict[str, Tensor]:
    """Return the state_dict of an FFVT under the authors' names, in their order."""
    return {
        released: state_dict[ours] if part is None else state_dict[ours].chunk(3)[part].clone()
        for released, ours, part in _entries(state_dict, feature_fusion)
    }


def from_released(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], feature_fusion: bool, source: object = "the checkpoint"
) -> dict[str, Tensor]:
    """Return a released state_dict under the names of the FFVT whose state_dict is `own`.

    Raises UserError, naming `source`, where entries are missing or unknown, or a query, key or value has another shape
    than the model's; other shapes are not looked at.
    """
    entries = _entries(own, feature_fusion)
    _check_names({entry.released for entry in entries}, state_dict.keys(), feature_fusion, source)
    parts: dict[str, list[Tensor]] = {}
    for released, ours, part in entries:  # query, key, value come in this order
        found, needed = state_dict[released].shape, own[ours].shape
        if part is not None and found != (needed[0] // 3, *needed[1:]):
            raise UserError(f"{source} has {released} of shape {tuple(found)}: it belongs to another --model_type")
        parts.setdefault(ours, []).append(state_dict[released])
    return {ours: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for ours, tensors in parts.items()}


def _entries(own: Iterable[str], feature_fusion: bool) -> list[Entry]:
    keys = set(own)
    depth = 1 + max(int(match[1]) for key in keys if (match := re.match(r"base_model\.blocks\.(\d+)\.", key)))
    return [entry for entry in _all_entries(keys, depth, feature_fusion) if entry.ours in keys]


def _all_entries(keys: set[str], depth: int, feature_fusion: bool) -> Iterator[Entry]:
    """List every parameter that a model of this depth can have; convolutions, for one, have no bias."""
    embeddings, encoder = "transformer.embeddings.", "transformer.encoder."
    yield Entry(embeddings + "position_embeddings", "base_model.pos_embed", None)
    yield Entry(embeddings + "cls_token", "base_model.cls_token", None)
    backbone, hybrid = "base_model.patch_embed.backbone.", embeddings + "hybrid_model."
    yield from _module(backbone + "stem.conv", hybrid + "root.conv")
    yield from _module(backbone + "stem.norm", hybrid + "root.gn")
    unit = re.compile(re.escape(backbone) + r"stages\.(\d+)\.blocks\.(\d+)\.")
    for stage, block in sorted({(int(m[1]), int(m[2])) for key in keys if (m := unit.match(key))}):
        for ours, theirs in UNIT:
            name = f"{hybrid}body.block{stage + 1}.unit{block + 1}.{theirs}"
            yield from _module(f"{backbone}stages.{stage}.blocks.{block}.{ours}", name)
    yield from _module("base_model.patch_embed.proj", embeddings + "patch_embeddings")
    for i in range(depth):
        fused = feature_fusion and i == depth - 1
        for ours, theirs in BLOCK:
            name = f"{encoder}{'ff_last_layer' if fused else f'layer.{i}'}.{theirs}"
            yield from _module(f"base_model.blocks.{i}.{ours}", name)
    yield from _module("base_model.norm", encoder + ("ff_encoder_norm" if feature_fusion else "encoder_norm"))
    yield from _module("base_model.head", "head")


def _module(ours: str, released: str) -> Iterator[Entry]:
    last = released.rpartition(".")[2]
    part = QKV.index(last) if last in QKV else None
    for name in ("weight", "bias"):
        yield Entry(f"{released}.{name}", f"{ours}.{name}", part)


def _check_names(wanted: set[str], found: Iterable[str], feature_fusion: bool, source: object) -> None:
    found = set(found)
    if wanted == found:
        return
    fused = any(key.startswith("transformer.encoder.ff_last_layer.") for key in found)
    if fused != feature_fusion and any(key.startswith("transformer.encoder.") for key in found):
        how, do = ("with", "add") if fused else ("without", "leave out")
        raise UserError(f"{source} is of a model {how} feature fusion: {do} --feature_fusion")
    for names, verb in ((wanted - found, "lacks"), (found - wanted, "holds the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source} {verb} {min(names)}{more}: it belongs to another --model_type")
