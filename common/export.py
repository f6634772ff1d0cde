"""From a trained model to a file that needs nothing of this repository: ONNX (.onnx) or torch.export (.pt2).

    python gft_food101.py --export gft.onnx                                     the best of the newest run
    python gft_food101.py --export gft.pt2 --checkpoint runs/gft_food101/<run>

The file takes images (B, 3, height, width), float32, of any number B, and gives their logits (B, C). What the model
does between them is inside, GLSim's crop too. `{file}.json` beside it says how a picture becomes an image and what the
classes are called; the file says these two itself as well: ONNX in metadata_props, torch.export in extra_files.
"""

import importlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision import transforms as T

from common.engine import logits_of
from common.errors import UserError
from common.log import say
from common.predict import describe_transform
from common.provenance import versions

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # that a .onnx needs
TOLERANCE = 1e-4  # the most that a logit of the file may differ from the model's
TRACED, TRIED = 2, (1, 3)  # images at a time in the trace, and where the file is tried
SIDE = 1000  # pixels of a picture that the transform makes an image of, to see how large that is

Function = Callable[[Tensor], Tensor]  # images -> logits


def check_export(name: str | None, chosen: Mapping[str, Any]) -> None:
    """Refuses an `--export` that could not be made, before any work is done; `chosen` are the options given."""
    if name is None:
        return
    for option, taken in (("device", ("auto", "cpu")), ("precision", ("fp32",))):
        if chosen.get(option, taken[0]) not in taken:
            raise UserError(f"--export works on the CPU in fp32, wherever the file is used then: leave --{option} out")
    path = Path(name)
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--export {name}: expected a name that ends in .onnx (ONNX) or .pt2 (torch.export)")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--export {name}: the folder {path.absolute().parent} does not exist")
    if path.is_dir():
        raise UserError(f"--export {name} is a folder: expected the name of a file")
    for package in PACKAGES if path.suffix == ".onnx" else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--export {name}: {package} cannot be imported ({error}): `pip install {' '.join(PACKAGES)}`, or "
                "export to .pt2, which needs none of them"
            ) from error


def export(model: nn.Module, transform: T.Compose, classes: list[str], weights: dict[str, Any], path: Path) -> None:
    """Writes `path` and `{path}.json`; the model is on the CPU, `weights` says where its parameters are from.

    UserError where the model cannot be exported, and where a logit of the file differs by more than TOLERANCE from the
    model's, for images drawn from a seed. Then, as on a full disk, the files that stood there before are unchanged.
    """
    described = {"classes": classes, "preprocessing": describe_transform(transform)}
    shape = list(transform(Image.new("RGB", (SIDE, SIDE))).shape)  # [3, height, width]
    tried = torch.randn(max(TRIED), *shape, generator=torch.Generator().manual_seed(0))
    module = _Logits(model).eval()
    with torch.inference_mode():
        expected = torch.cat([module(tried[:count]) for count in TRIED])
    make = _onnx if path.suffix == ".onnx" else _pt2
    with _moved_to(path) as file:
        run = make(_traced(module, shape), file, {name: json.dumps(value) for name, value in described.items()})
        with torch.inference_mode(), _explained("ONNX" if make is _onnx else "torch.export"):
            found = torch.cat([run(tried[:count]) for count in TRIED])
        difference = (found - expected).abs().max().item()
        if not difference <= TOLERANCE:  # NaN neither
            raise UserError(
                f"--export {path}: the file was not kept, because its logits differ from the model's by "
                f"{difference:.1e}, and {TOLERANCE:g} is allowed: a model that draws at random, or whose output is not "
                "finite, cannot be exported"
            )
        about: dict[str, Any] = {
            "file": path.name,
            "input": {"name": "images", "type": "float32", "shape": ["batch", *shape]},
            "output": {"name": "logits", "type": "float32", "shape": ["batch", len(classes)]},
            **described,
            "weights": weights,
            "largest_difference": difference,
            "versions": _versions(path),
        }
        file.with_name(f"{path.name}.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    size = " x ".join(map(str, shape))
    say(f"{path}: any number of images {size}; how they are prepared, and the classes: {path.name}.json")
    say(f"largest difference of a logit from the model's: {difference:.1e}")


@contextmanager
def _moved_to(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own, from which all files go to the folder of `path` at the end."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
            yield Path(folder) / path.name
            for file in sorted(Path(folder).iterdir()):  # of 2 GB and more the weights are a file of their own
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise UserError(
            f"--export {path} could not be written ({error.strerror or error}): make room, or choose another place"
        ) from error


class _Logits(nn.Module):
    """The model, its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def _traced(module: _Logits, shape: list[int]) -> ExportedProgram:
    batch = {0: Dim("batch", min=1)}
    with torch.no_grad(), _explained("torch.export"):
        return torch.export.export(module, (torch.zeros(TRACED, *shape),), dynamic_shapes=(batch,), strict=False)


def _onnx(program: ExportedProgram, file: Path, described: dict[str, str]) -> Function:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with _explained("ONNX"):
        converted = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False, **names)
        assert converted is not None
        converted.model.metadata_props.update(described)
        converted.save(file)
        session = importlib.import_module("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _pt2(program: ExportedProgram, file: Path, described: dict[str, str]) -> Function:
    buffer = io.BytesIO()  # given a file, torch makes an error of its own of a disk that is full
    with _explained("torch.export"):
        torch.export.save(program, buffer, extra_files={f"{name}.json": text for name, text in described.items()})
        file.write_bytes(buffer.getbuffer())
        return torch.export.load(file).module()


@contextmanager
def _explained(form: str) -> Iterator[None]:
    """What goes wrong in the block is the exporter's: the model has been run, and of the disk `_moved_to` speaks."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--export: torch {torch.__version__} cannot bring this model into the form of {form} ({reason}): try "
            "another version of torch, or use --predict instead"
        ) from error


def _versions(path: Path) -> dict[str, str]:
    packages = PACKAGES if path.suffix == ".onnx" else ()  # onnxruntime may have been installed as onnxruntime-gpu
    return versions() | {package: importlib.import_module(package).__version__ for package in packages}
