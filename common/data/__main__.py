"""The command line `python -m common.data {check,demo} NAME --data-root DIR`."""

import argparse
import sys
from collections.abc import Sequence

from common.data.check import check
from common.data.demo import write_demo
from common.data.published import DATA_SETS
from common.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 for a mismatch or an error."""
    parser = argparse.ArgumentParser(prog="python -m common.data", description="Check or write data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("check", "compare a data set on disk with what is published about it"),
        ("demo", "write the small demo data in the layout of a data set"),
    ):
        subparser = commands.add_parser(command, help=text, description=text)
        subparser.add_argument("name", type=str.lower, choices=sorted(DATA_SETS), help="data set")
        subparser.add_argument(
            "--data-root",
            default="data",
            metavar="DIR",
            help="folder that holds the data sets (default: data)",
        )
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            return 0 if check(options.name, options.data_root) else 1
        write_demo(options.name, options.data_root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
