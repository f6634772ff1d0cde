"""Models ready to answer: from a run's folder, {model}_best.pth or a checkpoint of the authors, or not trained at all.

B batch, S image side in pixels, K classes that are asked for.
"""

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import transforms as T

from common.errors import UserError
from common.train.log import say
from common.train.loop import logits_of
from common.train.precision import Precision
from common.weights import explain_offline, load_checkpoint, load_weights, read_file, read_state_dict
from common.weights.google_npz import download_npz
from glsim.data_utils.datasets import read, read_names
from glsim.data_utils.transforms import resize_size, transforms
from glsim.model_utils.build import NPZ, build_model
from glsim.model_utils.config import MODEL_NAMES, ViTConfig
from glsim.train_utils.demo import demo_settings, write_demo
from glsim.train_utils.recipe import Recipe
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import CONFIGS, check_value, read_config, read_configs

# What a checkpoint's configuration says of its training and of the machine, and not of the model.
OF_THE_PLACE = {"cfg", "cfg_method", "ckpt_path", "weights_dir", "transfer_learning", "pretrained", "debugging"}
# Where its data are: of an authors' checkpoint on their machine.
OF_THE_DATA: tuple[str, ...] = ("dataset_root_path", "folder_train", "folder_val", "folder_test")
OF_THE_DATA += ("df_train", "df_trainval", "df_val", "df_test", "df_classid_classname")
SETTINGS = {field.name for field in fields(Settings)} - {"cfg", "cfg_method", "ckpt_path"}


class Answer(NamedTuple):
    """What a model says of images."""

    classes: list[list[tuple[int, float]]]  # of each image: the most probable classes, with their probabilities
    crops: Tensor | None  # (B, 3, S, S) of a model that crops


@dataclass
class Trained:
    """A model ready to use."""

    model: nn.Module  # in evaluation mode, on its device
    settings: Settings
    classes: list[str]
    transform: T.Compose  # of test images

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def answer(self, images: Tensor, top: int, precision: Precision) -> Answer:
        """What the model says of images (B, 3, S, S): the `top` most probable classes of each, and its crops."""
        with precision.autocast():
            output = self.model(images)
        best = logits_of(output).float().softmax(-1).topk(min(top, len(self.classes)))
        classes = [
            list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return Answer(classes, output[1] if isinstance(output, tuple) else None)


# Fields of the recipes of the tools that read trained models.
@dataclass
class Running:
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    demo: bool = False  # handwritten digits
    output: str = "runs"  # the demo's digits go to OUTPUT/demo-data


def configure(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Settings that the configuration files say; they may be files of a training."""
    return {name: value for name, value in read_configs(dict(given), Recipe).items() if name in SETTINGS}


def settings_given(request: Settings, running: Running, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Settings that --demo, the configuration files and the command line say, the last winning.

    With --demo the digits are written. What it says of a model is not said of a checkpoint.
    """
    changes = configure(given)
    if running.demo:
        demo = demo_settings(request, given, Path(running.output))
        of_data = {name: value for name, value in demo.items() if name.startswith(("dataset_", "folder_"))}
        changes |= demo if request.ckpt_path is None else of_data
    changes |= given
    if running.demo:
        write_demo(Path(changes["dataset_root_path"]))
    return {name: value for name, value in changes.items() if name in SETTINGS}


def load_trained(path: str | Path, device: torch.device, **changes: Any) -> Trained:
    """Load a model; `changes` are Settings to have otherwise (dynamic_top, image_size, ...).

    Raises UserError where the file is missing or of another model, and where it does not say what model it is of. No
    pickled object is made but tensors and the argparse.Namespace of the authors' checkpoints.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: ./scripts/download_ckpts.sh fetches the authors' checkpoints")
    description = (path if path.is_dir() else path.parent) / "model.json"
    if description.is_file():
        info = json.loads(description.read_text(encoding="utf-8"))
        if info["script"] != "glsim":
            raise UserError(f"{description.parent} is a run of {info['script']}, not of glsim: use it with that script")
        known = {field.name for field in fields(Settings)}
        settings = Settings(**({name: value for name, value in info["recipe"].items() if name in known} | changes))
        classes = list(info["classes"])
    else:
        values = settings_of_checkpoint(path)
        if not values and "model_name" not in changes:
            raise UserError(f"{path} does not say what model it is of: name it with --model_name")
        settings = Settings(**(values | changes))
        classes = classes_of(path, settings)
    model = build_model(settings, len(classes))
    load_checkpoint(model, path)
    return Trained(model.eval().to(device), settings, classes, transforms(settings)[1])


def not_trained(settings: Settings, device: torch.device, seed: int = 0) -> Trained:
    """Build the model that the settings name for their data set, with ImageNet's weights if they are `pretrained`.

    Raises UserError where data or weights are missing.
    """
    data = read(settings)
    npz = NPZ.get(settings.model_name) if settings.pretrained else None
    torch.manual_seed(seed)
    with explain_offline(settings.model_name, settings.pretrained, "--ckpt_path"):
        model: Any = build_model(settings, len(data.classes), pretrained=settings.pretrained and npz is None)
    if npz is not None:
        load_weights(model, download_npz(npz, settings.weights_dir))
    if not settings.pretrained:
        say("note: the model has random weights, what it says means nothing: --ckpt_path names a trained one")
        for parameter in model.parameters():
            if not parameter.any():  # the head among them: every class would be as probable
                nn.init.normal_(parameter, std=0.1)
    test: Any = data.test
    return Trained(model.eval().to(device), settings, data.classes, test.transform)


def settings_of_checkpoint(path: str | Path, settings_class: type = Settings) -> dict[str, Any]:
    """Return what the configuration in a .pth file says, by fields of `settings_class`; nothing where it has none.

    Where the data of an authors' checkpoint lie is that of the shipped configuration of the data set. None stands for
    what is not said. Raises UserError, naming the file, for a value of the wrong type.
    """
    config = _content(Path(path)).get("config", {})
    theirs = isinstance(config, Namespace)
    # How the authors have trained it is not asked for.
    known = {field.name for field in fields(Settings if theirs else settings_class)} - OF_THE_PLACE
    known -= set(OF_THE_DATA if theirs else ())
    optional = {field.name for field in fields(settings_class) if field.default is None}
    values = {
        name: check_value(path, name, value, settings_class)
        for name, value in (vars(config) if theirs else config).items()
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


def _content(path: Path) -> Mapping[str, Any]:
    """Everything in the file; of one that is none of PyTorch's, or missing, `load_checkpoint` will say so."""
    if path.suffix not in (".pth", ".pt", ".bin") or not path.is_file():
        return {}
    content = read_file(path)
    return content if isinstance(content, Mapping) else {}


def classes_in(path: Path) -> list[str] | None:
    """Return the class names in the checkpoint; the authors' have none."""
    classes: list[str] | None = _content(path).get("classes")
    return classes


def classes_of(path: Path, settings: Settings) -> list[str]:
    """Return the class names: those in the checkpoint, else of the data set's list, else numbers."""
    classes = classes_in(path)
    if classes is not None:
        return classes
    state = read_state_dict(path)
    heads = [len(value) for key, value in state.items() if key.endswith(("head.bias", "fc.bias", "net.fc.weight"))]
    file = Path(settings.dataset_root_path) / settings.df_classid_classname
    names = read_names(file) if file.is_file() else {}
    return [names.get(number, str(number)) for number in range(heads[-1] if heads else 0)]
