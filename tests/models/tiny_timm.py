"""GFT and the repository's TransFG at a tiny size, and attention written out."""

import math
from typing import Any

import torch
from formula import fill_image, fill_state_dict
from torch import Tensor

from gft import GFT, TransFG

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 9, "num_heads": 3, "num_classes": 7}
VIT, DEIT = "vit_base_patch16_224", "deit_tiny_distilled_patch16_224"
BUILDS: dict[str, tuple[type, dict[str, Any]]] = {
    "described": (GFT, {"released": False}),
    "released": (GFT, {"released": True}),
    "transfg": (TransFG, {"num_parts": 20}),
}


def tiny(name: str = "described", backbone: str = VIT, **changes: Any) -> Any:
    build, sizes = BUILDS[name]
    model = build(backbone, **{**TINY, **sizes, **changes})
    fill_state_dict(model)
    return model.eval()


def images(batch: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return fill_image(batch, 3, *size)


def plain_attention(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (N, D) and the raw scores (H, N, N) for the tokens (N, D) of one image, by the definition."""
    width = tokens.shape[-1] // attention.num_heads
    q_weight, k_weight, v_weight = attention.qkv.weight.chunk(3)
    outputs, raw_scores = [], []
    for head in range(attention.num_heads):
        rows = slice(head * width, (head + 1) * width)
        q, k, v = tokens @ q_weight[rows].T, tokens @ k_weight[rows].T, tokens @ v_weight[rows].T
        raw = q @ k.T / math.sqrt(width)
        outputs.append(raw.exp() / raw.exp().sum(-1, keepdim=True) @ v)
        raw_scores.append(raw)
    out = torch.cat(outputs, dim=-1) @ attention.proj.weight.T + attention.proj.bias
    return out, torch.stack(raw_scores)
