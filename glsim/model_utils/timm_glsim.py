"""GLSim around any timm ViT: `glsvit_*` and `glsdeit*` are timm's `vit_*` and `deit*`, cropping and aggregating.

Axes: B batch, L blocks, H heads, N tokens of timm's model (CLS foremost, then registers), P patches, K patches that
are left of them, O selected patches, D width, S image side in pixels, C classes.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.errors import UserError
from common.models.authors_names import Entry
from common.models.vit import Use, freeze, is_plain, select_tokens
from common.weights import explain_offline
from glsim.model_utils.config import check_values
from glsim.model_utils.glsim import GLSimBase, crop

PREFIX = "gls"
BASE = "base_model."
BOTTLENECK = 64  # width of an adapter
# Models of the released program that timm no longer has, and never had weights for.
GONE: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_medium_patch16_reg4_256": ("vit_medium_patch16_reg4_gap_256", {"class_token": True, "global_pool": "token"}),
    "vit_base_patch16_reg8_gap_256": ("vit_base_patch16_reg4_gap_256", {"reg_tokens": 8}),
}
WORDS: dict[str, tuple[str | None, ...]] = {
    "classifier": ("cls", "pool", "cls_pool"),
    "sim_metric": ("cos", "l1", "l2"),
    "reducer": ("cls", None),
    "aggregator_type": ("transformer", "dwsc", "conv"),
    "adapter": ("bottleneck", None),
}


@dataclass(frozen=True)
class TimmConfig:
    """The options of `GLSimTimm`, under their published names; UserError for values that mean nothing."""

    model_name: str  # glsvit_* or glsdeit*, with or without timm's tag
    num_classes: int = 1000
    image_size: int = 224  # pixels, square
    classifier: str = "cls"  # of the tokens: the first, the mean of all (pool), or it beside the mean of the others
    test_flip: bool = False  # in evaluation, average the logits with those of the mirrored image
    # Global-local similarity
    dynamic_anchor: bool = False  # encode the crop that it finds as well
    dynamic_top: int = 8  # patches that the crop is drawn around
    sim_metric: str = "cos"  # cos, l1, l2
    anchor_random: bool = False  # patches at random instead
    anchor_class_token: bool = False  # a CLS token of the crop's own, where the model has one at all
    crop_inclusive: bool = False  # do not cut off the last selected row and column
    inference_crops: bool = True  # crop in evaluation too
    select_top_k: bool = False  # no crop: the selected tokens themselves go on
    # The encoder, and what is behind it
    sd: float = 0.0  # stochastic depth of the last block; timm's rise up to it
    token_drop: float = 0.0  # share of the patches left out in training, other ones for image and crop
    freeze_backbone: bool = False  # train only what is behind the encoder, and the crop's CLS token
    adapter: str | None = None  # bottleneck: a residual one behind each block, trained instead of the encoder
    reducer: str | None = None  # cls: only the global representations of image and crop go on
    aggregator: bool = False
    aggregator_type: str = "transformer"  # a block of the encoder's kind; dwsc, conv: see ConvBlock
    aggregator_num_hidden_layers: int | None = None  # None: 1
    aggregator_norm: bool = False  # behind the aggregator
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of timm's model

    def __post_init__(self) -> None:
        if not self.model_name.startswith(("glsvit_", "glsdeit")):
            raise UserError(f"there is no model {self.model_name!r}: expected glsvit_* or glsdeit*")
        check_values(self, WORDS, ("sd", "token_drop"))
        if self.select_top_k and not self.dynamic_anchor:
            raise UserError("select_top_k selects patches as dynamic_anchor does: give both, or neither")
        two = self.select_top_k or (self.dynamic_anchor and self.inference_crops)
        if self.classifier == "cls_pool" and self.reducer == "cls" and not two:
            raise UserError("classifier 'cls_pool' reads further tokens, of which reducer 'cls' leaves none: use 'cls'")

    @property
    def crops(self) -> bool:
        """Whether images are cropped at all."""
        return self.dynamic_anchor and not self.select_top_k


class ConvBlock(nn.Module):
    """Pre-norm residual block: a convolution over each token and its two neighbours in the sequence, then GELU.

    `separable`: over the neighbours channel by channel, then over the channels (depthwise separable, dwsc).
    """

    def __init__(self, width: int, separable: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv: nn.Module = nn.Conv1d(width, width, 3, padding=1, groups=width if separable else 1)
        if separable:
            self.conv = nn.Sequential(self.conv, nn.Conv1d(width, width, 1))
        self.act = nn.GELU()

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.act(self.conv(self.norm(tokens).mT))  # (B, D, N)
        return tokens + mixed.mT


class GLSimTimm(GLSimBase):
    """GLSim whose encoder is an unmodified timm VisionTransformer, `base_model`: `GLSimTimm("glsvit_...", ...)`.

    `kwargs` are the other options of TimmConfig; `pretrained` takes timm's weights. Registers leave behind the encoder.
    As released, an `aggregator_norm` stands in place of the encoder's norm, so that similarity compares tokens as the
    last block leaves them. Models without CLS keep their norm; their global representation is what timm pools, and
    similarity compares their patches with the mean of these.

    Raises UserError for a name that is no VisionTransformer of timm's, an image that the patches do not tile, and more
    patches asked for than there are.
    """

    def __init__(self, model_name: str, *, pretrained: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.options = options = TimmConfig(model_name, **kwargs)
        self.config = asdict(options)  # the arguments that build it again, for model.json
        self.base_model = vit = _build_vit(options, pretrained)
        width = vit.num_features
        self.grid = vit.patch_embed.grid_size[0]  # patches a side
        self.patch_size = options.image_size // self.grid  # pixels
        self.kept = max(1, int(self.grid**2 * (1 - options.token_drop)))  # patches that training sees
        if options.dynamic_anchor and not 1 <= options.dynamic_top <= self.kept:
            raise UserError(
                f"dynamic_top {options.dynamic_top}: expected 1 to {self.kept}, the patches that the model sees"
            )
        self.cls_token_crops: nn.Parameter | None = None
        if options.dynamic_anchor and options.anchor_class_token and vit.cls_token is not None:
            self.cls_token_crops = nn.Parameter(vit.cls_token.detach().clone())
        self.adapters = nn.ModuleList(_adapter(width) for _ in vit.blocks if options.adapter)
        self.aggregator = _build_aggregator(options, width)
        if options.aggregator and options.aggregator_norm and vit.cls_token is not None:
            vit.norm = nn.Identity()
        self.head = nn.Linear(width * (2 if options.classifier == "cls_pool" else 1), options.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)  # as timm's
        nn.init.zeros_(self.head.bias)
        if options.freeze_backbone or options.adapter:
            freeze(vit)
        crop_is_read = options.crops and (options.aggregator or options.classifier != "cls")
        if self.cls_token_crops is not None and not crop_is_read:
            self.cls_token_crops.requires_grad_(False)

    def _run(self, images: Tensor, ret_dist: bool = False) -> tuple[Any, ...]:
        options, crops, vit = self.options, None, self.base_model
        if ret_dist and not all(map(is_plain, vit.blocks)):
            raise UserError(f"{options.model_name} hands out no attention: its blocks are not timm's plain ones")
        cropping = options.crops and (self.training or options.inference_crops)
        whole = ret_dist or not cropping or options.reducer != "cls" or vit.cls_token is None
        x, places, *dist = self._encode(images, "learnt" if whole else "seen", ret_dist=ret_dist)
        if options.select_top_k:
            selected = select_tokens(self._patches(x), self.select(x).indices)
            tokens = torch.cat((self._global(x), selected), dim=1)  # (B, 1 + O, D)
        else:
            tokens = self._reduce(x)
            if cropping:
                crops = crop(images, self.select(x, places).boxes)
                of_crop = self._encode(crops, "learnt" if whole else "unread", of_crop=True)[0]
                tokens = torch.cat((tokens, self._reduce(of_crop)), dim=1)
        return self.head(self._pool(self.aggregator(tokens))), crops, x, *dist

    def _encode(
        self, images: Tensor, patches: Use = "learnt", of_crop: bool = False, ret_dist: bool = False
    ) -> tuple[Any, ...]:
        """Tokens (B, N, D) behind the norm; the places (B, K) of the patches, or None; and what `ret_dist` adds.

        Of patches that are `unread` the tokens may be without.
        """
        vit: Any = self.base_model
        x = vit._pos_embed(vit.patch_embed(images))  # (B, N, D)
        if of_crop and self.cls_token_crops is not None:
            x = torch.cat((x[:, :1] + (self.cls_token_crops - vit.cls_token), x[:, 1:]), dim=1)
        places = None
        if self.training and self.options.token_drop:
            places = torch.rand(len(x), self.grid**2, device=x.device).topk(self.kept).indices.sort().values
            x = torch.cat((x[:, : vit.num_prefix_tokens], select_tokens(self._patches(x), places)), dim=1)
        x = vit.norm_pre(x)
        x, *dist = self._run_blocks(x, patches, ret_dist)
        return vit.norm(x), places, *dist

    def _global_first(self, tokens: Tensor) -> Tensor:
        patches = self._patches(tokens)
        anchor = patches.mean(1, keepdim=True) if self.base_model.cls_token is None else tokens[:, :1]
        return torch.cat((anchor, patches), dim=1)

    def _patches(self, tokens: Tensor) -> Tensor:
        """The patches among the tokens of timm's model: (B, N, D) -> (B, K, D)."""
        return tokens[:, self.base_model.num_prefix_tokens :]

    def _global(self, tokens: Tensor) -> Tensor:
        """The global representation: (B, N, D) -> (B, 1, D)."""
        vit: Any = self.base_model
        return vit.fc_norm(vit.pool(tokens))[:, None] if vit.cls_token is None else tokens[:, :1]

    def _reduce(self, tokens: Tensor) -> Tensor:
        """What goes on: the global representation (B, 1, D), or with it the patches (B, 1 + K, D)."""
        if self.options.reducer == "cls":
            return self._global(tokens)
        return torch.cat((self._global(tokens), self._patches(tokens)), dim=1)

    def _pool(self, tokens: Tensor) -> Tensor:
        """What the head reads: (B, any number of tokens, D) -> (B, D), or (B, 2 D) for cls_pool."""
        if self.options.classifier == "cls":
            return tokens[:, 0]
        if self.options.classifier == "pool":
            return tokens.mean(1)
        return torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), dim=1)

    def _layout(self) -> list[Entry]:
        """Theirs is one flat module: timm's own parameters, the CLS token of crops, timm's modules, all else."""
        encoder = [key for key in self.state_dict() if key.startswith(BASE)]
        parameters = [key for key in encoder if key.count(".") == 1]
        keys = dict.fromkeys((*parameters, "cls_token_crops", *encoder, *self.state_dict()))  # each once
        return [Entry(key.removeprefix(BASE), key) for key in keys]


