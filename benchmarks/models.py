"""Cost of a training step and of evaluation, beside a plain ViT-B/16 in the same run.

    python -m benchmarks.models                                     CPU, fp32, 224 px
    python -m benchmarks.models --only FFVT --sizes 224,448         one model, two image sizes
    python -m benchmarks.models --device cuda --precision bf16 --batch-size 32 --compile --json out.json

Each model stands beside its floor, which is a plain timm ViT of the same tokens, dropout and optimizer (its own
backbone, run as timm runs it), and beside its direct formulation (benchmarks.direct): the published equations with
nothing spared. All of a size take turns, so that a slower minute of the machine meets all of them; the median of the
turns counts. Only ratios inside one run mean anything. A step is forward, backward and optimizer (SGD with momentum).

GB is the peak of the step: parameters, optimizer state, and what the step takes on top. `peak %` is the share of the
device's matrix product, measured in the same run, that the model's own floating-point operations use; the direct
formulation is held against the model's operations, not against those that it spends.
"""

import ctypes
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.direct import DIRECT
from common import dist
from common.amp import Precision
from common.engine import logits_of
from common.errors import UserError
from common.files import write_text
from common.models import GFT, TransFG
from common.provenance import device_name, versions
from common.recipe import parse
from ffvt.model import CONFIGS, FFVT
from glsim.model_utils.config import ViTConfig
from glsim.model_utils.glsim import ViTGLSim
from glsim.model_utils.timm_glsim import GLSimTimm
from glsim.model_utils.transfg import CONFIGS as TRANSFG_CONFIGS
from glsim.model_utils.transfg import TransFG as OfficialTransFG

BACKBONE = "vit_base_patch16_224"
CROPPING = {"dynamic_anchor": True, "dynamic_top": 8, "reducer": "cls", "aggregator": True, "aggregator_norm": True}


@dataclass
class Recipe:
    sizes: str = "224"  # pixels, square; several: 224,448
    batch_size: int = 4  # images a step
    num_classes: int = 200  # of the classifier
    rounds: int = 3  # timed turns of each, after one that is not
    only: str = ""  # models whose name contains this text
    direct: bool = True  # measure the direct formulations too


@dataclass
class Options:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"  # arithmetic
    compile: bool = False  # torch.compile the models (not their direct formulations)
    json: str | None = None  # also write the figures to this file


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


def _transfg(size: int, classes: int) -> nn.Module:
    return OfficialTransFG(TRANSFG_CONFIGS["ViT-B_16"], size, classes)


