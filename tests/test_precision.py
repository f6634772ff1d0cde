"""common.train.precision against torch's own autocast and GradScaler."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from common.errors import UserError
from common.train.precision import Precision

CPU = torch.device("cpu")
IMAGES, LABELS = torch.randn(4, 6, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 1, 2, 0])


def make(precision: Precision) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    return precision.prepare(model, SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True))


def train(precision: Precision, model: nn.Module, optimizer: Optimizer, factor: float = 1.0) -> Tensor | None:
    optimizer.zero_grad()
    with precision.autocast():
        loss = factor * cross_entropy(model(IMAGES).float(), LABELS)
    precision.backward(loss, optimizer)
    return precision.step(optimizer, model.parameters(), clip_grad=0.5)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_equals_torchs_own(name: str, dtype: torch.dtype | None) -> None:
    precision = Precision(name, CPU)
    model, optimizer = make(precision)
    other, of_other = make(Precision("fp32", CPU))
    scaler = torch.amp.GradScaler("cpu", enabled=name == "fp16")
    for _ in range(4):
        assert train(precision, model, optimizer) == (False if name == "fp16" else None)
        of_other.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = cross_entropy(other(IMAGES).float(), LABELS)
        scaler.scale(loss).backward()
        scaler.unscale_(of_other)
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        scaler.step(of_other)
        scaler.update()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("static", [0.0, 8.0])
def test_an_overflow_in_the_first_step_changes_nothing_but_the_scale(static: float) -> None:
    precision = Precision("fp16", CPU, init_scale=16.0, loss_scale=static)
    model, optimizer = make(precision)
    before, scale = copy.deepcopy(model.state_dict()), static or 16.0
    assert precision.scaler.get_scale() == scale
    assert train(precision, model, optimizer, float("inf"))
    assert precision.scaler.get_scale() == (static or scale / 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not entry["momentum_buffer"].any() for entry in optimizer.state.values())
    loaded = Precision("fp16", CPU)
    loaded.load_state_dict(precision.state_dict())
    assert loaded.scaler.get_scale() == precision.scaler.get_scale()
    assert not train(precision, model, optimizer)


def test_apex_is_for_fp16_on_a_gpu_and_not_pypis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # PyPI's has no amp
    for name, device in (("bf16", "cuda"), ("fp16", "cpu"), ("fp16", "cuda")):
        with pytest.raises(UserError, match="--amp-backend"):
            Precision(name, torch.device(device), "apex")
