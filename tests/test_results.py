"""The published numbers against an independent transcription, the noise model against simulation, and `row_line`.

What the command prints of records and rows is held by tests/contract/test_records.py.
"""

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from results import all_papers, all_rows, row_line
from results.compare import compare, margin
from results.measured import parse_record
from results.papers import GRADES, tomllib

ROOT = Path(__file__).resolve().parents[1]
CUB = 5794

# The published numbers

MODELS = ("resnet101", "cal", "vit", "transfg", "ffvt", "glsim")

# Typed from the papers' tables, column by column: the TOML files hold them line by line.
GLSIM_224 = {
    "resnet101": """cub 82.71 .06, dafb 91.20 .08, dogs 91.10 .18, flowers 92.36 .24, food 87.45 .21, inat17 63.37 .16,
        moe 94.22 .06, nabirds 81.00 .26, pets 93.20 .19, vegfru 89.34 .05, average 86.59 9.25""",
    "cal": """cub 88.44 .25, dafb 95.15 .01, dogs 89.78 .10, flowers 98.14 .04, food 89.71 .12, inat17 69.29 .03,
        moe 97.55 .00, nabirds 88.33 .49, pets 93.89 .23, vegfru 90.33 4.28, average 90.06 8.16""",
    "vit": """cub 90.11 .17, dafb 91.78 .06, dogs 91.36 .05, flowers 99.45 .03, food 92.43 .04, inat17 69.38 .04,
        moe 96.47 .11, nabirds 87.36 .09, pets 94.10 .07, vegfru 95.77 .05, average 90.84 8.29""",
    "transfg": """cub 90.49 .06, dafb 92.87 .01, dogs 90.68 .14, flowers 99.44 .03, food 92.76 .05, inat17 72.34 .12,
        moe 96.59 .20, nabirds 88.76 .08, pets 93.93 .14, vegfru 95.91 .04, average 91.38 7.41""",
    "ffvt": """cub 90.05 .04, dafb 91.49 .01, dogs 91.49 .01, flowers 99.32 .02, food 91.89 .01, inat17 69.09 .04,
        moe 96.67 .15, nabirds 86.63 .08, pets 94.34 .11, vegfru 95.58 .02, average 90.56 8.39""",
    "glsim": """cub 90.93 .24, dafb 93.36 .02, dogs 92.01 .09, flowers 99.48 .02, food 92.97 .04, inat17 73.50 .06,
        moe 96.67 .16, nabirds 89.11 .16, pets 95.01 .18, vegfru 96.14 .04, average 91.92 7.14""",
}
GLSIM_448 = {"resnet101": 86.37, "cal": 90.94, "vit": 91.86, "transfg": 91.69, "ffvt": 91.61, "glsim": 92.08}
ONE_DIGIT = {
    "ffvt_cub": (91.6, "T"),
    "ffvt_cub_vit": (90.8, "T"),
    "ffvt_cub_transfg": (91.7, "T"),
    "ffvt_dog": (91.5, "S"),
    "transfg_cub_vit": (90.3, "T"),
    "transfg_cub": (91.7, "T"),
    "transfg_cars_vit": (93.7, "T"),
    "transfg_cars": (94.8, "T"),
    "transfg_dogs_vit": (91.7, "S"),
    "transfg_dogs": (92.3, "S"),
    "transfg_nabirds_vit": (89.9, "S"),
    "transfg_nabirds": (90.8, "S"),
    "transfg_inat17_vit": (68.7, "S"),
}
GFT_MODELS = ("gft", "transfg", "vit", "deit", "densenet169", "resnetv2_101x3_bitm")
GFT_ROWS = {f"{model}_{data}" for model in GFT_MODELS for data in ("coco", "fgvcaircraft", "food101")}
GFT_ROWS |= {"resnet18_COCO", "resnet18_FGVCAircraft", "resnet18_Food101"}
EMPTY = GFT_ROWS | {"ffvt_dog_vit", "ffvt_dog_transfg", "transfg_inat17"}
EMPTY |= {f"ffvt_{data}{model}" for data in ("cotton", "soyloc") for model in ("", "_vit")}
QUOTED = {"ffvt_cotton_transfg": (54.58, 131, 240), "ffvt_soyloc_transfg": (40.67, 244, 600)}  # percent, of images
TEST_SIZES = {  # of one row each
    **{"gft_coco": 4952, "gft_fgvcaircraft": 3333, "gft_food101": 25250, "resnet18_Food101": 25250},
    **{"ffvt_cub": 5794, "ffvt_dog": 8580, "ffvt_cotton": 240, "ffvt_soyloc": 600},
    **{"glsim_cub_224_glsim": 5794, "glsim_cub_448_glsim": 5794, "glsim_dogs_224_glsim": 8580},
    **{"glsim_flowers_224_glsim": 6149, "glsim_food_224_glsim": 25250, "glsim_inat17_224_glsim": 95986},
    **{"glsim_nabirds_224_glsim": 24633, "glsim_pets_224_glsim": 3669, "glsim_dafb_224_glsim": None},
    **{"glsim_moe_224_glsim": None, "glsim_vegfru_224_glsim": None, "glsim_average_224_glsim": None},
    **{"transfg_cub": 5794, "transfg_cars": 8041, "transfg_dogs": 8580, "transfg_nabirds": 24633},
    **{"transfg_inat17": 95986},
}


