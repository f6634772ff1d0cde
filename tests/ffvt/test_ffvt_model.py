"""ffvt.model: the figures of the released class, the paper's equations, files there and back, and what is refused."""

import copy
import functools
import hashlib
import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import check_figures, fill, fill_image, fill_npz, fill_state_dict, vit_spec
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from common.models.vit import embed, run_block
from common.npz import google_to_timm, read_npz, resize_position_embedding
from ffvt.model import CONFIGS, FFVT, Config, maws_scores, resnet_unit

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ffvt.json").read_text())
LABELS = torch.tensor([3, 7])
TINY = Config(hidden_size=48, mlp_dim=96, num_heads=3, num_layers=4)
FUSION = pytest.mark.parametrize("fusion", [True, False], ids=["fusion", "plain"])
# Recorded models: configuration, image size, picked tokens a block (None: no fusion).
RECORDED = {
    "tiny_ff1": (TINY, 64, 3),
    "tiny_ff0": (TINY, 64, None),
    "b16_224_ff12": (CONFIGS["ViT-B_16"], 224, 12),
    "b16_224_off": (CONFIGS["ViT-B_16"], 224, None),
    "b32_224_off": (CONFIGS["ViT-B_32"], 224, None),
    "r50_448_ff12": (CONFIGS["R50-ViT-B_16"], 448, 12),
    "r50_224_ff12": (CONFIGS["R50-ViT-B_16"], 224, 12),
    "r50_224_off": (CONFIGS["R50-ViT-B_16"], 224, None),
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


def tiny(img_size=64, fusion=True, num_token=3, num_classes=10, smoothing=0.0, **sizes):
    return fill_released(FFVT(replace(TINY, **sizes), img_size, num_classes, fusion, num_token, smoothing))


def recorded(name, dropout=0.1):
    config, img_size, num_token = RECORDED[name]
    return FFVT(replace(config, dropout=dropout), img_size, 10, num_token is not None, num_token or 12)


def images(batch=2, size=(64, 64)):
    return fill_image(batch, 3, *size)


def close_to(figures, rtol=1e-7):
    atol = rtol * max(1.0, figures["abs_sum"])
    return {key: value if key == "shape" else pytest.approx(value, abs=atol) for key, value in figures.items()}


# The recorded figures of the released class.


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_equals_the_released_class_in_evaluation(name):
    model, figures = fill_released(recorded(name)), GOLDEN["models"][name]
    batch = images(size=(RECORDED[name][1],) * 2)
    logits, selection = model(batch, return_selection=True)
    torch.testing.assert_close(logits, torch.tensor(figures["logits"]), atol=5e-5, rtol=0)
    assert [indices.tolist() for indices in selection] == figures.get("selection", [])
    for smoothing, loss in figures["losses"].items():
        model.smoothing_value = float(smoothing)
        ours, same_logits = model(batch, LABELS)
        assert ours.item() == pytest.approx(loss, abs=5e-5)  # the recorded R50 is 2e-5 from float64, all others 2e-6
        assert torch.equal(same_logits, logits)


@pytest.mark.parametrize("smoothing", ["0", "0.1"])
@pytest.mark.parametrize("name", [name for name, figures in GOLDEN["models"].items() if "training" in figures])
def test_loss_and_gradients_equal_the_released_class_in_training(name, smoothing):
    model, figures = fill_released(recorded(name, dropout=0.0)).train(), GOLDEN["models"][name]["training"][smoothing]
    model.smoothing_value = float(smoothing)
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
    if "state_dict" in figures:
        entries = model.released_state_dict().items()
        lines = "".join(f"{key}:{'x'.join(map(str, value.shape))}\n" for key, value in entries)
        assert {"n": len(entries), "sha1": hashlib.sha1(lines.encode()).hexdigest()} == figures["state_dict"]


@torch.no_grad()
def test_a_block_alone_equals_the_released_one_where_its_epsilon_matters():
    model, prefix = tiny(), "transformer.encoder.layer.0."
    state = model.released_state_dict()
    state |= {key: fill(key.removeprefix(prefix), v.shape) for key, v in state.items() if key.startswith(prefix)}
    model.load_released(state)
    hidden, q, k = run_block(model.base_model.blocks[0], 1e-3 * fill("ln_probe", (2, 5, 48)))
    alone = GOLDEN["block"]
    torch.testing.assert_close(hidden[0, :2], torch.tensor(alone["hidden"]), atol=1e-5, rtol=0)
    assert check_figures(hidden) == close_to(alone["hidden_chk"])
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    torch.testing.assert_close(scores.softmax(-1)[0, 0], torch.tensor(alone["probs"]), atol=1e-6, rtol=0)
    contribution = scores.softmax(-2)[0, :, :, 0]
    torch.testing.assert_close(contribution, torch.tensor(alone["contribution"]), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_resnet_unit_alone_equals_the_released_one():
    unit = resnet_unit(64, 128, stride=2).eval()
    for name, parameter in unit.named_parameters():
        released = name.replace("downsample.norm", "gn_proj").replace("downsample.conv", "downsample")
        parameter.copy_(fill(released.replace("norm", "gn"), parameter.shape))
    out, alone = unit(fill_image(1, 64, 6, 6)), GOLDEN["resnet_unit"]
    # The shortcut's epsilon, 1e-5 and not 1e-6, moves the sum by 9e-8 of itself; rounding does by 5e-9.
    assert check_figures(out) == close_to(alone["out"], rtol=5e-8)
    assert out.flatten()[: len(alone["first"])].tolist() == pytest.approx(alone["first"], abs=1e-5)


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


def assert_position(position, figures):
    assert check_figures(position) == close_to(figures["position"])
    for place, value in figures["position_at"].items():
        token, channel = map(int, place.split(","))
        assert position[0, token, channel].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, figures in GOLDEN["npz"].items() for size in figures["sizes"]]
)
@torch.no_grad()
def test_loading_npz_equals_the_released_loader(npz_files, name, size):
    file, fusion = name.split("_")
    num_token, config = (3, TINY) if file == "tiny" else (12, CONFIGS["ViT-B_16"])
    model = fill_released(FFVT(config, int(size), 10, fusion == "ff1", num_token))
    report = model.load_npz(npz_files[file])
    figures, state = GOLDEN["npz"][name], model.released_state_dict()
    for key, chk in figures["params"].items():
        assert check_figures(state[key]) == close_to(chk), key
    assert_position(state["transformer.embeddings.position_embeddings"], figures["sizes"][size])
    assert [key for key, value in state.items() if torch.equal(value, filled(key, tuple(value.shape)))] == figures[
        "left"
    ]
    assert not any(state[key].any() for key in ("head.weight", "head.bias"))
    behind = f"base_model.blocks.{config.num_layers - 1}.", "base_model.norm."
    behind = (*(behind if fusion == "ff1" else ()), "base_model.head.")
    assert set(report.left) == {key for key in model.state_dict() if key.startswith(behind)}
    assert {*report.loaded, *report.left} == set(model.state_dict())
    for key in ("head.weight", "head.bias"):
        model.get_parameter(f"base_model.{key}").copy_(filled(key, tuple(state[key].shape)))
    logits = model(images(size=(int(size),) * 2))
    torch.testing.assert_close(logits, torch.tensor(figures["sizes"][size]["logits"]), atol=5e-5, rtol=0)


