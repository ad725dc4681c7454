"""Gradients summed over ranks during the backward pass, in buckets, as torch's DistributedDataParallel does.

DistributedDataParallel itself does not fit the contract of a method: it must be called instead of the network, but a
method calls its networks freely: several times for one loss, through other networks, or not all of their weights. Here
the sums depend on the weights instead: ``Tensor.register_post_accumulate_grad_hook`` runs once in a backward pass for
each weight, when its gradient is complete, however often the weight was used. Three rules keep the ranks in step:

- Buckets are sent in the order in which rank 0's first backward pass completed the gradients.
- After each backward pass the ranks exchange which weights have a gradient, and whether a rank has failed. A weight
  that only some ranks used counts as zero on the others; one that no rank used keeps ``grad = None``.
- If a rank has failed, all complete the sums that some have begun, so that the next training starts in step.

A gradient is copied once, into its bucket, and is a view of it from then on.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel


class Collectives(Protocol):
    """The methods of :class:`distillbench.training.data_parallel.DataParallelRanks` that sum gradients."""

    reduction: GradientReduction | None

    def exchange(self, *numbers: float) -> list[list[float]]: ...

    def all_gather(self, value: Any) -> list[Any]: ...

    def start_all_reduce(self, buffer: Tensor) -> Any: ...

    def wait_for(self, work: Any) -> None: ...


class Bucket:
    """A contiguous buffer for the gradients of some weights, allocated for the whole training."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.buffer = torch.zeros(sum(w.numel() for w in weights), dtype=weights[0].dtype, device=weights[0].device)
        parts = self.buffer.split([weight.numel() for weight in weights])
        self.views = [_laid_out_as(weight, part) for weight, part in zip(weights, parts, strict=True)]
        self.missing: set[Tensor] = set()  # weights whose gradient is not complete in the running backward pass

    @torch.no_grad()
    def fill(self) -> None:
        """Copy the gradients, zero for weights without one, into the buffer; they become views of it."""
        pairs = list(zip(self.weights, self.views, strict=True))
        given = [(view, weight.grad) for weight, view in pairs if weight.grad is not None]
        if given:
            torch._foreach_copy_([view for view, _ in given], [gradient for _, gradient in given])
        for weight, view in pairs:
            if weight.grad is None:
                view.zero_()
            else:
                weight.grad = view


def _laid_out_as(weight: Tensor, part: Tensor) -> Tensor:
    """`part` with the shape and the memory format of `weight`: fused optimisers need the same strides."""
    return part.as_strided(weight.shape, torch.empty_like(weight, device="meta").stride(), part.storage_offset())


