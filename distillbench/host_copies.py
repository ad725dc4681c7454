"""Copies between a GPU and its host that nobody waits for: the next batch is computed while the last one travels.

On the CPU there is nothing to copy, and the same functions hand tensors on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

MOST_UNDER_WAY = 2  # batches that are held on the device meanwhile
SHARE_OF_FREE_MEMORY = 1 / 8  # of a GPU, for one table that stays there: a dataset, encoded prompts, features


def to_device(block: Tensor, device: str | torch.device) -> Tensor:
    """`block` on `device`, which may still be receiving it: what is computed with it there waits by itself."""
    if str(device) == "cpu" or block.device.type != "cpu":
        return block.to(device)
    return block.pin_memory().to(device, non_blocking=True)


def fits_on(device: str | torch.device, size: int) -> bool:
    """Whether a table of `size` bytes may stay on a GPU: it takes at most an eighth of the memory that is free now.

    False for the CPU, whose memory it is in already.
    """
    return torch.device(device).type == "cuda" and size <= SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]


def to_host(batches: Iterable[tuple[Tensor, ...]], device: str) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of each of `batches` on the host, in order, one or two batches later than they were computed."""
    if device == "cpu":
        yield from batches
        return
    aside = torch.cuda.Stream(device)
    under_way: deque[tuple[tuple[Tensor, ...], torch.cuda.Event]] = deque()
    for batch in batches:
        under_way.append(_sent(batch, aside))
        if len(under_way) > MOST_UNDER_WAY:
            yield _arrived(*under_way.popleft())
    while under_way:
        yield _arrived(*under_way.popleft())


def _sent(batch: tuple[Tensor, ...], aside: torch.cuda.Stream) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
    """Pinned memory that `batch` is copied to beside the computation, and when it will be there."""
    aside.wait_stream(torch.cuda.current_stream(batch[0].device))
    targets = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in batch)
    with torch.cuda.stream(aside):
        for target, tensor in zip(targets, batch, strict=True):
            target.copy_(tensor, non_blocking=True)
            tensor.record_stream(aside)
        arrival = torch.cuda.Event()
        arrival.record(aside)
    return targets, arrival


def _arrived(targets: tuple[Tensor, ...], arrival: torch.cuda.Event) -> tuple[Tensor, ...]:
    arrival.synchronize()
    return tuple(target.clone() for target in targets)  # pageable: pinned memory is scarce, and torch uses it again
