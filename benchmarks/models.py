"""Cost of a training step and of evaluation, beside a plain ViT-B/16 in the same run.

    python -m benchmarks.models                                every model; about eight minutes on two quiet cores
    python -m benchmarks.models --only FFVT,overlapping --sizes 224,448 --batch-size 4
    python -m benchmarks.models --device cuda --precision bf16 --sizes 448 --batch-size 32 --compile

Each model stands below its floor, which is a plain timm ViT of the same tokens, dropout and optimizer (its own
backbone, run as timm runs it), and above its direct formulation (benchmarks.direct): the published equations with
nothing spared. A floor and the models that stand on it take turns, so that a slower minute of the machine meets all of
them; the fastest turn of each counts, as in timeit: what else the machine does can only add. Only ratios inside one
such group mean anything. A step is forward, backward and optimizer (SGD with momentum).

GB is the median peak of the step: parameters, optimizer state, and what the step takes on top. `peak %` is the share of
the device's matrix product, measured in the same run, that the model's own floating-point operations use; the direct
formulation is held against the model's operations, not against those that it spends.
"""

import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.direct import DIRECT
from common.cli import parse
from common.errors import UserError
from common.train import distributed
from common.train.loop import logits_of
from common.train.precision import Precision
from common.train.record import device_name
from ffvt.model import CONFIGS, FFVT
from gft import GFT, TransFG
from glsim.model_utils.config import ViTConfig
from glsim.model_utils.glsim import ViTGLSim
from glsim.model_utils.timm_glsim import GLSimTimm
from glsim.model_utils.transfg import CONFIGS as TRANSFG_CONFIGS
from glsim.model_utils.transfg import TransFG as OfficialTransFG

BACKBONE = "vit_base_patch16_224"
CROPPING = {"dynamic_anchor": True, "dynamic_top": 8, "reducer": "cls", "aggregator": True, "aggregator_norm": True}


@dataclass
class Recipe:
    sizes: str = ""  # pixels, square; several: 224,448; none: each model as PLAN says
    batch_size: int = 4  # images a step, where sizes are given
    rounds: int = 3  # timed turns of each, where sizes are given; one that is not timed goes ahead
    direct_rounds: int = 2  # timed turns of each direct formulation, where sizes are given
    only: str = ""  # models whose name contains this text, or one of several: FFVT,GLSim
    num_classes: int = 200  # of the classifier


@dataclass
class Options:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"  # arithmetic
    compile: bool = False  # torch.compile the models (not their direct formulations)


@dataclass(frozen=True)
class Rival:
    """A model by name: how to build it and its floor for an image size (pixels) and a number of classes."""

    name: str
    build: Callable[[int, int], nn.Module]
    floor: Callable[[int, int], nn.Module]


def _plain(size: int, classes: int) -> nn.Module:
    return timm.create_model(BACKBONE, num_classes=classes, img_size=size)


def _glsim(size: int, classes: int) -> nn.Module:
    return ViTGLSim(ViTConfig("vit_b16", image_size=size, num_classes=classes, **CROPPING))


def _glsim_floor(size: int, classes: int) -> nn.Module:
    return ViTGLSim(ViTConfig("vit_b16", image_size=size, num_classes=classes))


def _glsim_timm(size: int, classes: int) -> nn.Module:
    return GLSimTimm(f"gls{BACKBONE}", image_size=size, num_classes=classes, **CROPPING)


def _ffvt(size: int, classes: int) -> nn.Module:
    return FFVT(CONFIGS["ViT-B_16"], size, classes)


def _ffvt_floor(size: int, classes: int) -> nn.Module:
    return FFVT(CONFIGS["ViT-B_16"], size, classes, feature_fusion=False).base_model


def _transfg(size: int, classes: int) -> nn.Module:
    return OfficialTransFG(TRANSFG_CONFIGS["ViT-B_16"], size, classes)


def _transfg_floor(size: int, classes: int) -> nn.Module:
    return OfficialTransFG(TRANSFG_CONFIGS["ViT-B_16"], size, classes).base_model


RIVALS = (
    Rival("GFT described", lambda size, classes: GFT(BACKBONE, classes, size), _plain),
    Rival("GFT released", lambda size, classes: GFT(BACKBONE, classes, size, released=True), _plain),
    Rival("TransFG (GFT repository)", lambda size, classes: TransFG(BACKBONE, classes, size), _plain),
    Rival("FFVT", _ffvt, _ffvt_floor),
    Rival("GLSim", _glsim, _glsim_floor),
    Rival("GLSimTimm", _glsim_timm, _plain),
    Rival("TransFG, overlapping", _transfg, _transfg_floor),
)


