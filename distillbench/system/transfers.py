"""Asynchronous copies between a GPU and its host: the next batch is computed while the last one is copied.

On the CPU the functions return tensors as they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

MOST_IN_FLIGHT = 2  # batches that stay on the device while they are copied
SHARE_OF_FREE_MEMORY = 1 / 8  # of a GPU, for one table that stays on it: a dataset, encoded prompts, features


def to_device(block: Tensor, device: str | torch.device) -> Tensor:
    """`block` on `device`, copied asynchronously; later work in the current stream waits for the copy."""
    if str(device) == "cpu" or block.device.type != "cpu":
        return block.to(device)
    return block.pin_memory().to(device, non_blocking=True)


def fits_on(device: str | torch.device, size: int) -> bool:
    """Whether a table of `size` bytes may stay on the GPU: at most an eighth of its free memory. False for the CPU."""
    return torch.device(device).type == "cuda" and size <= SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]


def to_host(batches: Iterable[tuple[Tensor, ...]], device: str) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of each of `batches` on the host, in order, one or two batches later than they were computed."""
    if device == "cpu":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    in_flight: deque[tuple[tuple[Tensor, ...], torch.cuda.Event]] = deque()
    for batch in batches:
        in_flight.append(_start_copy(batch, stream))
        if len(in_flight) > MOST_IN_FLIGHT:
            yield _finish_copy(*in_flight.popleft())
    while in_flight:
        yield _finish_copy(*in_flight.popleft())


def _start_copy(batch: tuple[Tensor, ...], stream: torch.cuda.Stream) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
    """Copy `batch` to pinned memory in another stream; the copies, and the event after them."""
    stream.wait_stream(torch.cuda.current_stream(batch[0].device))
    targets = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in batch)
    with torch.cuda.stream(stream):
        for target, tensor in zip(targets, batch, strict=True):
            target.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        done = torch.cuda.Event()
        done.record(stream)
    return targets, done


def _finish_copy(targets: tuple[Tensor, ...], done: torch.cuda.Event) -> tuple[Tensor, ...]:
    done.synchronize()
    return tuple(target.clone() for target in targets)  # to pageable memory: torch reuses the pinned memory
