"""Weights, images and .npz files by formula, so that recorded figures can be checked without any download.

Arithmetic is unsigned 32-bit and float64, cast to float32 at the end. The scale rules keep the activations of
every layer near unit size, so that a wrong key, transpose or epsilon moves the result visibly.
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Shape = Sequence[int]
Spec = dict[str, tuple[int, ...]]  # key -> shape of an .npz file


def base_sequence(key: str, count: int) -> np.ndarray:
    """Return `count` float64 values in [-1, 1): a hash of the index, started at the CRC-32 of the key."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(zlib.crc32(key.encode()))
    for _ in range(2):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x45D9F3B)
    x = x ^ (x >> np.uint32(16))
    return x.astype(np.float64) / 2**31 - 1


def fill(key: str, shape: Shape) -> torch.Tensor:
    """Return the float32 tensor that the scale rule gives a state_dict entry of this key and shape."""
    v = base_sequence(key, math.prod(shape))
    if key.endswith("weight"):
        v = v * (1.7 / math.sqrt(math.prod(shape[1:]))) if len(shape) >= 2 else 1 + 0.1 * v
    elif key.endswith("running_var"):
        v = 1 + 0.1 * np.abs(v)
    elif key.endswith(("bias", "running_mean")):
        v = 0.1 * v
    else:
        v = 0.5 * v
    return torch.from_numpy(v.astype(np.float32)).reshape(tuple(shape))


@torch.no_grad()
def fill_state_dict(model: nn.Module) -> None:
    """Fill every parameter and persistent buffer of `model` in place by its key; integer buffers become 0."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(fill(key, tensor.shape))
        else:
            tensor.zero_()


def npz_array(key: str, shape: Shape) -> np.ndarray:
    """Return the float32 array that the .npz rule gives the Google ViT key (with '/') of this shape."""
    v = base_sequence(key, math.prod(shape))
    if key.endswith("kernel"):
        projection = key.endswith(("query/kernel", "key/kernel", "value/kernel"))
        v = v * (1.7 / math.sqrt(shape[0] if projection else math.prod(shape[:-1])))
    elif key.endswith("scale"):
        v = 1 + 0.1 * v
    elif key.endswith("bias"):
        v = 0.1 * v
    else:
        v = 0.5 * v
    return v.astype(np.float32).reshape(tuple(shape))


def fill_npz(path: str | Path, spec: Spec) -> dict[str, np.ndarray]:
    """Write the .npz file whose keys and shapes `spec` lists, and return its arrays."""
    arrays = {key: npz_array(key, shape) for key, shape in spec.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return arrays


def vit_spec(width: int = 48, heads: int = 3, mlp: int = 96, depth: int = 4, grid: int = 4, classes: int = 10) -> Spec:
    """Keys and shapes of a Google ViT checkpoint with patches of 16 pixels."""
    spec: Spec = {
        "cls": (1, 1, width),
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, grid * grid + 1, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "pre_logits/kernel": (width, width),
        "pre_logits/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            spec |= {f"{block}{norm}/scale": (width,), f"{block}{norm}/bias": (width,)}
        attention = block + "MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            spec[f"{attention}{name}/kernel"] = (width, heads, width // heads)
            spec[f"{attention}{name}/bias"] = (heads, width // heads)
        spec |= {f"{attention}out/kernel": (heads, width // heads, width), f"{attention}out/bias": (width,)}
        dense = block + "MlpBlock_3/Dense_"
        spec |= {f"{dense}0/kernel": (width, mlp), f"{dense}0/bias": (mlp,)}
        spec |= {f"{dense}1/kernel": (mlp, width), f"{dense}1/bias": (width,)}
    return spec


def hybrid_spec(units: tuple[int, ...], **sizes: int) -> Spec:
    """The same behind a ResNet-V2 with these units per stage, its GroupNorm parameters as (1, 1, 1, C)."""
    spec = vit_spec(**sizes)
    spec["conv_root/kernel"] = (7, 7, 3, 64)
    convolutions = {"gn_root": 64}
    width = 64
    for stage, count in enumerate(units, start=1):
        narrow, wide = 64 << (stage - 1), 256 << (stage - 1)
        for unit in range(1, count + 1):
            block = f"block{stage}/unit{unit}/"
            spec[block + "conv1/kernel"] = (1, 1, width, narrow)
            spec[block + "conv2/kernel"] = (3, 3, narrow, narrow)
            spec[block + "conv3/kernel"] = (1, 1, narrow, wide)
            convolutions |= {block + "gn1": narrow, block + "gn2": narrow, block + "gn3": wide}
            if unit == 1:
                spec[block + "conv_proj/kernel"] = (1, 1, width, wide)
                convolutions[block + "gn_proj"] = wide
            width = wide
    for name, channels in convolutions.items():
        spec |= {f"{name}/scale": (1, 1, 1, channels), f"{name}/bias": (1, 1, 1, channels)}
    spec["embedding/kernel"] = (1, 1, width, spec["cls"][-1])
    return spec


def tiny_vit(img_size: int | tuple[int, int] = 64, num_classes: int = 10, depth: int = 4) -> VisionTransformer:
    """Return the timm model that `vit_spec()` describes, freshly initialised by seed 0."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "num_heads": 3, "mlp_ratio": 2, "depth": depth}
    return VisionTransformer(img_size=img_size, patch_size=16, num_classes=num_classes, **sizes).eval()


def fill_image(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Return the float32 image batch (B, C, H, W) by formula."""
    i = np.arange(batch * channels * height * width, dtype=np.float64)
    values = 1.5 * np.sin(0.013 * i + 0.7 * (i % 97))
    return torch.from_numpy(values.astype(np.float32)).reshape(batch, channels, height, width)


def pil_image(width: int = 300, height: int = 200) -> Image.Image:
    """Return the RGB picture by formula."""
    y, x = np.mgrid[:height, :width]
    channels = [3 * x + 5 * y, 7 * x + 11 * y, 13 * x + 2 * y]
    return Image.fromarray((np.stack(channels, axis=-1) % 256).astype(np.uint8))


def check_figures(tensor: torch.Tensor) -> dict[str, object]:
    """Return what a recorded `chk` object holds, in float64: shape, sum, abs_sum, l2, ordered wsum."""
    flat = tensor.detach().double().flatten()
    weight = (torch.arange(flat.numel(), dtype=torch.float64) % 1009 + 1) / 1009
    return {
        "shape": list(tensor.shape),
        "sum": flat.sum().item(),
        "abs_sum": flat.abs().sum().item(),
        "l2": flat.norm().item(),
        "wsum": (flat * weight).sum().item(),
    }
