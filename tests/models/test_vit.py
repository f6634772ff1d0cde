"""common.models.vit: a last block computed no further than it is used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import Tensor, nn

from common.models.vit import Use, run_used

WIDTH, HEADS = 48, 3


def block(**words: Any) -> Block:
    torch.manual_seed(0)
    return Block(WIDTH, HEADS, qkv_bias=True, init_values=0.5, **words).double()


def tokens() -> Tensor:
    return torch.randn(2, 10, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def learnt_from_cls(run: Callable[[Tensor], Tensor], own: nn.Module) -> list[Tensor]:
    """Gradients of the input and of all parameters under a loss that reads CLS alone."""
    x = tokens().requires_grad_()
    run(x)[:, 0].square().sum().backward()
    assert x.grad is not None
    found = [x.grad, *(p.grad.clone() for p in own.parameters() if p.grad is not None)]
    own.zero_grad()
    return found


@pytest.mark.parametrize("patches", ["learnt", "seen", "unread"])
def test_values_and_what_cls_teaches_are_those_of_the_whole_block(patches: Use) -> None:
    own = block()
    whole, used = own(tokens()), run_used(own, tokens(), patches)
    assert used.shape == (2, 1 if patches == "unread" else 10, WIDTH)
    torch.testing.assert_close(used, whole[:, : used.shape[1]], rtol=1e-12, atol=1e-12)
    both = learnt_from_cls(own, own), learnt_from_cls(lambda x: run_used(own, x, patches), own)
    assert len(both[0]) == 1 + len(list(own.parameters()))
    torch.testing.assert_close(both[1], both[0], rtol=1e-12, atol=1e-12)


def test_seen_patches_teach_nothing() -> None:
    x = tokens().requires_grad_()
    run_used(block(), x, "seen")[:, 1:].sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_stochastic_depth_and_other_blocks_are_run_whole() -> None:
    torch.manual_seed(0)
    other: Any = ParallelScalingBlock(WIDTH, HEADS, qkv_bias=True).double()
    for own, patches in ((block(drop_path=0.5), "seen"), (other, "unread")):
        torch.manual_seed(3)
        whole = own(tokens())
        torch.manual_seed(3)
        assert run_used(own, tokens(), patches).equal(whole)
