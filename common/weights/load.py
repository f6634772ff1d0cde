"""Weights into models: from .npz, .safetensors, .pth, .pt and .bin files, from run folders, and by timm's tags.

No code from a file ever runs. A model changes only where everything of a file fits.
"""

from argparse import Namespace
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor, nn

from common.data.download import NETWORK_ERRORS, digest_of
from common.errors import UserError
from common.weights.google_npz import google_to_timm, read_npz, resize_position_embedding

BEST = "best.safetensors"  # the file that a run folder stands for
AVERAGE = ".ema_grad"  # GALA's moving average of the last batch in released GFT files: no part of the model
HUB_PATIENCE = 5.0  # seconds to wait for the hub's first answer; its own client tries for 45
HUB_PACKAGES = ("huggingface_hub", "httpx", "httpx2", "requests")  # whose errors a failed download raises
NOT_IN_TIMM = ("Unknown model", "Invalid pretrained tag", "No pretrained weights exist")  # its RuntimeErrors

Names = tuple[str, ...]
Tensors = dict[str, Tensor]


class LoadReport(NamedTuple):
    """Names of a model's parameters: those that were loaded, and those left as they were."""

    loaded: Names
    left: Names


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file in hex."""
    return digest_of(path, "sha256")


def file_of(path: str | Path) -> Path:
    """Return the file that a path means, which may be a run folder. Raises UserError where there is none."""
    path = Path(path)
    file = path / BEST if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist: expected a weights file, or a run folder with {BEST}")
    return file


def read_file(path: Path) -> Any:
    """Return the content of a PyTorch or safetensors file, on the CPU.

    A PyTorch file may hold tensors, plain values, and the Namespace of GLSim's authors. Raises UserError for any other
    object, of which nothing is executed, and for a damaged file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes both raise nearly anything
        raise UserError(
            f"{path} is damaged, or holds objects besides tensors, which could run code and are never loaded: copy it "
            "again, or save the state_dict alone"
        ) from error


def read_state_dict(path: str | Path) -> Tensors:
    """Read name -> tensor, on the CPU, from .safetensors, .pth, .pt or .bin, or from a run folder.

    A state_dict may lie under "state_dict" or "model". The prefix "module." of DistributedDataParallel and "model." of
    GLSim's wrapper go where every name has it. Raises UserError for a file that is missing, damaged or of another kind.
    """
    path = file_of(path)
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(f"{path} has an unknown ending: expected .safetensors, .pth, .pt or .bin")
    content = read_file(path)
    if isinstance(content, Mapping):
        content = next((content[name] for name in ("state_dict", "model") if name in content), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f'{path} holds no parameters: expected a state_dict, bare or under "state_dict" or "model"')
    state = dict(content)
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_checkpoint(model: nn.Module, path: str | Path) -> list[str]:
    """Load every parameter and buffer of `model` from a file or run folder, for evaluation and prediction.

    Returns the names in the file that belong to no model (`*.ema_grad` of released GFT files). Raises UserError where
    anything else is missing, unknown or of another shape; the model is then unchanged.
    """
    path = file_of(path)
    state, dropped = _read_for(model, path)
    _check_fit(model, state, path)
    model.load_state_dict(state)
    return dropped


def load_weights(model: nn.Module, source: str | Path) -> dict[str, Any]:
    """Load starting weights for training from an .npz, .safetensors, .pth, .pt or .bin file or a run folder.

    A file of a backbone goes into `model.base_model` where there is one. Position embeddings are resized to the model's
    grid. A classifier of another number of classes keeps its initialisation.
    Returns {"source": file name, "sha256": hex, "left": names of the model that were not loaded}.
    Raises UserError where anything else does not fit; the model is then unchanged.
    """
    path = Path(source)
    target, prefix = getattr(model, "base_model", model), "base_model." if hasattr(model, "base_model") else ""
    if path.suffix == ".npz" and hasattr(model, "load_npz"):  # FFVT's last block is no block of the file
        report, prefix = model.load_npz(path), ""  # type: ignore[operator]
    elif path.suffix == ".npz":
        report = load_npz(target, path)
    else:
        path = file_of(path)
        state, _ = _read_for(model, path)
        if any(name.startswith("base_model.") for name in state):
            target, prefix = model, ""
        report = _fill(target, state, path)
    loaded = {prefix + name for name in report.loaded}
    left = [name for name in model.state_dict() if name not in loaded]
    return {"source": path.name, "sha256": sha256_of(path), "left": left}


def load_npz(model: nn.Module, path: str | Path, leave: Names = (), need: Names = ()) -> LoadReport:
    """Load a Google ViT checkpoint into a timm VisionTransformer in place.

    The position embedding is resized to the model's grid. Parameters whose names begin with one of `leave` stay as they
    are, and so does a classifier of another number of classes whose names are not in `need`. Raises UserError where any
    other parameter is missing on either side or has another shape; the model is then unchanged.
    """
    state = google_to_timm(read_npz(path), path)
    patches: Any = getattr(model, "patch_embed", None)
    if patches is not None:
        state["pos_embed"] = resize_position_embedding(state["pos_embed"], patches.grid_size, source=path)
    return _fill(model, state, path, leave, need)


