"""GFT: Gradient Focal Transformer (arXiv 2504.09852), as described and as released.

Axes: B batch, H heads, N tokens, P patches entering a stage, K patches kept, D width, d head width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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

DEPTH = 8  # ViT blocks before the refinement stages; the later ones stay in the state_dict but are never run
KEEP_RATIOS = (0.75, 0.5, 0.25)  # of the patches that enter stage 1, not of the stage before
EMA_DECAY = 0.9
TEMPERATURE = 0.1


class StageSelection(NamedTuple):
    """What one stage found, most important patch first; none of it carries a gradient."""

    importance: Tensor  # (B, P), float32, sums to 1; positions as the patches enter the stage
    indices: Tensor  # (B, K), kept patches as positions among those P
    patches: Tensor  # (B, K), the same patches as row-major positions of the image's patch grid


def index_gradient(profile: Tensor) -> Tensor:
    """Return the derivative along the last axis: central differences inside, one-sided at both ends."""
    inner = (profile[..., 2:] - profile[..., :-2]) / 2
    left = profile[..., 1:2] - profile[..., :1]
    right = profile[..., -1:] - profile[..., -2:-1]
    return torch.cat((left, inner, right), dim=-1)


def smooth(profile: Tensor, kernel: Tensor) -> Tensor:
    """Return the last axis of (B, P) correlated with a kernel of three weights, zeros beyond the ends."""
    padded = F.pad(profile, (1, 1))
    left, centre, right = kernel.flatten().unbind()
    return left * padded[:, :-2] + centre * profile + right * padded[:, 2:]


class HierarchicalAttention(SelfAttention):
    """GALA (Gradient Attention Learning Alignment): self-attention that also ranks its tokens.

    No norm, residual or MLP inside. In training the scores are averaged with those of earlier calls (EMA). As
    in the released class that state mixes whatever images share a batch position. It is no part of the
    state_dict (`ema_grad` entries of released files are dropped on loading) and starts afresh when the batch
    shape or the device changes.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.smooth = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)
        nn.init.ones_(self.smooth.weight)  # a sum of three, not a mean: the z-score removes the scale
        self.ema: Tensor | None = None  # (B, P)
        self.register_load_state_dict_pre_hook(_drop_ema)  # type: ignore[no-untyped-call]  # torch's has no types

    @torch.no_grad()
    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Return scores (B, P) of the P tokens whose queries are given; `importance` makes weights of them.

        The mean over keys of the raw scores q k^T / sqrt(d) is linear in k: the N x N matrix is never formed.
        Top-k reads the scores, whose order the weights share but for ties: those underflow once scores are 10
        apart. There is no gradient, as top-k has none. Sums of products instead of matmul and convolution
        keep float32 whatever autocast and TF32 do: neighbouring scores differ by less than their rounding.
        """
        dtype = torch.promote_types(q.dtype, torch.float32)
        mean_key = k.mean(dim=2, keepdim=True, dtype=dtype)  # (B, H, 1, d)
        profile = (q * mean_key).sum(-1) / q.shape[-1] ** 0.5  # (B, H, P)
        strength = index_gradient(profile).abs().mean(dim=1)  # (B, P)
        strength = smooth(strength, self.smooth.weight.to(dtype))
        centred = strength - strength.mean(dim=-1, keepdim=True)
        scores = centred / (strength.std(dim=-1, keepdim=True) + 1e-6)
        return self._average(scores) if self.training else scores

    def _average(self, scores: Tensor) -> Tensor:
        finite = scores.isfinite().all(dim=-1, keepdim=True)  # NaN would never leave the average again
        if self.ema is None or self.ema.shape != scores.shape or self.ema.device != scores.device:
            self.ema = scores.where(finite, 0)
        else:
            self.ema = torch.where(finite, self.ema.mul(EMA_DECAY).add(scores, alpha=1 - EMA_DECAY), self.ema)
        return 0.5 * (scores + self.ema)


def importance(scores: Tensor) -> Tensor:
    """Return the weights (B, P) of GALA's scores, summing to 1 over the patches."""
    return (scores / TEMPERATURE).softmax(dim=-1)


