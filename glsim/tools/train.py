"""GLSim (ISCAS 2025, arXiv 2407.12891) and what it is compared with: training and evaluation.

    python tools/train.py --cfg configs/cub_ft_is224_medaugs.yaml --lr 0.01 --model_name vit_b16
        --cfg_method configs/methods/glsim.yaml [--image_size 448]
    python tools/train.py --ckpt_path ckpts/cub_glsim_224.pth --test_only      the authors' checkpoint, or ours
    python tools/train.py --cfg_method configs/methods/glsim.yaml --demo       digits in the layout of CUB, on a CPU

What the command line says wins over --cfg_method, which wins over --cfg. --ckpt_path alone evaluates; with --cfg or
--transfer_learning training starts from it. Flags that turn something off do so as published; --no-... says it clearly.
The best and the last checkpoint go to {results_dir}/[demo_]{dataset}_{model}[_{patch}]_{serial}/, the run's own files
and its record to runs/glsim/<time>-<id>/. --released: schedule, focal loss and --base_lr as in the released code
(docs/fidelity.md GLSIM-4, GLSIM-5, GLSIM-6).
"""

import dataclasses
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
from torch import nn
from torch.optim import Optimizer

from common import dist
from common.checkpoint import save_state
from common.data import Data
from common.data.loader import Order, Plan, shuffled
from common.engine import Objective
from common.errors import UserError
from common.experiment import Experiment, Options
from common.log import Listener, say
from common.metrics import Predictions
from common.npz import download_npz
from common.run import start
from common.session import Session
from glsim.data_utils.datasets import read
from glsim.data_utils.transforms import transforms
from glsim.model_utils.build import build_model, timm_arguments
from glsim.train_utils.demo import demo_settings, write_demo
from glsim.train_utils.errors_page import draw_errors
from glsim.train_utils.losses import make_objective
from glsim.train_utils.recipe import Recipe, altered, learning_rate
from glsim.train_utils.schedule import Schedule, make_optimizer, make_schedule
from glsim.train_utils.speed import measure_speed
from glsim.train_utils.trained import OF_THE_DATA, classes_in, classes_of, settings_of_checkpoint
from glsim.train_utils.yaml_config import ELSEWHERE, NO_EFFECT, WITHOUT_EFFECT, read_configs

# train_val and test images of each data set, for records.
COUNTS = {
    "aircraft": (6667, 3333),
    "cars": (8144, 8041),
    "cotton": (240, 240),
    "cub": (5994, 5794),
    "dogs": (12000, 8580),
    "flowers": (2040, 6149),
    "food": (75750, 25250),
    "inat17": (579184, 95986),
    "nabirds": (23929, 24633),
    "pets": (3680, 3669),
    "soy": (600, 600),
}


def data(recipe: Recipe) -> Data:
    return read(recipe)


def build(recipe: Recipe, num_classes: int) -> nn.Module:
    return build_model(recipe, num_classes, pretrained=recipe.weights == "pretrained")


def optimize(recipe: Recipe, parameters: Iterable[nn.Parameter], plan: Plan) -> tuple[Optimizer, Schedule]:
    rate = learning_rate(recipe, plan.size)
    optimizer = make_optimizer(
        parameters, recipe.opt, rate, recipe.momentum, recipe.weight_decay, recipe.opt_eps, recipe.opt_betas
    )
    schedule = make_schedule(
        optimizer,
        recipe.sched,
        epochs=recipe.epochs,
        steps_per_epoch=plan.steps_per_epoch,
        accumulate=plan.accumulate,
        released=recipe.released,
        t_in_epochs=recipe.t_in_epochs,
        warmup_steps=recipe.warmup_steps,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        decay_epochs=recipe.decay_epochs,
        decay_rate=recipe.decay_rate,
    )
    return optimizer, schedule


class PublishedFiles(Listener):
    """{model}_best.pth and {model}_last.pth, in the layout of the authors' checkpoints, without pickled objects."""

    def __init__(self, session: Session) -> None:
        self.recipe, self.classes = session.recipe, session.data.classes
        self.folder = results_folder(session.recipe, session.options.demo)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made ({error.strerror}): see --results_dir") from error
        say(f"checkpoints: {self.folder}")
        self.files = tuple(self.folder / f"{self.recipe.model_name}_{which}.pth" for which in ("best", "last"))

    def best(self, model: nn.Module, entry: dict[str, Any]) -> None:
        self._write(self.files[0], model, entry)

    def last(self, model: nn.Module, entry: dict[str, Any]) -> None:
        self._write(self.files[1], model, entry)

    def _write(self, path: Path, model: nn.Module, entry: dict[str, Any]) -> None:
        released: Any = getattr(model, "released_state_dict", model.state_dict)
        state = {f"model.{name}": tensor.cpu() for name, tensor in released().items()}
        config = dataclasses.asdict(self.recipe) | {"num_classes": len(self.classes)}
        content = {"config": config, "classes": self.classes, "epoch": entry["epoch"], "accuracy": entry["val"]["top1"]}
        save_state(path, content | {"model": state})


