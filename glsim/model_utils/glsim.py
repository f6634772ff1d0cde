"""GLSim: a ViT that crops around the patches most similar to CLS, and reads image and crop together.

Rios, Hu, Lai, ISCAS 2025, arXiv 2407.12891. Axes: B batch, L blocks, H heads, N tokens (CLS foremost), D width,
S image side in pixels, O selected patches, C classes.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.models.authors_names import Entry, ReleasedNames
from common.models.vit import Use, embed, run_block, run_used
from common.weights import LoadReport, load_npz
from glsim.model_utils.config import ViTConfig
from glsim.model_utils.layout import layout


class Selection(NamedTuple):
    """What global-local similarity found in each image."""

    similarity: Tensor  # (B, N - 1), of each patch to CLS; a distance for l1 and l2
    indices: Tensor  # (B, O), of the most similar patches, best first
    boxes: Tensor  # (B, 4), pixels: first row, row behind the last, first column, column behind the last


def similarity(tokens: Tensor, metric: str) -> Tensor:
    """Return the similarity (B, N - 1) of the patches to CLS, the first of the tokens (B, N, D), in float32 or wider.

    `cos`: cosine. `l1`, `l2`: mean over channels of the absolute or squared difference, smaller for more similar.
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    cls, patches = tokens[:, :1], tokens[:, 1:]
    if metric == "cos":
        return F.cosine_similarity(cls, patches, dim=-1)
    difference = cls - patches
    return (difference.abs() if metric == "l1" else difference.square()).mean(-1)


def bounding_boxes(indices: Tensor, grid: int, patch_size: int, inclusive: bool = False) -> Tensor:
    """Return the boxes (B, 4) around the patches `indices` (B, O) of a square grid; see Selection for the order.

    As published a box ends where its last patch begins, unless it is one patch wide (high); `inclusive`: behind it.
    """
    ends = []
    for position in (indices // grid, indices % grid):
        first, last = position.amin(1), position.amax(1)
        ends += [first, last + 1 if inclusive else torch.maximum(last, first + 1)]
    return torch.stack(ends, dim=1).clamp(max=grid) * patch_size


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Return the boxes (B, 4) of the square images (B, 3, S, S), each resized to S x S: bilinear, corners aligned.

    One sampling for the whole batch: the corners of a box are pixels of the image, so that no point lies outside.
    """
    size = images.shape[-1]
    first, behind = boxes[:, 0::2].double(), boxes[:, 1::2].double()  # (B, 2): rows, columns
    steps = torch.linspace(0, 1, size, dtype=torch.float64, device=images.device)
    points = first[..., None] + (behind - 1 - first)[..., None] * steps  # (B, 2, S), pixels
    rows, columns = (points * (2 / (size - 1)) - 1).unbind(1)  # (B, S), in [-1, 1]
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)  # (B, S, S, 2)
    # In float64: a float32 coordinate is wrong by 1e-5 pixels, which sharp edges turn into visible differences.
    crops = F.grid_sample(images.double(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return crops.to(images.dtype)


class GLSimBase(ReleasedNames):
    """What GLSim around its own ViT and around timm's (`GLSimTimm`) do alike: a ViT, `base_model`, and its crop."""

    base_model: Any
    adapters: Any  # one behind each block, or none
    head: nn.Module
    options: Any  # image_size, test_flip, dynamic_top, sim_metric, anchor_random, crop_inclusive
    grid: int  # patches a side
    patch_size: int  # pixels

    def forward(self, images: Tensor, ret_dist: bool = False) -> Any:
        """Return logits (B, C) of images (B, 3, S, S), and also the crops (B, 3, S, S) where it crops.

        `ret_dist` adds: the tokens (B, N, D) of the image that `select` takes, the tokens behind each block (L of
        them), and for each block the attention probabilities and the raw scores, both (B, H, N, N). Raises UserError
        for images of another size.
        """
        size = self.options.image_size
        if images.ndim != 4 or images.shape[-2:] != (size, size):
            raise UserError(f"images of shape {tuple(images.shape)}: this model takes {size} x {size} pixels")
        logits, crops, *dist = self._run(images, ret_dist)
        if self.options.test_flip and not self.training:
            logits = (logits + self._run(images.flip(-1))[0]) / 2
        output = (logits,) if crops is None else (logits, crops)
        if ret_dist:
            return (*output, *dist)
        return logits if crops is None else output

    @torch.no_grad()
    def select(self, tokens: Tensor, places: Tensor | None = None) -> Selection:
        """Find the box around the patches most similar to the global representation, given tokens (B, N, D).

        `places` (B, K) says where on the grid the patches among the tokens are, if not all are there.
        """
        options = self.options
        found = similarity(self._global_first(tokens), options.sim_metric)  # (B, K)
        if options.anchor_random:
            indices = torch.rand_like(found).topk(options.dynamic_top).indices
        else:
            indices = found.topk(options.dynamic_top, largest=options.sim_metric == "cos").indices
        if places is not None:
            indices = places.gather(1, indices)
        return Selection(found, indices, bounding_boxes(indices, self.grid, self.patch_size, options.crop_inclusive))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's blocks in the backward pass instead of keeping their activations."""
        self.base_model.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def _run(self, images: Tensor, ret_dist: bool = False) -> tuple[Any, ...]:
        """Logits, crops or None, and what `ret_dist` adds."""
        raise NotImplementedError

    def _global_first(self, tokens: Tensor) -> Tensor:
        """The global representation and behind it the patches: (B, N, D) -> (B, 1 + K, D)."""
        raise NotImplementedError

    def _run_blocks(self, x: Tensor, patches: Use, ret_dist: bool) -> tuple[Any, ...]:
        """Tokens (B, N, D) behind all blocks, of which the last computes patches as they are read; and the rest."""
        inter, probabilities, scores = [], [], []
        for i, block in enumerate(self.base_model.blocks):
            use: Use = patches if i == len(self.base_model.blocks) - 1 and not self.adapters else "learnt"
            if ret_dist:
                x, q, k = run_block(block, x)
                scores.append(q @ k.mT / math.sqrt(q.shape[-1]))  # (B, H, N, N)
                probabilities.append(scores[-1].softmax(-1))
            elif self.base_model.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run_used, block, x, use, use_reentrant=False)
            else:
                x = run_used(block, x, use)
            if self.adapters:
                x = x + self.adapters[i](x)
            if ret_dist:
                inter.append(x)
        return x, inter, probabilities, scores


