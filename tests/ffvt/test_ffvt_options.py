"""What ffvt/train.py makes of options on a machine with a GPU, and the released order of images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler

from common.cli import Options
from common.errors import UserError
from common.train.run_folder import Run
from ffvt.train import FLAG, Recipe, make_precision, order, settle_options

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def settled(device: torch.device, given: dict[str, Any], precision: Any = "fp32") -> Options:
    recipe, options = Recipe("t", fp16=True, **given), Options(precision=precision)
    typed = {"fp16": True, **given} | ({"precision": precision} if precision != "fp32" else {})
    run = Run("ffvt", "ffvt/train.py", Path(), recipe, options, typed, FLAG, device)
    settle_options(run)
    settled: Options = run.options
    return settled


@pytest.mark.parametrize("processes", [1, 3])
def test_released_order_is_that_of_the_released_sampler(processes: int) -> None:
    """The same permutation each epoch; every step takes from it what the processes of the released program took."""
    count, share = 41, 4
    ours = order(Recipe("t", released=True), count, seed=42)
    samplers = [DistributedSampler(range(count), processes, rank) for rank in range(processes)]
    shares = [list(sampler) for sampler in samplers]
    batch = share * processes
    for step in range(count // batch):
        theirs = {sample for own in shares for sample in own[step * share : (step + 1) * share]}
        assert set(ours(0)[step * batch : (step + 1) * batch]) == theirs
    assert list(ours(0)) == list(ours(5))
    described = order(Recipe("t"), count, seed=42)
    assert list(described(0)) != list(described(1))
    assert sorted(described(1)) == list(range(count))


def test_fp16_and_another_precision_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--fp16 and --precision bf16 exclude"):
        settled(GPU, {}, "bf16")


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_opt_levels(level: str) -> None:
    given = {"fp16_opt_level": level}
    assert settled(CPU, given).precision == "fp32"
    options = settled(GPU, given)
    assert options.precision == ("fp32" if level == "O0" else "fp16")
    assert (options.accumulate, options.eval_batch_size) == (1, 16)
    scaler = make_precision(Recipe("t", fp16=True, **given), options, CPU).scaler  # type: ignore[arg-type]
    assert scaler.is_enabled() == (level != "O0")
    if level != "O0":
        assert scaler.get_scale() == 2.0**20
