"""Google's ViT checkpoints (.npz, Flax layout) <-> state_dict of a timm VisionTransformer, plain or hybrid.

Letters for axes: D width, H heads, d width of a head, M hidden width of the MLP, N tokens, C classes.
Source of the key names: https://github.com/google-research/vision_transformer, files under NPZ_URL.
"""

import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.download import download
from common.errors import UserError

NPZ_URL = "https://storage.googleapis.com/vit_models/imagenet21k"
NPZ_NAMES = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16")
# timm's ViT has no representation layer before its head, and fine-tuning has no use for it.
IGNORED = frozenset({"pre_logits/kernel", "pre_logits/bias"})

FILE_ADVICE = "use the file of this model"
MAX_BYTES = 8 << 30  # twice the largest ViT that was published in this layout
# Trained weights hardly compress: by 1.1 as float32, 2.1 where they were bfloat16, 4.0 where these are kept as float64.
# Small files may be mostly zeros.
MAX_RATIO, FREE_BYTES = 5, 4 << 20
FLOATS = (np.float16, np.float32, np.float64)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read the numeric arrays of an .npz file; keys are separated by '/' on every system.

    Nothing is unpickled, and sizes are checked before memory is taken. Raises UserError when the file is
    missing, is no whole zip archive, declares sizes that it does not hold, or contains anything but numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise missing_npz(path, path.stem)
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(path, archive.infolist())
            for member in archive.infolist():
                key = member.filename.replace("\\", "/").removesuffix(".npy")
                if key in arrays or not member.filename.endswith(".npy"):
                    raise UserError(f"{path} holds {member.filename}: expected numpy arrays only, each once")
                with archive.open(member) as file:
                    arrays[key] = _read_array(path, member, file)
    except (UserError, MemoryError):
        raise
    # What zipfile and numpy raise on damaged input is documented nowhere as a list; all of it says one thing.
    except Exception as error:
        raise UserError(f"{path} is damaged or not an .npz file ({error}): download it again") from error
    return arrays


def missing_npz(path: str | Path, model_name: str) -> UserError:
    """The error for a checkpoint that is not at `path`; it names the address of `model_name`, if Google has that."""
    name = model_name.replace("R50-", "R50+")
    address = f"{NPZ_URL}/{name if name in NPZ_NAMES else '...'}.npz"
    return UserError(f"{path} does not exist: expected a Google ViT checkpoint, fetch {address} and put it there")


def _check_sizes(path: Path, members: list[zipfile.ZipInfo]) -> None:
    size = path.stat().st_size
    declared = sum(member.file_size for member in members)
    if declared > min(MAX_BYTES, MAX_RATIO * size + FREE_BYTES):
        raise UserError(f"{path} ({size} bytes) claims to unpack to {declared} bytes: not a ViT checkpoint")


def _read_array(path: Path, member: zipfile.ZipInfo, file: IO[bytes]) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{member.filename} has the unknown .npy version {version}")
    try:
        shape, _, dtype = readers[version](file)
    except MemoryError as error:  # of Python's parser, for nesting: a header has 10,000 letters at most
        raise ValueError(f"{member.filename} has an unreadable header") from error
    if dtype.hasobject:
        raise UserError(f"{path} holds pickled objects ({member.filename}), which are never loaded")
    if dtype.kind not in "fiub":
        raise UserError(f"{path}: {member.filename} has type {dtype}, expected numbers")
    if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} declares shape {shape}, which is not the size it has")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    file.read(1)  # zipfile compares its checksum only at the end of the member
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {member.filename} holds NaN or infinite numbers: download it again")
    return array


