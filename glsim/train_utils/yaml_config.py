"""The published YAML files: values by the names of an options class, and `defaults:`, further files merged first."""

import difflib
import types
import typing
from contextlib import suppress
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


def read_config(path: str | Path, settings_class: type = Settings) -> dict[str, Any]:
    """Return the values of a YAML file: those of its `defaults`, in their order, and over them its own.

    `defaults` are relative to the file that names them. Raises UserError for a file that is missing or no YAML, for
    `defaults` that lead back to their file, and for names or values that are none of `settings_class`.
    """
    hints = typing.get_type_hints(settings_class)
    return _read(Path(path), hints, ())


def _read(path: Path, hints: dict[str, Any], above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise UserError(f"{path}: its defaults lead back to the file itself; take one of them out")
    content = _load(path)
    defaults = content.pop("defaults", None) or []
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise UserError(f"{path}: defaults: expected a list of files")
    values: dict[str, Any] = {}
    for name in defaults:
        values |= _read(path.parent / name, hints, (*above, path.resolve()))
    for key, value in content.items():
        values[key] = _checked(path, key, value, hints)
    return values


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: expected a configuration file, as configs/ has them") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `name: value` lines, found a {type(content).__name__}")
    return content


def _checked(path: Path, key: Any, value: Any, hints: dict[str, Any]) -> Any:
    if key in WITHOUT_EFFECT:
        raise UserError(f"{path}: {key} {NO_EFFECT}")
    if key not in hints or key in ("cfg", "cfg_method"):
        near = difflib.get_close_matches(str(key), hints, n=1)
        raise UserError(f"{path}: there is no option {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    kinds = _kinds(hints[key])
    if isinstance(value, str) and float in kinds:  # YAML reads 1e-5 as a word
        with suppress(ValueError):
            value = float(value)
    if type(value) is int and float in kinds and int not in kinds:
        value = float(value)
    if not any(value == kind if isinstance(kind, str) else type(value) is kind for kind in kinds):
        expected = " or ".join(kind if isinstance(kind, str) else NAMES[kind] for kind in kinds)
        raise UserError(f"{path}: {key}: {value!r} is of the wrong type or no choice: expected {expected}")
    return value


NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a mapping",
    type(None): "null",
}


def _kinds(hint: Any) -> list[Any]:
    """The types, and the words of a Literal, that an annotation allows."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    if origin is Literal:
        return list(typing.get_args(hint))
    return [origin or hint]


def read_configs(given: dict[str, Any], settings_class: type = Settings) -> dict[str, Any]:
    """Return the values of the files that `given` names as cfg and cfg_method; the latter win."""
    values: dict[str, Any] = {}
    for name in ("cfg", "cfg_method"):
        if given.get(name):
            values |= read_config(given[name], settings_class)
    return values
