"""Writes the names of the classes, classid_classname.csv, of data sets from their original annotation files.

python tools/preprocess/make_classid_classname.py [--dataset_name cub --dataset_root_path data/CUB_200_2011]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as the scripts start it, inside glsim/: the modules lie beside that folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from glsim.data_utils.annotations import PUBLISHED
from glsim.data_utils.splits import read, settings_of, write_names
from glsim.tools.preprocess.command import for_each_data_set


def main(arguments: Sequence[str] | None = None) -> int:
    return for_each_data_set(__doc__, sorted(PUBLISHED), write, arguments)


def write(name: str, root: Path) -> str:
    file = root / settings_of(name).df_classid_classname
    write_names(file, read(name, root).names)
    return f"{file} is written"


if __name__ == "__main__":
    sys.exit(main())
