"""Optimizer and learning-rate schedule of the published program, by timm's parts."""

from collections.abc import Iterable, Sequence
from typing import Any

from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from common.errors import UserError

FUSED = ("sgd", "nesterov", "momentum", "adam", "adamw")  # timm's names of optimizers that torch has in a fused form


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    opt: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    opt_eps: float | None = None,
    opt_betas: Sequence[float] | None = None,
) -> Optimizer:
    """Return timm's optimizer `opt`; weight decay leaves out vectors. Its sgd has Nesterov momentum, as published.

    Raises UserError for a name that timm lacks, and for betas that the optimizer cannot have.
    """
    _check(opt, opt_betas)
    parameters = list(parameters)
    groups: Any = parameters
    if weight_decay:
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        others = [parameter for parameter in parameters if parameter.ndim > 1]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": others, "weight_decay": weight_decay}]
    given = (("eps", opt_eps), ("betas", opt_betas))
    more: dict[str, Any] = {name: value for name, value in given if value is not None}
    if opt.lower() in FUSED:
        more["fused"] = True
    return create_optimizer_v2(groups, opt, lr=lr, weight_decay=weight_decay, momentum=momentum, **more)


def _check(opt: str, betas: Sequence[float] | None) -> None:
    name = opt.lower().removeprefix("lookahead_")
    if name not in list_optimizers():
        raise UserError(f"--opt {opt}: timm has no such optimizer: timm.optim.list_optimizers() lists those it has")
    if betas is None:
        return
    count = get_optimizer_info(name).num_betas
    if len(betas) != count or not all(0 <= beta < 1 for beta in betas):
        found = " ".join(map(str, betas))
        raise UserError(f"--opt_betas {found}: expected {count} numbers from 0 to less than 1 for {opt}")


class LinearLRScheduler(Scheduler):
    """From `warmup_lr_init` up to the optimizer's rate, then down to a hundredth of it at `t_initial`."""

    def __init__(
        self, optimizer: Optimizer, t_initial: int, warmup_t: int, warmup_lr_init: float, t_in_epochs: bool
    ) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=t_in_epochs)
        self.t_initial, self.warmup_t, self.warmup_lr_init = t_initial, warmup_t, warmup_lr_init
        if warmup_t:
            self.update_groups(warmup_lr_init)

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            return [self.warmup_lr_init + t * (v - self.warmup_lr_init) / self.warmup_t for v in self.base_values]
        done = (t - self.warmup_t) / max(1, self.t_initial - self.warmup_t)
        return [value - 0.99 * value * done for value in self.base_values]


class Schedule:
    """A timm scheduler that is asked for the rate of update u at u; `released`: at the iteration before.

    The released loop counts iterations, `accumulate` of them an update, and asks before it counts: the first two
    updates have the same rate.
    """

    def __init__(self, scheduler: Scheduler, released: bool, accumulate: int) -> None:
        self.scheduler, self.released, self.accumulate = scheduler, released, accumulate

    def step_update(self, update: int) -> None:
        self.scheduler.step_update(max(0, update * self.accumulate - 1) if self.released else update)

    def step(self, epoch: int) -> None:
        self.scheduler.step(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


def make_schedule(
    optimizer: Optimizer,
    sched: str,
    epochs: int,
    steps_per_epoch: int,
    accumulate: int,
    released: bool,
    t_in_epochs: bool,
    warmup_steps: int,
    warmup_epochs: int,
    warmup_lr: float,
    min_lr: float,
    decay_epochs: int,
    decay_rate: float,
) -> Schedule:
    """Return the schedule `sched`: cosine, linear or step; it advances every update, with `t_in_epochs` every epoch.

    The warm-up rises linearly from `warmup_lr` in `warmup_steps` updates, where these are 0 in `warmup_epochs`.
    Updates count; with `released` iterations do, `accumulate` of them an update (see Schedule).
    """
    per_epoch = 1 if t_in_epochs else steps_per_epoch * (accumulate if released else 1)
    by_epochs = t_in_epochs or warmup_steps == 0
    common: dict[str, Any] = {
        "warmup_t": warmup_epochs * per_epoch if by_epochs else warmup_steps,
        "warmup_lr_init": warmup_lr,
        "t_in_epochs": t_in_epochs,
    }
    total = epochs * per_epoch
    scheduler: Scheduler
    if sched == "cosine":
        scheduler = CosineLRScheduler(optimizer, t_initial=total, lr_min=min_lr, cycle_limit=1, **common)
    elif sched == "linear":
        scheduler = LinearLRScheduler(optimizer, t_initial=total, **common)
    else:
        scheduler = StepLRScheduler(optimizer, decay_t=decay_epochs * per_epoch, decay_rate=decay_rate, **common)
    schedule = Schedule(scheduler, released, accumulate)
    schedule.step_update(0)
    schedule.step(0)
    return schedule
