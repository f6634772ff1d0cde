"""GLSim's models and their comparators against the figures of the released classes: a test a model and kind of figure.

A model is built, filled and run once; what it gives has the names of the recorded figures.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from figures import assert_close_to_figures, assert_within, build_filled, filled, golden, state_dict_figures
from formula import fill, fill_image
from tiny_models import objective_of
from torch import Tensor, nn

from common.models.vit import embed, num_heads, run_block
from common.train.loop import logits_of
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.model_utils.build import build_model
from glsim.model_utils.cal import CAL
from glsim.model_utils.config import WITHOUT_EFFECT
from glsim.model_utils.resnet import ResNet
from glsim.model_utils.timm_glsim import GLSimTimm
from glsim.model_utils.transfg import TransFG, contrastive_loss, joint_attention
from glsim.train_utils.recipe import Recipe
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import ELSEWHERE, read_config
from glsim.train_utils.yaml_config import WITHOUT_EFFECT as SETTINGS_WITHOUT_EFFECT

GLSIM, TIMM, TRANSFG = golden("glsim"), golden("glsim_timm"), golden("transfg")
SETTINGS, BUILDERS = golden("glsim_settings"), golden("glsim_builders")
METHOD_FILE = read_config(Path(__file__).parents[2] / "glsim" / "configs" / "methods" / "glsim.yaml")
LABELS = torch.tensor([3, 7])
SAME = torch.tensor([3, 3])

# The recorded models, by the options that they were built with.

AGGREGATOR = {"reducer": "cls", "aggregator": True, "aggregator_norm": True, "anchor_class_token": True}
METHOD = {**AGGREGATOR, "dynamic_anchor": True, "dynamic_top": 8}
B16 = {"model_name": "vit_b16", "num_classes": 10}
T16 = {"model_name": "vit_t16", "num_hidden_layers": 4, "num_classes": 10}
T16_96 = {**T16, **METHOD, "image_size": 96, "dynamic_top": 4}
OF_GLSIM: dict[str, dict[str, Any]] = {
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
    "tiny_96_anchor_no_aggregator_no_reducer": {**T16, "dynamic_anchor": True, "image_size": 96, "dynamic_top": 4},
    "b16_224_cos": {**B16, **METHOD},
    "b16_224_l2": {**B16, **METHOD, "sim_metric": "l2"},
    "b16_224_plain": B16,
}
# What the command lines recorded of glsvit_* and glsdeit* say.
OF_TIMM: dict[str, dict[str, Any]] = {
    "": {},
    "--cfg_method glsim.yaml": METHOD,
    "--cfg_method glsim.yaml --select_top_k": {**METHOD, "select_top_k": True},
    "--cfg_method glsim.yaml --inference_crops": {**METHOD, "inference_crops": False},
    "--classifier cls_pool": {"classifier": "cls_pool"},
    "--classifier pool": {"classifier": "pool"},
}
TINY = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3, "num_layers": 4}
OF_TRANSFG: dict[str, Callable[[], Any]] = {  # the last as the program builds it, which was recorded too
    "tiny_overlap": lambda: TransFG(TINY, 64, 10),
    "tiny_nonoverlap": lambda: TransFG(TINY, 64, 10, slide_step=None),
    "b16_224_overlap": lambda: build_model(Settings(model_name="transfg"), 10),
}


@pytest.fixture(autouse=True, scope="module")
def forget() -> Any:
    yield
    filled.cache_clear()
    seen.cache_clear()


def structure(model: Any) -> dict[str, Any]:
    figures = state_dict_figures(model.released_state_dict())
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"num_params": count, "state_dict": figures, "sha1": figures["sha1"]}


def train(model: Any, batch: Tensor) -> dict[str, Any]:
    """The loss and gradients of a step without dropout. Nothing of the model is left for another use."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss, _ = objective_of(model)(model.train(), batch, LABELS)
    loss.backward()  # type: ignore[no-untyped-call]
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    norms = {key: grad.double().norm().item() for key, grad in model.released_state_dict().items()}
    total = math.hypot(*norms.values())
    return {"loss": loss, "grad_norms": norms, "total_grad_norm": total, "without_grad": without}


