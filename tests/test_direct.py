"""benchmarks.direct: the direct formulations and our models are one function, with one gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import direct
from ffvt.model import FFVT
from ffvt.model import Config as FFVTConfig
from gft import GFT, TransFG
from glsim.model_utils.config import ViTConfig
from glsim.model_utils.glsim import ViTGLSim
from glsim.model_utils.transfg import Config as TransFGConfig
from glsim.model_utils.transfg import TransFG as OfficialTransFG

CLASSES, SIDE = 7, 64
SIZES = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "num_layers": 4}
TINY = {"embed_dim": 48, "num_heads": 3, "depth": 9}
BACKBONE = "vit_tiny_patch16_224"


def build_glsim() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 3}
    words: dict[str, Any] = {"dynamic_anchor": True, "reducer": "cls", "aggregator": True, "aggregator_norm": True}
    return ViTGLSim(ViTConfig("vit_t16", image_size=SIDE, num_classes=CLASSES, dynamic_top=3, **words, **sizes))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "plain": (lambda: timm.create_model(BACKBONE, num_classes=CLASSES, img_size=SIDE, **TINY), direct.plain_vit),
    "ffvt": (lambda: FFVT(FFVTConfig(**SIZES), SIDE, CLASSES, num_token=3), direct.ffvt),
    "transfg": (lambda: OfficialTransFG(TransFGConfig(**SIZES), SIDE, CLASSES), direct.official_transfg),
    "glsim": (build_glsim, direct.glsim),
    "gft": (lambda: GFT(BACKBONE, CLASSES, SIDE, **TINY), direct.gft),
    "gft released": (lambda: GFT(BACKBONE, CLASSES, SIDE, released=True, **TINY), direct.gft),
    "gft's transfg": (lambda: TransFG(BACKBONE, CLASSES, SIDE, num_parts=5, **TINY), direct.transfg),
}


def logits_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(params=MODELS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A model of random parameters in float64, no head zero, and its direct formulation."""
    build, formulation = MODELS[request.param]
    torch.manual_seed(0)
    model = build().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, formulation


def test_evaluation_is_equal(pair: tuple[nn.Module, Callable[..., Tensor]]) -> None:
    model, formulation = pair
    model.eval()
    images = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64)
    with torch.inference_mode():
        ours, theirs = logits_of(model(images)), formulation(model, images)
    assert ours.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_training_step_is_equal(pair: tuple[nn.Module, Callable[..., Tensor]]) -> None:
    """Gradients. Dropout is off: the direct formulation draws it for more rows of a last block."""
    model, formulation = pair
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images, labels = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64), torch.tensor([0, 3, 5, 6])
    gradients = []
    for forward in (lambda: logits_of(model(images)), lambda: formulation(model, images)):
        model.zero_grad()
        F.cross_entropy(forward(), labels).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-7, atol=1e-9, msg=name)
