"""glsim.model_utils.glsim: the published crop and similarity, .npz files, options, and how it starts.

What it shares with the other models is in test_glsim_families.py, the released figures in tests/parity.
"""

import copy
import math
import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from formula import fill_npz, vit_spec
from small_models import KINDS, METHOD, SMALL, SMALL_METHOD, assert_uniform, images
from small_models import vit_glsim as small
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.errors import UserError
from common.npz import google_to_timm, read_npz
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.model_utils.config import MODEL_NAMES, WITHOUT_EFFECT
from glsim.model_utils.glsim import bounding_boxes, crop, similarity


def build(options, **others):
    return ViTGLSim(ViTConfig(**{**options, **others}))


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
        expected = []
        for row in indices.tolist():
            rows, columns = [i // 6 for i in row], [i % 6 for i in row]
            expected.append([16 * n for places in (rows, columns) for n in (min(places), max(places) + 1)])
        assert bounding_boxes(indices, 6, 16, inclusive=True).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("inclusive", [False, True])
def test_the_model_cuts_off_the_last_patch_unless_told_otherwise(inclusive):
    model = small(crop_inclusive=inclusive)
    _, crops, tokens, *_ = model(images(5), ret_dist=True)
    found = model.select(tokens)
    assert torch.equal(found.boxes, bounding_boxes(found.indices, 4, 16, inclusive))
    torch.testing.assert_close(crops, published_crops(images(5), found.boxes.tolist()), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("grid", "patch_size"), [(4, 16), (14, 16), (3, 32), (8, 14)])
def test_cropping_a_batch_at_once_equals_cropping_one_image_after_another(grid, patch_size):
    side = grid * patch_size
    corners = torch.tensor([[0], [grid - 1], [grid * (grid - 1)], [grid * grid - 1]])
    some = [random_indices(8, grid, 4), random_indices(8, grid, 1), corners]
    boxes = torch.cat([bounding_boxes(indices, grid, patch_size) for indices in some])
    edges = [[0, side, 0, side], [0, patch_size, 0, side], [side - patch_size, side, 0, side]]
    boxes = torch.cat((boxes, torch.tensor(edges)))
    batch = torch.rand(len(boxes), 3, side, side, generator=torch.Generator().manual_seed(1))
    crops, exact = crop(batch, boxes), published_crops(batch.double(), boxes.tolist())
    assert (crops.dtype, crops.shape) == (torch.float32, batch.shape)
    torch.testing.assert_close(crops.double(), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(crop(batch.double(), boxes), exact, atol=1e-12, rtol=0)
    # The loop in float32, as released, is itself off by 1e-5 pixels.
    torch.testing.assert_close(crops, published_crops(batch, boxes.tolist()), atol=5e-5, rtol=0)


def reference_similarity(tokens, metric):
    """Return the similarities of one image's patches to its CLS, one pair at a time in float64."""
    cls, *patches = np.asarray(tokens, dtype=np.float64)
    by_metric = {
        "cos": lambda g, p: np.dot(g, p) / np.sqrt(np.dot(g, g) * np.dot(p, p)),
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
    folder = tmp_path_factory.mktemp("npz")
    for name, depth in (("small", 2), ("deep", 4)):
        fill_npz(folder / f"{name}.npz", vit_spec(64, 2, 128, depth, 4))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_with_a_class_token_takes_its_encoder_from_an_npz_file(npz_files, kind):
    model = small(kind)
    before = copy.deepcopy(model.state_dict())
    for name in ["deep"] if kind != "pool" else ["deep", "small"]:
        with pytest.raises(UserError, match=rf"{name}\.npz (has 4 blocks|is for a ViT with a class token)"):
            model.load_npz(npz_files / f"{name}.npz")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if kind == "pool":
        return
    report = model.load_npz(npz_files / "small.npz")
    google = google_to_timm(read_npz(npz_files / "small.npz"))
    google["anchor_class_token"] = google["cls_token"]
    for key, value in model.state_dict().items():
        expected = before[key] if key in report.left else google[key.removeprefix("base_model.")]
        assert torch.equal(value, expected), key
    assert all(key.startswith(("reducer", "aggregator", "head")) for key in report.left)


@torch.no_grad()
def test_a_plain_model_is_timms_vit_but_for_its_epsilon(npz_files):
    ours = build(SMALL, layer_norm_eps=1e-6).eval()
    theirs = VisionTransformer(img_size=64, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, num_classes=10).eval()
    ours.load_npz(npz_files / "small.npz")
    theirs.load_pretrained(str(npz_files / "small.npz"))
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


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "vit_b64"}, "there is no model 'vit_b64'"),
        ({"image_size": 225}, "image_size 225: expected a multiple of the patch size 16"),
        ({"image_size": 0}, "image_size 0"),
        ({"image_size": 224, "patch_size": 30}, "image_size 224: expected a multiple of the patch size 30"),
        ({"patch_size": (16, 8)}, "square"),
        ({"dynamic_anchor": True, "dynamic_top": 197}, "dynamic_top 197: expected 1 to 196"),
        ({"dynamic_anchor": True, "dynamic_top": 0}, "dynamic_top 0: expected 1 to 196"),
        ({"dynamic_anchor": True, "dynamic_top": 5, "image_size": 32}, "dynamic_top 5: expected 1 to 4"),
        ({"classifier": "mean"}, "classifier 'mean'"),
        ({"sim_metric": "acos_l1"}, "sim_metric 'acos_l1'"),  # the released tests were of substrings
        ({"reducer": "mean"}, "reducer 'mean'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"pos_embedding_type": "sincos"}, "pos_embedding_type 'sincos'"),
        ({"dynamic_anchor": True, "num_anchors": 2}, "num_anchors 2"),
        ({"classifier": "pool", "dynamic_anchor": True}, "'pool' has no CLS token"),
        ({"classifier": "pool", "reducer": "cls"}, "'pool' has no CLS token"),
        *(({name: 3}, f"{name} has no effect") for name in WITHOUT_EFFECT),
    ],
)
def test_a_configuration_that_cannot_serve_is_refused_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message) as caught:
        ViTConfig(**options)
    assert "\n" not in str(caught.value)


