"""The published YAML files: values by the names of an options class, and `defaults:`, further files merged first."""

import difflib
import types
import typing
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

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

    `defaults` are relative to the file that names them. Raises UserError for a file that is missing or no YAML, for
    `defaults` that lead back to their file, and for names or values that are none of `settings_class`.
    """
    return _read(Path(path), settings_class, ())


def _read(path: Path, settings_class: type, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise UserError(f"{path}: its defaults lead back to the file itself; take one of them out")
    content = _load(path)
    defaults = content.pop("defaults", None) or []
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise UserError(f"{path}: defaults: expected a list of files")
    values: dict[str, Any] = {}
    for name in defaults:
        values |= _read(path.parent / name, settings_class, (*above, path.resolve()))
    for key, value in content.items():
        _check_name(path, key, settings_class)
        values[key] = check_value(path, key, value, settings_class)
    return values


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: expected a configuration file, as configs/ has them") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `name: value` lines, found a {type(content).__name__}")
    return content


def _check_name(path: Path, key: Any, settings_class: type) -> None:
    names = [field.name for field in fields(settings_class)]
    if key in WITHOUT_EFFECT:
        raise UserError(f"{path}: {key} {NO_EFFECT}")
    if key in ELSEWHERE:
        raise UserError(f"{path}: {key} {ELSEWHERE[key]}")
    if key in ("cfg", "cfg_method"):
        raise UserError(f"{path}: {key} belongs on the command line; what includes files here is `defaults:`")
    if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1)
        raise UserError(f"{path}: there is no option {key!r}" + (f"; did you mean {near[0]}?" if near else ""))


def check_value(source: str | Path, key: str, value: Any, settings_class: type) -> Any:
    """Return the value of the field `key` of `settings_class`, integers and words for floats as floats.

    Raises UserError, naming `source`, which it comes from, and the field, where it is of another type or no choice.
    """
    kinds = _kinds(typing.get_type_hints(settings_class)[key])
    for kind in kinds:
        with suppress(ValueError, OverflowError):
            return _as(kind, value)
    expected = " or ".join(kind if isinstance(kind, str) else NAMES[kind] for kind in kinds)
    raise UserError(f"{source}: {key}: {value!r} is of the wrong type or no choice: expected {expected}")


def _as(kind: Any, value: Any) -> Any:
    """The value as one of this kind; ValueError for another."""
    if kind is float and type(value) in (int, str):  # YAML reads 1e-5 as a word
        return float(value)
    if kind == list[float] and type(value) is list:
        return [_as(float, item) for item in value]
    if value == kind if isinstance(kind, str) else type(value) is kind:
        return value
    raise ValueError


NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list[float]: "a list of numbers",
    type(None): "null",
}


def _kinds(hint: Any) -> list[Any]:
    """The types, and the words of a Literal, that an annotation allows."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    if origin is Literal:
        return list(typing.get_args(hint))
    return [dict if origin is dict else hint]


def read_configs(given: dict[str, Any], settings_class: type = Settings) -> dict[str, Any]:
    """Return the values of the files that `given` names as cfg and cfg_method; the latter win."""
    values: dict[str, Any] = {}
    for name in ("cfg", "cfg_method"):
        if given.get(name):
            values |= read_config(given[name], settings_class)
    return values
