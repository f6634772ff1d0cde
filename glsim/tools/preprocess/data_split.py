"""Splits a list of images: of each class the first int(n * train_percent) go to train, the others to val.

python tools/preprocess/data_split.py --dataset_root_path data/CUB_200_2011
python tools/preprocess/data_split.py --dataset_root_path data/food-101 --train_percent 0.2
python tools/preprocess/data_split.py --dataset_root_path data/moe --df_trainval all --df_train train_val --df_val test
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as the scripts start it, inside glsim/: the modules lie beside that folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from glsim.data_utils.datasets import read_list
from glsim.data_utils.splits import FRACTION, split_rows, write_rows
from glsim.tools.preprocess.command import one_sentence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root_path", type=Path, required=True, metavar="DIR", help="folder of the csv files")
    parser.add_argument("--df_trainval", default="train_val.csv", metavar="FILE", help="the list [train_val.csv]")
    parser.add_argument("--df_train", default="train.csv", metavar="FILE", help="the first part [train.csv]")
    parser.add_argument("--df_val", default="val.csv", metavar="FILE", help="the other part [val.csv]")
    parser.add_argument(
        "--train_percent", type=float, default=FRACTION, metavar="X", help=f"share of the first part [{FRACTION}]"
    )
    options = parser.parse_args(arguments)
    return one_sentence(lambda: split(options))


def split(options: argparse.Namespace) -> None:
    listed = read_list(_csv(options, options.df_trainval))
    parts = split_rows([*zip(listed.labels, listed.images, strict=True)], options.train_percent)
    for name, rows in zip((options.df_train, options.df_val), parts, strict=True):
        file = _csv(options, name)
        write_rows(file, rows)
        print(f"{file}: {len(rows):,} images")


def _csv(options: argparse.Namespace, name: str) -> Path:
    """The file of a name that has its .csv or has not."""
    folder: Path = options.dataset_root_path
    return folder / f"{name.removesuffix('.csv')}.csv"


if __name__ == "__main__":
    sys.exit(main())
