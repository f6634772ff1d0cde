"""What a ViT looks at: masks over the patches by the published names.

Axes: B batch, L blocks, H heads, N tokens (prefix tokens first, CLS foremost), P patches, D width, d head width.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.errors import UserError
from common.models.vit import embed, is_plain, run_block
from ffvt.model import FFVT, maws_scores
from gft.model import DEPTH, GFT
from glsim.model_utils.glsim import similarity
from glsim.model_utils.transfg import TransFG, joint_attention

MASKS = ("glsim_norm", "attention", "rollout", "psm", "maws", "asim")  # one of each kind
SPELLINGS = (
    "gls, glsim_norm, glsim_BLOCK, attention[_BLOCK], rollout[_UNTIL], rollout_FROM_TO, psm[_HEAD], maws[_BLOCK], asim"
)


@dataclass
class Evidence:
    """What masks are computed from."""

    tokens: Tensor  # (B, N, D), behind the last norm
    blocks: list[Tensor]  # (B, N, D) behind each block
    attention: list[tuple[Tensor, Tensor]]  # queries and keys (B, H, N, d) of each block
    prefix: int  # tokens that are no patches
    has_cls: bool
    grid: tuple[int, int]  # rows and columns of patches


@torch.no_grad()
def gather(model: nn.Module, images: Tensor) -> Evidence:
    """Run the encoder of a model in evaluation mode on images (B, 3, height, width), as the model does.

    Of models whose last block reads selected tokens alone (TransFG, FFVT) the blocks before it count, of GFT those
    before its stages, behind which there is no norm. Raises UserError for models that are no ViT, and for those of
    timm's ViTs whose attention is of another kind.
    """
    vit: Any = getattr(model, "base_model", model)
    if not isinstance(vit, VisionTransformer) or not all(map(is_plain, vit.blocks)):
        raise UserError(f"masks need a ViT of plain blocks: {type(model).__name__} is none; leave --vis_mask out")
    selects = isinstance(model, TransFG) or (isinstance(model, FFVT) and model.feature_fusion)
    depth = DEPTH if isinstance(model, GFT) else len(vit.blocks) - selects
    adapters: Any = getattr(model, "adapters", ())
    tokens = embed(vit, images)
    blocks, attention = [], []
    read: list[Any] = list(vit.blocks)[:depth]
    for i, block in enumerate(read):
        tokens, q, k = run_block(block, tokens)
        tokens = tokens + adapters[i](tokens) if adapters else tokens
        blocks.append(tokens)
        attention.append((q, k))
    tokens = tokens if isinstance(model, GFT) else vit.norm(tokens)
    has_cls = vit.cls_token is not None
    return Evidence(tokens, blocks, attention, vit.num_prefix_tokens, has_cls, vit.patch_embed.grid_size)


def masks_of(model: nn.Module, images: Tensor, names: Collection[str], released: bool = False) -> dict[str, np.ndarray]:
    """Return the masks (B, rows, columns) of these names for images (B, 3, height, width); see `make_mask`."""
    if not names:
        return {}
    evidence = gather(model, images)
    masks = {name: make_mask(evidence, name, released).unflatten(1, evidence.grid) for name in names}
    return {name: mask.float().cpu().numpy() for name, mask in masks.items()}


@torch.no_grad()
def make_mask(evidence: Evidence, name: str, released: bool = False) -> Tensor:
    """Return the mask (B, P) of this name.

    - `glsim_norm`, `gls`: cosine similarity of the patches to CLS, or to their mean where there is no CLS;
      `glsim_l`: the same behind block l, from 0.
    - `attention_l`: attention of CLS to the patches in block l, from 0, mean over heads; no number: the last block.
    - `rollout_a_b`: attention rollout (Abnar and Zuidema, ACL 2020) through blocks a to b - 1; `rollout_b`: from 0;
      no number: all blocks.
    - `psm_h`: CLS row of the product of all attention matrices of head h (TransFG); no number: summed over heads.
    - `maws_l`: mutual attention weights of block l (FFVT); no number: the last block but one.
    - `asim`: similarity times rollout, each less its minimum and divided by its maximum.

    `released` gives what the released program computes: `attention` is the mean over all tokens in head 0; `rollout`
    without a number takes 11 blocks at most; `psm_0` is the sum over heads, and `psm_h` mixes rows of other heads in.
    Raises UserError for an unknown name, and for a number or a kind that the model does not have.
    """
    count, heads = len(evidence.attention), evidence.attention[0][0].shape[1]
    kind, *words = name.split("_")
    if kind in ("attention", "rollout", "psm", "maws", "asim") and not evidence.has_cls:
        raise UserError(f"mask {name!r} reads the attention of CLS, and this model has none: use gls")
    match kind, *words:
        case ["gls"] | ["glsim", "norm"]:
            return _similarity(evidence, evidence.tokens)
        case ["glsim", block]:
            return _similarity(evidence, evidence.blocks[_number(name, block, 0, count - 1)])
        case ["attention"] | ["attention", _]:
            last = _number(name, words[0], 0, count - 1) if words else count - 1
            return _attention(evidence, last, released)
        case ["rollout"]:
            return _rollout(evidence, 0, min(count, 11) if released else count)
        case ["rollout", until]:
            return _rollout(evidence, 0, _number(name, until, 1, count))
        case ["rollout", first, behind]:
            start = _number(name, first, 0, count - 1)
            return _rollout(evidence, start, _number(name, behind, start + 1, count))
        case ["psm"] | ["psm", _]:
            head = _number(name, words[0], 0, heads - 1) if words else None
            return _psm(evidence, head, released)
        case ["maws"] | ["maws", _]:
            last = _number(name, words[0], 0, count - 1) if words else max(count - 2, 0)
            return maws_scores(*evidence.attention[last])[:, evidence.prefix :]
        case ["asim"]:
            return _by_maximum(_similarity(evidence, evidence.tokens)) * _by_maximum(_rollout(evidence, 0, count))
    raise UserError(f"there is no mask {name!r}: expected {SPELLINGS}")


def _number(name: str, word: str, first: int, last: int) -> int:
    if not word.isdecimal() or not first <= int(word) <= last:
        raise UserError(f"mask {name!r}: expected a number from {first} to {last} in place of {word!r}")
    return int(word)


def _similarity(evidence: Evidence, tokens: Tensor) -> Tensor:
    patches = tokens[:, evidence.prefix :]
    anchor = tokens[:, :1] if evidence.has_cls else patches.mean(1, keepdim=True)
    return similarity(torch.cat((anchor, patches), dim=1), "cos")


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention (B, H, any rows, N) of queries to keys (B, H, N, d), in float32 or wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q.to(dtype) * float(q.shape[-1] ** -0.5) @ k.to(dtype).mT).softmax(-1)


def _attention(evidence: Evidence, block: int, released: bool) -> Tensor:
    q, k = evidence.attention[block]
    if released:
        return _probabilities(q[:, 0], k[:, 0]).mean(1)[:, evidence.prefix :]
    return _probabilities(q[:, :, :1], k)[:, :, 0].mean(1)[:, evidence.prefix :]


def _rollout(evidence: Evidence, first: int, behind: int) -> Tensor:
    """CLS row of the product of (A + 1) / 2, whose rows sum to 1, from the last block outwards."""
    q, _ = evidence.attention[0]
    row = torch.zeros(len(q), 1, q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    row[..., 0] = 1
    for q, k in reversed(evidence.attention[first:behind]):
        row = (row @ _probabilities(q, k).mean(1) + row) / 2
    return row[:, 0, evidence.prefix :]


def _psm(evidence: Evidence, head: int | None, released: bool) -> Tensor:
    rows = joint_attention(reversed(evidence.attention))[..., evidence.prefix :]  # (B, H, P)
    if head is None or (released and head == 0):
        return rows.sum(1)
    if released:  # a sum into the rows that it reads
        return 2 * rows[:, head] + 2 * rows[:, 1:head].sum(1) + rows[:, head + 1 :].sum(1)
    return rows[:, head]


def _by_maximum(mask: Tensor) -> Tensor:
    return (mask - mask.amin(1, keepdim=True)) / mask.amax(1, keepdim=True)
