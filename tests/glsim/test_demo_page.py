"""glsim.tools.demo: what it answers, what it refuses, and the page itself in a headless Chromium.

The browser test needs Gradio and Playwright (extra `demo`, and pip install playwright) and Debian's chromium.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

from common.errors import UserError
from glsim.data_utils.transforms import transforms
from glsim.model_utils.build import build_model
from glsim.model_utils.glsim import ViTGLSim, bounding_boxes
from glsim.model_utils.timm_glsim import GLSimTimm
from glsim.tools import demo
from glsim.train_utils.settings import Settings
from glsim.train_utils.trained import Trained

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["Ash", "Birch", "Cedar", "Dogwood", "Elm", "Fir", "Gorse"]
TINY = dict(
    **dict(image_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2),
    **dict(reducer="cls", aggregator=True, aggregator_norm=True, dynamic_anchor=True, dynamic_top=3),
)


def trained(seed: int = 0, **changes: Any) -> Trained:
    settings = Settings(**(TINY | changes))
    torch.manual_seed(seed)
    model: Any = build_model(settings, len(CLASSES))
    nn.init.normal_(model.get_classifier().weight, std=0.2)
    return Trained(model.eval(), settings, CLASSES, transforms(settings)[1])


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with edges and colours, larger than what the model sees and not square."""
    rows, columns = np.mgrid[:240, :320]
    disc = ((rows - 90) ** 2 + (columns - 200) ** 2 < 55**2)[..., None]
    ground = np.stack((rows, columns * 0.7, 255 - rows), axis=-1)
    path = tmp_path_factory.mktemp("photograph") / "disc.jpg"
    Image.fromarray(np.where(disc, [250, 180, 20], ground).astype(np.uint8)).save(path, quality=95)
    return path


# What is answered


@pytest.mark.parametrize("name", ["vit_b16", "glsvit_tiny_patch16_224"])
def test_the_answer_is_what_the_model_says(name: str, photograph: Path) -> None:
    sizes = (
        {}
        if name == "vit_b16"
        else dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"))
    )
    model = trained(model_name=name, **sizes)
    assert isinstance(model.model, ViTGLSim if name == "vit_b16" else GLSimTimm)
    looker = demo.Looker(lambda name: model)
    assert looker.top("any") == (3, 16)

    answer = looker(photograph, "any", 5, "none")
    with torch.no_grad():
        image = T.ToTensor()(Image.open(photograph).resize((85, 85), Image.Resampling.BICUBIC).crop((10, 10, 74, 74)))
        seen = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(image)[None]
        logits, crops = model.model(seen)
    probabilities = dict(zip(CLASSES, logits.softmax(-1)[0].tolist(), strict=True))
    best = sorted(probabilities, key=lambda name: -probabilities[name])[:5]
    assert list(answer.classes) == best
    assert list(answer.classes.values()) == pytest.approx([probabilities[name] for name in best], abs=1e-5)
    assert answer.crop is not None
    assert answer.crop.size == answer.map.size == (448, 448)
    picture = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).resize((448, 448))
    assert np.abs(np.asarray(answer.map, int) - np.asarray(picture)).max() <= 1  # no mask: what the model sees
    colours = np.asarray(answer.crop.resize((64, 64)), float) / 255
    expected = crops[0].permute(1, 2, 0).numpy() * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406)
    assert np.abs(colours - expected).mean() < 0.01


def test_the_crop_is_drawn_around_as_many_patches_as_asked_for(photograph: Path) -> None:
    model = trained()
    looker = demo.Looker(lambda name: model)
    boxes = []
    for top in (1, 16):
        looker(photograph, "any", top, "none")
        found = model.model.select(torch.randn(1, 17, 64))
        assert found.indices.shape == (1, top)
        boxes.append(bounding_boxes(found.indices, 4, 16).tolist())
    assert boxes[1] == [[0, 48, 0, 48]]  # as published, without the last row and column
    for top in (0, 17):
        with pytest.raises(UserError, match="this model cuts a picture into 16 patches: choose 1 to 16 of them"):
            looker(photograph, "any", top, "none")


# What the command line finds


def test_checkpoints_are_called_by_folder_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ckpts/cub.pth", "ckpts/cars.pth", "ckpts/ViT-B_16.npz", "runs/one/model.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert list(demo.find_checkpoints([])) == ["ckpts/cars", "ckpts/cub"]
    assert demo.find_checkpoints(["runs/one", "ckpts/cub.pth"]) == {
        "runs/one": Path("runs/one"),
        "ckpts/cub": Path("ckpts/cub.pth"),
    }
    with pytest.raises(UserError, match="have one name"):
        demo.find_checkpoints(["ckpts/cub.pth", str(tmp_path / "ckpts/cub.pth")])
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(UserError, match=r"ckpts/ holds no \.pth file"):
        demo.find_checkpoints([])


