"""Records, the noise model, the verdicts, and the tables made of them."""

import copy
import csv
import errno
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from common import results
from common.errors import UserError
from common.papers import all_rows, papers
from common.results import (
    comparison,
    csv_table,
    find_records,
    margin,
    markdown_table,
    read_record,
    readme_block,
    row_line,
    write_record,
)

CUB = 5794


def metrics(correct, total):
    return {"split": "test", "total": total, "correct": correct, "top1": correct / total, "loss": 0.5}


def record(row="glsim_cub_224_glsim", correct=5268, total=CUB, *, last=None, **changes):
    """A record that counts. 5,268 of 5,794 is 90.92 %."""
    last = correct if last is None else last
    return {
        "schema": 1,
        "row": row,
        "script": "train.py",
        "side": "described",
        "status": "finished",
        "excluded": [],
        "recipe": {"epochs": 50},
        "overrides": {},
        "seed": 1,
        "data": {"name": "cub"},
        "weights": {"source": "a file", "sha256": "ab"},
        "selection": {"split": "test", "rule": "best top-1", "kind": "test-selected"},
        "results": {
            "best": {"epoch": 40, "step": 400, "val": None, "test": metrics(correct, total)},
            "last": {"epoch": 50, "step": 500, "val": None, "test": metrics(last, total)},
        },
    } | changes


@pytest.fixture
def runs(tmp_path):
    """Puts records where programs put them; returns the folder."""

    def put(*records):
        for number, entry in enumerate(records):
            folder = tmp_path / "runs" / "script" / f"20250101-{number:06d}-ab"
            folder.mkdir(parents=True)
            write_record(folder / "record.json", entry)
        return tmp_path / "runs"

    return put


def only(lines):
    assert len(lines) == 1, lines
    return lines[0]


# Records


