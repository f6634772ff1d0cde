"""GFT as released, and its repository's "TransFG", against the figures recorded of the released classes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from figures import assert_close_to_figures, assert_selects, assert_within, golden, state_dict_figures
from formula import fill, fill_image, fill_state_dict
from torch import Tensor, nn

from gft import GFT, TransFG
from gft.model import TEMPERATURE, HierarchicalAttention, StageSelection, importance

GOLDEN = golden("gft")
ALONE = GOLDEN["hierarchical_attention_tiny"]
LABELS = torch.tensor([3, 7])
CALLS = ["eval", "train_call1", "train_call2"]


@dataclass
class Run:
    """What a model of ViT-B/16 with weights by formula gives; keys are those of the recorded figures."""

    logits: dict[str, list[Tensor]]
    loss: Tensor
    norms: dict[str, Tensor]  # of gradients
    scores: Any = None  # TransFG's, of which `indices` are chosen
    indices: Any = None
    stages: dict[str, list[StageSelection]] = field(default_factory=dict)
    averages: dict[str, list[Tensor]] = field(default_factory=dict)


def built(model: nn.Module) -> Any:
    fill_state_dict(model)
    return model.eval()


def learn(model: nn.Module, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the norms of the gradients of all parameters that get one."""
    loss = F.cross_entropy(logits, LABELS)
    loss.backward()
    norms = {name: p.grad.double().norm() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), norms


def run_gft() -> Run:
    """One evaluation, and two training calls whose averages meet other images in the second.

    In float64: neighbours among the scores are 2e-5 apart, as far as float32 rounds them, and what enters stages 2 and
    3 depends on the order that stage 1 found.
    """
    model, images = built(GFT(num_classes=10, released=True, weight_init="skip")), fill_image(2, 3, 224, 224)
    alone = model(images)
    run = Run({"eval_logits": [alone.detach()]}, *learn(model, alone))
    model, images = model.double(), images.double()
    for call in CALLS:
        model.train(call != "eval")
        with torch.no_grad():
            logits, stages = model(images.flip(3) if call == "train_call2" else images, return_selection=True)
        run.logits.setdefault("train_call2_logits" if call == "train_call2" else "eval_logits", []).append(logits)
        run.stages[call] = stages
        run.averages[call] = list(model.training_state().values())
    return run


def run_transfg() -> Run:
    model = built(TransFG(num_classes=10, weight_init="skip"))
    logits, selection = model(fill_image(2, 3, 224, 224), return_selection=True)
    return Run({"eval_logits": [logits.detach()]}, *learn(model, logits), *selection)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Run]]:
    runs = {"gft": run_gft(), "transfg": run_transfg()}
    yield runs
    runs.clear()


@pytest.mark.parametrize("name", ["gft", "transfg"])
def test_logits(runs: dict[str, Run], name: str) -> None:
    recorded = {key: value for key, value in GOLDEN[name].items() if key.endswith("_logits")}
    assert runs[name].logits.keys() == recorded.keys()
    for key, found in runs[name].logits.items():
        for logits in found:
            assert_within(5e-5, logits, recorded[key], key)


@pytest.mark.parametrize("name", ["gft", "transfg"])
def test_loss_and_gradients(runs: dict[str, Run], name: str) -> None:
    assert_within(1e-5, runs[name].loss, GOLDEN[name]["loss"])
    for key, chk in GOLDEN[name]["grads"].items():
        # A norm has no cancellation: its rounding is a share of it.
        assert_within(1e-5 * chk["norm"], runs[name].norms[key], chk["norm"], key)


def assert_weights(ours: Tensor, recorded: Any, bound: float) -> None:
    """Compare the scores behind weights exp(score / TEMPERATURE): those far below the largest differ by orders."""
    ours, recorded = (torch.as_tensor(weights, dtype=torch.float64).log() for weights in (ours, recorded))
    assert_within(bound, TEMPERATURE * ours, TEMPERATURE * recorded)


