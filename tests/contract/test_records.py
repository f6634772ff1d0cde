"""What keeps a record from counting, each reason once; and what the records that count say of a paper's row.

Records of runs are read as the programs write them. Those that are compared with the papers are written here, by the
documented schema, and the half width of each interval is computed here from the documented formula.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from contract.programs import ENVIRONMENT, METHOD, PROGRAMS, ROOT, new_home, reference, run

TABLES = "results/README.md"
RESULTS = ("-m", "results")  # after `python`: the command that makes tables of records
PLAIN_VIT = ("--model-kwargs", "patch_size=4", "embed_dim=32", "depth=2", "num_heads=2")


def record_after(words: list[Any], home: Path) -> dict[str, Any]:
    outcome = run(words, home)
    assert outcome.status == 0, outcome
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("record: ")]
    return json.loads((home / line.removeprefix("record: ")).read_text(encoding="utf-8"))


def altered(record: dict[str, Any]) -> list[str]:
    """The altered fields, sorted."""
    return sorted(reason.split()[1] for reason in record["excluded"] if reason.startswith("altered: "))


# Runs, and why they do not count


@pytest.fixture(scope="module")
def food(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_home(tmp_path_factory.mktemp("food") / "gft", "gft") if reference("gft") else Path()


# As few changes of the script's recipe as a run of seconds needs, on data that are not the published ones.
SMALL = ("--data-root", "runs/demo-data", "--weights", "none", "--img-size", "16", "--workers", "0", "--no-download")
MADE_SMALL = ["epochs", "img_size", "model_kwargs", "weights"]


def small(script: str, home: Path, *more: str, kwargs: tuple[str, ...] = PLAIN_VIT) -> dict[str, Any]:
    return record_after([f"{script}.py", *SMALL, "--epochs", "1", "--limit", "8", *more, *kwargs], home)


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        ((), []),
        (("--lr", "1e-4", "--batch-size", "32", "--weight-decay", "0.05"), []),  # as published, though it was said
        (("--seed", "1"), []),
        (("--released",), []),
        (("--precision", "bf16", "--grad-checkpointing", "--deterministic"), []),
        (("--lr", "2e-4", "--t-max", "9", "--batch-size", "4", "--weight-decay", "0"), None),
        (("--model", "vit_tiny_patch16_224"), ["model"]),
        (("--accumulate", "2"), []),  # a ViT does not mind how a batch is cut
    ],
)
def test_altered_recipes_of_a_script(words: tuple[str, ...], reasons: list[str] | None, food: Path) -> None:
    wanted = ["batch_size", "lr", "t_max", "weight_decay"] if reasons is None else reasons
    record = small("vit_food101", food, *words)
    assert altered(record) == sorted([*MADE_SMALL, *wanted])
    assert [reason for reason in record["excluded"] if not reason.startswith("altered: ")] == ["limited data"]
    assert ("released" in words[0] if words else False) == (record["side"] == "released")


@pytest.mark.parametrize(
    ("script", "kwargs", "reason"),
    [
        ("densenet169_food101", ("growth_rate=4", "block_config=(1,1)"), ["accumulate"]),  # BatchNorm
        ("resnet18_Food101", ("channels=(8,8,8,8)",), ["accumulate"]),
        ("gft_food101", ("patch_size=4", "embed_dim=32", "depth=9", "num_heads=2"), ["accumulate"]),  # moving average
        ("deit_food101", PLAIN_VIT[1:], []),
    ],
)
def test_accumulation(script: str, kwargs: tuple[str, ...], reason: list[str], food: Path) -> None:
    record = small(script, food, "--accumulate", "2", "--img-size", "32", kwargs=("--model-kwargs", *kwargs))
    assert altered(record) == sorted([*MADE_SMALL, *reason])


def test_data_that_are_not_the_published_ones(food: Path) -> None:
    words = ["vit_food101.py", *SMALL, "--epochs", "1", *PLAIN_VIT]
    reasons = [reason for reason in record_after(words, food)["excluded"] if not reason.startswith("altered: ")]
    counted = [re.fullmatch(r"data: food101 (\w+) has ([\d,]+) images, published ([\d,]+)", why) for why in reasons]
    assert [match and (match[1], match[3]) for match in counted] == [("train", "75,750"), ("test", "25,250")]


def test_a_demo_never_counts() -> None:
    """And nothing else is said of it: a demo is altered throughout."""
    assert [reference(name).record["excluded"] for name in PROGRAMS] == [["demo"]] * 4


def test_evaluations(food: Path) -> None:
    """Of a run that has a record; of a file, limited and altered in what the model is."""
    trained = reference("gft").folder
    words = ("--demo", "--limit", "8", "--workers", "0", "--eval")
    record = record_after(["gft_food101.py", *words, trained], food)
    assert record["status"] == "evaluated"
    (of_a_run, demo) = record["excluded"]
    assert "record of its own" in of_a_run
    assert demo == "demo"
    shutil.copy(trained / "best.safetensors", food / "bare.safetensors")
    file = record_after(["gft_food101.py", *words, "bare.safetensors"], food)
    assert file["excluded"] == ["demo"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_home(tmp_path_factory.mktemp("birds") / "ffvt", "ffvt") if reference("ffvt") else Path()


FFVT = ("--name", "n", "--dataset", "CUB", "--data_root", "runs/demo-data", "--limit", "8", "--workers", "0")
FFVT_SIZES = ("--model_kwargs", "hidden_size=32", "mlp_dim=32", "num_heads=2", "num_layers=2", "patch_size=64")


@pytest.mark.parametrize(
    ("words", "row", "reasons"),
    [
        # The published recipe of CUB, but for what makes it short.
        (("--feature_fusion", "--learning_rate", "0.02", "--eval_every", "200"), "ffvt_cub", ["batch_size"]),
        (
            ("--feature_fusion", "--learning_rate", "0.02", "--eval_every", "200", "--train_batch_size", "32"),
            "ffvt_cub",
            [],
        ),
        (
            *[
                (
                    *("--feature_fusion", "--train_batch_size", "32", "--learning_rate", "0.03", "--eval_every", "7"),
                    *("--weight_decay", "0.1", "--decay_type", "linear", "--warmup_steps", "5", "--max_grad_norm", "2"),
                    *("--smoothing_value", "0.1", "--num_token", "4", "--resize_size", "500", "--seed", "3", "--fp16"),
                )
            ],
            "ffvt_cub",
            [
                *("decay_type", "eval_every", "learning_rate", "max_grad_norm", "num_token", "resize_size"),
                *("smoothing_value", "warmup_steps", "weight_decay"),
            ],
        ),
        # A plain ViT, which uses no tokens.
        (
            ("--learning_rate", "0.02", "--eval_every", "200", "--train_batch_size", "32", "--num_token", "3"),
            "ffvt_cub_vit",
            [],
        ),
    ],
)
def test_altered_recipes_of_ffvt(words: tuple[str, ...], row: str, reasons: list[str], birds: Path) -> None:
    more = ("--pretrained_dir", "none", "--num_steps", "1", "--no_download")
    record = record_after(["ffvt/train.py", *FFVT, *more, *words, *FFVT_SIZES], birds)
    assert record["row"] == row
    assert altered(record) == sorted(["model_kwargs", "num_steps", "pretrained_dir", *reasons])
    assert record["excluded"][-1] == "limited data"


def test_an_evaluation_of_ffvt_is_altered_by_the_model_alone(birds: Path) -> None:
    file = reference("ffvt").home / PROGRAMS["ffvt"].published[0]
    sizes = ("hidden_size=64", "mlp_dim=128", "num_heads=4", "num_layers=4", "patch_size=4")
    words = ("--feature_fusion", "--img_size", "16", "--resize_size", "16", "--num_token", "4", "--learning_rate", "1")
    record = record_after(["ffvt/train.py", *FFVT, *words, "--eval", file, "--model_kwargs", *sizes], birds)
    assert altered(record) == ["img_size", "model_kwargs", "num_token", "resize_size"]


CONFIGS = ROOT / "glsim" / "configs"
GLSIM_SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("words", "row", "reasons"),
    [
        (("--cfg_method", METHOD), "glsim_cub_224_glsim", []),
        (("--cfg_method", METHOD, "--lr", "0.003", "--seed", "9", "--serial", "4"), "glsim_cub_224_glsim", []),
        ((), "glsim_cub_224_vit", []),
        (
            *[
                (
                    *("--cfg_method", METHOD, "--dynamic_top", "4", "--batch_size", "4", "--lr", "0.02", "--ls"),
                    *("--crop_inclusive", "--resize_size", "256", "--no-train_trainval", "--focal_gamma", "1"),
                    *("--weight_decay", "0.1", "--clip_grad", "2", "--warmup_steps", "5", "--sched", "linear"),
                )
            ],
            "glsim_cub_224_glsim",
            [
                *("batch", "clip_grad", "crop_inclusive", "dynamic_top", "focal_gamma", "lr:", "ls", "resize_size"),
                *("sched", "train_trainval", "warmup_steps", "weight_decay"),
            ],
        ),
        (("--cfg_method", METHOD, "--batch_size", "4", "--gradient_accumulation_steps", "2"), None, ["gradient"]),
    ],
)
def test_altered_recipes_of_glsim(words: tuple[str, ...], row: str | None, reasons: list[str], tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", "glsim") if reference("glsim") else tmp_path
    small = {"dataset_root_path": "runs/demo-data/CUB", "epochs": 2, "cpu_workers": 0, **GLSIM_SIZES}
    more = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    more += ["--cfg", str(CONFIGS / "cub_ft_is224_weakaugs.yaml"), "--no-pretrained", "--limit", "8"]
    record = record_after(["glsim/tools/train.py", *more, *words], home)
    made_small = ["epochs", "pretrained", *GLSIM_SIZES]
    if reasons == ["gradient"]:  # the same batch in two iterations is the same experiment
        row, reasons = "glsim_cub_224_glsim", []
    assert record["row"] == row
    assert altered(record) == sorted([*made_small, *reasons])
    assert record["excluded"][-1] == "limited data"


# Records beside the papers

CUB = 5794
Z = stats.norm.ppf(0.975)


def metrics(correct: int, total: int) -> dict[str, Any]:
    return {"split": "test", "total": total, "correct": correct, "top1": correct / total, "loss": 0.5}


def made(
    row: str | None = "glsim_cub_224_glsim", correct: int = 5268, total: int = CUB, **changes: Any
) -> dict[str, Any]:
    """A record that counts. 5,268 of 5,794 is 90.92 %."""
    test = metrics(correct, total)
    results = {"best": {"epoch": 40, "step": 400, "val": None, "test": test}}
    results["last"] = {"epoch": 50, "step": 500, "val": None, "test": test}
    selection = {"split": "test", "rule": "best top-1", "kind": "test-selected"}
    return {
        **{"schema": 1, "row": row, "script": "train.py", "side": "described", "status": "finished", "excluded": []},
        **{"recipe": {"epochs": 50}, "overrides": {}, "seed": 1, "data": {"name": "cub"}, "results": results},
        **{"weights": {"source": "a file", "sha256": "ab"}, "selection": selection},
        **changes,
    }


def evaluated(sha256: str | None, correct: int = 5268) -> dict[str, Any]:
    results = {"checkpoint": {"val": None, "test": metrics(correct, CUB)}}
    return made(status="evaluated", weights={"source": "x.pth", "sha256": sha256}, results=results)


def put(folder: Path, *records: dict[str, Any]) -> Path:
    """Records where programs put them."""
    for number, entry in enumerate(records):
        path = folder / "runs" / "script" / f"20250101-{number:06d}-ab" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(entry), encoding="utf-8")
    return folder / "runs"


def ask(*words: str | Path, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *RESULTS, *map(str, words)],
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def table(runs: Path) -> list[dict[str, str]]:
    done = ask("--runs", runs, "--csv")
    assert (done.returncode, done.stderr) == (0, "")
    return list(csv.DictReader(io.StringIO(done.stdout)))


def half_width(
    published: float,
    values: list[float],
    size: int,
    unit: float,
    deviation: float | None = None,
    seeds: int = 1,
    reading: float = 0.0,
) -> float:
    """The documented noise model: binomial error once, the spread of both sides, the printed digit; Welch's freedom."""
    n, known = len(values), published * (100 - published) / size + (unit**2 + (2 * reading) ** 2) / 12
    own = np.var(values, ddof=1) if n > 1 else None
    if own is not None and deviation is not None:
        terms = [(own / n, n - 1), (deviation**2 / seeds, seeds - 1)]
    elif own is not None:
        terms = [(own * (1 / n + 1 / seeds), n - 1)]
    elif deviation is not None:
        terms = [(deviation**2 * (1 / n + 1 / seeds), seeds - 1)]
    else:
        return float(Z * math.sqrt(known))
    total = known + sum(term for term, _ in terms)
    freedom = total**2 / sum(term**2 / degrees for term, degrees in terms)
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(total))


