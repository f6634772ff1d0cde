"""Numbers that are none, classes that do not fit: nothing of it may reach weights or figures unsaid."""

import json
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn import metrics as sklearn_metrics
from torch import Tensor, nn
from torch.optim import SGD

from common import dist
from common.amp import Precision
from common.data.images import Images
from common.data.loader import Key, Plan, _Seeded, shuffled
from common.engine import Loading, Trainer, evaluate
from common.errors import UserError
from common.metrics import confusion, summarize
from faults.cases import COMMON, ENTRIES, FFVT, GFT, GLSIM, Case
from faults.inside import (
    DATA,
    assert_equal,
    changed,
    demo_data,
    done,
    home,
    log,
    record,
    run,
    sentence,
    state,
    stopped_after,
    trained,
)

SECTION = "Numbers"
PROGRAMS = ENTRIES[:3]
CPU = torch.device("cpu")
NONE = (math.nan, math.inf, -math.inf)
TOO_FAST = {
    GFT: ("--epochs", "4", "--lr", "1e30"),
    FFVT: ("--num_steps", "20", "--learning_rate", "1e38", "--warmup_steps", "0", "--max_grad_norm", "1e9"),
    GLSIM: ("--epochs", "4", "--lr", "1e30", "--warmup_steps", "0"),
}
BATCH = 16  # of all three demos


# Runs of the programs


def _finite(folder: Path) -> bool:
    return all(value.isfinite().all() for value in state(folder)["model"].values())


def _overflow(entry: str, folder: Path) -> int:
    place = home(folder / "run")
    said = sentence(run(entry, place, *TOO_FAST[entry]))
    assert "updates in a row were skipped" in said or "output is not finite for" in said, said
    (stopped,) = place.glob("runs/*/*/last.pt")
    assert _finite(stopped.parent)
    assert not (stopped.parent / "record.json").exists()
    return 1


