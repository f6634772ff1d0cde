"""FFVT, Feature Fusion Vision Transformer (BMVC 2021, arXiv 2107.02341): training, evaluation, prediction.

    python3 -m torch.distributed.launch --nproc_per_node 4 train.py --name {name} --dataset cotton --model_type ViT-B_16
        --pretrained_dir {file} --img_size 384 --resize_size 500 --train_batch_size 8 --learning_rate 0.02
        --num_steps 2000 --fp16 --eval_every 16 --feature_fusion
    python train.py --name {name} --dataset CUB --demo --feature_fusion     digits in the layout of CUB, on a CPU
    python train.py --name {name} --dataset CUB --feature_fusion --eval CUB_checkpoint.bin     the authors' checkpoint

Batch sizes are per process. The best checkpoint goes to {output_dir}/{name}_checkpoint.bin in the authors' layout, the
curves to logs/{name}, the run's own files and its record to runs/ffvt-{name}/<time>-<id>/.
--released: order and sizes as in the released code (docs/fidelity.md FFVT-1, FFVT-2).
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # as the README starts it, inside ffvt/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from common.cli import Flags, Options, parse
from common.data import Data, facts
from common.data.batches import Order, seed_everything, shuffled
from common.data.resized import check_resized
from common.errors import UserError
from common.files import make_ready, write_atomically
from common.predict import answer, asked, of_data
from common.run import fetch
from common.train.checkpoint import make_state
from common.train.distributed import explained, is_main, main_first, size, start
from common.train.log import say
from common.train.loop import evaluation_due, fit, plan_batches, training
from common.train.model import check_classes, place, starting_model, trained_model
from common.train.precision import Precision
from common.train.record import finish, introduce, measure, other_data, write_record
from common.train.run_folder import Checkpoint, Run, check_data, choose_seed, find_checkpoint, new_folder, resume
from common.weights import read_state_dict
from ffvt.data import read, transforms
from ffvt.model import CONFIGS, FFVT

FIRST_LOSS_SCALE = 2.0**20  # of dynamic loss scaling, as published
DataSet = Literal["cifar10", "cifar100", "soyloc", "cotton", "CUB", "dog", "car", "air", "INat2017"]
ModelType = Literal["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50-ViT-B_16"]


@dataclass
class Recipe:
    name: str  # names the run and its files
    dataset: DataSet = "cotton"  # read from the folder of its name in --data_root
    model_type: ModelType = "ViT-B_16"  # the ViT that FFVT stands on, as Google names them
    pretrained_dir: str = "checkpoint/ViT-B_16.npz"  # starting weights: Google's .npz, a .bin or .safetensors, or none
    output_dir: str = "output"  # {name}_checkpoint.bin goes here, in the layout of the released code
    img_size: int = 448  # pixels, square; the crop that the model sees
    resize_size: int = 600  # pixels, square; what the crop is cut from
    train_batch_size: int = 16  # images per process and optimizer step
    eval_batch_size: int = 16  # images per process in evaluation
    num_token: int = 12  # tokens that each block but the last hands to the fusion layer
    eval_every: int = 100  # optimizer steps between two evaluations; the last step is evaluated too
    learning_rate: float = 3e-2  # of SGD with momentum 0.9, after the warm-up
    weight_decay: float = 0.0  # on every parameter
    num_steps: int = 10000  # optimizer steps
    decay_type: Literal["cosine", "linear"] = "cosine"  # how the learning rate falls to 0
    warmup_steps: int = 500  # optimizer steps in which it rises from 0, linearly
    max_grad_norm: float = 1.0  # the gradient is clipped to this norm
    seed: int = 42  # of order, augmentation, dropout and new layers
    gradient_accumulation_steps: int = 1  # parts that each process's batch is cut into; the batch stays
    fp16: bool = False  # mixed precision on a GPU, as --precision fp16; a CPU computes in fp32
    fp16_opt_level: Literal["O0", "O1", "O2", "O3"] = "O2"  # O0: no --fp16; O1, O2: equal without apex; O3: apex only
    feature_fusion: bool = False  # FFVT; without it a plain ViT
    loss_scale: float = 0.0  # of fp16. 0: dynamic; a positive power of 2: static
    data_root: str = "./data"  # holds a folder for each data set, of the data set's name
    smoothing_value: float = 0.0  # label smoothing
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # sizes that replace those of the model type
    released: bool = False  # compute what the released code computed, not what the paper describes

    # What common calls otherwise.
    @property
    def model(self) -> str:
        return self.model_type

    @property
    def weights(self) -> str:
        return self.pretrained_dir

    @property
    def batch_size(self) -> int:
        """Images per optimizer step, over all processes."""
        return self.train_batch_size * size()


# The README's four commands, less what the flags have as default, with the batch of all four processes together.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cotton": dict(img_size=384, resize_size=500, batch_size=32, learning_rate=0.02, num_steps=2000, eval_every=16),
    "soyloc": dict(img_size=384, resize_size=500, batch_size=32, learning_rate=0.02, num_steps=4750, eval_every=50),
    "CUB": dict(batch_size=32, learning_rate=0.02, eval_every=200),
    "dog": dict(batch_size=16, learning_rate=3e-3, num_steps=30000, eval_every=300, decay_type="linear", num_token=24),
}
MODEL_FIELDS = ("model_type", "img_size", "resize_size", "num_token", "model_kwargs")
TRAINING_FIELDS = (
    *("batch_size", "learning_rate", "weight_decay", "num_steps", "eval_every", "decay_type", "warmup_steps"),
    *("max_grad_norm", "smoothing_value"),
)


def data(recipe: Recipe) -> Data:
    return read(recipe.dataset, recipe.data_root, recipe.img_size, recipe.resize_size, recipe.released)


def build(recipe: Recipe, num_classes: int) -> FFVT:
    sizes = vars(CONFIGS[recipe.model_type]) | recipe.model_kwargs
    return FFVT(sizes, recipe.img_size, num_classes, recipe.feature_fusion, recipe.num_token, recipe.smoothing_value)


def optimize(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> tuple[SGD, LambdaLR]:
    optimizer = SGD(parameters, lr=recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay, fused=True)

    def factor(step: int) -> float:
        return rate_factor(step, recipe.warmup_steps, recipe.num_steps, recipe.decay_type)

    return optimizer, LambdaLR(optimizer, factor)  # stepped once a step


def rate_factor(step: int, warmup_steps: int, num_steps: int, decay_type: str) -> float:
    """The share of the learning rate that update number `step`, from 0, uses: the first update has 0."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if decay_type == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss, logits = model(images, labels)
    return loss, logits


