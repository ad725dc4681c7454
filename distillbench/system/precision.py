"""torch's flags for rounding the factors of float32 products (TF32, bf16), of which there are two sets.

Since version 2.9 torch has `fp32_precision` for each operator, besides the older `float32_matmul_precision` and
`allow_tf32`. After a process has used the newer flags, reading the older ones can raise ("a mix of the legacy and new
APIs"); and the older flags alone do not affect an operator that follows `torch.backends.fp32_precision`. So the newer
flags are read if torch has them, and both sets are set to the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

CUDA = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
CPU = ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@dataclass(frozen=True)
class Float32Flags:
    """Precision of float32 products in this process."""

    operators: tuple[tuple[str, str], ...]  # `fp32_precision` of each; () before torch 2.9
    matmul: str  # float32_matmul_precision: highest, high or medium
    cudnn_tf32: bool

    @staticmethod
    def now() -> Float32Flags:
        """The current flags; older ones that cannot be read are derived from the newer ones."""
        found = {name: value for name in (*CUDA, *CPU) if (value := _read(name)) is not None}
        matmul, cudnn_tf32 = _older(found)
        with suppress(RuntimeError):  # raised after the process has used the newer flags
            matmul = torch.get_float32_matmul_precision()
        with suppress(RuntimeError):
            cudnn_tf32 = torch.backends.cudnn.allow_tf32
        return Float32Flags(tuple(found.items()), matmul, cudnn_tf32)

    def apply(self) -> None:
        """Set the flags. An operator that followed a flag for all operators now has its own, with the same value."""
        torch.set_float32_matmul_precision(self.matmul)
        torch.backends.cudnn.allow_tf32 = self.cudnn_tf32
        for name, value in self.operators:  # last, since the older flags change these too
            _operator(name).fp32_precision = value


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """A block in which float32 products and convolutions on CUDA are in full float32, or in TF32 with `tf32`.

    Those on the CPU are in full float32 either way. Afterwards the flags are restored.
    """
    before = Float32Flags.now()
    wanted = {name: "tf32" if tf32 and name in CUDA else "ieee" for name, _ in before.operators}
    Float32Flags(tuple(wanted.items()), "high" if tf32 else "highest", tf32).apply()
    try:
        yield
    finally:
        before.apply()


def tf32(allowed: bool, device: str) -> AbstractContextManager[Any]:
    """A block in which float32 products and convolutions on a GPU may (`allowed`) or may not use TF32."""
    return nullcontext() if device == "cpu" else float32_products(allowed)


def _operator(name: str) -> Any:
    library, kind = name.split(".")
    return getattr(getattr(torch.backends, library), kind)


def _read(name: str) -> str | None:
    """`fp32_precision` of an operator; None if this torch does not have it."""
    try:
        return str(_operator(name).fp32_precision)
    except AttributeError:
        return None


def _older(operators: dict[str, str]) -> tuple[str, bool]:
    """The older flags for these newer ones: float32_matmul_precision, and cuDNN's allow_tf32."""
    matmul = "high" if operators.get("cuda.matmul") == "tf32" else "highest"
    if operators.get("mkldnn.matmul") == "bf16":
        matmul = "medium"
    return matmul, operators.get("cudnn.conv") == "tf32"