def glsim_224() -> Iterator[tuple[str, float, float]]:
    for model, column in GLSIM_224.items():
        for cell in column.split(","):
            data, value, std = cell.split()
            yield f"glsim_{data}_224_{model}", float(value), float(std)


def test_glsim_table_4() -> None:
    cells = list(glsim_224())
    assert len(cells) == 66
    for row_id, value, std in cells:
        row = all_rows()[row_id]
        assert (row.value, row.std, row.grade, row.step) == (value, std, "T", 0.01), row_id
        assert row.image_size == 224
        assert (row.seeds == 3) != bool(row.not_comparable), row_id  # the average has no seeds and no run


def test_glsim_448_is_read_off_a_figure() -> None:
    for model, value in GLSIM_448.items():
        row, error = all_rows()[f"glsim_cub_448_{model}"], 0.02 if model == "cal" else 0.01
        assert (row.value, row.std, row.grade, row.read_off, row.seeds) == (value, None, "F", error, None)


def test_values_with_one_digit() -> None:
    for row_id, (value, grade) in ONE_DIGIT.items():
        row = all_rows()[row_id]
        assert (row.value, row.grade, row.step, row.std, row.read_off) == (value, grade, 0.1, None, 0), row_id


def test_values_that_another_paper_quotes() -> None:
    for row_id, (value, correct, total) in QUOTED.items():
        row = all_rows()[row_id]
        assert (row.value, row.grade, row.step) == (value, "S", 0.01)
        assert "384 or 448" in row.not_comparable
        assert round(100 * correct / total, 2) == value
        assert row.test_size == total


def test_there_is_no_other_row() -> None:
    known = {row_id for row_id, _, _ in glsim_224()} | {f"glsim_cub_448_{model}" for model in MODELS}
    assert set(all_rows()) == known | set(ONE_DIGIT) | set(QUOTED) | EMPTY
    assert len(GFT_ROWS) == 21
    assert len({row_id.lower() for row_id in all_rows()}) == sum(len(paper.rows) for paper in all_papers()) == 115


def test_empty_cells_stay_empty_and_say_why() -> None:
    for row_id, row in all_rows().items():
        assert (row.value is None) == (row_id in EMPTY) == bool(row.empty) == (row.grade == ""), row_id
        assert row.grade in (*GRADES, "")
    assert {all_rows()[row_id].empty for row_id in GFT_ROWS} == {"the paper's accuracy tables could not be consulted"}


def test_the_files_do_not_contradict_themselves() -> None:
    for paper in all_papers():
        raw = tomllib.loads((ROOT / "results" / f"{paper.key}.toml").read_text(encoding="utf-8"))
        assert set(raw.get("notes", ())) <= {row.id for row in paper.rows}
        for table in raw["tables"]:
            assert {len(cells) for cells in table["cells"].values()} == {len(raw["columns"])}
        for row in paper.rows:
            assert row.std is None or (row.seeds or 0) > 1 or row.not_comparable, row.id
        for figures in paper.figures:
            assert {len(line) for line in figures.values.values()} == {len(figures.columns)}


