"""Untrusted weights, checkpoints, run folders, configurations and command lines, for `faults.fuzz`."""

import argparse
import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from formula import hybrid_spec, npz_array, vit_spec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.earlier import KEPT, check_kept, find_checkpoint, trained_model
from common.errors import UserError
from common.experiment import Experiment, Options, check_numbers, make_model
from common.npz import load_npz
from common.predict import describe_model, describe_transform, load_run
from common.recipe import parse
from common.records import read_record, write_record
from common.results import row_line
from common.train import DRAWS, Training
from common.weights import load_checkpoint, load_weights, read_state_dict
from faults.cases import COMMON, FFVT, GFT, GLSIM, Case
from faults.fuzz import Mutator, Target, cases_of, run_files
from faults.fuzz_bytes import JSON, TEXT, mutate_json
from faults.fuzz_formats import NPZ, SAFETENSORS, TORCH, members, zipped

QUICK, FULL = 42, 400  # files of each target for a unit of its weight
SECTION = "Untrusted files and command lines"
SMALL = dict(img_size=16, patch_size=4, embed_dim=8, num_heads=2, mlp_ratio=2, num_classes=5)
SIZES = dict(hidden_size=8, mlp_dim=16, num_heads=2, num_layers=2, patch_size=4, dropout=0.0)


