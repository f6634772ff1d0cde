"""From a weights argument (a file, a run folder, a timm tag) to loaded parameters; nothing is ever unpickled."""

import ssl
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common import pickles
from common.download import digest_of
from common.errors import UserError
from common.npz import load_npz, resize_position_embedding

# A file inside a run folder: what --eval and --weights mean by the folder.
BEST = "best.safetensors"
# Released GFT files carry this moving average of the last batch; it belongs to no model.
DROPPED_SUFFIX = ".ema_grad"
NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
NUMBERS |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Seconds to wait for the hub's first answer; huggingface_hub itself retries for three quarters of a minute.
HUB_PATIENCE = 5.0
NETWORK_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "urllib"}


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file in hex."""
    return digest_of(path, "sha256")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read name -> tensor on the CPU from .safetensors, .pth, .pt or .bin, or from a run folder's best weights.

    A bare state_dict and one under "state_dict" or "model" are accepted; the "module." of a
    DistributedDataParallel model, and the "model." of GLSim's wrapper, are removed where every key has it. Raises
    UserError for a file that is missing, damaged or of another kind; see `read_pickle`.
    """
    path = file_of(path)
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(f"{path} has an unknown ending: expected .safetensors, .pth, .pt or .bin")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise UserError(f'{path} holds no parameters: expected a state_dict, bare or under "state_dict" or "model"')
    for prefix in ("module.", "model."):
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    _check_numbers(content, path)
    return dict(content)


def load_checkpoint(model: nn.Module, path: str | Path) -> list[str]:
    """Load every parameter and buffer of `model` from a file or run folder, for evaluation or prediction.

    Returns the keys of the file that were dropped (`*.ema_grad` of released GFT files). Raises UserError when
    anything else is missing, unknown or of another shape; the model is then unchanged.
    """
    path = file_of(path)
    state_dict = _in_our_names(model, read_state_dict(path), path)
    dropped = [key for key in state_dict if key.endswith(DROPPED_SUFFIX)]
    state_dict = {key: value for key, value in state_dict.items() if key not in dropped}
    _check_fit(model, state_dict, set(), path)
    model.load_state_dict(state_dict)
    return dropped


def load_weights(model: nn.Module, source: str | Path) -> dict[str, Any]:
    """Load starting weights for fine-tuning from an .npz, .safetensors, .pth, .pt or .bin file or a run folder.

    A file of a backbone goes into `model.base_model` where the model wraps one. Position embeddings are
    resized to the model's grid. Where the number of classes differs, the classifier keeps its initialisation.
    Returns {"source": file name, "sha256": hex, "left": names of the model that were not loaded}.
    Raises UserError when anything else does not fit; the model is then unchanged.
    """
    if Path(source).suffix == ".npz":
        path = Path(source)
        own_way = hasattr(model, "load_npz")  # FFVT's last block is no block of the file
        target, prefix = (model, "") if own_way else _backbone(model)
        report = model.load_npz(path) if own_way else load_npz(target, path)  # type: ignore[operator]
        loaded = set(report.loaded)
    else:
        path = file_of(source)
        state_dict = _in_our_names(model, read_state_dict(path), path)
        state_dict = {k: v for k, v in state_dict.items() if not k.endswith(DROPPED_SUFFIX)}
        whole = any(key.startswith("base_model.") for key in state_dict)
        target, prefix = (model, "") if whole else _backbone(model)
        loaded = _load_all_but_classifier(target, state_dict, path)
    left = [key for key in model.state_dict() if not (key.startswith(prefix) and key.removeprefix(prefix) in loaded)]
    return {"source": path.name, "sha256": sha256_of(path), "left": left}


def _in_our_names(model: nn.Module, state_dict: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A checkpoint of the authors' program in the names of our model, where these differ."""
    translate = getattr(model, "from_released", None)
    return state_dict if translate is None else translate(state_dict, path)


def file_of(path: str | Path) -> Path:
    """The file that is meant by a path, which may be a run's folder; UserError where there is none."""
    path = Path(path)
    file = path / BEST if path.is_dir() else path
    if not file.is_file():
        what = f"a run folder with {BEST}" if path.is_dir() else "a weights file or a run folder"
        raise UserError(f"{file} does not exist: expected {what}")
    return file


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}): copy it again") from error