class NetworkGradients:
    """The gradients of the weights of one network that are not sharded (FSDP sums the others)."""

    def __init__(self, weights: Sequence[Tensor], ranks: Collectives) -> None:
        self.weights, self.ranks = list(weights), ranks
        self.buckets: list[Bucket] = []  # created by the first sum
        self.bucket_of: dict[Tensor, Bucket] = {}
        self.order: list[int] = []  # of weights, as the first backward pass completed them
        self.sent: list[Any] = []  # running sums, of the first len(sent) buckets
        self.active = False
        index_of = {weight: index for index, weight in enumerate(self.weights)}
        this = weakref.ref(self)  # so that the hooks do not keep this object alive

        def completed(weight: Tensor) -> None:
            owner = this()
            if owner is not None and owner.active:
                owner._completed(weight, index_of[weight])

        trained = [weight for weight in self.weights if weight.requires_grad]
        handles = [weight.register_post_accumulate_grad_hook(completed) for weight in trained]
        weakref.finalize(self, _remove, handles)

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """The last backward pass of an update: buckets are sent as soon as they are complete."""
        for bucket in self.buckets:
            bucket.missing = set(bucket.weights)
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def _completed(self, weight: Tensor, index: int) -> None:
        if not self.buckets:
            self.order.append(index)
            return
        bucket = self.bucket_of.get(weight)
        if bucket is None:
            return
        if weight not in bucket.missing:
            raise RuntimeError(
                "a weight's gradient was completed twice in one backward pass, which several ranks cannot sum "
                "(possible cause: torch.utils.checkpoint with use_reentrant=True; use use_reentrant=False)"
            )
        bucket.missing.remove(weight)
        while len(self.sent) < len(self.buckets) and not self.buckets[len(self.sent)].missing:
            self._send_next()

    def finish(self) -> None:
        """Make every gradient the sum over all ranks. Raises Failed if another rank has failed."""
        used = self._used_on_any_rank()
        self._add_buckets(used)
        while len(self.sent) < len(self.buckets):
            self._send_next()
        self._wait()
        for bucket in self.buckets:
            for weight, view in zip(bucket.weights, bucket.views, strict=True):
                weight.grad = view if weight in used else None

    def _used_on_any_rank(self) -> set[Tensor]:
        """The weights that have a gradient on some rank."""
        present = [weight.grad is not None for weight in self.weights]
        digests = {row[0] for row in self.ranks.exchange(zlib.crc32(bytes(present)))}
        if len(digests) > 1:
            present = [any(flags) for flags in zip(*self.ranks.all_gather(present), strict=True)]
        return {weight for weight, has_gradient in zip(self.weights, present, strict=True) if has_gradient}

    def _add_buckets(self, used: set[Tensor]) -> None:
        """Create buckets for weights that have a gradient for the first time, the same on all ranks."""
        if not self.buckets:
            first = self.ranks.all_gather(self.order)[0]  # rank 0's
            order = dict.fromkeys([*first, *range(len(self.weights))])
            new = [self.weights[index] for index in order if self.weights[index] in used]
        elif used <= self.bucket_of.keys():
            return
        else:
            new = [weight for weight in self.weights if weight in used and weight not in self.bucket_of]
        for weights in _split_into_buckets(new):
            bucket = Bucket(weights)
            self.buckets.append(bucket)
            self.bucket_of.update(dict.fromkeys(weights, bucket))
        self.ranks.exchange()  # a rank without memory for its buckets fails before the others wait for its sums

    def _send_next(self) -> None:
        bucket = self.buckets[len(self.sent)]
        bucket.fill()
        self.sent.append(self.ranks.start_all_reduce(bucket.buffer))

    def _wait(self) -> None:
        for work in self.sent:
            self.ranks.wait_for(work)
        self.sent = []

    def give_up(self, count: int) -> None:
        """Complete the sums of the first `count` buckets, which some rank has begun. The gradients are lost."""
        while len(self.sent) < count:
            self.sent.append(self.ranks.start_all_reduce(self.buckets[len(self.sent)].buffer))
        self._wait()


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def _split_into_buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`weights` in their order, in parts of one dtype and device and of about BUCKET_BYTES."""
    part: list[Tensor] = []
    size = 0
    for weight in weights:
        if part and (size >= BUCKET_BYTES or weight.dtype != part[0].dtype or weight.device != part[0].device):
            yield part
            part, size = [], 0
        part.append(weight)
        size += weight.numel() * weight.element_size()
    if part:
        yield part


class GradientReduction:
    """The gradients of all networks that a training updates, in the order of their first update."""

    def __init__(self, ranks: Collectives) -> None:
        self.ranks, self.networks = ranks, list[NetworkGradients]()
        ranks.reduction = self

    def of(self, weights: Sequence[Tensor]) -> NetworkGradients:
        """Add a network with these weights."""
        self.networks.append(NetworkGradients(weights, self.ranks))
        return self.networks[-1]

    def under_way(self) -> tuple[int, int]:
        """Index of the network whose sums are running, and how many have begun."""
        running = [(index, len(network.sent)) for index, network in enumerate(self.networks) if network.sent]
        return running[0] if running else (0, 0)

    def give_up(self, begun: Sequence[tuple[int, int]]) -> None:
        """Complete the sums that some rank has begun; `begun` are the :meth:`under_way` of all ranks."""
        index, count = max(begun, key=lambda one: one[1])
        if count:
            self.networks[index].give_up(count)
