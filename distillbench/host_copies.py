"""Copies between a GPU and its host that nobody waits for: the next batch is computed while the last one travels.

On the CPU there is nothing to copy, and the same functions hand tensors on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

MOST_UNDER_WAY = 2  # batches that are held on the device meanwhile


def to_device(block: Tensor, device: str) -> Tensor:
    """`block` on `device`, which may still be receiving it: what is computed with it there waits by itself."""
    if device == "cpu" or block.device.type != "cpu":
        return block.to(device)
    return block.pin_memory().to(device, non_blocking=True)


def to_host(batches: Iterable[Tensor], device: str) -> Iterator[Tensor]:
    """Each of `batches` on the host, in order, one or two of them later than it was computed."""
    if device == "cpu":
        yield from batches
        return
    aside = torch.cuda.Stream(device)
    under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()
    for batch in batches:
        under_way.append(_sent(batch, aside))
        if len(under_way) > MOST_UNDER_WAY:
            yield _arrived(*under_way.popleft())
    while under_way:
        yield _arrived(*under_way.popleft())


def _sent(batch: Tensor, aside: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
    """Pinned memory that `batch` is copied to beside the computation, and when it will be there."""
    aside.wait_stream(torch.cuda.current_stream(batch.device))
    target = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
    with torch.cuda.stream(aside):
        target.copy_(batch, non_blocking=True)
        batch.record_stream(aside)
        arrival = torch.cuda.Event()
        arrival.record(aside)
    return target, arrival


def _arrived(target: Tensor, arrival: torch.cuda.Event) -> Tensor:
    arrival.synchronize()
    return target.clone()  # pageable: pinned memory is scarce, and torch's allocator uses it again