@contextmanager
def _spoiled(where: str, calls: range, value: float) -> Iterator[None]:
    """In these updates the loss, the logits or a gradient of the objective is `value`."""
    objective = Trainer.__dict__["_update"]
    seen = {"updates": 0}

    def update(self: Trainer, step: int, batches: Any) -> None:
        plain = self.objective

        def spoil(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            loss, logits = plain(model, images, labels)
            if where == "loss":
                loss = loss * value
            elif where == "logits":
                logits = logits * value
                loss = loss + logits.sum() * 0
            else:
                next(p for p in model.parameters() if p.requires_grad).register_post_accumulate_grad_hook(set_grad)
            return loss, logits

        def set_grad(parameter: Tensor) -> None:
            if seen["updates"] in calls and parameter.grad is not None:
                parameter.grad.view(-1)[0] = value

        self.objective = spoil if seen["updates"] in calls else plain
        try:
            objective(self, step, batches)
        finally:
            self.objective = plain
            seen["updates"] += 1

    with mock.patch.object(Trainer, "_update", update):
        yield


def _spoiled_update(entry: str, folder: Path, where: str) -> int:
    """One spoiled update is left out, and the run goes on; ten in a row end it."""
    for number, value in enumerate(NONE):
        with _spoiled(where, range(2, 3), value):
            ended = done(run(entry, home(folder / f"one {number}")))
        assert record(ended)["skipped_updates"] == 1
        assert [line["skipped"] for line in log(ended) if line["kind"] == "train"][1:4] == [0, 1, 1]
        assert _finite(ended)
    longer = {GFT: ("--epochs", "4"), FFVT: ("--num_steps", "16"), GLSIM: ("--epochs", "4")}[entry]
    with _spoiled(where, range(2, 100), math.nan):
        said = sentence(run(entry, home(folder / "all"), *longer))
    assert "10 updates in a row were skipped because loss or gradients were not finite (step 12)" in said
    return len(NONE) + 1


def _spoil_file(file: Path, value: float) -> str:
    """Puts `value` into a parameter of the file; returns its name."""
    content = load_file(file)
    name = max(content, key=lambda key: content[key].numel())
    content[name].view(-1)[7] = value
    save_file(content, file)
    return name


def _spoiled_checkpoint(entry: str, folder: Path) -> int:
    place = home(folder / "run")
    picture = next((demo_data() / DATA[entry] / "images").rglob("*.jpg"))
    trials = 0
    for number, value in enumerate(NONE):
        copy = folder / f"trained {number}"
        shutil.copytree(trained(entry), copy)
        name = _spoil_file(copy / "best.safetensors", value)
        bare = folder / f"bare {number}.safetensors"
        shutil.copy(copy / "best.safetensors", bare)
        uses: list[tuple[str | Path, ...]] = [
            ("--eval", copy),
            ("--eval", bare),
            ("--checkpoint", copy, "--predict", picture),
            ("--checkpoint", bare, "--predict", picture),
        ]
        if entry == GFT:
            uses += [("--weights", bare)]
        if entry == GLSIM:
            uses += [("--transfer_learning", "--ckpt_path", bare)]
        for words in uses:
            said = sentence(run(entry, place, *words))
            assert f"numbers of {name} are NaN or infinite" in said, said
            trials += 1
    return trials


def _unreadable_batch(entry: str, folder: Path) -> int:
    """No image of the second batch of the first epoch can be read; every step is reported by itself."""
    read = _Seeded.__getitem__

    def reading(self: _Seeded, key: Key) -> Any:
        if key.epoch == 0 and BATCH <= key.position < 2 * BATCH:
            return None, f"{key.sample}.jpg: not readable", key.sample
        return read(self, key)

    with mock.patch.object(_Seeded, "__getitem__", reading):
        ended = done(run(entry, home(folder / "run"), "--skip-bad-images", str(BATCH)))
    lines = {line["step"]: line for line in log(ended) if line["kind"] == "train"}
    assert (lines[2]["loss"], lines[2]["accuracy"]) == (None, None)
    assert all(line["loss"] > 0 for step, line in lines.items() if step != 2)
    assert len(record(ended)["skipped_images"]) == BATCH
    return 1


def _test_files(entry: str, data: Path) -> list[Path]:
    if entry == GFT:
        listed = json.loads((data / "meta" / "test.json").read_text())
        return [data / "images" / f"{id_}.jpg" for ids in listed.values() for id_ in ids]
    part = dict(line.split() for line in (data / "train_test_split.txt").read_text().splitlines())
    paths = dict(line.split() for line in (data / "images.txt").read_text().splitlines())
    return [data / "images" / paths[id_] for id_ in part if part[id_] == "0"]


def _nothing_to_count(entry: str, folder: Path) -> int:
    place = home(folder / "run", own_data=True)
    data = place / "runs" / "demo-data" / DATA[entry]
    for file in _test_files(entry, data):
        file.write_bytes(b"")
    changed(data)
    for words in ((), ("--eval", trained(entry), *_here(entry, place))):
        said = sentence(run(entry, place, "--skip-bad-images", "100000", *words))
        assert "has no readable sample to evaluate" in said, said
    return 2


def _here(entry: str, place: Path) -> tuple[str | Path, ...]:
    """A run is evaluated on the data that it was trained on, unless others are named."""
    flag = {GFT: "--data-root", FFVT: "--data_root"}.get(entry)
    return (flag, place / "runs" / "demo-data") if flag else ()


# Classes


def _drop_class(entry: str, data: Path) -> None:
    """The data without the class of seven, nowhere named."""
    if entry == GFT:
        for part in ("train", "test"):
            file = data / "meta" / f"{part}.json"
            listed = json.loads(file.read_text())
            del listed["seven"]
            file.write_text(json.dumps(listed))
        for name in ("classes.txt", "labels.txt", "train.txt", "test.txt"):
            file = data / "meta" / name
            lines = [line for line in file.read_text().splitlines() if not line.lower().startswith("seven")]
            file.write_text("\n".join(lines) + "\n")
    else:
        labels = dict(line.split() for line in (data / "image_class_labels.txt").read_text().splitlines())
        gone = {image for image, label in labels.items() if label == "10"}  # the last: class ids have no gaps
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt"):
            lines = [line for line in (data / name).read_text().splitlines() if line.split()[0] not in gone]
            (data / name).write_text("\n".join(lines) + "\n")
        names = (data / "classes.txt").read_text().splitlines()
        (data / "classes.txt").write_text("\n".join(line for line in names if line.split()[0] != "10") + "\n")
        _forget_lists(data)
    changed(data)


def _exchange_classes(entry: str, data: Path) -> None:
    """As many classes, one of them of another name or in another place."""
    if entry == GFT:
        (data / "images" / "seven").rename(data / "images" / "sept")
        for file in (data / "meta").iterdir():
            file.write_text(file.read_text().replace("seven", "sept").replace("Seven", "Sept"))
    else:
        file = data / "classes.txt"
        one, two, *rest = (line.split() for line in file.read_text().splitlines())
        one[1], two[1] = two[1], one[1]
        file.write_text("".join(f"{' '.join(words)}\n" for words in (one, two, *rest)))
        _forget_lists(data)
    changed(data)


def _forget_lists(data: Path) -> None:
    """GLSim's program writes its lists anew, from the changed data."""
    for file in data.glob("*.csv"):
        file.unlink()


def _bare(entry: str, folder: Path) -> Path:
    """The weights of the trained run, without the run."""
    bare = folder / "bare.safetensors"
    shutil.copy(trained(entry) / "best.safetensors", bare)
    return bare


def _other_class_count(entry: str, folder: Path) -> int:
    place = home(folder / "run", own_data=True)
    data = place / "runs" / "demo-data" / DATA[entry]
    with stopped_after(3):
        started = run(entry, place)
    assert started.status == 0, started.err
    picture = next((data / "images").rglob("*.jpg"))
    _drop_class(entry, data)
    bare = _bare(entry, folder)
    uses: dict[tuple[str | Path, ...], tuple[str, str]] = {
        ("--eval", trained(entry), *_here(entry, place)): ("10 classes", " 9"),
        ("--eval", bare): ("10 classes", " 9"),
        ("--checkpoint", bare, "--predict", picture): ("10 classes", " 9"),
        ("--resume", started.folder): ("of 10 classes then", "of 9 classes now"),
    }
    for words, numbers in uses.items():
        said = sentence(run(entry, place, *words))
        assert all(number in said for number in numbers), said
    if entry == FFVT:  # its demo starts from no file
        return len(uses)
    # Starting weights of another class count are what fine-tuning is made of: the classifier alone is new.
    words = ("--weights", bare) if entry == GFT else ("--transfer_learning", "--ckpt_path", bare)
    left = record(done(run(entry, place, *words)))["weights"]["left"]
    heads = {GFT: "classifier.", GLSIM: "head."}
    assert left, left
    assert all(name.startswith(heads[entry]) for name in left), left
    return len(uses) + 1


def _other_classes(entry: str, folder: Path) -> int:
    place = home(folder / "run", own_data=True)
    _exchange_classes(entry, place / "runs" / "demo-data" / DATA[entry])
    said = sentence(run(entry, place, "--eval", trained(entry), *_here(entry, place)))
    assert "was trained for 10 classes" in said, said
    assert "use the data set and class list it was trained with" in said, said
    return 1


def _label_out_of_range(entry: str, folder: Path) -> int:
    """A label that no class has stands in the middle of the list of labels."""
    place = home(folder / "run", own_data=True)
    data = place / "runs" / "demo-data" / DATA[entry]
    if entry == GFT:  # the label is the name of the class
        file = data / "meta" / "train.json"
        listed = json.loads(file.read_text())
        listed["two"][5] = "eleven/1"
        file.write_text(json.dumps(listed))
        told = "'eleven/1'"
    elif entry == FFVT:
        file = data / "image_class_labels.txt"
        lines = file.read_text().splitlines()
        lines[40] = f"{lines[40].split()[0]} 11"
        file.write_text("\n".join(lines) + "\n")
        told = "line 41"
    else:
        file = data / "test.csv"
        lines = file.read_text().splitlines()
        lines[40] = f"10,{lines[40].split(',')[1]}"
        file.write_text("\n".join(lines) + "\n")
        told = "line 41"
    changed(data)
    said = sentence(run(entry, place))
    assert str(file.relative_to(place)) in said, said
    assert told in said, said
    assert not list(place.glob("runs/*/*/last.pt"))
    return 1


# The engine


def _numbered(count: int, classes: int, labels: list[int]) -> Images:
    """Images that are nothing but their number."""
    paths = [f"/{number}" for number in range(count)]

    def number(path: Path) -> Any:
        return torch.tensor(float(path.name))

    return Images("numbers", "test", paths, paths, labels, [str(n) for n in range(classes)], decode=number)


class _Known(nn.Module):
    """Gives the logits (N, C) that it was made with, by the numbers of the images."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, numbers: Tensor) -> Tensor:
        return self.logits[numbers.long()]


def _not_finite_in_evaluation(folder: Path) -> int:
    """Whatever is not finite in however few logits: it is told how many images, and which is the first."""
    draw = np.random.default_rng(0)
    for trial in range(60):
        count, classes = int(draw.integers(1, 40)), int(draw.integers(2, 12))
        labels = draw.integers(0, classes, count).tolist()
        logits = torch.from_numpy(draw.normal(size=(count, classes)))
        spoiled = sorted(draw.choice(count, int(draw.integers(1, count + 1)), replace=False).tolist())
        for row in spoiled:
            logits[row, int(draw.integers(0, classes))] = NONE[trial % 3]
        images, loading = _numbered(count, classes, labels), Loading(eval_batch_size=7)
        with pytest.raises(UserError) as told:
            evaluate(_Known(logits), images, CPU, Precision("fp32", CPU), loading)
        assert f"not finite for {len(spoiled)} of {count} images, the first of them /{spoiled[0]}:" in str(told.value)
    return 60


def _as_scikit_learn_counts(folder: Path) -> int:
    """Logits with many ties, classes that are never predicted, classes without a sample."""
    draw = np.random.default_rng(1)
    trials = 300
    for _ in range(trials):
        count, classes = int(draw.integers(1, 60)), int(draw.integers(2, 14))
        known = draw.choice(classes, int(draw.integers(1, classes + 1)), replace=False)
        labels = draw.choice(known, count)
        logits = torch.from_numpy(draw.integers(-3, 4, (count, classes)) / 2).float()
        logits[:, draw.choice(classes, int(draw.integers(0, classes)), replace=False)] -= 9.0  # never predicted
        images = _numbered(count, classes, labels.tolist())
        predictions = evaluate(_Known(logits), images, CPU, Precision("fp32", CPU), Loading(eval_batch_size=9))
        figures = summarize(predictions, classes, "test")
        guess, every = logits.argmax(-1).numpy(), list(range(classes))
        assert np.array_equal(predictions.ranked[:, 0], guess)
        assert figures["correct"] == sklearn_metrics.accuracy_score(labels, guess, normalize=False)
        assert np.array_equal(
            confusion(predictions, classes), sklearn_metrics.confusion_matrix(labels, guess, labels=every)
        )
        for average in ("weighted", "macro"):
            for name in ("precision", "recall", "f1"):
                score = getattr(sklearn_metrics, f"{name}_score")
                expected = score(labels, guess, labels=every, average=average, zero_division=0)
                assert figures[f"{name}_{average}"] == expected
        if classes > 5:
            # scikit-learn breaks ties for the higher class: asked in reverse order, for the lower.
            mirrored, reversed_logits = classes - 1 - labels, logits.flip(-1).numpy()
            expected = sklearn_metrics.top_k_accuracy_score(
                mirrored, reversed_logits, k=5, labels=every, normalize=False
            )
            assert figures["top5_correct"] == expected
        loss = sklearn_metrics.log_loss(labels, logits.double().softmax(-1).numpy(), labels=every)
        assert math.isclose(figures["loss"], loss, rel_tol=1e-5, abs_tol=1e-5)
    return trials


# Several processes


COMBINATIONS = [
    (kind, where, accumulate)
    for kind, places in (("fp32", ("loss", "images")), ("bf16", ("loss", "images")), ("fp16", ("loss", "overflow")))
    for where in places
    for accumulate in (1, 2)
]
SPOILED = (2, 5)  # steps


def _one_process_is_not_finite(folder: Path, size: int) -> int:
    """It is the last process, but for the images, whose statistics the first one hands to all."""
    parts = _together(_train_spoiled, size, folder)
    for combination in COMBINATIONS:
        one, *others = (part[combination] for part in parts)
        for other in others:
            assert_equal(other["weights"], one["weights"], str(combination))
            assert_equal(other["counters"], one["counters"], str(combination))
        assert one["counters"]["skipped"] == len(SPOILED), (combination, one["counters"])
        for step in range(1, 8):
            same = torch.equal(one["weights"][step], one["weights"][step - 1])
            assert same == (step in SPOILED), (combination, step)
        assert all(part[combination]["finite"] for part in parts), combination
        if combination[0] == "fp16":
            assert one["counters"]["precision"]["scale"] == 2.0**8
    return len(COMBINATIONS)


def _train_spoiled(rank: int, size: int) -> dict[Any, Any]:
    return {combination: _spoiled_training(rank, size, *combination) for combination in COMBINATIONS}


def _spoiled_training(rank: int, size: int, kind: str, where: str, accumulate: int) -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    guilty = 0 if where == "images" else size - 1
    step = 0

    def objective(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        spoil = rank == guilty and step in SPOILED
        logits = network(images * math.inf if spoil and where == "images" else images)
        loss = F.cross_entropy(logits.float(), labels)
        if spoil and where != "images":
            loss = loss * (1e8 if where == "overflow" else math.inf)
        return loss, logits

    images = Images(
        "toy",
        "train",
        [str(n) for n in range(48)],
        [f"/{n}" for n in range(48)],
        [n % 10 for n in range(48)],
        [str(n) for n in range(10)],
        decode=_coloured,
    )
    trainer = Trainer(
        model=model,
        optimizer=SGD(model.parameters(), lr=0.1, momentum=0.9),
        scheduler=None,
        precision=Precision(kind, CPU, init_scale=2.0**10),
        images=images,
        plan=Plan(shuffled(48, 3), 48, 24, accumulate, rank, size),
        steps=8,
        device=CPU,
        loading=Loading(),
        objective=objective,
    )
    weights = []
    for step in trainer.run():  # noqa: B007 - the objective reads it
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    trainer.report()
    counters = {"skipped": trainer.skipped, "bad": trainer.bad, "precision": trainer.precision.state_dict()}
    return {"weights": weights, "counters": counters, "finite": all(b.isfinite().all() for b in model.buffers())}


def _coloured(path: Path) -> Any:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(int(path.name)))


def _every_process_says_the_same(folder: Path, size: int) -> int:
    said = _together(_evaluate_spoiled, size, folder)
    assert said == [_evaluate_spoiled(0, 1)] * size
    return len(said[0])


def _evaluate_spoiled(rank: int, size: int) -> list[str]:
    """What each of several evaluations says, of which one process or all see what is not finite."""
    said = []
    for spoiled in ([0], [22], [3, 4], list(range(23)), [5, 10, 11]):
        logits = torch.zeros(23, 4)
        logits[spoiled] = math.nan
        with pytest.raises(UserError, match="not finite") as told:
            evaluate(_Known(logits), _numbered(23, 4, [1] * 23), CPU, Precision("fp32", CPU), Loading())
        said.append(str(told.value))
    return said


def _together(work: Callable[[int, int], Any], size: int, folder: Path) -> list[Any]:
    """What `work(rank, size)` gives in each of so many processes that form a group."""
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_member, args=(work, rank, size, folder)) for rank in range(size)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=240)
        process.kill()
    assert [process.exitcode for process in running] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _member(work: Callable[[int, int], Any], rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(work(rank, size), folder / f"{rank}.pt")
    dist.stop()


def cases() -> list[Case]:
    found: list[Case] = []

    def row(fault: str, promise: str, check: Callable[..., int], quick: tuple[str, ...] = (), **more: Any) -> None:
        for entry in PROGRAMS:
            found.append(Case(SECTION, fault, entry, promise, "", partial(check, entry, **more), entry in quick))

    def common(
        fault: str, promise: str, check: Callable[..., int], name: str = "", quick: bool = True, **more: Any
    ) -> None:
        found.append(Case(SECTION, fault, COMMON, promise, name, partial(check, **more), quick))

    row("a learning rate with which everything overflows", "a sentence, no record, finite weights", _overflow, (FFVT,))
    for where in ("loss", "logits", "gradients"):
        promise = "the update is left out and counted, ten in a row end in a sentence"
        row(f"NaN or infinite {where} in training", promise, _spoiled_update, where=where)
    row("NaN or infinite numbers in a checkpoint", "a sentence that names file and tensor", _spoiled_checkpoint)
    row("a batch without a readable image", "a loss of null, and the run goes on", _unreadable_batch, (GLSIM,))
    row("no readable image to evaluate", "a sentence", _nothing_to_count)
    row("data of fewer classes than the checkpoint's", "a sentence with both numbers", _other_class_count)
    row("data whose classes have other names or another order", "a sentence", _other_classes, (GFT,))
    row(
        "a label that no class has", "a sentence with file and line before the first step", _label_out_of_range, (FFVT,)
    )
    common("NaN or infinite logits in evaluation", "a sentence with number and first image", _not_finite_in_evaluation)
    common(
        "random logits with ties, classes never predicted or without sample", "as scikit-learn", _as_scikit_learn_counts
    )
    for size in (2, 3):
        common(
            "loss, images or fp16 gradients of one process overflow",
            "all leave the update out: equal weights, counters, loss scale",
            _one_process_is_not_finite,
            f"{size} processes",
            quick=size == 2,
            size=size,
        )
        common(
            "NaN logits on some of several processes",
            "all say the same sentence",
            _every_process_says_the_same,
            f"{size} processes",
            quick=False,
            size=size,
        )
    return found
