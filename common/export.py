"""--export: a trained model as a file that needs nothing of this repository: ONNX (.onnx) or torch.export (.pt2).

The file takes images (B, 3, height, width), float32, of any number B, and gives their logits (B, C). What the model
does between them is inside, GLSim's crop too. `{file}.json` beside it says how a picture becomes an image and what the
classes are called.
"""

import importlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from common.errors import UserError
from common.train.log import say
from common.train.loop import logits_of
from common.train.record import versions
from common.train.run_folder import Run

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # that a .onnx needs
TOLERANCE = 1e-4  # the most that a logit of the file may differ from the model's
TRACED, TRIED = 2, (1, 3)  # images at a time in the trace, and where the file is tried
SIDE = 1000  # pixels of a picture that the transform makes an image of, to see how large that is


class Logits(nn.Module):
    """The model, its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def export(run: Run, model: nn.Module, classes: list[str], transform: Any, preprocessing: list[dict[str, Any]]) -> None:
    """Writes the file that --export names, and `{file}.json`; the model is on the CPU.

    UserError where a package is missing, the folder cannot be written, or a logit of the file differs by more than
    TOLERANCE from the model's. Then the files that stood there before are unchanged.
    """
    path = Path(run.options.export)
    missing = [name for name in PACKAGES if path.suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--export {path} needs {', '.join(missing)}: `pip install {' '.join(PACKAGES)}`, or export to .pt2"
        )
    shape = list(transform(Image.new("RGB", (SIDE, SIDE))).shape)  # [3, height, width]
    module = Logits(model).eval()
    with torch.no_grad():
        batch = {0: Dim("batch", min=1)}
        program = torch.export.export(module, (torch.zeros(TRACED, *shape),), dynamic_shapes=(batch,), strict=False)
    about: dict[str, Any] = {
        "file": path.name,
        "input": {"name": "images", "type": "float32", "shape": ["batch", *shape]},
        "output": {"name": "logits", "type": "float32", "shape": ["batch", len(classes)]},
        "classes": classes,
        "preprocessing": preprocessing,
        "weights": run.weights,
        "versions": versions(),
    }
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
            file = Path(folder) / path.name
            about["largest_difference"] = write_program(program, file, module, shape)
            if not about["largest_difference"] <= TOLERANCE:  # NaN neither
                raise UserError(
                    f"--export {path}: not kept, because its logits differ from the model's by "
                    f"{about['largest_difference']:.1e}, and {TOLERANCE:g} is allowed"
                )
            file.with_name(f"{path.name}.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            for written in Path(folder).iterdir():  # of 2 GB and more ONNX keeps the weights in a file of their own
                os.replace(written, path.with_name(written.name))
    except OSError as error:
        raise UserError(
            f"--export {path} could not be written ({error.strerror}): make room, or choose another place"
        ) from error
    say(
        f"{path}: any number of images {' x '.join(map(str, shape))}; how they are prepared, and the classes: "
        f"{path.name}.json"
    )
    say(f"largest difference of a logit from the model's: {about['largest_difference']:.1e}")


def write_program(program: Any, file: Path, module: nn.Module, shape: list[int]) -> float:
    """Writes the file, and returns the largest difference of its logits from the module's on random images."""
    images = torch.randn(max(TRIED), *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = [module(images[:count]) for count in TRIED]
    if file.suffix == ".onnx":
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        converted = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False, **names)
        assert converted is not None
        converted.save(str(file))  # one file, unless it has 2 GB
        session = importlib.import_module("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(session.run(["logits"], {"images": images[:count].numpy()})[0]) for count in TRIED]
    else:
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
        with torch.inference_mode():
            found = [loaded(images[:count]) for count in TRIED]
    return (torch.cat(found) - torch.cat(expected)).abs().max().item()
