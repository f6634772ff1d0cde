"""docs/performance.md: the benchmarks' reports, what the page makes of them, and the arithmetic of its estimate."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn
from torchvision import transforms as T

from benchmarks import data, estimate, inference, models, page, report, scaling
from benchmarks.models import Rival
from common.errors import UserError
from common.models import GFT
from common.recipe import parse

PROGRAMS = {  # command lines, by the program and, where it has two, a further word
    "models": "--sizes 32 --batch-size 2 --rounds 1",
    "psm": "--max-tokens 197 --layers 2 --heads 1 --rounds 1",
    "engine": "--model resnet10t --img-size 224 --batch-size 2 --rounds 1",
    "data": "--images 1 --rounds 1",
    "data coco": "--coco",
    "inference": "--sizes 32 --batch-size 2 --rounds 1 --calls 2 --files 2 --workers 0",
    "scaling": "--processes 1",
}
TINY = {"embed_dim": 48, "num_heads": 3, "depth": 9}
LINE = {"processes": 1, "seconds": {"whole": 0.5, "no input": 0.4}, "images_per_s": 8.0, "input": 0.2}
LINE |= {"collectives": 0.0, "gradient_bytes": 86_000_001, "device": "cpu: x86_64, 1 threads"}
COCO = {"seconds": 30.0, "bytes": 380 * 2**20, "images": 117_266}


def plain(size: int, classes: int) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, img_size=size, **TINY)


def released(size: int, classes: int) -> nn.Module:
    return GFT("vit_tiny_patch16_224", classes, size, released=True, **TINY)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each of the six programs writes, on tiny work."""
    folder = tmp_path_factory.mktemp("reports")
    rivals = (Rival("GFT released", released, plain), Rival("the floor again", plain, plain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "RIVALS", rivals)
        patch.setattr(inference, "RIVALS", rivals)
        patch.setattr(models, "matmul_peak", lambda *_: 1e9)
        patch.setattr(data, "SIZES", ((500, 375),))
        patch.setattr(
            data, "published_transforms", lambda _: {"FFVT CUB train": T.Compose([T.Resize(30), T.ToTensor()])}
        )
        patch.setattr(data, "measure_coco", lambda _: {"index built": COCO, "index read": COCO | {"seconds": 1.0}})
        patch.setattr(scaling, "launched", lambda *_: LINE)
        for key, words in PROGRAMS.items():
            name = key.split()[0]
            device = [] if name == "data" else ["--device", "cpu"]
            file = ["--json", str(folder / f"{key}.json")]
            patch.setattr("sys.argv", [name, *words.split(), *device, *file])
            importlib.import_module(f"benchmarks.{name}").main()
    return {name: folder / f"{name}.json" for name in PROGRAMS}


def test_every_program_writes_a_report_of_one_form(reports: dict[str, Path]) -> None:
    for key, file in reports.items():
        name, found = key.split()[0], json.loads(file.read_text())
        assert [*found][:2] == ["benchmark", "about"]
        assert found["benchmark"] == name
        assert len(found) > 2
        about = found["about"]
        assert about["command"].startswith(f"python -m benchmarks.{name} {PROGRAMS[key]}")
        assert "--json" not in about["command"]
        assert about["device"].startswith("cpu: ")
        assert about["precision"] == "fp32"
        assert about["processor"] == report.processor() != ""
        assert about["cores"] >= 1
        assert {"python", "code", "torch", "timm"} <= about["versions"].keys()
        assert about["date"][:2] == "20"
    assert json.loads(reports["models"].read_text())["about"]["recipe"]["batch_size"] == 2


def test_a_command_is_as_given_but_for_the_place_of_the_report() -> None:
    words = ["--only", "a b", "--json", "x y.json", "--rounds", "2", "--json=z.json"]
    assert report.command("data", words) == "python -m benchmarks.data --only 'a b' --rounds 2"


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="could not be written"):
        report.write(str(tmp_path / "none" / "x.json"), "psm", {}, recipe=scaling.Recipe(), device="cpu: x")


