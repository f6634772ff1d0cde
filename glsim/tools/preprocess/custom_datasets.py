"""Writes train_val, test, train, val and classid_classname (.csv) of data sets from their original annotation files.

python tools/preprocess/custom_datasets.py                          every data set that is there
python tools/preprocess/custom_datasets.py --dataset_name cub --dataset_root_path data/CUB_200_2011
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as the scripts start it, inside glsim/: the modules lie beside that folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from glsim.data_utils.annotations import PUBLISHED
from glsim.data_utils.splits import write_splits
from glsim.tools.preprocess.command import for_each_data_set


def main(arguments: Sequence[str] | None = None) -> int:
    return for_each_data_set(__doc__, sorted(PUBLISHED), prepare, arguments)


def prepare(name: str, root: Path) -> str:
    annotations = write_splits(name, root)
    train_val, test = len(annotations.train_val), len(annotations.test)
    classes = len({class_id for class_id, _ in annotations.train_val})
    return f"{train_val:,} images of {classes:,} classes in train_val.csv, {test:,} in test.csv, in {root}"


if __name__ == "__main__":
    sys.exit(main())
