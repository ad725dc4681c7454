"""Replacements of the functions of torch.cuda: events, streams, graphs, memory, properties."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillbench.simulated_cuda.devices import DEVICES, Capture
from distillbench.simulated_cuda.record import add_wait

NAME = "Simulated GPU"
ARCHITECTURE, CAPABILITY = "sm_90", (9, 0)


@dataclass(frozen=True)
class Properties:
    """Properties of a simulated GPU, with as many multiprocessors as an H200."""

    name: str
    uuid: str
    total_memory: int
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    multi_processor_count: int = 132
    gcnArchName: str = ARCHITECTURE


def uuid_of(index: int) -> str:
    return f"00000000-0000-0000-0000-{index:012d}"


def _index(device: Any = None) -> int:
    index = DEVICES.index_of(DEVICES.current if device is None else device)
    if index is None:
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return index


# --- streams and events ----------------------------------------------------------------------------------------------


class Event:
    """Complete as soon as it is recorded: simulated devices are synchronous."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing
        self.time: float | None = None  # when it was recorded

    def record(self, stream: Any = None) -> None:
        if self.enable_timing:
            DEVICES.refuse_while_capturing("an event with timing")
        self.time = time.perf_counter()

    def query(self) -> bool:
        DEVICES.refuse_while_capturing("event.query")
        return True

    def synchronize(self) -> None:
        DEVICES.refuse_while_capturing("event.synchronize")
        add_wait("event.synchronize")

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: Event) -> float:
        if not (self.enable_timing and end.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.time is None or end.time is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1000 * (end.time - self.time)


class Stream:
    """A stream of a device. Its work is done at once."""

    def __init__(self, device: Any = None, priority: int = 0, **about: Any) -> None:
        self.device = torch.device("cuda", _index(device))
        self.device_index, self.cuda_stream = self.device.index, id(self)

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return DEVICES.capture is not None

    def synchronize(self) -> None:
        DEVICES.refuse_while_capturing("stream.synchronize")
        add_wait("stream.synchronize")


class _Streams(threading.local):
    """The current stream of each device, in each thread."""

    def __init__(self) -> None:
        self.current: dict[int, Stream] = {}


STREAMS = _Streams()
_DEFAULT: dict[int, Stream] = {}


def default_stream(device: Any = None) -> Stream:
    index = _index(device)
    if index not in _DEFAULT:
        _DEFAULT[index] = Stream(index)
    return _DEFAULT[index]


def current_stream(device: Any = None) -> Stream:
    return STREAMS.current.get(_index(device)) or default_stream(device)


def set_stream(stream: Stream) -> None:
    STREAMS.current[stream.device_index] = stream


@contextmanager
def stream(new: Stream | None) -> Iterator[None]:
    if new is None:
        yield
        return
    before = current_stream(new.device)
    set_stream(new)
    try:
        yield
    finally:
        set_stream(before)


def synchronize(device: Any = None) -> None:
    _index(device)
    DEVICES.refuse_while_capturing("torch.cuda.synchronize")
    add_wait("torch.cuda.synchronize")


class on_device:
    """A block in which `device` is the current one."""

    def __init__(self, device: Any) -> None:
        self.index = DEVICES.current if device is None or device == -1 else _index(device)

    def __enter__(self) -> None:
        self.before, DEVICES.current = DEVICES.current, self.index

    def __exit__(self, *error: object) -> None:
        DEVICES.current = self.before


def set_device(device: Any) -> None:
    DEVICES.current = _index(device)


# --- graphs ----------------------------------------------------------------------------------------------------------


class CUDAGraph:
    """A tape of operators, which a replay runs again on the same memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.capture: Capture | None = None
        self.generators: set[Any] = set()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        DEVICES.refuse_while_capturing("a capture within another")
        if pool is not None:
            known = DEVICES.pools.get(pool)
            if known is not None and not known:  # torch raises it if a workspace is left in the pool
                raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED: all graphs of the pool are freed")
            DEVICES.pools.setdefault(pool, weakref.WeakSet()).add(self)
        DEVICES.capture = Capture(generators=set(self.generators), mode=capture_error_mode)

    def capture_end(self) -> None:
        self.capture, DEVICES.capture = DEVICES.capture, None

    def register_generator_state(self, generator: Any) -> None:
        self.generators.add(generator)

    def pool(self) -> Any:
        return id(self), 0

    def reset(self) -> None:
        self.capture = None

    def replay(self) -> None:
        if self.capture is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        with torch.no_grad():
            for again in self.capture.tape:
                again()


@contextmanager
def graph(
    cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """Capture the block; torch waits for the device first."""
    synchronize()
    empty_cache()
    cuda_graph.capture_begin(pool, capture_error_mode)
    try:
        yield
    finally:
        cuda_graph.capture_end()


# --- memory ----------------------------------------------------------------------------------------------------------


def empty_cache() -> None:
    for memory in DEVICES.memory:
        memory.empty_cache()


def _memory(field: str) -> Callable[..., int]:
    return lambda device=None: vars(DEVICES.memory[_index(device)])[field]


def mem_get_info(device: Any = None) -> tuple[int, int]:
    memory = DEVICES.memory[_index(device)]
    return memory.total - memory.reserved, memory.total


def memory_stats(device: Any = None) -> dict[str, int]:
    memory = DEVICES.memory[_index(device)]
    return {
        "allocated_bytes.all.current": memory.allocated,
        "allocated_bytes.all.peak": memory.most_allocated,
        "reserved_bytes.all.current": memory.reserved,
        "reserved_bytes.all.peak": memory.most_reserved,
    }


# --- generators ------------------------------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    DEVICES.generators[DEVICES.current].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for generator in DEVICES.generators:
        generator.manual_seed(seed)


def get_rng_state(device: Any = "cuda") -> Tensor:
    return DEVICES.generators[_index(device)].get_state()


def set_rng_state(state: Tensor, device: Any = "cuda") -> None:
    DEVICES.generators[_index(device)].set_state(state)


def properties(device: Any = None) -> Properties:
    index = _index(device)
    return Properties(NAME, uuid_of(index), DEVICES.memory[index].total)


def torch_cuda() -> dict[str, Any]:
    """The replacements in torch.cuda, by name."""
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: len(DEVICES.memory),
        "current_device": lambda: DEVICES.current,
        "set_device": set_device,
        "device": on_device,
        "synchronize": synchronize,
        "Event": Event,
        "Stream": Stream,
        "stream": stream,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, next(DEVICES.pool_numbers)),
        "is_current_stream_capturing": lambda: DEVICES.capture is not None,
        "empty_cache": empty_cache,
        "memory_allocated": _memory("allocated"),
        "memory_reserved": _memory("reserved"),
        "max_memory_allocated": _memory("most_allocated"),
        "max_memory_reserved": _memory("most_reserved"),
        "reset_peak_memory_stats": lambda device=None: DEVICES.memory[_index(device)].reset_peaks(),
        "mem_get_info": mem_get_info,
        "memory_stats": memory_stats,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed_all,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_device_properties": properties,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_arch_list": lambda: [ARCHITECTURE],
        "is_bf16_supported": lambda including_emulation=True: True,
        "default_generators": tuple(DEVICES.generators),
        "ipc_collect": lambda: None,
    }
