"""Recorded figures of the released code, and how our numbers are held against them.

Bounds come from the float32 rounding of the quantity compared: a number (of logits, of a loss), or a share of the
tensor's own size. They are never relative to one entry: processors add in different orders (AVX-512, AVX2, ARM; one
thread or two), and an entry near zero is then off by the rounding of the large terms that it is the sum of.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from formula import check_figures, fill
from torch import Tensor

SUMS = ("sum", "abs_sum", "l2", "wsum")


@functools.cache
def golden(name: str) -> Any:
    """Return tests/golden/{name}.json. All tests share it: nobody may change it."""
    return json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())


def state_dict_figures(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the number of entries and the SHA-1 of their names and shapes, in order."""
    lines = (f"{key}:{'x'.join(map(str, value.shape))}\n" for key, value in state.items())
    return {"n": len(state), "sha1": hashlib.sha1("".join(lines).encode()).hexdigest()}


def assert_within(bound: float, ours: Any, recorded: Any, what: object = "") -> None:
    """Compare numbers, lists or tensors of one shape: no entry may be more than `bound` away."""
    ours, recorded = (torch.as_tensor(values, dtype=torch.float64).detach() for values in (ours, recorded))
    torch.testing.assert_close(ours, recorded, atol=bound, rtol=0, msg=lambda text: f"{what}: {text}")


def assert_close_to_figures(
    tensor: Tensor, figures: Mapping[str, Any], sums: float = 1e-7, first: float = 1e-6, what: object = ""
) -> None:
    """Compare a tensor with a recorded `chk` object: its shape, its sums, and its first entries where there are any.

    `sums` bounds the sums as a share of the sum of absolute values, `first` the entries as a share of the largest one;
    sizes below 1 count as 1. 1e-7 holds for weights that are copied and for one layer; deep models need more.
    """
    ours = check_figures(tensor)
    assert ours["shape"] == figures["shape"], what
    size: Any = figures.get("abs_sum", ours["abs_sum"])
    for name in SUMS:
        if name in figures:
            assert_within(sums * max(1.0, size), ours[name], figures[name], f"{what} {name}")
    if "first" in figures:
        entries = tensor.detach().flatten()[: len(figures["first"])]
        assert_within(first * max(1.0, tensor.abs().max().item()), entries, figures["first"], f"{what} first")


def assert_close_at(tensor: Tensor, probes: Mapping[str, float], bound: float, what: object = "") -> None:
    """Compare single entries with recorded ones, whose keys are their places: "0,17,3"."""
    for place, value in probes.items():
        assert_within(bound, tensor[tuple(map(int, place.split(",")))], value, f"{what} at {place}")


filled = functools.lru_cache(maxsize=512)(fill)  # models of one width share most of their entries


def build_filled(build: Callable[[], Any]) -> Any:
    """Build a model without drawing its weights, and fill it by the keys that its entries have in a released file."""
    with torch.device("meta"):
        model = build()
    entries = model.to_empty(device="cpu").released_state_dict().items()
    counted = {key: torch.zeros_like(value) for key, value in entries if not value.is_floating_point()}
    weights = {key: filled(key, (*value.shape,)) for key, value in entries if key not in counted}
    model.load_released(weights | counted)
    return model.eval()


def assert_selects(scores: Tensor, ours: list[int], recorded: list[int], bound: float, what: object = "") -> None:
    """Compare a choice among `scores` (N,): the same places, best first; those `bound` apart may change places."""
    assert sorted(ours) == sorted(recorded), what
    assert_within(bound, scores[recorded], scores.topk(len(recorded)).values, what)
