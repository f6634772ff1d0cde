"""common.placement: memory formats, and that torch.compile takes every model whole, for any batch size."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scripts import ROOT, run_script
from test_dist import processes, torchrun_environments
from tiny_models import CLASSES, MODELS, SIZE, objective_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.optim import SGD
from torchvision.transforms import functional as TF

import common.engine
import common.placement
import common.predict
from common.amp import Precision
from common.data.images import Images
from common.data.loader import Plan
from common.engine import Loading, Trainer, evaluate
from common.errors import UserError
from common.models import gft, transfg
from common.placement import compilation_explained, compile_model, memory_format, place
from common.predict import Predictor

CPU = torch.device("cpu")
CONVOLUTIONAL = {"DenseNet", "ResNet-18", "ResNetV2", "FFVT hybrid", "CAL", "ResNet-50"}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_convolve_have_channels_last_on_a_gpu(name: str) -> None:
    model = MODELS[name]()
    wanted = torch.channels_last if name in CONVOLUTIONAL else torch.contiguous_format
    assert memory_format(model, torch.device("cuda", 0)) == wanted
    assert memory_format(model, CPU) == torch.contiguous_format


def spatial(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]


@pytest.mark.parametrize("name", sorted(CONVOLUTIONAL))
def test_channels_last_changes_no_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: another layout adds in another order, which deep models make visible in float32."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setattr(common.placement, "memory_format", lambda *_: torch.channels_last)
        placed = place(model, CPU)
        found = placed(images.to(memory_format=torch.channels_last))
    assert spatial(placed)
    assert all(parameter.is_contiguous(memory_format=torch.channels_last) for parameter in spatial(placed))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


class Seeing(nn.Module):
    """Notes how the images lie that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.seen = nn.Linear(3, CLASSES), set[bool]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.add(images.is_contiguous(memory_format=torch.channels_last))
        return self.head(images.mean((2, 3)))


def test_images_lie_as_the_model_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, evaluation and prediction."""
    path = tmp_path / "a.png"
    Image.new("RGB", (6, 6)).save(path)
    images = Images("toy", "train", ["a"], [path], [0], list("abc"), TF.to_tensor)
    for module in (common.engine, common.predict):
        monkeypatch.setattr(module, "memory_format", lambda *_: torch.channels_last)
    model, precision = Seeing(), Precision("fp32", CPU)
    plan = Plan(lambda _: [0], 1, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    for work in (
        lambda: list(Trainer(model, optimizer, None, precision, images, plan, 1, CPU, Loading()).run()),
        lambda: evaluate(model, images, CPU, precision, Loading()),
        lambda: Predictor(model, TF.to_tensor, list("abc"), CPU, precision, Loading())([path], 1),
    ):
        model.seen.clear()
        work()
        assert model.seen == {True}


def use(model: nn.Module, batch_size: int, train: bool) -> None:
    images, labels = torch.randn(batch_size, 3, SIZE, SIZE), torch.randint(CLASSES, (batch_size,))
    model.train(train)
    with torch.inference_mode(not train):
        if train:
            objective_of(model)(model, images, labels)[0].backward()
        else:
            model(images)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_one_graph_for_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in training and one in evaluation, without a break (`fullgraph`), however often the batch size changes.

    GFT described has three more: its moving average is missing, of this batch size, or of another.
    """
    for module in (gft, transfg):
        monkeypatch.setattr(module, "DEPTH", 1)  # of eight blocks each is followed anew
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, counter = MODELS[name](), CompileCounter()
    compile_model(model, backend=counter, fullgraph=True)
    for batch_size in (4, 4, 3, 4, 3):
        use(model, batch_size, train=True)
    use(model, 4, train=False)
    assert counter.frame_count == 2 + 3 * (name == "GFT described")


