"""Cost of choosing the discriminative regions, as a share of the backbone's operations: GLSim, Table 1.

    python tools/calc_flops.py [--model_name vit_b16] [--image_size 224 448 768 1024]

How the table counts is read off its digits, all of which come out: in the backbone a multiplication with its addition
is one operation, and two in the patch embedding; in choosing regions every multiplication, addition, division and
exponential is one, but for GLS, where again both together are. With two throughout, all shares but that of GLS would
be about half.

L blocks, H heads, D width, P patches, N = P + 1 tokens, V tokens of overlapping patches (TransFG, AF-Trans).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.errors import UserError
from glsim.model_utils.config import MODEL_NAMES, ViTConfig
from results import all_papers

IMAGE_SIZES = (224, 448, 768, 1024)  # of the table, pixels
SLIDE_STEP = 12  # of overlapping patches, pixels


@dataclass(frozen=True)
class Sizes:
    """What the costs depend on."""

    L: int
    H: int
    D: int
    P: int
    V: int
    mlp: int  # width of the MLPs
    patch: int  # pixels

    @classmethod
    def of(cls, model_name: str, image_size: int) -> "Sizes":
        """Raises UserError for an unknown name and for an image that the patches do not tile."""
        config = ViTConfig(model_name, image_size=image_size)
        overlapping = (image_size - config.fh) // min(SLIDE_STEP, config.fh) + 1  # a side
        return cls(
            *(config.num_hidden_layers, config.num_attention_heads, config.hidden_size),
            *(config.gh * config.gw, overlapping**2 + 1, config.intermediate_size, config.fh),
        )

    @property
    def N(self) -> int:
        return self.P + 1


def blocks(s: Sizes) -> int:
    """Multiplications, each with its addition, of all blocks: projections, attention, MLP."""
    return s.L * (4 * s.N * s.D**2 + 2 * s.N**2 * s.D + 2 * s.N * s.D * s.mlp)


def patch_embedding(s: Sizes) -> int:
    """Multiplications, each with its addition."""
    return s.P * 3 * s.patch**2 * s.D


def backbone(s: Sizes) -> int:
    """What the table divides by."""
    return blocks(s) + 2 * patch_embedding(s)


def psm(s: Sizes) -> int:
    """TransFG: in each head, the product of the attention matrices of all blocks but the last."""
    return (s.L - 2) * s.H * s.V**2 * (2 * s.V - 1)


def psm_row(s: Sizes) -> int:
    """The same CLS row, multiplied from there outwards: `model_utils.transfg.joint_attention`."""
    return (s.L - 2) * s.H * s.V * (2 * s.V - 1)


def rollout(s: Sizes) -> int:
    """All blocks' matrices, averaged over the heads and with the identity, and their product."""
    return _averages(s) + (s.L - 1) * s.N**2 * (2 * s.N - 1)


def rollout_row(s: Sizes) -> int:
    """The same CLS row, multiplied from there outwards."""
    return _averages(s) + (s.L - 1) * s.N * (2 * s.N - 1)


def _averages(s: Sizes) -> int:
    return s.L * (s.H + 1) * s.N**2  # H additions, the identity's among them, and a division


def maws(s: Sizes) -> int:
    """FFVT, all blocks but the last: softmax of the CLS column (3 H), means of column and row (2 H), their product."""
    return (s.L - 1) * (5 * s.H + 1) * s.N


def sacm(s: Sizes) -> int:
    """AF-Trans: means over the heads of all blocks but the last, and one more operation an entry, by the table."""
    return ((s.L - 1) * s.H + 1) * s.V**2


def gls(s: Sizes) -> int:
    """GLSim: the product of CLS and patch and the squares of both, for each patch."""
    return 3 * s.P * s.D


COSTS: dict[str, Callable[[Sizes], int]] = {
    "TransFG PSM": psm,
    "rollout": rollout,
    "FFVT MAWS": maws,
    "AF-Trans SACM": sacm,
    "GLS": gls,
    "PSM, row only": psm_row,
    "rollout, row only": rollout_row,
}


def shares(model_name: str, image_size: int) -> dict[str, float]:
    """The cost of each of COSTS, % of the backbone's."""
    sizes = Sizes.of(model_name, image_size)
    return {name: 100 * cost(sizes) / backbone(sizes) for name, cost in COSTS.items()}


def printed(share: float) -> str:
    """The share with five digits, at most four of them decimals, as the table prints it."""
    return f"{share:.{max(0, 5 - len(str(int(share))))}f}"


def table(model_name: str, image_sizes: Sequence[int]) -> str:
    """The shares of each image size, pixels, as text; below them the published ones, where there are any."""
    figures = next(f for paper in all_papers() for f in paper.figures if f.id == "selection_cost")
    orders = (*figures.complexity, "L H N^2", "L H N^2")
    lines = [["% of the backbone", *COSTS], ["order", *orders]]
    for size in image_sizes:
        lines.append([f"{size} px", *map(printed, shares(model_name, size).values())])
        if model_name == "vit_b16" and str(size) in figures.values:
            lines.append([f"  {figures.source}", *map(printed, figures.values[str(size)]), "", ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
    return "\n".join(map(str.rstrip, aligned))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model_name", default="vit_b16", choices=MODEL_NAMES, metavar="S", help="a ViT of GLSim [%(default)s]"
    )
    parser.add_argument(
        "--image_size", type=int, nargs="+", default=IMAGE_SIZES, metavar="N", help="sides, pixels %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        print(table(arguments.model_name, arguments.image_size))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