def test_sizes_of_the_test_sets() -> None:
    assert {row_id: all_rows()[row_id].test_size for row_id in TEST_SIZES} == TEST_SIZES
    for row in all_rows().values():  # all columns of a table have that of their data set
        assert {other.test_size for other in all_rows().values() if other.data_name == row.data_name} == {row.test_size}


def test_selection_names_the_published_protocol() -> None:
    for row in all_rows().values():
        validated = row.data_name in ("FGVC-Aircraft", "Food-101")
        expected = "" if row.data_name == "Average" else "validation-selected" if validated else "test-selected"
        assert row.selection == expected, row.id


@pytest.mark.parametrize("model", MODELS)
def test_glsim_average_is_the_mean_of_its_column(model: str) -> None:
    """A check on both transcriptions; in the paper itself ViT is off by 0.02 and FFVT by 0.095, which a note says."""
    values = {row_id: value for row_id, value, _ in glsim_224() if row_id.endswith(f"_{model}")}
    average = all_rows()[f"glsim_average_224_{model}"]
    values.pop(average.id)
    assert len(values) == 10
    mean, std = statistics.fmean(values.values()), statistics.stdev(values.values())
    assert mean == pytest.approx(average.value, abs={"vit": 0.02, "ffvt": 0.096}.get(model, 0.006))
    assert std == pytest.approx(average.std, abs=0.011)
    assert ("average" in average.note) == (model in ("vit", "ffvt"))


def test_figures() -> None:
    figures = {(paper.key, table.id): table for paper in all_papers() for table in paper.figures}
    assert set(figures) == {("gft", "parameters"), ("glsim", "throughput"), ("glsim", "selection_cost")}
    assert figures["gft", "parameters"].values == {"gft": [93]}
    throughput = figures["glsim", "throughput"]
    assert (throughput.grade, throughput.columns) == ("F", ["224", "448"])
    assert throughput.values == {
        **{"glsim": [332, 65], "ffvt": [409, 83], "transfg": [334, 38]},
        **{"vit": [438, 122], "cal": [128, 44], "resnet101": [434, 227]},
    }
    cost = figures["glsim", "selection_cost"]
    assert (cost.source, cost.grade) == ("Table 1", "T")  # its cells: tests/glsim/test_calc_flops.py computes them
    assert cost.complexity == ["L H N^3", "L N^3", "L H N", "L H N^2", "N D"]


# The noise model


def test_margin_of_single_runs_is_the_normal_interval() -> None:
    row = all_rows()["ffvt_cub"]  # 91.6, no spread
    assert margin(row, [91.0], CUB) == pytest.approx(0.71648, abs=2e-5)  # 1.959964 * sqrt(.132799 + .000833), by hand
    assert margin(row, [91.0, 91.0], CUB) == pytest.approx(margin(row, [91.0], CUB))  # more runs, the same test set


def test_margin_is_welchs_where_nothing_but_the_spreads_matters() -> None:
    row = replace(all_rows()["glsim_cub_224_glsim"], step=0.0)
    ours, theirs = [90.2, 91.4, 90.9, 90.1], [90.69, 90.93, 91.17]  # mean 90.93, sd 0.24
    welch = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    # A test set so large that its binomial error vanishes leaves Welch's interval.
    assert margin(row, ours, 10**15) == pytest.approx((welch.high - welch.low) / 2, rel=1e-6)


def test_coverage_of_the_interval() -> None:
    """One method run twice, its hits correlated by one half: 95 % of the differences stay within the margin."""
    rng = np.random.default_rng(0)
    rate, size, trials = 0.9, 2000, 3000
    row = replace(all_rows()["ffvt_cub"], value=90.0, step=0.0)
    shared = rng.random((trials, size)) < 0.5  # where both hit or both miss, else each for itself
    published = rng.random((trials, size)) < rate
    measured = np.where(shared, published, rng.random((trials, size)) < rate)
    differences = 100 * (measured.mean(axis=1) - published.mean(axis=1))
    assert 0.94 < (np.abs(differences) <= margin(row, [90.0], size)).mean() < 0.96


