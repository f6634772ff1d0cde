"""The configuration of `ViTGLSim`, with the published names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from common.errors import UserError
from common.weights import NPZ_URL

# width, MLP width, heads, blocks
SIZES = MappingProxyType(
    {
        "t": (192, 768, 3, 12),
        "s": (384, 1536, 6, 12),
        "b": (768, 3072, 12, 12),
        "l": (1024, 4096, 16, 24),
        "h": (1280, 5120, 16, 32),
    }
)
MODEL_NAMES = (
    *("vit_t4", "vit_t8", "vit_t16", "vit_t32", "vit_s8", "vit_s16", "vit_s32"),
    *("vit_b8", "vit_b16", "vit_b32", "vit_l16", "vit_l32", "vit_h14"),
)
FROM_NAME: Any = None  # the value of the named model
WORDS: dict[str, tuple[str | None, ...]] = {
    "classifier": ("cls", "avg_cls", "max_cls", "pool"),
    "sim_metric": ("cos", "l1", "l2"),
    "reducer": ("cls", None),
    "hidden_act": ("gelu",),
    "pos_embedding_type": ("learned",),
}
# Options of the released program that its GLSim reads and then does nothing with.
WITHOUT_EFFECT = (
    *("anchor_conv_stem", "anchor_conv_stride", "anchor_resize_size", "shared_patchifier"),
    *("head_norm", "head_act", "head_dropout_all", "head_dropout_prob", "classifier_aux"),
)


def check_values(config: Any, words: Mapping[str, tuple[str | None, ...]], rates: Iterable[str]) -> None:
    """Raise UserError for an option that is none of its words, and for a rate that is not in [0, 1)."""
    for name, allowed in words.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"{name} {getattr(config, name)!r}: expected one of {', '.join(map(str, allowed))}")
    for name in rates:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)}: expected 0 or more, and less than 1")


@dataclass(frozen=True)
class ViTConfig:
    """A ViT by its name, and what is done with it; FROM_NAME, which is None, takes the value of the named model.

    Raises UserError for an unknown name or word, for an image that the patches do not tile, for more patches asked
    for than there are, and for one of the released options that have no effect.
    """

    model_name: str = "vit_b16"
    debugging: bool = False  # print the shape at each stage
    test_flip: bool = False  # in evaluation, average the logits with those of the mirrored image
    image_size: int = 224  # pixels, square
    patch_size: tuple[int, int] = FROM_NAME  # pixels; one number for both sides will do
    load_fc_layer: bool = True  # a classifier; without it the tokens before it are the output
    classifier: str = "cls"  # cls, avg_cls or max_cls (mean or maximum of each token's logits), pool (no CLS)
    num_classes: int = 1000
    num_channels: int = 3
    # Global-local similarity
    dynamic_anchor: bool = False  # encode the crop that it finds as well
    dynamic_top: int = 2  # patches that the crop is drawn around (the paper's O, which its programs set to 8)
    sim_metric: str = "cos"  # cos, l1, l2
    anchor_random: bool = False  # patches at random instead
    anchor_class_token: bool = False  # the parameter of released checkpoints that nothing reads
    crop_inclusive: bool = False  # do not cut off the last selected row and column
    # Behind the encoder
    encoder_norm: bool = True
    reducer: str | None = None  # cls: only the CLS tokens of image and crop go on
    aggregator: bool = False
    aggregator_num_hidden_layers: int = FROM_NAME
    aggregator_norm: bool = False
    representation_size: int = FROM_NAME  # width of what goes on
    # The ViT
    pos_embedding_type: str = FROM_NAME
    hidden_size: int = FROM_NAME
    intermediate_size: int = FROM_NAME
    num_attention_heads: int = FROM_NAME
    num_hidden_layers: int = FROM_NAME
    attention_probs_dropout_prob: float = FROM_NAME
    hidden_dropout_prob: float = FROM_NAME  # at the end of each residual branch
    sd: float = 0.0  # stochastic depth, the same in every block; replaces that dropout
    layer_norm_eps: float = FROM_NAME
    hidden_act: str = FROM_NAME
    # Accepted because released configurations have them
    anchor_size: int | None = None
    num_anchors: int | None = None
    anchor_conv_stem: bool = False
    anchor_conv_stride: int | None = None
    anchor_resize_size: int | bool | None = None
    shared_patchifier: bool = False
    head_norm: bool = False
    head_act: bool = False
    head_dropout_all: bool = False
    head_dropout_prob: float = 0
    classifier_aux: str | None = None

    def __post_init__(self) -> None:
        if self.model_name not in MODEL_NAMES:
            raise UserError(f"there is no model {self.model_name!r}: choose one of {', '.join(MODEL_NAMES)}")
        self._fill()
        self._check()

    def _fill(self) -> None:
        kind, patch = self.model_name[4], int(self.model_name[5:])
        width, mlp, heads, depth = SIZES[kind]
        values: dict[str, Any] = {
            "patch_size": patch,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_hidden_layers": depth,
            "aggregator_num_hidden_layers": 1,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.1,
            "layer_norm_eps": 1e-12,
            "hidden_act": "gelu",
            "pos_embedding_type": "learned",
        }
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        sides = (self.patch_size,) * 2 if isinstance(self.patch_size, int) else tuple(self.patch_size)
        object.__setattr__(self, "patch_size", sides)
        if self.representation_size is None:
            object.__setattr__(self, "representation_size", self.hidden_size)
        if self.dynamic_anchor:
            object.__setattr__(self, "anchor_size", self.anchor_size or self.patch_size[0])
            object.__setattr__(self, "num_anchors", self.num_anchors or 1)

    def _check(self) -> None:
        check_values(self, WORDS, ("sd", "hidden_dropout_prob", "attention_probs_dropout_prob"))
        defaults = {field.name: field.default for field in fields(self)}
        for name in WITHOUT_EFFECT:
            if getattr(self, name) not in (defaults[name], None, False):
                raise UserError(f"{name} has no effect in GLSim, not in the released code either: leave it out")
        rows, columns = self.patch_size
        if rows != columns or rows < 1 or self.image_size < rows or self.image_size % rows:
            raise UserError(f"image_size {self.image_size}: expected a multiple of the patch size {rows}, both square")
        if self.hidden_size % self.num_attention_heads or (self.aggregator and self.representation_size % 64):
            raise UserError("expected a hidden_size that num_attention_heads divides, and 64 if there is an aggregator")
        if self.dynamic_anchor and not 1 <= self.dynamic_top <= self.gh * self.gw:
            raise UserError(
                f"dynamic_top {self.dynamic_top}: expected 1 to {self.gh * self.gw}, the patches of the image"
            )
        if self.classifier == "pool" and (self.dynamic_anchor or self.reducer):
            raise UserError("classifier 'pool' has no CLS token, which dynamic_anchor and reducer need")

    # Figures that the released programs read, under their names.
    @property
    def fh(self) -> int:
        """Height of a patch, pixels."""
        return self.patch_size[0]

    @property
    def fw(self) -> int:
        """Width of a patch, pixels."""
        return self.patch_size[1]

    @property
    def gh(self) -> int:
        """Rows of patches."""
        return self.image_size // self.fh

    @property
    def gw(self) -> int:
        """Columns of patches."""
        return self.image_size // self.fw

    @property
    def seq_len_ind(self) -> int:
        """Tokens of the image: CLS, where there is one, and patches."""
        return self.gh * self.gw + (self.classifier != "pool")

    @property
    def seq_len_anchor_ind(self) -> int:
        """Tokens of the crop."""
        return self.seq_len_ind

    @property
    def num_anchors_total(self) -> int:
        """The image and its crop, or the image alone."""
        return 2 if self.dynamic_anchor else 1

    @property
    def seq_len_total(self) -> int:
        """Tokens of image and crop together."""
        return self.num_anchors_total * self.seq_len_ind

    @property
    def seq_len_post_reducer(self) -> int:
        """Tokens that the aggregator sees."""
        return self.num_anchors_total if self.reducer == "cls" else self.seq_len_total

    @property
    def url(self) -> str | None:
        """Google's weights for this model, where there are any."""
        kind, patch = self.model_name[4].upper(), self.model_name[5:]
        known = self.model_name in ("vit_b16", "vit_b32", "vit_l16", "vit_l32", "vit_h14")
        return f"{NPZ_URL}/ViT-{kind}_{patch}.npz" if known else None
