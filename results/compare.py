"""Measured against published: which run records count, and how far they are from the papers' values.

Noise model. D is the mean top-1 accuracy of our n runs minus the published value p, in percentage points, and

    SE² = p (100 - p) / N  +  s² / n  +  s_p² / m  +  (r² + (2 e)²) / 12

- N, the images of the test set: both sides are measured on the same pictures, so the binomial error stands once, not
  twice (this is the variance of the difference of two models whose hits correlate by one half). It does not shrink with
  n, because more runs do not make the test set larger.
- s, the standard deviation of our n runs, and s_p, that of the paper's m runs. Where only one side has a standard
  deviation it stands for the other too (m = 1 where the paper gives one value); where neither has one the term is left
  out, and the binomial error alone bounds what two single runs can show.
- r, one unit of the last printed digit, and e, the reading error of a figure: uniform errors of width r and 2 e.

A row is "reproduced" where abs(D) <= t SE, t being the two-sided 95 % point of Student's distribution. Its degrees of
freedom are Welch and Satterthwaite's over the estimated terms (n - 1 for s, m - 1 for s_p); the other terms are taken
as known, and where nothing is estimated t is the normal 1.96. Otherwise the row is "below" or "above".

The best epoch, chosen by the protocol of the record, decides; the last one is shown beside it. Records of demos, of
limited or altered runs ("excluded") and of unfinished ones never count. Trained runs and evaluated checkpoints are
separate groups, and so are the described and the released side of a row.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.special import stdtrit

from results.measured import Counts, Record, read_record
from results.papers import Row, all_rows

NOT_COMPARABLE = "not comparable"


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of n runs, %: mean, standard deviation (None for one run), distance from the paper.

    `difference` (mean minus published) and `margin` (half width of the 95 % interval) are in percentage points, None
    where nothing can be compared.
    """

    n: int
    mean: float
    sd: float | None
    difference: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One line of the table: a row of a paper and one group of runs ("" where nobody has run it).

    `side` is "described" or "released", with ", evaluated" for checkpoints that were not trained here but evaluated.
    `seeds` counts the distinct seeds of trained runs. `reason` says why there is no value or no comparison.
    """

    row: Row
    side: str
    verdict: str
    reason: str = ""
    best: Accuracy | None = None
    last: Accuracy | None = None
    seeds: int = 0
    notes: tuple[str, ...] = ()
    records: tuple[Path, ...] = ()


def margin(row: Row, values: Sequence[float], test_size: int) -> float:
    """Half width, in percentage points, of the 95 % interval around mean(values) - row.value; see above.

    `values`: top-1 accuracies of our runs, %. `test_size`: images of the test set. The row has a value.
    """
    assert row.value is not None
    n, m = len(values), row.seeds or 1
    own = statistics.variance(values) if n > 1 else None
    theirs = row.std**2 if row.std is not None else None
    known = row.value * (100 - row.value) / test_size + (row.step**2 + (2 * row.read_off) ** 2) / 12
    estimated: list[tuple[float, int]] = []  # (variance of a mean, degrees of freedom)
    if own is not None and theirs is not None:
        estimated = [(own / n, n - 1), (theirs / m, m - 1)]
    elif own is not None:
        estimated = [(own * (1 / n + 1 / m), n - 1)]
    elif theirs is not None:
        estimated = [(theirs * (1 / n + 1 / m), m - 1)]
    variance = known + sum(term for term, _ in estimated)
    uncertainty = sum(term**2 / freedom for term, freedom in estimated)
    freedom = variance**2 / uncertainty if uncertainty > 0 else math.inf
    return float(stdtrit(freedom, 0.975)) * math.sqrt(variance)


def survey(runs_dir: str | Path) -> tuple[list[Record], Counter[str], list[str]]:
    """The runs under `runs_dir` that count, the number of those that do not, by reason, and a sentence about each file
    `<script>/<run>/record.json` that is no record. Such a file keeps none of the others from counting.
    """
    runs: list[Record] = []
    left_out: Counter[str] = Counter()
    faults: list[str] = []
    for path in sorted(Path(runs_dir).glob("*/*/record.json")):
        try:
            record = read_record(path)
        except ValueError as error:
            faults.append(str(error))
            continue
        reason = _left_out(record)
        if reason:
            left_out[reason.partition(":")[0]] += 1
        else:
            runs.append(record)
    return runs, left_out, faults


def compare(runs: Iterable[Record], rows: Iterable[Row] | None = None) -> list[Comparison]:
    """These rows, or every row of every paper, beside the runs that `survey` has found: one entry a group."""
    lines: list[Comparison] = []
    for row in all_rows().values() if rows is None else rows:
        groups: dict[str, list[Record]] = {}
        for record in runs:
            if record.row == row.id:
                groups.setdefault(_group(record), []).append(record)
        lines += [_compare(row, groups[group]) for group in sorted(groups)]
        if not groups:
            lines.append(Comparison(row, "", "not run", notes=(row.note,) if row.note else ()))
    return lines


def compare_record(record: Record) -> Comparison | None:
    """One record beside its paper row (None where it has none); one that never counts gets no difference."""
    row = all_rows().get(record.row or "")
    return _compare(row, [record], "; ".join(record.excluded) or _left_out(record)) if row else None


def is_demo(record: Record) -> bool:
    """Whether the run was a demo, on tiny data."""
    return any(reason.lower().startswith("demo") for reason in record.excluded)


def _left_out(record: Record) -> str:
    """Why this record never counts, or ''."""
    if record.excluded:
        return "demo" if is_demo(record) else record.excluded[0]
    if record.status not in ("finished", "evaluated"):
        return f"not finished: {record.status}"
    if not record.best and not record.last:
        return "no test result"
    return "" if record.row in all_rows() else "no row of a paper"


def _group(record: Record) -> str:
    return record.side + (", evaluated" if record.status == "evaluated" else "")


def _compare(row: Row, runs: list[Record], left_out: str = "") -> Comparison:
    runs, seeds, repeats = _distinct(runs)
    bests, lasts = ([test for test in tests if test] for tests in zip(*((r.best, r.last) for r in runs), strict=True))
    totals = sorted({test.total for test in (*bests, *lasts)})
    chosen = {record.selection for record in runs}
    verdict, reason = ("does not count", left_out) if left_out else _obstacle(row, totals, chosen)
    notes = [*filter(None, [row.note]), *repeats]
    if not verdict and row.test_size is None:
        notes.append(f"the size of the paper's test set is not known, the runs' {totals[0]:,} images are used")
    if not verdict and row.selection == "test-selected" and "validation-selected" in chosen:
        notes.append("the paper's code chooses the epoch on the test set, these runs on a validation set")
    against = None if verdict else row
    best, last = _accuracy(against, bests), _accuracy(against, lasts)
    decides = best or last
    if decides and decides.difference is not None and decides.margin is not None:
        inside, above = abs(decides.difference) <= decides.margin, decides.difference > 0
        verdict = "reproduced" if inside else "above" if above else "below"
    paths = tuple(record.path for record in runs if record.path)
    return Comparison(row, _group(runs[0]), verdict, reason, best, last, seeds, tuple(notes), paths)


def _distinct(runs: list[Record]) -> tuple[list[Record], int, list[str]]:
    """The runs to count, their number of distinct seeds, and a note where something repeats."""
    if runs[0].status == "evaluated":
        # The same checkpoint gives the same number again: counting it twice would feign a spread of zero.
        kept = list({record.sha256 or index: record for index, record in enumerate(runs)}.values())
        again = len(runs) - len(kept)
        return kept, 0, [f"{again} repeated evaluation(s) of the same checkpoint left out"] if again else []
    # A run without a seed is like no other run.
    seeds = {index if record.seed is None else str(record.seed) for index, record in enumerate(runs)}
    return runs, len(seeds), [f"{len(runs)} runs, {len(seeds)} distinct seed(s)"] if len(seeds) < len(runs) else []


def _obstacle(row: Row, totals: list[int], chosen: set[str | None]) -> tuple[str, str]:
    """The verdict and its reason where runs and paper cannot be compared, else ('', '')."""
    if row.value is None:
        return "no published value", row.empty
    if row.not_comparable:
        return NOT_COMPARABLE, row.not_comparable
    if row.test_size is not None and totals != [row.test_size]:
        counts = " and ".join(f"{total:,}" for total in totals)
        return NOT_COMPARABLE, f"tested on {counts} images, the paper's test set has {row.test_size:,}"
    if len(totals) > 1:
        return NOT_COMPARABLE, f"the runs differ in their test sets: {totals[0]:,} to {totals[-1]:,} images"
    if row.selection == "validation-selected" and "test-selected" in chosen:
        return NOT_COMPARABLE, "the runs chose the epoch on the test set, the paper on a validation set"
    return "", ""


def _accuracy(row: Row | None, tests: list[Counts]) -> Accuracy | None:
    values = [100 * test.correct / test.total for test in tests]
    if not values:
        return None
    mean, sd = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    if row is None or row.value is None:
        return Accuracy(len(values), mean, sd)
    return Accuracy(len(values), mean, sd, mean - row.value, margin(row, values, tests[0].total))
