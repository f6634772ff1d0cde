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
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torch.optim import Optimizer

from common.cli import Flags, Options, parse
from common.data import Data
from common.data.batches import Order, Plan, seed_everything, shuffled
from common.errors import UserError
from common.files import make_ready, write_atomically
from common.predict import answer, asked, of_data
from common.train.checkpoint import make_state
from common.train.distributed import explained, is_main, main_first, size, start
from common.train.log import say
from common.train.loop import evaluation_due, fit, plan_batches, training
from common.train.metrics import Predictions
from common.train.model import check_classes, place, starting_model, trained_model
from common.train.precision import Precision
from common.train.record import finish, introduce, measure, other_data, write_record
from common.train.run_folder import Checkpoint, Run, check_data, choose_seed, find_checkpoint, new_folder, resume
from common.weights import download_npz
from glsim.data_utils.datasets import read
from glsim.data_utils.transforms import transforms
from glsim.model_utils.build import build_model
from glsim.train_utils.demo import demo_settings, write_demo
from glsim.train_utils.errors_page import draw_errors
from glsim.train_utils.losses import make_objective
from glsim.train_utils.recipe import MAY_BE_ZERO, Recipe, altered, learning_rate
from glsim.train_utils.schedule import Schedule, make_optimizer, make_schedule
from glsim.train_utils.speed import measure_speed
from glsim.train_utils.trained import OF_THE_DATA, classes_in, classes_of, settings_of_checkpoint
from glsim.train_utils.yaml_config import ELSEWHERE, NO_EFFECT, WITHOUT_EFFECT, read_configs
from results import all_rows

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


def main(argv: list[str] | None = None) -> None:
    """The program, from the command line to record.json."""
    with explained("glsim/tools/train.py"):
        configure = partial(read_configs, settings_class=Recipe)
        recipe, options, given = parse(
            Recipe, Options, __doc__ or "", argv,
            flag=FLAG, without=OF_THE_RECIPE, may_be_zero=MAY_BE_ZERO, configure=configure, known=NO_FLAGS,
        )  # fmt: skip
        options = published_modes(recipe, options)
        run = Run(
            "glsim",
            "glsim/tools/train.py",
            Path(options.output) / "glsim",
            recipe,
            options,
            given,
            FLAG,
            start(options),
        )
        if options.demo:
            run.recipe = replace(recipe, **(DEMO | demo_settings(recipe, run.typed, Path(options.output)) | run.typed))
        recipe = run.recipe
        checkpoint = find_checkpoint(run) if asked(options) else None
        if checkpoint is not None:
            run.recipe = recipe_of(run, recipe, checkpoint)
        if options.resume:
            resume(run, places=PLACES)  # its folder, recipe, options and seed
        settle_options(run)
        recipe, options, run.row = run.recipe, run.options, row(run.recipe)
        run.batch_size = recipe.batch_size * recipe.gradient_accumulation_steps * size()
        run.precision = Precision(options.precision, run.device, options.amp_backend)
        bare = partial(build, replace(recipe, ckpt_path=None, pretrained=False))

        def read_data() -> Data:
            with main_first():
                if options.demo:
                    write_demo(Path(recipe.dataset_root_path))
                return data(recipe).limited(options.limit)

        if checkpoint is not None and not options.eval:
            answer(run, checkpoint, bare, partial(classes_and_transform, recipe, checkpoint, read_data))
            return
        run.data = read_data()
        if not options.demo:
            changes = altered(recipe, trained=checkpoint is None)
            counts = dict(zip(("train_val", "test"), COUNTS.get(recipe.dataset_name, ()), strict=False))
            run.excluded += [*(f"altered: {change}" for change in changes), *other_data(run, counts)]
        if checkpoint is not None:
            check_classes(checkpoint, run.data, classes_in(checkpoint.path))
            model = place(run, trained_model(run, bare, checkpoint, run.data.classes))
            results, predictions = measure(run, model)
            extras = evaluation_extras(run, model, predictions)
            write_record(run, model, "evaluated", results, predictions, extras)
            return
        check_data(run)
        choose_seed(run)
        objective = make_objective(recipe, len(run.data.classes), recipe.released)
        plan = plan_batches(run, order(recipe, len(run.data.train), run.seed))
        seed_everything(run.seed)
        fetch_npz(recipe)
        starting = partial(build, recipe) if recipe.weights == "pretrained" and not run.resumed else bare
        model = place(run, starting_model(run, partial(starting, len(run.data.classes)), recipe.weights))
        new_folder(run)
        optimizer, scheduler = optimize(recipe, (p for p in model.parameters() if p.requires_grad), plan)
        state = make_state(run, model, optimizer, scheduler)
        steps, every = recipe.epochs * plan.steps_per_epoch, recipe.eval_freq * plan.steps_per_epoch
        folder = results_folder(recipe, options.demo)
        best, last = (folder / f"{recipe.model_name}_{which}.pth" for which in ("best", "last"))
        with training(run, state, evaluation_due(state, steps, every), less_memory=less_memory(recipe)) as stop:
            if is_main():
                for path in (best, last):
                    make_ready(path, ours=state.best is not None)
            if recipe.fp16 and options.precision == "fp32" and run.device.type == "cpu" and not options.demo:
                say("note: mixed precision, which is on, is for a GPU; a CPU, slow at fp16, computes in fp32")
            introduce(run, plan, steps, optimizer)
            say(f"checkpoints: {folder}")
            write_best = partial(write_released, run, model, best)
            fit(
                run, state, plan, stop,
                steps=steps, evaluate_every=every, objective=objective, clip_grad=recipe.clip_grad, on_best=write_best,
            )  # fmt: skip
            if is_main():
                write_released(run, model, last, state.history[-1])
            finish(run, state, stop)


