"""The published YAML files: values by the names of an options class, and `defaults:`, further files merged first."""

import inspect
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from common.errors import UserError
from glsim.train_utils.settings import Settings

CONFIGS = Path(__file__).parents[1] / "configs"  # the shipped files
# Options that the released programs understand and their GLSim does nothing with, or only what it always does.
WITHOUT_EFFECT = (
    *("anchor_size", "num_anchors", "anchor_pool_avg", "anchor_pool_stride", "anchor_conv_stem", "anchor_conv_stride"),
    *("anchor_resize_size", "shared_patchifier", "patchifier_dropout", "backbone_ours", "pos_embedding_type"),
    *("hidden_act", "classifier_aux", "loss_aux_weight", "head_norm", "head_act", "head_dropout_all"),
    *("head_dropout_prob", "cooldown_epochs"),
)
NO_EFFECT = "has no effect in GLSim, not in the released code either: leave it out"
# Published options that are none here, and what to say of them.
ELSEWHERE: dict[str, str] = dict.fromkeys(
    ("project_name", "entity", "save_images", "test_offline"),
    "belongs to Weights & Biases, which is off unless --wandb",
)
ELSEWHERE |= dict.fromkeys(
    ("lr_noise", "lr_noise_pct", "lr_noise_std", "patience_epochs", "shuffle_test"), "is not supported: leave it out"
)
ELSEWHERE |= {"save_freq": "is not there: see --save_every", "dist_eval": "is always on: leave it out"}


def read_config(path: str | Path, settings_class: type = Settings) -> dict[str, Any]:
    """Return the values of a YAML file: those of its `defaults`, in their order, and over them its own.

    `defaults` are relative to the file that names them. Raises UserError for a file that is missing or no YAML, and
    for names or values that are none of `settings_class`.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: expected a YAML file as in configs/ ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected lines `name: value`")
    values: dict[str, Any] = {}
    for name in content.pop("defaults", None) or []:
        values |= read_config(path.parent / name, settings_class)
    known = {field.name for field in fields(settings_class)} - {"cfg", "cfg_method"}
    for name, value in content.items():
        if name in WITHOUT_EFFECT or name in ELSEWHERE:
            raise UserError(f"{path}: {name} {ELSEWHERE.get(name, NO_EFFECT)}")
        if name not in known:
            raise UserError(f"{path}: there is no option {name!r}: train.py --help lists them")
        values[name] = check_value(path, name, value, settings_class)
    return values


def check_value(source: str | Path, name: str, value: Any, settings_class: type) -> Any:
    """Return the value of the field `name` of a dataclass; numbers and words for floats (1e-5 in YAML) as floats.

    Raises UserError, naming `source`, the file that it comes from, and the field, where it is of another type.
    """
    hint = get_type_hints(settings_class)[name]
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        origin = get_origin(kind) or kind
        with suppress(ValueError):
            if origin is float and type(value) in (int, str):
                return float(value)
            if origin is list and type(value) is list:
                return [float(number) for number in value]
        if value in get_args(kind) if origin is Literal else type(value) is origin is not list:
            return value
    raise UserError(f"{source}: {name}: found {value!r}, expected {inspect.formatannotation(hint)}")


def read_configs(given: dict[str, Any], settings_class: type = Settings) -> dict[str, Any]:
    """Return the values of the files that `given` names as cfg and cfg_method; the latter win."""
    values: dict[str, Any] = {}
    for name in ("cfg", "cfg_method"):
        if given.get(name):
            values |= read_config(given[name], settings_class)
    return values
