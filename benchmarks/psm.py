"""Cost of TransFG's part selection: by the product of all attention matrices, and by its CLS row, from CLS outwards.

    python -m benchmarks.psm                        ViT-B/16; a minute or two on a CPU
    python -m benchmarks.psm --device cuda --batch-size 8 --rounds 10

N tokens are those of 224 and of 448 pixels, and of 448 pixels in TransFG's overlapping patches.
`product` and `row` are the multiplication alone, N^3 and N^2 a matrix. Both ways also need the attention matrices,
formed of queries and keys (`form`): `full` is form and product together, `outwards` is `joint_attention`, which forms
them piece by piece. Forming costs N^2 d, d being the width of a head, so that it alone keeps full / outwards near
1 + N / d at most, however little the multiplication takes. The median of the rounds counts.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks import report
from common import dist
from common.provenance import device_name
from common.recipe import parse
from glsim.model_utils.transfg import joint_attention

TOKENS = (197, 785, 1370)
HEAD_WIDTH = 64


@dataclass
class Recipe:
    layers: int = 11  # attention matrices: those of all blocks of ViT-B/16 but the last, which reads the parts
    heads: int = 12  # of each
    batch_size: int = 1  # images
    max_tokens: int = 1370  # larger N are left out
    rounds: int = 3  # timed, after one that is not


@dataclass
class Options:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    json: str | None = None  # also write the figures to this file


class Clock:
    """Says the seconds since it was asked before, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0.0
        self.lap()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        before, self.before = self.before, time.perf_counter()
        return self.before - before


@torch.inference_mode()
def measure(tokens: int, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Return the seconds of each part for `tokens` tokens, and the share of heads that pick the same part both ways."""
    shape = (recipe.batch_size, recipe.heads, tokens, HEAD_WIDTH)
    generator = torch.Generator().manual_seed(tokens)
    q_and_k = torch.randn(2, recipe.layers, *shape, generator=generator).to(device)
    blocks = list(zip(*q_and_k, strict=True))
    rounds = []
    for _ in range(recipe.rounds + 1):
        seconds, clock = {"form": 0.0, "product": 0.0, "row": 0.0}, Clock(device)
        product = row = None
        for q, k in blocks:
            matrix = (q * HEAD_WIDTH**-0.5 @ k.mT).softmax(-1)  # (B, H, N, N)
            seconds["form"] += clock.lap()
            product = matrix if product is None else product @ matrix
            seconds["product"] += clock.lap()
            row = matrix[:, :, :1] if row is None else row @ matrix
            seconds["row"] += clock.lap()
        outwards = joint_attention(blocks)
        seconds["outwards"] = clock.lap()
        rounds.append(seconds | {"full": seconds["form"] + seconds["product"]})
    assert product is not None
    same = product[:, :, 0, 1:].argmax(-1) == outwards[..., 1:].argmax(-1)
    medians = {name: statistics.median(seconds[name] for seconds in rounds[1:]) for name in rounds[0]}
    return medians | {"same": same.float().mean().item()}


def main() -> None:
    recipe, options, *_ = parse(Recipe, Options, __doc__ or "")
    device = dist.choose_device(options.device, dist.Launch())
    print(f"{device_name(device)}, fp32, {recipe.layers} layers, {recipe.heads} heads, batch {recipe.batch_size}")
    print(f"{'N':>5}{'form s':>10}{'product s':>11}{'row s':>10}{'ratio':>7}", end="")
    print(f"{'full s':>10}{'outwards s':>12}{'ratio':>7}{'same parts':>12}")
    figures = {}
    for tokens in (number for number in TOKENS if number <= recipe.max_tokens):
        cost = figures[tokens] = measure(tokens, recipe, device)
        print(f"{tokens:5}{cost['form']:10.4f}{cost['product']:11.4f}{cost['row']:10.4f}", end="")
        print(f"{cost['product'] / cost['row']:7.0f}{cost['full']:10.4f}{cost['outwards']:12.4f}", end="")
        print(f"{cost['full'] / cost['outwards']:7.1f}{cost['same']:12.0%}", flush=True)
    report.write(options.json, "psm", {"tokens": figures}, recipe=recipe, device=device_name(device))


if __name__ == "__main__":
    main()