def download_npz(model_name: str, folder: str | Path) -> Path:
    """Download Google's ImageNet-21k checkpoint `model_name`.npz into `folder` and return its path.

    `model_name` is one of NPZ_NAMES ("R50-ViT-B_16" is accepted for "R50+ViT-B_16"). A file that is there
    already is not fetched again. Raises UserError for another name, and when the download fails or what came
    is no whole archive.
    """
    name = model_name.replace("R50-", "R50+")
    if name not in NPZ_NAMES:
        raise UserError(f"no checkpoint is published for {model_name!r}: choose from {', '.join(NPZ_NAMES)}")
    target = Path(folder) / f"{name}.npz"
    if not target.exists():
        download(f"{NPZ_URL}/{name}.npz", target)
        _check_archive(target)
    return target


def _check_archive(path: Path) -> None:
    """Hold every member against its checksum (the server's own is not always sent) and delete a bad file."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # as in read_npz
        bad = str(error) or type(error).__name__
    if bad:
        path.unlink()
        raise UserError(f"what came from {NPZ_URL} for {path.name} is damaged ({bad}) and was deleted: run again")


class Entry(NamedTuple):
    """One timm parameter and the Google array(s) it is made of.

    `axes` are the sizes of each Google array: a number is that size, a name is one size in the whole file.
    """

    timm: str
    google: tuple[str, ...]
    axes: str
    kind: str


class Layout(NamedTuple):
    """What the keys say of a model: depth, ResNet units per stage (None: no ResNet, (): stem only), head."""

    depth: int
    units: tuple[int, ...] | None
    head: bool


def _entries(layout: Layout) -> list[Entry]:
    """List every parameter of a model of this layout."""
    channels = "c" if layout.units is None else f"out{len(layout.units)}"
    entries = [
        Entry("cls_token", ("cls",), "1 1 D", "same"),
        Entry("pos_embed", ("Transformer/posembed_input/pos_embedding",), "1 N D", "same"),
        *_resnet_entries(layout.units),
        Entry("patch_embed.proj.weight", ("embedding/kernel",), f"p p {channels} D", "conv"),
        Entry("patch_embed.proj.bias", ("embedding/bias",), "D", "same"),
    ]
    for i in range(layout.depth):
        entries += _block_entries(f"blocks.{i}.", f"Transformer/encoderblock_{i}/")
    entries += _norm_entries("norm", "Transformer/encoder_norm", "D", "same")
    return entries + (_dense_entries("head", "head", "D", "C") if layout.head else [])


def _block_entries(timm: str, google: str) -> list[Entry]:
    attention = google + "MultiHeadDotProductAttention_1/"
    kernels = tuple(f"{attention}{name}/kernel" for name in ("query", "key", "value"))
    biases = tuple(f"{attention}{name}/bias" for name in ("query", "key", "value"))
    return [
        *_norm_entries(timm + "norm1", google + "LayerNorm_0", "D", "same"),
        Entry(timm + "attn.qkv.weight", kernels, "D H d", "qkv"),
        Entry(timm + "attn.qkv.bias", biases, "H d", "qkv_bias"),
        Entry(timm + "attn.proj.weight", (attention + "out/kernel",), "H d D", "out"),
        Entry(timm + "attn.proj.bias", (attention + "out/bias",), "D", "same"),
        *_norm_entries(timm + "norm2", google + "LayerNorm_2", "D", "same"),
        *_dense_entries(timm + "mlp.fc1", google + "MlpBlock_3/Dense_0", "D", "M"),
        *_dense_entries(timm + "mlp.fc2", google + "MlpBlock_3/Dense_1", "M", "D"),
    ]


def _norm_entries(timm: str, google: str, axes: str, kind: str) -> list[Entry]:
    return [
        Entry(timm + ".weight", (google + "/scale",), axes, kind),
        Entry(timm + ".bias", (google + "/bias",), axes, kind),
    ]


def _dense_entries(timm: str, google: str, inputs: str, outputs: str) -> list[Entry]:
    return [
        Entry(timm + ".weight", (google + "/kernel",), f"{inputs} {outputs}", "linear"),
        Entry(timm + ".bias", (google + "/bias",), outputs, "same"),
    ]


def _resnet_entries(units: tuple[int, ...] | None) -> list[Entry]:
    """List the parameters of a hybrid's ResNet-V2; where it is a stem alone, timm's names have no `stem.`."""
    if units is None:
        return []
    backbone = "patch_embed.backbone."
    stem = backbone + ("stem." if units else "")
    entries = _conv_entries(stem, ("conv", "norm"), "", ("conv_root", "gn_root"), "s s c out0")
    for stage, count in enumerate(units, start=1):
        wide, narrow = f"out{stage}", f"mid{stage}"
        for unit in range(1, count + 1):
            first = f"out{stage - 1}" if unit == 1 else wide
            timm, google = f"{backbone}stages.{stage - 1}.blocks.{unit - 1}.", f"block{stage}/unit{unit}/"
            sizes = (f"1 1 {first} {narrow}", f"3 3 {narrow} {narrow}", f"1 1 {narrow} {wide}")
            for n, axes in enumerate(sizes, start=1):
                entries += _conv_entries(timm, (f"conv{n}", f"norm{n}"), google, (f"conv{n}", f"gn{n}"), axes)
            if unit == 1:
                names = ("downsample.conv", "downsample.norm")
                entries += _conv_entries(timm, names, google, ("conv_proj", "gn_proj"), f"1 1 {first} {wide}")
    return entries


def _conv_entries(
    timm: str, timm_names: tuple[str, str], google: str, google_names: tuple[str, str], axes: str
) -> list[Entry]:
    return [
        Entry(f"{timm}{timm_names[0]}.weight", (f"{google}{google_names[0]}/kernel",), axes, "conv"),
        *_norm_entries(timm + timm_names[1], google + google_names[1], f"1 1 1 {axes.split()[-1]}", "group"),
    ]


def _layout_of(keys: Iterable[str], block: str, unit: str, backbone: tuple[str, ...], head: str) -> Layout:
    """Count the blocks and ResNet units that two patterns find; only distinct numbers count."""
    keys = list(keys)
    depth = len({match[1] for key in keys if (match := re.match(block, key))})
    found = {match.groups() for key in keys if (match := re.match(unit, key))}
    stages = [stage for stage, _ in found]
    units = tuple(stages.count(stage) for stage in sorted(set(stages), key=int))
    hybrid = any(key.startswith(backbone) for key in keys)
    return Layout(depth, units if hybrid else None, any(key.startswith(head) for key in keys))


def _google_layout(keys: Iterable[str]) -> Layout:
    block, unit = r"Transformer/encoderblock_(\d{1,4})/", r"block(\d{1,4})/unit(\d{1,4})/"
    return _layout_of(keys, block, unit, ("conv_root/", "gn_root/", "block"), "head/")


def _timm_layout(keys: Iterable[str]) -> Layout:
    block, unit = r"blocks\.(\d{1,4})\.", r"patch_embed\.backbone\.stages\.(\d{1,4})\.blocks\.(\d{1,4})\."
    return _layout_of(keys, block, unit, ("patch_embed.backbone.",), "head.")


def google_to_timm(
    arrays: Mapping[str, np.ndarray],
    *,
    head: bool = True,
    grid: int | tuple[int, int] | None = None,
    source: str | Path = "the .npz file",
) -> dict[str, torch.Tensor]:
    """Convert Google's arrays to the state_dict of a timm VisionTransformer with fused qkv.

    Depth and hybrid stages follow from the keys. Every key is converted or belongs to IGNORED (and to
    `head/*` with head=False). `grid` resizes the position embedding to that many patches (rows, columns).
    Raises UserError, naming `source`, when a key is missing or unknown or a shape does not fit the others.
    """
    entries = _entries(_google_layout(arrays))
    _check_keys({key for entry in entries for key in entry.google}, arrays.keys() - IGNORED, source)
    _check_shapes(entries, arrays, source)
    state_dict = {
        entry.timm: _to_torch(entry.kind, [arrays[key] for key in entry.google])
        for entry in entries
        if head or not entry.timm.startswith("head.")
    }
    if grid is not None:
        state_dict["pos_embed"] = resize_position_embedding(state_dict["pos_embed"], grid, source=source)
    return state_dict


def timm_to_google(state_dict: Mapping[str, torch.Tensor], num_heads: int) -> dict[str, np.ndarray]:
    """Convert the state_dict of a timm VisionTransformer to Google's arrays: converse of google_to_timm.

    Raises UserError when the state_dict is not that of a ViT with a class token, fused qkv and final norm.
    """
    entries = _entries(_timm_layout(state_dict))
    _check_keys({entry.timm for entry in entries}, state_dict.keys(), "the state_dict")
    arrays: dict[str, np.ndarray] = {}
    for entry in entries:
        tensor = state_dict[entry.timm].detach().cpu().numpy()
        parts = _to_google(entry.kind, tensor, num_heads)
        arrays.update(zip(entry.google, map(np.ascontiguousarray, parts), strict=True))
    return arrays


def _check_keys(wanted: set[str], found: Iterable[str], source: str | Path) -> None:
    found = set(found)
    for names, verb in ((wanted - found, "lacks"), (found - wanted, "holds the unknown")):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{source} {verb} {listed}: expected exactly the parameters of a Google ViT")


def _check_shapes(entries: list[Entry], arrays: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Give each name of an axis the size it has where it comes first, and hold every later use against it."""
    sizes: dict[str, int] = {}
    for entry in entries:
        for key in entry.google:
            shape, axes = arrays[key].shape, entry.axes.split()
            if entry.kind == "group" and len(shape) == 1:
                axes = axes[-1:]  # Flax's newer GroupNorm keeps its parameters flat
            if len(shape) == len(axes):
                for axis, size in zip(axes, shape, strict=True):
                    sizes.setdefault(axis, int(axis) if axis.isdecimal() else size)
            wanted = [sizes.get(axis, axis) for axis in axes]
            if list(shape) != wanted:
                expected = ", ".join(map(str, wanted))
                raise UserError(f"{source}: {key} has shape {shape}, but the other arrays need ({expected})")
            if arrays[key].dtype.type not in FLOATS:
                raise UserError(f"{source}: {key} has type {arrays[key].dtype}, expected floating point")


