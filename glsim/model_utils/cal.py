"""CAL: Counterfactual Attention Learning for Fine-Grained Visual Categorization and Re-identification.

Rao, Chen, Lu, Zhou, ICCV 2021, arXiv 2108.08728, on the attention of WS-DAN (Hu et al., arXiv 1901.09891).

Axes: B batch, M attention maps, h and w their sides, D channels, S image side in pixels, C classes.
"""

import re
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.models.authors_names import Entry, ReleasedNames
from glsim.model_utils.glsim import crop

SCALE = 100  # of the pooled features, whose norm is 1, before the classifier
CROP_TRAIN, DROP_TRAIN = (0.4, 0.6), (0.2, 0.5)  # ranges of the threshold, a share of a map's maximum
CROP_TEST = (0.3, 0.2)  # one crop of the image for each threshold
VIEWS = 2 * (1 + len(CROP_TEST))  # of an image in evaluation: it, its crops, and the same of its mirror image
PADDING = 0.1  # around what is above the threshold, a share of the image
CENTER_RATE = 0.05  # how far a batch moves the centres of its classes

# Modules of timm's ResNet, which the authors have in a row.
ROW = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


class Look(NamedTuple):
    """What the model sees in images."""

    logits: Tensor  # (B, C)
    effect: Tensor  # (B, C), of the attention: logits less those of attention that knows nothing
    pooled: Tensor  # (B, M D), of norm 1
    maps: Tensor  # (B, M, h, w), 0 or more


def bilinear_pooling(features: Tensor, maps: Tensor) -> Tensor:
    """Return (B, M D), of norm 1: the features (B, D, h, w) weighted by each map (B, M, h, w), in float32 or wider.

    Averaged over positions, then the signed square root: WS-DAN, bilinear attention pooling.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        pooled = maps.to(dtype).flatten(2) @ features.to(dtype).flatten(2).mT  # (B, M, D)
    pooled = pooled.flatten(1) / maps[0, 0].numel()
    return F.normalize(pooled.sign() * (pooled.abs() + 1e-6).sqrt())


def attended(maps: Tensor, thresholds: Tensor | float, size: int) -> Tensor:
    """Return where (B, S, S) the maps (B, h, w), resized bilinearly, exceed a share (B,) of their maximum."""
    pixels = F.interpolate(maps[:, None].float(), (size, size), mode="bilinear", align_corners=True).squeeze(1)
    shares = thresholds.reshape(-1, 1, 1) if isinstance(thresholds, Tensor) else thresholds
    return pixels > shares * pixels.amax((1, 2), keepdim=True)


def padded_boxes(where: Tensor) -> Tensor:
    """Return the boxes (B, 4), in the order of `Selection`, around what is true in (B, S, S), and PADDING wider.

    The whole image where nothing is true.
    """
    size, ends = where.shape[-1], []
    padding = int(PADDING * size)
    for line in (where.any(2), where.any(1)):  # (B, S): rows, columns
        first, after_last = line.int().argmax(1), line.flip(1).int().argmax(1)
        ends += [first - padding, size - after_last + padding]
    return torch.stack(ends, dim=1).clamp(0, size)


class Classifier(nn.Linear):
    """Logits from pooled features, and the centre of the pooled features of each class."""

    feature_center: Tensor

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes, bias=False)
        self.register_buffer("feature_center", torch.zeros(num_classes, width))

    def center_loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return the squared distance of pooled features (B, M D) to the centres of their classes; move these.

        WS-DAN, attention regularisation; where a class has several images, their mean counts. The centres are a buffer
        as BatchNorm's statistics are: of several processes, all go on with those of the first.
        """
        centers = self.feature_center[labels]
        with torch.no_grad():
            images = (labels[:, None] == labels).sum(1, keepdim=True)  # (B, 1), of the same class
            self.feature_center.index_add_(0, labels, CENTER_RATE * (pooled - centers) / images)
        return (pooled - centers).square().sum(1).mean()


