"""Google's ViT checkpoints (.npz, written by Flax) as state_dicts of timm's ViT, plain or behind a ResNet.

Axes of the arrays: D width, H heads, d width of a head, g patches along a side of the image.
Names and files: https://github.com/google-research/vision_transformer.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.download import fetch
from common.errors import UserError

NPZ_URL = "https://storage.googleapis.com/vit_models/imagenet21k"
NPZ_NAMES = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16")

# timm's module and the module of the file, or the three, that it is made of: in a block, and in a unit of the ResNet.
ATTENTION = "MultiHeadDotProductAttention_1/"
BLOCK = {
    "norm1": ("LayerNorm_0",),
    "attn.qkv": (f"{ATTENTION}query", f"{ATTENTION}key", f"{ATTENTION}value"),
    "attn.proj": (f"{ATTENTION}out",),
    "norm2": ("LayerNorm_2",),
    "mlp.fc1": ("MlpBlock_3/Dense_0",),
    "mlp.fc2": ("MlpBlock_3/Dense_1",),
}
UNIT = {f"conv{n}": f"conv{n}" for n in (1, 2, 3)} | {f"norm{n}": f"gn{n}" for n in (1, 2, 3)}
FIRST_UNIT = UNIT | {"downsample.conv": "conv_proj", "downsample.norm": "gn_proj"}


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of the file by name; nothing is unpickled. Raises UserError where it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise missing_npz(path, path.stem)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name.replace("\\", "/"): file[name] for name in file.files}
    except Exception as error:  # zipfile and NumPy raise nearly anything for a damaged file
        raise UserError(f"{path} is damaged or not an .npz file of numbers ({error}): download it again") from error


def missing_npz(path: str | Path, model_name: str) -> UserError:
    """The error for a checkpoint that is not at `path`; it names the address of `model_name`, if Google has that."""
    name = model_name.replace("R50-", "R50+")
    address = f"{NPZ_URL}/{name if name in NPZ_NAMES else '...'}.npz"
    return UserError(f"{path} does not exist: expected a Google ViT checkpoint, fetch {address} and put it there")


def download_npz(model_name: str, folder: str | Path) -> Path:
    """Download Google's ImageNet-21k checkpoint `model_name`.npz into `folder`, unless it is there; return its path.

    `model_name` is one of NPZ_NAMES ("R50-ViT-B_16" is accepted for "R50+ViT-B_16"). Raises UserError for another
    name, and when the download fails.
    """
    name = model_name.replace("R50-", "R50+")
    if name not in NPZ_NAMES:
        raise UserError(f"no checkpoint is published for {model_name!r}: choose from {', '.join(NPZ_NAMES)}")
    target = Path(folder) / f"{name}.npz"
    if not target.exists():
        fetch(f"{NPZ_URL}/{name}.npz", target)
    return target


def google_to_timm(arrays: Mapping[str, np.ndarray], source: str | Path = "the .npz file") -> dict[str, Tensor]:
    """Convert the arrays of a file to the state_dict of a timm VisionTransformer with fused qkv.

    Depth and ResNet follow from the names. Raises UserError, naming `source`, where an array is missing or unknown.
    """
    # timm has no layer in front of its head, and fine-tuning has no use for it.
    rest = {name: array for name, array in arrays.items() if not name.startswith("pre_logits/")}

    def take(name: str) -> np.ndarray:
        if name not in rest:
            raise UserError(f"{source} lacks {name}: expected the parameters of a Google ViT")
        return rest.pop(name)

    state = {
        "cls_token": torch.tensor(take("cls")),
        "pos_embed": torch.tensor(take("Transformer/posembed_input/pos_embedding")),
    }
    for ours, theirs in _modules(arrays).items():
        weight = "scale" if f"{theirs[0]}/scale" in rest else "kernel"
        state[f"{ours}.weight"] = torch.cat([_weight(name, take(f"{name}/{weight}")) for name in theirs])
        if f"{theirs[0]}/bias" in rest:  # convolutions of the ResNet have none
            state[f"{ours}.bias"] = torch.cat([torch.tensor(take(f"{name}/bias")).flatten() for name in theirs])
    if rest:
        raise UserError(f"{source} holds the unknown {min(rest)}: expected the parameters of a Google ViT")
    return state


def _modules(names: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    """Return every module of timm and the modules of the file that it is made of."""
    depth = len({match[1] for name in names if (match := re.match(r"Transformer/encoderblock_(\d+)/", name))})
    units = sorted({(int(m[1]), int(m[2])) for name in names if (m := re.match(r"block(\d+)/unit(\d+)/", name))})
    found: dict[str, tuple[str, ...]] = {"patch_embed.proj": ("embedding",), "norm": ("Transformer/encoder_norm",)}
    if "head/kernel" in names:
        found["head"] = ("head",)
    backbone = "patch_embed.backbone."
    if "conv_root/kernel" in names:
        stem = backbone + ("stem." if units else "")  # timm's ResNet of a stem alone has no such level
        found |= {f"{stem}conv": ("conv_root",), f"{stem}norm": ("gn_root",)}
    for stage, unit in units:
        for ours, theirs in (FIRST_UNIT if unit == 1 else UNIT).items():
            found[f"{backbone}stages.{stage - 1}.blocks.{unit - 1}.{ours}"] = (f"block{stage}/unit{unit}/{theirs}",)
    for i in range(depth):
        for ours, parts in BLOCK.items():
            found[f"blocks.{i}.{ours}"] = tuple(f"Transformer/encoderblock_{i}/{part}" for part in parts)
    return found


def _weight(module: str, array: np.ndarray) -> Tensor:
    """Return the array of a module's kernel or scale as timm has it."""
    if "gn" in module:  # GroupNorm: (1, 1, 1, channels), or flat in newer files
        return torch.tensor(array).flatten()
    if array.ndim == 4:  # convolution: (height, width, in, out)
        return torch.tensor(array.transpose(3, 2, 0, 1))
    if array.ndim == 3:  # attention: (H, d, D) of the output, (D, H, d) of query, key and value
        array = array.reshape(-1, array.shape[-1]) if module.endswith("/out") else array.reshape(len(array), -1)
    return torch.tensor(array.T)


def resize_position_embedding(
    position: Tensor, grid: tuple[int, int], prefix_tokens: int = 1, source: str | Path = "the checkpoint"
) -> Tensor:
    """Resize the grid part of a position embedding: (1, prefix + g*g, D) -> (1, prefix + rows*columns, D).

    Equal to scipy.ndimage.zoom(grid, (rows/g, columns/g, 1), order=1), which the authors of ViT use. The prefix (class
    token) is kept. Raises UserError, naming `source`, unless the old grid is square.
    """
    prefix, patches = position[:, :prefix_tokens], position[:, prefix_tokens:]
    side = math.isqrt(patches.shape[1])
    if side == 0 or side * side != patches.shape[1]:
        raise UserError(
            f"{source} has a position embedding of {patches.shape[1]} patches: only a square grid can be resized"
        )
    if (side, side) == tuple(grid):
        return position
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    # float64, as scipy computes: in float32 the two differ by 1e-6.
    patches = F.interpolate(patches.double(), size=tuple(grid), mode="bilinear", align_corners=True)
    return torch.cat([prefix, patches.flatten(2).mT.to(position.dtype)], dim=1)