def test_record_round_trip_with_awkward_values(tmp_path):
    entry = record() | {
        "nan": math.nan,
        "list": (np.float32(0.5), np.int64(3), math.inf),
        "path": tmp_path,
        "flag": True,
        "text": "Größe",
    }
    write_record(tmp_path / "record.json", entry)
    text = (tmp_path / "record.json").read_text("utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert "Größe" in text
    found = read_record(tmp_path / "record.json")
    assert (found["nan"], found["list"], found["path"], found["flag"]) == (None, [0.5, 3, None], str(tmp_path), True)
    assert found["results"] == record()["results"]


def test_a_value_without_json_form_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="set"):
        write_record(tmp_path / "record.json", record() | {"odd": {1}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failing_disk_leaves_the_old_record(tmp_path, monkeypatch, failing):
    path = tmp_path / "record.json"
    write_record(path, record(correct=5000))

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(UserError, match=r"record\.json.*No space left.*unchanged"):
            write_record(path, record(correct=5100))
    assert read_record(path)["results"]["best"]["test"]["correct"] == 5000
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        write_record(tmp_path / "nowhere" / "record.json", record())


def without(name):
    return lambda entry: entry.pop(name)


def with_test(**values):
    return lambda entry: entry["results"]["best"]["test"].update(values)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        *(
            (without(name), f"lacks the field '{name}'")
            for name in ("row", "side", "excluded", "seed", "results", "data")
        ),
        (lambda entry: entry.update(schema=2), "schema 2"),
        (without("schema"), "schema None"),
        (lambda entry: entry.update(side="both"), "side 'both'"),
        (lambda entry: entry.update(excluded="demo"), "'excluded'"),
        (lambda entry: entry.update(excluded=[1]), "no text"),
        (lambda entry: entry.update(seed=True), "'seed'"),
        (lambda entry: entry["results"].update(best=[1]), r"results\.best"),
        (lambda entry: entry["results"]["last"].update(val=3), r"results\.last\.val"),
        (with_test(correct=CUB + 1), "impossible count 5795 correct of 5794"),
        (with_test(correct=-1), "impossible count"),
        (with_test(total=0, correct=0), "impossible count"),
        (with_test(correct=5268.0), "no whole numbers"),
        (with_test(total=None), "no whole numbers"),
        (with_test(top5_correct=10), "top5_correct 10"),
        (with_test(top5_correct=CUB + 1), "top5_correct"),
        (with_test(top1=0.5), "top1 0.5 beside 5268 correct of 5794"),
    ],
)
def test_a_broken_record_is_named(runs, damage, fault):
    entry = record()
    damage(entry)
    folder = runs(entry)
    path = find_records(folder)[0]
    with pytest.raises(UserError, match=fault) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="move it away"):
        comparison(folder)


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": 1', b"\xff\xfe", b"[1]", b"null"])
def test_a_file_that_is_no_json_record_is_named(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record\.json") as caught:
        read_record(path)
    assert "\n" not in str(caught.value)


def test_an_absent_record_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read the record .*record\.json"):
        read_record(tmp_path / "record.json")


def test_find_records(runs, tmp_path):
    assert find_records(tmp_path / "absent") == []
    folder = runs(record(), record())
    (folder / "script" / "unfinished").mkdir()
    (folder / "script" / "20250101-000000-ab" / "deeper").mkdir()
    (folder / "script" / "20250101-000000-ab" / "deeper" / "record.json").write_text("{}")
    assert [path.parent.name for path in find_records(folder)] == ["20250101-000000-ab", "20250101-000001-ab"]


# The noise model


def test_margin_of_single_runs_is_the_normal_interval():
    row = all_rows()["ffvt_cub"]  # 91.6, no spread
    error = math.sqrt(91.6 * 8.4 / CUB + 0.1**2 / 12)
    assert margin(row, [91.0], CUB) == pytest.approx(1.959964 * error, rel=1e-6)
    assert margin(row, [91.0], CUB) == pytest.approx(0.71648, abs=2e-5)  # by hand: 1.959964 * sqrt(.132799 + .000833)


def test_margin_is_welchs_where_nothing_but_the_spreads_matters():
    row = replace(all_rows()["glsim_cub_224_glsim"], step=0.0)
    ours, theirs = [90.2, 91.4, 90.9, 90.1], [90.69, 90.93, 91.17]  # mean 90.93, sd 0.24
    welch = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    # A test set so large that its binomial error vanishes leaves Welch's interval.
    assert margin(row, ours, 10**15) == pytest.approx((welch.high - welch.low) / 2, rel=1e-6)


def test_margin_of_equal_runs_keeps_the_binomial_error():
    row = all_rows()["ffvt_cub"]
    assert margin(row, [91.0, 91.0], CUB) == pytest.approx(margin(row, [91.0], CUB))


def test_coverage_of_the_interval():
    """One method run twice, its hits correlated by one half: 95 % of the differences stay within the margin."""
    rng = np.random.default_rng(0)
    rate, size, trials = 0.9, 2000, 3000
    row = replace(all_rows()["ffvt_cub"], value=90.0, step=0.0)
    shared = rng.random((trials, size)) < 0.5  # where both hit or both miss, else each for itself
    published = rng.random((trials, size)) < rate
    measured = np.where(shared, published, rng.random((trials, size)) < rate)
    differences = 100 * (measured.mean(axis=1) - published.mean(axis=1))
    held = np.abs(differences) <= margin(row, [90.0], size)
    assert 0.94 < held.mean() < 0.96


# Verdicts


def test_without_runs_every_row_is_listed_as_not_run(tmp_path):
    lines = comparison(tmp_path / "none")
    assert [line.row.id for line in lines] == list(all_rows())
    assert {(line.verdict, line.side, line.best, line.last) for line in lines} == {("not run", "", None, None)}


def test_the_margin_itself_is_inside(runs):
    row = all_rows()["glsim_cub_224_glsim"]
    half = margin(row, [0.0], CUB)
    inside, outside = (math.floor((90.93 + half) / 100 * CUB) + extra for extra in (0, 1))
    assert only(comparison(runs(record(correct=inside)), [row.id])).verdict == "reproduced"
    assert half < 100 * outside / CUB - 90.93
    assert "above" in row_line(record(correct=outside))


def test_mean_and_deviation_of_several_runs_best_and_last(runs):
    counts, lasts = (5260, 5270, 5290), (5200, 5210, 5230)
    entries = [record(correct=c, last=d, seed=s) for c, d, s in zip(counts, lasts, (1, 10, 100), strict=True)]
    line = only(comparison(runs(*entries), ["glsim_cub_224_glsim"]))
    values = [100 * c / CUB for c in counts]
    assert line.best.mean == pytest.approx(np.mean(values))
    assert line.best.sd == pytest.approx(np.std(values, ddof=1))
    assert line.best.margin == pytest.approx(margin(line.row, values, CUB))
    assert line.last.mean == pytest.approx(np.mean([100 * d / CUB for d in lasts]))
    assert line.last.difference == pytest.approx(line.last.mean - 90.93)
    assert (line.seeds, line.notes, len(line.records)) == (3, (), 3)


def test_described_and_released_are_separate_lines(runs):
    folder = runs(record(), record(side="released", correct=5100), record(seed=2))
    lines = comparison(folder, ["glsim_cub_224_glsim"])
    assert [(line.side, line.best.n, line.verdict) for line in lines] == [
        ("described", 2, "reproduced"),
        ("released", 1, "below"),
    ]


def evaluated(sha256, correct=5268, **changes):
    results_ = {"checkpoint": {"val": None, "test": metrics(correct, CUB)}}
    return record(status="evaluated", weights={"source": "x.pth", "sha256": sha256}, results=results_) | changes


def test_evaluated_checkpoints_are_a_group_of_their_own_and_count_once(runs):
    folder = runs(record(), evaluated("a"), evaluated("a"), evaluated("b", 5280), evaluated(None), evaluated(None))
    lines = comparison(folder, ["glsim_cub_224_glsim"])
    assert [(line.side, line.best.n, line.seeds) for line in lines] == [
        ("described", 1, 1),
        ("described, evaluated", 4, 0),
    ]
    assert "1 repeated evaluation(s) of the same checkpoint left out" in lines[1].notes
    assert "n=4, checkpoint 90.97 ± 0.10" in markdown_table(lines)


def selected(kind):
    return {"split": "x", "rule": "best top-1", "kind": kind}


def test_selection_on_the_test_set_is_not_comparable_with_a_validated_paper(runs, monkeypatch):
    row = replace(all_rows()["glsim_cub_224_glsim"], selection="validation-selected")
    monkeypatch.setitem(all_rows(), row.id, row)
    line = only(comparison(runs(record()), [row.id]))
    assert (line.verdict, line.best.difference) == ("not comparable", None)
    assert "chose the epoch on the test set" in line.reason


def test_last_decides_where_there_is_no_best(runs):
    entry = record(correct=5268)
    entry["results"]["best"] = None
    line = only(comparison(runs(entry), ["glsim_cub_224_glsim"]))
    assert (line.best, line.verdict) == (None, "reproduced")
    assert "best -, last 90.92" in markdown_table([line])


# The line at the end of a run


def test_row_line_of_a_run_that_counts():
    line = row_line(record(last=5200))
    assert line.startswith("glsim_cub_224_glsim (GLSim, described): published 90.93 ± 0.24 (T); this run best 90.92, ")
    assert "last 89.75 %" in line
    assert "difference -0.01 (±" in line
    assert line.endswith(": reproduced.")
    assert "\n" not in line


def test_row_line_of_a_demo_says_that_it_never_counts():
    line = row_line(record(row="gft_food101", correct=350, total=360, excluded=["demo run"]))
    assert "DEMO" in line
    assert "never counts" in line
    assert "97.22" in line
    for word in ("reproduced", "above", "below", "difference"):
        assert word not in line


def test_row_line_of_other_runs():
    altered = row_line(record(excluded=["altered: epochs 30 -> 2", "limited: 10 steps"]))
    assert altered.endswith("does not count (altered: epochs 30 -> 2; limited: 10 steps).")
    assert "difference" not in altered
    assert "not finished: interrupted" in row_line(record(status="interrupted"))
    assert "no published value (the paper's" in row_line(record(row="gft_coco", correct=4000, total=4952))
    assert "no paper gives a row" in row_line(record(row=None))
    assert "not comparable (tested on 5,700" in row_line(record(correct=5000, total=5700))
    assert "evaluated): published 90.93 ± 0.24 (T); this run checkpoint 90.92 %; difference" in row_line(evaluated("a"))
    excluded = row_line(evaluated("a", excluded=["evaluation of a checkpoint"]))
    assert excluded.endswith("this run checkpoint 90.92 %; does not count (evaluation of a checkpoint).")
    assert "best -, last - %" in row_line(record(status="failed", results=None))


# Tables


@pytest.fixture
def some_lines(runs):
    return comparison(
        runs(
            record(),
            record(seed=10, correct=5290),
            record(side="released", correct=5100),
            record("gft_food101", 22000, 25250),
            record("ffvt_cub", 5000, 5700),
        )
    )


def test_csv_parses_back(some_lines):
    table = list(csv.DictReader(io.StringIO(csv_table(some_lines))))
    assert len(table) == len(some_lines) == 116
    by_key = {(line["row"], line["side"]): line for line in table}
    ours = by_key["glsim_cub_224_glsim", "described"]
    line = next(line for line in some_lines if line.row.id == ours["row"])
    assert (float(ours["published"]), float(ours["published_std"]), ours["grade"]) == (90.93, 0.24, "T")
    assert (int(ours["best_n"]), float(ours["best_mean"]), float(ours["best_sd"])) == (2, line.best.mean, line.best.sd)
    assert float(ours["last_margin"]) == line.last.margin
    assert (ours["seeds"], ours["verdict"]) == ("2", "reproduced")
    assert by_key["gft_coco", ""]["reason"] == "the paper's accuracy tables could not be consulted"
    assert by_key["gft_coco", ""]["published"] == by_key["gft_coco", ""]["best_mean"] == ""
    assert by_key["gft_coco", ""]["verdict"] == "not run"
    assert by_key["ffvt_cub", "described"]["reason"].startswith("tested on 5,700")


def test_markdown_has_all_rows(some_lines):
    lines = markdown_table(some_lines).splitlines()
    assert len(lines) == 2 + 116
    assert {line.count("|") for line in lines} == {8}
    assert [line.split("|")[2].strip() for line in lines[2:]] == [line.row.id for line in some_lines]
    assert sum("not run" in line for line in lines) == 112


def test_text_table_is_aligned(runs, capsys):
    folder = runs(record(), record(side="released", correct=5100))
    assert results.main(["--runs", str(folder), "--row", "glsim_cub_224_glsim", "--row", "GFT_coco"]) == 0
    out = capsys.readouterr().out
    head, rule, described, released, gft = out.splitlines()[:5]
    starts = [index for index, sign in enumerate(rule) if sign == "-" and (index == 0 or rule[index - 1] == " ")]
    assert [head[start:].split("  ")[0] for start in starts] == list(results.HEADER)
    assert all(line[start - 1] == " " for line in (described, released, gft) for start in starts[1:])
    for text in ("arXiv 2407.12891", "Table 4", "5,794 images", "seeds 1, 10, 100", "could not be consulted"):
        assert text in out
    assert str(folder / "script" / "20250101-000001-ab" / "record.json") in out


def test_paper_option_prints_its_rows_and_other_figures(tmp_path, capsys):
    assert results.main(["--runs", str(tmp_path), "--paper", "glsim"]) == 0
    out = capsys.readouterr().out
    assert out.count("not run") == 72
    assert "gft_" not in out
    for text in ("13674", "0.0023", "L H N^3", "438", "only the ratios", "% of the backbone"):
        assert text in out


def test_readme_block_has_a_compact_table_for_each_paper(runs):
    folder = runs(record(), record(side="released", correct=5100), record("gft_food101", 22000, 25250))
    block = readme_block(folder)
    assert [line.count("| ---") for line in block.splitlines() if "| ---" in line] == [8, 4, 7, 3]
    assert block.count("not run") == len(all_rows()) - 2
    for paper in papers():
        assert f"**{paper.name}** (arXiv {paper.arxiv})" in block
    assert "90.93 ± 0.24<br>described: 90.92 (n=1), reproduced<br>released: 88.02 (n=1), below" in block
    assert "-<br>described: 87.13 (n=1), no published value" in block
    assert "91.5 (S)<br>not run" in block
    assert "No published value in 21 of the cells of GFT: the paper's accuracy tables could not be consulted." in block


README = "# Title\n\n<!-- results -->\nold\n<!-- /results -->\n\nEnd\n"


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- results -->", "<!-- /results --> <!-- results -->", README + README]
)
def test_readme_without_its_markers_is_refused(tmp_path, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert results.main(["--runs", str(tmp_path), "--readme", str(readme)]) == 2
    assert "README.md needs the line" in capsys.readouterr().err
    assert readme.read_text() == text


def test_the_command_runs_as_printed(tmp_path):
    """In a fresh process, without runs, and without importing torch: the table has to come at once."""
    code = "import sys, common.results as r; r.main(['--csv']); sys.exit('torch' in sys.modules)"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not run") == len(all_rows())


def test_a_reader_that_stops_early_sees_no_traceback(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "common.results", "--markdown"]
    program = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    program.stdout.close()
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait() == 0


def test_a_record_is_not_changed_by_writing_or_comparing(runs):
    entry = record()
    before = copy.deepcopy(entry)
    row_line(entry)
    folder = runs(entry)
    assert entry == before == json.loads(find_records(folder)[0].read_text("utf-8"))
