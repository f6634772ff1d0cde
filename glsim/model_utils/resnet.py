"""The ResNet comparators of GLSim (He et al., CVPR 2016, arXiv 1512.03385), which are timm's.

Axes: B batch, N positions of the last feature map, D channels, C classes.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import timm
from torch import Tensor, nn

from common.errors import UserError
from common.models.authors_names import Entry, ReleasedNames

# Name -> timm's model, with the tag of its ImageNet-1k weights, which are torchvision's first.
NAMES: Mapping[str, str] = MappingProxyType(
    {"resnet50": "resnet50.tv_in1k", "resnet101": "resnet101.tv_in1k", "resnet50_in21k": "resnet50"}
)
CLASSIFIERS = ("pool", "cls")


class ResNet(ReleasedNames):
    """`resnet50`, `resnet101`, or `resnet50_in21k`, which is resnet50 with weights that only a file has.

    `classifier`: pool, a Linear on the mean of the last feature map; cls, as released, has none. `base_model` is
    timm's. Raises UserError for another name or classifier, and for `pretrained` resnet50_in21k.
    """

    theirs = "encoder."

    def __init__(self, name: str, num_classes: int, pretrained: bool = False, classifier: str = "pool") -> None:
        super().__init__()
        if name not in NAMES:
            raise UserError(f"there is no model {name!r}: choose one of {', '.join(NAMES)}")
        if classifier not in CLASSIFIERS:
            raise UserError(f"classifier {classifier!r}: expected one of {', '.join(CLASSIFIERS)} for a ResNet")
        if pretrained and name == "resnet50_in21k":
            raise UserError("timm has no weights for resnet50_in21k: give a file of them instead of --pretrained")
        # The arguments that build it again, for model.json.
        self.config: dict[str, Any] = {"name": name, "num_classes": num_classes, "classifier": classifier}
        classes = num_classes if classifier == "pool" else 0
        self.base_model: Any = timm.create_model(NAMES[name], pretrained=pretrained, num_classes=classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, height, width), or without a classifier the last features (B, N, D)."""
        if self.config["classifier"] == "pool":
            logits: Tensor = self.base_model(images)
            return logits
        features: Tensor = self.base_model.forward_features(images)  # (B, D, rows, columns)
        return features.flatten(2).mT

    def get_classifier(self) -> nn.Module:
        classifier: nn.Module = self.base_model.get_classifier()
        return classifier

    def _layout(self) -> list[Entry]:
        return [Entry(_released_name(key.removeprefix("base_model.")), key) for key in self.state_dict()]


def _released_name(key: str) -> str:
    return f"head.{key.removeprefix('fc.')}" if key.startswith("fc.") else f"encoder.{key}"
