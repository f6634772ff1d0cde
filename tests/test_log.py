"""common.log: what stands in log.jsonl and in TensorBoard's files, read by others' readers, after runs were cut."""

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from common import log as log_module
from common.errors import UserError
from common.log import Listener, Log, bar, say, watched


def lines_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard itself reads it."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def filled(folder: Path, steps: range, from_step: int = 0, value: float = 1.0) -> None:
    folder.mkdir(exist_ok=True)
    log = Log(folder, from_step, False, {})
    for step in steps:
        log.write("train", step, loss=value, lr=0.5)
    log.close()


def test_a_line_says_kind_step_values_and_time(tmp_path: Path) -> None:
    before = time.time()
    log = Log(tmp_path, 0, False, {})
    log.write("train", 1, loss=0.25, correct=3, epoch=0.5)
    log.write("val", 1, top1=0.5, top5=None, split="test")
    log.close()
    first, second = lines_of(tmp_path)
    assert before - 1 < first.pop("time") < time.time() + 1
    second.pop("time")
    assert first == {"kind": "train", "step": 1, "loss": 0.25, "correct": 3, "epoch": 0.5}
    assert second == {"kind": "val", "step": 1, "top1": 0.5, "top5": None, "split": "test"}


def test_what_json_does_not_know_becomes_null(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, False, {})
    log.write("train", 1, loss=float("nan"), lr=float("inf"), rate=-float("inf"), accuracy=0.5)
    log.close()
    assert {
        key: value for key, value in lines_of(tmp_path)[0].items() if key in ("loss", "lr", "rate", "accuracy")
    } == {
        "loss": None,
        "lr": None,
        "rate": None,
        "accuracy": 0.5,
    }


def test_tensorboard_shows_every_number(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, False, {})
    for step in range(1, 6):
        log.write("train", step, loss=step / 4, correct=step, split="train", none=None)
    log.close()
    assert curve(tmp_path, "train/loss") == [(step, step / 4) for step in range(1, 6)]
    assert curve(tmp_path, "train/correct") == [(step, float(step)) for step in range(1, 6)]
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert sorted(reader.Tags()["scalars"]) == ["train/correct", "train/loss"]


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    starts = (0, 4, 9)
    for start in starts:
        filled(tmp_path / str(start), range(1, 10), value=1.0)
    time.sleep(1.1)  # TensorBoard orders files by the second in which they were begun
    for start in starts:
        filled(tmp_path / str(start), range(start + 1, 13), start, value=2.0)
        expected = [(step, 1.0 if step <= start else 2.0) for step in range(1, 13)]
        assert [(line["step"], line["loss"]) for line in lines_of(tmp_path / str(start))] == expected
        assert curve(tmp_path / str(start), "train/loss") == expected


@pytest.mark.parametrize(
    "end",
    [
        b'{"kind": "train", "step": 3, "lo',
        b'{"kind": "train", "step": 3}',  # whole, but for its line end: more of it may be missing
        b"\0\0\0\0\0\0\n\0\0",
        b"\xff\xfe\n",
        b"[1]\n3\nnull\n",
        b'{"kind": "train"}\n',
    ],
)
def test_what_a_kill_left_of_the_last_line_is_cut(tmp_path: Path, end: bytes) -> None:
    filled(tmp_path, range(1, 4))
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(end)
    filled(tmp_path, range(4, 6), from_step=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "tensorboard"]


def test_ten_thousand_lines_are_cut_and_read_quickly(tmp_path: Path) -> None:
    line = {"kind": "train", "epoch": 1.0, "loss": 0.1234567, "accuracy": 0.5, "lr": 1e-5, "time": 1.7e9}
    with open(tmp_path / "log.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line | {"step": step}) + "\n" for step in range(1, 10_001))
    start = time.process_time()
    filled(tmp_path, range(9_001, 9_101), from_step=9_000)
    lines = lines_of(tmp_path)
    assert time.process_time() - start < 5
    assert [line["step"] for line in lines] == list(range(1, 9_101))


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.dist.is_main", lambda: False)
    log = Log(tmp_path, 0, True, {})
    log.write("train", 1, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert bar(range(3), "x").disable
    say("nothing")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, False, {})
    log.path = Path("/dev/full")
    if not log.path.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match=r"/dev/full or tensorboard/ .* cannot be written \(No space left on device\)"):
        log.write("train", 1, loss=1.0)
    log.close()


