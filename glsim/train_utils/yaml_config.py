"""The published YAML files: values by the names of an options class, and `defaults:`, further files merged first."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError, brief
from common.reading import read_text
from common.recipe import check_value
from glsim.train_utils.settings import Settings

CONFIGS = Path(__file__).parents[1] / "configs"  # the shipped files
# Options that the released programs understand and their GLSim does nothing with, or only what it always does.
WITHOUT_EFFECT = (
    *("anchor_size", "num_anchors", "anchor_pool_avg", "anchor_pool_stride", "anchor_conv_stem", "anchor_conv_stride"),
    *("anchor_resize_size", "shared_patchifier", "patchifier_dropout", "backbone_ours", "pos_embedding_type"),
    *("hidden_act", "classifier_aux", "loss_aux_weight", "head_norm", "head_act", "head_dropout_all"),
    *("head_dropout_prob", "cooldown_epochs"),
)

# A configuration has ten lines; what is built of this much is still read in a second.
MOST_BYTES, MOST_FILES = 16 << 10, 64

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
    return _read(Path(path), settings_class, (), [])


def _read(path: Path, settings_class: type, above: tuple[Path, ...], read: list[Path]) -> dict[str, Any]:
    if path.resolve() in above:
        raise UserError(f"{path}: its defaults lead back to the file itself; take one of them out")
    read.append(path)
    if len(read) > MOST_FILES:
        raise UserError(f"{path}: more than {MOST_FILES} files in the defaults of files: put them into one")
    content = _load(path)
    defaults = content.pop("defaults", None) or []
    if not isinstance(defaults, list) or not all(isinstance(name, str) and "\0" not in name for name in defaults):
        raise UserError(f"{path}: defaults: expected a list of files")
    values: dict[str, Any] = {}
    for name in defaults:
        values |= _read(path.parent / name, settings_class, (*above, path.resolve()), read)
    for key, value in content.items():
        _check_name(path, key, settings_class)
        values[key] = check_value(path, key, value, settings_class)
    return values


class _SafeLoader(yaml.SafeLoader):
    """safe_load without aliases: with them ten lines can say a billion things, and no published file has one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not understood here: write the value again")
        return super().compose_node(parent, index)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = _SafeLoader(read_text(path, MOST_BYTES)).get_single_data()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: expected a configuration file, as configs/ has them") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    # ValueError: a date that there is not; TypeError: a key that is none; RecursionError: brackets without end
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
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
        near = difflib.get_close_matches(brief(key).strip("'"), names, n=1)
        raise UserError(f"{path}: there is no option {brief(key)}" + (f"; did you mean {near[0]}?" if near else ""))


def read_configs(given: dict[str, Any], settings_class: type = Settings) -> dict[str, Any]:
    """Return the values of the files that `given` names as cfg and cfg_method; the latter win."""
    values: dict[str, Any] = {}
    for name in ("cfg", "cfg_method"):
        if given.get(name):
            values |= read_config(given[name], settings_class)
    return values
