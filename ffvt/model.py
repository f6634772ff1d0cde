"""FFVT: Feature Fusion Vision Transformer (Wang, Yu, Gao, BMVC 2021, arXiv 2107.02341).

Axes: B batch, L blocks, H heads, N tokens (CLS foremost), K tokens picked a block, D width, d head width, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct, HybridEmbed, StdConv2d
from timm.models.resnetv2 import Bottleneck, DownsampleConv, ResNetV2
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.models.authors_names import Entry, ReleasedNames
from common.models.google_vit import build_google_vit
from common.models.vit import embed, run_block, select_tokens
from common.weights import LoadReport, load_npz
from ffvt.authors_names import layout


@dataclass(frozen=True)
class Config:
    """The sizes of one ViT. `patch_size` is in pixels; behind a ResNet (`resnet_layers`: units a stage) it is 16."""

    hidden_size: int
    mlp_dim: int
    num_heads: int
    num_layers: int
    patch_size: int = 16
    resnet_layers: tuple[int, ...] | None = None
    dropout: float = 0.1  # behind the position embedding and in the MLPs

    def __post_init__(self) -> None:
        for name in ("hidden_size", "mlp_dim", "num_heads", "num_layers", "patch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected 1 or more")
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} cannot be divided among num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout}: expected 0 or more, and less than 1")


CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        "ViT-B_16": Config(768, 3072, 12, 12),
        "ViT-B_32": Config(768, 3072, 12, 12, patch_size=32),
        "ViT-L_16": Config(1024, 4096, 16, 24),
        "ViT-L_32": Config(1024, 4096, 16, 24, patch_size=32),
        "ViT-H_14": Config(1280, 5120, 16, 32, patch_size=14),
        "R50-ViT-B_16": Config(768, 3072, 12, 12, resnet_layers=(3, 4, 9)),
    }
)


@torch.no_grad()
def maws_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the mutual attention weights (B, N) of queries and keys (B, H, N, d), in float32 or wider: FFVT, MAWS.

    With S = q k^T / sqrt(d): the mean over heads of the softmax over keys of row 0, times the mean over heads of the
    softmax over queries of column 0. Only that row and that column of S are formed, as sums of products, which keep
    float32 whatever autocast and TF32 do. There is no gradient: only the order of the scores is used.
    """
    dtype, scale = torch.promote_types(q.dtype, torch.float32), float(q.shape[-1] ** -0.5)
    q_cls, k_cls = q[:, :, :1].to(dtype) * scale, k[:, :, :1].to(dtype) * scale  # (B, H, 1, d)
    row = (q_cls * k).sum(-1).softmax(-1).mean(1)  # (B, N): CLS attends to each token
    column = (q * k_cls).sum(-1).softmax(-1).mean(1)  # (B, N): the share of each token in the attention to CLS
    return row * column