def _to_torch(kind: str, arrays: list[np.ndarray]) -> torch.Tensor:
    result = arrays[0]
    if kind == "conv":
        result = result.transpose(3, 2, 0, 1)  # (h, w, in, out) -> (out, in, h, w)
    elif kind == "linear":
        result = result.T
    elif kind == "out":
        result = result.reshape(-1, result.shape[-1]).T  # (H, d, D) -> (D, H*d)
    elif kind == "qkv":
        result = np.concatenate([array.reshape(len(array), -1).T for array in arrays])  # (3*H*d, D)
    elif kind == "qkv_bias":
        result = np.concatenate([array.reshape(-1) for array in arrays])
    elif kind == "group":
        result = result.reshape(-1)
    return torch.from_numpy(np.array(result, dtype=result.dtype.newbyteorder("="), order="C"))


def _to_google(kind: str, tensor: np.ndarray, num_heads: int) -> list[np.ndarray]:
    if kind == "conv":
        return [tensor.transpose(2, 3, 1, 0)]
    if kind == "linear":
        return [tensor.T]
    if kind == "out":
        return [tensor.T.reshape(num_heads, -1, len(tensor))]
    if kind == "qkv":
        return [part.T.reshape(tensor.shape[1], num_heads, -1) for part in np.split(tensor, 3)]
    if kind == "qkv_bias":
        return [part.reshape(num_heads, -1) for part in np.split(tensor, 3)]
    return [tensor.reshape(1, 1, 1, -1) if kind == "group" else tensor]


