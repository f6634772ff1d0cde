"""common.data.kept, --cache-resized: the same pixels on every published way, and none that are old or damaged."""

import hashlib
import multiprocessing
import os
import pickle
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from image_kinds import KINDS, Kind
from tiny_trees import write_image
from torchvision import transforms as T

from benchmarks.data import published_transforms
from benchmarks.photographs import photograph
from common.data import BadImage, Data, Images, kept
from common.data.images import load_image
from common.data.kept import Cache, Keep
from common.data.loader import Plan, evaluation_batches, shuffled, training_batches
from common.errors import UserError

RESIZED = T.Compose([T.Resize((20, 30)), T.RandomHorizontalFlip(), T.ToTensor()])
Usage = namedtuple("Usage", "total used free")


def pictures(folder: Path, count: int = 4, transform: Any = RESIZED) -> Images:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            photograph((48, 36), number).save(path, quality=90)
    return Images("toy", "train", [path.name for path in paths], paths, [0] * count, ["one"], transform)


def entries(place: Path) -> list[Path]:
    return sorted(place.glob("*/*/*.rgb"))


def epochs(images: Images, workers: int = 0) -> list[torch.Tensor]:
    """The batches of two epochs of training."""
    plan = Plan(shuffled(len(images), 1), len(images), 2)
    train = training_batches(images, plan, 7, range(2 * plan.steps_per_epoch), workers, False)
    return [batch.images for batch in train]


def batches(images: Images) -> list[torch.Tensor]:
    """`epochs`, and an evaluation, which leaves it to the last training image how it is seeded."""
    return [*epochs(images), *(batch.images for batch in evaluation_batches(images, 3, 0, 1, 0, False))]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_every_published_transform_gives_the_same(demo_root: Path, tmp_path: Path) -> None:
    transforms = published_transforms(demo_root)
    assert len(transforms) > 12
    for number, transform in enumerate(transforms.values()):
        images = pictures(tmp_path / "images", 2, transform)
        place = tmp_path / str(number)
        found = batches(Cache(place).of(images))
        assert equal(found, batches(images)), transform
        assert len(entries(place)) == 2
        assert equal(batches(Cache(place).of(images)), found), transform


def test_from_the_second_time_on_no_image_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Cache(tmp_path / "kept").of(pictures(tmp_path / "images"))
    expected = batches(images)
    monkeypatch.setattr(kept, "load_image", None)
    assert equal(batches(images), expected)
    assert images.transform is RESIZED


def test_the_whole_image_is_kept_where_no_resize_comes_first(tmp_path: Path) -> None:
    cropped = T.Compose([T.RandomResizedCrop(16), T.ToTensor()])
    images = pictures(tmp_path / "images", transform=cropped)
    cache = Cache(tmp_path / "kept")
    assert equal(batches(cache.of(images)), batches(images))
    assert {entry.read_bytes()[28:] for entry in entries(cache.place)} == {
        load_image(images.path(index)).tobytes() for index in range(len(images))
    }
    assert "train whole, because the transform does not begin with a resize" in cache.plan(Data(images, images, images))
    bare = images.with_transform(None)
    assert cache.of(bare)[0][0].tobytes() == bare[0][0].tobytes()


def _hashes(images: Images, workers: int = 0) -> list[str]:
    return [hashlib.sha256(batch.numpy()).hexdigest() for _ in range(2) for batch in epochs(images, workers)]


def _twice(place: Path, images: Images, seen: Any) -> None:
    seen.put(_hashes(Cache(place).of(images), workers=1))


