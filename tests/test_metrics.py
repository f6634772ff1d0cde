"""common.metrics against scikit-learn and against loops that count one sample at a time."""

import csv
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics as sklearn_metrics

from common.errors import UserError
from common.metrics import Predictions, confusion, summarize, write_tables


def random_predictions(
    seed: int, samples: int, classes: int, labels: list[int] | None = None, guesses: list[int] | None = None
) -> Predictions:
    """Labels drawn from `labels`, rankings whose first guess comes from `guesses` (default: all classes)."""
    draw = np.random.default_rng(seed)
    label = draw.choice(labels or range(classes), samples)
    width = min(5, classes)
    ranked = np.stack([draw.permutation(classes)[:width] for _ in range(samples)])
    for row, first in zip(ranked, draw.choice(guesses or range(classes), samples), strict=True):
        row[row == first] = row[0]
        row[0] = first
    return Predictions(np.arange(samples), label, ranked, draw.random(samples) * 3)


def counted(predictions: Predictions, classes: int) -> dict[str, Any]:
    """The figures of `summarize`, by definition and one sample at a time."""
    pairs = list(zip(predictions.label.tolist(), predictions.ranked.tolist(), strict=True))
    total = len(pairs)
    scores = []
    for number in range(classes):
        hit = sum(label == number and ranked[0] == number for label, ranked in pairs)
        predicted = sum(ranked[0] == number for _, ranked in pairs)
        support = sum(label == number for label, _ in pairs)
        precision = hit / predicted if predicted else 0.0
        recall = hit / support if support else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        scores.append((support, precision, recall, f1))
    top5 = sum(label in ranked for label, ranked in pairs) if classes > 5 else None
    figures: dict[str, Any] = {
        "total": total,
        "correct": sum(label == ranked[0] for label, ranked in pairs),
        "top5_correct": top5,
        "top5": None if top5 is None else top5 / total,
        "loss": sum(predictions.loss.tolist()) / total,
    }
    figures["top1"] = figures["correct"] / total
    occurring = [score[2] for score in scores if score[0]]
    figures["class_mean"] = sum(occurring) / len(occurring)
    figures["class_std"] = statistics.stdev(occurring) if len(occurring) > 1 else None
    for place, name in enumerate(("precision", "recall", "f1"), 1):
        figures[f"{name}_weighted"] = sum(score[0] * score[place] for score in scores) / total
        figures[f"{name}_macro"] = sum(score[place] for score in scores) / classes
    return figures


CASES = [
    random_predictions(0, 200, 10),
    random_predictions(1, 60, 10, guesses=[0, 3, 4]),  # seven classes are never predicted
    random_predictions(2, 60, 10, labels=[1, 3, 9]),  # seven classes have no sample
    random_predictions(3, 60, 10, labels=[1], guesses=[2]),  # nothing is right
    random_predictions(10, 60, 10, labels=[1, 3], guesses=[1, 3, 4]),  # seven classes are in neither
    random_predictions(4, 1, 10),
    random_predictions(5, 40, 6),
]


@pytest.mark.parametrize("predictions", CASES)
def test_figures_are_those_of_slow_counting(predictions: Predictions) -> None:
    classes = 6 if len(predictions.label) == 40 else 10
    figures, slow = summarize(predictions, classes, "test"), counted(predictions, classes)
    assert figures.pop("split") == "test"
    assert figures.keys() == slow.keys()
    for name, value in slow.items():
        assert type(figures[name]) is type(value), name
        assert figures[name] == (value if isinstance(value, int | None) else pytest.approx(value, abs=1e-12)), name


