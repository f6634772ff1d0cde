"""Single promises about files from anywhere."""

import io
import time
import tracemalloc
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from common import pickles
from common.building import built_for
from common.checkpoint import check_like, check_optimizer_state
from common.errors import LONGEST, UserError, brief, on_one_line
from common.reading import JSON_BYTES, read_json, read_text
from common.recipe import check_value
from common.weights import load_checkpoint, read_state_dict
from glsim.train_utils.recipe import Recipe
from glsim.train_utils.yaml_config import MOST_BYTES, read_config

# Sentences


def test_words_of_a_file_stay_on_one_line_of_the_screen() -> None:
    assert str(UserError("a\nb\x1b[2J\u202ec é")) == r"a\nb\x1b[2J\u202ec é"
    long = str(UserError("begin" + "\n" * 10**6 + "end"))
    assert len(long) < 1.2 * LONGEST
    assert long.startswith(r"begin\n")
    assert long.endswith("end")


def test_values_are_shown_briefly() -> None:
    laughs: Any = "ha"
    for _ in range(60):
        laughs = [laughs] * 9
    assert len(brief(laughs)) < 3000
    assert brief(1 << 99999) == "<an integer of 100000 bits>"
    assert brief({"a": [1, None]}) == "{'a': [1, None]}"


# Text


def test_no_more_is_read_than_a_text_may_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_text(Path("/dev/zero"), 10)
    (tmp_path / "a").write_text("0123456789")
    assert read_text(tmp_path / "a", 10) == "0123456789"
    (tmp_path / "a").write_bytes(b" " * (JSON_BYTES + 1))
    with pytest.raises(ValueError, match="more than"):
        read_json(tmp_path / "a")
    (tmp_path / "a").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="brackets"):
        read_json(tmp_path / "a")


LAUGHS = "\n".join(
    ["a: &a [ha]", *(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True))]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"an alias \(\*name\) is not understood"),
        ("model_kwargs: &a {b: *a}", "an alias"),
        ("lr: !!python/object/apply:os.system ['touch canary']", "is not YAML .*python/object/apply:os.system"),
        ("lr: !!python/name:os.system", "is not YAML"),
        ("[" * 9000, "is not YAML"),
        ("defaults: [/dev/zero]", f"/dev/zero is not YAML .it has more than {MOST_BYTES:,} bytes"),
        ('defaults: ["a\\0"]', "expected a list of files"),
        (f"batch_size: 0x{'f' * 5000}", "batch_size: <an integer of 20000 bits> is of the wrong type"),
        ("batch_size: 99999999999999999999", "is of the wrong type"),
        ("model_kwargs: {a: 2024-11-05}", "is of the wrong type"),
        (f"model_kwargs: {{a: [{'1,' * 2000}]}}", "is of the wrong type"),
    ],
)
def test_configurations(tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path / "a.yaml", Recipe)
    assert on_one_line(str(caught.value))
    assert not (tmp_path / "canary").exists()


def test_defaults_of_defaults_end(tmp_path: Path) -> None:
    """Twelve files that name the next one nine times each are 9^12 files to be read."""
    for number in range(12):
        (tmp_path / f"{number}.yaml").write_text(f"defaults: [{', '.join([f'{number + 1}.yaml'] * 9)}]")
    (tmp_path / "12.yaml").write_text("lr: 1")
    with pytest.raises(UserError, match="more than 64 files"):
        read_config(tmp_path / "0.yaml", Recipe)


def test_arguments_of_a_pickled_configuration_have_a_json_form() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value in ({"a": circle}, {"a": torch.ones(1)}, {"a": Namespace()}, {torch.float: 1}):
        with pytest.raises(UserError, match=r"x\.pth: model_kwargs: .* is of the wrong type"):
            check_value("x.pth", "model_kwargs", value, Recipe)
    assert check_value("x.pth", "model_kwargs", {"a": [1, {"b": None}]}, Recipe) == {"a": [1, {"b": None}]}


# Pickles


