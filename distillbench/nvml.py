"""NVIDIA's management library, asked about the GPU that torch calls by another number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distillbench.errors import Unavailable

EXCLUSIVE_PROCESS, PROHIBITED = "EXCLUSIVE_PROCESS", "PROHIBITED"
MPS_PIPES = "/tmp/nvidia-mps"  # of NVIDIA's Multi-Process Service, where CUDA_MPS_PIPE_DIRECTORY does not say


class Slice(Unavailable):
    """The device is a part of a GPU (MIG), and what is asked for is known of the whole GPU alone."""


class Gpu:
    """One GPU as NVML knows it. What it cannot tell raises Unavailable, with NVML's reason."""

    def __init__(self, nvml: Any, device: str) -> None:
        """`device` as torch calls it: it is found by its UUID, since CUDA_VISIBLE_DEVICES gives other numbers."""
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
        """Whether it works as several slices. A GPU that cannot be cut has no answer."""
        try:
            now, _ = self._ask(self.nvml.nvmlDeviceGetMigMode, self.handle)
        except Unavailable:
            return False
        return now == self.nvml.NVML_DEVICE_MIG_ENABLE

    def joules(self) -> float:
        """Energy that the whole GPU has used since its driver was loaded."""
        if self.is_slice:
            raise Slice("NVML: a slice of a GPU (MIG) has no counter of energy, only the whole GPU has")
        return self._ask(self.nvml.nvmlDeviceGetTotalEnergyConsumption, self.handle) / 1000

    def used_bytes(self) -> int:
        """Memory in use by all processes, their CUDA contexts and what the driver keeps for itself included."""
        return int(self._ask(self.nvml.nvmlDeviceGetMemoryInfo, self.handle).used)

    def compute_mode(self) -> str:
        """Who may use it: EXCLUSIVE_PROCESS, PROHIBITED, or "" where every process may."""
        mode = self._ask(self.nvml.nvmlDeviceGetComputeMode, self.handle)
        names = {
            self.nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: EXCLUSIVE_PROCESS,
            self.nvml.NVML_COMPUTEMODE_PROHIBITED: PROHIBITED,
        }
        return names.get(mode, "")


@contextmanager
def gpu_of(device: str) -> Iterator[Gpu]:
    """The GPU `device` (cuda, cuda:N) while the block runs. Raises Unavailable where NVML is not there."""
    if torch.version.hip:
        raise Unavailable("NVML knows no GPUs but NVIDIA's")
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
    """Who may use the GPU `device`, as :meth:`Gpu.compute_mode` says; "" where nobody says.

    Processes that share it through NVIDIA's Multi-Process Service are one to the GPU, and so any of them may.
    """
    try:
        with gpu_of(device) as gpu:
            mode = gpu.compute_mode()
    except Unavailable:
        return ""
    service = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", MPS_PIPES)) / "control"
    return "" if mode == EXCLUSIVE_PROCESS and service.exists() else mode
