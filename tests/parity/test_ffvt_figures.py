"""FFVT's model against the figures recorded of the released class: built by formula, and loaded from Google's .npz."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from figures import assert_close_at, assert_close_to_figures, assert_selects, assert_within, golden, state_dict_figures
from formula import fill, fill_image, fill_npz, vit_spec
from torch import Tensor, nn

from common.models.vit import run_block
from common.weights import LoadReport
from ffvt.model import CONFIGS, FFVT, Config, maws_scores, resnet_unit

GOLDEN = golden("ffvt")
LABELS = torch.tensor([3, 7])
TINY = Config(hidden_size=48, mlp_dim=96, num_heads=3, num_layers=4)
B16, B32, R50 = (CONFIGS[name] for name in ("ViT-B_16", "ViT-B_32", "R50-ViT-B_16"))
# What was recorded: configuration, image size, picked tokens a block (None: no fusion).
MODELS: dict[str, tuple[Config, int, int | None]] = {
    "tiny_ff1": (TINY, 64, 3),
    "tiny_ff0": (TINY, 64, None),
    "b16_224_ff12": (B16, 224, 12),
    "b16_224_off": (B16, 224, None),
    "b32_224_off": (B32, 224, None),
    "r50_448_ff12": (R50, 448, 12),
    "r50_224_ff12": (R50, 224, 12),
    "r50_224_off": (R50, 224, None),
}
filled = functools.cache(fill)  # the full-size models share most of their entries


@pytest.fixture(autouse=True, scope="module")
def forget_filled() -> Iterator[None]:
    yield
    filled.cache_clear()


@torch.no_grad()
def build(config: Config, size: int, num_token: int | None) -> FFVT:
    """The model, filled by the keys that its entries have in a released file."""
    with torch.device("meta"):
        model = FFVT(config, size, 10, num_token is not None, num_token or 12)
    model = model.to_empty(device="cpu").eval()
    shapes = {key: tuple(value.shape) for key, value in model.released_state_dict().items()}
    model.load_released({key: filled(key, shape) for key, shape in shapes.items()})
    return model


def images(size: int) -> Tensor:
    return fill_image(2, 3, size, size)


@dataclass
class Run:
    """What a model of GOLDEN["models"] gives, by the smoothing of its loss."""

    figures: dict[str, Any]
    parameters: int
    state_dict: dict[str, Any]
    losses: dict[str, Tensor] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)
    selection: list[list[tuple[Tensor, list[list[int]]]]] = field(default_factory=list)  # scores, picked of each block
    norms: dict[str, dict[str, float]] = field(default_factory=dict)  # of gradients, under the released names


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest) -> Run:
    """Evaluation gives one loss, and training without dropout the other: both have the recorded figures."""
    model, figures = build(*MODELS[request.param]), GOLDEN["models"][request.param]
    run = Run(figures, sum(p.numel() for p in model.parameters()), state_dict_figures(model.released_state_dict()))
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    scores: list[Tensor] = []
    for training, smoothing in enumerate(figures["losses"]):
        model.train(bool(training)).smoothing_value = float(smoothing)
        for dropout in dropouts if training else ():
            dropout.p = 0.0
        scores.clear()
        with torch.set_grad_enabled("training" in figures), pytest.MonkeyPatch.context() as patch:
            patch.setattr("ffvt.model.maws_scores", lambda q, k: scores.append(maws_scores(q, k)) or scores[-1])
            loss, logits, selection = model(images(MODELS[request.param][1]), LABELS, return_selection=True)
        run.losses[smoothing] = loss.detach()
        run.logits.append(logits.detach())
        run.selection.append([(s, picked.tolist()) for s, picked in zip(scores, selection, strict=True)])
        if loss.requires_grad:
            model.zero_grad()
            loss.backward()
            grads = model.released_state_dict(
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            )
            run.norms[smoothing] = {key: grad.double().norm().item() for key, grad in grads.items()}
    return run


def test_parameters_and_state_dict(run: Run) -> None:
    assert run.parameters == run.figures["num_params"]
    assert run.state_dict == run.figures.get("state_dict", run.state_dict)


def test_logits(run: Run) -> None:
    for logits in run.logits:
        assert_within(5e-5, logits, run.figures["logits"])


def test_selection(run: Run) -> None:
    """Two picked tokens of one image have scores 5e-6 of each other: rounding may change their places."""
    for selection in run.selection:
        for (scores, ours), recorded in zip(selection, run.figures.get("selection", []), strict=True):
            for image in range(2):
                assert_selects(scores[image].log(), ours[image], recorded[image], 5e-5)


def test_losses(run: Run) -> None:
    for smoothing, loss in run.figures["losses"].items():
        assert_within(5e-5, run.losses[smoothing], loss, smoothing)  # R50's is 2e-5 from float64, all others 2e-6
    for smoothing, figures in run.figures.get("training", {}).items():
        assert_within(1e-5, run.losses[smoothing], figures["loss"], smoothing)


def test_gradients(run: Run) -> None:
    for smoothing, figures in run.figures.get("training", {}).items():
        norms, total = run.norms[smoothing], figures["total_grad_norm"]
        for key, norm in figures["grad_norms"].items():
            # Biases of keys have no gradient in real numbers: what is there is the rounding of the others.
            assert_within(1e-5 * norm + 1e-6, norms[key], norm, key)
        assert_within(1e-5 * total, math.hypot(*norms.values()), total)


@pytest.fixture(scope="module")
def npz_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    specs = {"tiny": vit_spec(), "b16": vit_spec(768, 12, 3072, 12, 14)}
    files = {name: tmp_path_factory.mktemp("npz") / f"{name}.npz" for name in specs}
    for name, path in files.items():
        fill_npz(path, specs[name])
    yield files
    files["b16"].unlink()  # 340 MB


class Loaded(NamedTuple):
    """What a model of GOLDEN["npz"] gives behind loading, at one image size."""

    figures: dict[str, Any]
    at_size: dict[str, Any]
    model: FFVT
    report: LoadReport
    left: list[str]
    state: dict[str, Tensor]
    logits: Tensor


SIZES = [(name, size) for name, figures in GOLDEN["npz"].items() for size in figures["sizes"]]


@pytest.fixture(scope="module", params=SIZES, ids="-".join)
@torch.no_grad()
def loaded(request: pytest.FixtureRequest, npz_files: dict[str, Path]) -> Loaded:
    name, size = request.param
    file, fusion = name.split("_")
    config, num_token = (TINY, 3) if file == "tiny" else (B16, 12)
    model, figures = build(config, int(size), num_token if fusion == "ff1" else None), GOLDEN["npz"][name]
    report, state = model.load_npz(npz_files[file]), model.released_state_dict()
    left = [key for key, value in state.items() if torch.equal(value, filled(key, tuple(value.shape)))]
    for key in ("head.weight", "head.bias"):
        state[key] = state[key].clone()
        model.get_parameter(f"base_model.{key}").copy_(filled(key, tuple(state[key].shape)))
    return Loaded(figures, figures["sizes"][size], model, report, left, state, model(images(int(size))))


def test_npz_parameters(loaded: Loaded) -> None:
    for key, chk in loaded.figures["params"].items():
        assert_close_to_figures(loaded.state[key], chk, what=key)


def test_npz_position_embedding(loaded: Loaded) -> None:
    position = loaded.state["transformer.embeddings.position_embeddings"]
    assert_close_to_figures(position, loaded.at_size["position"])
    assert_close_at(position[0], loaded.at_size["position_at"], 1e-6)


def test_npz_entries_that_are_left(loaded: Loaded) -> None:
    """With fusion the last block and the norm, the fusion layer, keep their initialisation; the head is zero."""
    assert loaded.left == loaded.figures["left"]
    assert not any(loaded.state[key].any() for key in ("head.weight", "head.bias"))
    fusion = (f"base_model.blocks.{len(loaded.model.base_model.blocks) - 1}.", "base_model.norm.")
    behind = (*(fusion if loaded.model.feature_fusion else ()), "base_model.head.")
    assert set(loaded.report.left) == {key for key in loaded.model.state_dict() if key.startswith(behind)}
    assert {*loaded.report.loaded, *loaded.report.left} == set(loaded.model.state_dict())


def test_npz_logits(loaded: Loaded) -> None:
    assert_within(5e-5, loaded.logits, loaded.at_size["logits"])


@torch.no_grad()
def test_npz_with_its_head(npz_files: dict[str, Path]) -> None:
    model, figures = build(*MODELS["tiny_ff1"]), GOLDEN["npz"]["tiny_ff1"]["with_head"]
    report = model.load_npz(npz_files["tiny"], zero_head=False)
    for key, chk in figures["params"].items():
        assert_close_to_figures(model.released_state_dict()[key], chk, what=key)
    assert not any("head" in key for key in report.left)
    assert_within(5e-5, model(images(64)), figures["logits"])


@torch.no_grad()
def test_a_block_alone_where_its_epsilon_matters() -> None:
    model, prefix, alone = build(*MODELS["tiny_ff1"]), "transformer.encoder.layer.0.", GOLDEN["block"]
    state = model.released_state_dict()
    state |= {key: fill(key.removeprefix(prefix), v.shape) for key, v in state.items() if key.startswith(prefix)}
    model.load_released(state)
    hidden, q, k = run_block(model.base_model.blocks[0], 1e-3 * fill("ln_probe", (2, 5, 48)))
    assert_within(1e-5, hidden[0, :2], alone["hidden"])
    assert_close_to_figures(hidden, alone["hidden_chk"])
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    assert_within(1e-6, scores.softmax(-1)[0, 0], alone["probs"])
    assert_within(1e-6, scores.softmax(-2)[0, :, :, 0], alone["contribution"])


@torch.no_grad()
def test_a_resnet_unit_alone() -> None:
    unit, alone = resnet_unit(64, 128, stride=2).eval(), GOLDEN["resnet_unit"]
    for name, parameter in unit.named_parameters():
        released = name.replace("downsample.norm", "gn_proj").replace("downsample.conv", "downsample")
        parameter.copy_(fill(released.replace("norm", "gn"), parameter.shape))
    out = unit(fill_image(1, 64, 6, 6))
    # The shortcut's epsilon, 1e-5 and not 1e-6, moves the sum by 9e-8 of itself; rounding does by 5e-9.
    assert_close_to_figures(out, alone["out"], sums=5e-8)
    assert_within(1e-5, out.flatten()[: len(alone["first"])], alone["first"])
