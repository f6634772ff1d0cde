"""glsim.model_utils.transfg: the figures of the released class, the equations, files there and back, refusals."""

import copy
import functools
import hashlib
import json
import math
import time
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import check_figures, fill, fill_image, fill_npz, fill_state_dict, vit_spec
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.models.vit import embed, run_block
from common.npz import google_to_timm, read_npz, resize_position_embedding
from common.weights import load_checkpoint, load_weights
from glsim.model_utils.transfg import (
    CONFIGS,
    ROWS,
    Config,
    TransFG,
    contrastive_loss,
    joint_attention,
    select_parts,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "transfg.json").read_text())
LABELS = torch.tensor([3, 7])
TINY = Config(hidden_size=48, mlp_dim=96, num_heads=3, num_layers=4)
STEPS = pytest.mark.parametrize("step", [12, None], ids=["overlap", "nonoverlap"])
# Recorded models: configuration, image size, stride of the patches.
RECORDED = {
    "tiny_overlap": (TINY, 64, 12),
    "tiny_nonoverlap": (TINY, 64, None),
    "b16_224_overlap": (CONFIGS["ViT-B_16"], 224, 12),
}
filled = functools.cache(fill)  # the full-size models share most of their entries


@pytest.fixture(autouse=True, scope="module")
def forget_filled():
    yield
    filled.cache_clear()


def fill_released(model):
    """Fill a model by the keys that its entries have in a released file."""
    released = model.released_state_dict()
    model.load_released({key: filled(key, tuple(value.shape)) for key, value in released.items()})
    return model.eval()


def tiny(img_size=64, step=12, num_classes=10, smoothing=0.0, **sizes):
    return fill_released(TransFG(replace(TINY, **sizes), img_size, num_classes, step, smoothing))


def recorded(name, dropout=0.1):
    config, img_size, step = RECORDED[name]
    return TransFG(replace(config, dropout=dropout), img_size, 10, step)


def images(batch=2, size=(64, 64)):
    return fill_image(batch, 3, *size)


def close_to(figures, rtol=1e-7):
    atol = rtol * max(1.0, figures["abs_sum"])
    sums = {key: value for key, value in figures.items() if key != "first"}
    return {key: value if key == "shape" else pytest.approx(value, abs=atol) for key, value in sums.items()}


def assert_figures(tensor, figures, rtol, atol):
    assert check_figures(tensor) == close_to(figures, rtol)
    assert tensor.flatten()[: len(figures["first"])].tolist() == pytest.approx(figures["first"], abs=atol)


def queries_and_keys(model, batch):
    """Return the queries and keys of every block but the last, the last of these first, and the tokens behind."""
    vit, blocks = model.base_model, []
    tokens = embed(vit, batch)
    for block in vit.blocks[:-1]:
        tokens, q, k = run_block(block, tokens)
        blocks.insert(0, (q, k))
    return blocks, tokens


# The recorded figures of the released class.


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_equals_the_released_class_in_evaluation(name):
    model, figures = fill_released(recorded(name)), GOLDEN["models"][name]
    batch, losses = images(size=(RECORDED[name][1],) * 2), GOLDEN["models"][name]["loss"]
    features, parts = model.forward_features(batch)
    logits = model.get_classifier()(features)
    torch.testing.assert_close(logits, torch.tensor(figures["logits"]), atol=5e-5, rtol=0)
    assert parts.tolist() == figures["parts"]
    assert_figures(features, figures["features"], rtol=1e-7, atol=5e-6)
    assert contrastive_loss(features, LABELS).item() == pytest.approx(losses["con_loss"], abs=2e-6)
    same = contrastive_loss(features, torch.tensor([3, 3])).item()
    assert same == pytest.approx(losses["con_loss_same_label"], abs=2e-6)
    for smoothing in (0, 0.1):
        ce = F.cross_entropy(logits, LABELS, label_smoothing=smoothing)
        total = (ce + contrastive_loss(features, LABELS)).item()
        assert total == pytest.approx(losses[f"total_smoothing_{smoothing}"], abs=1e-5)