@torch.no_grad()
def test_loading_npz_with_its_head_equals_the_released_loader(npz_files):
    model, figures = tiny(), GOLDEN["npz"]["tiny_ff1"]["with_head"]
    report = model.load_npz(npz_files["tiny"], zero_head=False)
    for key, chk in figures["params"].items():
        assert check_figures(model.released_state_dict()[key]) == close_to(chk), key
    assert not any("head" in key for key in report.left)
    torch.testing.assert_close(model(images()), torch.tensor(figures["logits"]), atol=5e-5, rtol=0)


def test_a_head_of_other_classes_is_refused_only_where_it_is_wanted(npz_files):
    model = tiny(num_classes=7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"tiny\.npz has head\.weight of shape \(10, 48\), but .* needs \(7, 48\)"):
        model.load_npz(npz_files["tiny"], zero_head=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "base_model.head.weight" in model.load_npz(npz_files["tiny"]).left


@FUSION
def test_an_npz_file_of_another_depth_is_refused_and_changes_nothing(npz_files, fusion):
    model = tiny(num_layers=3, fusion=fusion)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"tiny\.npz has 4 blocks, but .* has 3"):
        model.load_npz(npz_files["tiny"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_npz_file_loads_into_an_oblong_model(npz_files):
    model = tiny((32, 128))  # 2 x 8 patches: as many as 4 x 4, in another order
    model.load_npz(npz_files["tiny"])
    position = google_to_timm(read_npz(npz_files["tiny"]))["pos_embed"]
    assert torch.equal(model.base_model.pos_embed, resize_position_embedding(position, (2, 8)))


@torch.no_grad()
def test_without_fusion_it_is_timms_vit_loaded_by_timm(npz_files):
    ours = FFVT(CONFIGS["ViT-B_16"], 224, 10, feature_fusion=False).eval()
    theirs = timm.create_model("vit_base_patch16_224", num_classes=10).eval()
    ours.load_npz(npz_files["b16"], zero_head=False)
    theirs.load_pretrained(str(npz_files["b16"]))
    torch.testing.assert_close(ours(images(size=(224, 224))), theirs(images(size=(224, 224))), atol=1e-5, rtol=0)


# The equations, written out: loops over images, heads and tokens.


def reference_scores(q, k):
    """Return the mutual attention weights (B, N) in float64, one product of a query and a key at a time."""
    q, k = q.double(), k.double()
    batch, heads, num_tokens, width = q.shape
    scores = torch.zeros(batch, num_tokens, dtype=torch.float64)
    for b in range(batch):
        from_cls, to_cls = [0.0] * num_tokens, [0.0] * num_tokens
        for h in range(heads):
            s = [
                [(q[b, h, i] @ k[b, h, j]).item() / math.sqrt(width) for j in range(num_tokens)]
                for i in range(num_tokens)
            ]
            over_keys = sum(math.exp(s[0][j]) for j in range(num_tokens))
            over_queries = sum(math.exp(s[i][0]) for i in range(num_tokens))
            for i in range(num_tokens):
                from_cls[i] += math.exp(s[0][i]) / over_keys / heads
                to_cls[i] += math.exp(s[i][0]) / over_queries / heads
        for i in range(num_tokens):
            scores[b, i] = from_cls[i] * to_cls[i]
    return scores


SHAPES = pytest.mark.parametrize("shape", [(2, 3, 17, 16), (1, 1, 1, 4), (1, 12, 26, 64), (3, 2, 5, 8)], ids=str)


def queries_and_keys(shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, generator=generator).unbind()


@SHAPES
def test_maws_equals_the_equations(shape):
    q, k = queries_and_keys(shape)
    scores = maws_scores(q, k)
    assert (scores.dtype, scores.shape) == (torch.float32, (shape[0], shape[2]))
    torch.testing.assert_close(scores.double(), reference_scores(q, k), rtol=1e-6, atol=1e-8)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_maws_of_half_precision_is_float32_and_off_by_the_rounding_of_its_inputs_alone(shape, dtype):
    q, k = (part.to(dtype) for part in queries_and_keys(shape))
    scores = maws_scores(q, k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), reference_scores(q, k), rtol=1e-6, atol=1e-8)


def test_maws_stays_float32_under_autocast():
    q, k = queries_and_keys((2, 3, 17, 16))
    with torch.autocast("cpu", torch.bfloat16):
        scores = maws_scores(q, k)
        of_half = maws_scores(q.bfloat16(), k.bfloat16())
    assert scores.dtype == of_half.dtype == torch.float32
    assert torch.equal(scores, maws_scores(q, k))
    assert torch.equal(of_half, maws_scores(q.bfloat16(), k.bfloat16()))


def test_maws_never_holds_anything_as_large_as_a_score_matrix():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    q, k = queries_and_keys((1, 3, 200, 16))
    with Largest() as largest:
        maws_scores(q, k)
    assert largest.size <= q.numel()


def reference(model, batch):
    """Return logits (B, C) and the picked indices, a list an image of a list a block, from the released entries."""
    config = Config(**model.config["config"])
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
        return x + dense(y * (1 + torch.erf(y / math.sqrt(2))) / 2, f"{name}.ffn.fc2"), q, k

    logits, picked = [], []
    for image in batch:
        kernel, bias = (state[f"embeddings.patch_embeddings.{name}"] for name in ("weight", "bias"))
        patches = F.unfold(image[None], config.patch_size, stride=config.patch_size)[0].T  # row after row of the image
        tokens = torch.cat((state["embeddings.cls_token"][0], patches @ kernel.flatten(1).T + bias))
        tokens = tokens + state["embeddings.position_embeddings"][0]
        fused, indices = [], []
        for i in range(config.num_layers - 1):
            tokens, q, k = run(tokens, f"encoder.layer.{i}")
            if model.feature_fusion:
                scores = reference_scores(q[None], k[None])[0].tolist()
                indices.append(sorted(range(len(scores)), key=lambda n: -scores[n])[: model.num_token])
                fused.append(tokens[indices[-1]])
        last, last_norm = f"encoder.layer.{config.num_layers - 1}", "encoder.encoder_norm"
        if model.feature_fusion:
            tokens, last, last_norm = (
                torch.cat((tokens[:1], *fused)),
                "encoder.ff_last_layer",
                "encoder.ff_encoder_norm",
            )
        tokens, _, _ = run(tokens, last)
        logits.append(dense(norm(tokens[0], last_norm), "head"))
        picked.append(indices)
    return torch.stack(logits), picked


def assert_equals_reference(model, batch):
    logits, selection = model(batch, return_selection=True)
    expected, picked = reference(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert [[indices[image].tolist() for indices in selection] for image in range(len(batch))] == picked


@torch.no_grad()
@FUSION
@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((64, 64), {}),
        ((64, 96), {}),  # 4 rows of 6 patches
        ((48, 32), {}),
        ((32, 48), {"patch_size": 8}),
        ((64, 64), {"num_layers": 2, "num_heads": 4}),
    ],
    ids=str,
)
def test_equals_the_equations_in_float64(size, sizes, fusion):
    assert_equals_reference(tiny(size, fusion, **sizes).double(), images(2, size).double())


