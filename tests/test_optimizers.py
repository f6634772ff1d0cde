"""Fused optimizers: the same updates, states that go on in either form, and first updates that are skipped."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from common.amp import Precision
from common.checkpoint import check_like, check_optimizer_state, save_state
from common.checkpoint import load_state as read_state
from common.optimizers import fuse, load_state, state_of

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd without momentum": lambda parameters: SGD(parameters, lr=0.1),
    "nesterov": lambda parameters: create_optimizer_v2(parameters, "sgd", lr=0.1, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
    "timm's adamw": lambda parameters: create_optimizer_v2(parameters, "adamw", lr=0.01),
}


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        assert not Precision("fp32", CPU).step(optimizer, model.parameters(), None)


def assert_near(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_updates_are_those_of_the_loop(name: str) -> None:
    plain, fused = small_model(), small_model()
    loop, kernel = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](fused.parameters())
    fuse(kernel)
    assert all(group["fused"] for group in kernel.param_groups)
    train(plain, loop, range(5))
    train(fused, kernel, range(5))
    assert_near(plain, fused)


@pytest.mark.parametrize("saved_fused", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on_in_either_form(name: str, saved_fused: bool, tmp_path: Path) -> None:
    """A state saved by the loop, as on a device without fused form, goes on fused, and the other way round."""
    whole, model = small_model(), small_model()
    reference, first = OPTIMIZERS[name](whole.parameters()), OPTIMIZERS[name](model.parameters())
    train(whole, reference, range(6))
    if saved_fused:
        fuse(first)
    train(model, first, range(3))
    state = state_of(first) if saved_fused else first.state_dict()
    save_state(tmp_path / "last.pt", state)
    state = read_state(tmp_path / "last.pt")
    second = OPTIMIZERS[name](model.parameters())
    if not saved_fused:
        fuse(second)
    check_like(state, state_of(second), "optimizer")
    check_optimizer_state(state["state"], list(model.parameters()))
    load_state(second, state)
    assert all(bool(group["fused"]) is not saved_fused for group in second.param_groups)
    train(model, second, range(3, 6))
    assert_near(model, whole)


def test_a_state_from_before_the_first_update_goes_on() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    fuse(optimizer)
    load_state(optimizer, SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict())
    assert all(not optimizer.state[parameter]["momentum_buffer"].any() for parameter in model.parameters())


def test_momentum_that_is_there_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    fuse(optimizer)
    train(model, optimizer, range(1))
    state = copy.deepcopy(state_of(optimizer))
    monkeypatch.setattr(torch, "zeros_like", None)
    load_state(optimizer, state)
    for parameter, saved in zip(model.parameters(), state["state"].values(), strict=True):
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], saved["momentum_buffer"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_may_be_unfrozen_later(name: str) -> None:
    plain, fused = small_model(), small_model()
    loop, kernel = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](fused.parameters())
    for model in (plain, fused):
        model[0].requires_grad_(False)
    fuse(kernel)
    for steps, frozen in ((range(2), True), (range(2, 5), False)):
        for model, optimizer in ((plain, loop), (fused, kernel)):
            model[0].requires_grad_(not frozen)
            train(model, optimizer, steps)
    assert_near(plain, fused)


def test_a_state_of_another_memory_layout_goes_on() -> None:
    """Started on a CPU, with contiguous filters; gone on on a GPU, with channels last."""
    plain, model = small_model(), small_model().to(memory_format=torch.channels_last)
    for one in (plain, model):
        optimizer = AdamW(one.parameters(), lr=0.01)
        fuse(optimizer)
        if one is plain:
            train(one, optimizer, range(3))
            state, weights = copy.deepcopy(state_of(optimizer)), copy.deepcopy(one.state_dict())
        else:
            one.load_state_dict(weights)
            load_state(optimizer, state)
            for parameter in one.parameters():
                assert optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
        train(one, optimizer, range(3, 6))
    assert_near(plain, model)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_first_update_leaves_no_trace(name: str, precision: str) -> None:
    """fp16 skips the first updates of most runs. Without momentum from the start, torch 2.15 takes rubbish for it."""
    plain, fused = small_model(), small_model()
    loop, kernel = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](fused.parameters())
    fuse(kernel)
    how = Precision(precision, CPU)
    for parameter in fused.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    if precision == "fp16":
        how.scaler.scale(torch.zeros(()))  # the scaler makes its tensor here
    rubbish: list[Tensor] = [torch.full_like(parameter, 1e9) for parameter in fused.parameters()]
    del rubbish  # what torch.empty hands out next
    assert how.step(kernel, fused.parameters(), None)
    assert_near(plain, fused, tolerance=0.0)
    train(plain, loop, range(3))
    train(fused, kernel, range(3))
    assert_near(plain, fused)


def test_what_has_no_fused_form_stays_as_it_is() -> None:
    model = small_model()
    others: list[Optimizer] = [
        SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5),
        AdamW(model.parameters(), lr=torch.tensor(0.1), differentiable=True),
        AdamW([nn.Parameter(torch.zeros(2, device="meta"))], lr=0.1),
        create_optimizer_v2(model.parameters(), "lamb", lr=0.1),
        create_optimizer_v2(model.parameters(), "lookahead_adamw", lr=0.1),
    ]
    for optimizer in others:
        before = copy.deepcopy(optimizer.state_dict())
        fuse(optimizer)
        assert optimizer.state_dict() == before
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        load_state(optimizer, state_of(optimizer))
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = small_model()
    two = SGD([{"params": [parameter]} for parameter in model[0].parameters()], lr=0.1)
    with pytest.raises(ValueError, match="number of parameter groups"):
        load_state(SGD(model.parameters(), lr=0.1), state_of(two))


def test_a_state_with_an_entry_that_no_group_names_is_refused() -> None:
    model = small_model()
    state = state_of(SGD(model.parameters(), lr=0.1, momentum=0.9))
    state["param_groups"][0]["params"] = [0, 1, 2, 2]
    state["state"][3] = {"momentum_buffer": torch.zeros(3)}
    with pytest.raises(ValueError, match="an entry 3 that no parameter group names"):
        load_state(SGD(model.parameters(), lr=0.1, momentum=0.9), state)
