"""The options and the builder of GLSim's programs against what the released ones had and built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import fill, fill_image
from timm.layers import convert_sync_batchnorm
from torch import nn

from common.errors import UserError
from glsim.model_utils.build import build_model, timm_arguments
from glsim.train_utils.recipe import Recipe
from glsim.train_utils.settings import Settings
from glsim.train_utils.yaml_config import ELSEWHERE, WITHOUT_EFFECT, read_config

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glsim_settings.json").read_text())
METHOD = Path(__file__).parents[2] / "glsim" / "configs" / "methods" / "glsim.yaml"
# What the recording set itself, or the program computed.
RECORDED = {"cfg", "cfg_method", "fp16", "classifier", "device", "world_size", "rank", "local_rank", "distributed"}
RECORDED |= {"num_classes", "effective_batch_size", "resize_size", "test_resize_size", "horizontal_flip"}
# Defaults of ours that say the same otherwise, or say where the data are.
OTHERWISE = {"dataset_root_path", "folder_train", "folder_val", "folder_test", "opt_eps"}


def test_every_published_option_is_there_with_its_default() -> None:
    method = read_config(METHOD)
    published = GOLDEN["args"]
    defaults = vars(Recipe(**method))
    for name in sorted(published.keys() - RECORDED - set(ELSEWHERE) - set(WITHOUT_EFFECT)):
        assert name in defaults, name
        if name not in OTHERWISE:
            assert defaults[name] == published[name], name
    ours = {"weights_dir", "crop_inclusive", "model_kwargs", "released"}
    assert defaults.keys() - published.keys() == ours
    assert not set(WITHOUT_EFFECT) & defaults.keys()
    assert set(ELSEWHERE) <= published.keys() - defaults.keys()


def with_formula_weights(model: Any) -> Any:
    model.load_released({name: fill(name, value.shape) for name, value in model.released_state_dict().items()})
    return model.eval()


def glsim(**changes: Any) -> Settings:
    return Settings(**(read_config(METHOD) | {"model_name": "vit_b16"} | changes))


def test_the_method_file_builds_the_published_model() -> None:
    model = with_formula_weights(build_model(glsim(), 10))
    for name, value in GOLDEN["config"].items():
        found = getattr(model.config, name)
        assert (list(found) if isinstance(found, tuple) else found) == value or not (found or value), name
    images = fill_image(2, 3, 224, 224)
    with torch.inference_mode():
        logits, _ = model(images)
        torch.testing.assert_close(logits, torch.tensor(GOLDEN["wrapped_logits"]), atol=5e-5, rtol=0)
        flipped = with_formula_weights(build_model(glsim(test_flip=True), 10))(images)
    assert isinstance(flipped, tuple)  # released: a list, which its own evaluation does not understand
    torch.testing.assert_close(flipped[0], torch.tensor(GOLDEN["wrapped_logits_test_flip"]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", ["ffvt", "ffvt_dogs", "transfg"])
def test_comparators(case: str) -> None:
    recorded = GOLDEN["builders"][case]
    data_set = "dogs" if case == "ffvt_dogs" else "cub"
    settings = Settings(model_name=case.partition("_")[0], dataset_name=data_set)
    model = with_formula_weights(build_model(settings, 10))
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded["num_params"]
    with torch.inference_mode():
        logits = model(fill_image(2, 3, 224, 224))
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"]), atol=5e-5, rtol=0)


def test_twice_the_patches_on_dogs_and_nowhere_after_them() -> None:
    small = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    dogs: Any = build_model(glsim(dataset_name="dogs", **small), 5)
    assert dogs.config.dynamic_top == GOLDEN["dynamic_top_dogs"]
    after: Any = build_model(glsim(**small), 5)  # released: FFVT keeps the doubled number in the process
    assert after.config.dynamic_top == 8


def test_freeze_backbone() -> None:
    small = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    vit = build_model(glsim(freeze_backbone=True, **small), 5)
    trained = {name.partition(".")[0] for name, value in vit.named_parameters() if value.requires_grad}
    assert trained == {"aggregator", "aggregator_norm", "head"}
    timm_vit = build_model(
        Settings(model_name="vit_tiny_patch16_224", freeze_backbone=True, image_size=32, model_kwargs={"depth": 1}), 5
    )
    assert {name for name, value in timm_vit.named_parameters() if value.requires_grad} == {"head.weight", "head.bias"}


def test_a_frozen_backbone_keeps_the_statistics_of_batchnorm() -> None:
    """And its names; what is trained, here the head with a BatchNorm of its own in front, goes on."""
    model: Any = build_model(Settings(model_name="resnet10t", freeze_backbone=True), 5)
    head = model.fc
    model.fc = nn.Sequential(nn.BatchNorm1d(head.in_features), head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, 32, 32)
    trained = model.train()(images)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"fc.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    model.fc = head
    assert model.state_dict().keys() == build_model(Settings(model_name="resnet10t"), 5).state_dict().keys()
    torch.testing.assert_close(model.train()(images), model.eval()(images))
    assert trained.requires_grad
    built: Any = build_model(Settings(model_name="resnet10t"), 5)
    built.train()(images)
    assert int(built.bn1.num_batches_tracked) == 1


def test_a_frozen_backbone_of_several_processes_too() -> None:
    """They convert the BatchNorms after the model is built."""
    model: Any = build_model(Settings(model_name="resnet10t", freeze_backbone=True), 5)
    model = convert_sync_batchnorm(model).train()
    model(torch.randn(4, 3, 32, 32))  # a SyncBatchNorm in training needs a GPU
    assert int(model.bn1.num_batches_tracked) == 0


def test_both_classifiers_of_a_distilled_model_are_trained() -> None:
    settings = Settings(
        model_name="deit_tiny_distilled_patch16_224", image_size=32, freeze_backbone=True, model_kwargs={"depth": 1}
    )
    trained = {name for name, value in build_model(settings, 5).named_parameters() if value.requires_grad}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_a_resnet_pools_whether_said_or_not() -> None:
    said, unsaid = (build_model(Settings(model_name="resnet50", classifier=name), 5) for name in ("pool", "cls"))
    assert said.config == unsaid.config


def test_timm_models_by_name() -> None:
    settings = Settings(model_name="vit_tiny_patch16_224", image_size=48, sd=0.3, model_kwargs={"depth": 2})
    vit: Any = build_model(settings, 5)
    assert vit(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    cnn: nn.Module = build_model(Settings(model_name="resnet10t", image_size=48), 5)
    assert cnn(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    assert timm_arguments(settings) == {"drop_path_rate": 0.3, "img_size": 48, "depth": 2}
    assert timm_arguments(Settings(model_name="densenet121")) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "vit_bs16"}, r"--model_name vit_bs16: there is no such model; did you mean vit_\w+16"),
        ({"model_name": "transfg", "dynamic_anchor": True}, "--dynamic_anchor True: transfg has no such thing"),
        ({"model_name": "resnet18", "aggregator": True}, "--aggregator True: resnet18 has no such thing"),
        ({"select_top_k": True}, "--select_top_k True: vit_b16 has no such thing"),
        ({"inference_crops": False}, "--inference_crops False: vit_b16 has no such thing"),
        ({"dynamic_anchor": True, "dynamic_top": 197}, "dynamic_top 197: expected 1 to 196"),
        ({"image_size": 225}, "image_size 225: expected a multiple of the patch size 16"),
        ({"model_name": "glsvit_tiny_patch16_224", "hidden_size": 64}, "--hidden_size 64: glsvit_tiny"),
        ({"model_name": "glsvit_nothing"}, "vit_nothing"),
        ({"model_name": "glsvit_tiny_patch16_224", "image_size": 225}, "225"),
        ({"model_name": "resnet50_in21k", "pretrained": True}, "resnet50_in21k"),
        *(
            ({"model_name": name, "freeze_backbone": True}, f"--freeze_backbone: {name} .*--no-freeze_backbone")
            for name in ("transfg", "ffvt", "cal")
        ),
        ({"model_name": "densenet121", "sd": 0.1}, "--sd 0.1: densenet121 has no such thing; say --sd 0"),
        ({"model_name": "hrnet_w18_small", "sd": 0.1}, "--sd 0.1: hrnet_w18_small has no such thing"),
        ({"model_name": "transfg", "classifier": "pool"}, "--classifier pool: transfg has no such thing"),
        ({"model_name": "resnet50", "classifier": "cls_pool"}, "--classifier cls_pool: resnet50 has no such thing"),
        ({"model_name": "resnet18", "classifier": "pool"}, "--classifier pool: resnet18 has no such thing"),
        ({"model_name": "resnet50", "dynamic_top": 4}, "--dynamic_top 4: resnet50 has no such thing"),
        ({"model_name": "resnet18", "dynamic_top": 4}, "--dynamic_top 4: resnet18 has no such thing"),
        *(
            ({"model_name": name, "cal_single_crop": True}, f"--cal_single_crop True: {name} has no such thing")
            for name in ("vit_b16", "glsvit_tiny_patch16_224", "transfg", "resnet18")
        ),
        *(
            ({"model_name": "cal", "model_kwargs": {"backbone": name}}, f"--model_kwargs backbone={name}: .*resnet18")
            for name in ("foo", "densenet121", "resnet10t", 7)
        ),
        *(
            ({"model_name": name, "pretrained": True}, f"published weights for {name}: .*--no-pretrained.*--ckpt_path")
            for name in ("vit_t16", "vit_s16", "vit_b8")
        ),
    ],
)
def test_what_cannot_be_built_is_a_sentence(changes: dict[str, Any], message: str) -> None:
    settings = Settings(**changes)
    with pytest.raises(UserError, match=message) as caught:
        build_model(settings, 5, settings.pretrained)
    assert "\n" not in str(caught.value)
