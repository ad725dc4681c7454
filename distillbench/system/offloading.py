"""Modules offloaded to the CPU between uses, such as text encoders and decoders of latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Offloaded:
    """A frozen module that is on `device` only inside :meth:`on_device`. Deep copies share it."""

    def __init__(self, module: nn.Module, device: str) -> None:
        self.module, self.device = module.eval().requires_grad_(False).to("cpu"), device
        self._users = 0

    def __deepcopy__(self, memo: dict) -> Offloaded:
        return self

    @contextmanager
    def keep_on_device(self) -> Iterator[None]:
        """A block in which the module, once used, stays on the device until the block ends."""
        self._users += 1
        try:
            yield
        finally:
            self._done()

    @contextmanager
    def on_device(self) -> Iterator[nn.Module]:
        """The module on the device; it returns to the CPU when the outermost block ends."""
        self._users += 1
        try:
            yield self.module.to(self.device)
        finally:
            self._done()

    def _done(self) -> None:
        self._users -= 1
        if not self._users:
            self._to_cpu()

    def _to_cpu(self) -> None:
        self.module.to("cpu")
