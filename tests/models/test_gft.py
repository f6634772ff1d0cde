import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import fill, fill_image, fill_state_dict
from parity import GOLDEN, LABELS, TINY, assert_figures, plain_attention, state_dict_figures
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from common.models import GFT
from common.models.gft import HierarchicalAttention, importance, kept_per_stage

SIDES = pytest.mark.parametrize("released", [False, True], ids=["described", "released"])
ALONE = GOLDEN["hierarchical_attention_tiny"]
RECORDED = GOLDEN["gft"]


def tiny(released=False, backbone="vit_base_patch16_224", **changes):
    model = GFT(backbone, released=released, **{**TINY, **changes})
    fill_state_dict(model)
    return model.eval()


def images(batch=2, size=(32, 32)):
    return fill_image(batch, 3, *size)


# The recorded figures of the released classes.


@pytest.fixture(scope="module")
def base():
    """The released GFT at full size with formula weights."""
    model = GFT(num_classes=10, released=True, weight_init="skip")
    fill_state_dict(model)
    return model.eval()


def assert_stages(stages, recorded, rtol):
    for stage, figures in zip(stages, recorded, strict=True):
        for row, chk in zip(stage.importance, figures["importance"], strict=True):
            assert_figures(row, chk, rtol=rtol, atol=1e-5)
        for sample in range(2):
            for key, count in ((f"selected_sample{sample}", None), (f"selected_sample{sample}_first16", 16)):
                if key in figures:
                    assert stage.indices[sample].tolist()[:count] == figures[key]


@torch.no_grad()
def test_full_size_equals_the_released_class_in_evaluation(base):
    logits, stages = base(fill_image(2, 3, 224, 224), return_selection=True)
    torch.testing.assert_close(logits, torch.tensor(RECORDED["eval_logits"]), atol=5e-5, rtol=0)
    assert [stage.indices.shape[1] for stage in stages] == [147, 98, 49]
    assert_stages(stages, RECORDED["eval_stages"], rtol=5e-4)
    torch.testing.assert_close(base(fill_image(2, 3, 224, 224)), logits, atol=5e-6, rtol=0)


@torch.no_grad()
def test_full_size_equals_the_released_class_over_two_training_calls(base):
    model = base.train()
    first = fill_image(2, 3, 224, 224)
    for call, batch in enumerate((first, first.flip(3)), start=1):
        logits, stages = model(batch, return_selection=True)
        recorded = RECORDED["eval_logits" if call == 1 else "train_call2_logits"]
        torch.testing.assert_close(logits, torch.tensor(recorded), atol=5e-5, rtol=0)
        assert_stages(stages, RECORDED[f"train_call{call}_stages"], rtol=5e-4)
        emas = model.training_state().values()
        for ema, chk in zip(emas, RECORDED[f"ema_after_call{call}"], strict=True):
            assert_figures(ema, chk, rtol=1e-4, atol=1e-4)
    model.eval().load_training_state({})