# The page


@dataclass
class Page:
    port: int
    checkpoint: Path  # one of the two that it offers
    temporary: Path  # where it keeps what visitors send
    process: "subprocess.Popen[str]"

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")

    def ask(self, picture: Any, checkpoint: str = "models/one", top: int = 3, mask: str = "rollout") -> dict[str, Any]:
        """What the page's button does, without the page."""
        config = json.loads(self.request("GET", "/config")[1])
        button = next(part["id"] for part in config["components"] if part["props"].get("value") == "Look")
        number = next(d["id"] for d in config["dependencies"] if [button, "click"] in d["targets"])
        question = {"data": [picture, checkpoint, top, mask], "fn_index": number, "session_hash": f"s{time.time_ns()}"}
        status, text = self.request(
            "POST", "/gradio_api/queue/join", json.dumps(question), **{"Content-Type": "application/json"}
        )
        assert status == 200, text
        _, events = self.request("GET", f"/gradio_api/queue/data?session_hash={question['session_hash']}")
        answers = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
        return next(answer for answer in answers if answer["msg"] == "process_completed")

    def upload(self, content: bytes, name: str = "a.jpg") -> tuple[int, str]:
        body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="%b"\r\n\r\n' % name.encode()
        return self.request(
            "POST",
            "/gradio_api/upload",
            body + content + b"\r\n--b--\r\n",
            **{"Content-Type": "multipart/form-data; boundary=b"},
        )


def sent(path: str) -> dict[str, Any]:
    """A file in the form in which Gradio's own page names it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The program as the README starts it, with two checkpoints in the authors' layout."""
    pytest.importorskip("gradio", reason="the demo page needs Gradio: pip install -e '.[demo]'")
    folder = tmp_path_factory.mktemp("page")
    temporary = folder / "temporary"
    for path in (folder / "models", temporary):
        path.mkdir()
    for seed, name in enumerate(("one", "two")):
        model = trained(seed)
        state = {f"model.{key}": value for key, value in model.model.released_state_dict().items()}
        config = Namespace(**asdict(model.settings))
        torch.save({"config": config, "model": state, "classes": CLASSES}, folder / "models" / f"{name}.pth")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    checkpoints = [str(folder / "models" / f"{name}.pth") for name in ("one", "two")]
    command = [sys.executable, "tools/demo.py", "--demo", "--ckpt_path", *checkpoints, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=ROOT / "glsim",
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != f"The page is at http://127.0.0.1:{port}/ until Ctrl-C.\n":
        process.kill()
        pytest.fail(line + process.communicate()[0])
    yield Page(port, Path(checkpoints[0]), temporary, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert list(temporary.iterdir()) == []  # what visitors sent is gone


def test_visitors_get_no_files(page: Page) -> None:
    mine = next(page.temporary.glob("glsim-*"))
    digit = next(mine.glob("demo-data/**/*.jpg"))
    for path in ("/etc/passwd", str(page.checkpoint), str(digit), str(ROOT / "README.md"), "tools/demo.py"):
        status, text = page.request("GET", f"/gradio_api/file={path}")
        assert (status, "not allowed" in text) == (403, True), path
    # Nor does the page fetch those of this machine's other servers for them.
    assert page.request("GET", f"/gradio_api/file=http://127.0.0.1:{page.port}/config")[0] != 200


def test_visitors_name_no_files(page: Page, photograph: Path, tmp_path: Path) -> None:
    uploaded = sent(json.loads(page.upload(photograph.read_bytes())[1])[0])
    assert page.ask(uploaded)["success"] is True
    for path in ("/etc/passwd", str(page.checkpoint), "README.md", str(photograph), f"http://127.0.0.1:{page.port}"):
        refused = page.ask(sent(path))
        assert (refused["success"], refused["output"]) == (False, {"error": None}), path  # it was not even looked at
    assert page.ask(uploaded, checkpoint=str(page.checkpoint))["success"] is False
    assert page.ask(uploaded, checkpoint="models/three")["success"] is False
    assert page.ask(uploaded, mask="../rollout")["success"] is False
    assert page.ask(uploaded, top=17)["success"] is False
    assert page.request("GET", "/gradio_api/runs")[0] == 404


def test_what_is_no_picture_is_a_sentence(page: Page, tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 50 kB; decoded it would be 1.2 GB
    for content in (b"no picture", b"<svg></svg>", (tmp_path / "bomb.png").read_bytes()):
        uploaded = sent(json.loads(page.upload(content)[1])[0])
        assert page.ask(uploaded)["output"]["error"] == "This file cannot be read as a picture."
    assert page.ask(None)["output"]["error"] == "Choose a picture first."
