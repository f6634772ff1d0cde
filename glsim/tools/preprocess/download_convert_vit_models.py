"""Downloads Google's ViT weights, pretrained on ImageNet-21k, and converts them to the names of released checkpoints.

python tools/preprocess/download_convert_vit_models.py [--model_name vit_b16 vit_b32 vit_l16 vit_l32 vit_h14]

For each model: {ViT-B_16}.npz as it came, which training reads, and {vit_b16}.pth, a state_dict without a classifier.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside that folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common.files import write_atomically
from common.weights import download_npz
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.model_utils.build import NPZ
from glsim.model_utils.config import MODEL_NAMES
from glsim.tools.preprocess.command import one_sentence

NAMES = [name for name in MODEL_NAMES if name in NPZ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice: Any = {"nargs": "+", "default": ["vit_b16"], "choices": NAMES, "metavar": "NAME"}
    parser.add_argument("--model_name", **choice, help=f"{', '.join(NAMES)} [vit_b16]")
    parser.add_argument("--weights_dir", type=Path, default=Path("ckpts"), metavar="DIR", help="its place [ckpts]")
    options = parser.parse_args(arguments)
    return one_sentence(lambda: download(options.model_name, options.weights_dir))


def download(names: Sequence[str], folder: Path) -> None:
    for name in names:
        file = folder / f"{name}.pth"
        convert(ViTConfig(name, load_fc_layer=False), download_npz(NPZ[name], folder), file)
        print(f"{file} is written")


def convert(config: ViTConfig, npz: Path, file: Path) -> None:
    """Writes Google's weights as the state_dict, under the released names, of the model that `config` describes."""
    model = ViTGLSim(config)
    model.load_npz(npz)
    write_atomically(file, lambda stream: torch.save(model.released_state_dict(), stream))


if __name__ == "__main__":
    sys.exit(main())