def test_full_size_loss_and_gradients_equal_the_released_class(base):
    loss = F.cross_entropy(base(fill_image(2, 3, 224, 224)), LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(RECORDED["loss"], abs=1e-5)
    parameters = dict(base.named_parameters())
    for name, chk in RECORDED["grads"].items():
        assert parameters[name].grad.double().norm().item() == pytest.approx(chk["norm"], rel=1e-5), name
    base.zero_grad()


@SIDES
def test_names_shapes_and_order_of_the_state_dict_are_the_released_ones(released):
    model = GFT(num_classes=10, released=released, weight_init="skip")
    assert state_dict_figures(model) == RECORDED["state_dict"]


@SIDES
@pytest.mark.parametrize("num_classes", [100, 101, 80])
def test_parameter_counts_are_the_released_ones(num_classes, released):
    model = GFT(num_classes=num_classes, released=released, weight_init="skip")
    recorded = RECORDED["param_counts"][str(num_classes)]
    assert sum(p.numel() for p in model.parameters()) == recorded["total"]
    if released:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == recorded["that_can_influence_logits"]


@torch.no_grad()
def test_attention_alone_equals_the_released_class():
    gala = HierarchicalAttention(48, num_heads=3)
    assert state_dict_figures(gala) == ALONE["state_dict"]
    fill_state_dict(gala)
    first, second = fill("ha_tokens_1", (2, 20, 48)), fill("ha_tokens_2", (2, 20, 48))

    def call(tokens):
        q, k, v = gala.heads(tokens)
        return gala.attend(q, k, v), importance(gala.score(q, k))

    def assert_equal(ours, recorded):
        torch.testing.assert_close(ours, torch.tensor(recorded), rtol=1e-4, atol=1e-7)

    gala.eval()
    out, weights = call(first)
    assert_figures(out, ALONE["eval_out"], rtol=1e-5, atol=1e-5)
    assert_equal(weights, ALONE["eval_importance"])
    assert gala.ema is None
    gala.train()
    for index, tokens in enumerate((first, second), start=1):
        out, weights = call(tokens)
        assert_equal(weights, ALONE[f"train_call{index}_importance"])
        assert_equal(gala.ema, ALONE[f"train_call{index}_ema"])
    assert_figures(out, ALONE["train_call2_out"], rtol=1e-5, atol=1e-5)
    _, weights = call(first[:1])  # a ragged last batch starts the average afresh
    assert_equal(weights, ALONE["train_call3_batch1_importance"])
    assert_equal(gala.ema, ALONE["train_call3_batch1_ema"])


def test_scores_that_are_not_finite_do_not_stay_in_the_average():
    """One bad image would spoil its place in every later batch."""
    gala, twin = (HierarchicalAttention(48, num_heads=3).train() for _ in range(2))
    twin.load_state_dict(gala.state_dict())
    scores = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
    for step, bad in ((0, 2), (2, 1)):
        for gone, batch in enumerate(scores):
            spoiled = batch.clone()
            if gone == step:
                spoiled[bad, 7] = float("nan")
            gala._average(spoiled)
            twin._average(batch)
        assert gala.ema.isfinite().all()
        kept = [row for row in range(3) if row != bad]
        assert torch.equal(gala.ema[kept], twin.ema[kept])
        gala.ema = twin.ema = None


# A direct formulation of both sides: materialised N x N scores, loops over images, heads and tokens.


def reference_scores(gala, raw):
    """Return the z-scores (P,) of raw scores (H, P, N), by the definition."""
    mean = raw.mean(-1)
    num_heads, num_tokens = mean.shape
    strength = torch.zeros(num_tokens + 2, dtype=raw.dtype)
    for i in range(num_tokens):
        before, after = max(i - 1, 0), min(i + 1, num_tokens - 1)
        slope = (mean[:, after] - mean[:, before]) / (after - before)
        strength[i + 1] = slope.abs().sum() / num_heads
    kernel = gala.smooth.weight.flatten()
    smoothed = torch.stack([(kernel * strength[i : i + 3]).sum() for i in range(num_tokens)])
    spread = ((smoothed - smoothed.mean()) ** 2).sum() / (num_tokens - 1)
    return (smoothed - smoothed.mean()) / (spread.sqrt() + 1e-6)


@torch.no_grad()
def reference(model, batch, emas=None):
    """Return logits, importance per stage and image, and patches per stage and image; `emas` holds training state."""
    vit, lead = model.base_model, 0 if model.released else 1
    patches, prefix = vit.forward_intermediates(
        batch, indices=[7], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[0]
    num_patches, logits, weights, kept = patches.shape[1], [], [], []
    for image in range(len(batch)):
        cls = prefix[image, 0]
        positions = list(range(num_patches))
        tokens = patches[image] if model.released else torch.cat((cls[None], patches[image]))
        for stage, (gala, ratio) in enumerate(zip(model.hierarchical_blocks, (0.75, 0.5, 0.25), strict=True)):
            out, raw = plain_attention(gala, tokens)
            scores = reference_scores(gala, raw[:, lead:])
            if emas is not None:
                before = emas.get((stage, image), scores)
                emas[stage, image] = 0.9 * before + 0.1 * scores
                scores = 0.5 * (scores + emas[stage, image])
            weight = (scores / 0.1).exp() / (scores / 0.1).exp().sum()
            order = sorted(range(len(weight)), key=lambda i: -weight[i].item())[: int(num_patches * ratio)]
            positions = [positions[i] for i in order]
            attended = out if model.released else tokens + out
            tokens = attended[list(range(lead)) + [i + lead for i in order]]
            weights.append(weight)
            kept.append(positions)
        logits.append(model.classifier(cls if model.released else tokens[0]))
    return torch.stack(logits), weights, kept


def assert_equals_reference(model, batch, emas=None):
    logits, stages = model(batch, return_selection=True)
    expected, weights, kept = reference(model, batch, emas)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for image in range(len(batch)):
        for stage in range(3):
            index = 3 * image + stage
            torch.testing.assert_close(stages[stage].importance[image], weights[index], rtol=1e-7, atol=1e-12)
            assert stages[stage].patches[image].tolist() == kept[index]


@SIDES
@pytest.mark.parametrize(
    ("backbone", "prefix_tokens", "size"),
    [
        ("vit_base_patch16_224", 1, (32, 32)),
        ("deit_tiny_distilled_patch16_224", 2, (32, 24)),
        ("vit_small_patch14_reg4_dinov2", 5, (24, 32)),  # position embedding for the patches alone, layer scale
        ("vit_base_patch16_clip_224", 1, (24, 24)),  # norm before the blocks
    ],
)
def test_equals_the_direct_formulation_in_float64(backbone, prefix_tokens, size, released):
    model = tiny(released, backbone, img_size=size).double()
    assert model.base_model.num_prefix_tokens == prefix_tokens
    assert_equals_reference(model, images(2, size).double())


@SIDES
def test_equals_the_direct_formulation_over_training_calls(released):
    model, emas = tiny(released).double().train(), {}
    for batch in (images(), images().flip(3), images().flip(2)):
        assert_equals_reference(model, batch.double(), emas)
    for (stage, image), ema in emas.items():
        torch.testing.assert_close(model.hierarchical_blocks[stage].ema[image], ema, rtol=1e-9, atol=1e-9)


# What reaches the logits.


def gala_names(model):
    return [name for name, _ in model.named_parameters() if name.startswith("hierarchical_blocks.")]


def perturbed_logits(model, name):
    other = copy.deepcopy(model)
    parameter = other.get_parameter(name)
    with torch.no_grad():
        parameter.copy_(fill(f"other {name}", parameter.shape))
        return other(images())


def test_described_every_gala_weight_moves_the_logits_but_the_last_smoothing():
    model = tiny()
    with torch.no_grad():
        logits = model(images())
    moved = {name for name in gala_names(model) if (perturbed_logits(model, name) - logits).abs().max() > 1e-4}
    assert set(gala_names(model)) - moved == {"hierarchical_blocks.2.smooth.weight"}
    assert torch.equal(perturbed_logits(model, "hierarchical_blocks.2.smooth.weight"), logits)


def test_described_queries_keys_and_values_of_every_stage_get_gradients():
    model = tiny()
    F.cross_entropy(model(images()), torch.tensor([3, 5])).backward()
    for stage, gala in enumerate(model.hierarchical_blocks):
        for part, grad in zip("qkv", gala.qkv.weight.grad.chunk(3), strict=True):
            assert (grad.norm(dim=1) > 0).all(), f"{part} of stage {stage + 1}"
        assert gala.proj.weight.grad.norm() > 0
        assert gala.proj.bias.grad.norm() > 0


def test_released_logits_ignore_everything_behind_block_8():
    model = tiny(released=True)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    with torch.no_grad():
        logits = model(images())
        for name in frozen:
            model.get_parameter(name).normal_()
        assert torch.equal(model(images()), logits)


def test_released_stages_run_only_for_the_selection():
    model, calls = tiny(released=True).train(), []
    for gala in model.hierarchical_blocks:
        gala.qkv.register_forward_hook(lambda *_: calls.append(1))
    logits = model(images())
    assert (len(calls), model.training_state()) == (0, {})
    torch.testing.assert_close(model(images(), return_selection=True)[0], logits, atol=5e-6, rtol=0)
    assert len(calls) == 3


@SIDES
def test_logits_are_the_same_with_and_without_the_selection(released):
    model = tiny(released)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), model(images(), return_selection=True)[0], atol=5e-6, rtol=0)