def _bytes(value: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


# Models, each built once a process, and files of their weights


@cache
def small_vit() -> VisionTransformer:
    return VisionTransformer(**SMALL, depth=1)  # type: ignore[arg-type]


@cache
def small_hybrid() -> nn.Module:
    return timm.create_model("vit_tiny_r_s16_p8_224", depth=1, embed_dim=8, num_heads=2, num_classes=5, img_size=32)


@cache
def small_gft() -> nn.Module:
    from common.models import GFT as Model

    return Model("vit_base_patch16_224", depth=9, **SMALL)  # type: ignore[arg-type]


@cache
def small_ffvt() -> nn.Module:
    from ffvt.model import FFVT as Model

    return Model(SIZES, 16, 5, True, 2)


@cache
def small_transfg() -> nn.Module:
    from glsim.model_utils.transfg import TransFG

    return TransFG(SIZES, 16, 5, 4)


def _npz(arrays: dict[str, Any], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def _plain_arrays(grid: int = 4) -> dict[str, Any]:
    spec = vit_spec(width=8, heads=2, mlp=16, depth=1, grid=grid, classes=5) | {"embedding/kernel": (4, 4, 3, 8)}
    return {key: npz_array(key, shape) for key, shape in spec.items()}


def npz_seeds(folder: Path) -> list[bytes]:
    plain = _plain_arrays()
    half = {key: array.astype(np.float16) for key, array in plain.items()}
    return [_npz(plain), _npz(_plain_arrays(grid=2)), _npz(half), _npz(plain, compressed=True)]


def hybrid_seeds(folder: Path) -> list[bytes]:
    spec = hybrid_spec((), width=8, heads=2, mlp=32, depth=1, grid=1, classes=5) | {"embedding/kernel": (8, 8, 64, 8)}
    arrays = {key: npz_array(key, shape).astype(np.float16) for key, shape in spec.items()}
    return [_npz(arrays, compressed=True)]


def read_npz_file(path: Path) -> None:
    load_npz(small_vit(), path)


def read_hybrid(path: Path) -> None:
    load_npz(small_hybrid(), path)


def _load_both(model: nn.Module, path: Path) -> None:
    """For evaluation, or to start from: half of the files each."""
    if path.stat().st_size % 2:
        load_checkpoint(model, path)
    else:
        load_weights(model, path)


def _safetensors(state: dict[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in state.items()}, {"script": "a", "step": "3"})


def safetensors_seeds(folder: Path) -> list[bytes]:
    state = small_vit().state_dict()
    return [
        _safetensors(state),
        _safetensors({f"module.{name}": tensor.half() for name, tensor in state.items()}),
        _safetensors(VisionTransformer(**SMALL | {"img_size": 8}, depth=1).state_dict()),  # type: ignore[arg-type]
    ]


def torch_seeds(folder: Path) -> list[bytes]:
    state = small_vit().state_dict()
    parameters = {name: nn.Parameter(tensor) for name, tensor in state.items()}
    halves = {f"module.{name}": tensor.half() for name, tensor in state.items()}
    contents = (state, {"state_dict": dict(state), "epoch": 3}, {"model": halves}, parameters)
    return [_bytes(content, legacy) for content in contents for legacy in (False, True)]


def read_into_vit(path: Path) -> None:
    _load_both(small_vit(), path)


def gft_seeds(folder: Path) -> list[bytes]:
    state = small_gft().state_dict()
    released = dict(state) | {"hierarchical_blocks.0.ema_grad": torch.zeros(32, 16)}
    return [_bytes(state), _bytes({"model": released}, legacy=True)]


def read_into_gft(path: Path) -> None:
    _load_both(small_gft(), path)


def ffvt_seeds(folder: Path) -> list[bytes]:
    released = small_ffvt().released_state_dict()  # type: ignore[operator]
    return [_bytes(released), _bytes(released, legacy=True), _bytes(small_ffvt().state_dict())]


def read_into_ffvt(path: Path) -> None:
    """As --pretrained_dir and --eval read it, and as predictions without the data set do."""
    _load_both(small_ffvt(), path)
    read_state_dict(path)


def transfg_seeds(folder: Path) -> list[bytes]:
    released = small_transfg().released_state_dict()  # type: ignore[operator]
    return [_bytes({"model": released}), _bytes(released), _bytes(small_transfg().state_dict(), legacy=True)]


def read_into_transfg(path: Path) -> None:
    _load_both(small_transfg(), path)


# GLSim's checkpoints, which say what model they are of


@cache
def glsim_recipe() -> Any:
    from glsim.train_utils.recipe import Recipe

    sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
    return Recipe(model_name="vit_t4", image_size=16, dynamic_anchor=True, dynamic_top=2, **sizes)  # type: ignore[arg-type]


def glsim_seeds(folder: Path) -> list[bytes]:
    from glsim.model_utils.build import build_model

    model = build_model(glsim_recipe(), 5)
    state = {f"model.{name}": tensor for name, tensor in model.released_state_dict().items()}  # type: ignore[operator]
    config, names = asdict(glsim_recipe()), [f"bird {number}" for number in range(5)]
    theirs = argparse.Namespace(**{name: value for name, value in config.items() if name != "model_kwargs"})
    ours = {"config": config | {"num_classes": 5}, "classes": names, "epoch": 1.0, "accuracy": 0.5, "model": state}
    return [_bytes({"config": theirs, "model": state}), _bytes(ours)]


def read_glsim(path: Path) -> None:
    from glsim.train_utils.trained import load_trained

    load_trained(path, torch.device("cpu"))


# The state that a run is resumed from


def _trainer() -> Any:
    from torch.optim import SGD
    from torch.optim.lr_scheduler import CosineAnnealingLR
    from torch.utils.data import TensorDataset

    from common.amp import Precision
    from common.data.loader import Plan, shuffled
    from common.engine import Loading, Trainer

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    device = torch.device("cpu")
    images: Any = TensorDataset(torch.zeros(8, 4))
    return Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=CosineAnnealingLR(optimizer, 5),
        precision=Precision("fp32", device),
        images=images,
        plan=Plan(shuffled(8, 0), 8, 4, 1, 0, 1),
        steps=10,
        device=device,
        loading=Loading(),
    )


def _training(folder: Path) -> Training:
    """A training that is about to be resumed, as far as the state has a part in it."""
    training = object.__new__(Training)
    training.session = SimpleNamespace(folder=folder)  # type: ignore[assignment]
    training.trainer = _trainer()
    return training


def state_seeds(folder: Path) -> list[bytes]:
    val = {"correct": 3, "total": 4, "top1": 0.75, "loss": 1.0, "split": "val"}
    history = [{"step": 2, "epoch": 1.0, "val": val}]
    sums = {"loss": 1.5, "correct": 3.0, "samples": 8.0}
    trainer = _trainer()
    trainer.model(torch.ones(4, 4)).sum().backward()
    trainer.optimizer.step()
    state = trainer.state_dict() | {"step": 3, "history": history, "best": history[0], "wall_seconds": 3.5}
    state |= {"processes": 1, "batch_size": 4, "epoch_sums": sums, "trained_images": 8, "trained_seconds": 1.5}
    state |= {"draws": DRAWS}
    return [_bytes(state), _bytes(state | {"history": [], "best": None, "epoch_sums": {}})]


def read_state(path: Path) -> None:
    shutil.move(path, path.with_name("last.pt"))
    _training(path.parent)._restore()


# Run folders


def _info(experiment: Any, recipe: Any, model: nn.Module, transform: Any) -> dict[str, Any]:
    return {
        "script": experiment.name,
        "side": "described",
        "demo": False,
        "seed": 1,
        "overrides": {"img_size": 16} if hasattr(recipe, "img_size") else {},
        "options": {name: getattr(Options, name) for name in KEPT},
        "recipe": asdict(recipe),
        "weights": {"source": "none", "sha256": None},
        "data": {name: {"count": 5, "classes": 5, "sha256": "0" * 64} for name in ("train", "val", "test")},
        "architecture": describe_model(model, 5, {}),
        "classes": [f"bird {number}" for number in range(5)],
        "preprocessing": describe_transform(transform),
    }


@cache
def _gft_experiment() -> Any:
    import gft_food101 as script

    return Experiment(script.Recipe, script.data, script.build, script.optimize, "food101", {})


@cache
def _experiments() -> dict[str, tuple[Any, Any, Any]]:
    """Experiment, recipe and a small model of each entry point."""
    import ffvt.train
    import glsim.tools.train
    from glsim.model_utils.build import build_model

    gft = _gft_experiment()
    kwargs = {name: SMALL[name] for name in ("patch_size", "embed_dim", "num_heads", "mlp_ratio")} | {"depth": 9}
    return {
        GFT: (gft, gft.recipe_class(img_size=16, model_kwargs=kwargs), small_gft()),
        FFVT: (ffvt.train.EXPERIMENT, ffvt.train.Recipe("a", img_size=16, model_kwargs=SIZES), small_ffvt()),
        GLSIM: (glsim.tools.train.EXPERIMENT, glsim_recipe(), build_model(glsim_recipe(), 5)),
    }


def _info_seeds(entry: str) -> list[bytes]:
    from torchvision import transforms as T

    experiment, recipe, model = _experiments()[entry]
    transform = T.Compose(
        [T.Resize((18, 18), T.InterpolationMode.BICUBIC), T.CenterCrop(16), T.ToTensor(), T.Normalize([0.5], [0.5])]
    )
    return [json.dumps(_info(experiment, recipe, model, transform), indent=1).encode()]


def _read_info(entry: str, path: Path) -> None:
    """What --eval, --predict and --resume make of a run's folder, and what common.predict builds from it."""
    from common.folders import check_same_experiment

    experiment, recipe, _ = _experiments()[entry]
    shutil.move(path, path.with_name("model.json"))
    folder = path.parent
    (folder / "best.safetensors").write_bytes(_weights(entry))
    options = Options(eval=str(folder))
    found = find_checkpoint(experiment, recipe, options, {})
    info = found.info
    assert info is not None
    check_numbers(experiment, found.recipe, options)
    check_same_experiment(folder, info, asdict(recipe), {}, False, experiment.places)
    check_kept({}, info, folder)
    load_run(folder, torch.device("cpu"))
    trained_model(experiment, found, len(info["classes"]))


@cache
def _weights(entry: str) -> bytes:
    return _safetensors(_experiments()[entry][2].state_dict())


def gft_info_seeds(folder: Path) -> list[bytes]:
    return _info_seeds(GFT)


def ffvt_info_seeds(folder: Path) -> list[bytes]:
    return _info_seeds(FFVT)


def glsim_info_seeds(folder: Path) -> list[bytes]:
    return _info_seeds(GLSIM)


def read_gft_info(path: Path) -> None:
    _read_info(GFT, path)


def read_ffvt_info(path: Path) -> None:
    _read_info(FFVT, path)


def read_glsim_info(path: Path) -> None:
    _read_info(GLSIM, path)


# Records


def record_seeds(folder: Path) -> list[bytes]:
    metrics = {"split": "test", "correct": 3, "total": 4, "top1": 0.75, "top5_correct": 4, "loss": 0.5}
    record = {
        "schema": 1,
        "row": "gft_food101",
        "script": "gft_food101.py",
        "side": "described",
        "status": "finished",
        "excluded": ["demo"],
        "recipe": {"lr": 1e-5},
        "overrides": {},
        "seed": 42,
        "data": {"name": "Food-101", "test": {"count": 4, "classes": 2, "sha256": "0" * 64}},
        "weights": {"source": "a", "sha256": None},
        "selection": {"split": "val", "rule": "highest", "kind": "validation"},
        "results": {"best": {"step": 3, "val": metrics, "test": metrics}, "last": None},
    }
    write_record(folder / "record.json", record)
    write_record(folder / "counts.json", record | {"excluded": [], "results": None})
    return [(folder / name).read_bytes() for name in ("record.json", "counts.json")]


def read_record_file(path: Path) -> None:
    row_line(read_record(path))


# Configuration files


def yaml_seeds(folder: Path) -> list[bytes]:
    from glsim.train_utils.yaml_config import CONFIGS

    names = ("settings/ft_is224.yaml", "augs/medaugs.yaml", "methods/glsim.yaml", "datasets/cub.yaml")
    more = json.dumps({"lr": 0.1, "opt_betas": [0.9, 0.99], "model_kwargs": {"depth": 3}, "clip_grad": None})
    texts = [(CONFIGS / name).read_bytes() for name in names]
    lists = b"defaults: []\nopt_betas: [0.9, 0.999]\nmodel_kwargs: {depth: 3, name: [a, {b: c}]}\nclip_grad: null\n"
    return [*texts, lists, more.encode()]


def read_yaml(path: Path) -> None:
    from glsim.tools.train import EXPERIMENT, Recipe

    Recipe(**EXPERIMENT.configure({"cfg_method": str(path)}))


def yaml_structures() -> SearchStrategy[bytes]:
    import yaml

    words = st.sampled_from(["defaults", "lr", "epochs", "model_kwargs", "opt_betas", "classifier", "sched", "x"])
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary()
    trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=6)
    return st.dictionaries(words | st.integers(), trees).map(lambda tree: yaml.safe_dump(tree).encode())


