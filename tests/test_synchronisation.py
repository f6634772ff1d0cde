"""A training step asks the device for nothing: no operation of it has a result that Python must wait for.

Counted on a CPU, where the same operations are asked for: what makes a GPU wait is a scalar or a shape that depends on
values, numbers that Python hands over, and what is brought to the CPU.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CLASSES, MODELS, SIZE, objective_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as TF

import common.engine
from common.amp import Precision
from common.data.images import Images
from common.data.loader import Batch, Plan
from common.engine import Loading, Objective, Trainer
from common.metrics import Predictions
from common.undo import Undo
from glsim.train_utils.losses import make_objective
from glsim.train_utils.schedule import make_optimizer
from glsim.train_utils.settings import Settings

CPU = torch.device("cpu")
EIGHT = Images("toy", "train", list("abcdefgh"), [Path("x")] * 8, [0] * 8, list("ABC")[:CLASSES], TF.to_tensor)
READS = ("tolist", "cpu", "numpy", "item")  # methods, of which most ask for no operation on a CPU
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "_unique2", "item"}


class Waits(TorchDispatchMode):
    """Fails where an operation, or a method of a tensor, would make Python wait for a GPU.

    For a GPU stands torch.device("cpu"), to which the engine brings its batches; "cpu" by name is the CPU.
    """

    def __enter__(self) -> "Waits":
        self.patch = pytest.MonkeyPatch()
        for name in READS:
            self.patch.setattr(Tensor, name, _failing(name))
        self.patch.setattr(Tensor, "to", _unless_named(Tensor.to))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.patch.undo()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(m is not None and m.dtype == torch.bool for m in args[1])
        assert name not in WAITING, f"{function} waits for the device"
        assert not by_mask, f"{function} by a mask waits for the device"
        return function(*args, **(kwargs or {}))


def _failing(name: str) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} waits for the device")

    return fail


def _unless_named(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def brought(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not any(isinstance(where, str) for where in (*args, *kwargs.values())), "to waits for the device"
        return to(tensor, *args, **kwargs)

    return brought


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "tolist": lambda tensor: tensor.tolist(),
    "cpu": lambda tensor: tensor.cpu(),
    "numpy": lambda tensor: tensor.numpy(),
    "numpy of numpy": np.asarray,
    "item": lambda tensor: tensor.sum().item(),
    "to": lambda tensor: tensor.to("cpu"),
    "to device": lambda tensor: tensor.to(device="cpu", dtype=torch.float64),
    "float": lambda tensor: float(tensor.sum()),
    "if": lambda tensor: 1 if tensor.sum() > 0 else 0,
    "mask": lambda tensor: tensor[tensor > 0],
    "list": lambda tensor: tensor + torch.tensor([1.0, 2.0]),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_seen(name: str) -> None:
    tensor = torch.tensor([1.0, 2.0])
    WAITS[name](tensor)
    with Waits(), pytest.raises(AssertionError, match="waits for the device"):
        WAITS[name](tensor)
    WAITS[name](tensor)  # nothing of it stays


def ready(count: int) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        images = torch.randn(4, 3, SIZE, SIZE, generator=draw)
        yield Batch(images, torch.randint(CLASSES, (4,), generator=draw), [0, 1, 2, 3], [])


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9)


def train(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    precision: str = "fp32",
    optimize: Callable[[Any], Optimizer] = sgd,
    objective: Objective | None = None,
) -> None:
    """Two optimizer steps of two micro-batches, of which the second may not wait for anything; the report may."""
    monkeypatch.setattr(common.engine, "training_batches", lambda *_: ready(4))
    optimizer = optimize([parameter for parameter in model.parameters() if parameter.requires_grad])
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        precision=Precision(precision, CPU, init_scale=16.0),
        images=EIGHT,
        plan=Plan(lambda _: range(8), 8, 8, accumulate=2),
        steps=2,
        device=CPU,
        loading=Loading(),
        objective=objective or objective_of(model),
        clip_grad=1.0,
        schedule_per="step",
    )
    steps = trainer.run()
    assert next(steps) == 1
    with Waits():
        assert next(steps) == 2
    report = trainer.report()
    assert report["samples"] == 16
    assert trainer.skipped == 0


@pytest.mark.parametrize("name", MODELS)
def test_no_model_waits_in_a_training_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    train(MODELS[name](), monkeypatch)


OPTIMIZERS = (sgd, lambda p: AdamW(p, lr=0.01), lambda p: make_optimizer(p, "sgd", 0.01, 0.9, 0.1))


@pytest.mark.parametrize("optimize", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_precision_waits(precision: str, optimize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    train(MODELS["FFVT"](), monkeypatch, precision, optimize)


def test_focal_loss_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixing, which torchvision draws on the CPU for every device, cannot be counted here."""
    objective = make_objective(Settings(focal_gamma=2.0, ls=True), CLASSES)
    train(MODELS["GLSim"](), monkeypatch, objective=objective)


def test_an_optimizer_that_is_not_fused_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests of this file mean something."""
    with pytest.raises(AssertionError, match="item waits"):
        train(MODELS["ViT"](), monkeypatch, optimize=lambda parameters: NAdam(parameters, lr=0.01))


def test_evaluation_waits_once_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """CAL's crops, too, are cut out without a word from the device."""
    gathered: list[int] = []

    def gather(index: list[int], columns: Any, *_: Any) -> Predictions:
        gathered.extend(index)
        rest = np.zeros(8, dtype=int)
        return Predictions(rest, rest, rest[:, None], rest.astype(float))

    monkeypatch.setattr(common.engine, "_gathered", gather)
    monkeypatch.setattr(common.engine, "evaluation_batches", lambda *_: ready(2))
    for name in ("CAL", "GLSim"):
        model = MODELS[name]()
        with Waits():
            common.engine.evaluate(model, EIGHT, CPU, Precision("fp32", CPU), Loading())
    assert len(gathered) == 16


class Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [True, False])
def test_undo_is_exact_in_a_few_operations(bad: bool, dtype: torch.dtype) -> None:
    """Whatever the buffers hold, NaN and infinity too, and however many they are."""
    before = torch.tensor([1.5, -0.0, float("nan"), float("inf"), 3e-38], dtype=dtype)
    after = before.roll(1)
    calls = []
    for count in (1, 60):
        model = nn.Module()
        for number in range(count):
            model.register_buffer(str(number), before.clone())
        undo = Undo(model)
        with Counting() as counting:
            undo.remember()
            for buffer in model.buffers():
                buffer.copy_(after)
            undo.undo(torch.tensor(bad))
        calls.append(counting.calls - count)
        expected = before if bad else after
        for buffer in model.buffers():
            assert torch.equal(buffer.view(torch.uint8), expected.view(torch.uint8))  # NaN is not equal to itself
    assert calls[0] == calls[1]
