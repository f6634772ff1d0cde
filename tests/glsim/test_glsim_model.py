"""glsim.model_utils: the figures of the released class, the published crop, files there and back, and refusals."""

import copy
import functools
import hashlib
import json
import math
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from formula import check_figures, fill, fill_image, fill_npz, fill_state_dict, vit_spec
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.errors import UserError
from common.models.vit import run_block
from common.npz import google_to_timm, read_npz
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.model_utils.config import MODEL_NAMES, WITHOUT_EFFECT
from glsim.model_utils.glsim import bounding_boxes, crop, similarity

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glsim.json").read_text())
LABELS = torch.tensor([3, 7])
B16 = {"model_name": "vit_b16", "num_classes": 10}
T16 = {"model_name": "vit_t16", "num_hidden_layers": 4, "num_classes": 10}
CROP = {"dynamic_anchor": True, "dynamic_top": 8}
AGGREGATOR = {"reducer": "cls", "aggregator": True, "aggregator_norm": True}
METHOD = {**CROP, **AGGREGATOR, "anchor_class_token": True}
T16_96 = {**T16, **METHOD, "image_size": 96, "dynamic_top": 4}
RECORDED = {
    "tiny_224_cos": {**T16, **METHOD},
    "tiny_224_l1": {**T16, **METHOD, "sim_metric": "l1"},
    "tiny_224_l2": {**T16, **METHOD, "sim_metric": "l2"},
    "tiny_224_noanchor": T16,
    "tiny_96_top4": T16_96,
    "tiny_96_top1": {**T16_96, "dynamic_top": 1},
    "tiny_96_repr128": {**T16_96, "representation_size": 128},
    "tiny_96_agg2": {**T16_96, "aggregator_num_hidden_layers": 2},
    "tiny_96_no_aggregator_norm": {**T16_96, "aggregator_norm": False},
    "tiny_96_avg_cls": {**T16_96, "classifier": "avg_cls"},
    "tiny_96_max_cls": {**T16_96, "classifier": "max_cls"},
    "tiny_96_anchor_no_aggregator_no_reducer": {**T16, **CROP, "image_size": 96, "dynamic_top": 4},
    "b16_224_cos": {**B16, **METHOD},
    "b16_224_l2": {**B16, **METHOD, "sim_metric": "l2"},
    "b16_224_plain": B16,
}
# The smallest model of the tests below: 4 x 4 patches, 2 blocks, a crop around 3 patches.
SMALL = {
    **{"model_name": "vit_t16", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
    **{"num_hidden_layers": 2, "num_classes": 10, "image_size": 64},
}
SMALL_METHOD = {**SMALL, **METHOD, "dynamic_top": 3}
KINDS = {
    "method": SMALL_METHOD,
    "plain": SMALL,
    "plain_cls_token_alone": {**SMALL, "reducer": "cls"},
    "no_reducer": {**SMALL_METHOD, "reducer": None},
    "no_aggregator": {**SMALL_METHOD, "aggregator": False, "aggregator_norm": False},
    "two_aggregator_blocks": {**SMALL_METHOD, "aggregator_num_hidden_layers": 2},
    "wider": {**SMALL_METHOD, "representation_size": 128},
    "avg_cls": {**SMALL_METHOD, "classifier": "avg_cls"},
    "max_cls": {**SMALL_METHOD, "classifier": "max_cls"},
    "pool": {**SMALL, "classifier": "pool"},
    "no_encoder_norm": {**SMALL_METHOD, "encoder_norm": False},
    "stochastic_depth": {**SMALL_METHOD, "sd": 0.1},
}
KIND = pytest.mark.parametrize("kind", KINDS)
filled = functools.cache(fill)  # the full-size models share most of their entries


@pytest.fixture(autouse=True, scope="module")
def forget_filled():
    yield
    filled.cache_clear()


def build(options, **others):
    return ViTGLSim(ViTConfig(**{**options, **others}))


def fill_released(model):
    """Fill a model by the keys that its entries have in a released file."""
    released = model.released_state_dict()
    model.load_released({key: filled(key, tuple(value.shape)) for key, value in released.items()})
    return model.eval()


def small(kind="method", **others):
    return fill_released(build(KINDS[kind], **others))


def images(batch=2, size=64):
    return fill_image(batch, 3, size, size)


def logits_of(output):
    return output[0] if isinstance(output, tuple) else output


def close_to(figures, rtol=5e-7):
    atol = rtol * max(1.0, figures["abs_sum"])
    return {key: value if key == "shape" else pytest.approx(value, abs=atol) for key, value in figures.items()}


def state_dict_figures(state):
    lines = "".join(f"{key}:{'x'.join(map(str, value.shape))}\n" for key, value in state.items())
    return {"n": len(state), "sha1": hashlib.sha1(lines.encode()).hexdigest()}


# The recorded figures of the released class.


class Run(NamedTuple):
    """A recorded model, what it gave for the recorded images, and what was recorded."""

    figures: dict[str, Any]
    model: ViTGLSim
    images: Tensor
    output: tuple[Any, ...]  # with ret_dist
    encoded: list[Tensor]  # tokens of the image, and of the crop where there is one
    reduced: Tensor


@pytest.fixture(scope="module", params=RECORDED)
def run(request):
    model = fill_released(build(RECORDED[request.param]))
    batch, encoded, reduced = images(size=model.config.image_size), [], []
    hooks = [
        module.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        for module, seen in ((model.base_model.norm, encoded), (model.reducer, reduced))
    ]
    with torch.no_grad():
        output = model(batch, ret_dist=True)
    for hook in hooks:
        hook.remove()
    return Run(GOLDEN["models"][request.param], model, batch, output, encoded, reduced[0])


def test_logits_equal_the_released_class(run):
    assert len(run.output) == run.figures["outputs"][1]
    torch.testing.assert_close(run.output[0], torch.tensor(run.figures["logits"]), atol=5e-5, rtol=0)
    with torch.no_grad():
        output = run.model(run.images)
    assert (len(output) if isinstance(output, tuple) else 1) == run.figures["outputs"][0]
    torch.testing.assert_close(logits_of(output), run.output[0], atol=5e-6, rtol=0)


def test_tokens_and_attention_equal_the_released_class(run):
    x, inter, probabilities, scores = run.output[-4:]
    assert check_figures(x) == close_to(run.figures["x_norm"])
    assert torch.equal(x, run.encoded[0])
    assert len(inter) == len(probabilities) == len(scores) == run.model.config.num_hidden_layers
    if "inter" in run.figures:
        assert [check_figures(tokens) for tokens in inter] == [close_to(chk) for chk in run.figures["inter"]]
        for ours, name in ((probabilities, "probabilities"), (scores, "scores")):
            assert [check_figures(ours[i]) for i in (0, -1)] == [close_to(chk) for chk in run.figures[name]], name


def test_selection_and_crops_equal_the_released_class(run):
    if "selection" not in run.figures:
        assert len(run.encoded) == 1
        return
    found, figures = run.model.select(run.output[2]), run.figures["selection"]
    assert found.indices.tolist() == figures["indices"]
    assert found.boxes.tolist() == figures["boxes"]
    values = found.similarity.gather(1, found.indices)
    torch.testing.assert_close(values, torch.tensor(figures["values"]), atol=1e-6, rtol=1e-5)
    assert [check_figures(row) for row in found.similarity] == [close_to(chk) for chk in figures["similarity"]]
    assert [check_figures(image) for image in run.output[1]] == [close_to(chk) for chk in run.figures["crops"]]
    assert check_figures(torch.cat(run.encoded, dim=1)) == close_to(run.figures["pre_reducer"])
    assert check_figures(run.reduced) == close_to(run.figures["post_reducer"])


@pytest.mark.parametrize("name", [name for name, figures in GOLDEN["models"].items() if "training" in figures])
def test_loss_and_gradients_equal_the_released_class_in_training(name):
    model, figures = fill_released(build(RECORDED[name], hidden_dropout_prob=0.0)), GOLDEN["models"][name]["training"]
    loss = F.cross_entropy(logits_of(model.train()(images(size=model.config.image_size))), LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(figures["loss"], abs=1e-5)
    assert [name for name, p in model.named_parameters() if p.grad is None] == figures["without_grad"]
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    grads = model.released_state_dict()
    for key, norm in figures["grad_norms"].items():
        assert grads[key].double().norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-6), key
    total = sum(grad.double().square().sum().item() for grad in grads.values())
    assert math.sqrt(total) == pytest.approx(figures["total_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", RECORDED)
def test_names_shapes_order_and_parameters_are_the_released_ones(name):
    figures = GOLDEN["models"][name]
    with torch.device("meta"):
        model = build(RECORDED[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == figures["num_params"]
    if "state_dict" in figures:
        assert state_dict_figures(model.released_state_dict()) == figures["state_dict"]


def recorded_config(name):
    return GOLDEN["models"]["tiny_224_cos"]["config"] | GOLDEN["models"][name]["config"]


@pytest.mark.parametrize("name", RECORDED)
def test_configuration_equals_the_released_one(name):
    config, recorded = ViTConfig(**RECORDED[name]), recorded_config(name)
    ours = {key: getattr(config, key) for key in recorded}
    ours["anchor_resize_size"] = ours["anchor_resize_size"] or False  # None and False say the same
    assert json.loads(json.dumps(ours)) == recorded


@pytest.mark.parametrize("name", RECORDED)
def test_a_configuration_given_in_full_is_the_same(name):
    known = {field.name for field in fields(ViTConfig)}
    recorded = {key: value for key, value in recorded_config(name).items() if key in known}
    with torch.device("meta"):
        ours, theirs = (build(options).released_state_dict() for options in (RECORDED[name], recorded))
    assert state_dict_figures(ours) == state_dict_figures(theirs)


@torch.no_grad()
def test_a_block_alone_equals_the_released_one_where_its_epsilon_matters():
    model, prefix = build(SMALL, hidden_size=48, num_attention_heads=3, intermediate_size=96), "encoder.blocks.0."
    state = model.released_state_dict()
    state |= {key: fill(key.removeprefix(prefix), v.shape) for key, v in state.items() if key.startswith(prefix)}
    model.load_released(state)
    hidden, q, k = run_block(model.eval().base_model.blocks[0], 1e-3 * fill("ln_probe", (2, 5, 48)))
    alone = GOLDEN["block"]
    torch.testing.assert_close(hidden[0, :2], torch.tensor(alone["hidden"]), atol=1e-5, rtol=0)
    assert check_figures(hidden) == close_to(alone["hidden_chk"])
    scores = (q @ k.mT / math.sqrt(q.shape[-1]))[0, 0]
    torch.testing.assert_close(scores, torch.tensor(alone["scores"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.softmax(-1), torch.tensor(alone["probabilities"]), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_released_checkpoint_loads_and_flipping_averages_the_recorded_logits():
    figures, cos = GOLDEN["wrapped"], GOLDEN["models"]["b16_224_cos"]
    assert (figures["config"], figures["logits"]) == (cos["config"], cos["logits"])  # the same model, without flipping
    model = build(RECORDED["b16_224_cos"], test_flip=True).eval()
    checkpoint = {f"model.{key}": filled(key, tuple(v.shape)) for key, v in model.released_state_dict().items()}
    assert state_dict_figures(checkpoint) == figures["state_dict"]
    model.load_released(checkpoint)
    logits, crops = model(images(size=224))
    torch.testing.assert_close(logits, torch.tensor(figures["logits_test_flip"]), atol=5e-5, rtol=0)
    assert crops.shape == (2, 3, 224, 224)


@KIND
@torch.no_grad()
def test_flipping_averages_two_images_in_evaluation_alone(kind):
    plain, flipping = small(kind), small(kind, test_flip=True)
    one, other = (logits_of(plain(batch)) for batch in (images(), images().flip(-1)))
    torch.testing.assert_close(logits_of(flipping(images())), (one + other) / 2, atol=1e-6, rtol=0)
    with_dist, without = flipping(images(), ret_dist=True), plain(images(), ret_dist=True)
    torch.testing.assert_close(with_dist[0], logits_of(flipping(images())), atol=1e-6, rtol=0)
    assert torch.equal(with_dist[-4], without[-4])  # all else is of the image as it is
    outputs = []
    for model in (plain, flipping):
        torch.manual_seed(0)
        outputs.append(logits_of(model.train()(images())))
    assert torch.equal(*outputs)


# The published selection and crop, written out: loops over images.


def published_boxes(indices, grid, patch_size):
    """Return the boxes of the published pseudo-code: x are rows, y columns."""
    boxes, side = [], grid * patch_size
    for row in indices.tolist():
        ind_x, ind_y = [i // grid for i in row], [i % grid for i in row]
        x_i, y_i = min(ind_x) * patch_size, min(ind_y) * patch_size
        x_f, y_f = max(ind_x) * patch_size, max(ind_y) * patch_size
        x_1, y_1 = min(max(x_f, x_i + patch_size), side), min(max(y_f, y_i + patch_size), side)
        boxes.append([max(x_i, 0), x_1, max(y_i, 0), y_1])
    return boxes


def published_crops(batch, boxes):
    crops = [
        F.interpolate(image[None, :, x_0:x_1, y_0:y_1], image.shape[-2:], mode="bilinear", align_corners=True)
        for image, (x_0, x_1, y_0, y_1) in zip(batch, boxes, strict=True)
    ]
    return torch.cat(crops)


def random_indices(batch, grid, top, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, grid * grid, generator=generator).topk(top).indices


@pytest.mark.parametrize(("grid", "patch_size"), [(1, 16), (4, 16), (6, 16), (14, 16), (7, 32), (16, 14)])
def test_boxes_equal_the_published_pseudo_code(grid, patch_size):
    for top in {1, 2, min(3, grid * grid), min(8, grid * grid)} & set(range(1, grid * grid + 1)):
        indices = random_indices(200, grid, top)
        assert bounding_boxes(indices, grid, patch_size).tolist() == published_boxes(indices, grid, patch_size)
    every = torch.arange(grid * grid)[:, None]  # every single patch, the corners and borders too
    assert bounding_boxes(every, grid, patch_size).tolist() == published_boxes(every, grid, patch_size)


def test_an_inclusive_box_holds_every_selected_patch_and_no_row_or_column_more():
    for top in (1, 2, 8):
        indices = random_indices(200, 6, top)
        for row, (x_0, x_1, y_0, y_1) in zip(
            indices.tolist(), bounding_boxes(indices, 6, 16, inclusive=True).tolist(), strict=True
        ):
            rows, columns = {i // 6 for i in row}, {i % 6 for i in row}
            assert (x_0, x_1) == (16 * min(rows), 16 * max(rows) + 16)
            assert (y_0, y_1) == (16 * min(columns), 16 * max(columns) + 16)
    corners = torch.tensor([[0, 35]])
    assert bounding_boxes(corners, 6, 16, inclusive=True).tolist() == [[0, 96, 0, 96]]
    assert bounding_boxes(corners, 6, 16).tolist() == [[0, 80, 0, 80]]


@torch.no_grad()
def test_the_model_cuts_off_the_last_patch_unless_told_otherwise():
    published, inclusive = small(), small(crop_inclusive=True)
    tokens = published(images(), ret_dist=True)[2]
    indices = published.select(tokens).indices
    assert torch.equal(inclusive.select(tokens).indices, indices)
    for model, boxes in (
        (published, bounding_boxes(indices, 4, 16)),
        (inclusive, bounding_boxes(indices, 4, 16, True)),
    ):
        assert torch.equal(model.select(tokens).boxes, boxes)
        assert torch.equal(model(images())[1], crop(images(), boxes))
    assert not torch.equal(published(images())[0], inclusive(images())[0])


@pytest.mark.parametrize("boxes", ["random", "one_patch", "border", "whole"])
@pytest.mark.parametrize(("grid", "patch_size"), [(4, 16), (14, 16), (3, 32), (8, 14)])
def test_cropping_a_batch_at_once_equals_cropping_one_image_after_another(grid, patch_size, boxes):
    side = grid * patch_size
    boxes = {
        "random": bounding_boxes(random_indices(16, grid, 4), grid, patch_size),
        "one_patch": bounding_boxes(random_indices(16, grid, 1), grid, patch_size),
        "border": bounding_boxes(
            torch.tensor([[0], [grid - 1], [grid * (grid - 1)], [grid * grid - 1]]), grid, patch_size
        ),
        "whole": torch.tensor([[0, side, 0, side], [0, patch_size, 0, side], [side - patch_size, side, 0, side]]),
    }[boxes]
    batch = torch.rand(len(boxes), 3, side, side, generator=torch.Generator().manual_seed(1))
    crops = crop(batch, boxes)
    assert (crops.dtype, crops.shape) == (torch.float32, batch.shape)
    exact = published_crops(batch.double(), boxes.tolist())
    torch.testing.assert_close(crops.double(), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(crop(batch.double(), boxes), exact, atol=1e-12, rtol=0)
    # The loop in float32, as released, is itself off by 1e-5 pixels.
    torch.testing.assert_close(crops, published_crops(batch, boxes.tolist()), atol=5e-5, rtol=0)


@torch.no_grad()
def test_a_model_crops_as_the_loop_does():
    model = small()
    _, crops, x, *_ = model(images(5), ret_dist=True)
    found = model.select(x)
    assert found.boxes.tolist() == published_boxes(found.indices, 4, 16)
    torch.testing.assert_close(crops, published_crops(images(5), found.boxes.tolist()), atol=5e-5, rtol=0)


def reference_similarity(tokens, metric):
    """Return the similarities of one image's patches to its CLS, one pair at a time in float64."""
    cls, *patches = np.asarray(tokens, dtype=np.float64)
    by_metric = {
        "cos": lambda g, p: np.dot(g, p) / (np.sqrt(np.dot(g, g)) * np.sqrt(np.dot(p, p))),
        "l1": lambda g, p: np.mean(np.abs(g - p)),
        "l2": lambda g, p: np.mean((g - p) ** 2),
    }
    return np.array([by_metric[metric](cls, patch) for patch in patches])


METRICS = pytest.mark.parametrize("metric", ["cos", "l1", "l2"])


@METRICS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_similarity_equals_its_definition_and_is_never_of_half_precision(metric, dtype):
    tokens = torch.randn(3, 37, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = similarity(tokens, metric)
    assert (found.dtype, found.shape) == (torch.promote_types(dtype, torch.float32), (3, 36))
    expected = np.stack([reference_similarity(image.double().numpy(), metric) for image in tokens])
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


@METRICS
def test_the_most_similar_patches_come_first(metric):
    model = build(SMALL_METHOD, sim_metric=metric)
    tokens = torch.randn(6, 17, 64, generator=torch.Generator().manual_seed(0))
    found = model.select(tokens)
    sign = -1 if metric == "cos" else 1
    for image, indices in zip(tokens, found.indices.tolist(), strict=True):
        scores = sign * reference_similarity(image.numpy(), metric)
        assert indices == sorted(range(16), key=lambda n: scores[n])[:3]


def test_random_patches_are_distinct_and_lie_anywhere_on_the_grid():
    model, tokens = build(SMALL_METHOD, anchor_random=True), torch.randn(500, 17, 64)
    torch.manual_seed(0)
    found = model.select(tokens)
    assert found.indices.shape == (500, 3)
    assert all(len(set(row)) == 3 for row in found.indices.tolist())
    assert found.indices.unique().tolist() == list(range(16))
    assert found.boxes.tolist() == published_boxes(found.indices, 4, 16)
    assert not torch.equal(model.select(tokens).indices, found.indices)
    torch.manual_seed(0)
    assert torch.equal(model.select(tokens).indices, found.indices)


def test_no_gradient_flows_through_the_choice_of_the_crop():
    model = small().train()
    found = model.select(torch.randn(2, 17, 64, requires_grad=True))
    assert not any(part.requires_grad for part in found)
    assert not model(images())[1].requires_grad


# Google's .npz files.


@pytest.fixture(scope="module")
def npz_files(tmp_path_factory):
    """A file for each of the recorded models, with the heads that they were recorded with."""
    specs = {
        "tiny": vit_spec(192, 3, 768, 4, 6, 100),
        "b16": vit_spec(768, 12, 3072, 12, 14),
        "small": vit_spec(64, 2, 128, 2, 4),
    }
    files = {name: tmp_path_factory.mktemp("npz") / f"{name}.npz" for name in specs}
    for name, path in files.items():
        fill_npz(path, specs[name])
    yield files
    files["b16"].unlink()  # 340 MB


NPZ = {"tiny_method": {**T16, **METHOD, "dynamic_top": 4}, "b16_method": {**B16, **METHOD}, "b16_plain": B16}


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, figures in GOLDEN["npz"].items() for size in figures["sizes"]]
)
@torch.no_grad()
def test_loading_npz_equals_the_released_conversion(npz_files, name, size):
    model = fill_released(build(NPZ[name], image_size=int(size)))
    report = model.load_npz(npz_files[name.partition("_")[0]])
    figures, state = GOLDEN["npz"][name], model.released_state_dict()
    at_size = figures["sizes"][size]
    for key, chk in figures["params"].items():
        assert check_figures(state[key]) == close_to(chk), key
    position = state["positional_embedding.pos_embedding"]
    assert check_figures(position) == close_to(at_size["position"])
    for place, value in at_size["position_at"].items():
        token, channel = map(int, place.split(","))
        assert position[0, token, channel].item() == pytest.approx(value, abs=1e-6)
    left = [key for key, value in state.items() if torch.equal(value, filled(key, tuple(value.shape)))]
    assert left == [key for key in figures["left"] if key != "anchor_class_token"]
    if model.anchor_class_token is not None:
        assert torch.equal(model.anchor_class_token, model.base_model.cls_token)
    if size == min(figures["sizes"], key=int):  # as in the file, nothing is resized
        loaded = [state[key].double() for key in state if key not in figures["left"]]
        for ours, name in ((loaded, "all_params_sum"), ([value.abs() for value in loaded], "all_params_abs_sum")):
            assert sum(value.sum().item() for value in ours) == pytest.approx(figures[name], rel=1e-7)
    assert set(report.left) == {key for key in model.state_dict() if key.startswith(("aggregator", "head"))}
    assert {*report.loaded, *report.left} == set(model.state_dict())
    logits = logits_of(model(images(1 if size == "448" else 2, int(size))))
    torch.testing.assert_close(logits, torch.tensor(at_size["logits"])[: len(logits)], atol=5e-5, rtol=0)


def assert_unchanged(model, before):
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_npz_file_of_another_depth_is_refused_and_changes_nothing(npz_files):
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"tiny\.npz has 4 blocks, but .* has 2"):
        model.load_npz(npz_files["tiny"])
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pool"])
def test_every_kind_of_model_takes_its_encoder_from_an_npz_file(npz_files, kind):
    model = small(kind)
    before = copy.deepcopy(model.state_dict())
    report = model.load_npz(npz_files["small"])
    google = google_to_timm(read_npz(npz_files["small"]))
    google["anchor_class_token"] = google["cls_token"]
    for key, value in model.state_dict().items():
        expected = before[key] if key in report.left else google[key.removeprefix("base_model.")]
        assert torch.equal(value, expected), key
    assert all(key.startswith(("reducer", "aggregator", "head")) for key in report.left)


def test_a_model_without_class_token_refuses_an_npz_file_and_stays_as_it_is(npz_files):
    model = small("pool")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"small\.npz is for a ViT with a class token"):
        model.load_npz(npz_files["small"])
    assert_unchanged(model, before)


@torch.no_grad()
def test_a_plain_model_is_timms_vit_but_for_its_epsilon(npz_files):
    ours = build(SMALL, layer_norm_eps=1e-6).eval()
    theirs = VisionTransformer(img_size=64, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, num_classes=10).eval()
    ours.load_npz(npz_files["small"])
    theirs.load_pretrained(str(npz_files["small"]))
    ours.head.load_state_dict(theirs.head.state_dict())
    torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-5, rtol=0)


# The published usage.

USAGE = """
import torch
from glsim.model_utils import ViTGLSim, ViTConfig
model_name = 'vit_b16'
cfg = ViTConfig(model_name, debugging=True, classifier='cls', dynamic_anchor=True,
reducer='cls', aggregator=True, aggregator_norm=True, aggregator_num_hidden_layers=1)
model = ViTGLSim(cfg)
x = torch.rand(2, cfg.num_channels, cfg.image_size, cfg.image_size)
out = model(x)
"""


def test_the_published_usage_prints_the_shape_at_each_stage(capsys):
    names = {}
    with torch.no_grad():
        exec(USAGE, names)
    logits, crops = names["out"]
    assert (logits.shape, crops.shape) == ((2, 1000), (2, 3, 224, 224))
    printed = re.findall(r"(\(.*\))$", capsys.readouterr().out, flags=re.MULTILINE)
    encoding = ["(2, 197, 768)"] * 2
    image = "(2, 3, 224, 224)"
    assert printed == [image, *encoding, image, *encoding, "(2, 2, 768)", "(2, 2, 768)", "(2, 1000)"]


@KIND
def test_nothing_is_printed_without_debugging(kind, capfd):
    small(kind)(images(), ret_dist=True)
    assert capfd.readouterr() == ("", "")


# The authors' checkpoints.


@KIND
@torch.no_grad()
def test_an_exported_checkpoint_loads_bit_for_bit(kind, tmp_path):
    model, again = build(KINDS[kind]).eval(), build(KINDS[kind]).eval()
    fill_state_dict(model)
    torch.save({f"model.{key}": value for key, value in model.released_state_dict().items()}, tmp_path / "glsim.pth")
    for state in (torch.load(tmp_path / "glsim.pth", weights_only=True), model.released_state_dict()):
        fill_released(again)
        again.load_released(state)
        assert_unchanged(again, model.state_dict())
        assert torch.equal(logits_of(again(images())), logits_of(model(images())))


def test_files_of_averaged_logits_hold_the_head_twice():
    for kind in ("avg_cls", "max_cls"):
        state = small(kind).released_state_dict()
        for name in ("weight", "bias"):
            assert torch.equal(state[f"head.{name}"], state[f"head_reducer.0.{name}"])
    assert not any(key.startswith("head_reducer") for key in small().released_state_dict())


def test_a_checkpoint_in_the_names_of_this_model_is_left_alone():
    model = small()
    kept = model.from_released(model.state_dict())
    assert list(kept) == list(model.state_dict())
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())


QUERY, KEY = (f"encoder.blocks.1.attn.proj_{part}.weight" for part in "qk")
QUERY_OR_QKV = r"blocks\.1\.attn\.proj_q\.weight|blocks\.1\.attn\.qkv\.weight"


def assert_refused(model, state, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        model.load_released(state)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("changes", "message"),  # the shapes of other entries; None: no such entry
    [
        ({QUERY: None}, f"lacks {QUERY}"),
        ({"head.bias": None}, r"lacks head\.bias"),
        ({"anchor_class_token": None}, "lacks anchor_class_token"),
        ({QUERY: None, KEY: None}, f"lacks {KEY} and 1 more"),
        ({"head.scale": (1,)}, r"holds the unknown head\.scale"),
        ({"head.bias": (9,)}, r"head\.bias of shape \(9,\)"),
        ({QUERY: (63, 64)}, QUERY_OR_QKV),
        ({QUERY: (64, 63)}, QUERY_OR_QKV),
        ({QUERY: (56, 64), KEY: (72, 64)}, QUERY_OR_QKV),  # as many rows together
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_changes_nothing_and_says_why(changes, message, prefix):
    model = small()
    state = model.released_state_dict() | {key: torch.zeros(shape or 0) for key, shape in changes.items()}
    state = {prefix + key: value for key, value in state.items() if changes.get(key, ()) is not None}
    assert_refused(model, state, message)


@pytest.mark.parametrize(
    "state", [{}, {"fc.weight": torch.zeros(10, 64)}, {"model.fc.weight": torch.zeros(10, 64)}], ids=str
)
def test_a_file_of_something_else_is_refused(state):
    assert_refused(small(), state, "checkpoint")


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({}, {"num_classes": 7}, r"head\.weight of shape \(7, 64\), .*\(10, 64\)"),
        ({}, {"image_size": 96}, r"pos_embedding of shape \(1, 37, 64\), .*\(1, 17, 64\)"),
        ({"num_hidden_layers": 3}, {}, r"lacks encoder\.blocks\.2\."),
        ({}, {"num_hidden_layers": 3}, r"holds the unknown encoder\.blocks\.2\."),
        ({"aggregator_num_hidden_layers": 2}, {}, r"lacks aggregator\.blocks\.1\."),
        ({"classifier": "avg_cls"}, {}, r"lacks head_reducer\.0\."),
        ({}, {"classifier": "avg_cls"}, r"holds the unknown head_reducer\.0\."),
        ({}, {"representation_size": 128}, r"holds the unknown reducer\."),
        ({}, {"anchor_class_token": False}, "lacks anchor_class_token"),
        ({}, {"intermediate_size": 192}, r"fc1\.(weight|bias) of shape \(192.*, this model needs \(128"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_says_which(ours, theirs, message):
    assert_refused(small(**ours), small(**theirs).released_state_dict(), message)


# What is refused.


@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 96), (2, 3, 96, 96), (2, 3, 48, 48), (2, 1, 64, 64), (3, 64, 64)], ids=str
)
@pytest.mark.parametrize("kind", ["method", "plain", "pool"])
def test_images_of_another_size_are_refused(kind, shape):
    with pytest.raises(UserError, match=re.escape(f"images of shape {shape}: this model takes (B, 3, 64, 64)")):
        small(kind)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "vit_b64"}, "there is no model 'vit_b64': choose one of vit_t4, .*, vit_h14"),
        ({"model_name": ""}, "there is no model ''"),
        ({"image_size": 225}, "image_size 225: expected a multiple of the patch size 16"),
        ({"image_size": 0}, "image_size 0: expected a multiple of the patch size 16"),
        ({"image_size": 224, "patch_size": 30}, "image_size 224: expected a multiple of the patch size 30"),
        ({"patch_size": (16, 8)}, "square"),
        ({"dynamic_anchor": True, "dynamic_top": 197}, "dynamic_top 197: expected 1 to 196"),
        ({"dynamic_anchor": True, "dynamic_top": 0}, "dynamic_top 0: expected 1 to 196"),
        ({"dynamic_anchor": True, "dynamic_top": 5, "image_size": 32}, "dynamic_top 5: expected 1 to 4"),
        ({"classifier": "mean"}, "classifier 'mean': expected one of cls, avg_cls, max_cls, pool"),
        ({"sim_metric": "l3"}, "sim_metric 'l3': expected one of cos, l1, l2"),
        ({"sim_metric": "acos_l1"}, "sim_metric 'acos_l1'"),  # the released tests were of substrings
        ({"reducer": "mean"}, "reducer 'mean'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"pos_embedding_type": "sincos"}, "pos_embedding_type 'sincos'"),
        ({"dynamic_anchor": True, "num_anchors": 2}, "num_anchors 2: GLSim makes one crop"),
        ({"classifier": "pool", "dynamic_anchor": True}, "'pool' has no CLS token"),
        ({"classifier": "pool", "reducer": "cls"}, "'pool' has no CLS token"),
        *(({name: 3}, f"{name} has no effect in GLSim") for name in WITHOUT_EFFECT),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_serve_is_refused_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message) as caught:
        ViTConfig(**options)
    assert "\n" not in str(caught.value)


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="dynamic_tops"):
        ViTConfig("vit_b16", dynamic_tops=4)


def test_without_a_crop_the_number_of_patches_does_not_matter():
    assert build(SMALL, dynamic_top=1000)(images()).shape == (2, 10)


def test_options_without_effect_are_accepted_where_they_ask_for_nothing():
    off = dict.fromkeys(WITHOUT_EFFECT, None) | {"head_dropout_prob": 0, "anchor_resize_size": False}
    assert build(SMALL_METHOD, **off)(images())[0].shape == (2, 10)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        ViTConfig().num_hidden_layers = 2


# Models, batches, precision.


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_runs_with_and_without_the_method(name):
    side = 4 * int(name[5:])
    with torch.device("meta"):
        batch = torch.empty(2, 3, side, side)
        assert build({"model_name": name, "image_size": side})(batch).shape == (2, 1000)
        logits, crops = build({"model_name": name, "image_size": side, **METHOD, "num_classes": 200})(batch)
    assert (logits.shape, crops.shape) == ((2, 200), batch.shape)


@pytest.mark.parametrize("name", ["t16", "s16", "s32", "b8", "b16", "b32", "l16", "l32", "h14"])
def test_every_model_has_the_sizes_of_timms(name):
    words = {"t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
    with torch.device("meta"):
        ours = build({"model_name": f"vit_{name}"}).base_model
        theirs = timm.create_model(f"vit_{words[name[0]]}_patch{name[1:]}_224", num_classes=0)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


@KIND
@torch.no_grad()
def test_a_batch_of_one_equals_the_rows_of_a_batch(kind):
    model, batch = small(kind), images(5)
    *whole, x, _, _, _ = model(batch, ret_dist=True)
    for row in range(5):
        *alone, x_alone, _, _, _ = model(batch[row : row + 1], ret_dist=True)
        for ours, theirs in zip((*alone, x_alone), (*whole, x), strict=True):
            torch.testing.assert_close(ours[0], theirs[row], atol=1e-5, rtol=0)


@KIND
def test_reading_the_attention_changes_no_logits(kind):
    """Apart from dropout, which is drawn for all patches of the last block only where these are handed out."""
    for train in (False, True):
        outputs = []
        for ret_dist in (False, True):
            model = small(kind).train(train)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            torch.manual_seed(0)
            outputs.append(model(images(), ret_dist=ret_dist))
        torch.testing.assert_close(logits_of(outputs[0]), outputs[1][0], atol=1e-6, rtol=0)
        if isinstance(outputs[0], tuple):
            assert torch.equal(outputs[0][1], outputs[1][1])


@torch.no_grad()
def test_pooling_classifies_the_mean_of_the_patches():
    model = small("pool")  # the released class returns the tokens themselves, (2, 16, 64)
    logits, x, *_ = model(images(), ret_dist=True)
    assert (logits.shape, x.shape) == ((2, 10), (2, 16, 64))
    torch.testing.assert_close(logits, model.head(x.mean(dim=1)))
    assert torch.equal(model(images()), logits)


@torch.no_grad()
def test_without_a_classifier_the_tokens_before_it_come_back():
    assert build(SMALL, load_fc_layer=False)(images()).shape == (2, 17, 64)
    tokens, crops = small(load_fc_layer=False)(images())
    assert (tokens.shape, crops.shape) == ((2, 2, 64), (2, 3, 64, 64))
    torch.testing.assert_close(small().head(tokens[:, 0]), small()(images())[0])


@torch.no_grad()
def test_image_and_crop_share_everything_and_nothing_reads_the_second_class_token():
    model = small()
    before = model(images())[0]
    model.anchor_class_token.fill_(3.0)
    assert torch.equal(model(images())[0], before)
    plain = small(anchor_class_token=False)
    assert torch.equal(plain(images())[0], before)


@KIND
def test_every_parameter_that_wants_a_gradient_gets_one(kind):
    model = small(kind).train()
    F.cross_entropy(logits_of(model(images())), LABELS).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert without == ["anchor_class_token"] * KINDS[kind].get("anchor_class_token", False)


def test_bfloat16_autocast_trains():
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, crops = model(images())
        loss = F.cross_entropy(logits, LABELS)
    assert (loss.dtype, crops.dtype) == (torch.float32, torch.float32)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@KIND
def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(kind):
    plain, saving = small(kind).train(), small(kind).train()
    saving.set_grad_checkpointing(True)
    calls, losses = [], []
    saving.base_model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        torch.manual_seed(0)
        loss = F.cross_entropy(logits_of(model(images())), LABELS)
        loss.backward()
        losses.append(loss)
    assert len(calls) == 2 * model.config.num_anchors_total
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    torch.manual_seed(1)
    assert not torch.equal(logits_of(plain(images())), logits_of(plain(images())))  # there is dropout


# Dropout, epsilon, initialisation.


def dropout_rates(model):
    return {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}


def drop_path_rates(model):
    return {name: m.drop_prob for name, m in model.named_modules() if isinstance(m, DropPath)}


def in_every_block(*names):
    return {
        f"{block}.{name}" for block in ("base_model.blocks.0", "base_model.blocks.1", "aggregator.0") for name in names
    }


def test_dropout_stands_at_the_end_of_both_residual_branches_alone():
    model = build(SMALL_METHOD)
    assert dropout_rates(model) == dict.fromkeys(in_every_block("attn.proj_drop", "mlp.drop2"), 0.1)
    assert not drop_path_rates(model)
    assert not dropout_rates(build(SMALL_METHOD, hidden_dropout_prob=0.0))


def test_stochastic_depth_replaces_dropout_and_has_one_rate_in_all_blocks():
    model = build(SMALL_METHOD, sd=0.1)
    assert drop_path_rates(model) == dict.fromkeys(in_every_block("drop_path1", "drop_path2"), 0.1)
    assert not dropout_rates(model)
    recorded = GOLDEN["sd_0.1_drop_prob_per_block"]  # of four blocks and an aggregator of one
    assert list(drop_path_rates(build(T16_96, sd=0.1)).values()) == [rate for rate in recorded for _ in range(2)]


def test_dropout_acts_in_training_as_counted():
    model, calls = small().train(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: calls.append(module.p))
    model(images())
    # Two branches each: two blocks twice (the image's last in two parts, CLS and what is only seen), one once.
    assert [rate for rate in calls if rate] == [0.1] * 2 * (2 * 2 + 1 + 1)
    ends = {name: [] for name in in_every_block("attn.proj_drop", "mlp.drop2")}
    for name, seen in ends.items():
        model.get_submodule(name).register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
    model(images(32))
    for name, seen in ends.items():
        assert torch.cat(seen, dim=1).eq(0).float().mean().item() == pytest.approx(0.1, abs=0.01), name


def test_attention_probabilities_drop_out_where_asked():
    model = build(SMALL_METHOD, attention_probs_dropout_prob=0.2)
    assert dropout_rates(model) == dict.fromkeys(in_every_block("attn.proj_drop", "mlp.drop2"), 0.1) | dict.fromkeys(
        in_every_block("attn.attn_drop"), 0.2
    )


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_layer_norm_has_the_released_epsilon(name):
    with torch.device("meta"):
        model = build({"model_name": name, "image_size": 448, **METHOD})
    norms = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-12] * (2 * (model.config.num_hidden_layers + 1) + 2)


def assert_uniform(tensor, bound):
    assert 0.95 * bound < tensor.abs().max().item() <= bound


@pytest.mark.parametrize("kind", ["method", "wider", "plain", "two_aggregator_blocks", "pool"])
def test_initialisation_is_the_released_one(kind):
    torch.manual_seed(0)
    state = build(KINDS[kind]).released_state_dict()
    zero = {"class_token", "anchor_class_token", "head.weight", "head.bias"} & set(state)
    assert not any(state[key].any() for key in zero)
    assert state["positional_embedding.pos_embedding"].std().item() == pytest.approx(0.02, rel=0.1)
    for name in ("weight", "bias"):
        assert_uniform(state[f"patch_embedding.{name}"], 1 / math.sqrt(3 * 16 * 16))
    for key, value in state.items():
        if "norm" in key:
            assert (value == (1 if key.endswith("weight") else 0)).all(), key
        elif key.startswith(("encoder", "aggregator", "reducer")):
            if key.endswith("weight"):  # query, key and value are a Linear each
                assert_uniform(value, math.sqrt(6 / sum(value.shape)))
            else:
                assert value.std().item() == pytest.approx(1e-6, rel=0.4), key