# Command lines: the words of one, each ended by a zero byte as the system hands them over


def _line(*words: str) -> bytes:
    return "\0".join(words).encode("utf-8", "surrogateescape")


_SHARED = (
    _line("--seed=3", "--epochs", "2", "--demo", "--no-download", "--batch_size", "8"),
    _line("--eval", "runs/a", "--device", "cpu", "--precision", "fp16", "--save-every", "none"),
    _line("--resume", "--output", "a b", "--predict", "x.jpg", "y", "--top", "3", "--out", "a.csv"),
    _line("--model-kwargs", "depth=3", "embed_dim=[1, 2]", "--help"),
)


def gft_lines(folder: Path) -> list[bytes]:
    return [*_SHARED, _line("--lr", "0.1", "--weights=none", "--released", "--workers", "2", "--seed", "none")]


def ffvt_lines(folder: Path) -> list[bytes]:
    name = _line("--name", "a", "")
    ours = _line("--name", "a", "--dataset", "CUB", "--feature_fusion", "--num_steps", "3", "--loss_scale", "0")
    return [
        ours,
        *(name + line.replace(b"--epochs", b"--num_steps").replace(b"--batch", b"--train_batch") for line in _SHARED),
    ]


def glsim_lines(folder: Path) -> list[bytes]:
    words = ("--model_name", "vit_b16", "--no-fp16", "--train_trainval", "--opt_betas", "0.9", "0.9", "--sched", "step")
    return [*_SHARED, _line(*words, "--clip_grad", "none", "--cm", "--no-cm", "--base_lr=1e-3")]


