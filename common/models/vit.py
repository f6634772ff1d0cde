"""What models built on a timm ViT share: building it, running its first blocks, freezing the rest, attention.

Axes: B batch, H heads, N tokens (prefix tokens first, CLS foremost), Q query rows, K kept tokens, D width,
d head width.
"""

from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError

# Children of a timm ViT that stand before its blocks; every other child stands behind them.
STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")

# What a model does with the patches behind its last block: trains on them, only looks at them, or never reads them.
Use = Literal["learnt", "seen", "unread"]


def build_vit(
    backbone: str,
    img_size: int | tuple[int, int],
    pretrained: bool = False,
    min_blocks: int = 1,
    **backbone_kwargs: Any,
) -> VisionTransformer:
    """Build a timm VisionTransformer with a CLS token and at least `min_blocks` blocks, its own head kept.

    `backbone_kwargs` go to `timm.create_model`. Raises UserError for any other backbone, and for an
    `img_size` in pixels (height, width) that the patches do not tile: timm would drop the border unsaid.
    """
    wanted = f"a timm VisionTransformer with a CLS token and at least {min_blocks} blocks is needed"
    try:
        vit = timm.create_model(backbone, pretrained=pretrained, img_size=img_size, **backbone_kwargs)
    except TypeError as error:  # arguments that only ViTs take
        raise UserError(f"backbone {backbone!r} cannot be built ({error}): {wanted}.") from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"backbone {backbone!r} is a {type(vit).__name__}: {wanted}.")
    if vit.cls_token is None:
        raise UserError(f"backbone {backbone!r} has no CLS token: {wanted}.")
    if len(vit.blocks) < min_blocks:
        raise UserError(f"backbone {backbone!r} has {len(vit.blocks)} blocks: {wanted}.")
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    patch = vit.patch_embed.patch_size
    if not backbone_kwargs.get("dynamic_img_pad") and any(s % p for s, p in zip(sides, patch, strict=True)):
        raise UserError(f"img_size {img_size} is not a multiple of the patch size {patch} of {backbone!r}.")
    return vit


def num_heads(vit: VisionTransformer) -> int:
    """Return the number of attention heads of the first block, whatever kind of timm block it is."""
    heads = (getattr(module, "num_heads", None) for module in vit.blocks[0].modules())
    return int(next(n for n in heads if n is not None))


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Return the tokens (B, N, D) that enter the first block, for images (B, 3, height, width)."""
    tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    return tokens


def run_blocks(vit: VisionTransformer, images: Tensor, depth: int, patches: Use = "learnt") -> Tensor:
    """Return the tokens as they leave block number `depth`, without the final norm.

    images (B, 3, height, width) -> (B, N, D), or (B, 1, D) if patches are `unread`; see `run_used`. timm's dropouts,
    pre-norm and gradient checkpointing apply.
    """
    x = embed(vit, images)
    for number, block in enumerate(vit.blocks[:depth], 1):
        use: Use = patches if number == depth else "learnt"
        if vit.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(run_used, block, x, use, use_reentrant=False)
        else:
            x = run_used(block, x, use)
    return x


def run_block(block: Block, tokens: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run one plain timm block, (B, N, D), and hand out the queries and keys (B, H, N, d) of its attention.

    Only the first `rows` tokens (default all) are computed: (B, rows, D). Attention stays fused; dropout, layer scale
    and stochastic depth are the block's own. Gated and normed attention, which newer timm has, are not handled.
    """
    q, k, v = _heads(block, tokens)
    return _rows(block, tokens[:, :rows], q[:, :, :rows], k, v), q, k


def run_used(block: Any, tokens: Tensor, patches: Use) -> Tensor:
    """Run a timm block no further than its output is used: (B, N, D), or only CLS, (B, 1, D), if patches are `unread`.

    Patches that are `seen` have the values they would have, and no gradient. Blocks that are not plain are run whole;
    so are seen patches under stochastic depth, which drops CLS and patches of an image together.
    """
    whole = patches == "learnt" or (patches == "seen" and not torch.is_grad_enabled())
    if whole or not is_plain(block) or (patches == "seen" and not isinstance(block.drop_path1, nn.Identity)):
        out: Tensor = block(tokens)
        return out
    q, k, v = _heads(block, tokens)
    cls = _rows(block, tokens[:, :1], q[:, :, :1], k, v)
    if patches == "unread":
        return cls
    with torch.no_grad():
        others = _rows(block, tokens[:, 1:], q[:, :, 1:], k, v)
    return torch.cat((cls, others), dim=1)


def _heads(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, H, N, d), of tokens (B, N, D)."""
    attn: Any = block.attn
    qkv = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1))  # (B, N, 3, H, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _rows(block: Block, tokens: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What becomes of some tokens (B, Q, D), whose queries are q (B, H, Q, d)."""
    attn: Any = block.attn
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if block.training else 0.0)  # (B, H, Q, d)
    out = attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))
    tokens = tokens + block.drop_path1(block.ls1(out))
    done: Tensor = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    return done


def is_plain(block: Any) -> bool:
    """Whether `run_block` computes what this block does: neither another order nor attention of another kind."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    norm = getattr(block.attn, "norm", None)  # newer timm's
    return getattr(block.attn, "gate", None) is None and (norm is None or isinstance(norm, nn.Identity))


def freeze(*modules: nn.Module) -> None:
    """Keep parameters that no gradient can reach from DistributedDataParallel and from weight decay."""
    for module in modules:
        module.requires_grad_(False)


def freeze_beyond(vit: VisionTransformer, depth: int) -> None:
    """Freeze what `run_blocks(vit, images, depth)` does not use: later blocks, norms, pooling and heads."""
    behind = [child for name, child in vit.named_children() if name not in (*STEM, "blocks")]
    freeze(*vit.blocks[depth:], *behind)


class SelfAttention(nn.Module):
    """Multi-head self-attention in two steps, so that a caller can read the heads or ask for fewer rows."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, H, N, d), of tokens (B, N, D)."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the projected output (B, Q, D) of the queries q (B, H, Q, d) over k and v (B, H, N, d)."""
        out = F.scaled_dot_product_attention(q, k, v)  # (B, H, Q, d)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


def select_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens at `indices` (B, K): (B, N, D) -> (B, K, D)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
