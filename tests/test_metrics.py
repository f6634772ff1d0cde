"""common.train.metrics against scikit-learn; and what is written."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics as sklearn_metrics

from common.train.metrics import Predictions, confusion, summarize, write_tables


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Predictions, int]:
    """Of up to 25 samples of 2 to 12 classes, which may have no sample or never be predicted."""
    classes = draw(st.integers(2, 12))
    pairs = st.tuples(st.integers(0, classes - 1), st.permutations(range(classes)), st.floats(0, 1e6))
    label, ranked, loss = zip(*draw(st.lists(pairs, min_size=1, max_size=25)), strict=True)
    best = np.array([ranking[:5] for ranking in ranked])
    return Predictions(np.arange(len(label)), np.array(label), best, np.array(loss)), classes


@given(found=predictions())
def test_figures_are_those_of_scikit_learn(found: tuple[Predictions, int]) -> None:
    (predicted, classes), label, first = found, found[0].label, found[0].ranked[:, 0]
    figures, every = summarize(predicted, classes, "val"), list(range(classes))
    assert (figures["split"], figures["total"], figures["correct"]) == ("val", len(label), (label == first).sum())
    assert figures["top1"] == pytest.approx(sklearn_metrics.accuracy_score(label, first))
    assert figures["loss"] == pytest.approx(sum(predicted.loss) / len(label))
    for average in ("weighted", "macro"):
        for name in ("precision", "recall", "f1"):
            score: Any = getattr(sklearn_metrics, f"{name}_score")
            expected = score(label, first, labels=every, average=average, zero_division=0)
            assert figures[f"{name}_{average}"] == pytest.approx(expected), (name, average)
    top5 = sum(number in ranking for number, ranking in zip(label, predicted.ranked, strict=True))
    wide = classes > 5
    assert (figures["top5_correct"], figures["top5"]) == (
        (top5, pytest.approx(top5 / len(label))) if wide else (None,) * 2
    )
    each = sklearn_metrics.recall_score(label, first, labels=np.unique(label), average=None, zero_division=0)
    assert figures["class_mean"] == pytest.approx(np.mean(each))
    assert figures["class_std"] == (pytest.approx(np.std(each, ddof=1)) if len(each) > 1 else None)
    assert np.array_equal(confusion(predicted, classes), sklearn_metrics.confusion_matrix(label, first, labels=every))


def test_every_sample_is_counted_once() -> None:
    whole = Predictions(np.arange(5), np.arange(5) % 2, np.zeros((5, 2), int), np.linspace(0, 1, 5))
    parts = [Predictions(*(column[rank::2] for column in vars(whole).values())) for rank in (1, 0)]
    merged = Predictions.merge(parts, 5)
    for name, column in vars(whole).items():
        assert np.array_equal(getattr(merged, name), column), name
    for wrong, expected in ((parts[:1], 5), ([*parts, parts[0]], 5), (parts, 6)):
        with pytest.raises(AssertionError, match="samples counted"):
            Predictions.merge(wrong, expected)


def test_tables(tmp_path: Path) -> None:
    label, first = np.array([0, 0, 1, 1, 1, 3]), np.array([0, 1, 1, 1, 0, 3])
    classes = ["a, b", 'quoted "c"', "crème $brûlée", "$x"]
    write_tables(tmp_path, "best", Predictions(np.arange(6), label, first[:, None], np.zeros(6)), classes)
    tables = [
        list(csv.reader((tmp_path / f"best_{name}.csv").open(encoding="utf-8"))) for name in ("per_class", "confusion")
    ]
    accuracies = [["1", "2", "0.500000"], ["2", "3", "0.666667"], ["0", "0", ""], ["1", "1", "1.000000"]]
    rows = [[str(number), name, *row] for number, (name, row) in enumerate(zip(classes, accuracies, strict=True))]
    assert tables[0] == [["class", "name", "correct", "total", "accuracy"], *rows]
    counts = ["1100", "1200", "0000", "0001"]
    assert tables[1] == [
        ["true \\ predicted", *classes],
        *([name, *row] for name, row in zip(classes, counts, strict=True)),
    ]
    assert Image.open(tmp_path / "best_confusion.png").format == "PNG"
