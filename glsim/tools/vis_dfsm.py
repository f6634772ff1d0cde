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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from common.cli import Flags, parse
from common.errors import UserError
from common.train import distributed
from glsim.data_utils.datasets import read
from glsim.data_utils.transforms import mean_std
from glsim.tools.heatmap import masks_of
from glsim.train_utils.pictures import beside, draw, overlay, save, to_picture
from glsim.train_utils.recipe import MAY_BE_ZERO, Recipe
from glsim.train_utils.settings import Settings, switched_off
from glsim.train_utils.trained import Running, Trained, configure, load_trained, not_trained, settings_given


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
        request, running, given = parse(
            Request, Running, __doc__ or "", argv, flag=Flags("_"), may_be_zero=MAY_BE_ZERO, configure=configure
        )
        device = distributed.choose_device(running.device, distributed.Launch())
        changes = settings_given(request, running, given)
        if request.ckpt_path is not None:
            trained = load_trained(request.ckpt_path, device, **changes)
        else:
            trained = not_trained(Settings(**changes), device, request.seed)
        print(show(trained, request))
    except UserError as error:
        raise SystemExit(f"vis_dfsm.py: error: {error}") from None


@torch.inference_mode()
def show(trained: Trained, request: Request) -> Path:
    """Write the figure of random images and return its path."""
    # As released no number means the first block here, and the last one in inference.py.
    mask_name = "attention_0" if request.released and request.vis_mask == "attention" else request.vis_mask
    images = getattr(read(trained.settings), request.vis_split).with_transform(trained.transform)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(request.seed))
    chosen = order[: request.batch_size].tolist()
    inputs = torch.stack([images[i][0] for i in chosen])
    masks = masks_of(trained.model, inputs.to(trained.device), [mask_name])[mask_name]
    how = request.vis_mask_pow, request.vis_mask_top, request.vis_mask_color, request.released
    panels = []
    for index, image, mask in zip(chosen, inputs, masks, strict=True):
        picture = to_picture(image, *mean_std(trained.settings))
        caption = images.classes[images.labels[index]]
        panels.append((caption, beside([picture, overlay(picture, mask, *how)], axis=0)))
    model_name = trained.settings.model_name
    name = f"{trained.settings.dataset_name}_{model_name}_{request.vis_mask}_{request.serial}.png"
    path = Path(request.results_dir) / name
    title = f"{request.vis_mask} of {model_name} on {images.name}, {images.split}"
    save(draw(panels, request.vis_cols, title), path)
    return path


if __name__ == "__main__":
    main()
