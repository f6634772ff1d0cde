"""Lists the images of a folder that has a folder for each class, as ImageNet has, and names the classes.

python tools/preprocess/make_data_dic_imagenetstyle.py --images_path data/ncfm/data

Beside the folder: {folder}.csv and classid_classname.csv. Classes are numbered by the sorted names of their folders.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as the scripts start it, inside glsim/: the modules lie beside that folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from glsim.data_utils.splits import image_folder, write_names, write_rows
from glsim.tools.preprocess.command import one_sentence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images_path", type=Path, required=True, metavar="DIR", help="folder of the class folders")
    options = parser.parse_args(arguments)
    return one_sentence(lambda: write(options.images_path.absolute()))


def write(folder: Path) -> None:
    rows, names = image_folder(folder)
    file = folder.with_name(f"{folder.name}.csv")
    write_rows(file, rows)
    write_names(folder.with_name("classid_classname.csv"), names)
    print(f"{file}: {len(rows):,} images of {len(names):,} classes")


if __name__ == "__main__":
    sys.exit(main())