def _mix_words(rng: Any, content: bytes, seeds: Sequence[bytes]) -> bytes:
    words = content.split(b"\0")
    at = rng.randrange(len(words))
    kind = rng.randrange(4)
    if kind == 0:
        words.insert(at, rng.choice(rng.choice(seeds).split(b"\0")))
    elif kind == 1:
        words[at] += b"="
    elif kind == 2:
        words.insert(at, b"")
    else:
        words[at] = b"--" + words[at]
    return b"\0".join(words)


COMMAND_LINE: tuple[Mutator, ...] = (_mix_words, _mix_words, *TEXT)


def _parse_line(entry: str, path: Path) -> None:
    """Read the words, and check them as `start` does before it touches anything."""
    experiment = _experiments()[entry][0]
    words = [word.decode("utf-8", "surrogateescape") for word in path.read_bytes().split(b"\0")]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            recipe, options, *_ = parse(
                experiment.recipe_class,
                Options,
                "",
                words,
                experiment.names,
                experiment.separator,
                experiment.configure if experiment.has_configuration else None,
                experiment.no_flags,
            )
    except SystemExit as leaving:
        if leaving.code == 0:
            return
        line = said.getvalue()
        if leaving.code != 2 or not line.endswith("\n") or ": error: " not in line:
            raise AssertionError(f"status {leaving.code}, {line!r}") from None
        raise UserError(line[:-1]) from None
    check_numbers(experiment, recipe, experiment.mode(recipe, options))


def parse_gft(path: Path) -> None:
    _parse_line(GFT, path)


