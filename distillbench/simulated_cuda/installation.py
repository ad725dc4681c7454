"""Installation of simulated GPUs in a process. It patches torch and cannot be undone."""

from __future__ import annotations

import functools
import multiprocessing.popen_spawn_posix
import multiprocessing.spawn
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, _foreach_supported_types

from distillbench.simulated_cuda.devices import DEVICES, TOTAL_BYTES
from distillbench.simulated_cuda.factories import patch_factories
from distillbench.simulated_cuda.management import management_module
from distillbench.simulated_cuda.record import unrecorded, watch_networks
from distillbench.simulated_cuda.runtime import current_stream, synchronize, torch_cuda
from distillbench.simulated_cuda.tensor import SimulatedTensor

COUNT, BYTES = "DISTILLBENCH_SIMULATED_GPUS", "DISTILLBENCH_SIMULATED_GPU_BYTES"  # read by spawned processes
CHILD = "distillbench.simulated_cuda.child"  # imported first by spawned processes


def installed() -> bool:
    """Whether this process has simulated GPUs."""
    return bool(DEVICES.memory)


def install(count: int | None = None, total_bytes: int | None = None) -> None:
    """Give torch `count` GPUs of `total_bytes` each, in this process and in those that it spawns.

    Raises RuntimeError if there is a real GPU.
    """
    if installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError("there is a real GPU; simulated ones are for machines without a GPU")
    count = int(os.environ.get(COUNT, "1")) if count is None else count
    total_bytes = int(os.environ.get(BYTES, TOTAL_BYTES)) if total_bytes is None else total_bytes
    os.environ[COUNT], os.environ[BYTES] = str(count), str(total_bytes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = min(count, len([word for word in visible.split(",") if word.strip()]))
    DEVICES.start(count, total_bytes)
    for name, value in torch_cuda().items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = current_stream
    torch.accelerator.current_device_index = lambda: DEVICES.current
    torch.accelerator.synchronize = synchronize
    sys.modules["pynvml"] = management_module()
    _patch_autocast()
    _patch_optimizers()
    _patch_modules()
    _patch_loading()
    patch_factories()
    watch_networks()
    _patch_spawning()


def _patch_autocast() -> None:
    """Use the CPU's autocast; its lists of operators differ a little from CUDA's."""
    real, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    class Autocast(real):  # type: ignore[misc,valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            if device_type == "cuda" and kwargs.get("dtype") is None and not args:
                kwargs["dtype"] = torch.float16  # CUDA's default
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    kind = lambda device: "cpu" if device == "cuda" else device
    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = Autocast  # type: ignore[misc]
    torch.is_autocast_enabled = lambda device="cuda": enabled(kind(device))
    torch.get_autocast_dtype = lambda device: dtype(kind(device))


def _patch_optimizers() -> None:
    """Optimisers group weights in C++, where they are on the CPU, and use foreach only for known tensor classes."""
    grouped = Optimizer._group_tensors_by_device_and_dtype

    def group(lists: Any, with_indices: bool = False) -> Any:
        found = {}
        for (device, dtype), value in grouped(lists, with_indices).items():
            ours = (t for tensors in value[0] for t in tensors if isinstance(t, SimulatedTensor))
            first = next(ours, None)
            found[device if first is None else first.device, dtype] = value
        return found

    Optimizer._group_tensors_by_device_and_dtype = staticmethod(group)
    _foreach_supported_types.append(SimulatedTensor)


def _patch_modules() -> None:
    """Let weights stay the same objects when a module moves, as with CUDA: torch swaps their contents."""
    apply = nn.Module._apply

    @functools.wraps(apply)
    def swapping(self: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(before or _changes_kind(self, fn))
        try:
            return apply(self, fn, recurse)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    nn.Module._apply = swapping


def _changes_kind(module: nn.Module, fn: Callable[..., Any]) -> bool:
    """Whether `fn` moves the weights of `module` between host and device."""
    weight = next(module.parameters(), None)
    if weight is None:
        return False
    nothing = torch.empty(0)
    given = SimulatedTensor(nothing, weight.index) if isinstance(weight, SimulatedTensor) else nothing
    with unrecorded():
        found = fn(given)
    return type(found) is not type(given)


def _patch_loading() -> None:
    import safetensors.torch

    load_file, load = safetensors.torch.load_file, torch.load

    def load_safetensors(filename: Any, device: Any = "cpu") -> dict[str, torch.Tensor]:
        found = load_file(filename)
        return {name: tensor.to(device) for name, tensor in found.items()}

    def load_pickle(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        known = isinstance(map_location, str | int | torch.device)
        if known and DEVICES.index_of(map_location) is not None:
            return _on(load(f, "cpu", *args, **kwargs), map_location)
        return load(f, map_location, *args, **kwargs)

    safetensors.torch.load_file = load_safetensors
    torch.load = load_pickle


def _on(value: Any, device: Any) -> Any:
    """`value` with all tensors in its dictionaries and lists on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)({key: _on(part, device) for key, part in value.items()})
    return type(value)(_on(part, device) for part in value) if isinstance(value, list | tuple) else value


def _patch_spawning() -> None:
    """Let spawned processes import CHILD instead of the main script."""
    prepare = multiprocessing.spawn.get_preparation_data

    @functools.wraps(prepare)
    def prepared(name: str) -> dict[str, Any]:
        data = prepare(name)
        data.pop("init_main_from_path", None)
        return data | {"init_main_from_name": CHILD}

    multiprocessing.spawn.get_preparation_data = prepared
