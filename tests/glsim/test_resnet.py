"""glsim.model_utils.resnet: the figures of the released ResNets, timm's features, files there and back, refusals."""

import functools
import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from formula import fill, fill_image
from torch import Tensor, nn

from common.errors import UserError
from common.weights import load_weights
from glsim.model_utils import resnet
from glsim.model_utils.resnet import NAMES, ResNet

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glsim_builders.json").read_text())["resnet"]
filled = functools.cache(fill)  # resnet50 is filled several times


@pytest.fixture(autouse=True, scope="module")
def forget_filled():
    yield
    filled.cache_clear()


def recorded(name):
    if name == "resnet50_classifier_cls":
        return ResNet("resnet50", 10, classifier="cls")
    return ResNet(name, 10)


def released_entries(model):
    """Return the entries of the authors' file by formula; integer buffers are zero."""
    entries = model.released_state_dict().items()
    return {
        key: filled(key, tuple(value.shape)) if value.is_floating_point() else torch.zeros_like(value)
        for key, value in entries
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_names_shapes_order_and_parameters_are_the_released_ones(name):
    with torch.device("meta"):
        model = recorded(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == GOLDEN[name]["num_params"]
    entries = model.released_state_dict().items()
    lines = "".join(f"{key}:{'x'.join(map(str, value.shape))}\n" for key, value in entries)
    assert {"n": len(entries), "sha1": hashlib.sha1(lines.encode()).hexdigest()} == GOLDEN[name]["state_dict"]


@pytest.mark.parametrize("name", [name for name in GOLDEN if "logits" in GOLDEN[name]])
@torch.no_grad()
def test_equals_the_released_class(name):
    model = recorded(name).eval()
    model.load_released(released_entries(model))
    logits = model(fill_image(2, 3, 224, 224))
    torch.testing.assert_close(logits, torch.tensor(GOLDEN[name]["logits"]), atol=5e-5, rtol=0)


@pytest.fixture(scope="module")
def resnet50():
    model = recorded("resnet50").eval()
    model.load_released(released_entries(model))
    return model


@torch.no_grad()
def test_without_a_classifier_the_features_of_each_position_come_back(resnet50):
    model, images = recorded("resnet50_classifier_cls").eval(), fill_image(2, 3, 224, 224)
    model.load_released({key: value for key, value in released_entries(resnet50).items() if "head" not in key})
    features = model(images)
    assert list(features.shape) == GOLDEN["resnet50_classifier_cls"]["shape"]
    torch.testing.assert_close(resnet50.get_classifier()(features.mean(1)), resnet50(images))
    last = timm.create_model("resnet50", features_only=True, out_indices=(4,)).eval()
    state = {key: value for key, value in model.base_model.state_dict().items() if not key.startswith("fc.")}
    last.load_state_dict(state)
    torch.testing.assert_close(features[:, 7 * 2 + 5], last(images)[0][:, :, 2, 5])  # row by row of 7 x 7


def test_released_files_load_with_their_prefix_and_ours_as_they_are(resnet50):
    entries, own = released_entries(resnet50), resnet50.state_dict()
    wrapped = {f"model.{key}": value for key, value in entries.items()}
    for state in (resnet50.from_released(entries), resnet50.from_released(wrapped), resnet50.from_released(own)):
        assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in own.items()}
        assert all(torch.equal(value, own[key]) for key, value in state.items())
    back = resnet50.released_state_dict()
    assert all(torch.equal(value, entries[key]) for key, value in back.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entries: entries.pop("encoder.bn1.running_var"), "lacks encoder.bn1.running_var"),
        (lambda entries: entries.update({"encoder.fc.weight": torch.ones(1)}), "unknown encoder.fc.weight"),
        (lambda entries: entries.update({"head.bias": torch.ones(3)}), r"head\.bias of shape \(3,\).* needs \(10,\)"),
    ],
)
def test_a_file_of_another_model_is_refused_and_changes_nothing(resnet50, change, words):
    entries = {key: value + 1 for key, value in released_entries(resnet50).items()}
    before = resnet50.base_model.bn1.running_mean.clone()
    change(entries)
    with pytest.raises(UserError, match=words):
        resnet50.load_released(entries)
    assert torch.equal(resnet50.base_model.bn1.running_mean, before)


def test_weights_of_a_plain_resnet_load_into_everything_but_the_classifier(resnet50, tmp_path):
    file, model = tmp_path / "resnet50_in21k.pth", ResNet("resnet50_in21k", 10)
    backbone = {key: value for key, value in resnet50.base_model.state_dict().items() if not key.startswith("fc.")}
    torch.save({"state_dict": backbone | {"fc.weight": torch.ones(11, 2048), "fc.bias": torch.ones(11)}}, file)
    report = load_weights(model, file)
    file.unlink()  # 90 MB
    assert report["left"] == ["base_model.fc.weight", "base_model.fc.bias"]
    state = model.base_model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in backbone.items())


def test_pretrained_weights_are_torchvisions_first_ones(monkeypatch):
    asked = []

    def create_model(name: str, pretrained: bool, num_classes: int) -> nn.Module:
        asked.append((name, pretrained, num_classes))
        return nn.Identity()

    with monkeypatch.context() as patch:
        patch.setattr(resnet.timm, "create_model", create_model)
        ResNet("resnet101", 7, pretrained=True)
        ResNet("resnet50", 7, classifier="cls")
    assert asked == [("resnet101.tv_in1k", True, 7), ("resnet50.tv_in1k", False, 0)]
    assert {name for name, _, _ in asked} <= set(timm.list_pretrained("resnet*"))


def test_the_configuration_builds_the_model_again():
    with torch.device("meta"):
        for name in GOLDEN:
            model = recorded(name)
            again = ResNet(**json.loads(json.dumps(model.config)))
            shapes: list[dict[str, Tensor]] = [m.state_dict() for m in (model, again)]
            assert [(key, v.shape) for key, v in shapes[0].items()] == [(key, v.shape) for key, v in shapes[1].items()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet18"}, f"no model 'resnet18': choose one of {', '.join(NAMES)}"),
        ({"name": "resnet50", "classifier": "avg_cls"}, "classifier 'avg_cls': expected one of pool, cls"),
        ({"name": "resnet50_in21k", "pretrained": True}, "no weights for resnet50_in21k: give a file"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        ResNet(num_classes=10, **arguments)