def _read_for(model: nn.Module, path: Path) -> tuple[Tensors, list[str]]:
    """Return the file's state_dict in the names of `model`, and which names were dropped."""
    state = read_state_dict(path)
    if hasattr(model, "from_released"):
        state = model.from_released(state, path)  # type: ignore[operator]
    dropped = [name for name in state if name.endswith(AVERAGE)]
    return {name: tensor for name, tensor in state.items() if name not in dropped}, dropped


def _fill(model: nn.Module, state: Tensors, path: str | Path, leave: Names = (), need: Names = ()) -> LoadReport:
    """Load `state` as `load_npz` says."""
    own = model.state_dict()
    left = {name for name in {**own, **state} if name.startswith(leave)}
    classifier = {name for name in {**own, **state} if name.startswith(_classifier(model)) and name not in need}
    if any(name not in own or name not in state or own[name].shape != state[name].shape for name in classifier):
        left |= classifier
    state = {name: tensor for name, tensor in state.items() if name not in left}
    for name in state:
        if name.endswith("pos_embed") and name in own and own[name].shape != state[name].shape:
            vit: Any = model.get_submodule(name.rpartition(".")[0])
            prefix_tokens = own[name].shape[1] - vit.patch_embed.num_patches
            state[name] = resize_position_embedding(state[name], vit.patch_embed.grid_size, prefix_tokens, path)
    _check_fit(model, state, path, left)
    model.load_state_dict(state, strict=False)  # nothing but `left` is missing
    return LoadReport(tuple(state), tuple(name for name in own if name in left))


def _check_fit(model: nn.Module, state: Tensors, path: str | Path, left: Container[str] = ()) -> None:
    """UserError unless `state` has all entries of the model but `left` and no other, in their shapes, all finite."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in left}
    missing, unknown = [name for name in own if name not in state], [name for name in state if name not in own]
    other = [name for name in own if name in state and state[name].shape != own[name]]
    shapes = [f"{name} {tuple(state[name].shape)} instead of {own[name]}" for name in other]
    parts = (("lacks", missing), ("holds the unknown", unknown), ("has", shapes))
    faults = [f"{verb} {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for verb, names in parts if names]
    reason = f"it belongs to another model than this {type(model).__name__}"
    if other and not missing and not unknown:
        if all(name.startswith(_classifier(model)) for name in other):
            found, wanted = len(state[other[0]]), own[other[0]][0]
            reason = f"it was trained for {found} classes, not {wanted}; use the data set it was trained on"
        elif all(name.endswith("pos_embed") for name in other):
            reason = "it was trained at another image size"
    if faults:
        raise UserError(f"{path} {' and '.join(faults)}: {reason}")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite numbers: its training diverged, or it is damaged")


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier begin with: of what timm calls so, else of our `classifier` or `head`."""
    found = getattr(model, "classifier", getattr(model, "head", None))
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()  # type: ignore[operator]
    modules = found if isinstance(found, tuple) else (found,)
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is m for m in modules))


def pretrained_report(model: nn.Module) -> dict[str, str | None]:
    """Return which file a timm model, or that in `model.base_model`, got its pretrained weights from.

    {"source": hub id or URL, "sha256": hex, or None where the file is not in the hub's cache}.
    """
    timms: Any = getattr(model, "base_model", model)
    config = timms.pretrained_cfg
    source = config.get("hf_hub_id") or config["url"]
    repository, _, revision = source.partition("@")
    names = (config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin")  # timm's order
    hub = bool(config.get("hf_hub_id"))
    found = [try_to_load_from_cache(repository, name, revision=revision or None) for name in names if name and hub]
    file = next((file for file in found if isinstance(file, str)), None)
    return {"source": source, "sha256": sha256_of(file) if file else None}


@contextmanager
def explain_offline(tag: str, pretrained: bool = True, flag: str = "--weights") -> Iterator[None]:
    """Turn failures to fetch the weights `tag`, while timm builds the model inside, into a UserError.

    A hub that does not answer within HUB_PATIENCE seconds is not asked again: weights in the cache load at once, others
    fail at once. With pretrained=False nothing is asked. Names and tags that timm does not have get a sentence too.
    """
    before, silent = constants.HF_HUB_OFFLINE, False
    try:
        if pretrained and not before:
            get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception as error:
        if not _is_of_network(error):
            raise
        silent = constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        if _is_of_network(error):
            reason = f"{constants.ENDPOINT} does not answer" if silent else str(error).strip().partition("\n")[0]
            raise UserError(
                f"the pretrained weights {tag} are not in {constants.HF_HUB_CACHE} and could not be downloaded "
                f"({reason}): run once with a connection, or give a file with {flag} FILE"
            ) from error
        if isinstance(error, RuntimeError) and str(error).startswith(NOT_IN_TIMM):
            lists = f"timm.list_models() and timm.list_pretrained('{tag.partition('.')[0]}*')"
            raise UserError(f"timm {timm.__version__} has no {tag} ({error}): see {lists}") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_of_network(error: Exception) -> bool:
    return isinstance(error, NETWORK_ERRORS) or type(error).__module__.partition(".")[0] in HUB_PACKAGES
