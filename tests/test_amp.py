"""common.amp against loops written here with torch's autocast and GradScaler, and a stand-in for apex's protocol."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from common.amp import Precision
from common.errors import UserError

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
    "adamw fused": lambda parameters: AdamW(parameters, lr=0.01, fused=True),
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "sgd fused": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(count)]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images).float(), labels)


def train(
    model: nn.Module, optimizer: Optimizer, precision: Precision, clip: float | None, count: int = 6
) -> list[bool]:
    skipped = []
    for images, labels in batches(count):
        optimizer.zero_grad()
        with precision.autocast():
            loss = loss_of(model, images, labels)
        precision.backward(loss, optimizer)
        skipped.append(bool(precision.step(optimizer, model.parameters(), clip)))
    return skipped


def train_by_hand(
    model: nn.Module, optimizer: Optimizer, dtype: torch.dtype | None, clip: float | None, scale: float | None
) -> None:
    """The loop of PyTorch's own AMP recipe."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for images, labels in batches(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_of(model, images, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()


def assert_equal(first: Any, second: Any) -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [("fp32", None, None), ("bf16", torch.bfloat16, None), ("fp16", torch.float16, 2.0**10)],
)
def test_equal_to_the_loop_written_by_hand(
    name: str, dtype: torch.dtype | None, scale: float | None, optimizer: str, clip: float | None
) -> None:
    ours, theirs = small_model(), small_model()
    our_optimizer, their_optimizer = (OPTIMIZERS[optimizer](model.parameters()) for model in (ours, theirs))
    precision = Precision(name, CPU, init_scale=scale or 2.0**16)
    assert not any(train(ours, our_optimizer, precision, clip))
    train_by_hand(theirs, their_optimizer, dtype, clip, scale)
    assert_equal(ours.state_dict(), theirs.state_dict())
    assert_equal(our_optimizer.state_dict(), their_optimizer.state_dict())


