"""glsim.model_utils.glsim: the published crop and similarity, .npz files, options, and how it starts.

What it shares with the other models is in test_glsim_families.py, the released figures in tests/parity.
"""

import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from formula import fill_npz, vit_spec
from small_models import SMALL, images
from small_models import vit_glsim as small
from timm.models.vision_transformer import VisionTransformer

from glsim.model_utils import ViTConfig, ViTGLSim
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


# Google's .npz files.


@pytest.fixture(scope="module")
def npz_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npz")
    fill_npz(folder / "small.npz", vit_spec(64, 2, 128, 2, 4))
    return folder


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


@pytest.mark.parametrize("name", ["t16", "s16", "s32", "b8", "b16", "b32", "l16", "l32", "h14"])
def test_every_model_has_the_sizes_of_timms(name):
    words = {"t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}
    with torch.device("meta"):
        ours = build({"model_name": f"vit_{name}"}).base_model
        theirs = timm.create_model(f"vit_{words[name[0]]}_patch{name[1:]}_224", num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


# Dropout and initialisation.