def zipped(content: Any, change: Any) -> bytes:
    """A file of PyTorch whose members went through `change(name, bytes)`, which returns bytes and compression."""
    buffer, result = io.BytesIO(), io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(result, "w") as out:
        for name in archive.namelist():
            out.writestr(name, *change(name, archive.read(name)))
    return result.getvalue()


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    return str(caught.value)


def test_what_needs_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pth", {"a": torch.ones(40000)}
    assert "compressed" in refusal(path, zipped(state, lambda name, data: (data, zipfile.ZIP_DEFLATED)))
    huge = (40001).to_bytes(4, "little")  # numbers, where the record has 40000

    def grow(name: str, data: bytes) -> tuple[bytes, int]:
        return data.replace((40000).to_bytes(2, "little") + b"t", huge[:2] + b"t"), zipfile.ZIP_STORED

    assert "damaged" in refusal(path, zipped(state, grow))
    storage = b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\xff\xff\xff\x7ftQ."
    assert "its tensors need 42949672940 bytes" in refusal(path, storage * pickles.LEGACY_PICKLES)
    expanded = {"a": torch.zeros(1).expand(10**6, 10**6)}
    torch.save(expanded, path)
    with pytest.raises(UserError, match=r"has a \(1000000, 1000000\) of type float32: expected plain numbers"):
        read_state_dict(path)


SHARED = b"K\x01K\x02\x86" + b"q\0h\0\x86" * 30  # tuples of two, each of them the next one twice: 2^30 to be hashed
ATTACKS = {
    "SETITEMS": (b"}(" + SHARED + b"K\x01u", "a key that is neither text nor number"),
    "SETITEM": (b"}" + SHARED + b"K\x01s", "a key that is neither text nor number"),
    "DICT": (b"(" + SHARED + b"K\x01d", r"the pickle operation b'd'"),
    "ADDITEMS": (b"\x8f(" + SHARED + b"\x90", r"the pickle operation b'\x8f'"),
    "FROZENSET": (b"(" + SHARED + b"\x91", r"the pickle operation b'\x91'"),
    "BYTEARRAY8": (b"\x96" + (600_000_000).to_bytes(8, "little"), r"the pickle operation b'\x96'"),
    "EXT1": (b"\x82\x01", r"the pickle operation b'\x82'"),
    "INST": (b"(icollections\nOrderedDict\n", r"the pickle operation b'i'"),
    "OBJ": (b"(ccollections\nOrderedDict\no", r"the pickle operation b'o'"),
    "pairs of a state": (b"ccollections\nOrderedDict\n)R]" + SHARED + b"K\x01\x86ab", "a state of something"),
    "a state of a class": (b"ccollections\nOrderedDict\n}b", "a state of something"),
    "pairs of a dictionary": (b"ccollections\nOrderedDict\n]" + SHARED + b"K\x01\x86a\x85R", "no arguments"),
}


@contextmanager
def within(seconds: float, peak: int) -> Iterator[None]:
    """Fails where the processor was busy for longer, or Python had more than `peak` bytes at a time."""
    start = time.process_time()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < peak
        assert time.process_time() - start < seconds
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_small_pickle_takes_neither_time_nor_memory(tmp_path: Path, name: str, legacy: bool) -> None:
    operations, reason = ATTACKS[name]
    pickled = b"\x80\x02" + operations + b"."
    if not legacy:
        pickled = zipped({"a": 1}, lambda n, data: (pickled if n.endswith("data.pkl") else data, zipfile.ZIP_STORED))
    with within(seconds=2, peak=16 << 20):
        said = refusal(tmp_path / "a.pth", pickled)
    assert reason in said


@pytest.mark.parametrize(
    "call", [b"c__builtin__\nbytearray\nJ\0\0\0\x10\x85R", b"ctorch\nFloatTensor\nJ\0\0\0\x10\x85R"]
)
def test_nothing_that_torch_lets_through_and_no_state_needs(tmp_path: Path, call: bytes) -> None:
    content = zipped(
        {"a": 1},
        lambda name, data: (b"\x80\x02" + call + b"." if name.endswith("data.pkl") else data, zipfile.ZIP_STORED),
    )
    name = call[1:].split(b"\nJ")[0].decode().replace("\n", ".")
    assert f"holds a pickled {name} besides tensors" in refusal(tmp_path / "a.pth", content)


