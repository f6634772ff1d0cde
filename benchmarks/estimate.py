"""What 4, 8 and 64 GPUs would reach, by arithmetic: bytes of gradients, link speeds, operations. Nothing is measured.

An all-reduce in a ring of n GPUs has each send, and receive, 2 (n - 1) / n times the gradients, over the slowest link.
Bytes, operations and images are those of a step, seconds its duration; MB and GB are 10^6 and 10^9 bytes, as links
are rated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import RIVALS
from benchmarks.tables import table

SIZE, CLASSES = 448, 200  # plain ViT-B/16, as below FFVT
BATCH_SIZE = 16  # images of each GPU
GRADIENT = 4  # bytes a parameter: with bf16 arithmetic too, parameters and gradients are fp32
PEAK = 989e12  # dense bf16 operations a second of an H100 SXM: NVIDIA's data sheet (1,979e12 with sparsity)
SHARE = 0.4  # of PEAK that training reaches: assumed, it is the target for one GPU
BACKWARD = 2 / 3  # of a step: two matrix products for each one of the forward pass


@dataclass(frozen=True)
class Link:
    """What connects the GPUs; bytes a second in one direction."""

    name: str
    rate: float
    source: str


NVLINK = Link("NVLink 4", 450e9, "NVIDIA's data sheet of the H100 SXM: 900 GB/s, both directions together")
PCIE = Link("PCIe 5 x16", 64e9, "the standard's 32 GT/s on each of 16 lanes, its encoding not taken off")
INFINIBAND = Link("InfiniBand NDR", 50e9, "400 Gbit/s a port; nodes of 8 GPUs, one ring, one port a node in it")
TRANSFORM, PHOTOGRAPH = "FFVT CUB train", (500, 375)  # of benchmarks.data: what brings the images
LINKS: Mapping[int, Sequence[Link]] = {4: (NVLINK, PCIE), 8: (NVLINK, PCIE), 64: (INFINIBAND,)}

HEAD = """## Estimate for 4, 8 and 64 GPUs

**An estimate: nothing of it was measured but the images/s that a core brings.** It is for training a plain ViT-B/16 at
{size} px with {batch} images a GPU, in bf16, with fp32 parameters and gradients. Here MB are 10^6 bytes, GB 10^9.

- Gradients: {parameters:,} parameters x {bytes} bytes = {gradients} a step.
- Compute: 3 (a forward pass, and a backward pass of twice its cost) x {forward:.1f} GFLOP x {batch} images =
  {step:.2f} TFLOP a step. At {share:.0%} of {peak:.0f} TFLOP/s that is {compute}, or {rate:.0f} images/s a GPU. The
  peak is an H100 SXM's, dense bf16, by its data sheet; the {share:.0%} are assumed: they are the target for one GPU.
- All-reduce in a ring: each of n GPUs sends 2 (n - 1) / n times the gradients over the slowest link.
{links}
- Nothing hidden is a lower bound. That the all-reduce hides behind the backward pass, 2/3 of the compute, is an upper
  one: the gradients of the first layers are there only at its end.
- Input: cores like those of the machine above, for the images/s of the upper bound, by the transform {transform} of
  photographs of {width} x {height} pixels.
"""


def parameters_and_operations(size: int, classes: int) -> tuple[int, int]:
    """Parameters of the plain ViT-B/16, and floating-point operations of its forward pass of one image."""
    with torch.device("meta"):
        model = RIVALS[0].floor(size, classes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, size, size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def all_reduce_bytes(gpus: int, gradients: float) -> float:
    """What each GPU sends."""
    return 2 * (gpus - 1) / gpus * gradients


def compute_seconds(forward: float, images: int) -> float:
    """Of forward and backward pass, `forward` being the operations of one image's forward pass."""
    return 3 * forward * images / (SHARE * PEAK)


def left_over(all_reduce: float, compute: float) -> float:
    """Seconds of the all-reduce that the backward pass does not hide, all of it being open to that."""
    return max(0.0, all_reduce - BACKWARD * compute)


def efficiency(compute: float, waiting: float) -> float:
    return compute / (compute + waiting)


def section(ours: float | None, kept: float | None) -> str:
    """The part of the page; images/s that one core brings, as measured, without and with --cache-resized."""
    parameters, forward = parameters_and_operations(SIZE, CLASSES)
    gradients, compute = parameters * GRADIENT, compute_seconds(forward, BATCH_SIZE)
    links = {link.name: link for each in LINKS.values() for link in each}.values()
    rated = (f"- {link.name}: {link.rate / 1e9:.0f} GB/s in one direction ({link.source})." for link in links)
    head = HEAD.format(
        size=SIZE,
        batch=BATCH_SIZE,
        parameters=parameters,
        bytes=GRADIENT,
        gradients=_mb(gradients),
        forward=forward / 1e9,
        step=3 * forward * BATCH_SIZE / 1e12,
        share=SHARE,
        peak=PEAK / 1e12,
        compute=_ms(compute),
        rate=BATCH_SIZE / compute,
        links="\n".join(rated),
        transform=TRANSFORM,
        width=PHOTOGRAPH[0],
        height=PHOTOGRAPH[1],
    )
    parts = [head]
    for gpus, between in LINKS.items():
        columns = [_column(gpus, link, gradients, compute, ours, kept) for link in between]
        rows = (f"{name} | {' | '.join(column[name] for column in columns)}" for name in columns[0])
        parts.append(table(f"{gpus} GPUs | {' | '.join(link.name for link in between)}", rows))
    return "\n".join(parts)


def _column(
    gpus: int, link: Link, gradients: float, compute: float, ours: float | None, kept: float | None
) -> dict[str, str]:
    """The arithmetic, row by row."""
    sent = all_reduce_bytes(gpus, gradients)
    all_reduce = sent / link.rate
    left = left_over(all_reduce, compute)
    lower, upper = efficiency(compute, all_reduce), efficiency(compute, left)
    needed = upper * gpus * BATCH_SIZE / compute

    def cores(rate: float | None) -> str:
        return "not measured" if rate is None else f"{needed:,.0f} / {rate:.1f} = {needed / rate:,.1f}"

    return {
        "sent by each GPU": f"2 x {gpus - 1} / {gpus} x {_mb(gradients)} = {_mb(sent)}",
        "all-reduce": f"{_mb(sent)} / {link.rate / 1e9:.0f} GB/s = {_ms(all_reduce)}",
        "efficiency, nothing hidden": f"{_ms(compute)} / ({_ms(compute)} + {_ms(all_reduce)}) = {lower:.1%}",
        "left behind the backward pass": f"max(0, {_ms(all_reduce)} - 2/3 x {_ms(compute)}) = {_ms(left)}",
        "efficiency, hidden behind it": f"{_ms(compute)} / ({_ms(compute)} + {_ms(left)}) = {upper:.1%}",
        "images/s, lower to upper bound": f"{lower * gpus * BATCH_SIZE / compute:,.0f} to {needed:,.0f}",
        "cores for the input": cores(ours),
        "cores, with --cache-resized": cores(kept),
    }


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
