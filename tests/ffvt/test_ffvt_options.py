"""What ffvt/train.py makes of options on a machine with a GPU, and the released order of images."""

from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler

from common.errors import UserError
from common.experiment import Options
from ffvt.train import EXPERIMENT, Recipe

GPU = torch.device("cuda")


@pytest.mark.parametrize("processes", [1, 3])
def test_released_order_is_that_of_the_released_sampler(processes: int) -> None:
    """The same permutation each epoch; every step takes from it what the processes of the released program took."""
    count, share = 41, 4
    order = EXPERIMENT.order(Recipe("t", released=True), count, seed=42)
    samplers = [DistributedSampler(range(count), processes, rank) for rank in range(processes)]
    shares = [list(sampler) for sampler in samplers]
    batch = share * processes
    for step in range(count // batch):
        theirs = {sample for own in shares for sample in own[step * share : (step + 1) * share]}
        assert set(order(0)[step * batch : (step + 1) * batch]) == theirs
    assert list(order(0)) == list(order(5))
    described = EXPERIMENT.order(Recipe("t"), count, seed=42)
    assert list(described(0)) != list(described(1))
    assert sorted(described(1)) == list(range(count))


@pytest.mark.parametrize("other", ["bf16", "fp32"])
def test_fp16_and_another_precision_exclude_each_other(other: Any) -> None:
    with pytest.raises(UserError, match=f"--fp16 and --precision {other} exclude"):
        EXPERIMENT.options(Recipe("t", fp16=True), Options(precision=other), GPU, {"name", "fp16", "precision"})


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_opt_levels(level: str) -> None:
    recipe = Recipe("t", fp16=True, fp16_opt_level=level)  # type: ignore[arg-type]
    assert EXPERIMENT.options(recipe, Options(), torch.device("cpu"), ()).precision == "fp32"
    options = EXPERIMENT.options(recipe, Options(), GPU, ())
    assert options.precision == ("fp32" if level == "O0" else "fp16")
    assert (options.accumulate, options.eval_batch_size) == (1, 16)
    scaler = EXPERIMENT.precision(recipe, options, torch.device("cpu")).scaler
    assert scaler.is_enabled() == (level != "O0")
    if level != "O0":
        assert scaler.get_scale() == 2.0**20