def main(argv: list[str] | None = None) -> None:
    """The program, from the command line to record.json."""
    with explained("ffvt/train.py"):
        recipe, options, given = parse(
            Recipe, Options, __doc__ or "", argv, flag=FLAG, without=OF_THE_RECIPE, may_be_zero=MAY_BE_ZERO
        )
        if Path(recipe.name).name != recipe.name or recipe.name in ("", ".."):
            raise UserError(f"--name {recipe.name}: expected a name that can be part of a file's name")
        runs, device = Path(options.output) / f"ffvt-{recipe.name}", start(options)
        run = Run("ffvt", "ffvt/train.py", runs, recipe, options, given, FLAG, device)
        if options.demo:
            use_demo(run)
        checkpoint = find_checkpoint(run) if asked(options) else None  # with the recipe that it says
        if options.resume:
            resume(run, places=("data_root", "output_dir"))  # its folder, recipe, options and seed
        settle_options(run)
        recipe, options, run.batch_size, run.row = run.recipe, run.options, run.recipe.batch_size, row(run.recipe)
        run.precision = make_precision(recipe, options, device)
        bare = partial(build, recipe)

        def read_data() -> Data:
            with main_first():
                fetch(recipe.dataset.lower(), recipe.data_root, options)
                found = data(recipe).limited(options.limit)
            check_resized(found)
            return found

        if checkpoint is not None and not options.eval:
            answer(run, checkpoint, bare, partial(classes_and_transform, run, checkpoint, read_data))
            return
        run.data = read_data()
        counted = other_data(run, facts(recipe.dataset).counts)
        run.excluded += [] if options.demo else [*altered(recipe, trained=checkpoint is None), *counted]
        if checkpoint is not None:
            check_classes(checkpoint, run.data)
            model = place(run, trained_model(run, bare, checkpoint, run.data.classes))
            write_record(run, model, "evaluated", *measure(run, model))
            return
        check_data(run)
        choose_seed(run)
        plan = plan_batches(run, order(recipe, len(run.data.train), run.seed))
        seed_everything(run.seed)
        model = starting_model(run, partial(build, recipe, len(run.data.classes)), recipe.weights, fetches=False)
        model = place(run, model)
        new_folder(run)
        optimizer, scheduler = optimize(recipe, [p for p in model.parameters() if p.requires_grad])
        state = make_state(run, model, optimizer, scheduler)
        steps, every = recipe.num_steps, recipe.eval_every
        released = Path(recipe.output_dir) / f"{recipe.name}_checkpoint.bin"
        with training(run, state, evaluation_due(state, steps, every), {Path("logs") / recipe.name: CURVES}) as stop:
            if is_main():
                make_ready(released, ours=state.best is not None)
            advise(run)
            introduce(run, plan, steps, optimizer)
            say(f"best checkpoint: {released}, curves: {Path('logs') / recipe.name}")
            how: dict[str, Any] = dict(objective=objective, clip_grad=recipe.max_grad_norm, schedule_per="step")
            on_best = partial(write_released, released, state.model)
            fit(run, state, plan, stop, steps=steps, evaluate_every=every, on_best=on_best, **how)
            finish(run, state, stop)