def resize_position_embedding(
    position: torch.Tensor, grid: int | tuple[int, int], prefix_tokens: int = 1, source: str | Path = "the checkpoint"
) -> torch.Tensor:
    """Resize the grid part of a position embedding (1, prefix + g*g, D) to (1, prefix + rows*columns, D).

    Equal to scipy.ndimage.zoom(grid, (rows/g, columns/g, 1), order=1), which the authors of ViT use: linear
    between the outermost patch centres. The prefix (class token) is kept. Raises UserError, naming `source`,
    unless the old grid is square.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    count = position.shape[1] - prefix_tokens
    side = math.isqrt(max(count, 0))
    if side * side != count or count == 0:
        raise UserError(f"{source} has a position embedding of {count} patches: only a square grid can be resized")
    if (rows, columns) == (side, side):
        return position
    prefix, patches = position[:, :prefix_tokens], position[:, prefix_tokens:]
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    # float64, as scipy computes: in float32 the two differ by 1e-6.
    patches = F.interpolate(patches.double(), size=(rows, columns), mode="bilinear", align_corners=True)
    patches = patches.flatten(2).transpose(1, 2).to(position.dtype)  # (1, rows*columns, D)
    return torch.cat([prefix, patches], dim=1)


@dataclass(frozen=True)
class LoadReport:
    """Names of the model's parameters that were loaded, and of those left as they were."""

    loaded: tuple[str, ...]
    left: tuple[str, ...]