def test_autocast_lowers_what_it_should() -> None:
    layer, images = nn.Linear(4, 4), torch.ones(2, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with Precision(name, CPU).autocast():
            assert layer(images).dtype == dtype
    assert layer.weight.dtype == torch.float32


def spoil(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first = next(model.parameters())
    assert first.grad is not None
    first.grad[0, 0] = value


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer: str, value: float, clip: float | None) -> None:
    model = small_model()
    stepper, precision = OPTIMIZERS[optimizer](model.parameters()), Precision("fp32", CPU)
    assert train(model, stepper, precision, clip, count=2) == [False, False]
    before = copy.deepcopy((model.state_dict(), stepper.state_dict()))
    assert any(len(state) for state in before[1]["state"].values())  # momentum is there to be spoiled
    spoil(model, value)
    assert bool(precision.step(stepper, model.parameters(), clip)) is True
    assert_equal(before, (model.state_dict(), stepper.state_dict()))
    # and the next good one counts again
    assert train(model, stepper, precision, clip, count=1) == [False]
    assert not torch.equal(before[0]["0.weight"], model.state_dict()["0.weight"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fp16_overflow_is_skipped_and_lowers_the_scale(optimizer: str) -> None:
    model = small_model()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    precision = Precision("fp16", CPU, init_scale=2.0**40)
    before = copy.deepcopy(model.state_dict())
    images, labels = batches(1)[0]
    with precision.autocast():
        loss = loss_of(model, images, labels)
    precision.backward(loss, stepper)
    assert bool(precision.step(stepper, model.parameters(), 1.0)) is True
    assert_equal(before, model.state_dict())
    assert precision.state_dict()["scale"] == 2.0**39


def test_clipping_is_torchs_own() -> None:
    ours, theirs = small_model(), small_model()
    for model in (ours, theirs):
        loss_of(model, *batches(1)[0]).backward()
    frozen = SGD(ours.parameters(), lr=0.0)
    assert not Precision("fp32", CPU).step(frozen, ours.parameters(), 0.01)
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    assert norm > 0.01
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_parameters_without_a_gradient_are_passed_over() -> None:
    model = small_model()
    model[2].requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    assert train(model, optimizer, Precision("fp32", CPU), 0.1) == [False] * 6


def test_a_loss_scale_is_taken_up_again() -> None:
    first, model = Precision("fp16", CPU, init_scale=2.0**40), small_model()
    assert train(model, SGD(model.parameters(), lr=0.1), first, None, count=2) == [True, True]
    second = Precision("fp16", CPU)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.state_dict()["scale"] == 2.0**38
    second.load_state_dict(Precision("fp32", CPU).state_dict())  # saved in fp32, resumed in fp16
    assert second.state_dict()["scale"] == 2.0**38
    Precision("bf16", CPU).load_state_dict(first.state_dict())


# apex


class FakeApex(ModuleType):
    """What apex.amp of 2018-2024 promises, and no more: its loss scale, its skipping and its order of calls.

    As there, an overflow seen when `scale_loss` is left puts a `step` in place that skips once and then restores
    the true one.
    """

    def __init__(self) -> None:
        super().__init__("apex.amp")
        self.calls: list[str] = []
        self.scale, self.dynamic = 8.0, True

    def initialize(self, model: nn.Module, optimizer: Optimizer, opt_level: str) -> tuple[nn.Module, Optimizer]:
        self.calls.append(f"initialize {opt_level}")
        optimizer._amp_stash = SimpleNamespace(already_patched=False)
        return model, optimizer

    @contextmanager
    def scale_loss(self, loss: Tensor, optimizer: Any) -> Iterator[Tensor]:
        self.calls.append("scale_loss")
        yield loss.float() * self.scale
        overflow = False
        for parameter in self.master_params(optimizer):
            parameter.grad /= self.scale
            overflow |= not bool(torch.isfinite(parameter.grad).all())
        self.calls.append("scale_loss left")
        if overflow and self.dynamic:
            self.scale /= 2
            if not optimizer._amp_stash.already_patched:
                true_step = optimizer.step

                def skip() -> None:
                    optimizer.step, optimizer._amp_stash.already_patched = true_step, False

                optimizer.step, optimizer._amp_stash.already_patched = skip, True

    def master_params(self, optimizer: Optimizer) -> Iterator[nn.Parameter]:
        self.calls.append("master_params")
        for group in optimizer.param_groups:
            yield from group["params"]

    def state_dict(self) -> dict[str, float]:
        return {"loss_scale": self.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = state["loss_scale"]


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> FakeApex:
    amp, package = FakeApex(), ModuleType("apex")
    package.amp = amp  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.amp", amp)
    return amp


def apex_step(precision: Precision, model: nn.Module, optimizer: Optimizer, factor: float = 1.0) -> bool:
    images, labels = batches(1)[0]
    optimizer.zero_grad()
    with precision.autocast():
        loss = loss_of(model, images, labels) * factor
    precision.backward(loss, optimizer)
    return bool(precision.step(optimizer, model.parameters(), 0.05))


def test_apex_is_called_as_it_wants_to_be(apex: FakeApex) -> None:
    ours, theirs = small_model(), small_model()
    precision = Precision("fp16", torch.device("cuda"), "apex", opt_level="O2")
    model, optimizer = precision.prepare(ours, SGD(ours.parameters(), lr=0.1))
    assert apex.calls == ["initialize O2"]
    apex.calls.clear()
    assert apex_step(precision, model, optimizer) is False
    assert apex.calls == ["scale_loss", "master_params", "scale_loss left", "master_params"]
    loss_of(theirs, *batches(1)[0]).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
    SGD(theirs.parameters(), lr=0.1).step()
    assert_equal(model.state_dict(), theirs.state_dict())


def test_apex_skips_an_overflow_once_and_only_once(apex: FakeApex) -> None:
    precision = Precision("fp16", torch.device("cuda"), "apex")
    ours = small_model()
    model, optimizer = precision.prepare(ours, SGD(ours.parameters(), lr=0.1, momentum=0.9))
    before = copy.deepcopy(model.state_dict())
    assert apex_step(precision, model, optimizer, factor=float("inf")) is True
    assert apex.scale == 4.0
    assert_equal(before, model.state_dict())
    assert apex_step(precision, model, optimizer) is False
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_under_apex_with_a_static_scale_a_bad_gradient_is_skipped_too(apex: FakeApex) -> None:
    apex.dynamic = False
    precision = Precision("fp16", torch.device("cuda"), "apex", opt_level="O3")
    ours = small_model()
    model, optimizer = precision.prepare(ours, SGD(ours.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    assert apex_step(precision, model, optimizer, factor=float("nan")) is True
    assert_equal(before, model.state_dict())


def test_apexs_loss_scale_is_saved_and_restored(apex: FakeApex) -> None:
    precision = Precision("fp16", torch.device("cuda"), "apex")
    assert precision.state_dict() == {"loss_scale": 8.0}
    precision.load_state_dict({"loss_scale": 2.0})
    assert apex.scale == 2.0


@pytest.mark.parametrize(("precision", "device"), [("fp32", "cuda"), ("bf16", "cuda"), ("fp16", "cpu")])
def test_apex_is_for_fp16_on_cuda(apex: FakeApex, precision: str, device: str) -> None:
    with pytest.raises(UserError, match="--amp-backend apex works with --precision fp16 on a CUDA device only"):
        Precision(precision, torch.device(device), "apex")


def test_without_apex_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pypi = ModuleType("apex")  # the unrelated package of that name has no amp
    for package in (None, pypi):
        monkeypatch.setitem(sys.modules, "apex", package)
        monkeypatch.delitem(sys.modules, "apex.amp", raising=False)
        with pytest.raises(UserError, match=r"apex\.amp cannot be imported.*--amp-backend native") as refusal:
            Precision("fp16", torch.device("cuda"), "apex")
        assert "\n" not in str(refusal.value)
