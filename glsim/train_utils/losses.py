"""What the training program minimises: cross-entropy or focal loss of batches that may be mixed.

B batch, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from common.errors import UserError
from common.train.loop import Objective, logits_of
from glsim.train_utils.settings import Settings

OWN_LOSS = ("cal", "transfg")  # models whose loss is more than that of their logits


def focal_loss(logits: Tensor, targets: Tensor, gamma: float, alpha: float = 1.0, smoothing: float = 0.0) -> Tensor:
    """Return the mean focal loss of logits (B, C): Lin et al., ICCV 2017, eq. 5.

    `targets` are labels (B,) or shares of each class (B, C), smoothed by `smoothing`. As released, p_t is e to the
    minus of the cross-entropy, which holds for soft targets too. Where p_t is 1, a `gamma` below 1 has no gradient.
    """
    each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)  # (B,)
    missed = (1 - torch.exp(-each)).clamp(min=torch.finfo(each.dtype).tiny)  # 1 - p_t
    return alpha * (missed**gamma * each).mean()


def make_mixing(settings: Settings, num_classes: int) -> v2.Transform:
    """Return what mixes a batch: (images, labels (B,)) -> (images, shares of each class (B, C)), with `mix_prob`."""
    mixings: list[v2.Transform] = []
    if settings.cm:
        mixings.append(v2.CutMix(alpha=settings.beta, num_classes=num_classes))
    if settings.mu:
        mixings.append(v2.MixUp(alpha=settings.alpha, num_classes=num_classes))
    return v2.RandomApply([v2.RandomChoice(mixings)], p=settings.mix_prob) if mixings else v2.Identity()


def make_objective(settings: Settings, num_classes: int, released: bool = False) -> Objective:
    """Return (model, images, labels) -> (mean loss, logits (B, C)).

    `released`: the focal loss ignores `focal_alpha`, and `smoothing` is 0.1 there. Raises UserError where a model's own
    loss excludes an option, and for a value outside of its range.
    """
    for name in ("mix_prob", "smoothing"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"--{name} {getattr(settings, name)}: expected a number from 0 to 1")
    if settings.model_name in OWN_LOSS:
        for name in ("cm", "mu", "focal_gamma"):
            if getattr(settings, name):
                raise UserError(f"--{name}: {settings.model_name} has a loss of its own, which takes no mixed batches")
        return _own_loss
    mixing = make_mixing(settings, num_classes)
    smoothing = settings.smoothing if settings.ls else 0.0
    gamma, alpha = settings.focal_gamma, settings.focal_alpha
    if gamma and released:
        smoothing, alpha = 0.1 if settings.ls else 0.0, 1.0

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, targets = mixing(images, labels)
        logits = logits_of(model(images))
        if gamma:
            return focal_loss(logits.float(), targets, gamma, alpha, smoothing), logits
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing), logits

    return objective


def _own_loss(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss, logits = model(images, labels)
    return loss, logits
