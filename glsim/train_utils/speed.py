"""How fast a model answers."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from common.train.precision import Precision

SHORTEST = 0.2  # seconds that one measurement takes at least


@torch.inference_mode()
def measure_speed(model: nn.Module, images: Tensor, precision: Precision, rounds: int) -> dict[str, Any]:
    """Return images/s and the latency of one batch, images (B, 3, S, S), in milliseconds: medians of `rounds`.

    The forward pass alone is timed, data at hand, after a warm-up. With B = 1 it is the latency of streaming.
    """
    training = model.training
    model.eval()

    def seconds(repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            with precision.autocast():
                model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - started

    seconds(1)
    repeats = max(1, round(SHORTEST / max(seconds(1), 1e-6)))
    latency = statistics.median(seconds(repeats) / repeats for _ in range(rounds))
    model.train(training)
    figures = {"batch_size": len(images), "images_per_s": len(images) / latency, "latency_ms": 1000 * latency}
    return {name: round(value, 4) for name, value in figures.items()}
