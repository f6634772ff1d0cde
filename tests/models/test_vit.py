"""common.models.vit: a last block computed no further than it is used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.models.vit import Use, run_used
from glsim.model_utils.config import ViTConfig
from glsim.model_utils.glsim import ViTGLSim
from glsim.model_utils.timm_glsim import GLSimTimm

WIDTH, HEADS = 48, 3
CROPPING: dict[str, Any] = {"dynamic_anchor": True, "dynamic_top": 3, "reducer": "cls", "aggregator": True}


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


def build_published(image_size: int = 64) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 12}
    return ViTGLSim(ViTConfig("vit_t16", image_size=image_size, num_classes=7, **CROPPING, **sizes))


def build_timm(image_size: int = 64) -> nn.Module:
    sizes = {"embed_dim": 64, "num_heads": 2, "depth": 12}
    return GLSimTimm("glsvit_tiny_patch16_224", image_size=image_size, num_classes=7, model_kwargs=sizes, **CROPPING)


BUILD = pytest.mark.parametrize("build", [build_published, build_timm], ids=["published", "timm"])


def run_all_whole(patch: pytest.MonkeyPatch) -> None:
    for module in ("glsim.model_utils.glsim", "glsim.model_utils.timm_glsim"):
        patch.setattr(f"{module}.run_used", lambda own, x, _: own(x))


@BUILD
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_a_training_step_is_that_of_whole_blocks(
    build: Callable[[], Any], checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build().double().train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.set_grad_checkpointing(checkpointed)
    images = torch.rand(3, 3, 64, 64, dtype=torch.float64)
    found = []
    for _ in range(2):
        model.zero_grad()
        logits, crops = model(images)
        logits.square().sum().backward()
        found.append([logits, crops, *(p.grad for p in model.parameters() if p.grad is not None)])
        run_all_whole(monkeypatch)
    assert found[0][2:]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@BUILD
@pytest.mark.parametrize(("training", "saved"), [(True, 5 / 6 * 5 / 72), (False, 5 / 6 / 24)], ids=["train", "eval"])
def test_two_passes_cost_less_than_two(
    build: Callable[[int], nn.Module], training: bool, saved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 224 px. Of 2 x 12 blocks forward and twice as much backward: 5/6 x (1 + 2) and 5/6 x 2 of a block's less."""
    model, counted = build(224).train(training), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            logits = model(torch.zeros(1, 3, 224, 224))[0]
            if training:
                logits.sum().backward()
        counted.append(counter.get_total_flops())
        run_all_whole(monkeypatch)
    assert counted[0] / counted[1] == pytest.approx(1 - saved, abs=0.01)
