"""The engine against plain PyTorch loops written here, and against itself cut into shares of processes."""

import copy
import multiprocessing
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.scheduler
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import ROOT
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torchvision.transforms import functional as TF

from common.amp import Precision
from common.data.images import Images
from common.data.loader import Plan, seed_everything, seed_of, seed_transforms, shuffled, training_batches
from common.engine import PATIENCE, Loading, Trainer, evaluate, means, ranking
from common.errors import UserError

CPU = torch.device("cpu")
CLASSES = ["a", "b", "c"]


def noisy(image: Image.Image) -> Tensor:
    """A transform that draws from every generator there is."""
    jitter = torch.rand(()) + float(np.random.rand())  # noqa: NPY002
    return TF.to_tensor(image) + 0.01 * jitter


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """22 pictures of 6 x 6: a number that few process counts divide."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0)
    names, labels = [f"{number:02d}" for number in range(22)], [number % 3 for number in range(22)]
    for name, label in zip(names, labels, strict=True):
        level = pixels.integers(0, 60, (6, 6, 3)) + 80 * label
        Image.fromarray(level.astype(np.uint8)).save(folder / f"{name}.png")
    paths = [folder / f"{name}.png" for name in names]
    return Images("toy", "train", names, paths, labels, CLASSES, TF.to_tensor)


def small_model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(7)
    layers = [nn.Flatten(), nn.Linear(108, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


def make_trainer(images: Images, steps: int, plan: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    model = changes.pop("model", None) or small_model()
    optimizer = changes.pop("optimizer", None) or SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = {"batch_size": 8} | (plan or {})
    defaults: dict[str, Any] = {
        "scheduler": None,
        "precision": Precision("fp32", CPU),
        "device": CPU,
        "loading": Loading(),
        "seed": 3,
    }
    whole = Plan(order=shuffled(len(images), 3), count=len(images), **plan)
    return Trainer(model=model, optimizer=optimizer, images=images, plan=whole, steps=steps, **(defaults | changes))


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(one: list[Tensor], other: list[Tensor], tolerance: float = 0.0) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def plain_loop(
    images: Images, steps: int, batch_size: int = 8, clip: float | None = None
) -> tuple[list[Tensor], list[float]]:
    """The same training in the textbook's form."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)  # as the engine turns it on
    losses, epoch, done = [], 0, 0
    while done < steps:
        generator = torch.Generator().manual_seed(seed_of(3, epoch))
        order = torch.randperm(len(images), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            if done == steps:
                break
            samples = [images[index] for index in order[start : start + batch_size]]
            batch, labels = (
                torch.stack([sample[0] for sample in samples]),
                torch.tensor([sample[1] for sample in samples]),
            )
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), labels)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
            done += 1
        epoch += 1
    return parameters(model), losses


