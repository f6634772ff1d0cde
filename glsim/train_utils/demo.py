"""The demo: handwritten digits in the layout of CUB, and models small enough for a minute on a CPU."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.data import write_demo as write_digits
from glsim.data_utils.splits import write_splits
from glsim.model_utils.config import MODEL_NAMES
from glsim.model_utils.resnet import NAMES as RESNETS
from glsim.train_utils.settings import Settings

FOLDER = "CUB"  # of the digits, below the demo's data
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}


def write_demo(root: Path) -> None:
    """Write the digits and their .csv files to `root`, a folder of the name FOLDER, where they are not there yet."""
    write_digits("cub", root.parent)
    if not (root / "classid_classname.csv").exists():
        write_splits("cub", root)


def demo_settings(settings: Settings, given: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Return the settings that a demo changes: where the data lie, how they are augmented, and the size of the model.

    `given` are those of the command line: an image size among them stays, and the patches follow it.
    """
    changes: dict[str, Any] = {"dataset_name": "cub", "dataset_root_path": str(output / "demo-data" / FOLDER)}
    changes |= {"folder_train": "images", "folder_val": "images", "folder_test": "images", "custom_mean_std": False}
    changes |= {"pretrained": False, "trivial_aug": False, "horizontal_flip": False, "re": 0.0, "sd": 0.0}
    name = settings.model_name
    patch = re.search(r"patch(\d+)", name)
    usual = 16 if name in (*MODEL_NAMES, "transfg", "ffvt", "gft") else 32 if name in ("cal", *RESNETS) else 64
    size = given.get("image_size", 4 * int(patch[1]) if patch else usual)
    changes |= {"image_size": size, "resize_size": size, "test_resize_size": size}
    if name in MODEL_NAMES or name.startswith("gls"):
        changes["dynamic_top"] = 4
    return changes | _small_model(name, next(size // grid for grid in range(4, 0, -1) if size % grid == 0))


def _small_model(name: str, patch: int) -> dict[str, Any]:
    """The sizes of a demo's model with patches of `patch` pixels; those that stay large train for one epoch."""
    sizes = dict(zip(("hidden_size", "mlp_dim", "num_heads", "num_layers"), SMALL.values(), strict=True))
    if name in MODEL_NAMES:
        return SMALL | {"hidden_dropout_prob": 0.0, "model_kwargs": {"patch_size": patch}}
    if name == "transfg":
        return {"model_kwargs": sizes | {"patch_size": patch, "slide_step": max(1, 3 * patch // 4), "dropout": 0.0}}
    if name == "ffvt":
        return {"model_kwargs": sizes | {"patch_size": patch, "num_token": 4, "dropout": 0.0}}
    if name == "gft":
        return {"model_kwargs": {"patch_size": patch, "embed_dim": 64, "depth": 9, "num_heads": 4}}
    if name == "cal":
        return {"model_kwargs": {"backbone": "resnet18", "num_maps": 4}, "epochs": 1}
    if name.startswith("gls"):  # as many blocks as masks are asked for in the README
        return {"model_kwargs": {"depth": 12, "embed_dim": 48, "num_heads": 3}, "epochs": 1}
    return {"epochs": 1}
