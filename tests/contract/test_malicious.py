"""Files from anywhere that would run code, or write elsewhere: refused in one sentence that names them.

Each has a twin without the malice, which is made and handed over in the same way, and works. What the attacks do where
nothing refuses them is seen first: they make a folder, the trap.
"""

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from formula import npz_array, vit_spec
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10

from contract.programs import PROGRAMS, SMALL, new_home, reference, run, start

TRAP = "trap"
OUTSIDE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # where nothing answers
VIT = ("patch_size=4", "embed_dim=16", "depth=2", "num_heads=2", "mlp_ratio=2")
FUSED = ("patch_size=4", "hidden_size=16", "mlp_dim=32", "num_heads=2", "num_layers=3", "dropout=0")


class Code:
    """Unpickled where code may run, it makes a folder."""

    def __init__(self, trap: Path) -> None:
        self.trap = str(trap)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trap,)


def torch_file(file: Path, content: dict[str, Any], trap: Path | None) -> None:
    torch.save(content | ({"code": Code(trap)} if trap else {}), file)


def old_torch_file(file: Path, content: dict[str, Any], trap: Path | None) -> None:
    """As torch wrote it before 1.6: pickles one after the other."""
    content = content | ({"code": Code(trap)} if trap else {})
    torch.save(content, file, _use_new_zipfile_serialization=False)


def npz_file(file: Path, content: dict[str, Any], trap: Path | None) -> None:
    np.savez(file, **content | ({"code": np.array([Code(trap)], dtype=object)} if trap else {}))


def pickle_named_npz(file: Path, content: dict[str, Any], trap: Path | None) -> None:
    """`np.load` unpickles what is no archive, whatever it is called."""
    file.write_bytes(pickle.dumps(Code(trap))) if trap else np.savez(file, **content)


def read_torch(file: Path) -> None:
    torch.load(file, weights_only=False)


def read_npz(file: Path) -> None:
    found = np.load(file, allow_pickle=True)
    assert found["code"] is not None


def read_pickled_npz(file: Path) -> None:
    np.load(file, allow_pickle=True)


def vit_arrays() -> dict[str, Any]:
    """A Google ViT with patches of 4 pixels for the demo's 16."""
    spec = vit_spec(width=16, heads=2, mlp=32, depth=3) | {"embedding/kernel": (4, 4, 3, 16)}
    return {key: npz_array(key, shape) for key, shape in spec.items()}


def vit_of_two() -> dict[str, Any]:
    return {key: array for key, array in vit_arrays().items() if "encoderblock_2" not in key}


def gft_weights() -> dict[str, Any]:
    return load_file(reference("gft").folder / "best.safetensors")


def published(name: str) -> dict[str, Any]:
    return torch.load(reference(name).home / PROGRAMS[name].published[0], weights_only=True)