@pytest.mark.parametrize("clip", [None, 0.3])
def test_equals_the_textbook_loop(pictures: Images, clip: float | None) -> None:
    """Seven updates over three epochs with a ragged last batch: weights and losses equal, bit for bit."""
    trainer = make_trainer(pictures, 7, clip_grad=clip)
    losses = []
    for _ in trainer.run():
        report = trainer.report()
        losses.append(report["loss"] / report["samples"])
    weights, expected = plain_loop(pictures, 7, clip=clip)
    assert_same(parameters(trainer.model), weights)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_accumulation_equals_the_whole_batch(pictures: Images) -> None:
    """Micro-batches of unequal size, the ragged last batch included, weigh by their samples."""
    for accumulate in (2, 3, 8):
        trainer = make_trainer(pictures, 7, plan={"accumulate": accumulate})
        for _ in trainer.run():
            pass
        assert_same(parameters(trainer.model), plain_loop(pictures, 7)[0], tolerance=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_processes_share_every_batch(pictures: Images, size: int) -> None:
    """The union of all shares is the global batch in order; weights sum to the number of processes; none is idle."""
    whole = Plan(shuffled(22, 3), 22, 8)
    parts = [Plan(shuffled(22, 3), 22, 8, accumulate=2, rank=rank, size=size) for rank in range(size)]
    for step in range(6):
        order = list(whole.order(step // 3))
        shares = [(part, micro) for part in parts for micro in range(2)]
        real = [key for part, micro in shares for key in part.keys(step, micro, order) if part.weight(step, micro) > 0]
        assert real == whole.keys(step, 0, order)
        assert all(part.keys(step, micro, order) for part, micro in shares)
        assert sum(part.weight(step, micro) for part, micro in shares) == pytest.approx(size)


def test_drop_last_and_steps_per_epoch() -> None:
    assert Plan(shuffled(22, 0), 22, 8).steps_per_epoch == 3
    assert Plan(shuffled(22, 0), 22, 8, drop_last=True).steps_per_epoch == 2
    assert Plan(shuffled(24, 0), 24, 8).steps_per_epoch == 3
    assert [Plan(shuffled(22, 0), 22, 8).global_batch_size(step) for step in range(4)] == [8, 8, 6, 8]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [shuffled(50, seed)(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert shuffled(50, 1)(1) == orders[3]


def test_transforms_are_seeded_as_everything_is() -> None:
    def drawn() -> tuple[float, ...]:
        return torch.rand(()).item(), np.random.random(), random.random()  # noqa: NPY002 - the generator that is seeded

    seed_everything(3, 1, 4)
    expected = drawn()
    seed_transforms(3, 1, 5)
    assert not set(expected) & set(drawn())
    seed_transforms(3, 1, 4)
    assert drawn() == expected


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_augmentation_does_not_depend_on_workers(pictures: Images, workers: int) -> None:
    def pixels(workers: int, steps: range, size: int) -> dict[int, Tensor]:
        found = {}
        for rank in range(size):
            plan = Plan(shuffled(22, 3), 22, 8, rank=rank, size=size)
            for batch in training_batches(pictures.with_transform(noisy), plan, 3, steps, workers, False):
                found |= dict(zip(batch.indices, batch.images, strict=True))
        return found

    reference = pixels(0, range(3), 1)
    assert len(reference) == 22
    for found in (pixels(workers, range(3), 1), pixels(workers, range(3), 2)):
        assert all(torch.equal(found[index], image) for index, image in reference.items())
    # a later epoch brings other noise, and starting in the middle of it brings the same
    later = pixels(workers, range(3, 6), 1)
    assert any(not torch.equal(later[index], image) for index, image in reference.items())
    assert all(torch.equal(later[index], image) for index, image in pixels(0, range(5, 6), 1).items())


@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_resume_is_exact(pictures: Images, stop: int) -> None:
    """Dropout, momentum, a schedule per epoch and random transforms: a fresh process goes on bit for bit."""

    def fresh() -> Trainer:
        model = small_model(dropout=0.5)
        optimizer = AdamW(model.parameters(), lr=0.01)
        scheduler = CosineAnnealingLR(optimizer, T_max=3)
        return make_trainer(
            pictures.with_transform(noisy),
            9,
            plan={"accumulate": 2},
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
        )

    whole = fresh()
    reports = [(trainer_step, whole.report()) for trainer_step in whole.run()]
    first = fresh()
    for step in first.run():
        if step == stop:
            break
    state = copy.deepcopy(first.state_dict())
    second = fresh()
    torch.manual_seed(99)  # whatever state the generators are in
    second.load_state_dict(state)
    rest = [(step, second.report()) for step in second.run()]
    assert_same(parameters(second.model), parameters(whole.model))
    assert second.rate == whole.rate
    assert rest[1:] == reports[stop + 1 :]


def test_a_training_state_holds_tensors_alone(pictures: Images) -> None:
    trainer = make_trainer(pictures, 1)
    with pytest.raises(TypeError, match="something else than tensors"):
        trainer.load_state_dict(trainer.state_dict() | {"transient": [{"ema": {}}]})


def rates(trainer: Trainer) -> list[float]:
    """Of each update, as it was applied."""
    return [trainer.rate for _ in trainer.run()]


def test_schedules(pictures: Images) -> None:
    """torch per epoch and per step, timm per update: the rate each update really had."""

    def with_schedule(make: Callable[[SGD], Any], per: str) -> Trainer:
        model = small_model()
        optimizer = SGD(model.parameters(), lr=1.0)
        scheduler = make(optimizer)
        return make_trainer(pictures, 9, model=model, optimizer=optimizer, scheduler=scheduler, schedule_per=per)

    per_epoch = rates(with_schedule(lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)), "epoch"))
    assert per_epoch == [1, 1, 1, 0.5, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3]
    per_step = rates(with_schedule(lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)), "step"))
    assert per_step == [1 / (1 + step) for step in range(9)]

    def cosine(optimizer: SGD) -> Any:
        return timm.scheduler.CosineLRScheduler(
            optimizer, t_initial=9, t_in_epochs=False, warmup_t=2, warmup_lr_init=0.1
        )

    expected = cosine(SGD(small_model().parameters(), lr=1.0))
    np.testing.assert_allclose(rates(with_schedule(cosine, "step")), [expected._get_lr(step)[0] for step in range(9)])


class Poisoned(nn.Module):
    """Gives NaN in training from a certain call on."""

    def __init__(self, healthy: int) -> None:
        super().__init__()
        self.inner, self.healthy, self.calls = small_model(), healthy, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits = self.inner(images)
        return logits * float("nan") if self.training and self.calls > self.healthy else logits


@pytest.mark.parametrize("fused", [False, True])
def test_non_finite_updates_are_skipped_and_then_stop_the_run(pictures: Images, fused: bool) -> None:
    model = Poisoned(healthy=2)
    optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
    trainer = make_trainer(pictures, 30, model=model, optimizer=optimizer)
    kept: list[Tensor] = []

    def train() -> None:
        for step in trainer.run():
            if step == 2:
                kept.extend(parameters(model))
            trainer.report()

    with pytest.raises(UserError, match=r"10 updates in a row were skipped .* lower the learning rate"):
        train()
    assert trainer.step == 2 + PATIENCE
    assert_same(parameters(model), kept)


def test_single_skipped_updates_do_not_stop_the_run(pictures: Images) -> None:
    """fp16's loss scaling overflows now and then in the healthiest run."""

    class Hiccup(Poisoned):
        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(images) * (float("nan") if self.training and self.calls % 3 == 0 else 1.0)

    model = Hiccup(healthy=0)
    trainer = make_trainer(pictures, 60, model=model, optimizer=SGD(model.parameters(), lr=0.1))
    for _ in trainer.run():
        trainer.report()
    assert trainer.skipped == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_update_leaves_running_statistics_as_they_were(pictures: Images, value: float) -> None:
    """BatchNorm has seen the bad batch in the forward pass, before anybody could know."""

    class Blinded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108), nn.Linear(108, 3)), 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(images * value if self.calls == 3 else images)

    model = Blinded()
    trainer = make_trainer(pictures, 5, model=model, optimizer=SGD(model.parameters(), lr=0.1))
    seen = [
        [value.clone() for value in model.state_dict().values() if value.is_floating_point()] for _ in trainer.run()
    ]
    assert_same(seen[2], seen[1])
    assert all(not torch.equal(new, old) for new, old in zip(seen[3], seen[2], strict=True))
    assert all(value.isfinite().all() for value in seen[4])
    trainer.report()
    assert trainer.skipped == 1