OF_THE_RECIPE = ("accumulate", "eval_batch_size")  # options that are fields of the recipe here
FLAG = Flags(
    "_",
    {"weights": "pretrained_dir", "batch_size": "train_batch_size", "accumulate": "gradient_accumulation_steps"},
)
MAY_BE_ZERO = ("seed", "weight_decay", "warmup_steps", "loss_scale", "smoothing_value", "workers")
CURVES = {"train/loss": "train/loss", "train/lr": "train/lr", "val/top1": "test/accuracy"}  # ours -> the released tags


def row(recipe: Recipe) -> str | None:
    """The row of the paper's table."""
    if recipe.dataset not in PUBLISHED:
        return None
    return f"ffvt_{recipe.dataset.lower()}" + ("" if recipe.feature_fusion else "_vit")


def use_demo(run: Run) -> None:
    """The README's commands run as demos too: a small model for any image size, which no file fits."""
    if run.given.pop("pretrained_dir", "none") != "none":
        say("note: the demo's small model starts from random weights, --pretrained_dir is not read")
    img_size = run.given.get("img_size", 16)
    patch_size = img_size // max(side for side in range(1, 8) if img_size % side == 0)
    sizes = dict(hidden_size=64, mlp_dim=128, num_heads=4, num_layers=4, dropout=0.0, patch_size=patch_size)
    small: dict[str, Any] = dict(
        data_root=str(Path(run.options.output) / "demo-data"),
        pretrained_dir="none",
        img_size=16,
        resize_size=16,
        train_batch_size=32,
        num_steps=1200,
        eval_every=300,
        warmup_steps=100,
        learning_rate=0.1,
        num_token=4,
        model_kwargs={**sizes, "resnet_layers": None},
    )
    run.recipe = replace(run.recipe, **(small | run.typed))


def settle_options(run: Run) -> None:
    """Those that the recipe says; a resumed run keeps its precision."""
    recipe, precision = run.recipe, run.options.precision
    if recipe.fp16 and recipe.fp16_opt_level != "O0" and not run.resumed:
        if "precision" not in run.given:
            precision = "fp16" if run.device.type != "cpu" else "fp32"
        elif "fp16" in run.given and precision != "fp16":  # else it is the checkpoint's, of which another may be asked
            raise UserError(f"--fp16 and --precision {precision} exclude each other")
    accumulate, eval_batch_size = recipe.gradient_accumulation_steps, recipe.eval_batch_size
    run.options = replace(run.options, accumulate=accumulate, eval_batch_size=eval_batch_size, precision=precision)


