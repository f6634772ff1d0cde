"""What a record says about where its figures come from: code, libraries, machine, memory, and why it may not count."""

import dataclasses
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.data.images import Data

LIBRARIES = ("torchvision", "timm", "numpy", "pillow", "scikit-learn")
# Fields of a recipe that say where things lie or which of the equal runs this is, not what the experiment is.
NEUTRAL = {"data_root", "seed", "released"}


def versions() -> dict[str, str]:
    """Python, the libraries that take part in the arithmetic, and the commit of this code if it is a git checkout."""
    # torch's own word names its CUDA too ("2.9.0+cu128"), its metadata do not.
    found = {"python": platform.python_version(), "code": _commit(), "torch": str(torch.__version__)}
    return found | {name: _version(name) for name in LIBRARIES}


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # built without metadata, or a drop-in of another name (pillow-simd)
        return "unknown"


def _commit(file: Path = Path(__file__)) -> str:
    """The commit of this file, if git keeps it: a copy installed into some other repository is not of its commit."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """Bytes: the CUDA allocator's peak on this device, elsewhere the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """All parameters of the model, and those that training changes."""
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def alterations(recipe: Any) -> list[str]:
    """Fields of `recipe` that are not as published: `epochs 30 -> 2`."""
    as_published, used = dataclasses.asdict(type(recipe)()), dataclasses.asdict(recipe)
    return [
        f"{name} {value} -> {used[name]}"
        for name, value in as_published.items()
        if name not in NEUTRAL and used[name] != value
    ]


def depends_on_micro_batches(model: nn.Module) -> bool:
    """Whether it matters how a batch is cut: BatchNorm, or a moving average over batch positions (GFT)."""
    return has_batch_norm(model) or hasattr(model, "training_state")


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def data_differences(data: Data, counts: Mapping[str, int]) -> list[str]:
    """Splits whose size is not the published one of `counts`; parts of a split are measured together."""
    sizes: dict[str, int] = {}
    for images in {images.split: images for images in (data.train, data.val, data.test)}.values():
        whole = images.split.partition(" (")[0]  # "train (80 %, seed 42)" is a part of "train"
        sizes[whole] = sizes.get(whole, 0) + len(images)
    return [
        f"data: {data.test.name} {split} has {count:,} images, published {counts[split]:,}"
        for split, count in sizes.items()
        if split in counts and count != counts[split]
    ]
