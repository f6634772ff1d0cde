"""What a model looks at in a batch of random images of a data set: each image, and a mask over it.

    python tools/vis_dfsm.py --serial 52 --batch_size 4 --vis_cols 4 --cfg configs/nabirds_ft_is224_weakaugs.yaml
        --model_name glsvit_base_patch14_dinov2.lvd142m --vis_mask gls --vis_mask_pow
    python tools/vis_dfsm.py ... --vis_mask attention_11          or rollout_0_12; see glsim/tools/heatmap.py, make_mask
    python tools/vis_dfsm.py --ckpt_path ckpts/cub_glsim_224.pth  a trained model, on its data set
    python tools/vis_dfsm.py --demo                               digits, and a small model whose weights are random

Writes {results_dir}/{dataset}_{model}_{mask}_{serial}.png. --seed chooses the images. --released:
`attention` without a number and masks without colour as in the released program (docs/fidelity.md GLSIM-7, GLSIM-10).
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from common import dist
from common.data import Images
from common.errors import UserError
from common.experiment import make_model
from common.recipe import parse
from glsim.data_utils.datasets import read
from glsim.data_utils.transforms import mean_std
from glsim.tools import heatmap
from glsim.tools.inference import Running, check_positive, configure, settings_given
from glsim.tools.train import EXPERIMENT
from glsim.train_utils.recipe import Recipe
from glsim.train_utils.settings import Settings, switched_off
from glsim.train_utils.trained import load_trained


@dataclass
class Request(Recipe):
    batch_size: int = 8  # images
    results_dir: str = "results_inference"  # the figure goes there
    vis_split: Literal["test", "train"] = "test"  # images of this split
    vis_mask: str = "gls"  # gls[im_norm], glsim_L, attention[_L], rollout[[_FROM]_TO], psm[_H], maws[_L], asim
    vis_cols: int = 4  # columns of the figure; a mask is below its image
    vis_mask_pow: bool = False  # masks to the 4th power
    vis_mask_top: int | None = None  # masks are 1 in so many patches, the highest, and 0 elsewhere
    vis_mask_color: bool = switched_off()  # masks in colours; off: they darken the image


def main(argv: list[str] | None = None) -> None:
    """The program; `argv` are the words of its command line."""
    try:
        request, running, given, _ = parse(Request, Running, __doc__ or "", argv, separator="_", configure=configure)
        check_positive(request, ("batch_size", "vis_cols", "vis_mask_top"))
        device = dist.choose_device(running.device, dist.Launch())
        changes = settings_given(request, running, given)
        settings, model, images = _load(replace(request, **changes), changes, device)
        path = show(settings, model.eval().to(device), images, request)
    except UserError as error:
        raise SystemExit(f"vis_dfsm.py: error: {error}") from None
    print(path)


def _load(request: Request, changes: Mapping[str, Any], device: torch.device) -> tuple[Settings, nn.Module, Images]:
    """The settings, the model and the images: of the checkpoint, or as the command line and its files say."""
    if request.ckpt_path is not None:
        trained = load_trained(request.ckpt_path, device, **changes)
        images = getattr(read(trained.settings), request.vis_split)
        return trained.settings, trained.model, images.with_transform(trained.transform)
    data = read(request)
    if not request.pretrained:
        print("note: the model has random weights: --pretrained takes ImageNet's, --ckpt_path names a trained model")
    torch.manual_seed(request.seed)
    model, _ = make_model(EXPERIMENT, request, len(data.classes), load=True)
    return request, model, getattr(data, request.vis_split).with_transform(data.test.transform)


@torch.inference_mode()
def show(settings: Settings, model: nn.Module, images: Images, request: Request) -> Path:
    """Write the figure of random images and return its path."""
    # As released no number means the first block here, and the last one in inference.py.
    mask_name = "attention_0" if request.released and request.vis_mask == "attention" else request.vis_mask
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(request.seed))
    chosen = order[: request.batch_size].tolist()
    inputs = torch.stack([images[i][0] for i in chosen])
    evidence = heatmap.gather(model, inputs.to(next(model.parameters()).device))
    masks = heatmap.make_mask(evidence, mask_name).unflatten(1, evidence.grid).cpu().numpy()
    pictures = [heatmap.to_picture(image, *mean_std(settings)) for image in inputs]
    how = request.vis_mask_pow, request.vis_mask_top, request.vis_mask_color, request.released
    panels = []
    for index, picture, mask in zip(chosen, pictures, masks, strict=True):
        below = heatmap.overlay(picture, mask, *how)
        panels.append((images.classes[images.labels[index]], heatmap.beside([picture, below], axis=0)))
    name = f"{settings.dataset_name}_{settings.model_name}_{request.vis_mask}_{request.serial}.png"
    path = Path(request.results_dir) / name
    title = f"{request.vis_mask} of {settings.model_name} on {images.name}, {images.split}"
    heatmap.save(heatmap.draw(panels, request.vis_cols, title), path)
    return path


if __name__ == "__main__":
    main()