@SIDES
def test_only_parameters_that_can_get_a_gradient_require_one(released):
    model = tiny(released, backbone="deit_tiny_distilled_patch16_224")
    behind = ("base_model.blocks.8.", "base_model.norm.", "base_model.head.", "base_model.head_dist.")
    expected = {name for name, _ in model.named_parameters() if name.startswith(behind)}
    expected |= {name for name in gala_names(model) if released or "smooth" in name}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == expected
    model(images()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == expected


# Batches, state, checkpoints.


@SIDES
@torch.no_grad()
def test_evaluation_at_batch_1_equals_the_rows_of_a_batch(released):
    model, batch = tiny(released).double(), images(3).double()
    logits, stages = model(batch, return_selection=True)
    for row in range(3):
        alone, stages_alone = model(batch[row : row + 1], return_selection=True)
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-10, atol=1e-10)
        for stage, stage_alone in zip(stages, stages_alone, strict=True):
            assert torch.equal(stage_alone.patches[0], stage.patches[row])


@SIDES
def test_a_ragged_last_batch_trains_and_starts_the_averages_afresh(released):
    model = tiny(released).train()
    for batch in (3, 1, 3):
        logits, stages = model(images(batch), return_selection=True)
        logits.sum().backward()
        assert [tuple(ema.shape) for ema in model.training_state().values()] == [(batch, n) for n in (64, 48, 32)]
        assert [tuple(stage.indices.shape) for stage in stages] == [(batch, n) for n in (48, 32, 16)]
    evaluated = tiny(released)
    torch.testing.assert_close(model.eval()(images(2)), evaluated(images(2)))  # evaluation never reads them


