"""Predictions to figures: top-k, precision / recall / F1, per class, confusion matrix. scikit-learn does the counting.

N samples, C classes, k = min(5, C).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from common.files import write_atomically, write_csv

NAMES_THAT_FIT = 250  # class names of 5 points along the 20 inches of the confusion picture


@dataclass(frozen=True)
class Predictions:
    """What a model says of every sample of a split, in the split's own order, on one process or gathered from many."""

    index: NDArray[np.int64]  # (N,) position in the split
    label: NDArray[np.int64]  # (N,)
    ranked: NDArray[np.int64]  # (N, k) classes, best first
    loss: NDArray[np.float64]  # (N,) cross-entropy of the sample

    @staticmethod
    def merge(parts: "list[Predictions]", expected: int) -> "Predictions":
        """All processes' parts in sample order; each of 0 .. expected-1 must be there once."""
        columns = [np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Predictions)]
        order = np.argsort(columns[0], kind="stable")
        merged = Predictions(*(column[order] for column in columns))
        if not np.array_equal(merged.index, np.arange(expected)):
            different = len(np.unique(merged.index))
            raise AssertionError(
                f"{len(merged.index)} samples counted, {different} different, instead of {expected} once"
            )
        return merged


def summarize(predictions: Predictions, num_classes: int, split: str) -> dict[str, Any]:
    """Counts and figures of one split. top1, top5, precision, recall, F1 are fractions; loss is the mean per sample.

    Classes that are never predicted, or have no sample, count with precision, recall or F1 zero as in scikit-learn
    (`zero_division=0`); top5 is None below 6 classes, where it would say nothing. class_mean and class_std are mean and
    sample deviation of the accuracies of the classes that occur; a single one has no deviation.
    """
    total = len(predictions.index)
    hits = predictions.ranked == predictions.label[:, None]  # (N, k)
    correct, top5_correct = int(hits[:, 0].sum()), int(hits.any(1).sum())
    figures: dict[str, Any] = {"split": split, "total": total, "correct": correct, "top1": correct / total}
    wide = num_classes > 5
    figures |= {"top5_correct": top5_correct if wide else None, "top5": top5_correct / total if wide else None}
    figures["loss"] = float(predictions.loss.mean())
    each = [hits[predictions.label == label, 0].mean() for label in np.unique(predictions.label)]
    figures["class_mean"] = float(np.mean(each))
    figures["class_std"] = float(np.std(each, ddof=1)) if len(each) > 1 else None
    for average in ("weighted", "macro"):
        precision, recall, f1, _ = precision_recall_fscore_support(
            predictions.label,
            predictions.ranked[:, 0],
            labels=np.arange(num_classes),
            average=average,
            zero_division=0,
        )
        figures[f"precision_{average}"] = float(precision)
        figures[f"recall_{average}"] = float(recall)
        figures[f"f1_{average}"] = float(f1)
    return figures


def confusion(predictions: Predictions, num_classes: int) -> NDArray[np.int64]:
    """(C, C) counts, rows = true class, columns = predicted class."""
    matrix = confusion_matrix(predictions.label, predictions.ranked[:, 0], labels=np.arange(num_classes))
    return np.asarray(matrix, dtype=np.int64)


def write_tables(folder: Path, name: str, predictions: Predictions, classes: list[str]) -> None:
    """`{name}_per_class.csv`, `{name}_confusion.csv` and `{name}_confusion.png` in `folder`.

    A class without a sample has no accuracy. UserError where the disk fails.
    """
    matrix = confusion(predictions, len(classes))
    per_class: list[list[Any]] = [["class", "name", "correct", "total", "accuracy"]]
    for number, (title, row) in enumerate(zip(classes, matrix, strict=True)):
        correct, total = int(row[number]), int(row.sum())
        per_class.append([number, title, correct, total, f"{correct / total:.6f}" if total else ""])
    write_csv(folder / f"{name}_per_class.csv", per_class)
    rows = ([title, *row] for title, row in zip(classes, matrix.tolist(), strict=True))
    write_csv(folder / f"{name}_confusion.csv", [["true \\ predicted", *classes], *rows])
    figure = _draw(matrix, classes)
    write_atomically(folder / f"{name}_confusion.png", lambda file: figure.savefig(file, format="png", dpi=150))


def _draw(matrix: NDArray[np.int64], classes: list[str]) -> Any:
    """A matplotlib figure of the confusion matrix; class names stand beside it where they can be read."""
    from matplotlib.figure import Figure  # heavy, and needed once a run; Figure alone opens no display

    side = min(20.0, 3 + 0.12 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    picture = axes.imshow(share, cmap="viridis", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= NAMES_THAT_FIT:
        style: dict[str, Any] = {"fontsize": 5, "parse_math": False}  # a $ in a name is a dollar sign
        axes.set_xticks(range(len(classes)), classes, rotation=90, **style)
        axes.set_yticks(range(len(classes)), classes, **style)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the true class")
    return figure
