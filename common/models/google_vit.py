"""The ViT that FFVT and TransFG are built on, with its released initialisation and names."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.models.authors_names import Entry, modules

# Modules of one block, ours and theirs, in the order of a released file.
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


class Sizes(Protocol):
    """What `build_google_vit` reads of a configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def dropout(self) -> float: ...


def build_google_vit(
    sizes: Sizes, img_size: tuple[int, int], num_classes: int, zero_head: bool = True, **patches: Any
) -> VisionTransformer:
    """Return a timm ViT with dropout behind the position embedding and in the MLPs, none on attention, eps 1e-6.

    `patches` are timm's arguments of the patch embedding. Initialised as the released ViTs are: PyTorch's defaults, but
    xavier_uniform MLPs with biases of N(0, 1e-6); CLS, positions and (`zero_head`) the head zero.
    """
    vit = VisionTransformer(
        img_size=img_size,
        num_classes=num_classes,
        embed_dim=sizes.hidden_size,
        depth=sizes.num_layers,
        num_heads=sizes.num_heads,
        mlp_ratio=sizes.mlp_dim / sizes.hidden_size,
        pos_drop_rate=sizes.dropout,
        proj_drop_rate=sizes.dropout,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
        **patches,
    )
    blocks: list[Any] = list(vit.blocks)
    for block in blocks:
        block.attn.proj_drop = nn.Identity()  # timm has one rate for attention and MLP
    _initialise(vit, zero_head)
    return vit


@torch.no_grad()
def _initialise(vit: VisionTransformer, zero_head: bool) -> None:
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
    blocks: list[Any] = list(vit.blocks)
    for block in blocks:
        for layer in (block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
    zeros: list[Any] = [vit.cls_token, vit.pos_embed, *(vit.head.parameters() if zero_head else ())]
    for parameter in zeros:
        nn.init.zeros_(parameter)


def block_entries(num_layers: int, last: str | None) -> Iterator[Entry]:
    """List the parameters of the blocks; the `last` of them may have a released name of its own."""
    for i in range(num_layers):
        theirs = last if last is not None and i == num_layers - 1 else f"layer.{i}"
        yield from modules(f"base_model.blocks.{i}.", f"transformer.encoder.{theirs}.", BLOCK)