def make_precision(recipe: Recipe, options: Options, device: torch.device) -> Precision:
    level, scale = recipe.fp16_opt_level, recipe.loss_scale
    if options.precision == "fp16" and level == "O3" and options.amp_backend == "native":
        raise UserError("--fp16_opt_level O3, fp16 throughout, exists in apex alone: use O1 or O2")
    if scale and math.frexp(scale)[0] != 0.5:
        raise UserError(f"--loss_scale {scale:g}: expected 0 (dynamic) or a positive power of 2")
    return Precision(options.precision, device, options.amp_backend, level, FIRST_LOSS_SCALE, scale)


def order(recipe: Recipe, count: int, seed: int) -> Order:
    """The order of the training images. The released code never tells its sampler the epoch; its seed is 0."""
    if not recipe.released:
        return shuffled(count, seed)
    fixed = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return lambda epoch: fixed


def altered(recipe: Recipe, trained: bool) -> list[str]:
    """How the recipe differs from the published one (`trained`: in training too): such runs never count."""
    if recipe.dataset not in PUBLISHED:
        return []
    names = (*MODEL_FIELDS, *TRAINING_FIELDS) if trained else MODEL_FIELDS
    wanted = vars(Recipe("")) | PUBLISHED[recipe.dataset]
    if not recipe.feature_fusion:
        wanted["num_token"] = recipe.num_token  # which nothing uses
    used = {name: getattr(recipe, name) for name in names}
    changes = [f"altered: {name} {wanted[name]} -> {value}" for name, value in used.items() if value != wanted[name]]
    file = Path(recipe.pretrained_dir).name
    if trained and file.replace("R50+", "R50-") != f"{recipe.model_type}.npz":
        changes.append(f"altered: pretrained_dir {recipe.model_type}.npz -> {file}")
    return changes


def advise(run: Run) -> None:
    """Says what is easily overlooked."""
    recipe, dogs = run.recipe, PUBLISHED["dog"]
    if recipe.fp16 and run.options.precision == "fp32" and run.device.type == "cpu":
        say("note: --fp16 is for a GPU; a CPU, which would take many times longer in fp16, computes in fp32")
    batch = PUBLISHED.get(recipe.dataset, {}).get("batch_size", run.batch_size)
    if recipe.dataset == "CUB" and all(getattr(recipe, name) == dogs[name] for name in ("num_token", "decay_type")):
        say(
            "note: these are the settings of the README's Dogs command, which says --dataset CUB by mistake: this run "
            "trains on CUB; for Stanford Dogs say --dataset dog"
        )
    elif run.batch_size != batch and not run.options.demo:
        same = f"; --train_batch_size {batch // size()} would be the same, with --gradient_accumulation_steps "
        say(
            f"note: the published batch is {batch} images over all processes, this run's is {run.batch_size}"
            + ("" if batch % size() else same + "where memory is short")
        )


def write_released(path: Path, model: Any, _: dict[str, Any]) -> None:
    """The best checkpoint in the authors' layout."""
    tensors = {name: tensor.cpu() for name, tensor in model.released_state_dict().items()}
    write_atomically(path, lambda file: torch.save(tensors, file))


def classes_and_transform(run: Run, checkpoint: Checkpoint, read_data: Any) -> tuple[list[str], Any]:
    """Of a bare checkpoint. Without its data set the classifier says how many classes there are."""
    try:
        return of_data(read_data())
    except UserError as why:
        say(f"note: classes are numbered from 1, because their names are in the data set ({why})")
    weights = read_state_dict(checkpoint.path)
    count = next((len(value) for key, value in weights.items() if key.endswith("head.bias")), 0)
    recipe = run.recipe
    return [str(n) for n in range(1, count + 1)], transforms(recipe.dataset, recipe.img_size, recipe.resize_size)[1]


if __name__ == "__main__":
    main()
