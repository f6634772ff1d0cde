"""On one, two and three processes: the same training and the same counts; lost and resumed; each launcher once.

The runs have no dropout, of which each process draws its own. Counts are compared exactly, though training on shares
adds in another order: logits move by some 1e-6 then, and those that counts depend on are 1e-4 apart here.
"""

import functools
import json
import multiprocessing.util
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from contract.programs import (
    PROGRAMS,
    ROOT,
    Moment,
    Outcome,
    assert_same,
    launch,
    log_of,
    run,
    run_folder,
    start_ranks,
    written,
)

IMAGES = 67  # a prime number; the last batch of an epoch has 7, which no number of processes here divides
BATCH = 12  # over all processes
STEPS = 12  # two epochs
# float32 has a loss of 2.3 within 2e-7; shares are summed in another order, and twelve updates carry that on: 4e-7 was
# measured. A share with a wrong weight changes a loss by 1e-2.
TOLERANCE = 1e-5
AGAIN = ("--resume", "auto")  # with which a run that torchrun starts again goes on
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


# What makes the runs of programs.PROGRAMS two epochs without dropout, without stochastic depth and without mixing.
STEADY: dict[str, tuple[str, ...]] = {
    "gft": (
        *("--epochs", "2", "--model-kwargs"),
        *("patch_size=4", "embed_dim=64", "depth=9", "num_heads=4", "drop_path_rate=0"),
    ),
    "densenet": ("--epochs", "2"),
    "ffvt": ("--num_steps", str(STEPS), "--eval_every", "6"),
    "glsim": ("--epochs", "2", "--hidden_dropout_prob", "0", "--no-cm", "--no-mu", "--ra", "0"),
}
# Flags of batch size (of a process in the latter two), parts of a batch, data.
SCRIPT = ("--batch-size", "--accumulate", "--data-root")
FLAGS = {
    "ffvt": ("--train_batch_size", "--gradient_accumulation_steps", "--data_root"),
    "glsim": ("--batch_size", "--gradient_accumulation_steps", "--dataset_root_path"),
}
ALIKE = ("gft", "ffvt", "glsim")  # no BatchNorm, which sees the share of its process on a CPU


def command(name: str, size: int, *more: str | Path) -> list[str]:
    program, flag = PROGRAMS[name], FLAGS.get(name, SCRIPT)[0]
    share = str(BATCH // size if name in FLAGS else BATCH)
    return [program.file, *program.start("--limit", str(IMAGES), *STEADY[name], flag, share, *more)]


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="processes-"))
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
    return folder


@functools.cache
def trained(name: str, size: int) -> tuple[Path, list[Outcome]]:
    """A run on so many processes that was left alone: its home, and how each process ended, its moments counted."""
    home = _scratch() / f"{name}-{size}"
    if size == 1:  # its demo data are those of all others
        (home / "runs").mkdir(parents=True)
        return home, [run(command(name, 1), home).done()]
    new_home(home, name)
    return home, together(command(name, size), home, size, dict.fromkeys(range(size), Moment()))


def new_home(home: Path, name: str) -> Path:
    (home / "runs").mkdir(parents=True)
    (home / "runs" / "demo-data").symlink_to(trained(name, 1)[0] / "runs" / "demo-data")
    return home


def together(
    words: Sequence[str | Path], home: Path, size: int, moments: dict[int, Moment] | None = None
) -> list[Outcome]:
    """All processes to their end, which is a good one; torch's own warnings on the screen are not the program's."""
    outcomes = [started.end() for started in start_ranks(words, home, size, moments)]
    assert [outcome.status for outcome in outcomes] == [0] * size, outcomes
    return outcomes


def left_in(home: Path) -> dict[str, Any]:
    """All that was written; hidden files are the program's own (a lock, the launcher's name)."""
    return {name: content for name, content in written(home).items() if not Path(name).name.startswith(".")}


def record_of(home: Path) -> dict[str, Any]:
    return json.loads((run_folder(home) / "record.json").read_text(encoding="utf-8"))


def confusion_of(home: Path) -> str:
    return (run_folder(home) / "best_confusion.csv").read_text(encoding="utf-8")


def assert_alike(home: Path, like: Path) -> None:
    """Steps, epochs (and so global batches) and rates are equal; losses within TOLERANCE; every count, to the image."""
    found, expected = log_of(run_folder(home)), log_of(run_folder(like))
    assert [[line.get(name) for name in ("kind", "step", "epoch", "lr")] for line in found] == [
        [line.get(name) for name in ("kind", "step", "epoch", "lr")] for line in expected
    ]
    assert found[-1]["step"] == STEPS
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0, abs=TOLERANCE), one
        assert counts(one) == counts(other)
    results = record_of(home)["results"], record_of(like)["results"]
    for which in ("last", "best"):
        one, other = (result[which]["test"] for result in results)
        assert one["loss"] == pytest.approx(other["loss"], rel=0, abs=TOLERANCE)
        assert counts(one) == counts(other)
        assert one["total"] == IMAGES
    assert confusion_of(home) == confusion_of(like)


