"""Weights from files: Google's .npz, PyTorch's formats, run folders, timm's tags."""

from common.weights.google_npz import NPZ_URL, download_npz, missing_npz
from common.weights.load import (
    BEST,
    LoadReport,
    explain_offline,
    file_of,
    load_checkpoint,
    load_npz,
    load_weights,
    pretrained_report,
    read_file,
    read_state_dict,
    sha256_of,
)

__all__ = [
    "BEST",
    "NPZ_URL",
    "LoadReport",
    "download_npz",
    "explain_offline",
    "file_of",
    "load_checkpoint",
    "load_npz",
    "load_weights",
    "missing_npz",
    "pretrained_report",
    "read_file",
    "read_state_dict",
    "sha256_of",
]