def _drop_ema(_module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(f"{prefix}ema_grad", None)


class GFT(nn.Module):
    """ViT blocks 1 to 8, three stages of GALA and Progressive Patch Selection (PPS), a linear classifier.

    PPS keeps int(0.75 N), int(0.5 N), int(0.25 N) of the N patches (147, 98, 49 of 196) by importance.

    Described (default). CLS enters each GALA beside the patches and always stays. The importance of a patch
    is read from its own row of raw scores, averaged over all keys, CLS included; gradient, z-score and
    softmax run over the patches. Each GALA has a residual connection: our reading, since three fresh layers
    would otherwise stand between the pretrained CLS and the classifier. CLS after stage 3 is classified
    without a norm, as in the released class. Importance reaches the logits through top-k only, so no `smooth`
    convolution gets a gradient, and that of stage 3 cannot move the logits at all: nothing reads the patches
    that stage 3 keeps.

    Released (`released=True`). GALA sees the patches alone, without residual; the classifier reads CLS as it
    left block 8, so the stages cannot reach the logits. They run, and block 8 computes patches, only for
    `return_selection=True`.

    In both, importance is worked out only where it decides which patches go on or where the selection is
    asked for; an EMA therefore advances on just those training calls.

    Any timm VisionTransformer with a CLS token and 9 blocks or more serves as `backbone`; register and
    distillation tokens are dropped before the stages. With `patch_drop_rate`, positions in training count the
    surviving patches. Parameters that no gradient can reach have `requires_grad=False`; names, shapes and
    counts are the released ones.

    Raises UserError for other backbones, and for fewer than 4 patches.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224",
        num_classes: int = 100,
        img_size: int | tuple[int, int] = 224,
        released: bool = False,
        pretrained: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        self.released = released
        # The arguments that build it again, for model.json.
        self.config = {"backbone": backbone, "num_classes": num_classes, "img_size": img_size, "released": released}
        self.config |= backbone_kwargs
        self.base_model = build_vit(backbone, img_size, pretrained, min_blocks=DEPTH + 1, **backbone_kwargs)
        if self.base_model.patch_embed.num_patches < 4:
            raise UserError(f"img_size {img_size} gives {backbone!r} fewer than GFT's minimum of 4 patches.")
        dim, heads = self.base_model.embed_dim, num_heads(self.base_model)
        self.hierarchical_blocks = nn.ModuleList(HierarchicalAttention(dim, heads) for _ in KEEP_RATIOS)
        self.classifier = nn.Linear(dim, num_classes)
        freeze_beyond(self.base_model, DEPTH)
        freeze(*([self.hierarchical_blocks] if released else [gala.smooth for gala in self._galas()]))

    def forward(self, images: Tensor, return_selection: bool = False) -> Tensor | tuple[Tensor, list[StageSelection]]:
        """Return logits (B, num_classes) of images (B, 3, height, width), with the selections if asked."""
        cls_alone = self.released and not return_selection
        tokens = run_blocks(self.base_model, images, DEPTH, "unread" if cls_alone else "learnt")
        cls, patches = tokens[:, :1], tokens[:, self.base_model.num_prefix_tokens :]
        selection: list[StageSelection] = []
        if not self.released:
            cls, selection = self._refine(cls, patches, return_selection)
        elif return_selection:
            selection = self._select_as_released(patches)
        logits = self.classifier(cls[:, 0])
        return (logits, selection) if return_selection else logits

    def _galas(self) -> list[HierarchicalAttention]:
        galas: Any = list(self.hierarchical_blocks)
        return galas  # type: ignore[no-any-return]

    def _refine(self, cls: Tensor, patches: Tensor, return_selection: bool) -> tuple[Tensor, list[StageSelection]]:
        selection: list[StageSelection] = []
        tokens = torch.cat((cls, patches), dim=1)  # (B, 1 + N, D)
        *selecting, last = zip(self._galas(), kept_per_stage(patches.shape[1]), strict=True)
        for gala, keep in selecting:
            q, k, v = gala.heads(tokens)
            scores = gala.score(q[:, :, 1:], k)
            indices = scores.topk(keep).indices
            rows = F.pad(indices + 1, (1, 0))  # CLS, row 0, always stays
            tokens = select_tokens(tokens + gala.attend(q, k, v), rows)  # (B, 1 + K, D)
            if return_selection:
                selection.append(_stage(scores, indices, selection))
        gala, keep = last
        q, k, v = gala.heads(tokens)
        if return_selection:
            scores = gala.score(q[:, :, 1:], k)
            selection.append(_stage(scores, scores.topk(keep).indices, selection))
        cls = tokens[:, :1] + gala.attend(q[:, :, :1], k, v)  # the patches of this stage are read by nobody
        return cls, selection

    @torch.no_grad()
    def _select_as_released(self, tokens: Tensor) -> list[StageSelection]:
        selection: list[StageSelection] = []
        for gala, keep in zip(self._galas(), kept_per_stage(tokens.shape[1]), strict=True):
            q, k, v = gala.heads(tokens)
            scores = gala.score(q, k)
            indices = scores.topk(keep).indices
            tokens = select_tokens(gala.attend(q, k, v), indices)  # (B, K, D)
            selection.append(_stage(scores, indices, selection))
        return selection

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the ViT blocks in the backward pass instead of keeping their activations."""
        self.base_model.set_grad_checkpointing(enable)

    def training_state(self) -> dict[str, Tensor]:
        """Return copies of the EMA tensors, (B, P) each: what an exact resume needs beside the state_dict."""
        emas = {f"hierarchical_blocks.{i}.ema": gala.ema for i, gala in enumerate(self._galas())}
        return {key: ema.clone() for key, ema in emas.items() if ema is not None}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Restore `training_state()` onto the model's device; stages without an entry start afresh."""
        rest = dict(state)
        for i, gala in enumerate(self._galas()):
            ema = rest.pop(f"hierarchical_blocks.{i}.ema", None)
            gala.ema = None if ema is None else ema.to(gala.qkv.weight.device, copy=True)
        if rest:
            raise UserError(f"the training state holds {sorted(rest)}, which GFT does not have.")


def kept_per_stage(num_patches: int) -> list[int]:
    """Return how many of the image's patches each stage keeps: 147, 98, 49 of 196."""
    return [int(num_patches * ratio) for ratio in KEEP_RATIOS]


def _stage(scores: Tensor, indices: Tensor, before: list[StageSelection]) -> StageSelection:
    patches = before[-1].patches.gather(1, indices) if before else indices
    return StageSelection(importance(scores), indices, patches)
