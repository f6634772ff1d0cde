"""benchmarks.engine: both loops do the same work, and the figures are those of the turns."""

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import engine
from benchmarks.engine import Recipe, measure

CPU = torch.device("cpu")


def test_both_loops_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches in the same order: both models end with the same weights."""
    models: list[nn.Module] = []
    build, clock = engine.build, iter(range(100))

    def kept(*words: Any) -> Any:
        model, optimizer = build(*words)
        optimizer.param_groups[0]["lr"] = 0.01
        models.append(model)
        return model, optimizer

    monkeypatch.setattr(engine, "build", kept)
    monkeypatch.setattr(engine, "timed", lambda take, steps, _: ([take() for _ in range(steps)], (next(clock), 1.0))[1])
    found = measure(Recipe("resnet10t", 32, 2, 3, rounds=3, steps=2), CPU, "fp32", compiled=False)
    start = build(Recipe("resnet10t", 32, 2, 3), CPU, False)[0].state_dict()
    for name, one in models[0].state_dict().items():
        torch.testing.assert_close(one, models[1].state_dict()[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(one, start[name])
    # The first turn of each, 0 and 1, is not counted; then bare and engine take turns: 2 3, 4 5, 6 7.
    assert found["seconds"] == {"bare": 2, "engine": 3, "overhead": 0.5}
    assert found["cpu_seconds"]["overhead"] == 0


def test_timing_counts_each_step() -> None:
    taken: list[int] = []
    wall, processors = engine.timed(lambda: taken.append(sum(range(200_000))), 3, CPU)
    assert len(taken) == 3
    assert 0 < processors < 1
    assert wall > 0