@pytest.mark.parametrize("predictions", CASES[:5])
def test_figures_are_those_of_scikit_learn(predictions: Predictions) -> None:
    label, first = predictions.label, predictions.ranked[:, 0]
    figures = summarize(predictions, 10, "test")
    assert figures["top1"] == pytest.approx(sklearn_metrics.accuracy_score(label, first))
    every = list(range(10))
    for average in ("weighted", "macro"):
        for name in ("precision", "recall", "f1"):
            score = getattr(sklearn_metrics, f"{name}_score")
            expected = score(label, first, labels=every, average=average, zero_division=0)
            assert figures[f"{name}_{average}"] == pytest.approx(expected), (name, average)
    scores = np.zeros((len(label), 10))  # a score matrix whose order is the ranking, for scikit-learn's top-k
    np.put_along_axis(scores, predictions.ranked, np.arange(5, 0, -1)[None].repeat(len(label), 0), axis=1)
    assert figures["top5"] == pytest.approx(sklearn_metrics.top_k_accuracy_score(label, scores, k=5, labels=every))
    assert np.array_equal(confusion(predictions, 10), sklearn_metrics.confusion_matrix(label, first, labels=every))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_predictions_are_counted_as_scikit_learn_and_a_loop_count_them(data: st.DataObject) -> None:
    """Classes may be never predicted, without a sample, or both."""
    classes = data.draw(st.integers(2, 12))
    every = list(range(classes))
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(every), st.permutations(every)), min_size=1, max_size=25))
    label = np.array([label for label, _ in pairs])
    ranked = np.array([ranking[:5] for _, ranking in pairs])
    losses = data.draw(st.lists(st.floats(0, 1e6), min_size=len(pairs), max_size=len(pairs)))
    predictions = Predictions(np.arange(len(pairs)), label, ranked, np.array(losses))
    figures, slow = summarize(predictions, classes, "test"), counted(predictions, classes)
    assert figures == {"split": "test"} | {name: pytest.approx(value, abs=1e-9) for name, value in slow.items()}
    first = ranked[:, 0]
    for average in ("weighted", "macro"):
        for name in ("precision", "recall", "f1"):
            score = getattr(sklearn_metrics, f"{name}_score")
            expected = score(label, first, labels=every, average=average, zero_division=0)
            assert figures[f"{name}_{average}"] == pytest.approx(expected), (name, average)
    assert np.array_equal(confusion(predictions, classes), sklearn_metrics.confusion_matrix(label, first, labels=every))


def test_confusion_has_true_classes_in_its_rows() -> None:
    predictions = random_predictions(7, 100, 4, guesses=[0, 2])
    matrix = [[0] * 4 for _ in range(4)]
    for label, first in zip(predictions.label, predictions.ranked[:, 0], strict=True):
        matrix[label][first] += 1
    assert confusion(predictions, 4).tolist() == matrix


def test_top5_says_nothing_below_6_classes() -> None:
    for classes in (2, 5):
        figures = summarize(random_predictions(8, 30, classes), classes, "val")
        assert figures["top5"] is None
        assert figures["top5_correct"] is None


def test_nothing_to_count_is_one_sentence() -> None:
    with pytest.raises(UserError, match="'val' has no readable sample"):
        summarize(part_of(CASES[0], []), 10, "val")


# Shards


def part_of(predictions: Predictions, positions: Any) -> Predictions:
    chosen = np.asarray(positions, dtype=np.int64)
    return Predictions(
        predictions.index[chosen], predictions.label[chosen], predictions.ranked[chosen], predictions.loss[chosen]
    )