def test_a_disk_that_is_full_when_tensorboard_writes_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does so in a thread of its own, which is not to speak for itself; a listener is closed all the same."""
    closed: list[bool] = []

    class Closed(Listener):
        def close(self) -> None:
            closed.append(True)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # an error leaves it changed
    log = Log(tmp_path, 0, False, {}, Closed)
    monkeypatch.setattr(RecordWriter, "write", fail)

    def train() -> None:
        try:
            log.write("train", 1, loss=1.0)  # its second event says so already where that thread was quick
        finally:
            log.close()

    with pytest.raises(UserError, match=r"tensorboard/ .* cannot be written \(No space left on device\)"):
        train()
    assert closed == [True]
    time.sleep(0.1)  # for the thread, had it anything to say
    assert capfd.readouterr().err == ""


def test_a_disk_that_is_full_for_a_listeners_curves_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def listener() -> Listener:
        board = SummaryWriter(str(tmp_path / "curves"))
        while True:  # until that thread has noticed
            board.add_scalar("loss", 1.0, 1)
            time.sleep(0.01)

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(RecordWriter, "write", fail)
    with pytest.raises(OSError, match="No space left on device"):
        Log(tmp_path, 0, False, {}, listener)
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_other_threads_speak_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    log = Log(tmp_path, 0, False, {})
    thread = threading.Thread(target=(tmp_path / "nowhere").read_text)
    thread.start()
    thread.join()
    log.close()
    assert [error.exc_type for error in heard] == [FileNotFoundError]


def test_what_was_flushed_is_there_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed after a save takes nothing with it, however slow the thread is that writes the curves."""
    write = RecordWriter.write

    def slow(writer: RecordWriter, data: bytes) -> None:
        time.sleep(0.1)
        write(writer, data)

    monkeypatch.setattr(RecordWriter, "write", slow)
    log = Log(tmp_path, 0, False, {})
    for step in (1, 2, 3):
        log.write("train", step, loss=0.5 * step)
    log.flush()
    assert curve(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    log.close()


def test_the_line_of_an_evaluation_that_is_done_again_is_cut(tmp_path: Path) -> None:
    """Stopped in the evaluation of step 2, resumed, and killed between its line and the next save."""
    log = Log(tmp_path, 0, False, {})
    for step in (1, 2):
        log.write("train", step, loss=1.0)
        log.write("val", step, top1=0.5)
    log.close()
    Log(tmp_path, 2, False, {}, evaluation_due=False).close()
    assert [(line["kind"], line["step"]) for line in lines_of(tmp_path)][2:] == [("train", 2), ("val", 2)]
    Log(tmp_path, 2, False, {}, evaluation_due=True).close()
    assert [(line["kind"], line["step"]) for line in lines_of(tmp_path)][1:] == [("val", 1), ("train", 2)]


# Weights & Biases


def test_without_wandb_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Log(tmp_path, 0, True, {})


PROGRAM = """
import sys
from pathlib import Path
from common.errors import UserError
from common.log import Log
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
try:
    log = Log(folder, 0, True, {"lr": 0.5})
except UserError as error:
    raise SystemExit(f"refused: {error}")
for step in range(1, 4):
    log.write("train", step, loss=1 / step, split="train")
log.close()
run = log.wandb
print(run.project, run.id, dict(run.config))
"""


def with_wandb(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    pytest.importorskip("wandb", reason="wandb is not installed (it is an extra)")
    root = str(Path(__file__).parent.parent)
    environment |= {"PYTHONPATH": root, "HOME": str(folder.parents[1]), "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)


def test_wandb_gets_the_same_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "some_script" / "20250101-000000-abcdef"
    ended = with_wandb(folder, WANDB_MODE="offline")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"some_script {folder.name} {{'lr': 0.5}}"
    (written,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()  # wandb's reader of it is private
    for part in (b"train/loss", b"0.3333333333333333"):
        assert part in content
    assert b"train/split" not in content
    assert [line["loss"] for line in lines_of(folder)] == [1.0, 1 / 2, 1 / 3]


def test_wandb_without_a_key_is_one_sentence(tmp_path: Path) -> None:
    ended = with_wandb(tmp_path / "some_script" / "run", WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("refused: --wandb: ")
    assert "wandb login" in ended.stderr


# The screen


def test_a_bar_passes_everything_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar(range(3), "title")) == [0, 1, 2]
    assert list(watched(iter("ab"), "title", 2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")  # no terminal: no bar


def test_a_bar_on_a_terminal_shows_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(log_module.sys, "stderr", terminal)
    progress = bar(None, "epoch 2/3", total=10, initial=4)
    progress.update()
    progress.refresh()
    progress.close()
    assert "epoch 2/3" in terminal.getvalue()
    assert "5/10" in terminal.getvalue()


def test_say_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert capsys.readouterr().out == "hello\n"
