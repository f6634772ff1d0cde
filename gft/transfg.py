"""The model that the GFT repository calls "TransFG". It is not the TransFG of He et al. (AAAI 2022).

Axes: B batch, N tokens, P patches, K kept patches, D width.
"""

from typing import Any, NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from common.errors import UserError
from common.models.vit import (
    SelfAttention,
    build_vit,
    freeze,
    freeze_beyond,
    num_heads,
    run_blocks,
    select_tokens,
)

DEPTH = 8  # ViT blocks before the selection; the later ones stay in the state_dict but are never run
NUM_LOCAL_BLOCKS = 2


class PartSelection(NamedTuple):
    """What the scorer chose, best patch first; none of it carries a gradient."""

    scores: Tensor  # (B, P), before the softmax, which leaves their order as it is
    indices: Tensor  # (B, K), kept patches as row-major positions of the image's patch grid


class LocalBlock(nn.Module):
    """Pre-norm transformer block: qkv without bias, MLP ratio 4, LayerNorm epsilon 1e-5 (timm's is 1e-6)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor, rows: int | None = None) -> Tensor:
        """Return the first `rows` (default all) tokens of (B, N, D) as they leave the block: (B, rows, D)."""
        q, k, v = self.attn.heads(self.norm1(tokens))
        tokens = tokens[:, :rows] + self.attn.attend(q[:, :, :rows], k, v)
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class TransFG(nn.Module):
    """The GFT repository's baseline "TransFG", which is not the AAAI 2022 model of that name.

    ViT blocks 1 to 8, a scorer that keeps the best `num_parts` patches, two new transformer blocks on CLS and
    those patches, CLS to a linear classifier without a norm. There is no attention product, no overlap and no
    contrastive loss. The selection is hard, so the scorer never gets a gradient: it and the parameters behind
    block 8 have `requires_grad=False`; names, shapes and counts are the released ones. With
    `patch_drop_rate`, indices in training count the surviving patches.

    Raises UserError for backbones that are no timm VisionTransformer with a CLS token and 9 blocks or more,
    and for more parts than patches.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224",
        num_classes: int = 100,
        img_size: int | tuple[int, int] = 224,
        pretrained: bool = False,
        num_parts: int = 100,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_parts = num_parts
        # The arguments that build it again, for model.json.
        self.config = {"backbone": backbone, "num_classes": num_classes, "img_size": img_size, "num_parts": num_parts}
        self.config |= backbone_kwargs
        self.base_model = build_vit(backbone, img_size, pretrained, min_blocks=DEPTH + 1, **backbone_kwargs)
        num_patches = self.base_model.patch_embed.num_patches
        if not 1 <= num_parts <= num_patches:
            raise UserError(f"num_parts {num_parts} must lie between 1 and the {num_patches} patches of {backbone!r}.")
        dim, heads = self.base_model.embed_dim, num_heads(self.base_model)
        self.part_select = nn.Sequential(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, 1))
        self.local_blocks = nn.ModuleList(LocalBlock(dim, heads) for _ in range(NUM_LOCAL_BLOCKS))
        self.classifier = nn.Linear(dim, num_classes)
        freeze_beyond(self.base_model, DEPTH)
        freeze(self.part_select)

    def forward(self, images: Tensor, return_selection: bool = False) -> Tensor | tuple[Tensor, PartSelection]:
        """Return logits (B, num_classes) of images (B, 3, height, width), with the selection if asked."""
        tokens = run_blocks(self.base_model, images, DEPTH)
        cls, patches = tokens[:, :1], tokens[:, self.base_model.num_prefix_tokens :]
        scores = self._score(patches)
        indices = scores.topk(self.num_parts).indices
        tokens = torch.cat((cls, select_tokens(patches, indices)), dim=1)  # (B, 1 + K, D)
        *blocks, last = self.local_blocks
        for block in blocks:
            tokens = block(tokens)
        logits = self.classifier(last(tokens, rows=1)[:, 0])  # only CLS is read: only it is computed
        return (logits, PartSelection(scores, indices)) if return_selection else logits

    @torch.no_grad()
    def _score(self, patches: Tensor) -> Tensor:
        """Return part scores (B, P) of patches (B, P, D), in the weights' precision even under autocast."""
        with torch.autocast(patches.device.type, enabled=False):
            scores: Tensor = self.part_select(patches.to(self.classifier.weight.dtype))  # (B, P, 1)
        return scores.squeeze(-1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the ViT blocks in the backward pass instead of keeping their activations."""
        self.base_model.set_grad_checkpointing(enable)