def assert_same(first: Predictions, second: Predictions) -> None:
    for name in ("index", "label", "ranked", "loss"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("seed", range(40))
def test_shards_of_any_size_are_put_together(seed: int) -> None:
    draw = np.random.default_rng(seed)
    samples, shards = int(draw.integers(1, 60)), int(draw.integers(1, 6))
    whole = random_predictions(seed, samples, 7)
    owner, order = draw.integers(0, shards, samples), draw.permutation(samples)
    parts = [part_of(whole, [position for position in order if owner[position] == shard]) for shard in range(shards)]
    assert_same(Predictions.merge(parts, samples, set()), whole)

    lost = set(draw.choice(samples, int(draw.integers(0, samples)), replace=False).tolist())
    kept = [part_of(part, np.flatnonzero([index not in lost for index in part.index])) for part in parts]
    assert_same(
        Predictions.merge(kept, samples, lost), part_of(whole, [index for index in range(samples) if index not in lost])
    )
    if lost:
        with pytest.raises(AssertionError, match=f"instead of {samples} once each"):
            Predictions.merge(kept, samples, set())
        with pytest.raises(AssertionError, match="evaluation counted"):
            Predictions.merge(parts, samples, lost)


@pytest.mark.parametrize("seed", range(10))
def test_a_sample_counted_twice_is_noticed(seed: int) -> None:
    draw = np.random.default_rng(seed)
    samples = int(draw.integers(2, 30))
    whole = random_predictions(seed, samples, 7)
    twice, left_out = draw.choice(samples, 2, replace=False)
    with pytest.raises(AssertionError, match=f"{samples + 1} samples, {samples} of them different"):
        Predictions.merge([whole, part_of(whole, [twice])], samples, set())
    rest = part_of(whole, [index for index in range(samples) if index != left_out])
    with pytest.raises(AssertionError, match=f"{samples} samples, {samples - 1} of them different"):
        Predictions.merge([rest, part_of(whole, [twice])], samples, set())
    with pytest.raises(AssertionError, match="evaluation counted"):
        Predictions.merge([whole], samples - 1, set())


# Tables


def read(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_tables_say_what_was_counted(tmp_path: Path) -> None:
    classes = ["plain", "a, b", 'quoted "c"', "crème $brûlée", "$never_{$", "x"]
    predictions = random_predictions(9, 80, 6, labels=[0, 1, 2, 3, 5])
    write_tables(tmp_path, "best", predictions, classes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best_confusion.csv",
        "best_confusion.png",
        "best_per_class.csv",
    ]
    heading, *rows = read(tmp_path / "best_per_class.csv")
    assert heading == ["class", "name", "correct", "total", "accuracy"]
    assert [row[:2] for row in rows] == [[str(number), name] for number, name in enumerate(classes)]
    for number, row in enumerate(rows):
        mine = predictions.label == number
        correct, total = int((predictions.ranked[mine, 0] == number).sum()), int(mine.sum())
        assert row[2:4] == [str(correct), str(total)]
        assert row[4] == "" if total == 0 else float(row[4]) == pytest.approx(correct / total, abs=1e-6)
    heading, *rows = read(tmp_path / "best_confusion.csv")
    assert heading == ["true \\ predicted", *classes]
    assert [row[0] for row in rows] == classes
    assert [[int(cell) for cell in row[1:]] for row in rows] == confusion(predictions, 6).tolist()


def test_the_picture_shows_the_matrix(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    label = draw.integers(0, 3, 50)
    perfect = Predictions(np.arange(50), label, np.stack([label, label], 1), np.zeros(50))
    wrong = Predictions(np.arange(50), label, np.stack([(label + 1) % 3, label], 1), np.zeros(50))
    for name, predictions in (("perfect", perfect), ("wrong", wrong)):
        write_tables(tmp_path, name, predictions, ["a", "b", "c"])
    pictures = [np.asarray(Image.open(tmp_path / f"{name}_confusion.png")) for name in ("perfect", "wrong")]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).mean() > 0.1


def test_thousands_of_classes_are_drawn_without_their_names(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(2000)]
    write_tables(tmp_path, "many", random_predictions(1, 300, 2000), names)
    assert len(read(tmp_path / "many_confusion.csv")) == 2001


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.files.os.fsync", full)
    with pytest.raises(UserError, match=r"best_per_class\.csv could not be written \(No space left on device\)"):
        write_tables(tmp_path, "best", CASES[0], [str(number) for number in range(10)])
    assert list(tmp_path.iterdir()) == []