# What is measured unless sizes are given: pixels, images a step, timed turns of models and of direct formulations.
PLAN = (
    (224, 8, (2, 1), ("GFT described", "GFT released")),
    (224, 4, (3, 1), ("GLSim",)),
    (224, 2, (1, 1), ("TransFG (GFT repository)", "GLSimTimm")),
    (224, 4, (3, 1), ("FFVT",)),
    (448, 4, (2, 1), ("FFVT",)),
    (448, 1, (3, 0), ("GLSim",)),
    (448, 1, (2, 1), ("TransFG, overlapping",)),
)


class Memory:
    """The peak of a piece of work in bytes beyond what stood before: the CUDA allocator's, else that of the process.

    On Linux alone: the kernel's mark of the process's peak is set back before the work. Elsewhere it is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.linux = sys.platform == "linux"

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.linux:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work freed goes back to the system first
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before = self._status("VmRSS")

    def rise(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self._status("VmHWM") - self.before if self.linux else None

    @staticmethod
    def _status(name: str) -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        found = re.search(rf"{name}:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) * 1024


class Contender:
    """One model, or the direct formulation of one, with its optimizer; one turn at a time."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Any], setting: "Setting") -> None:
        self.model, self.forward, self.setting = model, forward, setting
        self.optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)
        self.seconds: dict[str, list[float]] = {"train": [], "eval": []}
        self.rises: dict[str, list[int]] = {"train": [], "eval": []}

    def turn(self, timed: bool) -> None:
        count = self.setting.batch_size if timed else self.setting.warm_up
        for kind, work in (("train", self._train), ("eval", self._evaluate)):
            self.setting.memory.start()
            seconds = self._timed(partial(work, count))
            rise = self.setting.memory.rise()
            if timed:
                self.seconds[kind].append(seconds)
                if rise is not None:
                    self.rises[kind].append(rise)
        self.optimizer.zero_grad(set_to_none=True)

    def _timed(self, work: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()

    def _train(self, count: int) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.setting.precision.autocast():
            logits = logits_of(self.forward(self.setting.images[:count]))
            loss = F.cross_entropy(logits.float(), self.setting.labels[:count])
        self.setting.precision.backward(loss, self.optimizer)
        self.setting.precision.step(self.optimizer, self.model.parameters(), clip_grad=None)

    @torch.inference_mode()
    def _evaluate(self, count: int) -> None:
        self.model.eval()
        with self.setting.precision.autocast():
            self.forward(self.setting.images[:count])

    def resident(self) -> int:
        """Bytes of parameters, buffers and optimizer state."""
        state: list[Any] = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *(v for v in state if isinstance(v, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def figures(self, operations: dict[str, int], peak: float) -> dict[str, dict[str, float | None]]:
        """For train and eval: seconds, images/s, bytes at the peak, and the share of the device's peak."""
        found: dict[str, dict[str, float | None]] = {}
        for kind in ("train", "eval"):
            seconds = min(self.seconds[kind])
            rises = self.rises[kind]
            found[kind] = {
                "seconds": seconds,
                "images_per_s": self.setting.batch_size / seconds,
                "bytes": self.resident() + statistics.median(rises) if rises else None,
                "peak_share": operations[kind] / seconds / peak,
            }
        return found


class Setting:
    """What all contenders of one image size and batch size share."""

    def __init__(self, size: int, batch_size: int, classes: int, device: torch.device, precision: Precision) -> None:
        self.size, self.batch_size, self.classes = size, batch_size, classes
        self.device, self.precision, self.memory = device, precision, Memory(device)
        self.images = torch.randn(batch_size, 3, size, size, device=device)
        self.labels = torch.randint(classes, (batch_size,), device=device)
        # A CPU needs no more to begin; a GPU makes room for a batch, and torch.compile takes 1 image for another case.
        self.warm_up = 1 if device.type == "cpu" else batch_size


def operations_of(model: nn.Module, setting: Setting) -> dict[str, int]:
    """Floating-point operations of matrix products: a step (forward and backward) and an evaluation of the batch.

    They are counted with one image: all of a batch take as many.
    """
    counted = {}
    for kind, count in (("train", True), ("eval", False)):
        model.train(count)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(count):
            loss = F.cross_entropy(logits_of(model(setting.images[:1])).float(), setting.labels[:1])
            if count:
                loss.backward()
        counted[kind] = counter.get_total_flops() * setting.batch_size
    model.zero_grad(set_to_none=True)
    return counted


def matmul_peak(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product: the best of several."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def measure(
    rivals: Sequence[Rival], setting: Setting, rounds: tuple[int, int], compiled: bool, peak: float
) -> dict[str, Any]:
    """Figures of the floor that all `rivals` share, of each of them, and of their direct formulations.

    `rounds` are the timed turns of models and of direct formulations.
    """

    def contender(build: Callable[[int, int], nn.Module]) -> tuple[Contender, dict[str, int]]:
        model = build(setting.size, setting.classes).to(setting.device)
        counted = operations_of(model, setting)
        return Contender(model, torch.compile(model) if compiled else model, setting), counted

    floor, base = contender(rivals[0].floor)
    ours = [contender(rival.build) for rival in rivals]
    direct = [_direct(one, setting) if rounds[1] else None for one, _ in ours]
    for number in range(rounds[0] + 1):
        for one in (floor, *(one for one, _ in ours)):
            one.turn(timed=number > 0)
        for formulation in filter(None, direct if 0 < number <= rounds[1] else ()):
            formulation.turn(timed=True)
    models = [
        {
            "name": rival.name,
            "ours": one.figures(counted, peak),
            "direct": formulation and formulation.figures(counted, peak),
        }
        for rival, (one, counted), formulation in zip(rivals, ours, direct, strict=True)
    ]
    return {
        "size": setting.size,
        "batch_size": setting.batch_size,
        "floor": floor.figures(base, peak),
        "models": models,
    }


def _direct(one: Contender, setting: Setting) -> Contender | None:
    formulation = DIRECT.get(type(one.model))
    if formulation is None:
        return None
    direct = Contender(one.model, partial(formulation, one.model), setting)
    direct.optimizer = one.optimizer  # of the same parameters
    return direct


def show(group: dict[str, Any]) -> str:
    """Rows of the table: the floor, and with their ratios to it each model and its direct formulation."""
    rows = [_row("plain ViT", group["floor"], group["floor"])]
    for model in group["models"]:
        rows.append(_row(f"  {model['name']}", model["ours"], group["floor"]))
        if model["direct"] is not None:
            rows.append(_row("    direct formulation", model["direct"], group["floor"]))
    return "\n".join(rows)


def _row(title: str, figures: dict[str, Any], floor: dict[str, Any]) -> str:
    cells = f"{title:28}"
    for kind in ("train", "eval"):
        found, base = figures[kind], floor[kind]
        cells += f"{found['seconds']:9.3f}{found['seconds'] / base['seconds']:7.2f}{found['images_per_s']:8.1f}"
        if found["bytes"] is None:
            cells += f"{'-':>7}{'-':>7}"
        else:
            cells += f"{found['bytes'] / 2**30:7.2f}{found['bytes'] / base['bytes']:7.2f}"
        cells += f"{found['peak_share']:7.0%}"
    return cells


def main() -> None:
    recipe, options, _ = parse(Recipe, Options, __doc__ or "")
    sizes = [int(size) for size in recipe.sizes.split(",") if size]
    words = recipe.only.split(",")
    every = tuple(rival.name for rival in RIVALS)
    rounds = recipe.rounds, recipe.direct_rounds
    plan = [(size, recipe.batch_size, rounds, every) for size in sizes] or PLAN
    parts = [
        (*how, [rival for rival in RIVALS if rival.name in names and any(word in rival.name for word in words)])
        for *how, names in plan
    ]
    if not any(rivals for *_, rivals in parts):
        raise SystemExit(f"--only {recipe.only}: expected a part of {', '.join(every)}")
    try:
        device = distributed.choose_device(options.device, distributed.Launch())
    except UserError as error:
        raise SystemExit(str(error)) from error
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    precision = Precision("fp32" if options.precision == "tf32" else options.precision, device)
    peak = matmul_peak(device, options.precision)
    how = "compiled" if options.compile else "eager"
    print(f"{device_name(device)}, {options.precision}, {how}, matrix product {peak / 1e9:,.0f} GFLOP/s")
    for size, batch_size, turns, rivals in parts:
        setting = Setting(size, batch_size, recipe.num_classes, device, precision)
        head = f"{'train s':>9}{'ratio':>7}{'img/s':>8}{'GB':>7}{'ratio':>7}{'peak %':>7}"
        for floor in dict.fromkeys(rival.floor for rival in rivals):
            standing = [rival for rival in rivals if rival.floor == floor]
            print(f"\n{f'{size} px, batch {batch_size}':28}{head}{head.replace('train', ' eval')}", flush=True)
            print(show(measure(standing, setting, turns, options.compile, peak)), flush=True)


if __name__ == "__main__":
    main()