def load_npz(model: nn.Module, path: str | Path, leave: tuple[str, ...] = (), need: tuple[str, ...] = ()) -> LoadReport:
    """Load a Google ViT checkpoint into a timm VisionTransformer in place and report what was loaded.

    The position embedding is resized to the model's grid. Parameters whose names begin with one of `leave` stay
    as they are. So does the head, `head.weight` and `head.bias`, unless the file's has as many classes or they are
    in `need`. Raises UserError when any other parameter is missing on either side or has another shape; the model is
    then unchanged.
    """
    own = {key: value.shape for key, value in model.state_dict().items()}
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or "cls_token" not in own or "pos_embed" not in own:
        raise UserError(f"{path} is for a ViT with a class token, which {type(model).__name__} is not")
    state_dict = google_to_timm(read_npz(path), grid=tuple(grid), source=path)
    _check_depth(own, state_dict, model, path)
    head = ("head.weight", "head.bias")
    if any(key not in state_dict or own.get(key) != state_dict[key].shape for key in head if key not in need):
        leave = (*leave, *head)
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(leave)}
    left = tuple(key for key in own if key.startswith(leave))
    _check_fit({key: shape for key, shape in own.items() if key not in left}, state_dict, model, path)
    model.load_state_dict(state_dict, strict=False)
    return LoadReport(tuple(state_dict), left)


def _check_depth(
    own: dict[str, torch.Size], state_dict: dict[str, torch.Tensor], model: nn.Module, path: str | Path
) -> None:
    depth, own_depth = _timm_layout(state_dict).depth, _timm_layout(own).depth
    if depth != own_depth:
        name = type(model).__name__
        raise UserError(f"{path} has {depth} blocks, but {name} has {own_depth}: {FILE_ADVICE}")


def _check_fit(
    own: dict[str, torch.Size], state_dict: dict[str, torch.Tensor], model: nn.Module, path: str | Path
) -> None:
    """Assert that the file fills each of these parameters of the model, in its shape, and has no other."""
    name = type(model).__name__
    for key in sorted(own.keys() ^ state_dict.keys()):
        holder, other = (name, path) if key in own else (path, name)
        raise UserError(f"{holder} has {key}, but {other} has not: {FILE_ADVICE}")
    for key, value in state_dict.items():
        if value.shape != own[key]:
            shapes = f"{tuple(value.shape)}, but {name} needs {tuple(own[key])}"
            raise UserError(f"{path} has {key} of shape {shapes}: {FILE_ADVICE}")