class ViTGLSim(GLSimBase):
    """The published module: `ViTGLSim(ViTConfig("vit_b16", ...))`; without `dynamic_anchor` a plain ViT.

    All parameters of the encoder are those of a timm ViT, `base_model`. Image and crop share them, CLS token included,
    as released: `anchor_class_token` is there for released checkpoints, and frozen.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config, self.adapters = config, ()
        self.grid, self.patch_size = config.gh, config.fh
        width = config.representation_size
        self.base_model = _build_vit(config)
        self.anchor_class_token: nn.Parameter | None = None
        if config.anchor_class_token:
            self.anchor_class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size), requires_grad=False)
        self.reducer = nn.Linear(config.hidden_size, width) if width != config.hidden_size else nn.Identity()
        blocks = config.aggregator_num_hidden_layers if config.aggregator else 0
        self.aggregator = nn.ModuleList(_block(config, width, width // 64, 4.0) for _ in range(blocks))
        norm = config.aggregator and config.aggregator_norm
        self.aggregator_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if norm else nn.Identity()
        self.head = nn.Linear(width, config.num_classes) if config.load_fc_layer else nn.Identity()
        self._initialise()

    @classmethod
    def from_arguments(cls, **config: Any) -> "ViTGLSim":
        """The model of a ViTConfig's fields, which model.json keeps."""
        return cls(ViTConfig(**config))

    @property
    def options(self) -> ViTConfig:
        return self.config

    def _run(self, images: Tensor, ret_dist: bool = False) -> tuple[Any, ...]:
        config, crops = self.config, None
        self._say("input images", images)
        whole = ret_dist or config.debugging or not (config.dynamic_anchor and config.reducer == "cls")
        x, *dist = self._encode(images, "learnt" if whole else "seen", ret_dist)
        tokens = self._read(x)
        if config.dynamic_anchor:
            crops = crop(images, self.select(x).boxes)
            self._say("crops", crops)
            tokens = torch.cat((tokens, self._read(self._encode(crops, "learnt" if whole else "unread")[0])), dim=1)
        return self._classify(tokens), crops, x, *dist

    def _encode(self, images: Tensor, patches: Use, ret_dist: bool = False) -> tuple[Any, ...]:
        """Normalised tokens (B, N, D), or (B, 1, D) if patches are `unread`; and what `ret_dist` adds behind them."""
        x = embed(self.base_model, images)
        self._say("embedded patches", x)
        x, *dist = self._run_blocks(x, patches, ret_dist)
        x = self.base_model.norm(x)
        self._say("encoded tokens", x)
        return x, *dist

    def _global_first(self, tokens: Tensor) -> Tensor:
        return tokens

    def _read(self, tokens: Tensor) -> Tensor:
        """What goes on of the tokens (B, N, D) of image or crop: CLS (B, 1, D), or all."""
        return tokens[:, :1] if self.config.reducer == "cls" else tokens

    def _classify(self, tokens: Tensor) -> Tensor:
        """Return logits (B, C) of what was read (B, N, D) of the image, or of image and crop behind one another."""
        config = self.config
        tokens = self.reducer(tokens)
        self._say("reduced tokens", tokens)
        for block in self.aggregator:
            tokens = block(tokens)
        tokens = self.aggregator_norm(tokens)
        self._say("aggregated tokens", tokens)
        if not config.load_fc_layer:
            return tokens
        logits: Tensor
        if config.classifier == "cls":
            logits = self.head(tokens[:, 0])
        elif config.classifier == "pool":
            logits = self.head(tokens.mean(1))
        else:
            each = self.head(tokens)  # (B, N, C)
            logits = each.mean(1) if config.classifier == "avg_cls" else each.amax(1)
        self._say("logits", logits)
        return logits

    def _say(self, stage: str, tensor: Tensor) -> None:
        if self.config.debugging:
            print(f"{stage}: {tuple(tensor.shape)}")

    def load_npz(self, path: str | Path) -> LoadReport:
        """Load a Google ViT checkpoint into the encoder in place; report names of `state_dict()`.

        Everything behind `encoder_norm` keeps its initialisation; `anchor_class_token` becomes the file's CLS.
        Raises UserError unless the rest fits; the model is then unchanged.
        """
        leave = () if self.config.encoder_norm else ("norm.",)
        report = load_npz(self.base_model, path, leave)
        loaded = [f"base_model.{key}" for key in report.loaded]
        if self.anchor_class_token is not None and self.base_model.cls_token is not None:
            with torch.no_grad():
                self.anchor_class_token.copy_(self.base_model.cls_token)
            loaded.append("anchor_class_token")
        return LoadReport(tuple(loaded), tuple(key for key in self.state_dict() if key not in loaded))

    def _layout(self) -> list[Entry]:
        each = self.config.load_fc_layer and self.config.classifier in ("avg_cls", "max_cls")
        return list(layout(self.state_dict(), each))

    @torch.no_grad()
    def _initialise(self) -> None:
        """As released: xavier_uniform weights and N(0, 1e-6) biases; CLS zero; positions N(0, 0.02); head zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
        blocks: list[Any] = [*self.base_model.blocks, *self.aggregator]
        for block in blocks:
            for part in block.attn.qkv.weight.chunk(3):  # three layers as released
                nn.init.xavier_uniform_(part)
        if self.base_model.cls_token is not None:
            nn.init.zeros_(self.base_model.cls_token)
        assert self.base_model.pos_embed is not None
        nn.init.normal_(self.base_model.pos_embed, std=0.02)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)


def _build_vit(config: ViTConfig) -> VisionTransformer:
    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.fh,
        in_chans=config.num_channels,
        num_classes=0,
        global_pool="",
        class_token=config.classifier != "pool",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        final_norm=config.encoder_norm,
        weight_init="skip",
    )
    blocks: list[Any] = list(vit.blocks)
    for block in blocks:
        _set_dropout(block, config)
    return vit


def _block(config: ViTConfig, width: int, heads: int, mlp_ratio: float) -> Block:
    norm_layer: Any = partial(nn.LayerNorm, eps=config.layer_norm_eps)
    block = Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
    _set_dropout(block, config)
    return block


def _set_dropout(block: Any, config: ViTConfig) -> None:
    """Dropout at the end of both residual branches, and nowhere else; or stochastic depth instead of it."""
    block.attn.attn_drop.p = config.attention_probs_dropout_prob
    rate = config.hidden_dropout_prob if not config.sd else 0.0
    block.attn.proj_drop, block.mlp.drop2 = nn.Dropout(rate), nn.Dropout(rate)
    if config.sd:
        block.drop_path1, block.drop_path2 = DropPath(config.sd), DropPath(config.sd)