# What each model gives.


def observe_glsim(name: str) -> dict[str, Any]:
    model = build_filled(lambda: ViTGLSim(ViTConfig(**OF_GLSIM[name])))
    batch = fill_image(2, 3, model.config.image_size, model.config.image_size)
    encoded: list[Tensor] = []  # tokens of the image, and of the crop where there is one
    reduced: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        for module, seen in ((model.base_model.norm, encoded), (model.reducer, reduced))
    ]
    with torch.no_grad():
        output = model(batch, ret_dist=True)
        for hook in hooks:
            hook.remove()
        plain = model(batch)
    x, inter, probabilities, scores = output[-4:]
    assert len(inter) == len(probabilities) == len(scores) == model.config.num_hidden_layers
    assert torch.equal(x, encoded[0])
    assert_within(5e-6, logits_of(plain), output[0])  # the last block is computed in parts
    found = structure(model) | {"outputs": [len(plain) if isinstance(plain, tuple) else 1, len(output)]}
    found |= {"logits": output[0], "x_norm": x, "inter": inter}
    found |= {"probabilities": [probabilities[0], probabilities[-1]], "scores": [scores[0], scores[-1]]}
    if model.config.dynamic_anchor:
        selection = model.select(output[2])
        found["selection"] = selection._asdict() | {"values": selection.similarity.gather(1, selection.indices)}
        found |= {"crops": output[1], "pre_reducer": torch.cat(encoded, dim=1), "post_reducer": reduced[0]}
    else:
        assert len(encoded) == 1
    return found | {"training": train(model, batch) if "training" in GLSIM["models"][name] else None}


@torch.no_grad()
def observe_program() -> dict[str, Any]:
    """The published model as the program builds it, with a checkpoint of its evaluation, `model.` before each name."""
    model = build_filled(lambda: build_model(Settings(**METHOD_FILE, model_name="vit_b16", test_flip=True), 10))
    checkpoint = {f"model.{key}": filled(key, (*value.shape,)) for key, value in model.released_state_dict().items()}
    model.load_released(checkpoint)
    flipped = model(fill_image(2, 3, 224, 224))
    assert isinstance(flipped, tuple)  # released: a list, which its own evaluation does not understand
    assert flipped[1].shape == (2, 3, 224, 224)
    model.config = replace(model.config, test_flip=False)
    logits, _ = model(fill_image(2, 3, 224, 224))
    dogs: Any = build_model(Settings(**METHOD_FILE, model_name="vit_b16", dataset_name="dogs", num_hidden_layers=1), 10)
    found = {"logits": logits, "wrapped_logits": logits, "dynamic_top_dogs": dogs.config.dynamic_top}
    found |= {"logits_test_flip": flipped[0], "wrapped_logits_test_flip": flipped[0]}
    figures = state_dict_figures(checkpoint)
    return found | {"state_dict": figures, "keys_sha1": figures["sha1"]}


@torch.no_grad()
def observe_resnet(name: str) -> dict[str, Any]:
    named, _, classifier = name.partition("_classifier_")
    model = build_filled(lambda: ResNet(named, 10, classifier=classifier or "pool"))
    output = model(fill_image(2, 3, 224, 224))
    return structure(model) | {"logits": output, "shape": [*output.shape]}


@torch.no_grad()
def observe_cal() -> dict[str, Any]:
    model, batch = build_filled(lambda: CAL(10)), fill_image(2, 3, 224, 224)
    look = model.look(batch)
    logits, views = model.multi_crop(batch)
    model.multi_crop = lambda _: (logits, views)  # once is enough
    loss, same = model(batch, LABELS)
    assert torch.equal(same, logits)
    as_released = views.unflatten(0, (3, 2)).permute(2, 3, 4, 5, 1, 0).flatten(4)  # image, its crops; mirrored, its
    found = structure(model) | {"logits": logits, "loss": loss, "views": as_released, "pooled": look.pooled}
    found |= {"mean_map": look.maps.mean(1, keepdim=True), "raw_minus_counterfactual": look.effect}
    single = F.cross_entropy(look.logits, LABELS)
    return found | {"single_crop_logits": look.logits, "single_crop_loss": single}