@pytest.mark.parametrize("name", ["tiny_overlap", "tiny_nonoverlap"])
@torch.no_grad()
def test_outputs_are_logits_loss_and_parts(name):
    model, figures, losses = fill_released(recorded(name)), GOLDEN["models"][name], GOLDEN["models"][name]["loss"]
    logits, parts = model(images(), return_selection=True)
    assert parts.tolist() == figures["parts"]
    assert torch.equal(model(images()), logits)
    for smoothing in (0, 0.1):
        model.smoothing_value = smoothing
        loss, same_logits = model(images(), LABELS)
        assert loss.item() == pytest.approx(losses[f"total_smoothing_{smoothing}"], abs=1e-5)
        assert torch.equal(same_logits, logits)
    model.smoothing_value = 0
    loss, _ = model(images(), torch.tensor([3, 3]))
    assert loss.item() == pytest.approx(losses["total_same_label_smoothing_0"], abs=1e-5)


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_the_row_of_joint_attention_equals_the_released_product(name):
    model, figures = fill_released(recorded(name)), GOLDEN["models"][name]
    blocks, _ = queries_and_keys(model, images(size=(RECORDED[name][1],) * 2))
    row = joint_attention(blocks)[..., 1:]
    assert_figures(row, figures["joint_attention_row"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(row.amax(-1), torch.tensor(figures["part_values"]), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", RECORDED)
def test_loss_and_gradients_equal_the_released_class_in_training(name):
    model, figures = fill_released(recorded(name, dropout=0.0)).train(), GOLDEN["models"][name]["training"]
    loss, _ = model(images(size=(RECORDED[name][1],) * 2), LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(figures["loss"], abs=1e-5)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    grads = model.released_state_dict()
    for key, norm in figures["grad_norms"].items():
        assert grads[key].double().norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-6), key
    total = sum(grad.double().square().sum().item() for grad in grads.values())
    assert math.sqrt(total) == pytest.approx(figures["total_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", RECORDED)
def test_names_shapes_order_and_parameters_are_the_released_ones(name):
    figures = GOLDEN["models"][name]
    with torch.device("meta"):
        model = recorded(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == figures["num_params"]
    entries = model.released_state_dict().items()
    lines = "".join(f"{key}:{'x'.join(map(str, value.shape))}\n" for key, value in entries)
    assert {"n": len(entries), "sha1": hashlib.sha1(lines.encode()).hexdigest()} == figures["state_dict"]


def test_contrastive_loss_equals_the_released_function():
    features, figures = fill("con_features", (6, 32)), GOLDEN["contrastive"]
    correlated = fill("con_features_base", (32,)) + 0.7 * features
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    for name, (ours, classes) in {
        "value": (features, labels),
        "correlated": (correlated, labels),
        "correlated_all_same_label": (correlated, torch.zeros(6)),
        "correlated_all_different": (correlated, torch.arange(6)),
    }.items():
        assert contrastive_loss(ours, classes).item() == pytest.approx(figures[name], abs=1e-7), name


# Google's .npz files.


@pytest.fixture(scope="module")
def npz_files(tmp_path_factory):
    """A file for each of the recorded models, with heads of 10 classes."""
    specs = {"tiny": vit_spec(), "b16": vit_spec(768, 12, 3072, 12, 14)}
    files = {name: tmp_path_factory.mktemp("npz") / f"{name}.npz" for name in specs}
    for name, path in files.items():
        fill_npz(path, specs[name])
    yield files
    files["b16"].unlink()  # 340 MB


@pytest.mark.parametrize("name", GOLDEN["npz"])
@torch.no_grad()
def test_loading_npz_equals_the_released_loader(npz_files, name):
    file, side, split = name.split("_")
    config, side, step = TINY if file == "tiny" else CONFIGS["ViT-B_16"], int(side), 12 if split == "overlap" else None
    model = fill_released(TransFG(config, side, 10, step))
    report = model.load_npz(npz_files[file])
    figures, state = GOLDEN["npz"][name], model.released_state_dict()
    for key, chk in figures["params"].items():
        assert_figures(state[key], chk, rtol=1e-7, atol=1e-6)
    left = [key for key, value in state.items() if torch.equal(value, filled(key, tuple(value.shape)))]
    assert left == GOLDEN["npz_left"]
    behind = f"base_model.blocks.{config.num_layers - 1}.", "base_model.head."
    assert set(report.left) == {key for key in model.state_dict() if key.startswith(behind)}
    assert {*report.loaded, *report.left} == set(model.state_dict())
    rows = 2 if side < 448 else 1  # one image is enough where it takes seconds
    logits = model(images(2, (side, side))[:rows])
    torch.testing.assert_close(logits, torch.tensor(figures["logits"][:rows]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("zero_head", [True, False])
def test_loading_npz_leaves_the_head_alone(npz_files, zero_head):
    model = TransFG(TINY, 64, 10, zero_head=zero_head)
    before = copy.deepcopy(model.state_dict())
    report = load_weights(model, npz_files["tiny"])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(before) - set(report["left"])
    assert {key for key in report["left"] if "head" in key} == {"base_model.head.weight", "base_model.head.bias"}
    assert bool(model.get_classifier().weight.any()) is not zero_head


@STEPS
def test_an_npz_file_of_another_depth_is_refused_and_changes_nothing(npz_files, step):
    model = tiny(num_layers=3, step=step)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"tiny\.npz has 4 blocks, but .* has 3"):
        model.load_npz(npz_files["tiny"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_npz_file_loads_into_an_oblong_model(npz_files):
    model = tiny((40, 128))  # 3 x 10 patches
    model.load_npz(npz_files["tiny"])
    position = google_to_timm(read_npz(npz_files["tiny"]))["pos_embed"]
    assert torch.equal(model.base_model.pos_embed, resize_position_embedding(position, (3, 10)))


# The Part Selection Module and the contrastive loss, written out.


def random_blocks(num_blocks, batch=2, heads=3, tokens=17, width=8, sharpness=1.5):
    """Return queries and keys (B, H, N, d) of some blocks, the last block first."""
    generator = torch.Generator().manual_seed(num_blocks + tokens)
    shape = (batch, heads, tokens, width)
    return [tuple(sharpness * torch.randn(2, *shape, generator=generator)) for _ in range(num_blocks)]


def full_product(blocks):
    """Return the product (B, H, N, N) of all attention matrices in float64, the last block's leftmost."""
    matrices = [(q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(-1) for q, k in blocks]
    return functools.reduce(torch.matmul, matrices)


BLOCKS = pytest.mark.parametrize("num_blocks", [1, 2, 3, 11])
SIZES = pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch": 1, "heads": 1, "tokens": 2, "width": 4},
        {"heads": 12, "tokens": 50, "width": 64, "sharpness": 1},
        {"tokens": ROWS},
        {"tokens": ROWS + 1},
        {"batch": 1, "tokens": 2 * ROWS + 70, "sharpness": 3},
    ],
    ids=str,
)


@BLOCKS
@SIZES
def test_part_selection_equals_the_full_product_in_float64(num_blocks, sizes):
    blocks = random_blocks(num_blocks, **sizes)
    expected, row = full_product(blocks)[:, :, 0], joint_attention(blocks)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(select_parts(blocks), expected[..., 1:].argmax(-1) + 1)
    assert torch.equal(select_parts(iter(blocks)), select_parts(blocks))


def test_the_order_of_the_blocks_matters():
    blocks = random_blocks(3)
    assert not torch.equal(select_parts(blocks), select_parts(blocks[::-1]))


def test_a_head_never_picks_cls_and_two_may_pick_the_same_patch():
    q, k = torch.ones(1, 2, 4, 1), torch.tensor([9.0, 1.0, 3.0, 2.0]).expand(1, 2, 4)[..., None]
    assert joint_attention([(q, k)])[0, 0].argmax() == 0
    assert select_parts([(q, k), (q, k)]).tolist() == [[2, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_part_selection_of_half_precision_is_float32_and_off_by_the_rounding_of_its_inputs_alone(dtype):
    blocks = [(q.to(dtype), k.to(dtype)) for q, k in random_blocks(3)]
    with torch.autocast("cpu", dtype):
        row = joint_attention(blocks)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.double(), full_product(blocks)[:, :, 0], rtol=1e-5, atol=1e-9)


def test_part_selection_stays_float32_under_autocast():
    blocks = random_blocks(3)
    with torch.autocast("cpu", torch.bfloat16):
        row = joint_attention(blocks)
    assert torch.equal(row, joint_attention(blocks))


def test_no_more_than_a_few_rows_of_an_attention_matrix_exist_at_once():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    with Largest() as largest:
        joint_attention(random_blocks(3, batch=1, tokens=1000))
    assert largest.size == 3 * ROWS * 1000


def test_part_selection_costs_a_row_a_block_and_not_a_product_of_matrices():
    blocks, size, width = random_blocks(3, batch=1, heads=1, tokens=1370, width=64), 1370, 64
    with FlopCounterMode(display=False) as flops:
        joint_attention(blocks)
    attention, rows = 2 * size * width * (1 + 2 * size), 2 * 2 * size**2
    assert flops.get_total_flops() == attention + rows
    assert rows * 50 < 2 * 2 * size**3  # what the product of three such matrices takes

    def seconds(function, *arguments):
        start = time.process_time()
        function(*arguments)
        return time.process_time() - start

    matrices = [(q @ k.mT / 8).softmax(-1) for q, k in blocks]
    product = min(seconds(functools.reduce, torch.matmul, matrices) for _ in range(2))
    # 1/15 is measured, nearly all of it for the attention itself, which the full product needs as well.
    assert min(seconds(joint_attention, blocks) for _ in range(5)) < product / 4


def slow_contrastive_loss(features, labels):
    total, count = 0.0, len(features)
    for one, label in zip(features.tolist(), labels.tolist(), strict=True):
        for other, other_label in zip(features.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(one, other, strict=True))
            cosine = dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))
            total += 1 - cosine if label == other_label else max(cosine - 0.4, 0.0)
    return total / count**2


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("classes", [1, 2, 200])
def test_contrastive_loss_equals_a_loop_over_all_pairs(count, classes):
    generator = torch.Generator().manual_seed(count)
    features = 1 + torch.randn(count, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(classes, (count,), generator=generator)
    loss = contrastive_loss(features, labels)
    assert loss.item() == pytest.approx(slow_contrastive_loss(features, labels), abs=1e-12)
    assert torch.autograd.gradcheck(contrastive_loss, (features, labels))
    with torch.autocast("cpu", torch.bfloat16):
        of_single = contrastive_loss(features.float(), labels)
        of_half = contrastive_loss(features.bfloat16(), labels)
    assert torch.equal(of_single, contrastive_loss(features.float(), labels))
    assert of_half.dtype == torch.float32
    assert of_half.item() == pytest.approx(slow_contrastive_loss(features.bfloat16(), labels), abs=1e-6)


# The whole model, written out.


def reference(model, batch):
    """Return logits (B, C), features (B, D) and the part of each head (B, H), from the released entries."""
    config = Config(**model.config["config"])
    step = model.config["slide_step"] or config.patch_size
    state = {key.removeprefix("transformer."): value for key, value in model.released_state_dict().items()}

    def dense(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def run(x, name):
        q, k, v = (
            dense(norm(x, f"{name}.attention_norm"), f"{name}.attn.{part}")
            .unflatten(-1, (config.num_heads, -1))
            .transpose(0, 1)
            for part in ("query", "key", "value")
        )
        raw = q @ k.mT / math.sqrt(q.shape[-1])
        share = raw.exp() / raw.exp().sum(-1, keepdim=True)
        x = x + dense((share @ v).transpose(0, 1).flatten(1), f"{name}.attn.out")
        y = dense(norm(x, f"{name}.ffn_norm"), f"{name}.ffn.fc1")
        return x + dense(y * (1 + torch.erf(y / math.sqrt(2))) / 2, f"{name}.ffn.fc2"), share

    features, parts = [], []
    for image in batch:
        kernel, bias = (state[f"embeddings.patch_embeddings.{name}"] for name in ("weight", "bias"))
        patches = F.unfold(image[None], config.patch_size, stride=step)[0].T  # row after row of the image
        tokens = torch.cat((state["embeddings.cls_token"][0], patches @ kernel.flatten(1).T + bias))
        tokens = tokens + state["embeddings.position_embeddings"][0]
        product = torch.eye(len(tokens)).double()
        for i in range(config.num_layers - 1):
            tokens, share = run(tokens, f"encoder.layer.{i}")
            product = share @ product  # (H, N, N)
        parts.append([max(range(1, len(tokens)), key=lambda n, row=head[0]: row[n]) for head in product])
        tokens, _ = run(torch.stack([tokens[0], *(tokens[part] for part in parts[-1])]), "encoder.part_layer")
        features.append(norm(tokens[0], "encoder.part_norm"))
    features = torch.stack(features)
    logits = features @ state["part_head.weight"].T + state["part_head.bias"]
    return logits, features, parts


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "step", "sizes"),
    [
        ((64, 64), 12, {}),
        ((64, 64), None, {}),
        ((64, 96), 12, {}),  # 5 rows of 7 patches; 8 columns of the image in none
        ((48, 32), None, {}),
        ((37, 50), 5, {"patch_size": 8}),
        ((32, 48), None, {"patch_size": 8}),
        ((64, 64), 12, {"num_layers": 2, "num_heads": 4}),
        ((16, 16), 12, {}),  # one patch, which every head picks
    ],
    ids=str,
)
def test_equals_the_equations_in_float64(size, step, sizes):
    model, batch = tiny(size, step, **sizes).double(), images(2, size).double()
    logits, features, parts = reference(model, batch)
    ours, selection = model(batch, return_selection=True)
    assert selection.tolist() == parts
    torch.testing.assert_close(ours, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.forward_features(batch)[0], features, rtol=1e-9, atol=1e-9)


def test_loss_is_smoothed_cross_entropy_plus_the_contrastive_loss():
    for smoothing in (0.0, 0.1, 0.3):
        model = tiny(smoothing=smoothing)
        loss, logits = model(images(), LABELS)
        log_p = logits.log_softmax(-1)
        expected = -(1 - smoothing) * log_p[[0, 1], LABELS] - smoothing * log_p.mean(-1)
        features, _ = model.forward_features(images())
        torch.testing.assert_close(loss, expected.mean() + slow_contrastive_loss(features, LABELS))


# Batches, sizes, precision.


@STEPS
@torch.no_grad()
def test_a_batch_of_one_equals_the_rows_of_a_batch(step):
    model, batch = tiny(step=step), images(5)
    logits, parts = model(batch, return_selection=True)
    assert parts.shape == (5, 3)
    for row in range(5):
        alone, parts_alone = model(batch[row : row + 1], return_selection=True)
        torch.testing.assert_close(alone[0], logits[row], atol=1e-5, rtol=0)
        assert torch.equal(parts_alone[0], parts[row])


def test_a_batch_of_one_trains_on_cross_entropy_alone():
    model = tiny().train()
    loss, logits = model(images(1), LABELS[:1])
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS[:1]))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slide_step": 0}, "slide_step 0: expected 1 to 16"),
        ({"slide_step": 17}, "slide_step 17: expected 1 to 16"),
        ({"img_size": 15}, "img_size 15: expected at least 16"),
        ({"img_size": (64, 8)}, r"img_size \(64, 8\): expected at least 16"),
        ({"img_size": 65, "slide_step": None}, "img_size 65: expected a multiple of the patch size 16"),
        ({"img_size": (64, 40), "slide_step": 16}, r"img_size \(64, 40\): expected a multiple of the patch size 16"),
        ({"config": replace(TINY, num_layers=1)}, "needs at least 2 blocks"),
    ],
    ids=str,
)
def test_what_cannot_serve_is_refused_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        TransFG(**{"config": TINY, "img_size": 64, "num_classes": 10, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("side", "step", "patches"), [(448, 12, 37), (304, 12, 25), (224, 12, 18), (448, None, 28)])
def test_patches_are_as_many_as_published(side, step, patches):
    with torch.device("meta"):
        embedding = TransFG(CONFIGS["ViT-B_16"], side, 200, step).base_model.patch_embed
    assert (embedding.grid_size, embedding.num_patches) == ((patches, patches), patches**2)


@STEPS
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs_with_and_without_overlap(name, step):
    config = CONFIGS[name]
    side = 4 * config.patch_size
    with torch.device("meta"):
        model = TransFG(config, side, 200, step)
        logits, parts = model(torch.empty(2, 3, side, side), return_selection=True)
    assert (logits.shape, parts.shape) == ((2, 200), (2, config.num_heads))
    assert [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)] == [1e-6] * (2 * config.num_layers + 1)


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("ViT-B_16", "vit_base_patch16_224"),
        ("ViT-B_32", "vit_base_patch32_224"),
        ("ViT-L_16", "vit_large_patch16_224"),
        ("ViT-L_32", "vit_large_patch32_224"),
        ("ViT-H_14", "vit_huge_patch14_224"),
    ],
)
def test_every_configuration_has_the_sizes_of_timms_model(name, timms):
    with torch.device("meta"):
        ours = TransFG(CONFIGS[name], 224, 10, slide_step=None).base_model
        theirs = timm.create_model(timms, num_classes=10)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


