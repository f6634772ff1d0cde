"""From a finished run to predictions on any image: `model.json` beside `best.safetensors` says all that is needed.

    python -m common.predict --run runs/gft_food101/<run> --images photo.jpg folder/ --top 5 --out predictions.csv

The scripts' `--predict` is the same. C classes.
"""

import dataclasses
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from common import dist
from common.amp import Precision
from common.building import built_for
from common.data.images import Images
from common.data.loader import evaluation_batches, workers_explained
from common.engine import Loading, logits_of, ranking
from common.errors import UserError, brief
from common.files import write_csv, write_text
from common.placement import memory_format, place
from common.reading import read_json
from common.recipe import parse
from common.weights import file_of, load_checkpoint

# What model.json says.
MODEL_INFO: dict[str, tuple[type, ...]] = {
    "script": (str,),
    "side": (str,),
    "demo": (bool,),
    "seed": (int,),
    "overrides": (dict,),
    "options": (dict,),
    "recipe": (dict,),
    "data": (dict,),
    "weights": (dict,),
    "architecture": (dict,),
    "classes": (list,),
    "preprocessing": (list,),
}
MOST_PIXELS = 1 << 13  # a side of what the model sees
# Our own models that model.json may name, by module.
MODELS = {
    "common.models": ("GFT", "TransFG"),
    "ffvt.model": ("FFVT",),
    "glsim.model_utils.glsim": ("ViTGLSim",),
    "glsim.model_utils.timm_glsim": ("GLSimTimm",),
    "glsim.model_utils.transfg": ("TransFG",),
    "glsim.model_utils.cal": ("CAL",),
    "glsim.model_utils.resnet": ("ResNet",),
}
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def describe_transform(transform: T.Compose) -> list[dict[str, Any]]:
    """The evaluation transform as JSON, for `restore_transform`."""
    steps: list[dict[str, Any]] = []
    for step in transform.transforms:
        if isinstance(step, T.Resize):
            size = step.size if isinstance(step.size, int) else list(step.size)
            steps.append({"name": "Resize", "size": size, "interpolation": step.interpolation.value})
        elif isinstance(step, T.CenterCrop):
            steps.append({"name": "CenterCrop", "size": list(step.size)})
        elif isinstance(step, T.ToTensor):
            steps.append({"name": "ToTensor"})
        elif isinstance(step, T.Normalize):
            steps.append({"name": "Normalize", "mean": list(step.mean), "std": list(step.std)})
        else:
            raise TypeError(
                f"describe_transform does not know {type(step).__name__}: add it there and in restore_transform"
            )
    return steps


def restore_transform(steps: list[dict[str, Any]]) -> T.Compose:
    """The transform that `describe_transform` described."""
    known = {kind.__name__: kind for kind in (T.Resize, T.CenterCrop, T.ToTensor, T.Normalize)}
    restored = []
    for step in steps:
        arguments = {name: value for name, value in step.items() if name != "name"}
        if "interpolation" in arguments:
            arguments["interpolation"] = InterpolationMode(arguments["interpolation"])
        for side in ("height", "width") if "size" in arguments else ():
            _check_side(arguments["size"], side)
        restored.append(known[step["name"]](**arguments))
    return T.Compose(restored)


def _check_side(size: Any, name: str) -> None:
    side = size[name == "width"] if isinstance(size, list) and len(size) == 2 else size
    if type(side) is not int or not 0 < side <= MOST_PIXELS:
        raise ValueError(f"a {name} of {brief(side)} pixels")