GLSIM_CUB = dict(published=90.93, size=CUB, unit=0.01, deviation=0.24, seeds=3)
READ_OFF = dict(published=92.08, size=CUB, unit=0.01, reading=0.01)
FFVT_CUB = dict(published=91.6, size=CUB, unit=0.1)
MOE = dict(published=96.67, unit=0.01, deviation=0.16, seeds=3)
# row, side -> its records, the verdict, the noise model's numbers (none: nothing is compared)
VERDICTS: dict[tuple[str, str], tuple[list[dict[str, Any]], str, dict[str, Any] | None]] = {
    ("glsim_cub_224_glsim", "described"): (
        [made(correct=correct, seed=seed) for correct, seed in ((5260, 1), (5270, 10), (5290, 100))],
        "reproduced",
        GLSIM_CUB,
    ),
    ("glsim_cub_224_glsim", "released"): ([made(correct=5100, side="released")], "below", GLSIM_CUB),
    ("glsim_cub_224_glsim", "described, evaluated"): (
        [evaluated("a"), evaluated("a"), evaluated("b", 5280), evaluated(None), evaluated(None)],
        "reproduced",
        GLSIM_CUB,
    ),
    ("glsim_cub_448_glsim", "described"): ([made("glsim_cub_448_glsim", 5500)], "above", READ_OFF),
    ("ffvt_cub", "described"): ([made("ffvt_cub", 5307)], "reproduced", FFVT_CUB),  # 91.59
    ("ffvt_cub", "released"): (
        [made("ffvt_cub", correct, side="released", seed=seed) for correct, seed in ((5100, 1), (5110, 2))],
        "below",
        FFVT_CUB,
    ),
    ("glsim_moe_224_glsim", "described"): (
        [made("glsim_moe_224_glsim", 967, 1000)],
        "reproduced",
        MOE | {"size": 1000},
    ),
    ("glsim_moe_224_glsim", "released"): (
        [made("glsim_moe_224_glsim", 967, total, side="released") for total in (1000, 999)],
        "not comparable",
        None,
    ),
    ("ffvt_cub_vit", "described"): ([made("ffvt_cub_vit", 5000, 5700)], "not comparable", None),
    ("glsim_cub_224_vit", "described"): (
        [made("glsim_cub_224_vit"), made("glsim_cub_224_vit", total=CUB - 1, seed=2)],
        "not comparable",
        None,
    ),
    ("glsim_average_224_glsim", "described"): ([made("glsim_average_224_glsim")], "not comparable", None),
    ("gft_food101", "described"): ([made("gft_food101", 22000, 25250)], "no published value", None),
    ("gft_coco", ""): ([], "not run", None),
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, str]]:
    records = [entry for entries, _, _ in VERDICTS.values() for entry in entries]
    lines = table(put(tmp_path_factory.mktemp("judged"), *records))
    found = {(line["row"], line["side"]): line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.parametrize("which", VERDICTS, ids=" ".join)
def test_verdicts(which: tuple[str, str], judged: dict[tuple[str, str], dict[str, str]]) -> None:
    records, verdict, model = VERDICTS[which]
    line = judged[which]
    assert line["verdict"] == verdict
    assert bool(line["reason"]) == (verdict in ("not comparable", "no published value") or which[0].startswith("gft_"))
    if not records:
        assert line["best_n"] == line["best_mean"] == line["best_difference"] == line["seeds"] == ""
        return
    key = "checkpoint" if which[1].endswith("evaluated") else "best"
    tests = {i: entry["results"][key]["test"] for i, entry in enumerate(records)}
    if key == "checkpoint":  # the same file twice is one measurement
        tests = {records[i]["weights"]["sha256"] or i: test for i, test in tests.items()}
    values = [100 * test["correct"] / test["total"] for test in tests.values()]
    assert int(line["best_n"]) == len(values)
    assert float(line["best_mean"]) == pytest.approx(np.mean(values), rel=1e-12)
    assert (line["best_sd"] == "") == (len(values) == 1)
    if len(values) > 1:
        assert float(line["best_sd"]) == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    seeds = {entry["seed"] for entry in records}
    assert line["seeds"] == ("" if key == "checkpoint" else str(len(seeds)))
    if model is None:
        assert line["best_difference"] == line["best_margin"] == ""
        return
    width = half_width(values=values, **model)
    difference = float(np.mean(values)) - model["published"]
    assert float(line["best_difference"]) == pytest.approx(difference, rel=1e-9)
    assert float(line["best_margin"]) == pytest.approx(width, rel=1e-9)
    assert verdict == ("reproduced" if abs(difference) <= width else "above" if difference > 0 else "below")


def test_rows_that_nobody_ran(judged: dict[tuple[str, str], dict[str, str]]) -> None:
    rows = {row for row, _ in judged}
    assert len(rows) == 115
    ran = {row for (row, _), (records, _, _) in VERDICTS.items() if records}
    assert {row for (row, side) in judged if side == ""} == rows - ran
    assert all(line["verdict"] == "not run" for (_, side), line in judged.items() if side == "")


def test_the_edge_of_the_interval_is_inside(tmp_path: Path) -> None:
    half = half_width(values=[90.0], **GLSIM_CUB)
    inside = math.floor((90.93 + half) / 100 * CUB)
    records = [made(correct=inside), made(correct=inside + 1, side="released")]
    lines = {line["side"]: line["verdict"] for line in table(put(tmp_path, *records)) if line["side"]}
    assert lines == {"described": "reproduced", "released": "above"}


def test_seeds_and_selection_are_noted(tmp_path: Path) -> None:
    """Runs without a seed are distinct; a seed that repeats is not another one."""
    other = {"split": "val", "rule": "best top-1", "kind": "validation-selected"}
    records = [made(seed=1), made(seed=1, correct=5270), made(seed=2), made(seed=None), made(seed=None)]
    records.append(made(side="released", selection=other))
    described, released = (line for line in table(put(tmp_path, *records)) if line["side"])
    assert (described["best_n"], described["seeds"]) == ("5", "4")
    assert re.search("5 runs.* 4 ", described["notes"])
    assert released["verdict"] == "reproduced"
    assert "validation" in released["notes"]
    assert "validation" not in described["notes"]


def test_the_last_decides_where_there_is_no_best(tmp_path: Path) -> None:
    entry = made()
    entry["results"]["best"] = None
    (line,) = [line for line in table(put(tmp_path, entry)) if line["side"]]
    assert (line["best_mean"], line["verdict"]) == ("", "reproduced")
    assert float(line["last_mean"]) == pytest.approx(100 * 5268 / CUB)


# Each, of one correct answer in fifty: it would be "below" if it counted.
NEVER: dict[str, list[dict[str, Any]]] = {
    "demo": [made(correct=100, excluded=["demo"]), made(correct=100, excluded=["altered: epochs 30 -> 2", "demo"])],
    "altered": [made(correct=100, excluded=["altered: epochs 30 -> 2"])],
    "limited data": [made(correct=100, excluded=["limited data"])],
    "data": [made(correct=100, excluded=["data: cub test has 12 images, published 5,794"])],
    "evaluation of a run that has a record of its own": [
        evaluated("a") | {"excluded": ["evaluation of a run that has a record of its own"]}
    ],
    "not finished": [made(correct=100, status="interrupted"), made(status="failed", results=None)],
    "no test result": [made(results={"best": None, "last": None}), made(results={"best": {"test": None}})],
    "no row of a paper": [made(None), made("another")],
}


def test_records_that_never_count(tmp_path: Path) -> None:
    runs = put(tmp_path, *(entry for entries in NEVER.values() for entry in entries))
    assert {line["verdict"] for line in table(runs)} == {"not run"}
    said = ask("--runs", runs).stdout
    total = sum(map(len, NEVER.values()))
    listed = re.search(rf"do not count: {total} \((.*)\)", said)
    assert listed
    assert set(listed[1].split(", ")) == {f"{len(entries)} {reason}" for reason, entries in NEVER.items()}


def test_one_that_counts_among_those_that_do_not(tmp_path: Path) -> None:
    runs = put(tmp_path, *(entry for entries in NEVER.values() for entry in entries), made())
    (line,) = [line for line in table(runs) if line["side"]]
    assert (line["best_n"], line["verdict"]) == ("1", "reproduced")


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in made().items() if key != name}


