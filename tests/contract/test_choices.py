"""Every data set that FFVT names and every kind of model that GLSim's program trains: trained, evaluated, asked."""

import json
from pathlib import Path

import pytest

from contract.programs import METHOD, PROGRAMS, new_home, reference, run, run_folder

DATASETS = ("cifar10", "cifar100", "soyloc", "cotton", "CUB", "dog", "car", "air", "INat2017")
PUBLISHED = ("soyloc", "cotton", "CUB", "dog")  # of which the paper has a row
MODELS = (
    *("vit_b16", "transfg", "ffvt", "cal", "resnet50", "vit_tiny_patch16_224", "glsvit_tiny_patch16_224"),
    *("glsdeit_tiny_patch16_224", "glsvit_small_patch14_reg4_dinov2"),
)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_of_ffvt(dataset: str, tmp_path: Path) -> None:
    """In its own layout, which `--demo` writes."""
    home = tmp_path / "home"
    home.mkdir()
    words = ["--name=k", "--demo", "--limit", "31", "--dataset", dataset, "--feature_fusion", "--workers", "0"]
    run(["ffvt/train.py", *words, "--num_steps", "2", "--train_batch_size", "8"], home).done()
    record = json.loads((run_folder(home) / "record.json").read_text(encoding="utf-8"))
    assert record["row"] == (f"ffvt_{dataset.lower()}" if dataset in PUBLISHED else None)
    assert (record["excluded"], record["selection"]["kind"]) == (["demo"], "test-selected")
    assert record["results"]["last"]["test"]["total"] == 31


@pytest.mark.parametrize("model", MODELS)
def test_every_model_of_glsims_program(model: str, tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", "glsim")
    method = ("--cfg_method", METHOD) if model.startswith("gls") else ()
    small = ("--demo", "--limit", "8", "--cpu_workers", "0", "--output", "runs")
    words = [PROGRAMS["glsim"].file, *small, "--model_name", model, *method, "--epochs", "2", "--batch_size", "8"]
    run(words, home).done()
    trained = run_folder(home)
    best = json.loads((trained / "record.json").read_text(encoding="utf-8"))["results"]["best"]["test"]
    (checkpoint,) = home.rglob(f"{model}_best.pth")
    again = [PROGRAMS["glsim"].file, *small[:-1], "again", "--ckpt_path", checkpoint, "--test_only"]
    run(again, home).done()
    (record,) = home.glob("again/*/*/record.json")
    found = json.loads(record.read_text(encoding="utf-8"))["results"]["checkpoint"]["test"]
    assert (found["correct"], found["total"]) == (best["correct"], 8)
    assert found["loss"] == pytest.approx(best["loss"], rel=0, abs=1e-5)  # float32, in batches of another size
    pictures = sorted((reference("glsim").home / "runs" / "demo-data").rglob("*.jpg"))[:2]
    for of in (trained, checkpoint):
        asked = run([PROGRAMS["glsim"].file, *small[:1], "--predict", *pictures, "--checkpoint", of], home).done()
        assert all(picture.name in asked.out for picture in pictures)