FLAG = Flags(
    "_",
    {
        "data_root": "dataset_root_path",
        "weights": "ckpt_path",
        "accumulate": "gradient_accumulation_steps",
        "eval_batch_size": "batch_size",
        "workers": "cpu_workers",
        "log_every": "log_freq",
    },
)
OF_THE_RECIPE = ("accumulate", "eval_batch_size", "workers", "pin_memory", "log_every")  # options that are fields of it
NO_FLAGS = dict.fromkeys(WITHOUT_EFFECT, NO_EFFECT) | ELSEWHERE
PLACES = ("dataset_root_path", "weights_dir", "results_dir", "cpu_workers", "pin_memory", "log_freq")
DEMO: dict[str, Any] = dict(epochs=20, batch_size=16, lr=0.03, warmup_steps=100, eval_freq=5, cpu_workers=2)


def published_modes(recipe: Recipe, options: Options) -> Options:
    """The options with --eval and --checkpoint where the published flags say so in other words."""
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


def recipe_of(run: Run, recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe that goes with a checkpoint, which says some of it itself."""
    said = checkpoint.info.get("recipe") or settings_of_checkpoint(checkpoint.path, Recipe)
    if run.options.demo:  # the digits lie where the demo has put them
        return replace(recipe, **(said | {name: getattr(recipe, name) for name in OF_THE_DATA} | run.typed))
    return replace(recipe, **(said | read_configs(run.typed, Recipe) | run.typed))


def settle_options(run: Run) -> None:
    """Those that the recipe says; a resumed run keeps its precision."""
    recipe, precision = run.recipe, run.options.precision
    if "precision" not in run.given and not run.resumed:
        precision = "fp16" if recipe.fp16 and run.device.type != "cpu" else "fp32"
    run.options = replace(
        run.options,
        precision=precision,
        accumulate=recipe.gradient_accumulation_steps,
        eval_batch_size=1 if recipe.test_only_bs1 else recipe.batch_size,
        pin_memory=recipe.pin_memory,
        workers=min(recipe.cpu_workers, os.cpu_count() or 1),
        log_every=recipe.log_freq,
    )


def row(recipe: Recipe) -> str | None:
    """The row of the paper's table."""
    name = f"glsim_{recipe.dataset_name}_{recipe.image_size}_{recipe.column}"
    return name if name in all_rows() else None


def fetch_npz(recipe: Recipe) -> None:
    """Google's weights, where the model starts from them and they are missing."""
    with main_first():
        if recipe.npz is not None and recipe.weights == str(recipe.npz):
            download_npz(recipe.npz.stem, recipe.npz.parent)


def order(recipe: Recipe, count: int, seed: int) -> Order:
    """Repeated augmentation: each image --ra times in a row, in an epoch as long as before."""
    plain = shuffled(count, seed)
    if not recipe.ra:
        return plain
    return lambda epoch: [index for index in plain(epoch) for _ in range(recipe.ra)][:count]


def less_memory(recipe: Recipe) -> str:
    half, twice = max(1, recipe.batch_size // 2), 2 * recipe.gradient_accumulation_steps
    return f"--batch_size {half} with --gradient_accumulation_steps {twice}, which keep the batch of an update"


def results_folder(recipe: Recipe, demo: bool) -> Path:
    name = [*(["demo"] if demo else []), recipe.dataset_name, recipe.model_name]
    if recipe.dynamic_anchor and recipe.model_name.startswith("vit_"):
        name.append(recipe.model_name[5:])  # side of a patch
    return Path(recipe.results_dir) / "_".join([*name, str(recipe.serial)])


def write_released(run: Run, model: nn.Module, path: Path, entry: dict[str, Any]) -> None:
    """A checkpoint in the layout of the authors', without pickled objects."""
    released: Any = getattr(model, "released_state_dict", model.state_dict)
    content = {
        "config": dataclasses.asdict(run.recipe) | {"num_classes": len(run.data.classes)},
        "classes": run.data.classes,
        "epoch": entry["epoch"],
        "accuracy": entry["val"]["top1"],
        "model": {f"model.{name}": tensor.cpu() for name, tensor in released().items()},
    }
    write_atomically(path, lambda file: torch.save(content, file))


def evaluation_extras(run: Run, model: nn.Module, predictions: Predictions) -> dict[str, Any]:
    """Measures the speed, and draws errors where --vis_errors asks for them."""
    recipe, images = run.recipe, run.data.test
    count = min(run.options.eval_batch_size or 1, len(images))
    batch = torch.randn(count, 3, recipe.image_size, recipe.image_size, device=run.device)
    speed = measure_speed(model, batch, run.precision, recipe.test_multiple)
    say(
        f"speed: {speed['images_per_s']:.1f} images/s, {speed['latency_ms']:.2f} ms for a batch of {len(batch)} "
        f"(median of {recipe.test_multiple})"
    )
    if is_main() and (recipe.vis_errors or recipe.vis_errors_save):
        folder = results_folder(recipe, run.options.demo) / "errors"
        draw_errors(model, images, predictions, run.device, run.precision, folder, recipe.vis_errors_save)
    return {"evaluation_speed": speed}


def classes_and_transform(recipe: Recipe, checkpoint: Checkpoint, read_data: Any) -> tuple[list[str], Any]:
    """Of a bare checkpoint."""
    try:
        found: Data = read_data()
    except UserError as why:
        say(f"note: the names of the classes are those in the checkpoint, or numbers from 0 ({why})")
        return classes_of(checkpoint.path, recipe), transforms(recipe)[1]
    check_classes(checkpoint, found, classes_in(checkpoint.path))
    return of_data(found)


if __name__ == "__main__":
    main()
