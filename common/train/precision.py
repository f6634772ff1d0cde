"""Precision of the arithmetic: fp32, bf16 or fp16, by PyTorch's autocast and GradScaler or by NVIDIA apex.

apex is optional and never installed by us: `apex.amp` left apex in 2025, and the package of that name on PyPI is
unrelated.
"""

import importlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Runs forward, backward and step at the chosen precision.

    `precision` is fp32, bf16 or fp16; `backend` is native or apex (fp16 only), `opt_level` apex's. `init_scale` is the
    first loss scale of native fp16 (PyTorch's own default is 2**16); a `loss_scale` above 0 is the scale for good,
    with either backend.
    """

    def __init__(
        self,
        precision: str,
        device: torch.device,
        backend: str = "native",
        opt_level: str = "O1",
        init_scale: float = 2.0**16,
        loss_scale: float = 0.0,
    ) -> None:
        self.precision, self.device, self.opt_level, self.loss_scale = precision, device, opt_level, loss_scale
        self.apex: Any = _import_apex(precision, device) if backend == "apex" else None
        native_fp16 = precision == "fp16" and self.apex is None
        self.scaler = torch.amp.GradScaler(device.type, init_scale=loss_scale or init_scale, enabled=native_fp16)

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """apex rewrites both here. Momentum of SGD is set to zero: torch's fused kernel leaves it uninitialised where
        loss scaling skips the first step.
        """
        if self.apex is not None:
            scale = {"loss_scale": self.loss_scale} if self.loss_scale else {}
            model, optimizer = self.apex.initialize(model, optimizer, opt_level=self.opt_level, **scale)
        for group in optimizer.param_groups:
            for parameter in group["params"] if group.get("fused") and group.get("momentum") else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return model, optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        if self.apex is not None or self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.precision])

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
        else:
            self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], clip_grad: float | None) -> Tensor | None:
        """Clips to the norm `clip_grad` (none: does not clip) and updates; fp16 skips it where a gradient overflows.

        Returns, in fp16, a 0-d bool tensor: whether the step was skipped. Gradients are already averaged over
        processes here, so that all of them decide alike.
        """
        if self.apex is not None:
            parameters = self.apex.master_params(optimizer)
        self.scaler.unscale_(optimizer)
        norm = None
        if clip_grad is not None or self.precision == "fp16":
            parameters = [parameter for parameter in parameters if parameter.grad is not None]
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        if clip_grad is not None and norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        self.scaler.step(optimizer)
        self.scaler.update(self.loss_scale or None)
        return ~norm.isfinite() if self.precision == "fp16" and norm is not None else None

    def state_dict(self) -> dict[str, Any]:
        return dict((self.apex or self.scaler).state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            (self.apex or self.scaler).load_state_dict(state)


def _import_apex(precision: str, device: torch.device) -> Any:
    if precision != "fp16" or device.type != "cuda":
        raise UserError("--amp-backend apex works with --precision fp16 on a CUDA device only; leave it out otherwise")
    try:
        return importlib.import_module("apex.amp")
    except ImportError as error:
        raise UserError(
            f"--amp-backend apex: apex.amp cannot be imported ({error}); build NVIDIA apex from its repository at a "
            "version that still has apex.amp (PyPI's 'apex' is another program), or use --amp-backend native"
        ) from error
