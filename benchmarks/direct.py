"""Direct formulations: what the papers' equations say, written down as they stand and computed with nothing spared.

Every attention matrix is formed and kept, tokens are picked and crops are cut image by image, all rows of a last block
are computed where one is read. Each function takes one of our models and its images and returns the logits that the
model returns, of the same parameters: a reference to read, to test against, and to measure what the models save.

Axes: B batch, H heads, N tokens (CLS foremost), P patches, K kept patches, D width, d head width, C classes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.vit import embed
from ffvt.model import FFVT
from gft import GFT, TransFG
from gft.model import DEPTH as GFT_DEPTH
from gft.model import EMA_DECAY, KEEP_RATIOS, HierarchicalAttention, index_gradient
from gft.transfg import DEPTH as TRANSFG_DEPTH
from glsim.model_utils.glsim import ViTGLSim
from glsim.model_utils.transfg import TransFG as OfficialTransFG


def attention(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The raw scores of queries and keys (B, H, N, d), and the attention matrices that they become: (B, H, N, N)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores, scores.softmax(-1)


def run_block(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A timm block: tokens (B, N, D), raw scores and attention matrices (B, H, N, N)."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1))  # (B, N, 3, H, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores, matrices = attention(attn.q_norm(q), attn.k_norm(k))
    out = attn.attn_drop(matrices) @ v  # (B, H, N, d)
    out = attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))
    tokens = tokens + block.drop_path1(block.ls1(out))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), scores, matrices


def plain_vit(model: Any, images: Tensor) -> Tensor:
    """A timm ViT that classifies CLS."""
    tokens = embed(model, images)
    for block in model.blocks:
        tokens, _, _ = run_block(block, tokens)
    return model.head(model.norm(tokens)[:, 0])


def ffvt(model: FFVT, images: Tensor) -> Tensor:
    """FFVT, eq. 4 to 7 (arXiv 2107.02341): mutual attention weights by both softmaxes of the whole score matrices."""
    vit: Any = model.base_model
    tokens = embed(vit, images)
    *earlier, last = vit.blocks
    picked: list[list[Tensor]] = [[] for _ in tokens]
    for block in earlier:
        tokens, scores, by_keys = run_block(block, tokens)
        by_queries = scores.softmax(-2)
        weights = by_keys.mean(1)[:, 0] * by_queries.mean(1)[:, :, 0]  # (B, N)
        for image, (own, order) in enumerate(zip(tokens, weights.argsort(descending=True), strict=True)):
            picked[image] += [own[index] for index in order[: model.num_token]]
    fused = torch.stack([torch.stack(own) for own in picked])  # (B, (L - 1) K, D)
    tokens, _, _ = run_block(last, torch.cat((tokens[:, :1], fused), dim=1))
    return vit.head(vit.norm(tokens)[:, 0])


def official_transfg(model: OfficialTransFG, images: Tensor) -> Tensor:
    """TransFG, eq. 5 to 8 (arXiv 2103.07976): the product of the attention matrices of all blocks but the last."""
    vit: Any = model.base_model
    tokens = embed(vit, images)
    *earlier, part_layer = vit.blocks
    product: Tensor | None = None
    for block in earlier:
        tokens, _, matrices = run_block(block, tokens)
        matrices = matrices.detach()  # of the product only the largest entries are read
        product = matrices if product is None else matrices @ product
    assert product is not None
    parts = product[:, :, 0, 1:].argmax(-1) + 1  # (B, H)
    read = [torch.stack([own[0], *(own[part] for part in some)]) for own, some in zip(tokens, parts, strict=True)]
    tokens, _, _ = run_block(part_layer, torch.stack(read))  # (B, 1 + H, D)
    return vit.head(vit.norm(tokens)[:, 0])


def glsim(model: ViTGLSim, images: Tensor) -> Tensor:
    """GLSim (arXiv 2407.12891): crops one by one, each by `torch.nn.functional.interpolate`."""
    vit: Any = model.base_model

    def encode(batch: Tensor) -> Tensor:
        tokens = embed(vit, batch)
        for block in vit.blocks:
            tokens, _, _ = run_block(block, tokens)
        return vit.norm(tokens)

    tokens = encode(images)
    size = images.shape[-2:]
    crops = [
        F.interpolate(image[None, :, top:bottom, left:right], size, mode="bilinear", align_corners=True)
        for image, (top, bottom, left, right) in zip(images, model.select(tokens).boxes.tolist(), strict=True)
    ]
    tokens = torch.cat((tokens, encode(torch.cat(crops))), dim=1)  # (B, 2 N, D)
    if model.config.reducer == "cls":
        tokens = tokens[:, :: model.config.seq_len_ind]
    for block in model.aggregator:
        tokens, _, _ = run_block(block, tokens)
    return model.head(model.aggregator_norm(tokens)[:, 0])


def _gala(gala: HierarchicalAttention, tokens: Tensor, prefix: int, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """GALA (arXiv 2504.09852): its output (B, N, D), and the scores (B, P) of the patches behind `prefix` tokens."""
    qkv = gala.qkv(tokens).unflatten(-1, (3, gala.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores, matrices = attention(q, k)
    profile = scores.detach().mean(-1)[:, :, prefix:]  # (B, H, P): top-k passes no gradient on
    strength = gala.smooth(index_gradient(profile).abs().mean(1, keepdim=True)).squeeze(1).detach()  # (B, P)
    strength = (strength - strength.mean(-1, keepdim=True)) / (strength.std(-1, keepdim=True) + 1e-6)
    if gala.training:
        average = strength if past is None else EMA_DECAY * past + (1 - EMA_DECAY) * strength
        strength = 0.5 * (strength + average)
    return gala.proj((matrices @ v).transpose(1, 2).flatten(2)), strength


def gft(model: GFT, images: Tensor, past: list[Tensor | None] | None = None) -> Tensor:
    """GFT as described, or as released where the model is so: all blocks and all three stages, whatever is read.

    `past` is each stage's moving average before this call, in training; none: this is the first call.
    """
    vit: Any = model.base_model
    tokens = embed(vit, images)
    for block in vit.blocks[:GFT_DEPTH]:
        tokens, _, _ = run_block(block, tokens)
    cls, patches = tokens[:, :1], tokens[:, vit.num_prefix_tokens :]
    total = patches.shape[1]
    stages: list[Any] = list(model.hierarchical_blocks)
    for gala, ratio, average in zip(stages, KEEP_RATIOS, past or [None] * len(stages), strict=True):
        inside = patches if model.released else torch.cat((cls, patches), dim=1)
        out, scores = _gala(gala, inside, inside.shape[1] - patches.shape[1], average)
        if not model.released:
            cls, out = (inside + out).split((1, patches.shape[1]), dim=1)
        order = scores.argsort(descending=True)[:, : int(total * ratio)]
        patches = torch.stack([own[indices] for own, indices in zip(out, order, strict=True)])  # (B, K, D)
    return model.classifier(cls[:, 0])


def transfg(model: TransFG, images: Tensor) -> Tensor:
    """What the GFT repository calls TransFG."""
    vit: Any = model.base_model
    tokens = embed(vit, images)
    for block in vit.blocks[:TRANSFG_DEPTH]:
        tokens, _, _ = run_block(block, tokens)
    cls, patches = tokens[:, :1], tokens[:, vit.num_prefix_tokens :]
    order = model.part_select(patches).softmax(1).squeeze(-1).argsort(descending=True)[:, : model.num_parts]
    kept = torch.stack([own[indices] for own, indices in zip(patches, order, strict=True)])
    tokens = torch.cat((cls, kept), dim=1)
    blocks: list[Any] = list(model.local_blocks)
    for block in blocks:
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        tokens = tokens + block.attn.proj((attention(q, k)[1] @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.classifier(tokens[:, 0])


DIRECT: dict[type[nn.Module], Any] = {
    FFVT: ffvt,
    OfficialTransFG: official_transfg,
    ViTGLSim: glsim,
    GFT: gft,
    TransFG: transfg,
}
