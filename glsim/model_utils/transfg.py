"""TransFG: a Transformer Architecture for Fine-grained Recognition (He et al., AAAI 2022, arXiv 2103.07976).

The official model; what the GFT repository calls "TransFG" is another, in `gft.transfg`.

Axes: B batch, L blocks, H heads, N tokens (CLS foremost), R query rows, D width, d head width, C classes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.models.authors_names import Entry, ReleasedNames, module
from common.models.google_vit import block_entries, build_google_vit
from common.models.vit import embed, run_block, select_tokens
from common.weights import LoadReport, load_npz

MARGIN = 0.4  # of the contrastive loss
ROWS = 64  # of an attention matrix, formed at a time


@dataclass(frozen=True)
class Config:
    """The sizes of one ViT. `patch_size` is in pixels."""

    hidden_size: int
    mlp_dim: int
    num_heads: int
    num_layers: int
    patch_size: int = 16
    dropout: float = 0.1  # behind the position embedding and in the MLPs


CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        "ViT-B_16": Config(768, 3072, 12, 12),
        "ViT-B_32": Config(768, 3072, 12, 12, patch_size=32),
        "ViT-L_16": Config(1024, 4096, 16, 24),
        "ViT-L_32": Config(1024, 4096, 16, 24, patch_size=32),
        "ViT-H_14": Config(1280, 5120, 16, 32, patch_size=14),
    }
)


@torch.no_grad()
def joint_attention(blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the CLS row (B, H, N) of the product of the blocks' attention matrices, in float32 or wider.

    `blocks` gives the queries and keys (B, H, N, d) of each block, the last block first. The row is multiplied from
    there outwards, N^2 multiplications a block and not N^3, and no more than ROWS rows of a matrix exist at once.
    There is no gradient: only the order of the entries is used.
    """
    (q, k), *earlier = blocks
    row = _attention(q[:, :, :1], k)  # (B, H, 1, N)
    for q, k in earlier:
        if torch.compiler.is_compiling():  # which has no use for a place of its own
            parts = zip(row.split(ROWS, dim=-1), q.split(ROWS, dim=-2), strict=True)
            row = torch.stack([_product(some, _attention(rows, k)) for some, rows in parts]).sum(0)
        else:
            row = _outwards(row, q, k)
    return row.squeeze(-2)


def _outwards(row: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return the product of the row (B, H, 1, N) and the attention of q to k (B, H, N, d): (B, H, 1, N).

    All pieces of the attention come to lie in one place: new memory for each would take as long as what it is for.
    """
    q = (q.to(row.dtype) * q.shape[-1] ** -0.5).flatten(0, 1).contiguous()
    k = k.to(row.dtype).flatten(0, 1).contiguous()
    found, place = torch.zeros_like(row).flatten(0, 1), q.new_empty(len(q), ROWS, k.shape[1])
    for some, rows in zip(row.flatten(0, 1).split(ROWS, dim=-1), q.split(ROWS, dim=-2), strict=True):
        piece = place[:, : rows.shape[1]]  # (B H, R, N)
        torch.bmm(rows, k.mT, out=piece)  # autocast leaves products into a place alone
        found += _product(some, torch.softmax(piece, dim=-1, out=piece))
    return found.view_as(row)


def _attention(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention (B, H, R, N) of queries (B, H, R, d) to keys (B, H, N, d), in float32 or wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _product(q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype).mT).softmax(-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product in the precision of its factors, whatever autocast does."""
    device = a.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # meta has no autocast
        return a @ b


def select_parts(blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the part (B, H) that each head picks, 0 being CLS, which is never picked: Part Selection Module.

    It is the patch with the largest entry in `joint_attention`, whose argument this is.
    """
    return joint_attention(blocks)[..., 1:].argmax(-1) + 1


def contrastive_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Return the contrastive loss of features (B, D) with labels (B,), in float32 or wider: TransFG, L_con.

    The mean over all B^2 pairs, of an image with itself too, of 1 - cosine where the labels are the same, and of what
    the cosine exceeds MARGIN by where they are not.
    """
    features = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)))
    cosine = _product(features, features.mT)  # (B, B)
    same = labels[:, None] == labels
    return torch.where(same, 1 - cosine, F.relu(cosine - MARGIN)).mean()