def test_processes_with_workers_of_their_own_share_a_folder(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 12)
    expected = _hashes(images)
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    processes = [context.Process(target=_twice, args=(tmp_path / "kept", images, seen)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [seen.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found == [expected] * 2
    assert len(entries(tmp_path / "kept")) == 12
    assert not list((tmp_path / "kept").rglob("*.tmp"))


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: c[:10], lambda c: c[:-1], lambda c: c + b"x", lambda c: _flip(c, 1000)]
    + [lambda c, at=at: _flip(c, at) for at in (0, 16, 20, 24, -1)]
    + [lambda c: c[:16] + c[20:24] + c[16:20] + c[24:]],  # width and height change places
)
def test_a_damaged_entry_is_made_anew(damage: Any, tmp_path: Path) -> None:
    images = Cache(tmp_path / "kept").of(pictures(tmp_path / "images", 2))
    expected = batches(images)
    first, second = entries(tmp_path / "kept")
    whole = first.read_bytes()
    first.write_bytes(damage(whole))
    assert equal(batches(images), expected)
    assert first.read_bytes() == whole
    shutil.copy(second, first)  # that of another image
    assert equal(batches(images), expected)
    assert first.read_bytes() == whole


def test_an_entry_of_a_changed_image_is_made_anew(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 2)
    cached = Cache(tmp_path / "kept").of(images)
    before = batches(cached)
    path = images.path(0)
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-40] ^= 0x55  # in the pixels; the size stays
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # and so does the time
    assert equal(batches(cached), batches(images))
    assert not equal(batches(cached), before)
    photograph((50, 40), 9).save(path)
    assert equal(batches(cached), batches(images))
    assert len(entries(tmp_path / "kept")) == 2


def test_a_centre_crop_behind_the_resize_is_kept_too(tmp_path: Path) -> None:
    steps = [T.Resize((20, 30)), T.CenterCrop(10), T.RandomCrop(8), T.CenterCrop(4), T.ToTensor()]
    images = pictures(tmp_path / "images", 1, T.Compose(steps))
    assert equal(batches(Cache(tmp_path / "kept").of(images)), batches(images))
    (entry,) = entries(tmp_path / "kept")
    assert entry.stat().st_size == 28 + 10 * 10 * 3
    assert entry.parent.parent.name.startswith("20x30-10x10-")


def test_another_resize_or_version_has_other_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "kept")
    images = pictures(tmp_path / "images", 1)
    for transform in (RESIZED, *(T.Compose([T.Resize(*how), T.ToTensor()]) for how in ((20,), ((20, 30), 3)))):
        other = images.with_transform(transform)
        assert equal(batches(cache.of(other)), batches(other))
    assert len(entries(cache.place)) == 3
    monkeypatch.setattr(PIL, "__version__", "0")
    assert equal(batches(cache.of(images)), batches(images))
    assert len(entries(cache.place)) == 4


def _outcome(images: Images) -> Any:
    try:
        image, _ = images[0]
    except BadImage as error:
        return str(error)
    return image.size, image.tobytes()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if max(kind.size) < 1000], ids=lambda kind: kind.name)
def test_what_becomes_of_a_kind_of_image_is_the_same(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind.make(tmp_path / "image.jpg")
    images = Images("toy", "test", ["a"], [tmp_path / "image.jpg"], [0], ["one"], T.Compose([T.Resize((8, 9))]))
    cache = Cache(tmp_path / "kept")
    assert [_outcome(cache.of(images)) for _ in range(2)] == [_outcome(images)] * 2
    assert len(entries(cache.place)) == isinstance(_outcome(images), tuple)


def test_an_image_that_is_gone_is_a_bad_image(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 2)
    cached = Cache(tmp_path / "kept").of(images)
    batches(cached)
    images.path(0).unlink()
    assert "there is no such file" in _outcome(cached)
    assert _outcome(cached) == _outcome(images)


def test_subsets_and_other_transforms_go_the_whole_way(tmp_path: Path) -> None:
    images = Cache(tmp_path / "kept").of(pictures(tmp_path / "images", 3, T.Compose([T.Resize((9, 9))])))
    images.subset([1])[0]
    assert images.with_transform(T.Resize((5, 5)))[0][0].size == (5, 5)
    assert not entries(tmp_path / "kept")
    assert pickle.loads(pickle.dumps(images))[2][0].size == (9, 9)  # as for workers that are spawned
    assert len(entries(tmp_path / "kept")) == 1


# The disk


def test_what_does_not_fit_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(tmp_path / "images", 4)
    data = Data(images, images.subset(range(2), "val"), images.subset(range(2, 4), "test"))
    cache = Cache(tmp_path / "kept", "--cache_resized")
    assert cache.plan(data).startswith(f"--cache_resized: up to 0.0 GB of images in {cache.place}, ")
    needed = 8 * (28 + 20 * 30 * 3)
    free = kept.RESERVE + needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    cache.plan(data)
    free -= 1
    with pytest.raises(UserError, match=r"^--cache_resized .*kept: 0\.0 GB of images are still to come, 2\.1 GB are"):
        cache.plan(data)
    free += 1
    for split in (data.train, data.val, data.test):
        batches(cache.of(split))
    free = kept.RESERVE + 10
    cache.plan(data)  # nothing is to come


def test_a_full_disk_costs_the_gain_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = pictures(tmp_path / "images")
    cached = Cache(tmp_path / "kept").of(images)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, kept.RESERVE + 20 * 30 * 3 - 1))
    assert equal(batches(cached), batches(images))
    assert not entries(tmp_path / "kept")
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.undo()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert equal(batches(Cache(tmp_path / "kept").of(images)), batches(images))
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--cache-resized .*file: nothing can be written there \(File exists\)"):
        Cache(tmp_path / "file")