@torch.no_grad()
def test_equals_the_equations_for_any_number_of_tokens():
    for num_token in (1, 2, 16):
        assert_equals_reference(tiny(num_token=num_token).double(), images().double())
    two_blocks = tiny(num_layers=2, num_token=1).double()  # the released class fails on these
    assert_equals_reference(two_blocks, images().double())


def test_loss_is_cross_entropy_smoothed_over_the_classes():
    for smoothing in (0.0, 0.1, 0.3):
        loss, logits = tiny(smoothing=smoothing)(images(), LABELS)
        log_p = logits.log_softmax(-1)
        expected = -(1 - smoothing) * log_p[[0, 1], LABELS] - smoothing * log_p.mean(-1)
        torch.testing.assert_close(loss, expected.mean())


# Batches, sizes, precision.


@FUSION
@torch.no_grad()
def test_a_batch_of_one_equals_the_rows_of_a_batch(fusion):
    model, batch = tiny(fusion=fusion), images(5)
    logits, selection = model(batch, return_selection=True)
    assert [indices.shape for indices in selection] == [(5, 3)] * 3 * fusion
    for row in range(5):
        alone, selection_alone = model(batch[row : row + 1], return_selection=True)
        torch.testing.assert_close(alone[0], logits[row], atol=1e-5, rtol=0)
        for indices, indices_alone in zip(selection, selection_alone, strict=True):
            assert torch.equal(indices_alone[0], indices[row])