def read_pickle(path: Path) -> Any:
    """The content of a PyTorch file: tensors, plain values, and the argparse.Namespace of released GLSim files.

    UserError for a damaged file, and for one with any other pickled object, of which nothing is executed.
    """
    try:
        return pickles.load(path, namespace=True)
    except pickles.Refused as error:
        raise UserError(
            f"{path} holds a pickled {error} besides tensors, which could run code: save the state_dict alone"
        ) from error
    # A damaged file can make the unpickler raise nearly anything; all of it says that the file is bad.
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged or no PyTorch file ({first}): copy it again") from error


def _is_entry(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _check_numbers(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """UserError for a tensor of numbers that no model here has, or of more than are stored: strides can repeat one."""
    for key, value in state_dict.items():
        if value.dtype not in NUMBERS or value.nbytes > value.untyped_storage().nbytes():
            kind = f"{tuple(value.shape)} of type {str(value.dtype).removeprefix('torch.')}"
            raise UserError(f"{path} has {key} {kind}: expected plain numbers, each of them stored")


def _backbone(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the timm model inside one of our wrappers with the prefix of its keys, else the model itself."""
    base = getattr(model, "base_model", None)
    return (base, "base_model.") if isinstance(base, nn.Module) else (model, "")


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the key prefixes of the classifier: what timm calls so, else our `classifier` or `head`."""
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        found = get_classifier()
    else:
        found = getattr(model, "classifier", getattr(model, "head", None))
    modules = found if isinstance(found, tuple) else (found,)
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is m for m in modules))


def _load_all_but_classifier(model: nn.Module, state_dict: dict[str, Tensor], path: Path) -> set[str]:
    """Load `state_dict`, less a classifier of other shape; return the names of the parameters loaded."""
    own = model.state_dict()
    prefixes = _classifier_prefixes(model)
    classifier = {key for key in (*own, *state_dict) if prefixes and key.startswith(prefixes)}
    fits = all(k in own and k in state_dict and own[k].shape == state_dict[k].shape for k in classifier)
    left = set() if fits else classifier
    state_dict = {key: value for key, value in state_dict.items() if key not in left}
    for key in [key for key in state_dict if key.endswith("pos_embed") and key in own]:
        state_dict[key] = _resized(model, key, state_dict[key], own[key], path)
    _check_fit(model, state_dict, left, path)
    model.load_state_dict(state_dict, strict=False)
    return set(state_dict)


def _resized(model: nn.Module, key: str, value: Tensor, own: Tensor, path: Path) -> Tensor:
    """Resize a position embedding (1, N, D) to the patch grid of the ViT that owns it."""
    vit = model.get_submodule(key.rpartition(".")[0])
    grid = getattr(getattr(vit, "patch_embed", None), "grid_size", None)
    if value.shape == own.shape or value.ndim != 3 or grid is None:
        return value
    rows, columns = grid
    return resize_position_embedding(value, (rows, columns), own.shape[1] - rows * columns, path)


def _check_fit(model: nn.Module, state_dict: dict[str, Tensor], left: set[str], path: Path) -> None:
    """Assert that `state_dict` holds exactly the model's entries but `left`, in their shapes."""
    own = {key: value for key, value in model.state_dict().items() if key not in left}
    common = own.keys() & state_dict.keys()
    other = [key for key in own if key in common and own[key].shape != state_dict[key].shape]
    missing = [key for key in own if key not in common]
    unknown = [key for key in state_dict if key not in common]
    if not (missing or unknown or other):
        _check_types(state_dict, own, path)
        _check_finite(state_dict, path)
        return
    of_rank = all(own[key].ndim == state_dict[key].ndim for key in other)
    prefixes = _classifier_prefixes(model)
    if not missing and not unknown and of_rank and prefixes and all(key.startswith(prefixes) for key in other):
        counts = [len(values[other[0]]) for values in (state_dict, own)]
        raise UserError(
            f"{path} was trained for {counts[0]} classes, but this model has {counts[1]}: use the data set and "
            "class list it was trained with"
        )
    if other and not missing and not unknown and of_rank and all(key.endswith("pos_embed") for key in other):
        (found, width), (expected, own_width) = (values[other[0]].shape[-2:] for values in (state_dict, own))
        if width == own_width:
            raise UserError(
                f"{path} was trained at another image size: it has {found} positions, this model has {expected}"
            )
    shapes = [f"{k} {tuple(state_dict[k].shape)} instead of {tuple(own[k].shape)}" for k in other]
    parts = (("lacks", missing), ("holds the unknown", unknown), ("has", shapes))
    faults = " and ".join(f"{verb} {_some(names)}" for verb, names in parts if names)
    raise UserError(f"{path} {faults}: it belongs to another model than this {type(model).__name__}")


def _check_types(state_dict: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    for key, value in state_dict.items():
        if value.is_floating_point() != own[key].is_floating_point():
            kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (value, own[key])]
            raise UserError(f"{path} has {key} as {kinds[0]}, this model needs {kinds[1]}: it is of another kind")


def _check_finite(state_dict: dict[str, Tensor], path: Path) -> None:
    for key, value in state_dict.items():
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            raise UserError(
                f"{path} is of no use: {bad} of the {value.numel()} numbers of {key} are NaN or infinite; its training "
                "diverged, or the file is damaged"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def pretrained_report(model: nn.Module) -> dict[str, str | None]:
    """Say which pretrained file a timm model (or the one inside a wrapper) was created from.

    Returns {"source": hub id, URL or file name, "sha256": hex, or None where the file is in no cache}.
    """
    config: dict[str, Any] = getattr(_backbone(model)[0], "pretrained_cfg", None) or {}
    if config.get("file"):
        file = Path(config["file"])
        return {"source": file.name, "sha256": sha256_of(file) if file.is_file() else None}
    if config.get("hf_hub_id"):
        source, found = config["hf_hub_id"], _hub_file(config)
    elif config.get("url"):
        source = config["url"]
        found = Path(torch.hub.get_dir()) / "checkpoints" / source.rpartition("/")[2]
    else:
        raise ValueError(f"{type(model).__name__} has no pretrained configuration: it is no timm model")
    return {"source": source, "sha256": sha256_of(found) if found and found.is_file() else None}


def _hub_file(config: Mapping[str, Any]) -> Path | None:
    """Find the file in the hub's cache that timm takes: safetensors before pickle."""
    repository, _, revision = config["hf_hub_id"].partition("@")
    for name in (config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"):
        if name:
            found = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    return None


@contextmanager
def explain_offline(tag: str, pretrained: bool = True, flag: str = "--weights") -> Iterator[None]:
    """Turn failures to fetch the pretrained weights `tag`, while timm builds the model inside, into UserError.

    A hub that does not answer within HUB_PATIENCE seconds is not asked again: cached weights load at once and
    missing ones fail at once. With pretrained=False nothing is asked. Names and tags that timm does not know
    get their own sentence; every other exception passes unchanged.
    """
    endpoint, constants = huggingface_hub.constants.ENDPOINT, huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    silent = pretrained and not before and not _answers(endpoint)
    constants.HF_HUB_OFFLINE = before or silent
    try:
        yield
    except Exception as error:
        if _while_downloading(error):
            reason = f"{endpoint} does not answer" if silent else str(error).strip().split("\n")[0]
            raise UserError(
                f"the pretrained weights {tag} are not in {constants.HF_HUB_CACHE} and could not be downloaded "
                f"({reason}): run once with a connection, or give a file with {flag} FILE"
            ) from error
        if sentence := _not_in_timm(tag, error):
            raise UserError(sentence) from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str) -> bool:
    """Say whether anything answers at `url`, through a proxy where one is set."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_PATIENCE):
            return True
    except (urllib.error.HTTPError, HTTPException):
        return True
    except OSError as error:
        # The hub's client may trust certificates that urllib does not.
        return isinstance(getattr(error, "reason", error), ssl.SSLError)


def _while_downloading(error: Exception) -> bool:
    """Say whether a network failure, and not a fault of the model, was raised on its way through a download."""
    if not (isinstance(error, OSError | RuntimeError) or type(error).__module__.split(".")[0] in NETWORK_PACKAGES):
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.split(".")[0] in NETWORK_PACKAGES or name == "torch.hub" for name in modules)


def _not_in_timm(tag: str, error: Exception) -> str | None:
    """Return the sentence for a name or tag unknown to timm, which raises a bare RuntimeError with these words."""
    name, text = tag.partition(".")[0], str(error)
    if isinstance(error, RuntimeError) and text.startswith("Unknown model"):
        return f"timm {timm.__version__} has no model {name}: timm.list_models() lists those it has"
    if isinstance(error, RuntimeError) and text.startswith(("Invalid pretrained tag", "No pretrained weights exist")):
        listed = f"timm.list_pretrained('{name}*')"
        return f"timm {timm.__version__} has no pretrained weights {tag}: {listed} lists those it has"
    return None
