"""NVIDIA's management library (NVML) for the GPUs of torch, whose indices differ from NVML's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distillbench.errors import Unavailable

EXCLUSIVE_PROCESS, PROHIBITED = "EXCLUSIVE_PROCESS", "PROHIBITED"
MPS_PIPES = "/tmp/nvidia-mps"  # of NVIDIA's Multi-Process Service, unless CUDA_MPS_PIPE_DIRECTORY is set


class Slice(Unavailable):
    """The device is a slice of a GPU (MIG), and the value exists only for the whole GPU."""


class Gpu:
    """One GPU in NVML. Methods raise Unavailable, with NVML's reason, for values that it does not know."""

    def __init__(self, nvml: Any, device: str) -> None:
        """`device` is torch's name. NVML finds it by its UUID, since CUDA_VISIBLE_DEVICES changes the indices."""
        self.nvml = nvml
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self.is_slice = False
        try:
            self.handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except nvml.NVMLError:
            self.handle = self._ask(nvml.nvmlDeviceGetHandleByUUID, f"MIG-{uuid}")
            self.is_slice = True
        if not self.is_slice and self._is_cut():
            raise Slice("NVML: the GPU is cut into slices (MIG), and torch does not say which of them it uses")

    def _ask(self, function: Callable[[Any], Any], of: Any) -> Any:
        try:
            return function(of)
        except self.nvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from error

    def _is_cut(self) -> bool:
        """Whether it is partitioned into slices (MIG). GPUs without MIG do not support the question."""
        try:
            now, _ = self._ask(self.nvml.nvmlDeviceGetMigMode, self.handle)
        except Unavailable:
            return False
        return now == self.nvml.NVML_DEVICE_MIG_ENABLE

    def joules(self) -> float:
        """Joules that the whole GPU has used since its driver was loaded."""
        if self.is_slice:
            raise Slice("NVML: a slice of a GPU (MIG) has no counter of energy, only the whole GPU has")
        return self._ask(self.nvml.nvmlDeviceGetTotalEnergyConsumption, self.handle) / 1000

    def used_bytes(self) -> int:
        """Bytes in use by all processes, including CUDA contexts and the driver."""
        return int(self._ask(self.nvml.nvmlDeviceGetMemoryInfo, self.handle).used)

    def compute_mode(self) -> str:
        """EXCLUSIVE_PROCESS, PROHIBITED, or "" if every process may use it."""
        mode = self._ask(self.nvml.nvmlDeviceGetComputeMode, self.handle)
        names = {
            self.nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: EXCLUSIVE_PROCESS,
            self.nvml.NVML_COMPUTEMODE_PROHIBITED: PROHIBITED,
        }
        return names.get(mode, "")


@contextmanager
def gpu_of(device: str) -> Iterator[Gpu]:
    """The GPU `device` (cuda, cuda:N) while the block runs. Raises Unavailable without NVML."""
    if torch.version.hip:
        raise Unavailable("NVML knows only NVIDIA's GPUs")
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


def compute_mode(device: str) -> str:
    """The :meth:`Gpu.compute_mode` of the GPU `device`; "" if it is unknown.

    Also "" for an exclusive GPU with NVIDIA's Multi-Process Service, whose clients are one process to the GPU.
    """
    try:
        with gpu_of(device) as gpu:
            mode = gpu.compute_mode()
    except Unavailable:
        return ""
    service = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", MPS_PIPES)) / "control"
    return "" if mode == EXCLUSIVE_PROCESS and service.exists() else mode
