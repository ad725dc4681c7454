"""The state of the simulated devices: memory, generators, and the CUDA graph being captured."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distillbench.simulated_cuda.record import place

TOTAL_BYTES = 2**37
ALLOCATION_BYTES, SEGMENT_BYTES = 512, 2**21  # granularity of torch's caching allocator

CPU_GENERATOR = torch.Generator  # the class as torch defines it


class Generator(CPU_GENERATOR):
    """A generator of a simulated device, with the random numbers of a CPU generator."""

    index: int

    def __new__(cls, index: int = 0) -> Generator:
        generator = super().__new__(cls, "cpu")  # type: ignore[call-arg]  # not in torch's stubs
        generator.index = index
        return generator

    def __init__(self, index: int = 0) -> None:
        """__new__ does the work."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    def clone_state(self) -> Generator:
        twin = Generator(self.index)
        twin.set_state(self.get_state())
        return twin


class OfDevice:
    """A tensor of a simulated device; `elem` is the CPU tensor that holds its values."""

    elem: Tensor
    index: int  # of the device


@dataclass
class Memory:
    """Bytes of one device, counted over its live storages."""

    total: int = TOTAL_BYTES
    allocated: int = 0
    reserved: int = 0
    most_allocated: int = 0
    most_reserved: int = 0

    def allocate(self, size: int) -> None:
        """Count `size` more bytes. Raises OutOfMemoryError if the device does not have them."""
        if self.allocated + size > self.total:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. The simulated GPU has a total capacity "
                f"of {self.total / 2**20:.2f} MiB, of which {self.allocated / 2**20:.2f} MiB are allocated."
            )
        self.allocated += size
        self.reserved = max(self.reserved, _round_up(self.allocated, SEGMENT_BYTES))
        self.most_allocated = max(self.most_allocated, self.allocated)
        self.most_reserved = max(self.most_reserved, self.reserved)

    def empty_cache(self) -> None:
        self.reserved = _round_up(self.allocated, SEGMENT_BYTES)

    def reset_peaks(self) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass
class Capture:
    """A CUDA graph being captured: `tape` is run again at each replay."""

    tape: list[Callable[[], None]] = field(default_factory=list)
    generators: set[Any] = field(default_factory=set)  # whose random numbers replays may use
    mode: str = "global"  # thread_local: operations that cannot be captured raise in the capturing thread only
    thread: int = field(default_factory=threading.get_ident)

    def repeat(self, result: Tensor, again: Callable[[], Tensor]) -> None:
        """At each replay copy ``again()`` into `result`."""

        def replay() -> None:
            result.copy_(again())

        self.tape.append(replay)


class Devices:
    """All simulated devices of this process."""

    def __init__(self) -> None:
        self.memory: list[Memory] = []
        self.generators: list[Generator] = []
        self.current = 0
        self.capture: Capture | None = None
        self.pools: dict[Any, weakref.WeakSet] = {}  # memory pools: the graphs in each
        self.pool_numbers = itertools.count(1)
        self.storages: dict[int, weakref.ref] = {}  # device memory, by address
        self.pinned: dict[int, weakref.ref] = {}  # pinned host memory, by address

    def start(self, count: int, total_bytes: int) -> None:
        self.memory = [Memory(total_bytes) for _ in range(count)]
        self.generators = [Generator(index) for index in range(count)]

    def index_of(self, device: Any) -> int | None:
        """The index of `device`, given as torch's functions accept it; None if it is not a GPU."""
        if device is None:
            return None
        if isinstance(device, int) and not isinstance(device, bool):
            index: int | None = device
        else:
            found = device if isinstance(device, torch.device) else torch.device(device)
            if found.type != "cuda":
                return None
            index = found.index
        index = self.current if index is None else index
        if not 0 <= index < len(self.memory):
            raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of {len(self.memory)})")
        return index

    def count_storage(self, tensor: Tensor, index: int) -> None:
        """Count the memory of `tensor` as the device's for as long as its storage lives."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.storages:
            return
        size = _round_up(storage.nbytes(), ALLOCATION_BYTES)
        memory = self.memory[index]
        memory.allocate(size)

        def free(_: weakref.ref) -> None:
            self.storages.pop(address, None)
            memory.allocated -= size

        self.storages[address] = weakref.ref(storage, free)

    def pin(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, a CPU tensor whose memory counts as pinned from now on."""
        self.refuse_while_capturing("pinned memory")
        storage = tensor.untyped_storage()
        address = storage._cdata
        self.pinned[address] = weakref.ref(storage, lambda _: self.pinned.pop(address, None))
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def refuse_while_capturing(self, what: str) -> None:
        """Raise the RuntimeError of CUDA if a CUDA graph is being captured."""
        capture = self.capture
        if capture is not None and (capture.mode == "global" or capture.thread == threading.get_ident()):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what} at {place()})")


DEVICES = Devices()