def test_a_compiled_model_is_the_same_model() -> None:
    """Names, weights, hooks and results."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS["ResNet-18"]()
    before, images = copy.deepcopy(model), torch.randn(2, 3, SIZE, SIZE)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    compile_model(model, backend="eager")
    assert list(model.state_dict()) == list(before.state_dict())
    for one in (model, before):
        one.train()
        F.cross_entropy(one(images), torch.tensor([0, 1])).backward()
    assert calls == [1]
    for (name, one), other in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before.state_dict()[name])


def test_a_copy_of_a_compiled_model_has_weights_of_its_own(tmp_path: Path) -> None:
    """A deep copy is compiled as the model is; what was saved as a whole is not."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    calls: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *given: (calls.append(1), graph.forward(*given))[1]

    model, images = MODELS["ViT"]().eval(), torch.randn(2, 3, SIZE, SIZE)
    compile_model(model, backend=backend)
    with torch.no_grad():
        expected = model(images)
        copied = copy.deepcopy(model)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(images).any()
        torch.testing.assert_close(model(images), expected)
        assert len(calls) == 3
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        torch.testing.assert_close(loaded(images), expected)
        assert len(calls) == 3


def test_a_run_that_is_compiled(demo_output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains and evaluates as one that is not, which cannot go on compiled."""
    torch._dynamo.reset()
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, backend=counter, **how))
    small = ("--demo", "--limit", "24", "--epochs", "1", "--batch-size", "10", "--workers", "0")
    small += ("--output", str(demo_output))
    plain = run_script("densenet169_food101.py", *small)
    assert plain.status == 0
    assert counter.frame_count == 0
    outcome = run_script("densenet169_food101.py", *small, "--compile")
    assert outcome.status == 0, outcome.err
    assert counter.frame_count >= 2  # for training and for evaluation
    assert outcome.record["options"]["compile"] is True
    records = [run.record["results"]["best"]["test"] for run in (plain, outcome)]
    assert records[0]["correct"] == records[1]["correct"]
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-4)
    (plain.folder / "record.json").unlink()
    again = run_script("densenet169_food101.py", *small, "--resume", plain.folder, "--compile")
    assert again.status == 1
    assert "was started without --compile: resume it without --compile" in again.err


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (
            RuntimeError("InvalidCxxCompiler: No working C++ compiler found"),
            r"install a C\+\+ .*, or leave it out",
        ),
        (NotImplementedError("DDPOptimizer backend: Found a higher order op in the graph"), "leave it out"),
    ],
)
def test_what_cannot_be_compiled_is_told_in_a_sentence(fault: Exception, remedy: str) -> None:
    """With torch's own reason; a compiler is asked for where one is lacking."""

    def backend(*_: Any) -> Any:
        raise fault

    torch._dynamo.reset()
    model = MODELS["ViT"]()
    compile_model(model, backend=backend)
    sentence = rf"^--compile: torch \S+ cannot compile the model here \(.*{re.escape(str(fault))}.*\): {remedy}$"
    with pytest.raises(UserError, match=sentence), compilation_explained("--compile"):
        use(model, 2, train=False)


def test_compiled_models_on_two_processes_have_the_gradients_of_plain_ones(tmp_path: Path) -> None:
    """Each process has images of its own, the gradients are the mean of both; --grad-checkpointing goes with it."""
    program = """
        import copy
        from tiny_models import CLASSES, MODELS, SIZE, objective_of
        from common.engine import wrap
        from common.placement import compile_model
        launch = dist.detect()
        device = dist.choose_device("cpu", launch)
        dist.start(launch, device, timeout_s=60)
        for checkpointing in (False, True):
            torch.manual_seed(0)
            plain = MODELS["FFVT"]()
            plain.set_grad_checkpointing(checkpointing)
            compiled = copy.deepcopy(plain)
            calls = []
            compile_model(compiled, backend=lambda graph, _: lambda *given: (calls.append(1), graph(*given))[1])
            torch.manual_seed(dist.rank())
            images, labels = torch.randn(2, 3, SIZE, SIZE), torch.randint(CLASSES, (2,))
            for model in (plain, compiled):
                torch.manual_seed(2 + dist.rank())  # dropout
                wrapped = wrap(model, device)
                objective_of(model)(wrapped, images, labels)[0].backward()
            assert calls
            for (name, one), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad, msg=name)
                assert torch.equal(one.grad, dist.broadcast(one.grad)), name
        dist.stop()
        print("done")
    """
    path = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    for status, out, err in processes(program, [each | path for each in torchrun_environments(2)], tmp_path):
        assert (status, out) == (0, "done\n"), err
