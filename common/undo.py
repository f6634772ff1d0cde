"""A model's buffers as they were before a step, brought back where the step is to leave no trace."""

import torch
from torch import Tensor, nn

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> an integer of as many


class Undo:
    """Keeps the floating-point buffers of a model: running statistics, which the forward pass changes.

    They are copied and chosen as the integers that their bits are, all in a few kernels, without asking the device: a
    product with 0 or 1 drops or keeps any of them exactly, while NaN as a number would survive a product with 0.
    """

    def __init__(self, model: nn.Module) -> None:
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.parts: list[tuple[list[Tensor], list[Tensor]]] = []  # now and before, of one type each
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            now = [buffer.view(BITS[dtype.itemsize]) for buffer in buffers if buffer.dtype == dtype]
            self.parts.append((now, [bits.clone() for bits in now]))

    def remember(self) -> None:
        for now, before in self.parts:
            torch._foreach_copy_(before, now)

    def undo(self, where: Tensor) -> None:
        """Brings back what was remembered if `where`, a 0-d bool tensor on the device, is true; once for each."""
        for now, before in self.parts:
            bad = where.to(now[0])  # the same type, without which the product is a kernel for each buffer
            torch._foreach_mul_(now, 1 - bad)
            torch._foreach_mul_(before, bad)
            torch._foreach_add_(now, before)