@pytest.mark.parametrize("call", CALLS)
def test_importance_and_selection(runs: dict[str, Run], call: str) -> None:
    stages = runs["gft"].stages[call]
    assert [stage.indices.shape[1] for stage in stages] == [147, 98, 49]
    for stage, figures in zip(stages, GOLDEN["gft"][f"{call}_stages"], strict=True):
        for row, chk in zip(stage.importance, figures["importance"], strict=True):
            assert_close_to_figures(row, {key: chk[key] for key in ("shape", "sum", "l2", "wsum")}, sums=1e-5)
            assert_weights(row[: len(chk["first"])], chk["first"], 5e-5)
        chosen = {key: value for key, value in figures.items() if key.startswith("selected_sample")}
        assert chosen
        for key, indices in chosen.items():
            sample = int(key.removeprefix("selected_sample").removesuffix("_first16"))
            assert stage.indices[sample].tolist()[: 16 if "_first16" in key else None] == indices


@pytest.mark.parametrize("call", CALLS)
def test_moving_average(runs: dict[str, Run], call: str) -> None:
    recorded = GOLDEN["gft"].get(f"ema_after_{call.removeprefix('train_')}", [])
    for average, chk in zip(runs["gft"].averages[call], recorded, strict=True):
        assert_close_to_figures(average, chk, sums=1e-6, first=1e-5)


def test_part_scores_and_selection(runs: dict[str, Run]) -> None:
    run, recorded = runs["transfg"], GOLDEN["transfg"]
    for scores, chk in zip(run.scores, recorded["part_scores"], strict=True):
        assert_close_to_figures(scores, chk, sums=2e-6, first=1e-5)
    assert_selects(run.scores[0], run.indices[0].tolist(), recorded["selected_sample0"], 2e-5)


@pytest.mark.parametrize(
    ("name", "released"), [("gft", False), ("gft", True), ("transfg", None)], ids=["described", "released", "transfg"]
)
def test_state_dict_and_parameters(name: str, released: bool | None) -> None:
    """Names, shapes and order are the same on both sides of GFT."""

    def build(num_classes: int) -> nn.Module:
        sides = {} if released is None else {"released": released}
        with torch.device("meta"):
            return (GFT if name == "gft" else TransFG)(num_classes=num_classes, **sides)

    assert state_dict_figures(build(10).state_dict()) == GOLDEN[name]["state_dict"]
    for num_classes, recorded in GOLDEN[name]["param_counts"].items():
        parameters = list(build(int(num_classes)).parameters())
        total = sum(p.numel() for p in parameters)
        if name == "transfg":
            assert total == recorded
            continue
        assert total == recorded["total"]
        if released:
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            assert trained == recorded["that_can_influence_logits"]


@pytest.fixture(scope="module")
def attention() -> dict[str, Any]:
    """GALA alone, on tokens: one evaluation and three training calls, the last a ragged batch."""
    gala = HierarchicalAttention(48, num_heads=3).eval()
    found: dict[str, Any] = {"state_dict": state_dict_figures(gala.state_dict())}
    fill_state_dict(gala)
    first, second = fill("ha_tokens_1", (2, 20, 48)), fill("ha_tokens_2", (2, 20, 48))
    calls = {"eval": first, "train_call1": first, "train_call2": second, "train_call3_batch1": first[:1]}
    for call, tokens in calls.items():
        with torch.no_grad():
            q, k, v = gala.train(call != "eval").heads(tokens)
            found[f"{call}_out"] = gala.attend(q, k, v)
            found[f"{call}_importance"] = importance(gala.score(q, k))
        found[f"{call}_ema"] = gala.ema
    return found


@pytest.mark.parametrize("key", ALONE)
def test_attention_alone(attention: dict[str, Any], key: str) -> None:
    ours, recorded = attention[key], ALONE[key]
    if key == "state_dict":
        assert ours == recorded
    elif key.endswith("_out"):
        assert_close_to_figures(ours, recorded, sums=1e-7)
    elif key.endswith("_importance"):
        assert_weights(ours, recorded, 1e-5)
    else:
        assert_within(1e-5, ours, recorded)
    assert attention["eval_ema"] is None