def counts(metrics: dict[str, Any]) -> list[int | None]:
    return [metrics.get(name) for name in ("total", "correct", "top5_correct")]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ALIKE)
def test_the_batch_shared_by_processes(name: str, size: int) -> None:
    home, _ = trained(name, size)
    assert record_of(home)["processes"] == size
    assert_alike(home, trained(name, 1)[0])


@pytest.mark.parametrize("size", [2, 3])
def test_batch_norm_sees_the_share_of_a_process(size: int, tmp_path: Path) -> None:
    """On a CPU (docs/fidelity.md RUN-3), as with --accumulate: both normalise the same shares, and so train the same
    weights. The running statistics differ: those of the first process, and those of all micro-batches.

    Two gradients have one sum. Of three it depends on the order, and AdamW makes a whole step of a gradient that is
    nothing but rounding: the losses of three are compared as long as it has not carried that on.
    """
    equal = STEPS if size == 2 else 3
    home, _ = trained("densenet", size)
    cut = new_home(tmp_path / "home", "densenet")
    run(command("densenet", 1, "--accumulate", str(size)), cut).done()
    lines, same, whole = (log_of(run_folder(place)) for place in (home, cut, trained("densenet", 1)[0]))
    differences = []
    for one, other, alone in zip(lines, same, whole, strict=True):
        assert (one["step"], one["epoch"], one.get("lr")) == (other["step"], other["epoch"], other.get("lr"))
        assert (one["step"], one["epoch"], one.get("lr")) == (alone["step"], alone["epoch"], alone.get("lr"))
        if one["kind"] == "train" and one["step"] <= equal:
            assert one["loss"] == pytest.approx(other["loss"], rel=0, abs=TOLERANCE)
            differences.append(abs(one["loss"] - alone["loss"]))
        if one["kind"] == "val":
            assert one["total"] == IMAGES
    assert max(differences) > 100 * TOLERANCE  # else nothing was shared
    assert record_of(home)["results"]["best"]["test"]["total"] == IMAGES


@pytest.mark.parametrize("trainers", [1, 2])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "densenet" else pytest.mark.slow) for name in PROGRAMS],
)
def test_a_checkpoint_has_the_same_counts_on_any_number(name: str, trainers: int, tmp_path: Path) -> None:
    """Those of the record, for which all processes evaluated one model: the first one's running statistics."""
    home, _ = trained(name, trainers)
    best, table = record_of(home)["results"]["best"], confusion_of(home)
    for size in (2, 3) if trainers == 1 else (1,):
        place = new_home(tmp_path / str(size), name)
        together(command(name, size, "--eval", run_folder(home) / "best.safetensors"), place, size)
        found = record_of(place)["results"]["checkpoint"]
        assert found.keys() >= ({"val", "test"} if name in ("gft", "densenet") else {"test"})
        for split in found.keys() & {"val", "test"}:  # val: as it was in training
            assert counts(found[split]) == counts(best[split])
            assert found[split]["loss"] == pytest.approx(best[split]["loss"], rel=0, abs=TOLERANCE)
        (tables,) = run_folder(place).glob("*_confusion.csv")
        assert tables.read_text(encoding="utf-8") == table