def observe_transfg(name: str) -> dict[str, Any]:
    model = build_filled(OF_TRANSFG[name])
    vit, size = model.base_model, model.config["img_size"]
    batch, blocks, losses = fill_image(2, 3, size, size), [], {}
    with torch.no_grad():
        features, parts = model.forward_features(batch)
        tokens = embed(vit, batch)
        for block in vit.blocks[:-1]:
            tokens, q, k = run_block(block, tokens)
            blocks.insert(0, (q, k))
        row = joint_attention(blocks)[..., 1:]
        logits, picked = model(batch, return_selection=True)
        assert torch.equal(picked, parts)
        step, forward = model.forward_features, lambda _: (features, parts)  # not the encoder for each loss again
        model.forward_features = forward
        for smoothing in (0, 0.1):
            model.smoothing_value = smoothing
            losses[f"total_smoothing_{smoothing}"], _ = model(batch, LABELS)
        model.smoothing_value = 0
        losses["total_same_label_smoothing_0"], same = model(batch, SAME)
        assert_within(5e-6, same, logits)
        losses |= {
            "con_loss": contrastive_loss(features, LABELS),
            "con_loss_same_label": contrastive_loss(features, SAME),
        }
    model.forward_features = step
    found = structure(model) | {"logits": logits, "parts": parts, "features": features, "loss": losses}
    return found | {"joint_attention_row": row, "part_values": row.amax(-1), "training": train(model, batch)}


@torch.no_grad()
def observe_ffvt(name: str) -> dict[str, Any]:
    data_set = "dogs" if name == "ffvt_dogs" else "cub"
    model = build_filled(lambda: build_model(Settings(model_name="ffvt", dataset_name=data_set), 10))
    return structure(model) | {"logits": model(fill_image(2, 3, 224, 224))}


@torch.no_grad()
def observe_timm(case: str) -> dict[str, Any]:
    figures = TIMM["models"][case]
    options = OF_TIMM[" ".join(figures["args"])]
    model = build_filled(lambda: GLSimTimm(figures["name"], num_classes=10, **options))
    found = structure(model)
    if "logits" not in figures:  # the released class crashes
        return found
    output = model(fill_image(2, 3, 224, 224), ret_dist=True)
    if "crops" not in figures:
        assert len(output) == 5
        return found | {"logits": output[0]}
    assert len(output) == 6
    selection = model.select(output[2])
    kth = selection.similarity.gather(1, selection.indices)[:, -1]
    return found | {"logits": output[0], "crops": output[1], "indices": selection.indices, "kth": kth}


# The table.

# Of numbers: how far off any may be. Logits of size 1 to 4 come out of 12 blocks or 100 convolutions, each off by
# float32's 6e-8 of its size; similarities and losses of fewer steps. Of tensors: sums, as a share of the absolute sum.
BOUNDS = {
    **{"logits": 5e-5, "logits_test_flip": 5e-5, "wrapped_logits": 5e-5, "wrapped_logits_test_flip": 5e-5},
    **{"loss": 1e-5, "values": 5e-6, "kth": 1e-6, "part_values": 2e-6, "con_loss": 2e-6, "con_loss_same_label": 2e-6},
    "joint_attention_row": 2e-6,
}
SUMS = 5e-7  # where no other share is named
FIRST = {"joint_attention_row": 2e-7}  # of entries of 0.03
# The released crop, in float32, is itself off by 1e-5 pixels.
BOUNDS_OF_TIMM = BOUNDS | {"crops": 1e-6}
BOUNDS_OF_CAL = dict.fromkeys(("logits", "single_crop_logits", "raw_minus_counterfactual"), 5e-6)
BOUNDS_OF_CAL |= {"loss": 5e-6, "single_crop_loss": 5e-6}


class Case(NamedTuple):
    figures: Mapping[str, Any]
    observe: Callable[[], dict[str, Any]]
    bounds: Mapping[str, float] = BOUNDS


