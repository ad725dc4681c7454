"""A replacement of pynvml, NVIDIA's management library, for the simulated devices."""

from __future__ import annotations

import time
from types import ModuleType, SimpleNamespace

import pynvml

from distillbench.simulated_cuda.devices import DEVICES
from distillbench.simulated_cuda.runtime import NAME, uuid_of

CONTEXT_BYTES = 2**28  # of the CUDA context of a process
IDLE_WATTS = 100.0


def management_module() -> ModuleType:
    """The module to import as pynvml: its names and errors, with other functions for devices."""
    start = time.monotonic()
    module = ModuleType("pynvml")

    def by_uuid(uuid: str | bytes) -> int:
        text = uuid.decode() if isinstance(uuid, bytes) else uuid
        for index in range(len(DEVICES.memory)):
            if text == f"GPU-{uuid_of(index)}":
                return index
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def by_index(index: int) -> int:
        if not 0 <= index < len(DEVICES.memory):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def memory_info(handle: int, version: object = None) -> SimpleNamespace:
        memory = DEVICES.memory[handle]
        used = memory.reserved + CONTEXT_BYTES
        return SimpleNamespace(total=memory.total, used=used, free=memory.total - used, reserved=0)

    def no_slices(handle: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(DEVICES.memory),
        "nvmlDeviceGetHandleByIndex": by_index,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{uuid_of(handle)}",
        "nvmlDeviceGetName": lambda handle: NAME,
        "nvmlDeviceGetMemoryInfo": memory_info,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: int(1000 * IDLE_WATTS * (time.monotonic() - start)),
        "nvmlDeviceGetPowerUsage": lambda handle: int(1000 * IDLE_WATTS),
        "nvmlDeviceGetMigMode": no_slices,
        "nvmlDeviceGetComputeMode": lambda handle: pynvml.NVML_COMPUTEMODE_DEFAULT,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [],
        "nvmlSystemGetDriverVersion": lambda: "simulated",
    }
    vars(module).update(vars(pynvml) | functions)
    return module
