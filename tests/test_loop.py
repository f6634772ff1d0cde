"""The training loop against loops written here in a textbook's form, in float64 where that makes it exact."""

import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler
from tiny_run import CPU, InMemory, make_run, steps_of
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from common.data.batches import Plan, seed_everything, seed_of, seed_transforms, shuffled
from common.errors import UserError
from common.train.checkpoint import State, make_state, read_sums
from common.train.loop import StopRequest, advance_schedule, evaluate, fit, ranking
from common.train.precision import Precision
from common.train.run_folder import Run

COUNT, BATCH = 22, 8  # the last batch of an epoch has 6
DRAW = torch.Generator().manual_seed(0)
LABELS = torch.randint(3, (COUNT,), generator=DRAW)
IMAGES = torch.randn(COUNT, 3, 4, 4, generator=DRAW, dtype=torch.float64) + LABELS[:, None, None, None]
ORDER = shuffled(COUNT, 3)


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 3)).to(dtype)


def made(dtype: torch.dtype = torch.float64, folder: Path = Path(), **options: Any) -> tuple[Run, State]:
    run = make_run(InMemory(IMAGES.to(dtype), LABELS.tolist(), list("abc")), BATCH, folder, **options)
    model = model_of(dtype)
    return run, make_state(run, model, SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True), None)