BRIEF = ("--epochs", "1", "--batch-size", "16", "--workers", "0")
NEW_FFVT = (
    *("--name=n", "--dataset", "CUB", "--data_root", "runs/demo-data", "--limit", "16", "--num_steps", "1"),
    *("--img_size", "16", "--resize_size", "16", "--num_token", "2", "--workers", "0", "--train_batch_size", "16"),
    *("--feature_fusion", "--output", "runs", "--model_kwargs", *FUSED),
)
GLSIM = ("glsim/tools/train.py", *PROGRAMS["glsim"].other())
Write = Callable[[Path, dict[str, Any], Path | None], None]
# name of the file; how it is written, and read without care; what is in it; the words in front of its name
FILES: dict[str, tuple[str, Write, Callable[[Path], None], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "gft-weights": (
        *("w.pth", torch_file, read_torch, gft_weights),
        ("gft_food101.py", *SMALL, *BRIEF, "--weights"),
    ),
    "gft-eval": (
        "w.pth",
        old_torch_file,
        read_torch,
        gft_weights,
        ("gft_food101.py", *PROGRAMS["gft"].other("--eval")),
    ),
    "gft-npz": (
        *("w.npz", npz_file, read_npz, vit_of_two),
        ("vit_food101.py", *SMALL, *BRIEF, "--model-kwargs", *VIT, "--weights"),
    ),
    "gft-pickle-named-npz": (
        *("w.npz", pickle_named_npz, read_pickled_npz, vit_of_two),
        ("vit_food101.py", *SMALL, *BRIEF, "--model-kwargs", *VIT, "--weights"),
    ),
    "ffvt-eval": (
        *("w.bin", torch_file, read_torch, lambda: published("ffvt")),
        ("ffvt/train.py", *PROGRAMS["ffvt"].other("--dataset", "CUB", "--feature_fusion", "--eval")),
    ),
    "ffvt-npz": ("w.npz", npz_file, read_npz, vit_arrays, ("ffvt/train.py", *NEW_FFVT, "--pretrained_dir")),
    "glsim-checkpoint": (
        *("w.pth", torch_file, read_torch, lambda: published("glsim")),
        (*GLSIM, "--test_only", "--ckpt_path"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_weights(case: str, tmp_path: Path) -> None:
    name, write, read, content, words = FILES[case]
    home, trap = new_home(tmp_path / "home", case.partition("-")[0]), tmp_path / TRAP
    file = tmp_path / name
    write(file, content(), trap)
    read(file)
    trap.rmdir()
    run([*words, file], home).sentence(str(file))
    assert not trap.exists()
    write(file, content(), None)
    run([*words, file], home).done()


@pytest.mark.parametrize("name", ["gft", "ffvt", "glsim"])
def test_a_state_to_resume_from(name: str, tmp_path: Path) -> None:
    program, home, trap = PROGRAMS[name], new_home(tmp_path / "home", name), tmp_path / TRAP
    like = reference(name).folder
    folder = home / like.relative_to(reference(name).home)
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("record.json"))
    last = folder / "last.pt"
    content = torch.load(last, weights_only=True)
    torch_file(last, content, trap)
    read_torch(last)
    trap.rmdir()
    words = [program.file, *program.other("--resume", folder)]
    run(words, home).sentence(str(last))
    assert not trap.exists()
    torch_file(last, content, None)
    run(words, home).done()


@pytest.mark.parametrize("name", ["gft"])
def test_a_run_folder_that_names_a_pickle(name: str, tmp_path: Path) -> None:
    """timm's models load what `checkpoint_path` names, and a run's folder says the arguments of its model."""
    home, trap = new_home(tmp_path / "home", name), tmp_path / TRAP
    folder = shutil.copytree(reference(name).folder, tmp_path / "run")
    torch_file(tmp_path / "w.pth", {}, trap)
    read_torch(tmp_path / "w.pth")
    trap.rmdir()
    described = (folder / "model.json").read_text()
    words = [PROGRAMS[name].file, *PROGRAMS[name].other("--eval", folder)]
    run(words, home).done()
    place = f'"checkpoint_path": "{tmp_path / "w.pth"}", "patch_size":'
    assert '"patch_size":' in described
    (folder / "model.json").write_text(described.replace('"patch_size":', place))
    assert run(words, home).status == 1
    assert not trap.exists()


@pytest.mark.parametrize(
    ("flag", "tag"), [("--cfg", "object/apply"), ("--cfg_method", "object/new")], ids=["glsim-cfg", "glsim-cfg_method"]
)
def test_a_configuration(flag: str, tag: str, tmp_path: Path) -> None:
    home, trap, file = new_home(tmp_path / "home", "glsim"), tmp_path / TRAP, tmp_path / "c.yaml"
    words = [*GLSIM, "--limit", "16", "--epochs", "2", "--warmup_steps", "1", flag, file]
    for place in (file, tmp_path / "named.yaml"):  # in it, or in what its `defaults` name
        file.write_text("defaults: [named.yaml]")
        place.write_text(f"sd: !!python/{tag}:os.mkdir ['{trap}']\n")
        yaml.unsafe_load(place.read_text())
        trap.rmdir()
        run(words, home).sentence(str(place))
        assert not trap.exists()
    (tmp_path / "named.yaml").write_text("sd: 0.1\n")
    run(words, home).done()


def tar_of(folder: str, *members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    plain = tarfile.TarInfo(f"{folder}/plain")
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member, content in ((plain, b"plain"), *members):
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


AIRCRAFT = "fgvc-aircraft-2013b"
MEMBERS: dict[str, Callable[[Path], list[tuple[tarfile.TarInfo, bytes]]]] = {
    "above": lambda trap: [(tarfile.TarInfo(f"{AIRCRAFT}/../../{trap.name}"), b"")],
    "absolute": lambda trap: [(tarfile.TarInfo(str(trap)), b"")],
    "through a link": lambda trap: [
        link(f"{AIRCRAFT}/out", str(trap.parent)),
        (tarfile.TarInfo(f"{AIRCRAFT}/out/{trap.name}"), b""),
    ],
}


@pytest.mark.parametrize("case", MEMBERS)
def test_an_archive(case: str, tmp_path: Path) -> None:
    """One that lies where the downloaded one would."""
    root, trap = tmp_path / "data", tmp_path / TRAP
    root.mkdir()
    file = root / f"{AIRCRAFT}.tar.gz"
    words = ["gft_fgvcaircraft.py", "--data-root", root, "--weights", "none", "--workers", "0"]
    file.write_bytes(tar_of(AIRCRAFT, *MEMBERS[case](trap)))
    with tarfile.open(file) as archive:
        archive.extractall(root, filter="fully_trusted")
    assert trap.exists()
    trap.unlink()
    shutil.rmtree(root / AIRCRAFT)
    refused = start(words, tmp_path, environment=OUTSIDE).end()
    assert refused.status == 1
    assert not trap.exists()
    if case == "absolute":  # Python's filter puts it below the folder of the archive
        return
    assert str(file) in refused.err.splitlines()[-1]
    assert not (root / AIRCRAFT).exists()
    file.write_bytes(tar_of(AIRCRAFT))
    start(words, tmp_path, environment=OUTSIDE).end()
    assert (root / AIRCRAFT / "plain").read_bytes() == b"plain"


def test_a_zip_archive(tmp_path: Path) -> None:
    root, trap = tmp_path / "data" / "coco", tmp_path / TRAP
    root.mkdir(parents=True)
    file = root / "annotations_trainval2017.zip"
    words = ["gft_coco.py", "--data-root", root.parent, "--weights", "none", "--workers", "0"]
    for malice in (f"annotations/../../../{trap.name}", str(trap), ""):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("annotations/plain", "plain")
            if malice:
                archive.writestr(malice, "")
                assert Path(os.path.normpath(root / archive.namelist()[-1])) == trap
        outcome = start(words, tmp_path, environment=OUTSIDE).end()
        assert outcome.status == 1
        assert not trap.exists()  # Python puts it below the folder of the archive
    assert (root / "annotations" / "plain").exists()


def test_pickled_images(tmp_path: Path) -> None:
    """CIFAR's own files are pickles, of which only the published ones may be read."""
    own, trap = tmp_path / "own" / CIFAR10.base_folder, tmp_path / TRAP
    own.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], "")):
        (own / name).write_bytes(pickle.dumps(Code(trap)))
    pickle.loads((own / name).read_bytes())
    trap.rmdir()
    words = ["ffvt/train.py", *NEW_FFVT, "--dataset", "cifar10", "--pretrained_dir", "none", "--data_root", "own"]
    start(words, tmp_path, environment=OUTSIDE).end().sentence("own")
    assert not trap.exists()