@SIDES
def test_training_state_makes_a_resumed_run_exact(released):
    model = tiny(released).train()
    assert not any("ema" in key for key in model.state_dict())
    assert model.training_state() == {}
    model(images(), return_selection=True)
    saved = model.training_state()
    resumed = tiny(released).train()
    resumed.load_training_state(saved)
    batch = images().flip(3)
    for _ in range(2):
        (logits, stages), (logits2, stages2) = model(batch, True), resumed(batch, True)
        assert torch.equal(logits, logits2)
        for a, b in zip(stages, stages2, strict=True):
            assert torch.equal(a.importance, b.importance)
    assert not torch.equal(saved["hierarchical_blocks.0.ema"], model.hierarchical_blocks[0].ema)  # a copy
    with pytest.raises(UserError, match=r"training state holds \['blocks.ema'\]"):
        resumed.load_training_state({"blocks.ema": torch.zeros(1)})


@SIDES
def test_released_checkpoints_load_whatever_their_last_batch_was(released):
    source, model = tiny(released), GFT(released=released, **TINY).train()
    model(images(), return_selection=True)
    checkpoint = dict(source.state_dict())
    for stage, num_patches in enumerate((64, 48, 32)):
        checkpoint[f"hierarchical_blocks.{stage}.ema_grad"] = torch.zeros(5, num_patches)
    keys = set(checkpoint)
    model.load_state_dict(checkpoint)
    assert set(checkpoint) == keys
    assert torch.equal(model.eval()(images()), source(images()))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**checkpoint, "ema_grad": torch.zeros(1)})
    del checkpoint["classifier.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(checkpoint)


# Importance.


def test_patches_kept_are_counted_from_the_images_patches():
    assert kept_per_stage(196) == [147, 98, 49]
    assert kept_per_stage(9) == [6, 4, 2]


def test_selection_keeps_its_order_where_the_importance_underflows(monkeypatch):
    def scores(gala, q, k):
        return torch.linspace(0, 40, q.shape[2]).expand(q.shape[0], -1)

    monkeypatch.setattr(HierarchicalAttention, "score", scores)
    _, stages = tiny()(images(), return_selection=True)
    assert (stages[0].importance[0] == 0).sum() > 16  # so many that ties alone would choose
    assert stages[0].indices[0].tolist() == list(range(63, 15, -1))


@torch.no_grad()
def test_importance_is_float32_under_autocast():
    gala = tiny().hierarchical_blocks[0]
    q, k, _ = (part.bfloat16() for part in gala.heads(fill("tokens", (2, 50, 48))))
    expected = gala.score(q.float(), k.float())
    with torch.autocast("cpu", torch.bfloat16):
        scores = gala.score(q, k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected)


@SIDES
def test_bfloat16_autocast_trains(released):
    model = tiny(released).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, stages = model(images(), return_selection=True)
    assert all(stage.importance.dtype == torch.float32 for stage in stages)
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_score_never_holds_anything_as_large_as_a_score_matrix():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    gala, num_tokens = tiny().hierarchical_blocks[0], 200
    q, k, _ = gala.heads(fill("tokens", (1, num_tokens, 48)))
    with Largest() as largest:
        gala.score(q, k)
    assert largest.size <= num_tokens * 48


# Backbones, checkpointing, compilation.


def test_timms_dropouts_apply_and_selection_counts_surviving_patches():
    model = tiny(patch_drop_rate=0.5, pos_drop_rate=0.1, drop_path_rate=0.1).train()
    logits, stages = model(images(), return_selection=True)
    assert [stage.indices.shape[1] for stage in stages] == [24, 16, 8]
    assert not torch.equal(logits, model(images()))


@pytest.mark.parametrize(
    ("backbone", "changes", "message"),
    [
        ("no_such_vit", {}, "'no_such_vit' is unknown to timm"),
        ("vit_base_patch16_224.no_such_tag", {}, "Invalid pretrained tag"),
        ("resnet18", {}, "'resnet18' cannot be built"),
        ("swin_tiny_patch4_window7_224", {"img_size": 224}, "is a SwinTransformer"),
        ("vit_base_patch16_siglip_224", TINY, "has no CLS token"),
        ("vit_base_patch16_224", {**TINY, "depth": 8}, "has 8 blocks: a timm VisionTransformer with a CLS token"),
        ("vit_base_patch16_224", {**TINY, "img_size": 33}, "img_size 33 is not a multiple of the patch size"),
        ("vit_base_patch16_224", {**TINY, "img_size": (32, 30)}, r"img_size \(32, 30\) is not a multiple"),
        ("vit_base_patch16_224", {**TINY, "img_size": (4, 8)}, "minimum of 4 patches"),
    ],
)
def test_a_backbone_that_cannot_serve_is_refused(backbone, changes, message):
    with pytest.raises(UserError, match=message):
        GFT(backbone, **changes)


def test_the_backbone_keeps_its_own_head_and_names():
    ours = GFT("vit_tiny_patch16_224").base_model.state_dict()
    theirs = timm.create_model("vit_tiny_patch16_224").state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@SIDES
def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(released):
    plain, saving = tiny(released).train(), tiny(released).train()
    saving.set_grad_checkpointing()
    calls = []
    saving.base_model.blocks[7].norm1.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        model(images()).square().sum().backward()
    assert len(calls) == 2
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.fixture
def shallow(monkeypatch):
    """Two ViT blocks instead of eight, for tests whose time is the tracing of blocks that are all alike."""
    monkeypatch.setattr("common.models.gft.DEPTH", 2)
    return {"depth": 3}


@SIDES
def test_compiles_into_one_graph(released, shallow):
    torch.compiler.reset()
    model = tiny(released, **shallow)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(), True), eager(images(), True))
    for batch in (images(), images().flip(3)):
        logits = compiled.train()(batch)
        torch.testing.assert_close(logits, eager.train()(batch))
        logits.square().sum().backward()
    assert len(model.training_state()) == (0 if released else 2)
    for key, ema in eager.training_state().items():
        torch.testing.assert_close(model.training_state()[key], ema)


@SIDES
def test_exports_with_a_dynamic_batch(released, shallow):
    model = tiny(released, **shallow)
    dynamic = {"images": {0: torch.export.Dim("batch", min=1, max=64)}, "return_selection": None}
    program = torch.export.export(model, (images(3), True), dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(images(5), True), model(images(5), True))


def test_initial_smoothing_is_a_sum_of_three():
    assert GFT(**TINY).hierarchical_blocks[2].smooth.weight.flatten().tolist() == [1, 1, 1]
