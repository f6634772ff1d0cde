"""glsim.tools.calc_flops against the published table and against PyTorch's own counter of operations."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from glsim.tools import calc_flops
from glsim.tools.calc_flops import COSTS, Sizes, backbone, blocks, patch_embedding, shares
from results import all_papers

ROOT = Path(__file__).resolve().parents[2]
TABLE = next(figures for paper in all_papers() for figures in paper.figures if figures.id == "selection_cost")


@pytest.mark.parametrize("size", [224, 448, 768, 1024])
def test_every_cell_of_table_1_is_matched_to_its_last_digit(size: int) -> None:
    published = dict(zip(TABLE.columns, TABLE.values[str(size)], strict=True))
    digits = {224: (3, 4), 448: (2, 3), 768: (1, 3), 1024: (0, 2)}[size]  # of PSM and rollout, behind the point
    decimals = dict(zip(TABLE.columns, (*digits, 4, 4, 4), strict=True))
    ours = shares("vit_b16", size)
    assert {name: round(ours[name], decimals[name]) for name in published} == published


@pytest.mark.parametrize(
    ("name", "timm_name", "image_size"),
    [
        ("vit_b16", "vit_base_patch16_224", 224),
        ("vit_b16", "vit_base_patch16_224", 448),
        ("vit_s32", "vit_small_patch32_224", 224),
        ("vit_h14", "vit_huge_patch14_224", 224),
    ],
)
def test_the_backbone_is_what_pytorch_counts_in_timm(name: str, timm_name: str, image_size: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(timm_name, img_size=image_size, num_classes=0)
        for block in model.blocks:
            block.attn.fused_attn = False  # the counter does not see into fused attention everywhere
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, image_size, image_size))
    sizes = Sizes.of(name, image_size)
    assert 2 * (blocks(sizes) + patch_embedding(sizes)) == counter.get_total_flops()
    assert backbone(sizes) == counter.get_total_flops() // 2 + patch_embedding(sizes)  # as the table counts


@pytest.mark.parametrize("name", ["psm", "rollout"])
def test_products_of_attention_matrices_are_what_pytorch_counts(name: str) -> None:
    sizes = Sizes.of("vit_b16", 224)
    heads, tokens, factors = (sizes.H, sizes.V, sizes.L - 1) if name == "psm" else (1, sizes.N, sizes.L)
    for first_rows, suffix in ((tokens, ""), (1, "_row")):
        product = torch.empty(heads, first_rows, tokens, device="meta")
        with FlopCounterMode(display=False) as counter:
            for _ in range(factors - 1):
                product = product @ torch.empty(heads, tokens, tokens, device="meta")
        # The counter takes as many additions as multiplications; a sum of N numbers has one less.
        products = counter.get_total_flops() - (factors - 1) * heads * first_rows * tokens
        averages = 0 if name == "psm" else sizes.L * (sizes.H + 1) * sizes.N**2
        assert getattr(calc_flops, name + suffix)(sizes) == products + averages


def test_the_program_prints_ours_above_the_published_line() -> None:
    program = [sys.executable, "tools/calc_flops.py", "--image_size"]
    done = subprocess.run([*program, "448", "384"], cwd=ROOT / "glsim", capture_output=True, text=True, check=True)
    head, _, ours, published, other = (line.split("  ") for line in done.stdout.splitlines())
    assert [cell.strip() for cell in head if cell] == ["% of the backbone", *COSTS]
    cells, paper = ([cell.strip() for cell in line if cell] for line in (ours, published))
    assert cells[0] == "448 px"
    assert paper == ["Table 1", *cells[1:6]]
    assert other[0] == "384 px"

    bad = subprocess.run([*program, "225"], cwd=ROOT / "glsim", capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.splitlines() == [
        "calc_flops.py: error: image_size 225: expected a multiple of the patch size 16, both square"
    ]
