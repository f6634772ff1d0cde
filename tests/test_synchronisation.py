"""An optimizer step asks the device for nothing: no operation of it has a result that Python must wait for.

Counted on a CPU, where the same operations are asked for: what makes a GPU wait is a scalar or a shape that depends on
values, numbers that Python hands over, and what is brought to the CPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CLASSES, MODELS, SIZE, objective_of
from tiny_run import CPU, InMemory, make_run, steps_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from common.data.batches import Plan
from common.train import loop
from common.train.checkpoint import make_state, read_sums
from common.train.loop import Objective
from common.train.precision import Precision

DRAW = torch.Generator().manual_seed(0)
EIGHT = InMemory(torch.randn(8, 3, SIZE, SIZE, generator=DRAW), [0, 1, 2, 0, 1, 2, 0, 1], list("abc")[:CLASSES])
READS = ("tolist", "cpu", "numpy", "item")  # methods, of which most ask for no operation on a CPU
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "_unique2", "item"}


class Waits(TorchDispatchMode):
    """Fails where an operation, or a method of a tensor, would make Python wait for a GPU.

    For a GPU stands torch.device("cpu"), to which the loop brings its batches; "cpu" by name is the CPU.
    """

    def __enter__(self) -> "Waits":
        self.patch = pytest.MonkeyPatch()
        for name in READS:
            self.patch.setattr(Tensor, name, failing(name))
        self.patch.setattr(Tensor, "to", unless_named(Tensor.to))
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


def failing(name: str) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} waits for the device")

    return fail


def unless_named(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
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


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9, fused=True)


def train(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    precision: str = "fp32",
    optimize: Callable[[Any], Optimizer] = sgd,
    objective: Objective | None = None,
) -> None:
    """Two steps of two micro-batches, of which the second may not wait for anything."""
    run = make_run(EIGHT, 8, precision=Precision(precision, CPU, init_scale=16.0))
    optimizer = optimize([parameter for parameter in model.parameters() if parameter.requires_grad])
    state = make_state(run, model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    plan = Plan(lambda _: range(8), 8, 8, accumulate=2)
    batches = list(loop.training_batches(run.data.train, plan, run.seed, range(2), 0, False))  # what workers do
    monkeypatch.setattr("tiny_run.training_batches", lambda *_: iter(batches))
    steps = steps_of(run, state, plan, 2, objective or objective_of(model), clip_grad=1.0)
    next(steps)
    with Waits():
        next(steps)
    read_sums(state)
    assert (state.step, state.logged[2], state.skipped) == (2, 16, 0)


@pytest.mark.parametrize("name", MODELS)
def test_no_model_waits_in_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    train(MODELS[name](), monkeypatch)


@pytest.mark.parametrize("optimize", [sgd, lambda parameters: AdamW(parameters, lr=0.01, fused=True)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_precision_waits(precision: str, optimize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    train(MODELS["FFVT"](), monkeypatch, precision, optimize)


def test_an_optimizer_that_is_not_fused_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests of this file mean something."""
    with pytest.raises(AssertionError, match="waits"):
        train(MODELS["ViT"](), monkeypatch, "fp16", lambda parameters: NAdam(parameters, lr=0.01))