class SlidingPatchEmbed(PatchEmbed):
    """timm's patch embedding at every `slide_step` pixels: patches overlap, and a border no patch reaches is unread."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, *args: Any, slide_step: int, **kwargs: Any) -> None:
        super().__init__(img_size, patch_size, *args, **kwargs)
        self.proj.stride = (slide_step, slide_step)
        rows, columns = ((side - patch_size) // slide_step + 1 for side in img_size)
        self.grid_size, self.num_patches = (rows, columns), rows * columns


class TransFG(ReleasedNames):
    """ViT whose last block sees CLS and the one patch a head that the Part Selection Module picks before it.

    All parameters are those of a timm ViT, `base_model`: its last block, norm and head are the released `part_layer`,
    `part_norm` and `part_head`. Patches start every `slide_step` pixels, with None one behind the other. The loss is
    cross-entropy, its labels smoothed by `smoothing_value`, plus the contrastive loss. The head starts from zero, or
    with zero_head=False as the released one does, whose program asks for zeros and does not get them.

    Raises UserError where `img_size` (pixels, or (height, width)) holds no patch or, patches lying one behind the
    other, no whole number of them.
    """

    theirs = "transformer."

    def __init__(
        self,
        config: Config | Mapping[str, Any],
        img_size: int | tuple[int, int],
        num_classes: int,
        slide_step: int | None = 12,
        smoothing_value: float = 0.0,
        zero_head: bool = True,
    ) -> None:
        super().__init__()
        config = config if isinstance(config, Config) else Config(**config)
        self.smoothing_value = smoothing_value
        # The arguments that build it again, for model.json.
        self.config: dict[str, Any] = {"config": asdict(config), "img_size": img_size, "num_classes": num_classes}
        self.config |= {"slide_step": slide_step, "smoothing_value": smoothing_value, "zero_head": zero_head}
        if config.num_layers < 2:
            raise UserError("TransFG needs at least 2 blocks: one to pick parts by, one to read them")
        self.base_model = _build_vit(config, img_size, num_classes, slide_step, zero_head)

    def forward(self, images: Tensor, labels: Tensor | None = None, return_selection: bool = False) -> Any:
        """Return logits (B, C) of images (B, 3, height, width); (loss, logits) with `labels` (B,).

        With `return_selection`, (logits, parts): the token (B, H) that each head picked, 0 being CLS.
        """
        features, parts = self.forward_features(images)
        logits = self.base_model.head(features)  # (B, C)
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing_value)
            return loss + contrastive_loss(features, labels), logits
        return (logits, parts) if return_selection else logits

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the head and the contrastive loss read, (B, D), and the picked parts (B, H)."""
        vit: Any = self.base_model
        tokens = embed(vit, images)  # (B, N, D)
        *earlier, part_layer = vit.blocks
        blocks = []
        for block in earlier:
            tokens, q, k = self._run(block, tokens)
            blocks.append((q, k))
        parts = select_parts(reversed(blocks))
        tokens = torch.cat((tokens[:, :1], select_tokens(tokens, parts)), dim=1)  # (B, 1 + H, D)
        tokens, _, _ = self._run(part_layer, tokens, 1)  # only CLS is read: only it is computed
        return vit.norm(tokens[:, 0]), parts

    def _run(self, block: Block, tokens: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if self.base_model.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(run_block, block, tokens, rows, use_reentrant=False)
        return run_block(block, tokens, rows)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.base_model.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.base_model.head

    def load_npz(self, path: str | Path) -> LoadReport:
        """Load a Google ViT checkpoint in place, as the released loader does; report names of `state_dict()`.

        The file's last block and head are left out: the part layer and the head stay as they are. Its norm is loaded.
        Raises UserError unless exactly the other parameters fit; the model is then unchanged.
        """
        leave = (f"blocks.{len(self.base_model.blocks) - 1}.", "head.")
        report = load_npz(self.base_model, path, leave)
        loaded, left = (tuple(f"base_model.{key}" for key in keys) for keys in (report.loaded, report.left))
        return LoadReport(loaded, left)

    def _layout(self) -> list[Entry]:
        return list(_entries(len(self.base_model.blocks)))


def _build_vit(
    config: Config, img_size: int | tuple[int, int], num_classes: int, slide_step: int | None, zero_head: bool
) -> VisionTransformer:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    patch = config.patch_size
    step = patch if slide_step is None else slide_step
    if not 1 <= step <= patch:
        raise UserError(f"slide_step {step}: expected 1 to {patch}, the side of a patch")
    if min(height, width) < patch:
        raise UserError(f"img_size {img_size}: expected at least {patch}, the side of a patch")
    if step == patch and (height % patch or width % patch):
        raise UserError(f"img_size {img_size}: expected a multiple of the patch size {patch}, or overlapping patches")
    embed_layer: Any = partial(SlidingPatchEmbed, slide_step=step)
    return build_google_vit(config, (height, width), num_classes, zero_head, patch_size=patch, embed_layer=embed_layer)


def _entries(num_layers: int) -> Iterator[Entry]:
    """List every parameter of a model of this many blocks, in the authors' order."""
    embeddings = "transformer.embeddings."
    yield Entry(embeddings + "position_embeddings", "base_model.pos_embed")
    yield Entry(embeddings + "cls_token", "base_model.cls_token")
    yield from module("base_model.patch_embed.proj", embeddings + "patch_embeddings")
    yield from block_entries(num_layers, "part_layer")
    yield from module("base_model.norm", "transformer.encoder.part_norm")
    yield from module("base_model.head", "part_head")