def _run_and_pick(block: Block, tokens: Tensor, num_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens (B, N, D) behind the block, those picked of them (B, K, D), and their indices (B, K)."""
    tokens, q, k = run_block(block, tokens)
    indices = maws_scores(q, k).topk(num_token).indices
    return tokens, select_tokens(tokens, indices), indices


class FFVT(ReleasedNames):
    """ViT whose last block sees CLS and the `num_token` tokens that MAWS picks from the output of each other block.

    All parameters are those of a timm ViT, `base_model`: with `feature_fusion` its last block and its norm are the
    paper's fusion layer, without it the model is a plain ViT. Picked tokens are in descending order of their score,
    block after block; CLS can be among them. `config` is a name of CONFIGS or the sizes themselves, `smoothing_value`
    is the label smoothing of the loss.

    Raises UserError where `img_size` (pixels, or (height, width)) is no multiple of the patch size, and where there
    are fewer patches than `num_token`.
    """

    theirs = "transformer."

    def __init__(
        self,
        config: str | Config | Mapping[str, Any],
        img_size: int | tuple[int, int],
        num_classes: int,
        feature_fusion: bool = True,
        num_token: int = 12,
        smoothing_value: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(config, str) and config not in CONFIGS:
            raise UserError(f"there is no model type {config!r}: choose one of {', '.join(CONFIGS)}")
        config = CONFIGS[config] if isinstance(config, str) else config
        config = config if isinstance(config, Config) else Config(**config)
        self.feature_fusion, self.num_token, self.smoothing_value = feature_fusion, num_token, smoothing_value
        # The arguments that build it again, for model.json.
        self.config: dict[str, Any] = {"config": asdict(config), "img_size": img_size, "num_classes": num_classes}
        self.config |= {"feature_fusion": feature_fusion, "num_token": num_token, "smoothing_value": smoothing_value}
        if num_classes < 1:
            raise UserError(f"num_classes {num_classes}: expected 1 or more")
        if not 0 <= smoothing_value <= 1:
            raise UserError(f"--smoothing_value {smoothing_value}: expected 0 to 1")
        self.base_model = _build_vit(config, img_size, num_classes)
        num_patches = self.base_model.patch_embed.num_patches
        if feature_fusion and not 1 <= num_token <= num_patches:
            raise UserError(
                f"--num_token {num_token}: expected 1 to {num_patches}, the patches of an image of {img_size} pixels"
            )
        if feature_fusion and config.num_layers < 2:
            raise UserError("feature fusion needs at least 2 blocks: one to pick tokens from, one to fuse them")

    def forward(self, images: Tensor, labels: Tensor | None = None, return_selection: bool = False) -> Any:
        """Return logits (B, C) of images (B, 3, height, width); (loss, logits) with `labels` (B,).

        With `return_selection` also, as the last, the picked indices (B, K) of each block but the last, 0 being CLS;
        none without feature fusion.
        """
        vit = self.base_model
        tokens = embed(vit, images)  # (B, N, D)
        *earlier, last = vit.blocks
        fused, selection = [], []
        for block in earlier:
            if self.feature_fusion:
                tokens, picked, indices = self._run(_run_and_pick, block, tokens, self.num_token)
                fused.append(picked)
                selection.append(indices)
            else:
                tokens = self._run(block, tokens)
        if self.feature_fusion:
            tokens = torch.cat((tokens[:, :1], *fused), dim=1)  # (B, 1 + (L-1) K, D)
        tokens, _, _ = self._run(run_block, last, tokens, 1)  # only CLS is read: only it is computed
        logits = vit.head(vit.norm(tokens[:, 0]))  # (B, C)
        output: tuple[Any, ...] = (logits,)
        if labels is not None:
            output = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing_value), logits
        if return_selection:
            output = *output, tuple(selection)
        return output if len(output) > 1 else logits

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        if self.base_model.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.base_model.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.base_model.head

    def load_npz(self, path: str | Path, zero_head: bool = True) -> LoadReport:
        """Load a Google ViT checkpoint in place, as the released loader does; report names of `state_dict()`.

        With feature fusion the file's last block and norm are left out: the fusion layer keeps its initialisation.
        The head is zero afterwards, or with zero_head=False the file's, which must have as many classes.
        Raises UserError unless exactly the other parameters fit; the model is then unchanged.
        """
        fusion = (f"blocks.{len(self.base_model.blocks) - 1}.", "norm.") if self.feature_fusion else ()
        leave, need = ((*fusion, "head."), ()) if zero_head else (fusion, ("head.weight", "head.bias"))
        report = load_npz(self.base_model, path, leave, need)
        if zero_head:
            for parameter in self.base_model.head.parameters():
                nn.init.zeros_(parameter)
        loaded, left = (tuple(f"base_model.{key}" for key in keys) for keys in (report.loaded, report.left))
        return LoadReport(loaded, left)

    def _layout(self) -> list[Entry]:
        return list(layout(self.state_dict(), self.feature_fusion))

    def _converted(self, state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
        fused = any(key.startswith("transformer.encoder.ff_last_layer.") for key in state)
        if fused != self.feature_fusion and any(key.startswith("transformer.encoder.") for key in state):
            how, do = ("with", "add") if fused else ("without", "leave out")
            raise UserError(f"{source} is of a model {how} feature fusion: {do} --feature_fusion")
        return super()._converted(state, source)


def _build_vit(config: Config, img_size: int | tuple[int, int], num_classes: int) -> VisionTransformer:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height % config.patch_size or width % config.patch_size or min(height, width) < config.patch_size:
        raise UserError(f"--img_size {img_size}: expected a multiple of the patch size {config.patch_size}")
    patches: dict[str, Any] = {"patch_size": config.patch_size}
    if config.resnet_layers is not None:
        patches = {"patch_size": 1, "embed_layer": partial(HybridEmbed, backbone=_build_resnet(config.resnet_layers))}
    return build_google_vit(config, (height, width), num_classes, **patches)


# The released hybrid pads as PyTorch does, not as TensorFlow ("same"), and its max pooling pads nothing.
_CONV = partial(StdConv2d, eps=1e-5)
_NORM = partial(GroupNormAct, num_groups=32, eps=1e-6)


def _build_resnet(layers: tuple[int, ...]) -> ResNetV2:
    """Return ResNet-V2 with weight-standardised convolutions and GroupNorm, (B, 3, 16h, 16w) -> (B, 1024, h, w)."""
    resnet = ResNetV2(list(layers), num_classes=0, global_pool="", preact=False, conv_layer=_CONV, norm_layer=_NORM)
    resnet.stem.pool = nn.MaxPool2d(kernel_size=3, stride=2)
    stages: list[Any] = list(resnet.stages)
    for stage in stages:
        _norm_each_channel(stage.blocks[0])
    return resnet


def resnet_unit(in_channels: int, out_channels: int, stride: int) -> Bottleneck:
    """Return the first unit of a stage of the released ResNet-V2, (B, in, h, w) -> (B, out, h/stride, w/stride)."""
    unit = Bottleneck(
        in_channels, out_channels, stride=stride, conv_layer=_CONV, norm_layer=_NORM, proj_layer=DownsampleConv
    )
    _norm_each_channel(unit)
    return unit


def _norm_each_channel(unit: Bottleneck) -> None:
    """Give the shortcut's GroupNorm a group a channel and PyTorch's epsilon, as released."""
    shortcut: Any = unit.downsample
    channels = shortcut.norm.num_channels
    shortcut.norm = GroupNormAct(channels, num_groups=channels, eps=1e-5, apply_act=False)