def test_the_page_has_what_the_reports_say(
    reports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "REPORTS", tmp_path / "p.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "p.md")
    page.main([*map(str, reversed(reports.values()))])
    text, kept = (tmp_path / "p.md").read_text(), json.loads((tmp_path / "p.json").read_text())
    assert {one["about"]["command"] for one in kept} == {
        json.loads(file.read_text())["about"]["command"] for file in reports.values()
    }
    assert [one["benchmark"] for one in kept] == ["models", "psm", "engine", "data", "data", "inference", "scaling"]
    assert kept == page.rounded(kept) != [json.loads(file.read_text()) for file in reports.values()]
    for file in reports.values():
        assert f"`{json.loads(file.read_text())['about']['command']}` (cpu: " in text
    assert "\nNot measured.\n" not in text
    assert "| GFT released |" in text
    assert "| 500 x 375 |" in text
    assert "| index built | 30.0 | 380 | 117,266 |" in text
    assert "| 1 | 0.500 | 8.00 | 100% | 20.0% | 0.0% |" in text
    assert "**Not run**" in text
    # Every row of a table has as many cells as its head.
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.count("|") for line in block.strip().splitlines()}) == 1, block
    # Those of another device stay where a part is measured anew.
    gpu = made_up("psm", {"tokens": {}}, device="cuda: G")
    (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    page.main([str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "p.json").read_text()) == page.ordered([*kept, gpu])
    page.main([*map(str, reports.values())])
    assert json.loads((tmp_path / "p.json").read_text()) == page.ordered([*kept, gpu])
    text = (tmp_path / "p.md").read_text()
    assert "**Not run**" not in text
    page.main([])  # of the collected figures: the same
    assert (tmp_path / "p.md").read_text() == text
    (tmp_path / "p.json").unlink()
    with pytest.raises(SystemExit, match=r"p\.json cannot be read"):
        page.main([])


def test_figures_are_kept_to_four_digits_and_counts_exactly() -> None:
    line = {"seconds": 12.34567, "bytes": 4_703_432_704, "gradient_bytes": 86_000_001, "name": "x", "none": None}
    short = {"seconds": 12.35, "bytes": 4_703_000_000, "gradient_bytes": 86_000_001, "name": "x", "none": None}
    assert page.rounded({"lines": [line]}) == {"lines": [short]}
    assert page.rounded({"bytes": None}) == {"bytes": None}


def test_a_later_report_replaces_one_of_its_command_and_device(tmp_path: Path) -> None:
    files = []
    for number, (command, device, seconds) in enumerate(
        [("b", "cpu: x", 1.0), ("a", "cuda: x", 2.0), ("a", "cpu: x", 3.0), ("b", "cpu: x", 4.0)]
    ):
        files.append(tmp_path / f"{number}.json")
        one = {"benchmark": "psm", "about": {"command": command, "device": device}, "seconds": seconds}
        files[-1].write_text(json.dumps(one if number else [one]))
    assert [one["seconds"] for one in page.collect(files)] == [3.0, 4.0, 2.0]


OTHERS = ["{", "3", "{}", '[{"benchmark": "psm"}]', '{"benchmark": "psm", "about": {}}']
OTHERS += [
    '{"benchmark": "none", "about": {"device": "cpu", "command": ""}}',
    '{"about": {"device": "", "command": ""}}',
]


@pytest.mark.parametrize("text", OTHERS)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json .*: write it with"):
        page.collect([tmp_path / "x.json"])


def test_met_missed_and_not_measured() -> None:
    assert page.judged([0.98], 0.98) == "met: 0.98 (<= 0.98)"
    assert page.judged([0.9802], 0.98) == "**missed**: 0.9802 (<= 0.98)"
    assert page.judged([], 0.98) == "not measured (<= 0.98)"
    assert page.judged([2.5], 2.5, least=True) == "met: 2.5 (>= 2.5)"
    assert page.judged([2.499], 2.5, least=True) == "**missed**: 2.499 (>= 2.5)"
    assert page.judged([3.0, 1.5], 2.0, unit=" %") == "**missed** by 1 of 2: 1.5 %, 3 % (<= 2 %)"
    assert page.judged([1.01, 1.04, 0.99], 1.05) == "met: 0.99 to 1.04 (<= 1.05)"


def costs(train: float, evaluation: float, size: float | None, share: float = 0.5) -> dict[str, Any]:
    found = {"images_per_s": 1.0, "peak_share": share}
    return {"train": found | {"seconds": train, "bytes": size}, "eval": found | {"seconds": evaluation, "bytes": 7}}


def made_up(benchmark: str, figures: dict[str, Any], **about: Any) -> dict[str, Any]:
    said = {"command": f"python -m benchmarks.{benchmark}", "device": "cpu: x, 2 threads", "precision": "fp32"}
    said |= {"processor": "x", "cores": 2, "system": "y", "date": "2001-02-03", "versions": {"torch": "1", "code": "c"}}
    return {"benchmark": benchmark, "about": said | about, **figures}


def group(size: int, batch_size: int, floor: dict[str, Any], **figures: Any) -> dict[str, Any]:
    named = [{"name": name.replace("_", ", "), "ours": one, "direct": other} for name, (one, other) in figures.items()]
    return {"size": size, "batch_size": batch_size, "floor": floor, "models": named}


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell, the first of its name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *cells = line.strip("| ").split(" | ")
            found.setdefault(name, cells)
    return found


def test_targets_are_judged_by_the_figures() -> None:
    groups = [
        group(448, 4, costs(10.0, 3.0, 4000), FFVT=(costs(9.7, 3.0, 4400), costs(14.0, 3.6, 6600))),
        group(448, 2, costs(5.0, 1.5, 4000), TransFG_overlapping=(costs(5.0, 1.5, None), costs(10.0, 3.0, 5000))),
        group(224, 4, costs(1.0, 1.0, 100), GLSim=(costs(1.9, 2.0, 200), None)),
        group(224, 8, costs(1.0, 1.0, 100), GLSim=(costs(1.96, 2.0, 200), None)),
        group(224, 4, costs(1.0, 1.0, 100), **{"GFT released": (costs(0.5, 0.5, 50), None)}),  # of another batch
    ]
    compiled = group(224, 4, costs(1.0, 1.0, 1), FFVT=(costs(0.1, 0.1, 1), None))
    line = {"name": "FFVT CUB train", "size": [500, 375]}
    lines = [
        line | {"seconds": {"floor": 0.02, "ours": 0.02, "first": 0.03, "kept": 0.005}},
        line | {"seconds": {"floor": 0.02, "ours": 0.022, "first": 0.03, "kept": 0.005}},
    ]
    coco = {"index built": COCO, "index read": COCO | {"seconds": 2.5, "bytes": 401 * 2**20}}
    engine = {"seconds": {"bare": 1.0, "engine": 1.01, "overhead": 0.01}}
    engine |= {"cpu_seconds": {"bare": 1.0, "engine": 1.5, "overhead": 0.5}}
    recipe = {"model": "vit", "img_size": 224, "batch_size": 4}
    text = page.page(
        [
            made_up("models", {"groups": groups}),
            made_up("models", {"groups": [compiled]}, compiled=True),
            made_up("engine", engine, recipe=recipe),
            made_up("engine", engine | {"seconds": engine["cpu_seconds"]}, recipe=recipe | {"img_size": 32}),
            made_up("data", {"lines": lines, "coco": coco}),
        ]
    )
    above, _, gpu = text.partition("## On a GPU")
    found = rows(above.partition("beside its direct formulation")[0])
    assert found["FFVT, 448 px, batch 4"] == [
        "met: 0.97 (<= 0.98)",
        "**missed**: 1 (<= 0.98)",
        "**missed**: 1.1 (<= 1.05)",
    ]
    assert found["FFVT, 224 px, batch 4"] == ["not measured (<= 1)", "not measured (<= 1)", "not measured (<= 1.05)"]
    missed = "**missed** by 1 of 2: 1.9, 1.96 (<= 1.95)"
    assert found["GLSim, 224 px"] == [missed, "met: 2, 2 (<= 2.08)", "met: 2, 2 (<= 2)"]
    assert found["GLSim, 448 px"][0] == "not measured (<= 1.95)"
    assert found["GFT released, 224 px, batch 8"][0] == "not measured (<= 0.7)"
    assert found["TransFG, overlapping, 448 px"][2] == "not measured (<= 1.35)"
    found = rows(above.partition("beside its direct formulation")[2])
    memory = "met: 0.6667 (<= 0.6667)"
    assert found["FFVT, 448 px"] == ["met: 1.443 (>= 1.25)", "**missed**: 1.2 (>= 1.25)", memory]
    assert found["TransFG, overlapping, 448 px"] == [
        "**missed**: 2 (>= 2.5); a plain ViT's own step is 2 times faster",
        "**missed**: 2 (>= 2.5)",
        "not measured (no target)",
    ]
    assert found["overhead of the training loop, 224 px"] == ["met: 1 % (<= 2 %)"]
    assert found["input: time of an image / ImageFolder's"] == ["**missed** by 1 of 2: 1, 1.1 (<= 1.05)"]
    assert found["input: gain of kept images"] == ["met: 4, 4.4 (>= 3)"]
    assert found["COCO: index built"] == ["met: 30 s (<= 60 s)"]
    assert found["COCO: index read"] == ["**missed**: 2.5 s (<= 2 s)"]
    assert found["COCO: memory of either"] == ["**missed** by 1 of 2: 380 MB, 401 MB (<= 400 MB)"]
    assert above.count("\nNot measured.\n") == 3  # part selection, inference, several processes
    assert "**Not run**" in gpu
    assert rows(gpu)["FFVT, 448 px, batch 32"][0] == "not measured (<= 0.98)"
    assert rows(gpu)["cores for the input"][0].split(" = ")[0].endswith(" / 50.0")  # 1 / 0.02
    assert rows(gpu)["cores, with --cache-resized"][0].split(" = ")[0].endswith(" / 200.0")


def test_a_report_of_a_gpu_stands_apart() -> None:
    floor, ffvt = costs(1.0, 1.0, 100, share=0.39), (costs(0.9, 0.9, 100, share=0.41), costs(1.8, 1.7, 300))
    figures = {"groups": [group(448, 32, floor, FFVT=ffvt)]}
    fast = made_up("models", figures, device="cuda: G", precision="bf16", compiled=True)
    above, _, gpu = page.page([fast]).partition("## On a GPU")
    assert rows(above)["FFVT, 448 px, batch 4"][0] == "not measured (<= 0.98)"
    assert "**Not run**" not in gpu
    assert "### Models" in gpu
    assert rows(gpu)["plain ViT, 448 px, batch 32"] == ["**missed**: 39 % (>= 40 %)"]
    assert rows(gpu)["FFVT, 448 px, batch 32"] == ["met: 0.9 (<= 0.98)", "met: 0.9 (<= 0.98)", "met: 1 (<= 1.05)"]
    direct = rows(gpu.partition("beside its direct formulation")[2])
    assert direct["FFVT, 448 px, batch 32"] == ["met: 2 (>= 2)", "**missed**: 1.889 (>= 2)", "0.3333 (no target)"]
    slow = made_up("models", figures, device="cuda: G", precision="bf16", compiled=False)
    assert rows(page.page([slow]).partition("## On a GPU")[2])["FFVT, 448 px, batch 32"][0] == "not measured (<= 0.98)"


def test_what_would_run_on_a_gpu_can_be_typed() -> None:
    lines = page.NOT_RUN.replace("\\\n", "").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    python -m benchmarks.")]
    assert len(commands) == 6
    for _, _, name, *words in commands[:-1]:
        program = importlib.import_module(name)
        _, options, *_ = parse(program.Recipe, program.Options, "", words)
        assert options.device == "cuda"
        assert options.json.startswith("gpu-")


def test_the_estimate_is_the_arithmetic() -> None:
    # ViT-B/16 at 448 px: 784 patches and CLS; per block 12 D^2 weights, biases 9 D, norms 4 D.
    width, tokens, classes = 768, 785, 200
    block = 12 * width**2 + 13 * width
    ends = (3 * 16 * 16 + 1) * width + (1 + tokens) * width + 2 * width + (width + 1) * classes
    products = 12 * (12 * width**2 * tokens + 2 * tokens**2 * width) + 784 * 768 * width + width * classes
    assert estimate.parameters_and_operations(448, classes) == (12 * block + ends, 2 * products)
    assert estimate.all_reduce_bytes(4, 100.0) == 150.0
    assert estimate.all_reduce_bytes(64, 64.0) == 126.0
    # 3 x 2e9 x 16 = 9.6e10 operations at 0.4 x 989e12 = 3.956e14 a second.
    assert estimate.compute_seconds(2e9, 16) == pytest.approx(9.6e10 / 3.956e14)
    assert estimate.left_over(0.9, 1.2) == pytest.approx(0.1)  # 0.8 behind the backward pass
    assert estimate.left_over(0.7, 1.2) == 0
    assert estimate.efficiency(3.0, 1.0) == 0.75


def test_the_estimate_shows_its_arithmetic() -> None:
    """86,404,040 parameters, 156.989 GFLOP: 345.616 MB and 7.5355e12 / 3.956e14 = 19.048 ms a step."""
    text = estimate.section(50.0, None)
    assert "**An estimate" in text
    assert "86,404,040 parameters x 4 bytes = 345.6 MB a step" in text
    assert "that is 19.05 ms, or 840 images/s a GPU" in text
    eight, many = text.partition("| 8 GPUs |")[2], text.partition("| 64 GPUs |")[2]
    # 1.75 x 345.616 = 604.828 MB; over 64 GB/s 9.450 ms; 19.048 / 28.498 = 66.8 %.
    assert rows(eight)["sent by each GPU"][1] == "2 x 7 / 8 x 345.6 MB = 604.8 MB"
    assert rows(eight)["all-reduce"][1] == "604.8 MB / 64 GB/s = 9.45 ms"
    assert rows(eight)["efficiency, nothing hidden"][1].endswith(" = 66.8%")
    # 1.96875 x 345.616 = 680.432 MB; over 50 GB/s 13.609 ms: 12.699 behind the backward pass, 0.910 are left.
    assert rows(many)["all-reduce"] == ["680.4 MB / 50 GB/s = 13.61 ms"]
    assert rows(many)["efficiency, nothing hidden"][0].endswith(" = 58.3%")
    assert rows(many)["left behind the backward pass"][0].endswith(" = 0.91 ms")
    assert rows(many)["efficiency, hidden behind it"][0].endswith(" = 95.4%")
    # 64 x 16 / (19.048 + 0.910) ms = 51,308 images/s.
    assert rows(many)["cores for the input"] == ["51,308 / 50.0 = 1,026.2"]
    assert rows(many)["cores, with --cache-resized"] == ["not measured"]


def test_the_committed_page_is_of_the_committed_figures() -> None:
    assert page.PAGE.exists() == page.REPORTS.exists()
    if page.REPORTS.exists():
        reports = page.collect([page.REPORTS])
        assert reports == json.loads(page.REPORTS.read_text(encoding="utf-8"))  # rounded and in order
        assert page.PAGE.read_text(encoding="utf-8") == page.page(reports)
