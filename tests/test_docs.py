"""README, docs and Makefile say what is true: tables current, links, flags, ids and targets exist."""

import re

import pytest
from scripts import ROOT, run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIDELITY = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
PROGRAMS = [*SCRIPTS, "ffvt/train.py", *(f"glsim/tools/{name}.py" for name in ("train", "inference", "vis_dfsm"))]


def test_every_script_is_in_the_readme() -> None:
    assert sorted(set(re.findall(r"`(\w+\.py)`", README))) == SCRIPTS


def test_flags_in_the_readme_exist() -> None:
    sections = {
        "GFT": ("gft_food101.py",),
        "FFVT": ("ffvt/train.py",),
        "GLSim": tuple(f"glsim/tools/{name}.py" for name in ("train", "inference", "vis_dfsm", "demo", "calc_flops")),
    }
    for section, programs in sections.items():
        text = "".join(run_script(program, "--help").out for program in programs)
        text += (ROOT / "glsim" / "scripts" / "run.sh").read_text(encoding="utf-8") if section == "GLSim" else ""
        flags = set(re.findall(r"--[a-z][a-z_-]+", README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]))
        assert len(flags) > 10
        others = {"--nproc_per_node", "--max-restarts", "--runs"}  # of the launcher, and of results
        assert {flag for flag in flags if flag not in text} <= others


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("script", PROGRAMS)
def test_fidelity_ids_that_a_script_names_exist(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8").partition("from dataclasses")[0]
    named = re.findall(r"\b[A-Z]+-\d+\b", text)
    assert all(f"| {name} |" in FIDELITY for name in named)
    assert bool(named) == ("docs/fidelity.md" in text)


def test_switched_differences_are_in_the_scripts() -> None:
    """Each id of the first table is named by the scripts that it concerns, and by no other."""
    concerned = {
        "GFT-1": [name for name in SCRIPTS if name.startswith("gft_")],
        "DATA-1": [name for name in SCRIPTS if name.lower().endswith("food101.py")],
        "BIT-1": ["resnetv2_101x3_bitm_coco.py", "resnetv2_101x3_bitm_food101.py"],
        "FFVT-1": ["ffvt/train.py"],
        "FFVT-2": ["ffvt/train.py"],
        **{f"GLSIM-{number}": ["glsim/tools/train.py"] for number in (4, 5, 6)},
        **{f"GLSIM-{n}": ["glsim/tools/inference.py", "glsim/tools/vis_dfsm.py"] for n in (7, 10)},
        **{f"GLSIM-{n}": ["glsim/tools/inference.py"] for n in (8, 9)},
    }
    table = FIDELITY.partition("## Our reading")[0]
    assert set(re.findall(r"^\| ([A-Z]+-\d+) \|", table, re.MULTILINE)) == concerned.keys()
    for name, scripts in concerned.items():
        assert [script for script in PROGRAMS if re.search(rf"\b{name}\b", (ROOT / script).read_text())] == scripts


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_tests_named_in_the_fidelity_page_exist() -> None:
    for path, function in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", FIDELITY):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text
    everything = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for function in re.findall(r"`(test_\w+)`", FIDELITY):
        assert f"def {function}(" in everything