@pytest.mark.parametrize("name", ["ffvt", "glsim"])
def test_accumulated_batches_train_as_one(name: str, tmp_path: Path) -> None:
    """FFVT cuts its batch into parts; GLSim's iterations enlarge it, and are made half as large here."""
    home, (batch, accumulate, _) = new_home(tmp_path / "home", name), FLAGS[name]
    half = (batch, str(BATCH // 2)) if name == "glsim" else ()
    run(command(name, 1, accumulate, "2", *half), home).done()
    assert_alike(home, trained(name, 1)[0])


@pytest.mark.parametrize("name", ["gft", "densenet"])
def test_accumulation_that_alters_is_recorded(name: str, tmp_path: Path) -> None:
    """BatchNorm and GFT's moving average see how a batch is cut: such a run never counts."""
    home = new_home(tmp_path / "home", name)
    model = STEADY[name][2:] or ("--model-kwargs", "growth_rate=4", "block_config=(1,1,1,1)")
    words = [PROGRAMS[name].file, "--output", "runs", "--data-root", "runs/demo-data", "--weights", "none"]
    words += ["--img-size", "32", "--limit", "8", "--epochs", "1", "--batch-size", "4", "--workers", "0", *model]
    for number, more in enumerate(([], ["--accumulate", "2"])):
        run([*words, "--output", f"runs/{number}", "--no-download", *more], home).done()
        (record,) = home.glob(f"runs/{number}/*/*/record.json")
        reasons = json.loads(record.read_text(encoding="utf-8"))["excluded"]
        assert any("accumulate" in reason for reason in reasons) == bool(more), reasons


# Launchers


def test_torchrun(tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", "gft")
    assert launch(TORCHRUN, command("gft", 2), home).status == 0
    assert_same(left_in(home), left_in(trained("gft", 2)[0]))


def test_torch_distributed_launch(tmp_path: Path) -> None:
    """As FFVT's README has it; it passes --local-rank to the program."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = new_home(tmp_path / "home", "ffvt")
    launcher = ("-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", str(port))
    assert launch(launcher, command("ffvt", 2), home).status == 0
    assert_same(left_in(home), left_in(trained("ffvt", 2)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_missing_is_said_once(name: str, tmp_path: Path) -> None:
    file, data = PROGRAMS[name].file, FLAGS.get(name, SCRIPT)[2]
    (home := tmp_path / "home").mkdir()
    words = {"ffvt": ("--name=k", "--dataset", "CUB", "--pretrained_dir", "none"), "glsim": ()}
    outcome = launch(TORCHRUN, [file, *words.get(name, ("--weights", "none")), data, "nowhere", "--no-download"], home)
    assert outcome.status == 1, outcome
    (sentence,) = [line for line in outcome.err.splitlines() if f"{file}: error:" in line]
    assert "nowhere" in sentence
    for folder in ("common", "ffvt", "glsim", "gft_food101.py", "densenet169_food101.py"):
        assert f'File "{ROOT / folder}' not in outcome.err  # no traceback of ours, torchrun's own is its


# Lost, and gone on with


def at(name: str, phase: str, step: float, act: str, rank: int = 1) -> Moment:
    """The moment of that rank in the middle of the step, of STEPS, on two processes."""
    moments = trained(name, 2)[1][rank].moments
    assert moments is not None
    return Moment(phase, int(moments["counts"][phase] * (step - 0.5) / STEPS), act)


KILLS = [("gft", 9, 1), *((name, step, rank) for name in PROGRAMS for step, rank in ((4, 0), (9, 1), (12, 0)))]


@pytest.mark.parametrize(
    ("name", "step", "rank"), [KILLS[0], *(pytest.param(*kill, marks=pytest.mark.slow) for kill in KILLS[1:])]
)
def test_a_process_killed_and_the_run_resumed(name: str, step: int, rank: int, tmp_path: Path) -> None:
    """Bit for bit, with the moving average that each process of GFT has to itself. The others end, not by a signal."""
    home = new_home(tmp_path / "home", name)
    killed = {rank: at(name, "backward", step, "SIGKILL", rank)}
    outcomes = [started.end() for started in start_ranks(command(name, 2), home, 2, killed)]
    assert outcomes[rank].status == -9
    assert outcomes[1 - rank].status == 1
    assert not (run_folder(home) / "record.json").exists()
    together(command(name, 2, "--resume", run_folder(home)), home, 2)
    assert_same(left_in(home), left_in(trained(name, 2)[0]))


@pytest.mark.parametrize("name", ["gft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ffvt", "glsim"))])
def test_processes_asked_to_stop(name: str, tmp_path: Path) -> None:
    """All save and end, with the command that goes on."""
    home = new_home(tmp_path / "home", name)
    moments = {rank: at(name, "backward", 9, "SIGTERM", rank) for rank in range(2)}
    outcomes = together(command(name, 2), home, 2, moments)
    assert not (run_folder(home) / "record.json").exists()
    together([*outcomes[0].resume, *PROGRAMS[name].often], home, 2)
    assert_same(left_in(home), left_in(trained(name, 2)[0]))


@pytest.mark.parametrize("name", ALIKE)
def test_resumed_on_another_number_of_processes(name: str, tmp_path: Path) -> None:
    """Refused where it would be another training: another moving average (GFT), another batch (the others)."""
    source = run_folder(trained(name, 2)[0])
    home = new_home(tmp_path / "home", name)
    folder = home / "runs" / source.parent.name / source.name
    shutil.copytree(source, folder)
    (folder / "record.json").unlink()
    before = (folder / "last.pt").read_bytes()
    run(command(name, 2, "--resume", folder), home).sentence("last.pt")
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_resumed_on_other_numbers_where_that_is_the_same_training(tmp_path: Path) -> None:
    """GFT as released has no moving average for each process: on two, then on three, then on one."""
    alone, home = new_home(tmp_path / "alone", "gft"), new_home(tmp_path / "home", "gft")
    run(command("gft", 1, "--released"), alone).done()
    again: tuple[str | Path, ...] = ()
    for size, step in ((2, 5), (3, 4)):  # of those that follow
        ends = dict.fromkeys(range(size), at("gft", "forward", step, "SIGTERM"))
        together(command("gft", size, "--released", *again), home, size, ends)
        assert not (run_folder(home) / "record.json").exists()
        again = ("--resume", run_folder(home))
    run(command("gft", 1, "--released", *again), home).done()
    assert_alike(home, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_torchrun_starts_a_lost_process_again(name: str, tmp_path: Path) -> None:
    """It recovers and ends bit-identical; see AGAIN for what the command has to say."""
    home, moment = new_home(tmp_path / "home", name), at(name, "backward", 9, "SIGKILL")
    said = {"CONTRACT_MOMENT": f"1 {moment.phase} {moment.number} {moment.act}"}
    launcher = [*TORCHRUN[:3], "--max-restarts", "2", *TORCHRUN[3:]]
    outcome = launch(launcher, command(name, 2, *AGAIN), home, said)
    assert outcome.status == 0, outcome
    assert_same(left_in(home), left_in(trained(name, 2)[0]))
