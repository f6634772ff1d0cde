"""Trained models from any of their files: a run's folder, {model}_best.pth, or a checkpoint of the authors."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import transforms as T

from common.building import built_for
from common.errors import UserError
from common.predict import read_model_info
from common.recipe import check_value
from common.weights import file_of, load_checkpoint, read_pickle, read_state_dict
from glsim.data_utils.datasets import read_names
from glsim.data_utils.transforms import resize_size, transforms
from glsim.model_utils.build import build_model
from glsim.model_utils.config import MODEL_NAMES, ViTConfig
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import CONFIGS, read_config

# What a checkpoint's configuration says of its training and of the machine, and not of the model.
OF_THE_PLACE = {"cfg", "cfg_method", "ckpt_path", "weights_dir", "transfer_learning", "pretrained", "debugging"}
# Where its data are: of an authors' checkpoint on their machine.
OF_THE_DATA: tuple[str, ...] = ("dataset_root_path", "folder_train", "folder_val", "folder_test")
OF_THE_DATA += ("df_train", "df_trainval", "df_val", "df_test", "df_classid_classname")


@dataclass
class Trained:
    """A model ready to use."""

    model: nn.Module  # in evaluation mode, on its device
    settings: Settings
    classes: list[str]
    transform: T.Compose  # of test images
    name: str  # for titles and folders


def load_trained(path: str | Path, device: torch.device, **changes: Any) -> Trained:
    """Load a model; `changes` are Settings to have otherwise (dynamic_top, image_size, ...).

    Raises UserError where the file is missing, damaged, or does not say what model it is of, and where it holds pickled
    objects other than tensors and the argparse.Namespace of the authors' checkpoints.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: ./scripts/download_ckpts.sh fetches the authors' checkpoints")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (folder / "model.json").is_file():
        inside = sorted(file.name for file in path.glob("*.pth"))
        there = f"name {inside[0]} in it" if inside else "name a checkpoint or the folder of a run"
        raise UserError(f"{path} is a folder without a model.json: {there}")
    if (folder / "model.json").is_file():
        info = read_model_info(folder)
        if info["script"] != "glsim":
            raise UserError(f"{folder} is a run of {info['script']}, not of glsim: use it with that script")
        known = {field.name for field in fields(Settings)}
        file = folder / "model.json"
        said = {name: value for name, value in info["recipe"].items() if name in known}
        values = {name: check_value(file, name, value, Settings) for name, value in said.items()}
        settings, classes = Settings(**(values | changes)), list(info["classes"])
    else:
        values = settings_of_checkpoint(path)
        if not values and "model_name" not in changes:
            raise UserError(f"{path} does not say what model it is of: name it with --model_name")
        settings = Settings(**(values | changes))
        classes = classes_of(path, settings)
    with built_for(file_of(path), folder / "model.json" if path.is_dir() else path):
        model = build_model(settings, len(classes))
    load_checkpoint(model, path)
    return Trained(model.eval().to(device), settings, classes, transforms(settings)[1], settings.model_name)


def settings_of_checkpoint(path: str | Path, settings_class: type = Settings) -> dict[str, Any]:
    """Return what the configuration in a .pth file says, by fields of `settings_class`; nothing where it has none.

    Where the data of an authors' checkpoint lie is that of the shipped configuration of the data set. None stands for
    what is not said. Raises UserError, naming the file, for a value of the wrong type.
    """
    config, theirs = _config(Path(path))
    # How the authors have trained it is not asked for.
    known = {field.name for field in fields(Settings if theirs else settings_class)} - OF_THE_PLACE
    known -= set(OF_THE_DATA if theirs else ())
    optional = {field.name for field in fields(settings_class) if field.default is None}
    values = {
        name: check_value(path, name, value, settings_class)
        for name, value in config.items()
        if name in known and not name.startswith(("test_only", "vis_")) and (value is not None or name in optional)
    }
    if not values:
        return {}
    return (_of_the_data_set(str(values.get("dataset_name"))) if theirs else {}) | _without_defaults(values)


def _of_the_data_set(dataset_name: str) -> dict[str, Any]:
    """What the shipped configuration of a data set says, where it lies above all; of others after its example."""
    path = CONFIGS / "datasets" / f"{dataset_name}.yaml"
    return read_config(path) if path.is_file() else {"dataset_root_path": f"data/{dataset_name}"}


def _without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The released builder writes what follows from the model's name into its configuration: taken out again."""
    name = values.get("model_name")
    if name in MODEL_NAMES:
        own = vars(ViTConfig(name))
        sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "representation_size")
        for field in (*sizes, "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if values.get(field) == own[field]:
                values[field] = None
    rule = Settings(**{name: values[name] for name in ("dataset_name", "image_size") if name in values})
    for field in ("resize_size", "test_resize_size"):
        if values.get(field) == resize_size(rule):
            values[field] = None
    return values


def _config(path: Path) -> tuple[Mapping[str, Any], bool]:
    """The configuration in the file, and whether it is one of the authors'."""
    config = _content(path).get("config")
    if isinstance(config, Namespace):
        return vars(config), True
    return (config if isinstance(config, Mapping) else {}), False


def _content(path: Path) -> Mapping[str, Any]:
    """Everything in the file; of one that is none of PyTorch's, or missing, `load_checkpoint` will say so."""
    if path.suffix not in (".pth", ".pt", ".bin") or not path.is_file():
        return {}
    content = read_pickle(path)
    return content if isinstance(content, Mapping) else {}


def classes_in(path: Path) -> list[str] | None:
    """Return the class names in the checkpoint; the authors' have none."""
    classes = _content(path).get("classes")
    return classes if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else None


def classes_of(path: Path, settings: Settings) -> list[str]:
    """Return the class names: those in the checkpoint, else of the data set's list, else numbers."""
    classes = classes_in(path)
    if classes is not None:
        return classes
    state = read_state_dict(path)
    heads = [len(value) for key, value in state.items() if key.endswith(("head.bias", "fc.bias", "net.fc.weight"))]
    count = heads[-1] if heads else 0
    file = Path(settings.dataset_root_path) / settings.df_classid_classname
    names = read_names(file) if file.is_file() else {}
    return [names.get(number, str(number)) for number in range(count)]
