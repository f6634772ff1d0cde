"""Comparing a data set on disk with what its authors published."""

from collections import Counter
from pathlib import Path

from common.data.demo import is_finished
from common.data.images import Images
from common.data.published import Published, published
from common.data.readers import READERS
from common.data.tree import Tree
from common.errors import UserError


def check(name: str, root: str | Path) -> bool:
    """Prints the expected tree, what was found, counts per split and class; returns whether all is right.

    The last line printed is one sentence with the verdict. File contents are not decoded.

    Raises:
        UserError: there is no data set of that name.
    """
    facts = published(name)
    tree = Tree(facts, root)
    print(f"{facts.title}, expected below {tree.root}:")
    print("\n".join(f"    {line}" for line in facts.tree.splitlines()))

    found: dict[str, Images] = {}
    problems = []
    for split in facts.counts:
        try:
            found[split] = READERS[facts.name](tree.root, split)
        except UserError as error:
            problems.append(f"{split}: {error}")
    if found:
        _print_classes(found)
        _print_splits(facts, found)
    problems += [problem for split, images in found.items() for problem in _differences(facts, split, images)]

    if is_finished(tree.path):
        print("This is the demo data (handwritten digits), not the published data set.")
    for problem in problems:
        print(f"- {problem}")
    if problems:
        print(f"{facts.title} at {tree.path} is not as published (differences: {len(problems)}).")
    else:
        print(f"{facts.title} at {tree.path} is complete: all counts are as published.")
    return not problems


def _range(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]:,} to {bounds[1]:,}" if bounds[0] < bounds[1] else f"{bounds[0]:,}"


def _counts(images: Images) -> list[int]:
    """Number of images of each class."""
    counts = Counter(images.labels)
    return [counts[label] for label in range(len(images.classes))]


def _print_classes(found: dict[str, Images]) -> None:
    """One line per class, one column per split."""
    counts = {split: dict(zip(images.classes, _counts(images), strict=True)) for split, images in found.items()}
    classes = list(dict.fromkeys(name for images in found.values() for name in images.classes))
    width = max(len("class"), *(len(name) for name in classes))
    print(f"\n{'class':<{width}}" + "".join(f"{split:>11}" for split in found))
    for name in classes:
        print(f"{name:<{width}}" + "".join(f"{counts[split].get(name, 0):>11,}" for split in found))


def _print_splits(facts: Published, found: dict[str, Images]) -> None:
    """One line per split: images and classes found and published, smallest and largest class."""
    print(
        f"\n{'split':<11}{'images':>9}{'published':>11}{'classes':>9}{'published':>11}"
        f"{'min/class':>11}{'max/class':>11}"
    )
    for split, images in found.items():
        counts = _counts(images)
        print(
            f"{split:<11}{len(images):>9,}{facts.counts[split]:>11,}"
            f"{len(images.classes):>9,}{facts.classes:>11,}{min(counts):>11,}{max(counts):>11,}"
        )
    print()


def _differences(facts: Published, split: str, images: Images) -> list[str]:
    """What of one split is not as published."""
    differences = []
    if len(images) != facts.counts[split]:
        differences.append(f"{split}: {len(images):,} images where {facts.counts[split]:,} are published.")
    if len(images.classes) != facts.classes:
        differences.append(f"{split}: {len(images.classes)} classes where {facts.classes} are published.")
    counts = _counts(images)
    found, expected = (min(counts), max(counts)), facts.per_class.get(split)
    if expected is not None and found != expected:
        differences.append(f"{split}: {_range(found)} images a class where {_range(expected)} are published.")
    return differences
