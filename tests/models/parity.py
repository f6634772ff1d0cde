"""What the model tests share: a tiny backbone, the recorded figures, their comparison, a plain attention."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from formula import check_figures
from torch import Tensor, nn

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gft.json").read_text())
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 9, "num_heads": 3, "num_classes": 7}
LABELS = torch.tensor([3, 7])


def state_dict_figures(model: nn.Module) -> dict[str, Any]:
    """Return the number of entries and the SHA-1 of their names and shapes, in order."""
    entries = model.state_dict().items()
    lines = (f"{key}:{'x'.join(str(side) for side in value.shape)}\n" for key, value in entries)
    return {"n": len(entries), "sha1": hashlib.sha1("".join(lines).encode()).hexdigest()}


def assert_figures(tensor: Tensor, recorded: dict[str, Any], rtol: float, atol: float) -> None:
    """Compare a tensor with a recorded `chk` object: shape and sums to `atol`, first values to `rtol`."""
    ours = check_figures(tensor)
    assert ours["shape"] == recorded["shape"]
    for name in ("sum", "l2", "wsum"):
        assert abs(ours[name] - recorded[name]) <= atol, f"{name}: {ours[name]} and not {recorded[name]}"
    first = torch.tensor(recorded["first"], dtype=torch.float64)
    torch.testing.assert_close(tensor.double().flatten()[: len(first)], first, rtol=rtol, atol=0)


def plain_attention(attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (N, D) and the raw scores (H, N, N) for the tokens (N, D) of one image, by the definition."""
    width = tokens.shape[-1] // attention.num_heads
    q_weight, k_weight, v_weight = attention.qkv.weight.chunk(3)
    outputs, raw_scores = [], []
    for head in range(attention.num_heads):
        rows = slice(head * width, (head + 1) * width)
        q, k, v = tokens @ q_weight[rows].T, tokens @ k_weight[rows].T, tokens @ v_weight[rows].T
        raw = q @ k.T / math.sqrt(width)
        outputs.append(raw.exp() / raw.exp().sum(-1, keepdim=True) @ v)
        raw_scores.append(raw)
    out = torch.cat(outputs, dim=-1) @ attention.proj.weight.T + attention.proj.bias
    return out, torch.stack(raw_scores)