def test_without_a_crop_the_number_of_patches_does_not_matter():
    assert build(SMALL, dynamic_top=1000)(images()).shape == (2, 10)


def test_options_without_effect_are_accepted_where_they_ask_for_nothing():
    off = dict.fromkeys(WITHOUT_EFFECT, None) | {"head_dropout_prob": 0, "anchor_resize_size": False}
    assert build(SMALL_METHOD, **off)(images())[0].shape == (2, 10)


def test_a_configuration_has_published_names_alone_and_cannot_be_changed():
    with pytest.raises(TypeError, match="dynamic_tops"):
        ViTConfig("vit_b16", dynamic_tops=4)
    with pytest.raises(FrozenInstanceError):
        ViTConfig().num_hidden_layers = 2


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_runs_with_and_without_the_method(name):
    side = 4 * int(name[5:])
    with torch.device("meta"):
        batch = torch.empty(2, 3, side, side)
        assert build({"model_name": name, "image_size": side})(batch).shape == (2, 1000)
        model = build({"model_name": name, "image_size": side, **METHOD, "num_classes": 200})
        logits, crops = model(batch)
    assert (logits.shape, crops.shape) == ((2, 200), batch.shape)
    norms = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-12] * (2 * (model.config.num_hidden_layers + 1) + 2)


@pytest.mark.parametrize("name", ["t16", "s16", "s32", "b8", "b16", "b32", "l16", "l32", "h14"])
def test_every_model_has_the_sizes_of_timms(name):
    words = {"t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
    with torch.device("meta"):
        ours = build({"model_name": f"vit_{name}"}).base_model
        theirs = timm.create_model(f"vit_{words[name[0]]}_patch{name[1:]}_224", num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


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


def test_files_of_averaged_logits_hold_the_head_twice():
    for kind in ("avg_cls", "max_cls"):
        state = small(kind).released_state_dict()
        for name in ("weight", "bias"):
            assert torch.equal(state[f"head.{name}"], state[f"head_reducer.0.{name}"])
    assert not any(key.startswith("head_reducer") for key in small().released_state_dict())


# Dropout and initialisation.


def rates(model, kind, name):
    return {key: getattr(m, name) for key, m in model.named_modules() if isinstance(m, kind) and getattr(m, name)}


def in_every_block(*names):
    blocks = ("base_model.blocks.0", "base_model.blocks.1", "aggregator.0")
    return [f"{block}.{name}" for block in blocks for name in names]


@pytest.mark.parametrize(
    ("options", "dropout", "paths"),
    [
        ({}, {0.1: ["attn.proj_drop", "mlp.drop2"]}, {}),  # the end of both residual branches
        ({"hidden_dropout_prob": 0.0}, {}, {}),
        ({"attention_probs_dropout_prob": 0.2}, {0.1: ["attn.proj_drop", "mlp.drop2"], 0.2: ["attn.attn_drop"]}, {}),
        ({"sd": 0.1}, {}, {0.1: ["drop_path1", "drop_path2"]}),  # in the place of dropout
    ],
)
def test_where_dropout_stands(options, dropout, paths):
    model = build(SMALL_METHOD, **options)
    for found, expected in ((rates(model, nn.Dropout, "p"), dropout), (rates(model, DropPath, "drop_prob"), paths)):
        assert found == {key: rate for rate, names in expected.items() for key in in_every_block(*names)}


def test_dropout_acts_in_training_as_counted():
    model = small().train()
    ends = {name: [] for name in in_every_block("attn.proj_drop", "mlp.drop2")}
    for name, seen in ends.items():
        model.get_submodule(name).register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
    model(images(32))
    # Two branches each: two blocks twice (the image's last in two parts, CLS and what is only seen), one once.
    assert sum(map(len, ends.values())) == 2 * (2 * 2 + 1 + 1)
    for name, seen in ends.items():
        assert torch.cat(seen, dim=1).eq(0).float().mean().item() == pytest.approx(0.1, abs=0.01), name


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
