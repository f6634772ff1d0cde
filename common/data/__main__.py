"""The command line `python -m common.data {check,resize,demo} NAME --data-root DIR`."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool

from torchvision.transforms import InterpolationMode, Resize
from tqdm import tqdm

from common import data as readers
from common.data.dataset_folder import DatasetFolder
from common.data.demo import is_finished, write_demo
from common.data.facts import Facts, data_sets, facts
from common.data.images import BadImage, Images
from common.data.resized import resize
from common.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 for a mismatch or an error."""
    parser = argparse.ArgumentParser(prog="python -m common.data", description="Check, resize or write data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("check", "compare a data set on disk with what is published about it"),
        ("resize", "write a data set once more with its images resized, for faster training on the same pixels"),
        ("demo", "write the small demo data in the layout of a data set"),
    ):
        own = commands.add_parser(command, help=text, description=text)
        own.add_argument("name", type=str.lower, choices=sorted(data_sets()), help="data set")
        own.add_argument("--data-root", default="data", metavar="DIR", help="holds the data sets (default: data)")
        if command == "check":
            own.add_argument("--decode", action="store_true", help="decode each image and list the unreadable ones")
        if command == "resize":
            modes = [InterpolationMode.BICUBIC.value, InterpolationMode.BILINEAR.value]
            own.add_argument("--size", type=int, required=True, help="pixels along each side, as the run's own resize")
            own.add_argument("--interpolation", choices=modes, default=modes[0], help="as the run resizes [bicubic]")
            own.add_argument("--to", required=True, metavar="DIR", help="the new data root")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            return 0 if check(facts(options.name), options.data_root, options.decode) else 1
        if options.command == "demo":
            write_demo(options.name, options.data_root)
        else:
            _resize(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check(data_set: Facts, root: str, decode: bool = False) -> bool:
    """Prints the expected files, counts per class and split, and each problem; returns whether there is none.

    `decode`: every image is decoded too.
    """
    folder = DatasetFolder(data_set, root)
    print(f"{data_set.title}, expected below {folder.root}:\n{data_set.tree}\n")
    found: dict[str, Images] = {}
    problems: list[str] = []
    for split in data_set.counts:
        try:
            found[split] = getattr(readers, data_set.name)(root, split)
        except UserError as error:
            problems.append(f"{split}: {error}")
    counts = {split: Counter(images.labels) for split, images in found.items()}
    classes = max((images.classes for images in found.values()), key=len, default=[])
    width = max(map(len, ["class", *classes]))
    for label, name in enumerate(classes):
        print(f"{name:<{width}}" + "".join(f"{count[label]:>11,} {split}" for split, count in counts.items()))
    for split, images in found.items():
        each = [counts[split][label] for label in range(len(images.classes))]
        for what, is_there, published in (
            ("images", len(images), data_set.counts[split]),
            ("classes", len(images.classes), data_set.classes),
            ("images a class", [min(each), max(each)], data_set.per_class.get(split)),
        ):
            print(f"{split}: {is_there} {what}" + ("" if published is None else f", {published} published"))
            if published not in (None, is_there):
                problems.append(f"{split}: {is_there} {what} where {published} are published")
    if is_finished(folder.path):
        print("This is the demo data (handwritten digits), not the published data set.")
    if decode:
        problems += _unreadable(found.values())
    print(*(f"- {problem}" for problem in problems), sep="\n")
    verdict = f"not as published (problems: {len(problems)})" if problems else "complete: all counts are as published"
    print(f"{data_set.title} at {folder.path} is {verdict}.")
    return not problems


def _unreadable(splits: Iterable[Images]) -> list[str]:
    """What is wrong with each image that cannot be decoded, once for all splits that it is in."""

    def attempt(image: tuple[Images, int]) -> str | None:
        try:
            image[0].decode(image[0].path(image[1]))
        except BadImage as error:
            return str(error)
        return None

    images = {split.path(number): (split, number) for split in splits for number in range(len(split))}
    with ThreadPool() as pool:  # Pillow decodes without the interpreter's lock
        found = pool.imap(attempt, images.values(), chunksize=16)
        return [why for why in tqdm(found, total=len(images), unit=" images") if why]


def _resize(options: argparse.Namespace) -> None:
    data_set = facts(options.name)
    if data_set.name.startswith("cifar"):
        raise UserError(f"{data_set.title} has no image files to resize: a run reads it into memory")
    splits = [getattr(readers, data_set.name)(options.data_root, split) for split in data_set.counts]
    transform = Resize((options.size, options.size), InterpolationMode(options.interpolation))
    print(resize(DatasetFolder(data_set, options.data_root), splits, transform, options.to))


if __name__ == "__main__":
    sys.exit(main())