def test_a_fault_of_one_entry_costs_that_entry_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where somebody removes the folder, or its temporary file, while an entry is written."""
    images = pictures(tmp_path / "images")
    cached = Cache(tmp_path / "kept").of(images)
    replace, calls = os.replace, 0

    def removed_once(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            shutil.rmtree(tmp_path / "kept")
        replace(source, target)

    monkeypatch.setattr(os, "replace", removed_once)
    assert equal(epochs(cached), epochs(images))
    assert len(entries(tmp_path / "kept")) == 4  # the second epoch makes up for it
    assert calls == 5
    assert capsys.readouterr().err == ""


def test_writers_of_one_number_have_temporary_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers that share the folder may each have a process 7."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    images = pictures(tmp_path / "images", 1)
    cached, other = Cache(tmp_path / "kept").of(images), Cache(tmp_path / "kept").of(images)
    replace, names = os.replace, []

    def between(source: Any, target: Any) -> None:
        names.append(Path(source).name)
        if len(names) == 1:
            other[0]
        replace(source, target)

    monkeypatch.setattr(os, "replace", between)
    assert torch.equal(cached[0][0], other[0][0])
    assert len(set(names)) == 2
    assert len(entries(tmp_path / "kept")) == 1


def test_a_folder_may_go_while_it_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch = Path.touch

    def touched_and_gone(path: Path) -> None:
        touch(path)
        shutil.rmtree(path.parent)

    monkeypatch.setattr(Path, "touch", touched_and_gone)
    Cache(tmp_path / "kept")


def test_what_was_long_abandoned_is_removed(tmp_path: Path) -> None:
    """A younger temporary file may be that of a living writer on another machine, whatever its number is here."""
    images = pictures(tmp_path / "images", 1)
    cache = Cache(tmp_path / "kept")
    batches(cache.of(images))
    (entry,) = entries(cache.place)
    old, young = (entry.with_name(f".{entry.name}.{token}.{2**22 + 1}.tmp") for token in ("0a", "0b"))
    for path, age in ((old, 3700), (young, 3500), (entry, 3700)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    cache.plan(Data(images, images, images))
    assert not old.exists()
    assert young.exists()
    assert entry.exists()


def test_unreadable_images_do_not_keep_the_plan_from_being_made(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 2)
    images.path(0).write_bytes(b"")
    keep = Keep(tmp_path, T.Compose([T.Resize((20, 30))]))
    assert keep.bytes_each(images) == 28 + 20 * 30 * 3
    write_image(images.path(0))
    assert Keep(tmp_path, T.Compose([T.Resize(12)])).bytes_each(images) == 28 + 3 * (12 * 16)


def test_images_that_are_no_files_stay_as_they_are(tmp_path: Path) -> None:
    images = Images("cifar10", "test", ["a"], ["test/0"], [0], ["one"], RESIZED, decode=lambda _: photograph((9, 9), 0))
    cache = Cache(tmp_path / "kept")
    assert cache.of(images) is images
    assert "changes nothing: the images of cifar10 are in memory" in cache.plan(Data(images, images, images))
