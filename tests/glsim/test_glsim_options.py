"""What glsim/tools/train.py makes of options on a machine with a GPU, and which row of a table a recipe is."""

import pytest
import torch
from scripts import ROOT

from common.experiment import Options
from glsim.tools.train import EXPERIMENT
from glsim.train_utils.recipe import Recipe, altered
from glsim.train_utils.yaml_config import read_configs

HOME = ROOT / "glsim"


def test_mixed_precision_is_for_a_gpu_and_a_precision_that_is_asked_for_wins() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    asked = Options(precision="fp32")
    assert EXPERIMENT.options(Recipe(), Options(), gpu, ()).precision == "fp16"
    assert EXPERIMENT.options(Recipe(), Options(), cpu, ()).precision == "fp32"
    assert EXPERIMENT.options(Recipe(), asked, gpu, {"precision"}).precision == "fp32"


@pytest.mark.parametrize("column", ["vit", "resnet101", "cal", "transfg", "ffvt"])
def test_rows_of_the_comparators(column: str) -> None:
    given = {"cfg": str(HOME / "configs" / "dogs_ft_is224_medaugs.yaml")}
    if column == "cal":
        given["cfg_method"] = str(HOME / "configs" / "methods" / "cal.yaml")
    recipe = Recipe(**({"model_name": "vit_b16" if column == "vit" else column} | read_configs(given, Recipe)))
    assert EXPERIMENT.row(recipe) == f"glsim_dogs_224_{column}"
    assert altered(recipe, trained=True) == []