def test_all_that_states_and_released_files_hold_is_let_through(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "config": Namespace(lr=0.1, betas=(0.9, 0.99), size=torch.Size([3]), device=torch.device("cpu")),
        "kinds": [
            torch.zeros(2, dtype=kind) for kind in (torch.half, torch.bfloat16, torch.bool, torch.uint8, torch.int64)
        ],
        "plain": [None, True, 10**30, 2.5, "é", {"a": [()]}],
    }
    before = torch.serialization.get_safe_globals()
    for zipformat in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipformat)
        found = pickles.load(tmp_path / "a.pth", namespace=True)
        assert found["config"] == content["config"]
        assert found["plain"] == content["plain"]
        assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
        with pytest.raises(pickles.Refused, match=r"argparse\.Namespace"):
            pickles.load(tmp_path / "a.pth")
    assert torch.serialization.get_safe_globals() == before


def test_a_quantised_file_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    torch.save({name: tensor.to(torch.int8) for name, tensor in model.state_dict().items()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"has weight as int8, this model needs float32"):
        load_checkpoint(model, tmp_path / "a.pth")
    torch.save({"weight": torch.ones(2, 2, dtype=torch.complex64)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"pickled torch\.ComplexFloatStorage"):
        load_checkpoint(model, tmp_path / "a.pth")


# Models


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 3000},
        {"depth": 10**7},
        {"embed_dim": 1 << 20},
        {"img_size": 1 << 16},
        {"num_classes": 10**9},
        {"depth": "a"},
    ],
)
def test_a_model_is_no_larger_than_its_weights(tmp_path: Path, arguments: dict[str, Any]) -> None:
    (tmp_path / "a.pth").write_bytes(bytes(1000))
    small = {"embed_dim": 8, "num_heads": 2, "depth": 1, "img_size": 32}
    refused = pytest.raises(UserError, match=r"model\.json describes no model that can be built here")
    with refused, built_for(tmp_path / "a.pth", tmp_path / "model.json"):
        timm.create_model("vit_tiny_patch16_224", **(small | arguments))
    with built_for(tmp_path / "a.pth", tmp_path / "model.json"):
        model = timm.create_model("vit_tiny_patch16_224", **small)
    assert len(model.blocks) == 1


# The state to resume from


def test_a_state_is_held_against_that_of_the_run() -> None:
    own = {"model": {"a": torch.ones(2)}, "step": 3, "rate": 0.5, "window": [0.0, 0.0], "parts": [{}], "loss": None}
    check_like(own, own, "state")
    check_like(own | {"rate": 1, "parts": [{}, {}], "loss": "x", "more": 1}, own, "state")
    for change in (
        {"model": {"a": torch.ones(3)}},
        {"model": {"a": torch.ones(2).long()}},
        {"model": 3},
        {"step": 3.0},
        {"step": True},
        {"rate": "x"},
        {"window": [0.0]},
        {"window": [0.0, "x"]},
        {"parts": [3]},
    ):
        with pytest.raises(ValueError, match=rf"state\.{next(iter(change))}"):
            check_like(own | change, own, "state")


def test_an_optimizers_state_is_no_larger_than_its_parameters() -> None:
    parameters = [torch.ones(2, 3)]
    check_optimizer_state(
        {0: {"momentum": torch.ones(2, 3), "row": torch.ones(2), "step": 3, "none": None}}, parameters
    )
    for state in ({1: {}}, {"0": {}}, {0: []}, {0: {"momentum": torch.ones(9)}}, {0: {"momentum": "x"}}, []):
        with pytest.raises(ValueError, match="optimizer"):
            check_optimizer_state(state, parameters)
