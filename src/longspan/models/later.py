"""Gradients of parameters are summed beside the backward of other layers."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from longspan.schedule.keeping import BUCKET_BYTES

__all__ = ["Later"]

Sum = tuple[tuple[int, ...], torch.dtype]  # over which mesh axes, and of what


class Later:
    """Hands gradients to their parameters when they have been summed, at the end of backward.

    One thread sums them, in the order in which they come, on process groups of its own. ``total``
    sums a flat tensor over some axes of the mesh; what is summed alike is summed together.
    """

    def __init__(self, total: Callable[[Tensor, tuple[int, ...]], Tensor]) -> None:
        self._total = total
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="gradient sums")
        self._waiting: dict[Sum, list[tuple[nn.Parameter, Tensor]]] = {}
        self._due: list[tuple[list[nn.Parameter], Future[Sequence[Tensor]]]] = []

    def clear(self) -> None:
        """Forget what a backward has left that failed."""
        self._waiting.clear()
        self._due.clear()

    def sum(self, parameter: nn.Parameter, grad: Tensor, axes: tuple[int, ...]) -> None:
        """Sum a gradient, which then lies as its parameter, over some axes."""
        self._begin()
        key = axes, grad.dtype
        some = self._waiting.setdefault(key, [])
        some.append((parameter, grad))
        if sum(one.nbytes for _, one in some) >= BUCKET_BYTES:
            self._send(key)

    def move(self, parameter: nn.Parameter, move: Callable[[], Tensor]) -> None:
        """Have a gradient brought to where its parameter lies."""
        self._begin()
        self._due.append(([parameter], self._worker.submit(lambda: [move()])))

    def _begin(self) -> None:
        if not self._due and not self._waiting:
            engine: Any = Variable._execution_engine
            engine.queue_callback(self._arrive)

    def _send(self, key: Sum) -> None:
        some = self._waiting.pop(key)
        grads = [grad for _, grad in some]

        def summed() -> list[Tensor]:
            whole = self._total(torch.cat([grad.reshape(-1) for grad in grads]), key[0])
            parts = whole.split([grad.numel() for grad in grads])
            return [part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)]

        self._due.append(([parameter for parameter, _ in some], self._worker.submit(summed)))

    @torch.no_grad()
    def _arrive(self) -> None:
        for key in list(self._waiting):
            self._send(key)
        due, self._due = self._due, []
        for parameters, future in due:
            for parameter, local in zip(parameters, future.result(), strict=True):
                whole = parameter.data
                assert isinstance(whole, DTensor)
                if isinstance(parameter.grad, DTensor):
                    parameter.grad.to_local().add_(local)
                else:
                    parameter.grad = DTensor.from_local(
                        local,
                        whole.device_mesh,
                        whole.placements,
                        run_check=False,
                        shape=whole.shape,
                        stride=whole.stride(),
                    )