def parse_ffvt(path: Path) -> None:
    _parse_line(FFVT, path)


def parse_glsim(path: Path) -> None:
    _parse_line(GLSIM, path)


# Pickles that run code, bombs


class Harm:
    """Is pickled as a call; unpickling it anywhere makes the canary file."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _harmful(canary: Path) -> dict[str, Any]:
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    nested = Harm(getattr, Harm(__import__, "os"), "system")
    storage = Harm(torch.storage._load_from_bytes, pickle.dumps(Harm(os.system, command)))
    return {
        "os.system": Harm(os.system, command),
        "eval": Harm(eval, code),
        "exec": Harm(exec, code),
        "subprocess": Harm(subprocess.check_call, ["touch", str(canary)]),
        "a nested reduce": [[Harm(map, nested, [command])], Harm(list, Harm(map, os.system, [command]))],
        "a storage": storage,
        "torch.load": Harm(
            torch.load, Harm(io.BytesIO, _bytes(Harm(os.system, command))), None, Harm(__import__, "pickle")
        ),
    }


def _harmful_files(folder: Path, canary: Path) -> Iterator[Path]:
    """Each harm, bare or inside of what checkpoints hold, in every format that can hold a pickle."""
    state = small_vit().state_dict()
    number = 0
    for harm in _harmful(canary).values():
        wrapped = (
            harm,
            {"model": harm},
            {"model": state, "config": argparse.Namespace(lr=harm)},
            dict(state) | {"head.bias": harm},
        )
        for content in wrapped:
            for suffix, data in (
                (".pth", _bytes(content)),
                (".bin", _bytes(content, legacy=True)),
                (".pt", pickle.dumps(content)),
                (".safetensors", pickle.dumps(content)),
                (".npz", _npz(_plain_arrays() | {"cls": np.array([harm, None], dtype=object)})),
                (".npz", pickle.dumps(content)),
            ):
                path = folder / f"harm{number}{suffix}"
                path.write_bytes(data)
                number += 1
                yield path


def check_harmless(entry: str, folder: Path) -> int:
    """No reader of this entry point makes the canary, or leaves torch more trusting than before."""
    canary, before, trials = folder / "canary", torch.serialization.get_safe_globals(), 0
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(_harmful(canary)["os.system"]))
    assert canary.exists(), "the harm does no harm: this proves nothing"
    canary.unlink()
    for path in _harmful_files(folder, canary):
        for read in READERS[entry]:
            with contextlib.suppress(FileNotFoundError):
                path.with_name("last.pt").unlink()
            try:
                read(path)
            except UserError:
                pass
            else:
                raise AssertionError(f"{path.name} was accepted by {read}")
            assert not canary.exists(), f"{path.name} was executed by {read}"
            trials += 1
        path.unlink()
    assert torch.serialization.get_safe_globals() == before
    return trials


def _eval(entry: str, path: Path) -> None:
    """`--eval FILE`, as far as the file decides."""
    experiment, recipe, _ = _experiments()[entry]
    trained_model(experiment, find_checkpoint(experiment, recipe, Options(eval=str(path)), {}), 5)


def _start(entry: str, path: Path) -> None:
    """`--weights FILE`, --pretrained_dir or --ckpt_path."""
    experiment, recipe, _ = _experiments()[entry]
    make_model(
        experiment,
        recipe=replace(recipe, **{experiment.names.get("weights", "weights"): str(path)}),
        num_classes=5,
        load=True,
    )


def _resume(path: Path) -> None:
    shutil.copy(path, path.with_name("last.pt"))
    _training(path.parent)._restore()


READERS: dict[str, tuple[Callable[[Path], None], ...]] = {
    **{entry: (partial(_eval, entry), partial(_start, entry)) for entry in (GFT, FFVT, GLSIM)},
    COMMON: (_resume, read_into_vit),
}
READERS[GLSIM] += (read_glsim,)

BOMB = 256 << 20  # bytes that a bomb would take


def _bombs() -> dict[str, bytes]:
    """Small files that claim, or unpack to, very much, by their names."""
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cls.npy", bytes(BOMB))
    whole = members(_bytes(small_vit().state_dict()))
    assert whole is not None
    deflated = zipped([(n, c + bytes(BOMB) * n.endswith("/byteorder"), zipfile.ZIP_DEFLATED) for n, c, _ in whole])
    calls = b"\x80\x02c__builtin__\nbytearray\nJ" + BOMB.to_bytes(4, "little") + b"\x85R."
    memo = b"\x80\x02Nr" + (BOMB >> 3).to_bytes(4, "little") + b"."
    claim = b"\x80\x05\x96" + BOMB.to_bytes(8, "little") + b"."
    shared = b"K\x01K\x02\x86" + b"q\0h\0\x86" * 60  # tuples of two, each of them the next one twice
    pickled = {
        "bytearray": calls,
        "bytearray8": claim,
        "memo": memo,
        "key": b"\x80\x02}(" + shared + b"K\x01u.",
        "dict": b"\x80\x02(" + shared + b"K\x01d.",
        "set": b"\x80\x04\x8f(" + shared + b"\x90.",
        "frozenset": b"\x80\x04(" + shared + b"\x91.",
    }
    inside = {
        f"{name}.pth": zipped([(n, data if n.endswith("data.pkl") else c, 0) for n, c, _ in whole])
        for name, data in pickled.items()
    }
    return {
        "deflated.npz": zeros.getvalue(),
        "deflated.pth": deflated,
        **inside,
        **{f"{name}.bin": data * 5 for name, data in pickled.items()},
        "expanded.pth": _bytes(
            dict(small_vit().state_dict()) | {"pos_embed": torch.zeros(1, 1, 8).expand(1, 4096**2 + 1, 8)}
        ),
    }


def check_bombs(folder: Path) -> int:
    """In a process of their own: memory and time are those of the harness."""
    for name, content in _bombs().items():
        target = replace(TARGETS[0 if name.endswith(".npz") else 3], suffix=Path(name).suffix)
        figures = run_files(target, [content])
        assert not figures.failures, f"{name}: {figures.failures[0]}"
        assert figures.refused == 1, f"{name} was accepted"
    return len(_bombs())


_INFO: tuple[Mutator, ...] = (*(mutate_json,) * 20, *JSON)

TARGETS = [
    Target(".npz of a ViT", COMMON, npz_seeds, read_npz_file, NPZ, ".npz", weight=6),
    Target(".npz of a hybrid ViT", COMMON, hybrid_seeds, read_hybrid, NPZ, ".npz", weight=2),
    Target("weights in .safetensors", COMMON, safetensors_seeds, read_into_vit, SAFETENSORS, ".safetensors", weight=10),
    Target("weights in .pth, .pt or .bin", COMMON, torch_seeds, read_into_vit, TORCH, ".pth", weight=6),
    Target("a checkpoint of the authors or ours", GFT, gft_seeds, read_into_gft, TORCH, ".pth"),
    Target("a checkpoint of the authors or ours", FFVT, ffvt_seeds, read_into_ffvt, TORCH, ".bin", weight=3),
    Target("a checkpoint of the authors or ours", GLSIM, glsim_seeds, read_glsim, TORCH, ".pth"),
    Target("a checkpoint of TransFG", GLSIM, transfg_seeds, read_into_transfg, TORCH, ".pth", weight=3),
    Target("last.pt, the state to resume from", COMMON, state_seeds, read_state, TORCH, ".pt", weight=6),
    Target("model.json of a run", GFT, gft_info_seeds, read_gft_info, _INFO, ".json", weight=2),
    Target("model.json of a run", FFVT, ffvt_info_seeds, read_ffvt_info, _INFO, ".json", weight=3),
    Target("model.json of a run", GLSIM, glsim_info_seeds, read_glsim_info, _INFO, ".json"),
    Target("record.json of a run", COMMON, record_seeds, read_record_file, JSON, ".json", weight=12),
    Target(
        "a configuration file", GLSIM, yaml_seeds, read_yaml, (*JSON, *TEXT * 3), ".yaml", yaml_structures, weight=4
    ),
    Target("a command line", GFT, gft_lines, parse_gft, COMMAND_LINE),
    Target("a command line", FFVT, ffvt_lines, parse_ffvt, COMMAND_LINE),
    Target("a command line", GLSIM, glsim_lines, parse_glsim, COMMAND_LINE),
]


def cases() -> list[Case]:
    never = "refused, and never executed"
    return [
        *(
            Case(SECTION, "pickles that run code", entry, never, "all", partial(check_harmless, entry), quick=True)
            for entry in (GFT, FFVT, GLSIM, COMMON)
        ),
        Case(SECTION, "weights that unpack to gigabytes", COMMON, "refused in one sentence", "all", check_bombs, True),
        *cases_of(SECTION, TARGETS, quick=QUICK, full=FULL),
    ]