def test_what_is_not_finite_is_never_counted_as_right(pictures: Images) -> None:
    """`argmax` of NaN is class 0 of "a", "b", "c"."""

    def blind(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return F.cross_entropy(logits, labels), torch.full_like(logits, float("nan"))

    trainer = make_trainer(pictures, 3, objective=blind)
    for _ in trainer.run():
        pass
    assert trainer.report()["correct"] == 0
    with pytest.raises(UserError, match=r"train: the model's output is not finite for 22 of 22 images, .* 00: "):
        evaluate(nn.Sequential(small_model(), Blank()), pictures, CPU, Precision("fp32", CPU), Loading())
    with pytest.raises(UserError, match="or bf16 overflows: fp32 does not"):
        evaluate(nn.Sequential(small_model(), Blank()), pictures, CPU, Precision("bf16", CPU), Loading())


class Blank(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits * float("nan")


def test_a_model_of_another_class_count_is_not_evaluated(pictures: Images) -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    with pytest.raises(UserError, match="the model names 4 classes, train has 3"):
        evaluate(wide, pictures, CPU, Precision("fp32", CPU), Loading())


def test_of_equal_logits_the_lower_class_is_the_better() -> None:
    draw = torch.Generator().manual_seed(0)
    for classes in (2, 5, 40, 300):
        logits = torch.randint(-2, 3, (64, classes), generator=draw).to(torch.bfloat16)
        ranked = ranking(logits, 5)
        assert ranked.shape == (64, min(5, classes))
        assert torch.equal(ranked[:, 0], logits.argmax(-1))
        for row, best in zip(logits.tolist(), ranked.tolist(), strict=True):
            assert best == sorted(range(classes), key=lambda number: (-row[number], number))[:5]


def test_a_report_of_no_image_is_no_number() -> None:
    assert means({"loss": 6.0, "correct": 3.0, "samples": 4.0}) == {"loss": 1.5, "accuracy": 0.75}
    assert all(np.isnan(value) for value in means({"loss": 0.0, "correct": 0.0, "samples": 0.0}).values())


def slow_evaluation(model: nn.Module, images: Images) -> tuple[list[int], list[float]]:
    model.eval()
    best, losses = [], []
    for image, label in images:
        logits = model(image[None]).double()[0]
        best.append(int(logits.argmax()))
        losses.append(float(torch.logsumexp(logits, 0) - logits[label]))
    return best, losses


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_evaluation_equals_a_slow_loop(pictures: Images, batch: int) -> None:
    model = small_model(dropout=0.5).train()
    found = evaluate(model, pictures, CPU, Precision("fp32", CPU), Loading(eval_batch_size=batch))
    assert model.training
    best, losses = slow_evaluation(model, pictures)
    assert found.ranked[:, 0].tolist() == best
    assert found.label.tolist() == pictures.labels
    assert found.index.tolist() == list(range(22))
    np.testing.assert_allclose(found.loss, losses, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(pictures: Images, precision: str) -> None:
    """Autocast and loss scaling reach about the loss of fp32."""
    ends = {}
    for kind in ("fp32", precision):
        trainer = make_trainer(pictures, 60, precision=Precision(kind, CPU))
        for step in trainer.run():
            if step == 57:
                trainer.report()
        report = trainer.report()
        ends[kind] = report["loss"] / report["samples"]
    assert ends["fp32"] < 0.5
    assert ends[precision] == pytest.approx(ends["fp32"], abs=0.05)


def workers() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid}


def test_workers_wait_for_the_next_evaluation(pictures: Images) -> None:
    """Of the same split; one that was broken off leaves nothing behind, and another split has workers of its own."""
    before, model, loading = workers(), small_model(), Loading(workers=2, eval_batch_size=4)

    def look(images: Images, progress: Any = iter) -> list[int]:
        return evaluate(model, images, CPU, Precision("fp32", CPU), loading, progress).index.tolist()

    def broken_off(batches: Any) -> Any:
        yield next(batches)
        raise KeyboardInterrupt

    assert look(pictures) == list(range(22))
    first = workers() - before
    assert len(first) == 2
    with pytest.raises(KeyboardInterrupt):
        look(pictures, broken_off)
    assert look(pictures) == list(range(22))
    assert workers() - before == first
    assert look(pictures.subset(range(5))) == list(range(5))
    assert len(workers() - before) == 2
    assert not workers() & first
    loading.close()
    assert workers() == before


def broken(pictures: Images, count: int) -> Images:
    """The same list with `count` files that are not images."""
    paths = pictures.paths
    bad = paths[0].parent / "bad.png"
    bad.write_bytes(b"no image")
    paths[4 : 4 + count] = [bad] * count
    return Images("toy", "train", pictures.ids, paths, pictures.labels, CLASSES, TF.to_tensor)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_run_with_its_path(pictures: Images, workers: int) -> None:
    with pytest.raises(UserError, match=r"bad\.png.*--skip-bad-images") as caught:
        for _ in make_trainer(broken(pictures, 1), 3, loading=Loading(workers=workers)).run():
            pass
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"bad\.png"):
        evaluate(small_model(), broken(pictures, 1), CPU, Precision("fp32", CPU), Loading(workers=workers))


def test_unreadable_images_can_be_tolerated_up_to_a_number(pictures: Images) -> None:
    images = broken(pictures, 2)
    loading = Loading(skip_bad_images=2, eval_batch_size=4)
    trainer = make_trainer(images, 6, loading=loading)
    for _ in trainer.run():
        pass
    assert trainer.report()["samples"] == 2 * 20
    found = evaluate(small_model(), images, CPU, Precision("fp32", CPU), loading)
    assert found.index.tolist() == [index for index in range(22) if index not in (4, 5)]
    assert set(loading.unreadable["train"]) == {4, 5}
    with pytest.raises(UserError, match="--skip-bad-images"):
        evaluate(small_model(), broken(pictures, 3), CPU, Precision("fp32", CPU), Loading(skip_bad_images=2))


def test_an_image_that_is_readable_again_is_counted_again(pictures: Images) -> None:
    images, loading = broken(pictures, 1), Loading(skip_bad_images=1)
    found = evaluate(small_model(), images, CPU, Precision("fp32", CPU), loading)
    assert len(found.index) == 21
    Image.new("RGB", (6, 6)).save(images.path(4))
    assert len(evaluate(small_model(), images, CPU, Precision("fp32", CPU), loading).index) == 22


def test_workers_end_with_the_program(pictures: Images, tmp_path: Path) -> None:
    """A program that an error ends in the middle of an epoch does not wait for its data workers for ever."""
    folder = pictures.path(0).parent
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from pathlib import Path
import test_engine
from common.data.images import Images
from common.engine import Loading
from torchvision.transforms import functional as TF
names = [f"{{number:02d}}" for number in range(22)]
paths = [Path({str(folder)!r}) / f"{{name}}.png" for name in names]
images = Images("toy", "train", names, paths, [n % 3 for n in range(22)], ["a", "b", "c"], TF.to_tensor)
for step in test_engine.make_trainer(images, 9, loading=Loading(workers=2)).run():
    raise RuntimeError("a fault")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("a fault")  # and not with what torch says of workers that were killed


def test_workers_end_with_a_program_that_kept_the_error() -> None:
    """pytest keeps a traceback, and with it the iterator over workers, until the very end."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_engine.py", "-k", "unreadable_image_stops"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stdout


def test_fewer_numbers_are_another_seed() -> None:
    """The order of an epoch is drawn from another seed than its first sample, and that from another than a step."""
    assert len({seed_of(3), seed_of(3, 0), seed_of(3, 0, 0), seed_of(3, 0, 0, 0), seed_of(3, 0, 0, 0, 0)}) == 5
    assert seed_of(3, 0) == seed_of(3, 0)


def test_seeding_reaches_every_generator() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    seed_everything(1, 2)
    first = draw()
    seed_everything(1, 2)
    assert draw() == first
    seed_everything(2, 1)
    assert all(one != other for one, other in zip(draw(), first, strict=True))


def test_paths_are_named(tmp_path: Path) -> None:
    """An image that vanishes after the start is named as well."""
    path = tmp_path / "gone.png"
    Image.new("RGB", (6, 6)).save(path)
    images = Images("toy", "train", ["gone"], [path], [0], CLASSES, TF.to_tensor)
    path.unlink()
    with pytest.raises(UserError, match=r"gone\.png"):
        evaluate(small_model(), images, CPU, Precision("fp32", CPU), Loading())