def test_models_that_pick_other_numbers_of_tokens_do_not_interfere():
    three, before = tiny(), tiny()(images())
    five, plain = tiny(num_token=5), tiny(fusion=False)
    shapes = [[i.shape[1] for i in model(images(), return_selection=True)[1]] for model in (three, five, plain, three)]
    assert shapes == [[3, 3, 3], [5, 5, 5], [], [3, 3, 3]]
    assert torch.equal(three(images()), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_token": 17}, "--num_token 17: expected 1 to 16"),
        ({"num_token": 0}, "--num_token 0: expected 1 to 16"),
        ({"img_size": (16, 32), "num_token": 3}, "--num_token 3: expected 1 to 2"),
        ({"img_size": 65}, "--img_size 65: expected a multiple of the patch size 16"),
        ({"img_size": (64, 40)}, r"--img_size \(64, 40\): expected a multiple of the patch size 16"),
        ({"img_size": 0}, "--img_size 0: expected a multiple of the patch size 16"),
        ({"config": replace(TINY, num_layers=1)}, "feature fusion needs .*at least 2 blocks"),
        ({"config": CONFIGS["R50-ViT-B_16"], "img_size": 230}, "--img_size 230: expected a multiple of .* 16"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        FFVT(**{"config": TINY, "img_size": 64, "num_classes": 10, "num_token": 12, **arguments})
    assert "\n" not in str(caught.value)


def test_without_fusion_the_number_of_tokens_does_not_matter():
    assert FFVT(replace(TINY, num_layers=1), 64, 10, feature_fusion=False, num_token=1000)(images()).shape == (2, 10)


@FUSION
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_runs_with_and_without_fusion(name, fusion):
    side = 16 * CONFIGS[name].patch_size
    with torch.device("meta"):
        model = FFVT(CONFIGS[name], side, 200, fusion)
        logits, selection = model(torch.empty(2, 3, side, side), return_selection=True)
    assert logits.shape == (2, 200)
    assert [indices.shape for indices in selection] == [(2, 12)] * (CONFIGS[name].num_layers - 1) * fusion
    assert model.base_model.pos_embed.shape == (1, 257, CONFIGS[name].hidden_size)


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("ViT-B_16", "vit_base_patch16_224"),
        ("ViT-B_32", "vit_base_patch32_224"),
        ("ViT-L_16", "vit_large_patch16_224"),
        ("ViT-L_32", "vit_large_patch32_224"),
        ("ViT-H_14", "vit_huge_patch14_224"),
        ("R50-ViT-B_16", "vit_base_r50_s16_224"),
    ],
)
def test_every_configuration_has_the_sizes_of_timms_model(name, timms):
    with torch.device("meta"):
        ours, theirs = FFVT(CONFIGS[name], 224, 10).base_model, timm.create_model(timms, num_classes=10)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


