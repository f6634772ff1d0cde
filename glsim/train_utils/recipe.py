"""What a training of GLSim's program is: its settings, its learning rate, and how it differs from the paper's rows."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.train import distributed
from glsim.model_utils.build import NPZ
from glsim.train_utils.settings import Settings, switched_off
from glsim.train_utils.yaml_config import CONFIGS, read_config

# Numbers that need not be positive.
MAY_BE_ZERO = (
    *("seed", "serial", "weight_decay", "momentum", "warmup_steps", "warmup_epochs", "warmup_lr", "min_lr", "ra", "re"),
    *("mix_prob", "smoothing", "focal_gamma", "sd", "token_drop", "jitter_prob", "jitter_bcs", "jitter_hue", "blur"),
    *("greyscale", "solarize_prob", "solarize", "cpu_workers", "hidden_dropout_prob", "attention_probs_dropout_prob"),
)


@dataclass
class Recipe(Settings):
    epochs: int = 50  # passes over the training images
    batch_size: int = 8  # images per process and iteration; the published 8 are over all processes
    gradient_accumulation_steps: int = 1  # iterations of an optimizer step; they enlarge its batch
    lr: float = 0.01  # learning rate after the warm-up
    base_lr: float | None = None  # learning rate for 8 images a step, scaled by the batch; replaces --lr
    opt: str = "sgd"  # optimizer, by timm's name; sgd has Nesterov momentum
    momentum: float = 0.9  # of SGD and of optimizers that have one
    weight_decay: float = 0.0  # on all parameters but vectors
    opt_eps: float | None = None  # epsilon of the optimizer; none: its own
    opt_betas: list[float] | None = None  # betas of the optimizer; none: its own
    clip_grad: float | None = 1.0  # the gradient is clipped to this norm; none: it is not
    sched: Literal["cosine", "linear", "step"] = "cosine"  # how the learning rate falls
    t_in_epochs: bool = False  # change the learning rate every epoch, not every step
    warmup_lr: float = 1e-6  # learning rate at the start of the warm-up
    warmup_steps: int = 500  # steps of warm-up; 0: --warmup_epochs holds
    warmup_epochs: int = 2  # epochs of warm-up, if --warmup_steps is 0 or with --t_in_epochs
    min_lr: float = 1e-5  # learning rate at the end of the cosine
    decay_epochs: int = 30  # epochs between two drops of the step schedule
    decay_rate: float = 0.1  # factor of each drop
    seed: int = 0  # of order, augmentation, dropout and new layers
    fp16: bool = switched_off()  # mixed precision on a GPU; a CPU computes in fp32
    eval_freq: int = 200  # epochs between two evaluations; the last epoch is evaluated too
    log_freq: int = 100  # optimizer steps between two lines of the log
    pin_memory: bool = switched_off()  # page-locked memory on the way to a GPU
    cpu_workers: int = 8  # data-loading processes per training process, at most one a core
    results_dir: str = "results_train"  # checkpoints in the published layout go below it
    serial: int = 0  # number at the end of that folder's name
    test_only: bool = False  # evaluate --ckpt_path
    test_only_bs1: bool = False  # the same one image at a time, for its latency
    test_multiple: int = 5  # how often an evaluation measures the speed
    vis_errors: bool = False  # evaluate --ckpt_path, draw its errors on one sheet
    vis_errors_save: bool = False  # a picture of each error too
    released: bool = False  # compute what the released code computed, not what the paper describes

    # What common calls otherwise.
    @property
    def model(self) -> str:
        return self.model_name

    @property
    def data_root(self) -> str:
        return self.dataset_root_path

    @property
    def weights(self) -> str:
        if self.ckpt_path is not None:
            return self.ckpt_path
        if not self.pretrained:
            return "none"
        return str(self.npz) if self.npz is not None else "pretrained"

    @property
    def npz(self) -> Path | None:
        """Google's weights, where the model starts from them."""
        name = NPZ.get(self.model_name)
        return None if name is None else Path(self.weights_dir) / f"{name}.npz"

    @property
    def column(self) -> str | None:
        """The column of the paper's tables."""
        if self.model_name == "vit_b16":
            return "glsim" if self.dynamic_anchor else "vit"
        return self.model_name if self.model_name in ("resnet101", "cal", "transfg", "ffvt") else None


def learning_rate(recipe: Recipe, processes: int) -> float:
    """`lr`, or what `base_lr` gives for the batch of an update; `released`: several processes have another rule."""
    if recipe.base_lr is None:
        return recipe.lr
    effective = recipe.batch_size * recipe.gradient_accumulation_steps * processes
    if recipe.released:
        return recipe.base_lr * (recipe.batch_size / 8 if processes == 1 else processes * effective / 256)
    return recipe.base_lr * effective / 8


# What the paper leaves to the run, or says for each data set; and where things lie.
FREE = {"cfg", "cfg_method", "lr", "seed", "serial", "fp16", "eval_freq", "log_freq", "cpu_workers", "released"}
FREE |= {"dataset_root_path", "weights_dir", "results_dir", "test_multiple", "debugging", "pin_memory"}
FREE |= {"test_only", "test_only_bs1", "vis_errors", "vis_errors_save", "batch_size", "gradient_accumulation_steps"}
SEARCHED = (0.03, 0.01, 0.003, 0.001)  # learning rates
# What an evaluation does not depend on.
OF_TRAINING = {field.name for field in dataclasses.fields(Recipe)} - {
    field.name for field in dataclasses.fields(Settings)
}
OF_TRAINING |= {"pretrained", "ckpt_path", "transfer_learning", "train_trainval", "horizontal_flip", "trivial_aug"}
OF_TRAINING |= {"re", "re_sh", "re_r1", "ra", "cm", "mu", "ls", "smoothing", "sd", "folder_train", "df_train"}


def altered(recipe: Recipe, trained: bool) -> list[str]:
    """How the recipe differs from the paper's row, with weak or medium augmentation, whichever is nearer."""
    experiments = [CONFIGS / f"{recipe.dataset_name}_ft_is224_{augs}augs.yaml" for augs in ("weak", "med")]
    if recipe.column is None or not all(path.is_file() for path in experiments):
        return []
    method: dict[str, Any] = {"model_name": recipe.model_name, "image_size": recipe.image_size}
    if recipe.column in ("glsim", "cal"):
        method |= read_config(CONFIGS / "methods" / f"{recipe.column}.yaml", Recipe)
    names = {field.name for field in dataclasses.fields(recipe)} - FREE - (set() if trained else OF_TRAINING)
    changes = []
    for path in experiments:
        wanted = vars(Recipe(**(read_config(path, Recipe) | method)))
        changes.append([f"{n} {wanted[n]} -> {vars(recipe)[n]}" for n in sorted(names) if vars(recipe)[n] != wanted[n]])
    found = min(changes, key=len)
    batch = recipe.batch_size * recipe.gradient_accumulation_steps * distributed.size()
    if trained and batch != Recipe.batch_size:
        found.append(f"batch {Recipe.batch_size} -> {batch}")
    if trained and (recipe.lr not in SEARCHED or recipe.base_lr is not None):
        found.append(f"lr: one of {', '.join(map(str, SEARCHED))} -> {learning_rate(recipe, distributed.size())}")
    return found
