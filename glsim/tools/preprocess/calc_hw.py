"""Prints how large the images of data sets are: height and width in pixels, over train_val and test.

python tools/preprocess/calc_hw.py                         every data set that is there
python tools/preprocess/calc_hw.py --dataset_name cub --dataset_root_path data/CUB_200_2011
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # as the scripts start it, inside glsim/: the modules lie beside that folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np

from common.data.images import BadImage, image_size
from common.errors import UserError
from glsim.data_utils.annotations import PUBLISHED
from glsim.data_utils.datasets import read
from glsim.data_utils.splits import settings_of
from glsim.tools.preprocess.command import for_each_data_set


def main(arguments: Sequence[str] | None = None) -> int:
    return for_each_data_set(__doc__, sorted(PUBLISHED), describe, arguments)


def describe(name: str, root: Path) -> str:
    data = read(replace(settings_of(name), dataset_root_path=str(root)))
    with ThreadPoolExecutor() as pool:
        sizes = np.array([*pool.map(height_width, data.train.paths + data.test.paths)])  # (images, 2)
    lines = [f"{len(sizes):,} images of {len(data.classes):,} classes"]
    for side, values in zip(("height", "width"), sizes.T, strict=True):
        low, high = values.min(), values.max()
        lines.append(f"    {side:<6}  mean {values.mean():7.1f}  deviation {values.std():7.1f}  {low} to {high}")
    return "\n".join(lines)


def height_width(file: Path) -> tuple[int, int]:
    """As the file's header says them, in pixels; nothing is decoded."""
    try:
        width, height = image_size(file)
    except BadImage as error:  # this program skips none
        raise UserError(f"{str(error).partition(';')[0]}; replace it") from error
    return height, width


if __name__ == "__main__":
    sys.exit(main())
