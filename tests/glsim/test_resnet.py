"""glsim.model_utils.resnet: timm's features, files there and back, refusals. The released figures: tests/parity."""

import itertools

import pytest
import timm
import torch
from formula import fill_image
from small_models import fill_released
from torch import nn

from common.errors import UserError
from common.weights import load_weights
from glsim.model_utils import resnet
from glsim.model_utils.resnet import NAMES, ResNet


@pytest.fixture(scope="module")
def resnet50():
    return fill_released(ResNet("resnet50", 10))


@torch.no_grad()
def test_without_a_classifier_the_features_of_each_position_come_back(resnet50):
    model, images = ResNet(**resnet50.config | {"classifier": "cls"}).eval(), fill_image(2, 3, 96, 64)
    entries = resnet50.released_state_dict()
    model.load_released({key: value for key, value in entries.items() if "head" not in key})
    features = model(images)
    torch.testing.assert_close(resnet50.get_classifier()(features.mean(1)), resnet50(images), atol=1e-4, rtol=0)
    last = timm.create_model("resnet50", features_only=True, out_indices=(4,)).eval()
    last.load_state_dict(model.base_model.state_dict())
    (expected,) = last(images)
    for row, column in itertools.product(range(3), range(2)):
        torch.testing.assert_close(features[:, 2 * row + column], expected[..., row, column], atol=1e-5, rtol=0)


def test_released_files_load_with_their_prefix_and_ours_as_they_are(resnet50):
    entries, own = resnet50.released_state_dict(), resnet50.state_dict()
    wrapped = {f"model.{key}": value for key, value in entries.items()}
    for state in (resnet50.from_released(entries), resnet50.from_released(wrapped), resnet50.from_released(own)):
        assert state.keys() == own.keys()
        assert all(torch.equal(value, own[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entries: entries.pop("encoder.bn1.running_var"), "lacks encoder.bn1.running_var"),
        (lambda entries: entries.update({"encoder.fc.weight": torch.ones(1)}), "unknown encoder.fc.weight"),
        (lambda entries: entries.update({"head.bias": torch.ones(3)}), r"head\.bias of shape \(3,\).* needs \(10,\)"),
    ],
)
def test_a_file_of_another_model_is_refused_and_changes_nothing(resnet50, change, words):
    entries = {key: value + 1 for key, value in resnet50.released_state_dict().items()}
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