OBSERVE_TRANSFG = {name: functools.partial(observe_transfg, name) for name in OF_TRANSFG}
CASES = {
    **{f"glsim {name}": Case(f, functools.partial(observe_glsim, name)) for name, f in GLSIM["models"].items()},
    "glsim checkpoint": Case(GLSIM["wrapped"], observe_program),
    "glsim program": Case({key: v for key, v in SETTINGS.items() if key not in ("args", "builders")}, observe_program),
    **{f"transfg {name}": Case(f, OBSERVE_TRANSFG[name]) for name, f in TRANSFG["models"].items()},
    "builder transfg": Case(SETTINGS["builders"]["transfg"], OBSERVE_TRANSFG["b16_224_overlap"]),
    "builder ffvt": Case(SETTINGS["builders"]["ffvt"], functools.partial(observe_ffvt, "ffvt")),
    "builder ffvt_dogs": Case(SETTINGS["builders"]["ffvt_dogs"], functools.partial(observe_ffvt, "ffvt_dogs")),
    **{name: Case(figures, functools.partial(observe_resnet, name)) for name, figures in BUILDERS["resnet"].items()},
    "cal": Case(BUILDERS["cal"], observe_cal, BOUNDS_OF_CAL),
    **{name: Case(f, functools.partial(observe_timm, name), BOUNDS_OF_TIMM) for name, f in TIMM["models"].items()},
}
seen = functools.lru_cache(maxsize=1)(lambda observe: observe())
NOT_COMPARED = {"source", "name", "args"}  # what was recorded, and how
NOT_COMPARED |= {"config"}  # see test_configuration


def compare(kind: str, ours: Any, recorded: Any, bounds: Mapping[str, float]) -> None:
    if isinstance(recorded, Mapping) and "wsum" in recorded:
        assert_close_to_figures(ours, recorded, sums=bounds.get(kind, SUMS), first=FIRST.get(kind, 1e-6), what=kind)
    elif kind == "grad_norms":  # a norm has no cancellation: its rounding is a share of it
        for key, norm in recorded.items():
            assert_within(1e-5 * norm + 1e-6, ours[key], norm, key)
    elif kind == "total_grad_norm":
        assert_within(1e-5 * recorded, ours, recorded, kind)
    elif isinstance(recorded, Mapping):
        for key, value in recorded.items():
            compare(key, ours[key], value, {key: bounds["loss"]} | dict(bounds) if kind == "loss" else bounds)
    elif isinstance(recorded, list) and recorded and isinstance(recorded[0], Mapping):
        for one, other in zip(ours, recorded, strict=True):
            compare(kind, one, other, bounds)
    elif kind in bounds:
        assert_within(bounds[kind], ours, recorded, kind)
    else:
        assert (ours.tolist() if isinstance(ours, Tensor) else ours) == recorded, kind


@pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case, of in CASES.items() for kind in of.figures if kind not in NOT_COMPARED]
)
def test_figures_of(case: str, kind: str) -> None:
    figures, observe, bounds = CASES[case]
    compare(kind, seen(observe)[kind], figures[kind], bounds)


# What is recorded of no whole model.


@pytest.mark.parametrize("name", OF_GLSIM)
def test_configuration(name: str) -> None:
    config, recorded = ViTConfig(**OF_GLSIM[name]), GLSIM["models"]["tiny_224_cos"]["config"]
    recorded = recorded | GLSIM["models"][name]["config"]
    ours = {key: getattr(config, key) for key in recorded}
    ours["anchor_resize_size"] = ours["anchor_resize_size"] or False  # None and False say the same
    assert json.loads(json.dumps(ours)) == recorded
    known = {field.name for field in fields(ViTConfig)} - set(WITHOUT_EFFECT)
    assert ViTConfig(**{key: value for key, value in recorded.items() if key in known}) == config  # given in full


def test_configuration_of_the_program() -> None:
    assert GLSIM["wrapped"]["config"] == GLSIM["models"]["b16_224_cos"]["config"]
    model: Any = build_model(Settings(**METHOD_FILE, model_name="vit_b16"), 10)
    for name, value in SETTINGS["config"].items():
        found = getattr(model.config, name)
        assert (list(found) if isinstance(found, tuple) else found) == value or not (found or value), name


