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
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # as the README starts it, inside ffvt/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from common import dist
from common.amp import Precision
from common.data import Data
from common.data.loader import Order, shuffled
from common.errors import UserError
from common.experiment import Experiment, Options
from common.files import write_atomically
from common.log import Listener, say
from common.run import start
from common.session import Session
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
        return self.train_batch_size * dist.size()

    @property
    def steps(self) -> int:
        return self.num_steps

    @property
    def evaluate_every(self) -> int:
        return self.eval_every


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
    optimizer = SGD(parameters, lr=recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay)

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


class ReleasedFiles(Listener):
    """The files that the released program writes: {output_dir}/{name}_checkpoint.bin and curves in logs/{name}."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second, and --help does without

        self.checkpoint = Path(recipe.output_dir) / f"{recipe.name}_checkpoint.bin"
        self.files = (self.checkpoint,)
        self.curves = Path("logs") / recipe.name
        with self._explain(self.checkpoint.parent):
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with self._explain(self.curves):
            self.board = SummaryWriter(str(self.curves), purge_step=step + 1)
        say(f"best checkpoint: {self.checkpoint}, curves: {self.curves}")

    @staticmethod
    @contextmanager
    def _explain(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): see --output_dir and --name") from error

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        tags = {"loss": "train/loss", "lr": "train/lr"} if kind == "train" else {"top1": "test/accuracy"}
        with self._explain(self.curves):
            for name, tag in tags.items():
                self.board.add_scalar(tag, values[name], step)

    def best(self, model: nn.Module, entry: dict[str, Any]) -> None:
        assert isinstance(model, FFVT)
        tensors = {name: tensor.cpu() for name, tensor in model.released_state_dict().items()}
        write_atomically(self.checkpoint, lambda file: torch.save(tensors, file))

    def flush(self) -> None:
        with self._explain(self.curves):
            self.board.flush()

    def close(self) -> None:
        with self._explain(self.curves):
            self.board.close()


class FFVTExperiment(Experiment):
    """What this program's command line has of its own."""

    @property
    def script(self) -> str:
        return "ffvt/train.py"

    @property
    def name(self) -> str:
        return "ffvt"

    def folder(self, recipe: Recipe) -> str:
        if recipe.name in ("", "..") or Path(recipe.name).name != recipe.name:
            raise UserError(f"--name {recipe.name}: expected a name that can be part of a file's name")
        return f"ffvt-{recipe.name}"

    def row(self, recipe: Recipe) -> str | None:
        if recipe.dataset not in PUBLISHED:
            return None
        return f"ffvt_{recipe.dataset.lower()}" + ("" if recipe.feature_fusion else "_vit")

    def data_set(self, recipe: Recipe) -> str:
        return recipe.dataset.lower()

    def demo_changes(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """The README's commands run as demos too: a small model for any image size, which no file fits."""
        if overrides.pop("pretrained_dir", "none") != "none":
            say("note: the demo's small model starts from random weights, --pretrained_dir is not read")
        img_size = overrides.get("img_size", self.demo["img_size"])
        grid = max(side for side in range(1, 8) if img_size % side == 0)
        patches = {"patch_size": img_size // grid, "resnet_layers": None}
        return self.demo | {"model_kwargs": self.demo["model_kwargs"] | patches}

    def options(self, recipe: Recipe, options: Options, device: torch.device, chosen: Collection[str]) -> Options:
        accumulate, precision = recipe.gradient_accumulation_steps, options.precision
        if recipe.fp16 and recipe.fp16_opt_level != "O0":
            if "precision" not in chosen:
                precision = "fp16" if device.type != "cpu" else "fp32"
            elif "fp16" in chosen and precision != "fp16":  # else it is the run's, of which another may be asked
                raise UserError(f"--fp16 and --precision {precision} exclude each other")
        return replace(options, accumulate=accumulate, eval_batch_size=recipe.eval_batch_size, precision=precision)

    def precision(self, recipe: Recipe, options: Options, device: torch.device) -> Precision:
        level, scale = recipe.fp16_opt_level, recipe.loss_scale
        if options.precision == "fp16" and level == "O3" and options.amp_backend == "native":
            raise UserError("--fp16_opt_level O3, fp16 throughout, exists in apex alone: use O1 or O2")
        if scale and math.frexp(scale)[0] != 0.5:
            raise UserError(f"--loss_scale {scale:g}: expected 0 (dynamic) or a positive power of 2")
        return Precision(options.precision, device, options.amp_backend, level, FIRST_LOSS_SCALE, scale)

    def order(self, recipe: Recipe, count: int, seed: int) -> Order:
        if not recipe.released:
            return shuffled(count, seed)
        # The released code never tells its DistributedSampler the epoch, and leaves its seed at 0.
        fixed = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        return lambda epoch: fixed

    def max_norm(self, recipe: Recipe) -> float | None:
        return recipe.max_grad_norm

    def alterations(self, recipe: Recipe, trained: bool) -> list[str]:
        if recipe.dataset not in PUBLISHED:
            return []
        names = (*MODEL_FIELDS, *TRAINING_FIELDS) if trained else MODEL_FIELDS
        wanted = vars(Recipe("")) | PUBLISHED[recipe.dataset]
        if not recipe.feature_fusion:
            wanted["num_token"] = recipe.num_token  # which nothing uses
        used = {name: getattr(recipe, name) for name in names}
        changes = [f"{name} {wanted[name]} -> {value}" for name, value in used.items() if value != wanted[name]]
        file = Path(recipe.pretrained_dir).name
        if trained and file.replace("R50+", "R50-") != f"{recipe.model_type}.npz":
            changes.append(f"pretrained_dir {recipe.model_type}.npz -> {file}")
        return changes

    def advice(self, recipe: Recipe, options: Options, device: torch.device) -> list[str]:
        sentences = []
        if recipe.fp16 and options.precision == "fp32" and device.type == "cpu":
            sentences.append(
                "note: --fp16 is for a GPU; a CPU, which would take many times longer in fp16, computes in fp32"
            )
        dogs = PUBLISHED["dog"]
        batch = PUBLISHED.get(recipe.dataset, {}).get("batch_size", recipe.batch_size)
        if recipe.dataset == "CUB" and all(getattr(recipe, name) == dogs[name] for name in ("num_token", "decay_type")):
            sentences.append(
                "note: these are the settings of the README's Dogs command, which says --dataset CUB by mistake: this "
                "run trains on CUB; for Stanford Dogs say --dataset dog"
            )
        elif recipe.batch_size != batch and not options.demo:
            same = f"; --train_batch_size {batch // dist.size()} would be the same, with --gradient_accumulation_steps "
            sentences.append(
                f"note: the published batch is {batch} images over all processes, this run's is {recipe.batch_size}"
                + ("" if batch % dist.size() else same + "where memory is short")
            )
        return sentences

    def without_data(self, recipe: Recipe, checkpoint: Path, why: str) -> tuple[list[str], Any]:
        """The classifier says how many classes there are."""
        say(f"note: classes are numbered from 1, because their names are in the data set ({why})")
        state = read_state_dict(checkpoint)
        count = next((len(value) for key, value in state.items() if key.endswith("head.bias")), 0)
        classes = [str(number) for number in range(1, count + 1)]
        return classes, transforms(recipe.dataset, recipe.img_size, recipe.resize_size)[1]

    def listener(self, session: Session, step: int) -> Listener:
        return ReleasedFiles(session.recipe, step)


EXPERIMENT = FFVTExperiment(
    Recipe,
    data,
    build,
    optimize,
    dataset="",
    demo=dict(
        **dict(img_size=16, resize_size=16, train_batch_size=32, num_steps=1200, eval_every=300),
        **dict(warmup_steps=100, learning_rate=0.1, num_token=4),
        model_kwargs=dict(hidden_size=64, mlp_dim=128, num_heads=4, num_layers=4, dropout=0.0),
    ),
    schedule_per="step",
    objective=objective,
    separator="_",
    has_pretrained=False,
    places=("data_root", "output_dir"),
    names={
        "weights": "pretrained_dir",
        "batch_size": "train_batch_size",
        "eval_batch_size": "eval_batch_size",
        "accumulate": "gradient_accumulation_steps",
    },
    may_be_zero=frozenset({"seed", "weight_decay", "warmup_steps", "loss_scale", "smoothing_value"}),
)

if __name__ == "__main__":
    start(EXPERIMENT)