def test_coverage_with_seeds_on_both_sides() -> None:
    """Three runs against the mean of three: the spread over seeds is estimated, the test set is the same."""
    rng = np.random.default_rng(1)
    rate, size, spread, trials = 90.0, 5000, 0.3, 2000
    held = 0
    for _ in range(trials):
        # The error of the shared test set, once, and each run's own.
        theirs, ours = rng.normal(rate, spread, 3), rng.normal(rate, spread, 3)
        ours += rng.normal(0, math.sqrt(rate * (100 - rate) / size))
        row = replace(
            all_rows()["glsim_cub_224_glsim"], value=float(theirs.mean()), std=float(theirs.std(ddof=1)), step=0.0
        )
        held += abs(ours.mean() - theirs.mean()) <= margin(row, list(map(float, ours)), size)
    assert 0.935 < held / trials < 0.975


def test_runs_chosen_on_the_test_set_do_not_compare_with_a_validated_paper() -> None:
    row = replace(all_rows()["glsim_cub_224_glsim"], selection="validation-selected")
    (line,) = compare([parse_record(record())], [row])
    assert (line.verdict, line.best and line.best.difference) == ("not comparable", None)
    assert "on the test set" in line.reason


# The line at the end of a run


def record(
    row: str | None = "glsim_cub_224_glsim", correct: int = 5268, total: int = CUB, **more: Any
) -> dict[str, Any]:
    """A record that counts, with the fields that are compared. 5,268 of 5,794 is 90.92 %."""
    test = {"split": "test", "total": total, "correct": correct, "top1": correct / total}
    return {
        **{"schema": 1, "row": row, "script": "train.py", "side": "described", "status": "finished", "excluded": []},
        **{"seed": 1, "weights": None, "selection": {"kind": "test-selected"}},
        "results": {
            "best": {"test": test},
            "last": {"test": test | {"correct": correct - 68, "top1": (correct - 68) / total}},
        },
        **more,
    }


OF_A_CHECKPOINT = {"status": "evaluated", "results": {"checkpoint": record()["results"]["best"]}}
TWO_REASONS = ["altered: epochs 30 -> 2", "limited data"]


@pytest.mark.parametrize(
    ("said", "entry"),
    [
        (
            "glsim_cub_224_glsim (GLSim, described): published 90.93 ± 0.24 (T); this run best 90.92, last 89.75 %; ",
            record(),
        ),
        ("90.92, last 89.75 %; difference -0.01 (±", record()),
        (": reproduced.", record()),
        (
            "described, evaluated): published 90.93 ± 0.24 (T); this run checkpoint 90.92 %; difference",
            record(**OF_A_CHECKPOINT),
        ),
        ("%; does not count (altered: epochs 30 -> 2; limited data).", record(excluded=TWO_REASONS)),
        ("%; does not count (not finished: interrupted).", record(status="interrupted")),
        ("best -, last - %; does not count (not finished: failed).", record(status="failed", results=None)),
        ("%; no published value (the paper's", record("gft_coco", 4900, 4952)),
        ("%; not comparable (tested on 5,700 images", record(total=5700)),
        ("train.py (described): no paper gives a row for this run.", record(row=None)),
        ("cannot be compared with its paper's row", {}),
        ("cannot be compared with its paper's row", record(correct=CUB + 1)),
        ("cannot be compared with its paper's row", record(results={"best": 3})),
    ],
)
def test_row_line(said: str, entry: dict[str, Any]) -> None:
    line = row_line(entry)
    assert said in line
    assert "\n" not in line
    assert line.endswith(".")
    assert ("difference" in line) == (line.rpartition(": ")[2] == "reproduced.")


def test_row_line_of_a_demo_says_that_it_never_counts() -> None:
    line = row_line(record("gft_food101", 350, 360, excluded=["demo"]))
    for word in ("DEMO", "never counts", "97.22"):
        assert word in line
    for word in ("reproduced", "above", "below", "difference"):
        assert word not in line


# The package


def start(*words: str, cwd: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_it_imports_nothing_of_the_programs(tmp_path: Path) -> None:
    """Nor torch: the table has to come at once."""
    others = ("common", "gft", "ffvt", "glsim", "torch")
    code = f"import sys, results.__main__; sys.exit(any(name in sys.modules for name in {others}))"
    program = start("-c", code, cwd=tmp_path)
    assert (program.communicate(), program.returncode) == (("", ""), 0)


def test_a_reader_that_stops_early_sees_no_traceback(tmp_path: Path) -> None:
    with start("-m", "results", "--csv", cwd=tmp_path) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == 0