def test_every_published_option_is_there_with_its_default() -> None:
    # What the recording set itself, or the program computed.
    recorded = {"cfg", "cfg_method", "fp16", "classifier", "device", "world_size", "rank", "local_rank", "distributed"}
    recorded |= {"num_classes", "effective_batch_size", "resize_size", "test_resize_size", "horizontal_flip"}
    # Defaults of ours that say the same otherwise, or say where the data are.
    otherwise = {"dataset_root_path", "folder_train", "folder_val", "folder_test", "opt_eps"}
    published, defaults = SETTINGS["args"], vars(Recipe(**METHOD_FILE))
    names = published.keys() - recorded - set(ELSEWHERE) - set(SETTINGS_WITHOUT_EFFECT)
    assert names <= defaults.keys()
    ours = {name: published[name] if name in otherwise else defaults[name] for name in names}
    assert ours == {name: published[name] for name in names}
    assert defaults.keys() - published.keys() == {"weights_dir", "crop_inclusive", "model_kwargs", "released"}
    assert not set(SETTINGS_WITHOUT_EFFECT) & defaults.keys()
    assert set(ELSEWHERE) <= published.keys() - defaults.keys()


def test_stochastic_depth_is_the_same_in_every_block() -> None:
    model = ViTGLSim(ViTConfig(**T16_96, sd=0.1))  # of four blocks and an aggregator of one
    blocks: list[Any] = [*model.base_model.blocks, *model.aggregator]
    for path in ("drop_path1", "drop_path2"):
        assert [getattr(block, path).drop_prob for block in blocks] == GLSIM["sd_0.1_drop_prob_per_block"]


@torch.no_grad()
def test_a_block_alone_where_its_epsilon_matters() -> None:
    sizes: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}
    model, prefix = ViTGLSim(ViTConfig(**T16 | sizes)), "encoder.blocks.0."
    state = model.released_state_dict()
    state |= {key: fill(key.removeprefix(prefix), v.shape) for key, v in state.items() if key.startswith(prefix)}
    model.load_released(state)
    hidden, q, k = run_block(model.eval().base_model.blocks[0], 1e-3 * fill("ln_probe", (2, 5, 48)))
    scores = (q @ k.mT / math.sqrt(q.shape[-1]))[0, 0]
    recorded = GLSIM["block"]
    assert_close_to_figures(hidden, recorded["hidden_chk"], sums=5e-7)
    assert_within(1e-5, hidden[0, :2], recorded["hidden"])
    assert_within(1e-5, scores, recorded["scores"])
    assert_within(1e-6, scores.softmax(-1), recorded["probabilities"])


def test_contrastive_loss() -> None:
    features, labels = fill("con_features", (6, 32)), torch.tensor([0, 1, 0, 2, 1, 1])
    correlated = fill("con_features_base", (32,)) + 0.7 * features
    ours = {"value": contrastive_loss(features, labels), "correlated": contrastive_loss(correlated, labels)}
    ours["correlated_all_same_label"] = contrastive_loss(correlated, torch.zeros(6))
    ours["correlated_all_different"] = contrastive_loss(correlated, torch.arange(6))
    for name, loss in ours.items():
        assert_within(1e-7, loss, TRANSFG["contrastive"][name], name)


@pytest.mark.parametrize("name", TIMM["names"])
def test_every_released_name_is_timms_model_and_crops(name: str) -> None:
    figures = TIMM["names"][name]
    size = 8 * figures["patch_size"]
    with torch.device("meta"):
        model = GLSimTimm(name, num_classes=10, image_size=size, **METHOD, model_kwargs={"depth": 1}).eval()
        narrow = GLSimTimm(name, model_kwargs={"embed_dim": 8, "num_heads": 1})  # of full depth
        logits, crops = model(torch.empty(1, 3, size, size))
    assert (logits.shape, crops.shape) == ((1, 10), (1, 3, size, size))
    vit = model.base_model
    found = {"patch_size": model.patch_size, "embed_dim": vit.embed_dim, "num_heads": num_heads(vit)}
    found |= {
        "depth": len(narrow.base_model.blocks),
        "reg_tokens": vit.num_reg_tokens,
        "class_token": vit.cls_token is not None,
    }
    assert found | {"image_size": size} == {"image_size": size} | figures  # models without CLS crashed: no size
    assert model.grid == 8
