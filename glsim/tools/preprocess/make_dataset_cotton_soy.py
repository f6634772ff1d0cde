"""Writes the csv files of Cotton and Soy, whose classes and splits are in the names of the images: 1_5_train.png.

python tools/preprocess/make_dataset_cotton_soy.py [--dataset_name cotton --dataset_root_path data/cotton]

The published files have the images of a class in the order of a folder listing, which nobody can make again: ours, by
number, hold the same images in train_val and test, and others in train and val.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as the scripts start it, inside glsim/: the modules lie beside that folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from glsim.tools.preprocess.command import for_each_data_set
from glsim.tools.preprocess.custom_datasets import prepare


def main(arguments: Sequence[str] | None = None) -> int:
    return for_each_data_set(__doc__, ("cotton", "soy"), prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
