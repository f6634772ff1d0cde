"""DeiT-B/16 on FGVC-Aircraft (arXiv 2504.09852).

    python deit_fgvcaircraft.py                         the published protocol, fp32, one process
    torchrun --nproc_per_node 4 deit_fgvcaircraft.py    the same batch of 32, divided among 4 GPUs
    python deit_fgvcaircraft.py --demo                  a small model on digits, a minute on a CPU

100 variants. Trains on `train` alone (3,334 images); `val` chooses the best epoch, `test` (3,333) is reported.
--released changes nothing here.
"""

from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn
from torch.optim import AdamW, lr_scheduler
from torchvision import transforms as T

from common.data import Data, aircraft
from common.run import run


@dataclass
class Recipe:
    model: str = "deit_base_patch16_224.fb_in1k"  # timm model; the tag names its ImageNet weights
    img_size: int = 224  # pixels, square; the aspect ratio is not kept
    epochs: int = 50  # passes over the training images
    batch_size: int = 32  # images per optimizer step, over all processes
    lr: float = 1e-4  # learning rate of AdamW at the start
    weight_decay: float = 0.05  # of AdamW, on every parameter
    t_max: int = 30  # epochs in half a cosine period: the rate rises again after it, as published
    seed: int | None = 42  # of order, augmentation and new layers
    weights: str = "pretrained"  # pretrained, none, or a .npz, .safetensors or .pth file
    data_root: str = "data"  # holds fgvc-aircraft-2013b/
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the timm model
    released: bool = False  # compute what the released code computed, not what the paper describes


def data(recipe: Recipe) -> Data:
    resize = T.Resize((recipe.img_size, recipe.img_size), T.InterpolationMode.BICUBIC)
    tensor = [T.ToTensor(), T.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]
    plain = T.Compose([resize, *tensor])
    augmented = T.Compose([resize, T.RandomHorizontalFlip(), T.RandomAutocontrast(), *tensor])
    train, val, test = (aircraft(recipe.data_root, split) for split in ("train", "val", "test"))
    return Data(train.with_transform(augmented), val.with_transform(plain), test.with_transform(plain))


def build(recipe: Recipe, num_classes: int) -> nn.Module:
    pretrained = recipe.weights == "pretrained"
    kwargs = dict(num_classes=num_classes, img_size=recipe.img_size) | recipe.model_kwargs
    return timm.create_model(recipe.model, pretrained, **kwargs)


def optimize(recipe: Recipe, parameters: Any) -> tuple[AdamW, lr_scheduler.CosineAnnealingLR]:
    optimizer = AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.t_max)  # stepped once an epoch


if __name__ == "__main__":
    small = dict(patch_size=4, embed_dim=64, depth=6, num_heads=4)
    demo = dict(img_size=16, epochs=40, lr=2e-3, t_max=40, model_kwargs=small)
    run(Recipe, data, build, optimize, dataset="aircraft", demo=demo)
