"""benchmarks.psm: what it measures, and how much less the CLS row costs than the whole product."""

import json

import pytest
import torch

from benchmarks import psm
from benchmarks.psm import Recipe, measure

CPU = torch.device("cpu")


def test_at_1370_tokens_the_row_costs_less_than_a_fiftieth_of_the_product():
    cost = measure(1370, Recipe(layers=3, heads=1, rounds=3), CPU)
    assert cost["row"] * 50 < cost["product"]  # 1/180 is measured
    assert cost["outwards"] * 2 < cost["full"]  # 1/15 is measured, nearly all for the attention, which both need
    assert cost["same"] == 1


def test_the_full_way_is_the_attention_and_its_product():
    cost = measure(50, Recipe(layers=2, heads=3, batch_size=2, rounds=1), CPU)
    assert cost["full"] == pytest.approx(cost["form"] + cost["product"])
    assert all(seconds > 0 for seconds in cost.values())


def test_parts_that_differ_show(monkeypatch):
    monkeypatch.setattr(psm, "joint_attention", lambda blocks: torch.eye(50)[[49]].expand(1, 1, 50))
    assert measure(50, Recipe(layers=2, heads=1, rounds=1), CPU)["same"] == 0


def test_the_command_prints_a_line_for_each_size(monkeypatch, capsys, tmp_path):
    file = tmp_path / "psm.json"
    words = f"psm --max-tokens 785 --layers 2 --heads 1 --rounds 1 --device cpu --json {file}"
    monkeypatch.setattr("sys.argv", words.split())
    psm.main()
    title, heads, *lines = capsys.readouterr().out.splitlines()
    assert "2 layers, 1 heads, batch 1" in title
    assert heads.split()[:4] == ["N", "form", "s", "product"]
    assert [line.split()[0] for line in lines] == ["197", "785"]
    assert all(len(line.split()) == 9 for line in lines)
    figures = json.loads(file.read_text())["tokens"]
    assert f"{figures['785']['product']:.4f}" == lines[1].split()[2]