def describe_model(model: nn.Module, num_classes: int, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The class and arguments that build `model` again: one of MODELS, which keeps its own, or a timm model."""
    library = next((name for name in MODELS if type(model).__module__.startswith(name)), None)
    if library is not None:
        config: Any = model.config
        arguments = dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)
        return {"library": library, "name": type(model).__name__, "arguments": arguments}
    origin: Any = model.pretrained_cfg
    name = ".".join(part for part in (origin["architecture"], origin.get("tag")) if part)
    arguments = {"num_classes": num_classes, **model_kwargs}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        arguments["img_size"] = list(size)
    return {"library": "timm", "name": name, "arguments": arguments}


def rebuild(description: dict[str, Any]) -> nn.Module:
    """The model of `describe_model`, with fresh weights; nothing is downloaded."""
    name, arguments = description["name"], description["arguments"]
    if description["library"] == "timm":
        if not timm.is_model(name):  # nor a "hf-hub:..." that timm would fetch
            raise ValueError(f"timm has no model {name!r}")
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
        return model
    library = description["library"]
    if name not in MODELS.get(library, ()):
        raise ValueError(f"{library}.{name} is no model of this repository")
    if arguments.get("pretrained") or not timm.is_model(arguments.get("backbone", "vit_base_patch16_224")):
        raise ValueError("its weights would have to be downloaded")
    kind: Any = getattr(importlib.import_module(library), name)
    built: nn.Module = getattr(kind, "from_arguments", kind)(**arguments)
    return built


def read_model_info(run_folder: Path) -> dict[str, Any]:
    """`model.json` of a run; UserError where there is none."""
    path = run_folder / "model.json"
    try:
        info: dict[str, Any] = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} does not exist: expected the folder of a run, runs/<program>/<time>-<id>") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable model description ({error})") from error
    missing = [name for name in MODEL_INFO if not isinstance(info, dict) or name not in info]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was not written by this repository")
    for name, types in MODEL_INFO.items():
        if type(info[name]) not in types:
            raise UserError(f"{path} has {brief(info[name])} as {name}: it was not written by this repository")
    _check_parts(path, info)
    return info


def _check_parts(path: Path, info: dict[str, Any]) -> None:
    """UserError where a part of model.json does not say what the programs read in it."""
    architecture, data = info["architecture"], info["data"]
    fingerprints = [part for part in data.values() if isinstance(part, dict)]
    try:
        restore_transform(info["preprocessing"])
        faults = {
            "architecture": [type(architecture.get(name)) for name in ("library", "name", "arguments")]
            != [str, str, dict],
            "classes": not info["classes"] or not all(type(name) is str for name in info["classes"]),
            "data": set(data) != {"train", "val", "test"}
            or [type(part.get(name)) for part in fingerprints for name in ("count", "classes")] != [int] * 6,
            "weights": type(info["weights"].get("source")) is not str,
        }
    except Exception as error:  # torchvision raises nearly anything for arguments that are none
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} describes no preprocessing that can be done here ({reason})") from error
    for name in (name for name, fault in faults.items() if fault):
        raise UserError(f"{path} has {brief(info[name])} as {name}: it was not written by this repository")


@dataclass
class Predictor:
    """A model ready to name what is on a picture."""

    model: nn.Module
    transform: T.Compose
    classes: list[str]
    device: torch.device
    precision: Precision
    loading: Loading

    @torch.inference_mode()
    def __call__(self, paths: list[Path], top: int) -> list[list[tuple[int, float]]]:
        """For each image the `top` best (class, probability), best first."""
        images = Images("predict", "input", list(map(str, paths)), paths, [0] * len(paths), ["?"], self.transform)
        size = self.loading.eval_batch_size
        workers = self.loading.workers if len(paths) > size else 0  # a worker brings whole batches
        pinned = self.device.type == "cuda" and self.loading.pin_memory
        self.model.eval()
        layout = memory_format(self.model, self.device)
        parts = []  # stay on the device, which would have to be waited for
        for batch in evaluation_batches(images, size, 0, 1, workers, pinned):
            for _, why in batch.unreadable:
                raise UserError(why)
            assert batch.images is not None
            with self.precision.autocast():
                inputs = batch.images.to(self.device, non_blocking=True, memory_format=layout)
                logits = logits_of(self.model(inputs)).float()  # (B, C)
            best = ranking(logits, top)
            parts.append((best, logits.softmax(-1).gather(-1, best), logits.isfinite().all(-1)))
        best, values, finite = (torch.cat(part) for part in zip(*parts, strict=True))
        for path, known in zip(paths, finite.tolist(), strict=True):
            if not known:
                kind = self.precision.precision
                overflow = "" if kind == "fp32" else f", or {kind} overflows: use --precision fp32"
                raise UserError(f"{path}: the model's output is not finite: its training has diverged{overflow}")
        both = zip(best.tolist(), values.tolist(), strict=True)
        return [list(zip(classes, probabilities, strict=True)) for classes, probabilities in both]


def load_run(folder: Path, device: torch.device, precision: str = "fp32", loading: Loading | None = None) -> Predictor:
    """The best model of a run. UserError where a file is missing or damaged, or does not belong to the other."""
    info = read_model_info(folder)
    with built_for(file_of(folder), folder / "model.json"):
        model, transform = rebuild(info["architecture"]), restore_transform(info["preprocessing"])
        num_classes = info["architecture"]["arguments"]["num_classes"]
    if num_classes != len(info["classes"]):
        raise UserError(
            f"{folder / 'model.json'} names {len(info['classes'])} classes for a model of {brief(num_classes)}"
        )
    load_checkpoint(model, folder)
    arithmetic = Precision(precision, device)
    return Predictor(place(model, device), transform, info["classes"], device, arithmetic, loading or Loading())


def find_images(paths: Iterable[str]) -> list[Path]:
    """The image files among `paths`, and those in folders. UserError for a path that is not there or holds none."""
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise UserError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist: --predict takes image files and folders")
    return list(dict.fromkeys(found))


def write_predictions(
    paths: list[Path], ranked: list[list[tuple[int, float]]], classes: list[str], out: str | None
) -> None:
    """Prints the predictions, and writes them to `out` (.csv: a row a guess; .json: an object a guess)."""
    for path, guesses in zip(paths, ranked, strict=True):
        print(f"{path}: " + ", ".join(f"{classes[number]} {probability:.1%}" for number, probability in guesses))
    if out is None:
        return
    heading = ("path", "rank", "class", "name", "probability")
    rows = [
        (str(path), rank, number, classes[number], probability)
        for path, guesses in zip(paths, ranked, strict=True)
        for rank, (number, probability) in enumerate(guesses, 1)
    ]
    if Path(out).suffix == ".json":
        write_text(Path(out), json.dumps([dict(zip(heading, row, strict=True)) for row in rows], indent=1))
    else:
        write_csv(Path(out), [heading, *rows])


def check_out(out: str | None) -> None:
    """Refuses an `--out` that could not be written, before any work is done."""
    if out is None:
        return
    if Path(out).suffix not in (".csv", ".json"):
        raise UserError(f"--out {out}: expected a name that ends in .csv or .json")
    if not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {Path(out).absolute().parent} does not exist")


@dataclass
class _Request:
    run: str = ""  # folder of a finished run
    images: list[str] = dataclasses.field(default_factory=list)  # image files and folders
    top: int = 5  # guesses an image
    out: str | None = None  # also write a .csv or .json file


@dataclass
class _Options:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of the model
    workers: int = 0  # processes that read images
    eval_batch_size: int = 32  # images at a time


def main() -> None:
    """`python -m common.predict --run DIR --images PATH...`"""
    request, options, *_ = parse(_Request, _Options, (__doc__ or "").splitlines()[0])
    try:
        if not request.run or not request.images or request.top < 1:
            raise UserError("give the folder of a run with --run, images with --images, and --top 1 or more")
        if options.workers < 0 or options.eval_batch_size < 1:
            raise UserError("--workers takes 0 or more, --eval-batch-size 1 or more")
        check_out(request.out)
        paths = find_images(request.images)
        device = dist.choose_device(options.device, dist.Launch())
        loading = Loading(options.workers, options.eval_batch_size)
        predictor = load_run(Path(request.run), device, options.precision, loading)
        with workers_explained("--workers"):
            ranked = predictor(paths, request.top)
        write_predictions(paths, ranked, predictor.classes, request.out)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