def test_configurations_cannot_be_changed():
    assert list(CONFIGS) == ["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50-ViT-B_16"]
    with pytest.raises(TypeError):
        CONFIGS["ViT-B_16"] = TINY
    with pytest.raises(FrozenInstanceError):
        CONFIGS["ViT-B_16"].num_layers = 2


def test_the_recorded_arguments_build_the_same_model():
    model = tiny((64, 96), num_token=5, smoothing=0.1)
    again = FFVT(**json.loads(json.dumps(model.config)))
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


# Dropout, epsilon, initialisation.


@FUSION
def test_dropout_stands_behind_the_position_embedding_and_in_the_mlps_alone(fusion):
    model = tiny(fusion=fusion)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    places = ["pos_drop", *(f"blocks.{i}.mlp.drop{n}" for i in range(4) for n in (1, 2))]
    assert rates == {f"base_model.{place}": 0.1 for place in places}
    plain = FFVT(replace(TINY, dropout=0.0), 64, 10)
    assert not any(m.p for m in plain.modules() if isinstance(m, nn.Dropout))


@torch.no_grad()
def test_dropout_acts_in_training_on_tokens_and_mlps_as_counted():
    vit = tiny().train().base_model
    tokens = embed(vit, images(16))
    assert (tokens == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (tokens[:, 0] == 0).any()  # CLS too
    calls = []
    for module in vit.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: calls.append(module.p))
    run_block(vit.blocks[0], tokens)
    assert [rate for rate in calls if rate] == [0.1, 0.1]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_norm_has_the_released_epsilon(name):
    with torch.device("meta"):
        model = FFVT(CONFIGS[name], 448, 10)
    norms = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-6] * (2 * CONFIGS[name].num_layers + 1)


