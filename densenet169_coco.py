"""DenseNet169 on COCO (arXiv 2504.09852).

    python densenet169_coco.py                         the published protocol, fp32, one process
    torchrun --nproc_per_node 4 densenet169_coco.py    the same batch of 32, divided among 4 GPUs
    python densenet169_coco.py --demo                  a small model on digits, a minute on a CPU

One label an image: the category of its first annotation (docs/fidelity.md DATA-2). As published, val2017 (4,952
images) both chooses the best epoch and is reported: the record says test-selected.
--released changes nothing here.
"""

from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn
from torch.optim import AdamW, lr_scheduler
from torchvision import transforms as T

from common.data import Data, coco
from common.run import run


@dataclass
class Recipe:
    model: str = "densenet169.tv_in1k"  # timm model; the tag names its ImageNet weights
    img_size: int = 224  # pixels, square; the aspect ratio is not kept
    epochs: int = 20  # passes over the training images
    batch_size: int = 32  # images per optimizer step, over all processes
    lr: float = 1e-4  # learning rate of AdamW at the start
    weight_decay: float = 0.05  # of AdamW, on every parameter
    t_max: int = 30  # epochs in half a cosine period: the rate has not reached 0 when training ends
    seed: int | None = 42  # of order, augmentation and new layers
    weights: str = "pretrained"  # pretrained, none, or a .npz, .safetensors or .pth file
    data_root: str = "data"  # holds coco/
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the timm model
    released: bool = False  # compute what the released code computed, not what the paper describes


def data(recipe: Recipe) -> Data:
    resize = T.Resize((recipe.img_size, recipe.img_size), T.InterpolationMode.BICUBIC)
    tensor = [T.ToTensor(), T.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]
    plain = T.Compose([resize, *tensor])
    augmented = T.Compose([resize, T.RandomHorizontalFlip(), T.RandomAutocontrast(), *tensor])
    train = coco(recipe.data_root, "train2017").with_transform(augmented)
    test = coco(recipe.data_root, "val2017").with_transform(plain)
    return Data(train, val=test, test=test)


def build(recipe: Recipe, num_classes: int) -> nn.Module:
    pretrained = recipe.weights == "pretrained"
    return timm.create_model(recipe.model, pretrained, num_classes=num_classes, **recipe.model_kwargs)


def optimize(recipe: Recipe, parameters: Any) -> tuple[AdamW, lr_scheduler.CosineAnnealingLR]:
    optimizer = AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.t_max)  # stepped once an epoch


if __name__ == "__main__":
    small = dict(growth_rate=8, block_config=(2, 2, 2, 2))
    demo = dict(img_size=32, epochs=15, lr=1e-3, t_max=15, model_kwargs=small)
    run(Recipe, data, build, optimize, dataset="coco", demo=demo)