RIVALS = (
    Rival("GFT described", lambda size, classes: GFT(BACKBONE, classes, size), _plain),
    Rival("GFT released", lambda size, classes: GFT(BACKBONE, classes, size, released=True), _plain),
    Rival("TransFG (GFT repository)", lambda size, classes: TransFG(BACKBONE, classes, size), _plain),
    Rival(
        "FFVT",
        lambda size, classes: FFVT(CONFIGS["ViT-B_16"], size, classes),
        lambda size, classes: FFVT(CONFIGS["ViT-B_16"], size, classes, feature_fusion=False).base_model,
    ),
    Rival("GLSim", _glsim, _glsim_floor),
    Rival("GLSimTimm", _glsim_timm, _plain),
    Rival("TransFG, overlapping", _transfg, lambda size, classes: _transfg(size, classes).base_model),
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
        for kind, work in (("train", self._train), ("eval", self._evaluate)):
            self.setting.memory.start()
            seconds = self._timed(work)
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

    def _train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.setting.precision.autocast():
            logits = logits_of(self.forward(self.setting.images))
            loss = F.cross_entropy(logits.float(), self.setting.labels)
        self.setting.precision.backward(loss, self.optimizer)
        self.setting.precision.step(self.optimizer, self.model.parameters(), clip_grad=None)

    @torch.inference_mode()
    def _evaluate(self) -> None:
        self.model.eval()
        with self.setting.precision.autocast():
            self.forward(self.setting.images)

    def resident(self) -> int:
        """Bytes of parameters, buffers and optimizer state."""
        state: list[Any] = [value for entry in self.optimizer.state.values() for value in entry.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *(v for v in state if isinstance(v, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def figures(self, operations: dict[str, int], peak: float) -> dict[str, dict[str, float | None]]:
        """For train and eval: seconds, images/s, bytes at the peak, and the share of the device's peak."""
        found: dict[str, dict[str, float | None]] = {}
        for kind in ("train", "eval"):
            seconds = statistics.median(self.seconds[kind])
            rises = self.rises[kind]
            found[kind] = {
                "seconds": seconds,
                "images_per_s": self.setting.batch_size / seconds,
                "bytes": self.resident() + statistics.median(rises) if rises else None,
                "peak_share": operations[kind] / seconds / peak,
            }
        return found


class Setting:
    """What all contenders of one image size share."""

    def __init__(self, size: int, recipe: Recipe, device: torch.device, precision: Precision) -> None:
        self.size, self.batch_size, self.classes = size, recipe.batch_size, recipe.num_classes
        self.device, self.precision, self.memory = device, precision, Memory(device)
        self.images = torch.randn(self.batch_size, 3, size, size, device=device)
        self.labels = torch.randint(self.classes, (self.batch_size,), device=device)


def operations_of(model: nn.Module, setting: Setting) -> dict[str, int]:
    """Floating-point operations of matrix products: a step (forward and backward) and an evaluation of the batch."""
    counted = {}
    for kind, count in (("train", True), ("eval", False)):
        model.train(count)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(count):
            loss = F.cross_entropy(logits_of(model(setting.images)).float(), setting.labels)
            if count:
                loss.backward()
        counted[kind] = counter.get_total_flops()
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


def measure(rivals: list[Rival], setting: Setting, recipe: Recipe, compiled: bool, peak: float) -> list[dict[str, Any]]:
    """One line a model: its figures, those of its floor and of its direct formulation, and what they cost of it."""
    floors: dict[Any, tuple[Contender, dict[str, int]]] = {}
    lines: list[tuple[str, Contender, dict[str, int], Contender, dict[str, int], Contender | None]] = []
    for one in rivals:
        if one.floor not in floors:
            model = one.floor(setting.size, setting.classes).to(setting.device)
            counted = operations_of(model, setting)
            floors[one.floor] = Contender(model, _callable(model, compiled), setting), counted
        model = one.build(setting.size, setting.classes).to(setting.device)
        counted = operations_of(model, setting)
        ours, direct = Contender(model, _callable(model, compiled), setting), None
        formulation = DIRECT.get(type(model))
        if formulation is not None and recipe.direct:
            direct = Contender(model, lambda images, f=formulation, m=model: f(m, images), setting)
            direct.optimizer = ours.optimizer  # of the same parameters
        lines.append((one.name, ours, counted, *floors[one.floor], direct))
    contenders = [floor for floor, _ in floors.values()]
    contenders += [one for _, ours, _, _, _, direct in lines for one in (ours, direct) if one is not None]
    for number in range(recipe.rounds + 1):
        for contender in contenders:
            contender.turn(timed=number > 0)
    return [
        {
            "name": name,
            "size": setting.size,
            "batch_size": setting.batch_size,
            "ours": ours.figures(counted, peak),
            "floor": floor.figures(base, peak),
            "direct": direct and direct.figures(counted, peak),
        }
        for name, ours, counted, floor, base, direct in lines
    ]


def _callable(model: nn.Module, compiled: bool) -> Callable[[Tensor], Any]:
    return torch.compile(model) if compiled else model


def show(line: dict[str, Any]) -> str:
    """Three rows of the table: the floor, the model, its direct formulation, each with its ratios to the floor."""
    rows = []
    for who, title in (("floor", "  plain ViT"), ("ours", line["name"]), ("direct", "  direct formulation")):
        if line[who] is None:
            continue
        cells = ""
        for kind in ("train", "eval"):
            found, base = line[who][kind], line["floor"][kind]
            ratio = found["seconds"] / base["seconds"]
            cells += f"{found['seconds']:9.3f}{ratio:7.2f}{found['images_per_s']:8.1f}"
            if found["bytes"] is None:
                cells += f"{'-':>7}{'-':>7}"
            else:
                cells += f"{found['bytes'] / 2**30:7.2f}{found['bytes'] / base['bytes']:7.2f}"
            cells += f"{found['peak_share']:7.0%}"
        rows.append(f"{title:26}{cells}")
    return "\n".join(rows)


def main() -> None:
    recipe, options, *_ = parse(Recipe, Options, __doc__ or "")
    rivals = [rival for rival in RIVALS if recipe.only in rival.name]
    if not rivals:
        raise SystemExit(f"--only {recipe.only}: expected a part of {', '.join(rival.name for rival in RIVALS)}")
    try:
        device = dist.choose_device(options.device, dist.Launch())
    except UserError as error:
        raise SystemExit(str(error)) from error
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    precision = Precision("fp32" if options.precision == "tf32" else options.precision, device)
    peak = matmul_peak(device, options.precision)
    how = "compiled" if options.compile else "eager"
    print(f"{device_name(device)}, {options.precision}, {how}, matrix product {peak / 1e9:,.0f} GFLOP/s")
    lines = []
    for size in map(int, recipe.sizes.split(",")):
        found = measure(rivals, Setting(size, recipe, device, precision), recipe, options.compile, peak)
        head = f"{'train s':>9}{'ratio':>7}{'img/s':>8}{'GB':>7}{'ratio':>7}{'peak %':>7}"
        print(f"\n{f'{size} px, batch {recipe.batch_size}':26}{head}{head.replace('train', ' eval')}")
        print("\n".join(show(line) for line in found), flush=True)
        lines += found
    if options.json:
        about = {"device": device_name(device), "precision": options.precision, "compiled": options.compile}
        about |= {"versions": versions(), "date": time.strftime("%Y-%m-%d"), "matmul_flops": peak}
        write_text(Path(options.json), json.dumps({"about": about, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