def assert_uniform(tensor, bound):
    assert 0.95 * bound < tensor.abs().max().item() <= bound


@FUSION
def test_initialisation_is_the_released_one(fusion):
    torch.manual_seed(0)
    model = FFVT(replace(TINY, hidden_size=96, mlp_dim=192), 64, 10, fusion)
    state = {key.removeprefix("base_model."): value for key, value in model.state_dict().items()}
    assert not any(state[key].any() for key in ("head.weight", "head.bias", "cls_token", "pos_embed"))
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


@FUSION
@torch.no_grad()
def test_an_exported_checkpoint_loads_bit_for_bit(fusion, tmp_path):
    model, again = tiny(fusion=fusion), FFVT(TINY, 64, 10, fusion, 3).eval()
    fill_state_dict(model)
    torch.save(model.released_state_dict(), tmp_path / "x_checkpoint.bin")
    again.load_released(torch.load(tmp_path / "x_checkpoint.bin", weights_only=True))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(again(images()), model(images()))


def test_a_hybrid_comes_back_from_its_export():
    config = replace(TINY, resnet_layers=(1, 2, 1))
    model, again = (FFVT(config, 64, 10, num_token=3) for _ in range(2))
    fill_state_dict(model)
    again.load_released(model.released_state_dict())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_in_the_names_of_this_model_is_left_alone():
    model = tiny()
    kept = model.from_released(model.state_dict())
    assert list(kept) == list(model.state_dict())
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())


QUERY, KEY = (f"transformer.encoder.layer.1.attn.{name}.weight" for name in ("query", "key"))
QUERY_OR_QKV = r"layer\.1\.attn\.query\.weight|blocks\.1\.attn\.qkv\.weight"


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
        ({"head.bias": None}, r"lacks head\.bias"),
        ({QUERY: None, KEY: None}, f"lacks {KEY} and 1 more"),
        ({"head.scale": (1,)}, r"holds the unknown head\.scale"),
        ({"head.bias": (9,)}, r"head\.bias of shape \(9,\)"),
        ({QUERY: (47, 48)}, QUERY_OR_QKV),
        ({QUERY: (48, 47)}, QUERY_OR_QKV),
        ({QUERY: (40, 48), KEY: (56, 48)}, QUERY_OR_QKV),  # as many rows together
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
        ({}, {"num_classes": 7}, r"head\.weight of shape \(7, 48\), .*\(10, 48\)|7 classes, .*10"),
        ({}, {"fusion": False}, "without feature fusion"),
        ({"fusion": False}, {}, "with feature fusion"),
        ({}, {"img_size": 96}, r"(position_embeddings|pos_embed) of shape \(1, 37, 48\), .*\(1, 17, 48\)"),
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
    model, shapes = tiny((64, 96)).train(), []  # 25 tokens: no other size is 25
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda t: t):
        loss, _ = model(images(2, (64, 96)), LABELS)
    assert sum(25 in shape for shape in shapes) > 20  # they are watched indeed
    assert not [shape for shape in shapes if list(shape).count(25) > 1]
    loss.backward()


@FUSION
def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(fusion):
    plain, saving = tiny(fusion=fusion).train(), tiny(fusion=fusion).train()
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