class CAL(ReleasedNames):
    """A ResNet, `base_model`, whose last stage keeps the resolution, and `num_maps` maps of attention to its features.

    In evaluation the logits are the mean over six views: the image, two crops around what it attends to, and the same
    of its mirror image; with `single_crop` the image alone. `smoothing_value` is the label smoothing of the loss,
    `backbone` timm's name of a ResNet. Raises UserError for images that are not square.
    """

    theirs = "net."
    not_released = ("classifier.feature_center",)

    def __init__(
        self,
        num_classes: int,
        pretrained: bool = False,
        single_crop: bool = False,
        smoothing_value: float = 0.0,
        backbone: str = "resnet101",
        num_maps: int = 32,
    ) -> None:
        super().__init__()
        self.single_crop, self.smoothing_value = single_crop, smoothing_value
        # The arguments that build it again, for model.json.
        self.config: dict[str, Any] = {"num_classes": num_classes, "single_crop": single_crop, "backbone": backbone}
        self.config |= {"smoothing_value": smoothing_value, "num_maps": num_maps}
        resnet: Any = timm.create_model(f"{backbone}.tv_in1k", pretrained=pretrained, num_classes=0, global_pool="")
        for module in resnet.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.base_model = resnet
        self.attention = nn.Sequential(
            nn.Conv2d(resnet.num_features, num_maps, 1, bias=False), nn.BatchNorm2d(num_maps, eps=1e-3), nn.ReLU()
        )
        self.classifier = Classifier(num_maps * resnet.num_features, num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Return logits (B, C) of images (B, 3, S, S); (loss, logits) with `labels` (B,).

        In training logits are those of the image alone, and the loss that of `training_loss`.
        """
        if images.shape[-1] != images.shape[-2]:
            raise UserError(f"images of shape {tuple(images.shape)}: CAL crops square images")
        if self.training and labels is not None:
            return self.training_loss(images, labels)
        logits = self.look(images).logits if self.training or self.single_crop else self.multi_crop(images)[0]
        return logits if labels is None else (self._cross_entropy(logits, labels), logits)

    def look(self, images: Tensor) -> Look:
        """Look at images (B, 3, S, S) once. Attention that knows nothing is random in training, else uniform."""
        features = self.base_model(images)  # (B, D, h, w)
        maps = self.attention(features)  # (B, M, h, w)
        pooled = bilinear_pooling(features, maps)
        unknowing = 2 * torch.rand_like(maps) if self.training else torch.ones_like(maps)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.classifier(SCALE * pooled)
            effect = logits - self.classifier(SCALE * bilinear_pooling(features, unknowing))
        return Look(logits, effect, pooled, maps)

    def multi_crop(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean logits (B, C) over the views of images (B, 3, S, S), and these views (6, B, 3, S, S).

        Views: the images, their mirror images, and both cropped for each of CROP_TEST around what all maps together
        attend to.
        """
        both = torch.cat((images, images.flip(-1)))
        seen = self.look(both)
        maps, size = seen.maps.mean(1), images.shape[-1]  # (2 B, h, w)
        crops = torch.cat([crop(both, padded_boxes(attended(maps, share, size))) for share in CROP_TEST])
        logits = torch.cat((seen.logits, self.look(crops).logits))
        views = torch.cat((both, crops)).unflatten(0, (VIEWS, -1))  # by their number: B may be open in an export
        return logits.unflatten(0, (VIEWS, -1)).mean(0), views

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss for images (B, 3, S, S) with labels (B,), and the logits (B, C).

        Cross-entropy over three views of each image, as it is, cropped and with a part dropped, of the logits and of
        the effect of attention, plus the distance of the features to the centre of their class.
        """
        seen = self.look(images)
        again = self.look(self.augment(images, seen.maps))
        labels_of_views = labels.repeat(3)
        loss = self._cross_entropy(torch.cat((seen.logits, again.logits)), labels_of_views)
        loss = loss + self._cross_entropy(torch.cat((seen.effect, again.effect)), labels_of_views)
        return loss + self.classifier.center_loss(seen.pooled, labels), seen.logits

    @torch.no_grad()
    def augment(self, images: Tensor, maps: Tensor) -> Tensor:
        """Return (2 B, 3, S, S): images cropped around what one of their maps attends to, and less what another does.

        Both maps are drawn at random for each image, strong ones more often: WS-DAN, attention-guided augmentation.
        """
        strengths = maps.float().mean((2, 3)).sqrt() + 1e-6  # (B, M)
        drawn = torch.multinomial(strengths, 2, replacement=True)  # (B, 2)
        rows, size = torch.arange(len(images), device=images.device), images.shape[-1]
        thresholds = [strengths.new_empty(len(images)).uniform_(*bounds) for bounds in (CROP_TRAIN, DROP_TRAIN)]
        inside, dropped = (attended(maps[rows, drawn[:, number]], thresholds[number], size) for number in range(2))
        return torch.cat((crop(images, padded_boxes(inside)), images * ~dropped[:, None]))

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing_value)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def _layout(self) -> list[Entry]:
        return [Entry(_released_name(key), key) for key in self.state_dict() if key not in self.not_released]


def _released_name(key: str) -> str:
    module, _, rest = key.partition(".")
    if module == "base_model":
        name, _, rest = rest.partition(".")
        return f"net.features.{ROW[name]}.{rest}"
    if module == "attention":
        return f"net.attentions.{re.sub('^0', 'conv', re.sub('^1', 'bn', rest))}"
    return "net.fc.weight"
