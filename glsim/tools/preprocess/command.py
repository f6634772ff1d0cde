"""What the preparation tools share: data sets by name, and errors as one sentence."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError
from glsim.data_utils.splits import settings_of


def for_each_data_set(
    description: str, names: Sequence[str], work: Callable[[str, Path], str], arguments: Sequence[str] | None = None
) -> int:
    """A program that calls `work(name, root)` for data sets, and prints what it returns.

    --dataset_name chooses among `names`; without it each is taken whose folder exists. The others do not wait for one
    that fails. Returns the exit status: 0 when something was done and nothing failed, else 1.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset_name", nargs="+", choices=names, metavar="NAME", help=f"{', '.join(names)} [all that are there]"
    )
    parser.add_argument(
        "--dataset_root_path", metavar="DIR", help="folder of the one data set named [as in configs/datasets/NAME.yaml]"
    )
    options = parser.parse_args(arguments)
    if options.dataset_root_path is not None and len(options.dataset_name or []) != 1:
        parser.error("--dataset_root_path: name the one data set that is there with --dataset_name")
    done = failed = 0
    for name in options.dataset_name or names:
        root = Path(options.dataset_root_path or settings_of(name).dataset_root_path)
        if options.dataset_name is None and not root.is_dir():
            print(f"{name}: skipped, {root} is not there")
            continue
        try:
            print(f"{name}: {work(name, root)}", flush=True)
            done += 1
        except UserError as error:
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
            failed += 1
    if not done and not failed:
        print("error: there is no data set: ./scripts/download.sh says where to get them", file=sys.stderr)
    return 0 if done and not failed else 1


def one_sentence(work: Callable[[], object]) -> int:
    """Calls `work`; a UserError is printed and makes the exit status 1."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
