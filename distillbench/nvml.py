"""NVIDIA's management library, asked about the GPU that torch calls by another number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distillbench.errors import Unavailable


class Gpu:
    """One GPU as NVML knows it. What it cannot tell raises Unavailable, with NVML's reason."""

    def __init__(self, nvml: Any, device: str) -> None:
        """`device` as torch calls it: it is found by its UUID, since CUDA_VISIBLE_DEVICES gives other numbers."""
        self.nvml = nvml
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        try:
            self.handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except nvml.NVMLError:
            self.handle = self._ask(nvml.nvmlDeviceGetHandleByUUID, f"MIG-{uuid}")  # a slice of a GPU

    def _ask(self, function: Callable[[Any], Any], of: Any) -> Any:
        try:
            return function(of)
        except self.nvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from error

    def joules(self) -> float:
        """Energy that the whole GPU has used since its driver was loaded."""
        return self._ask(self.nvml.nvmlDeviceGetTotalEnergyConsumption, self.handle) / 1000

    def used_bytes(self) -> int:
        """Memory in use by all processes, their CUDA contexts and what the driver keeps for itself included."""
        return int(self._ask(self.nvml.nvmlDeviceGetMemoryInfo, self.handle).used)


@contextmanager
def gpu_of(device: str) -> Iterator[Gpu]:
    """The GPU `device` (cuda, cuda:N) while the block runs. Raises Unavailable where NVML is not there."""
    try:
        import pynvml
    except ImportError as error:
        raise Unavailable("NVML: the package nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unavailable(f"NVML: {error}") from error
    try:
        yield Gpu(pynvml, device)
    finally:
        pynvml.nvmlShutdown()