def test_configurations_cannot_be_changed():
    assert list(CONFIGS) == ["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14"]
    with pytest.raises(TypeError):
        CONFIGS["ViT-B_16"] = TINY
    with pytest.raises(FrozenInstanceError):
        CONFIGS["ViT-B_16"].num_layers = 2


@STEPS
def test_the_recorded_arguments_build_the_same_model(step):
    model = tiny((64, 96), step, smoothing=0.1)
    again = TransFG(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    ours, theirs = model(images(2, (64, 96)), LABELS), again.eval()(images(2, (64, 96)), LABELS)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bfloat16_autocast_trains():
    model = tiny().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(images(), LABELS)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Dropout, initialisation.


def test_dropout_stands_behind_the_position_embedding_and_in_the_mlps_alone():
    rates = {name: m.p for name, m in tiny().named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    places = ["pos_drop", *(f"blocks.{i}.mlp.drop{n}" for i in range(4) for n in (1, 2))]
    assert rates == {f"base_model.{place}": 0.1 for place in places}
    plain = TransFG(replace(TINY, dropout=0.0), 64, 10)
    assert not any(m.p for m in plain.modules() if isinstance(m, nn.Dropout))


def assert_uniform(tensor, bound):
    assert 0.95 * bound < tensor.abs().max().item() <= bound


@pytest.mark.parametrize("zero_head", [True, False])
def test_initialisation_is_that_of_the_released_family(zero_head):
    torch.manual_seed(0)
    model = TransFG(replace(TINY, hidden_size=96, mlp_dim=192), 64, 100, zero_head=zero_head)
    state = {key.removeprefix("base_model."): value for key, value in model.state_dict().items()}
    assert not any(state[key].any() for key in ("cls_token", "pos_embed"))
    for key in ("head.weight", "head.bias"):
        if zero_head:
            assert not state[key].any()
        else:
            assert_uniform(state[key], 1 / math.sqrt(96))
    assert_uniform(state["patch_embed.proj.weight"], 1 / math.sqrt(3 * 16 * 16))
    assert_uniform(state["patch_embed.proj.bias"], 1 / math.sqrt(3 * 16 * 16))
    for i in range(4):
        for name in ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"):
            assert_uniform(state[f"blocks.{i}.{name}"], 1 / math.sqrt(96))
        for name in ("fc1", "fc2"):
            assert_uniform(state[f"blocks.{i}.mlp.{name}.weight"], math.sqrt(6 / (96 + 192)))
            assert state[f"blocks.{i}.mlp.{name}.bias"].std().item() == pytest.approx(1e-6, rel=0.3)
    norms = {key: value for key, value in state.items() if "norm" in key}
    assert len(norms) == 18
    assert all((value == (1 if key.endswith("weight") else 0)).all() for key, value in norms.items())


# The authors' checkpoints.


@STEPS
@torch.no_grad()
def test_an_exported_checkpoint_loads_bit_for_bit(step, tmp_path):
    model = tiny(step=step)
    fill_state_dict(model)
    content = {"model": model.released_state_dict(), "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 0}}}
    torch.save(content, tmp_path / "x_checkpoint.bin")
    by_file, by_entries = (TransFG(TINY, 64, 10, step).eval() for _ in range(2))
    load_checkpoint(by_file, tmp_path / "x_checkpoint.bin")
    by_entries.load_released(content["model"])
    for again in (by_file, by_entries):
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
        assert torch.equal(again(images()), model(images()))


def test_a_checkpoint_in_the_names_of_this_model_is_left_alone():
    model = tiny()
    kept = model.from_released(model.state_dict())
    assert list(kept) == list(model.state_dict())
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())


QUERY, KEY = (f"transformer.encoder.layer.1.attn.{name}.weight" for name in ("query", "key"))


def assert_refused(model, state, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        model.load_released(state)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),  # the shapes of other entries; None: no such entry
    [
        ({QUERY: None}, f"lacks {QUERY}"),
        ({"part_head.bias": None}, r"lacks part_head\.bias"),
        ({QUERY: None, KEY: None}, f"lacks {KEY} and 1 more"),
        ({"head.weight": (10, 48)}, r"holds the unknown head\.weight"),
        ({"part_head.bias": (9,)}, r"part_head\.bias of shape \(9,\)"),
        ({QUERY: (47, 48)}, QUERY),
        ({QUERY: (48, 47)}, QUERY),
        ({QUERY: (40, 48), KEY: (56, 48)}, QUERY),  # as many rows together
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_changes_nothing_and_says_why(changes, message):
    model = tiny()
    state = model.released_state_dict() | {key: torch.zeros(shape or 0) for key, shape in changes.items()}
    assert_refused(model, {key: value for key, value in state.items() if changes.get(key, ()) is not None}, message)


@pytest.mark.parametrize("state", [{}, {"fc.weight": torch.zeros(10, 48)}], ids=["empty", "foreign"])
def test_a_file_of_something_else_is_refused(state):
    assert_refused(tiny(), state, "checkpoint")


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({}, {"num_classes": 7}, r"part_head\.weight of shape \(7, 48\), .*\(10, 48\)"),
        ({}, {"step": None}, r"position_embeddings of shape \(1, 17, 48\), .*\(1, 26, 48\)"),
        ({}, {"img_size": 96}, r"position_embeddings of shape \(1, 50, 48\), .*\(1, 26, 48\)"),
        ({"num_layers": 5}, {}, r"lacks transformer\.encoder\.layer\.3\."),
        ({"num_layers": 3}, {}, r"holds the unknown transformer\.encoder\.layer\.2\."),
        ({}, {"mlp_dim": 192}, r"fc1\.(weight|bias) of shape \(192.*, this model needs \(96"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_says_which(ours, theirs, message):
    assert_refused(tiny(**ours), tiny(**theirs).released_state_dict(), message)


# What the backward pass keeps.


def test_no_matrix_of_all_tokens_by_all_tokens_is_kept_for_the_backward_pass():
    model, shapes = tiny((64, 96)).train(), []  # 36 tokens: no other size is 36
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda t: t):
        loss, _ = model(images(2, (64, 96)), LABELS)
    assert sum(36 in shape for shape in shapes) > 20  # they are watched indeed
    assert not [shape for shape in shapes if list(shape).count(36) > 1]
    loss.backward()


@STEPS
def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(step):
    plain, saving = tiny(step=step).train(), tiny(step=step).train()
    saving.set_grad_checkpointing(True)
    calls, losses = [], []
    saving.base_model.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        torch.manual_seed(0)
        loss, _ = model(images(), LABELS)
        loss.backward()
        losses.append(loss)
    assert len(calls) == 2
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    torch.manual_seed(1)
    assert not torch.equal(plain(images(), LABELS)[0], losses[0])  # there is dropout
