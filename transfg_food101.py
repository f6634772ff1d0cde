"""TransFG of the GFT repository on Food-101 (arXiv 2504.09852).

    python transfg_food101.py                         the published protocol, fp32, one process
    torchrun --nproc_per_node 4 transfg_food101.py    the same batch of 32, divided among 4 GPUs
    python transfg_food101.py --demo                  a small model on digits, a minute on a CPU

The best epoch is chosen on the fifth of `train` that seed 42 holds out; `test` (25,250 images) is reported.
Not the TransFG of AAAI 2022: see gft/transfg.py.
--released: no augmentation (docs/fidelity.md DATA-1).
"""

from dataclasses import dataclass, field
from typing import Any

from torch.optim import AdamW, lr_scheduler
from torchvision import transforms as T

from common.data import Data, food101, random_split
from common.run import run
from gft import TransFG


@dataclass
class Recipe:
    model: str = "vit_base_patch16_224.augreg2_in21k_ft_in1k"  # timm backbone; the tag names its ImageNet weights
    img_size: int = 224  # pixels, square; the aspect ratio is not kept
    num_parts: int = 100  # patches that the scorer passes on to the last two blocks
    epochs: int = 30  # passes over the training images
    batch_size: int = 32  # images per optimizer step, over all processes
    lr: float = 1e-4  # learning rate of AdamW at the start
    weight_decay: float = 0.05  # of AdamW, on every parameter
    t_max: int = 30  # epochs in half a cosine period: the rate reaches 0 when training ends
    seed: int | None = 42  # of order, augmentation and new layers
    weights: str = "pretrained"  # pretrained, none, or a .npz, .safetensors or .pth file
    data_root: str = "data"  # holds food-101/
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the timm model
    released: bool = False  # compute what the released code computed, not what the paper describes


def data(recipe: Recipe) -> Data:
    resize = T.Resize((recipe.img_size, recipe.img_size), T.InterpolationMode.BICUBIC)
    tensor = [T.ToTensor(), T.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]
    plain = T.Compose([resize, *tensor])
    augmented = T.Compose([resize, T.RandomHorizontalFlip(), T.RandomAutocontrast(), *tensor])
    train, val = random_split(food101(recipe.data_root, "train"), fraction=0.8, seed=42)
    train = train.with_transform(plain if recipe.released else augmented)
    return Data(train, val.with_transform(plain), food101(recipe.data_root, "test").with_transform(plain))


def build(recipe: Recipe, num_classes: int) -> TransFG:
    pretrained = recipe.weights == "pretrained"
    return TransFG(recipe.model, num_classes, recipe.img_size, pretrained, recipe.num_parts, **recipe.model_kwargs)


def optimize(recipe: Recipe, parameters: Any) -> tuple[AdamW, lr_scheduler.CosineAnnealingLR]:
    optimizer = AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.t_max)  # stepped once an epoch


if __name__ == "__main__":
    small = dict(patch_size=4, embed_dim=64, depth=9, num_heads=4, drop_path_rate=0.1)
    demo = dict(num_parts=8, img_size=16, epochs=25, lr=2e-3, t_max=25, model_kwargs=small)
    run(Recipe, data, build, optimize, dataset="food101", demo=demo)