def exact(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy without the cast to float32."""
    logits = model(images)
    return F.cross_entropy(logits, labels), logits


def plain_loop(steps: int, clip: float | None = None) -> nn.Module:
    model = model_of(torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        epoch, batch = divmod(step, 3)
        chosen = list(ORDER(epoch))[BATCH * batch : BATCH * (batch + 1)]
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES[chosen]), LABELS[chosen]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


# Batches


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_every_sample_once_an_epoch(count: int, size: int, accumulate: int, each: int, drop_last: bool) -> None:
    """On any number of processes, in any number of parts; with weights that make the mean that of the whole batch."""
    batch = size * accumulate * each
    plans = [Plan(shuffled(count, 5), count, batch, accumulate, rank, size, drop_last) for rank in range(size)]
    per_epoch = plans[0].steps_per_epoch
    assert per_epoch == (count // batch if drop_last else math.ceil(count / batch))
    for epoch in range(2):
        order, seen = list(plans[0].order(epoch)), []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            shares = [
                (plan.keys(step, micro, order), plan.weight(step, micro))
                for plan in plans
                for micro in range(accumulate)
            ]
            real = [key for keys, weight in shares if weight > 0 for key in keys]
            seen += real
            assert len(real) == plans[0].global_batch_size(step)
            assert all(keys for keys, _ in shares)  # every process takes part in every step
            assert sum(weight for _, weight in shares) == pytest.approx(size)
            for keys, weight in shares:  # each sample counts alike, as DDP averages over processes
                assert weight == 0 or weight / len(keys) == pytest.approx(size / len(real))
        assert [key.sample for key in seen] == order[: len(seen)]
        assert [(key.epoch, key.position) for key in seen] == [(epoch, place) for place in range(len(seen))]
        assert len(seen) == (per_epoch * batch if drop_last else count)


def test_order_and_seeds_are_those_of_all_earlier_runs() -> None:
    """A resumed run, and a published figure, depend on them."""
    seeds = {(0,): 3717377837946358015, (3,): 8789938331783242616, (3, 0): 3664086143719620260}
    seeds |= {(3, 0, 0): 6252797085247196109, (3, 1, 4): 6965966528676992616, (42, 7, 0, 1): 81229078880598000}
    assert {numbers: seed_of(*numbers) for numbers in seeds} == seeds
    assert list(shuffled(10, 42)(0)) == [2, 3, 0, 5, 6, 9, 7, 8, 1, 4]
    assert list(shuffled(10, 42)(1)) == [8, 1, 0, 7, 3, 5, 9, 6, 4, 2]
    for seed in (seed_everything, seed_transforms):
        seed(3, 1, 0, 0)
        assert torch.rand(2).tolist() == pytest.approx([0.3904879689216614, 0.46507227420806885], abs=1e-7)
        assert (np.random.rand(), random.random()) == (0.0835565959122343, 0.9338760057761883)  # noqa: NPY002


# A step


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_steps_are_those_of_a_plain_loop(accumulate: int, clip: float | None) -> None:
    run, state = made()
    for _ in steps_of(run, state, Plan(ORDER, COUNT, BATCH, accumulate), 7, exact, clip):
        pass
    assert_close(state.model, plain_loop(7, clip))
    read_sums(state)
    assert state.logged[2] == 2 * COUNT + BATCH
    assert (state.step, state.skipped) == (7, 0)


def test_fp16_skips_a_step_that_overflows() -> None:
    """The first one: torch's fused SGD would leave its momentum unset. Weights stay, the scale is halved."""
    run, state = made(torch.float32, precision=Precision("fp16", CPU, init_scale=2.0**4))
    run.options.precision = "fp16"
    bad = iter([math.inf, 1.0, 1.0])
    before = model_of(torch.float32)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = exact(model, images, labels)
        return loss * next(bad), logits

    steps = steps_of(run, state, Plan(ORDER, COUNT, BATCH), 3, objective)
    next(steps)
    read_sums(state)
    assert (state.step, state.skipped, state.precision.scaler.get_scale()) == (1, 1, 2.0**3)
    assert_close(state.model, before)
    assert all(not entry["momentum_buffer"].any() for entry in state.optimizer.state.values())
    assert len(list(steps)) == 2
    read_sums(state)
    assert (state.skipped, all(value.isfinite().all() for value in state.model.parameters())) == (1, True)


def train(run: Run, state: State, steps: int, **how: Any) -> None:
    fit(run, state, Plan(ORDER, COUNT, BATCH), StopRequest(run, state), steps=steps, evaluate_every=3, **how)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step(tmp_path: Path) -> None:
    """At the next report; last.pt stays that of a step before."""
    run, state = made(folder=tmp_path, log_every=2)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = exact(model, images, labels)
        return loss * (math.nan if state.step == 4 else 1.0), logits

    with pytest.raises(UserError, match="not finite at step 6"):
        train(run, state, 9, objective=objective)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3


def test_a_whole_run(tmp_path: Path) -> None:
    """Its reports are of all images since the last, its best the earliest of equals; resumed, it ends as alone."""
    run, state = made(folder=tmp_path, log_every=2)
    best: list[int] = []
    train(run, state, 7, objective=exact, on_best=lambda entry: best.append(entry["step"]))
    assert_close(state.model, plain_loop(7))
    assert [(line["kind"], line["step"]) for line in run.log.lines] == [  # type: ignore[attr-defined]
        *(("train", 2), ("train", 3), ("val", 3), ("train", 4), ("train", 6), ("val", 6), ("train", 7), ("val", 7)),
    ]
    assert state.trained_images == 2 * COUNT + BATCH
    correct = [entry["val"]["correct"] for entry in state.history]
    assert state.best is not None
    assert state.best["step"] == best[-1] == state.history[correct.index(max(correct))]["step"]
    again, other = made(folder=tmp_path)
    again.resumed = True
    other = make_state(again, other.model, other.optimizer, None)
    assert (other.step, other.history, other.logged) == (7, state.history, state.logged)
    train(again, other, 9, objective=exact)
    assert_close(other.model, plain_loop(9))


def test_schedules() -> None:
    """The rate of each step: torch's by epoch and by step, timm's, which is told both."""

    def rates(make: Any, per: str) -> list[float]:
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler, used = make(optimizer), []
        for step in range(1, 8):
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            advance_schedule(scheduler, step, 3, per)
        return used

    def cosine(optimizer: SGD, by_epoch: bool = False) -> CosineLRScheduler:
        return CosineLRScheduler(optimizer, t_initial=9, t_in_epochs=by_epoch, warmup_t=2, warmup_lr_init=0.1)

    def falling(optimizer: SGD) -> LambdaLR:
        return LambdaLR(optimizer, lambda count: 1 / (1 + count))

    each, known = range(7), cosine(SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    assert rates(falling, "epoch") == [1 / (1 + step // 3) for step in each]
    assert rates(falling, "step") == [1 / (1 + step) for step in each]
    assert rates(cosine, "step") == pytest.approx([known._get_lr(step)[0] for step in each])
    assert rates(lambda o: cosine(o, True), "step") == pytest.approx([known._get_lr(step // 3)[0] for step in each])
    assert rates(lambda _: None, "epoch") == [1.0] * 7


# Evaluation


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_evaluation_is_that_of_a_slow_loop(batch: int) -> None:
    run, state = made(torch.float32, eval_batch_size=batch)
    metrics, found = evaluate(run, state.model.train(), run.data.test)
    logits = torch.stack([state.model(image[None]).double()[0] for image, _ in run.data.test])
    assert found.index.tolist() == list(range(COUNT))
    assert found.ranked.tolist() == logits.argsort(-1, descending=True).tolist()
    np.testing.assert_allclose(found.loss, F.cross_entropy(logits, LABELS, reduction="none").detach(), rtol=1e-5)
    assert (metrics["correct"], metrics["total"]) == (int((logits.argmax(-1) == LABELS).sum()), COUNT)


def test_of_equal_logits_the_lower_class_is_the_better() -> None:
    for classes in (2, 5, 40, 300):
        logits = torch.randint(-2, 3, (64, classes), generator=DRAW).to(torch.bfloat16)
        for row, best in zip(logits.tolist(), ranking(logits, 5).tolist(), strict=True):
            assert best == sorted(range(classes), key=lambda number: (-row[number], number))[:5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_best_class(bad: float) -> None:
    run, state = made(torch.float32)
    with torch.no_grad():
        state.model[4].bias[1] = bad  # type: ignore[index]
    with pytest.raises(UserError, match=r"not finite for 22 of 22 images, the first of them 0"):
        evaluate(run, state.model, run.data.test)
    run.data.test.classes.append("d")
    with pytest.raises(UserError, match="3 classes, memory has 4"):
        evaluate(run, state.model, run.data.test)


def test_the_loop_costs_little_beside_a_bare_one() -> None:
    """In processor time, which other programs disturb least; both take turns, and the fastest of each counts."""
    run, state = made(torch.float32)
    ours = steps_of(run, state, Plan(ORDER, COUNT, BATCH), 800)
    model, turns = model_of(torch.float32), {"bare": math.inf, "ours": math.inf}
    optimizer, images = SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True), IMAGES[:BATCH].float()

    def bare() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), LABELS[:BATCH]).backward()
        optimizer.step()

    for _ in range(10):
        for name, step in (("bare", bare), ("ours", lambda: next(ours))):
            began = time.process_time()
            for _ in range(20):
                step()
            turns[name] = min(turns[name], (time.process_time() - began) / 20)
    assert turns["ours"] - turns["bare"] < 5e-3, turns