def with_test(**values: Any) -> dict[str, Any]:
    entry = made()
    entry["results"]["best"]["test"] = metrics(5268, CUB) | values
    return entry


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        (without("row"), "row"),
        (without("excluded"), "excluded"),
        (made(schema=2), "schema"),
        (made(side="both"), "side"),
        (with_test(correct=CUB + 1), "results.best"),
        (with_test(top1=0.5), "results.best"),
        (with_test(top5_correct=10), "results.best"),
        ([1], ""),
    ],
)
def test_a_broken_record_is_named_and_the_others_count(entry: Any, names: str, tmp_path: Path) -> None:
    runs = put(tmp_path, entry, made())
    done = ask("--runs", runs, "--csv")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(runs / "script" / "20250101-000000-ab" / "record.json") in line
    assert names in line
    (found,) = [line for line in csv.DictReader(io.StringIO(done.stdout)) if line["side"]]
    assert (found["best_n"], found["verdict"]) == ("1", "reproduced")


def test_the_tables_in_the_tree_are_current(tmp_path: Path) -> None:
    """Made of the TOML files and of results/records; `python -m results --readme` makes them anew."""
    assert ask("--readme", tmp_path / "README.md").returncode == 0
    made_now, in_the_tree = (path.read_text(encoding="utf-8") for path in (tmp_path / "README.md", ROOT / TABLES))
    assert made_now == in_the_tree


def test_tables_are_written(tmp_path: Path) -> None:
    runs, readme = put(tmp_path, made(), made(correct=5100, side="released")), tmp_path / "README.md"
    assert ask("--runs", runs, "--readme", readme).returncode == 0
    text = readme.read_text(encoding="utf-8")
    assert "| 90.93 ± 0.24<br>described: 90.92 (n=1), reproduced<br>released: 88.02 (n=1), below |" in text
    assert "| 91.5 (S)<br>not run |" in text
    assert text.count("not run |") == 114


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--row", "gft_foot101"), "gft_food101"),
        (("--row", "???"), "python -m results lists"),
        (("--runs", "absent"), "--runs absent"),
        (("--readme", "README.md", "--row", "gft_food101"), "--row"),
    ],
)
def test_errors_of_the_command(words: tuple[str, ...], names: str, tmp_path: Path) -> None:
    done = ask(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert names in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_one_row_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    runs = put(tmp_path, made())
    said = ask("--runs", runs, "--row", "GLSIM_CUB_224_glsim").stdout
    for text in (
        "2407.12891",
        "Table 4",
        "5,794",
        "reproduced",
        str(runs / "script" / "20250101-000000-ab" / "record.json"),
    ):
        assert text in said
