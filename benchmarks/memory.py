"""Peak memory of each method's training against the sum of what it must hold.

    python benchmarks/memory.py

The sum contains the teacher and all networks of the method (students, targets, frozen copies, students of earlier
phases), gradients and Adam's two moments of the trained networks, the average, and activations: what autograd saves for
the backward pass of the largest update, without weights. On the CPU the peak is counted by a dispatch mode: a storage
counts from the operation that returns it until it is freed. On CUDA it is torch.cuda.max_memory_allocated. The
difference of peak and sum are temporary tensors of forward passes without gradients, backward passes and clipping.

A dozen steps are taken at the scene's batch size. Neither number contains real images or the targets of noise-image
pairs. The noise of pairs, drawn when it is first read, is in the peak of direct distillation.
"""

from __future__ import annotations

import argparse
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from bare_loops import LOOPS
from measuring import SCENES, Pair, Scene, machine, print_table
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
STEPS = 12


class Storages:
    """Bytes of distinct storages that are alive."""

    def __init__(self) -> None:
        self.alive: dict[int, int] = {}
        self.bytes = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name not in self.alive:
            self.alive[name] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._freed, name)

    def _freed(self, name: int) -> None:
        self.bytes -= self.alive.pop(name)


class Counting(TorchDispatchMode):
    """Counts the storage of every tensor that an operation returns."""

    def __init__(self, storages: Storages) -> None:
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.storages.add(leaf)
        return out


class Saved:
    """Bytes that autograd saves: each storage once, those of `known` left out, since the last optimiser step."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.now: dict[int, int] = {}
        self.most = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.now[storage.data_ptr()] = storage.nbytes()
            self.most = max(self.most, sum(self.now.values()))
        return tensor

    def step(self, *about: object) -> None:
        self.now.clear()


def bytes_of(*modules: nn.Module) -> int:
    """Bytes of all weights and buffers, each counted once."""
    tensors = {t.data_ptr(): t for module in modules for t in [*module.parameters(), *module.buffers()]}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


def parts(pair: Pair, saved: int) -> dict[str, int]:
    method = pair.method
    trained = [method.student] + ([method.fake] if hasattr(method, "fake") else [])
    weights = sum(p.nbytes for network in trained for p in network.parameters())
    average = bytes_of(method.student) if pair.config.averaged else 0
    return {
        "networks": bytes_of(method, method.teacher.denoiser),
        "gradients": weights,
        "moments": 2 * weights,
        "average": average,
        "activations": saved,
    }


def measure(scene: Scene, name: str, device: str, folder: Path) -> dict[str, int]:
    """Bytes of each part, and the peak."""
    pair = Pair(scene, name, STEPS * scene.batch, device, folder)
    del pair.teacher, pair.student
    method, storages = pair.method, Storages()
    networks = [*method.parameters(), *method.buffers(), *method.teacher.denoiser.parameters()]
    saved, prepare = Saved(networks), method.prepare
    base = 0

    def prepared(workspace: Any) -> None:
        nonlocal base
        prepare(workspace)
        for tensor in networks:
            storages.add(tensor)
        counting.__enter__()
        if device != "cpu":
            base = torch.cuda.memory_allocated(device) - storages.bytes
            torch.cuda.reset_peak_memory_stats(device)

    counting: Any = Counting(storages)
    method.prepare = prepared
    hook = register_optimizer_step_post_hook(saved.step)
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            pair.train()
        peak = torch.cuda.max_memory_allocated(device) - base if device != "cpu" else storages.peak
    finally:
        counting.__exit__(None, None, None)
        hook.remove()
    return parts(pair, saved.most) | {"peak": peak}


def row(name: str, found: dict[str, int]) -> tuple[str, ...]:
    total = sum(found.values()) - found["peak"]
    numbers = [f"{value / MIB:.1f}" for value in (*list(found.values())[:-1], total, found["peak"])]
    return name, *numbers, f"{found['peak'] / total:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=["mlp", "unet"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(arguments.device))
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.scenes:
            scene: Scene = SCENES[name]()
            take: Callable[[str], dict[str, int]] = lambda method, scene=scene, name=name: measure(
                scene, method, arguments.device, Path(scratch) / name / method
            )
            rows = [row(method, take(method)) for method in arguments.methods]
            print(f"\n{scene.name}, batch {scene.batch}; MiB\n")
            columns = "networks", "gradients", "moments", "average", "activations", "sum", "peak", "peak / sum"
            print_table(rows, ("method", *columns))


if __name__ == "__main__":
    main()