def results_folder(recipe: Recipe, demo: bool) -> Path:
    name = [*(["demo"] if demo else []), recipe.dataset_name, recipe.model_name]
    if recipe.dynamic_anchor and recipe.model_name.startswith("vit_"):
        name.append(recipe.model_name[5:])  # side of a patch
    return Path(recipe.results_dir) / "_".join([*name, str(recipe.serial)])


class GLSimExperiment(Experiment):
    """What this program's command line has of its own."""

    @property
    def script(self) -> str:
        return "glsim/tools/train.py"

    @property
    def name(self) -> str:
        return "glsim"

    @property
    def description(self) -> str:
        return __doc__ or ""

    def configure(self, overrides: dict[str, Any]) -> dict[str, Any]:
        return read_configs(overrides, Recipe)

    def mode(self, recipe: Recipe, options: Options) -> Options:
        tests = [name for name in ("test_only", "test_only_bs1", "vis_errors", "vis_errors_save") if vars(recipe)[name]]
        if recipe.ckpt_path is not None and not Path(recipe.ckpt_path).exists():
            raise UserError(
                f"--ckpt_path {recipe.ckpt_path} does not exist: expected a checkpoint, or the folder of a run; "
                "./scripts/download_ckpts.sh fetches the authors'"
            )
        if (options.predict or options.export) and recipe.ckpt_path is not None:
            if options.checkpoint not in (None, recipe.ckpt_path):
                raise UserError("--ckpt_path and --checkpoint name different models: give one of them")
            return replace(options, checkpoint=recipe.ckpt_path)
        if options.eval or options.predict or options.export or options.resume:
            return options
        if tests and recipe.ckpt_path is None:
            raise UserError(f"--{tests[0]} evaluates a checkpoint: name it with --ckpt_path")
        trains = recipe.cfg is not None or recipe.transfer_learning
        if recipe.ckpt_path is not None and (tests or not trains):
            return replace(options, eval=recipe.ckpt_path)
        return options

    def said_by(self, checkpoint: Path) -> dict[str, Any]:
        return settings_of_checkpoint(checkpoint, Recipe)

    def classes_of(self, checkpoint: Path) -> list[str] | None:
        return classes_in(checkpoint)

    def recipe_of(self, recipe: Recipe, options: Options, said: dict[str, Any], overrides: dict[str, Any]) -> Recipe:
        if options.demo:  # the digits lie where the demo has put them
            said = said | {name: getattr(recipe, name) for name in OF_THE_DATA}
            return replace(recipe, **(said | overrides))
        return replace(recipe, **(said | self.configure(overrides) | overrides))

    def row(self, recipe: Recipe) -> str | None:
        from common.papers import all_rows

        row = f"glsim_{recipe.dataset_name}_{recipe.image_size}_{recipe.column}"
        return row if row in all_rows() else None

    def data_set(self, recipe: Recipe) -> str:
        return recipe.dataset_name

    def counts(self, recipe: Recipe) -> Mapping[str, int]:
        return dict(zip(("train_val", "test"), COUNTS.get(recipe.dataset_name, ()), strict=False))

    def prepare_data(self, recipe: Recipe, options: Options) -> None:
        if options.demo:
            write_demo(Path(recipe.dataset_root_path))

    def demo_recipe(self, recipe: Recipe, options: Options, overrides: dict[str, Any]) -> Recipe:
        return replace(recipe, **(self.demo | demo_settings(recipe, overrides, Path(options.output)) | overrides))

    def fetch_weights(self, recipe: Recipe) -> None:
        if recipe.npz is not None and recipe.weights == str(recipe.npz):
            download_npz(recipe.npz.stem, recipe.npz.parent)

    def with_weights(self, recipe: Recipe, source: str) -> Recipe:
        return replace(recipe, ckpt_path=None, pretrained=source == "pretrained")

    def options(self, recipe: Recipe, options: Options, device: torch.device, chosen: Collection[str]) -> Options:
        precision = options.precision
        if "precision" not in chosen:
            precision = "fp16" if recipe.fp16 and device.type != "cpu" else "fp32"
        return replace(
            options,
            precision=precision,
            accumulate=recipe.gradient_accumulation_steps,
            eval_batch_size=1 if recipe.test_only_bs1 else recipe.batch_size,
            pin_memory=recipe.pin_memory,
            workers=min(recipe.cpu_workers, os.cpu_count() or 1),
            log_every=recipe.log_freq,
        )

    def global_batch_size(self, recipe: Recipe) -> int:
        return recipe.batch_size * recipe.gradient_accumulation_steps * dist.size()

    def evaluate_every(self, recipe: Recipe, plan: Plan) -> int:
        return recipe.eval_freq * plan.steps_per_epoch

    def order(self, recipe: Recipe, count: int, seed: int) -> Order:
        return repeated(shuffled(count, seed), recipe.ra) if recipe.ra else shuffled(count, seed)

    def max_norm(self, recipe: Recipe) -> float | None:
        return recipe.clip_grad

    def objective_of(self, recipe: Recipe, num_classes: int) -> Objective:
        return make_objective(recipe, num_classes, recipe.released)

    def optimizer(self, recipe: Recipe, model: nn.Module, plan: Plan) -> tuple[Optimizer, Any]:
        return optimize(recipe, (p for p in model.parameters() if p.requires_grad), plan)

    def alterations(self, recipe: Recipe, trained: bool) -> list[str]:
        return altered(recipe, trained)

    def model_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return timm_arguments(recipe) if timm.is_model(recipe.model_name) else {}

    def save_memory(self, recipe: Recipe, options: Options) -> str:
        half, twice = max(1, recipe.batch_size // 2), 2 * recipe.gradient_accumulation_steps
        return f"--batch_size {half} with --gradient_accumulation_steps {twice}, which keep the batch of an update"

    def advice(self, recipe: Recipe, options: Options, device: torch.device) -> list[str]:
        if recipe.fp16 and options.precision == "fp32" and device.type == "cpu" and not options.demo:
            return ["note: mixed precision, which is on, is for a GPU; a CPU, slow at fp16, computes in fp32"]
        return []

    def evaluated(self, session: Session, model: nn.Module, predictions: Predictions) -> dict[str, Any]:
        recipe: Recipe = session.recipe
        images = session.data.test
        count = min(session.loading.eval_batch_size, len(images))
        batch = torch.randn(count, 3, recipe.image_size, recipe.image_size, device=session.device)
        speed = measure_speed(model, batch, session.precision, recipe.test_multiple)
        say(
            f"speed: {speed['images_per_s']:.1f} images/s, {speed['latency_ms']:.2f} ms for a batch of "
            f"{len(batch)} (median of {recipe.test_multiple})"
        )
        if dist.is_main() and (recipe.vis_errors or recipe.vis_errors_save):
            folder = results_folder(recipe, session.options.demo) / "errors"
            each = recipe.vis_errors_save
            draw_errors(model, images, predictions, session.device, session.precision, folder, each)
        return {"evaluation_speed": speed}

    def listener(self, session: Session, step: int) -> Listener:
        return PublishedFiles(session)

    def without_data(self, recipe: Recipe, checkpoint: Path, why: str) -> tuple[list[str], Any]:
        say(f"note: the names of the classes are those in the checkpoint, or numbers from 0 ({why})")
        return classes_of(checkpoint, recipe), transforms(recipe)[1]


def repeated(order: Order, times: int) -> Order:
    """Repeated augmentation: each image `times` in a row, in an epoch as long as before."""

    def repeat(epoch: int) -> list[int]:
        indices = order(epoch)
        return [index for index in indices for _ in range(times)][: len(indices)]

    return repeat


EXPERIMENT = GLSimExperiment(
    Recipe,
    data,
    build,
    optimize,
    dataset="",
    demo=dict(epochs=20, batch_size=16, lr=0.03, warmup_steps=100, eval_freq=5, cpu_workers=2),
    separator="_",
    has_configuration=True,
    no_flags=dict.fromkeys(WITHOUT_EFFECT, NO_EFFECT) | ELSEWHERE,
    places=("dataset_root_path", "weights_dir", "results_dir", "cpu_workers", "pin_memory", "log_freq"),
    names={
        "data_root": "dataset_root_path",
        "weights": "ckpt_path",
        "accumulate": "gradient_accumulation_steps",
        "eval_batch_size": "batch_size",
        "workers": "cpu_workers",
        "pin_memory": "pin_memory",
        "log_every": "log_freq",
        "model": "model_name",
    },
    may_be_zero=frozenset(
        {
            "seed",
            "serial",
            "weight_decay",
            "momentum",
            "warmup_steps",
            "warmup_epochs",
            "warmup_lr",
            "min_lr",
            "ra",
            "re",
        }
        | {
            "mix_prob",
            "smoothing",
            "focal_gamma",
            "sd",
            "token_drop",
            "jitter_prob",
            "jitter_bcs",
            "jitter_hue",
            "blur",
        }
        | {
            "greyscale",
            "solarize_prob",
            "solarize",
            "cpu_workers",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
        }
    ),
)

if __name__ == "__main__":
    start(EXPERIMENT)