def _build_vit(options: TimmConfig, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    name, size = options.model_name.removeprefix(PREFIX), options.image_size
    name, changes = GONE.get(name, (name, {}))
    own = {"img_size": size, "num_classes": 0, "drop_path_rate": options.sd}
    untiled = f"image_size {size}: expected a multiple of the patch size of {options.model_name!r}"
    try:
        with explain_offline(name, pretrained):
            vit = timm.create_model(name, pretrained=pretrained, **(changes | own | options.model_kwargs | kwargs))
    except AssertionError as error:  # timm's, for one of its hybrids
        raise UserError(untiled) from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{options.model_name!r}: timm's {name!r} is no VisionTransformer but a {type(vit).__name__}")
    side, rest = divmod(size, vit.patch_embed.feat_ratio())
    if rest or vit.patch_embed.grid_size != (side, side):
        raise UserError(untiled)
    return vit


def _build_aggregator(options: TimmConfig, width: int) -> nn.Sequential:
    if not options.aggregator:
        return nn.Sequential()
    count = options.aggregator_num_hidden_layers or 1
    if options.aggregator_type == "transformer":
        blocks = list(_build_vit(options, pretrained=False, depth=count).blocks)
    else:
        blocks = [ConvBlock(width, options.aggregator_type == "dwsc") for _ in range(count)]
    norm = [nn.LayerNorm(width)] if options.aggregator_norm else []  # epsilon 1e-5, as released
    return nn.Sequential(*blocks, *norm)


def _adapter(width: int) -> nn.Sequential:
    """Houlsby et al., ICML 2019 (arXiv 1902.00751); it starts as zero, so that the encoder starts as it is."""
    adapter = nn.Sequential(nn.Linear(width, BOTTLENECK), nn.GELU(), nn.Linear(BOTTLENECK, width))
    for parameter in adapter[-1].parameters():
        nn.init.zeros_(parameter)
    return adapter
