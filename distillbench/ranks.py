"""The processes that train one student together, each on its own rows of every batch (data parallel).

They are started by ``accelerate launch`` or ``torchrun``. The first is the main one: it plans, writes and decides; the
others follow its orders (:mod:`distillbench.following`). All draw the numbers of whole batches from one generator, so
that a batch is the same however many share it. Gradients are summed, and the weights of all stay equal to the bit.

Decisions that hang on a clock, a signal or a counter are the main one's, or are made on the sum of all: a message of a
few bytes over gloo, for which no device waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillbench.energy import NO_ENERGY, Energy
from distillbench.errors import DivergedError, UserError
from distillbench.method import WHOLE, Share
from distillbench.shards import is_spread

if TYPE_CHECKING:
    from distillbench.budget import Meter, Price

PATIENCE = timedelta(days=30)  # followers wait while the main one evaluates
COUNTED = (
    "teacher_nfe", "student_nfe", "teacher_backward", "student_backward", "student_backward_input", "stand_in_nfe",
    "stand_in_backward",
)  # fields of a price that add up over processes  # fmt: skip


class Ranks:
    """One process alone; what several do otherwise is in :class:`Together`."""

    share: Share = WHOLE

    @property
    def count(self) -> int:
        return self.share.count

    @property
    def main(self) -> bool:
        """Whether this process is the one that decides and writes."""
        return self.share.index == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up the tensors of all processes, in place."""

    def progress(self, meter: Meter) -> float:
        """Used share of the budget: images and evaluations of all processes, seconds of the main one."""
        return meter.progress()

    def agree(self, told: bool) -> bool:
        """What the main process was told."""
        return told

    def first(self) -> AbstractContextManager[None]:
        """A block that the main process goes through before the others."""
        return _nothing()

    def equal(self, module: nn.Module) -> None:
        """Give all processes the tensors of the main one, but those that are spread over them."""

    def total(self, price: Price) -> Price:
        """The price of all processes."""
        return price

    def energy(self, energy: Energy) -> Energy:
        """The energy of all processes."""
        return energy

    def own(self, price: Price, energy: Energy) -> tuple[Price, Energy]:
        """This process's part of a price and an energy of all: the main one has it all."""
        return price, energy

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, in each of them."""
        return [value]

    def collect(self, value: Any) -> list[Any]:
        """The same in the main process; [] in the others."""
        return [value]

    def scatter(self, values: Sequence[Any]) -> Any:
        """This process's own of the main one's `values`."""
        return values[0]

    def ordered(self, order: Any) -> AbstractContextManager[None]:
        """A block that the followers go through as well, by this order: what it holds is done by all."""
        return _nothing()

    def take(self) -> Any:
        """The next order of the main process; None: to end."""

    def end(self) -> None:
        """Part from the others, who are told to end unless they are in the midst of something."""


ALONE = Ranks()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Together(Ranks):
    """Several processes, joined by Hugging Face accelerate."""

    def __init__(self, cpu: bool) -> None:
        import torch.distributed as distributed
        from accelerate import PartialState

        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the settings' threads hold; accelerate would set its own
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        self.share = Share(state.process_index, state.num_processes)
        self.device = str(state.device)
        self.busy = False  # followers do something, and cannot be told to end
        self._distributed = distributed
        self._control = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def _speak(self, function: Callable[..., object], *told: Any, **where: Any) -> None:
        """Raise UserError where another process has ended."""
        try:
            function(*told, **where)
        except RuntimeError as error:
            raise UserError(
                "another of the processes has ended, and says why itself; the same command goes on from what is kept"
            ) from error

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """In one message for each type of number."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for alike in by_type.values():
            flat = torch.cat([tensor.flatten() for tensor in alike])
            self._speak(self._distributed.all_reduce, flat)
            parts = flat.split([tensor.numel() for tensor in alike])
            torch._foreach_copy_(alike, [part.view_as(tensor) for part, tensor in zip(parts, alike, strict=True)])

    def progress(self, meter: Meter) -> float:
        limit = meter.budget.limit
        if limit == "images":
            return meter.progress()  # counted in whole batches by all
        spent = torch.tensor([meter.spent() if limit == "nfe" or self.main else 0.0], dtype=torch.float64)
        self._speak(self._distributed.all_reduce, spent, group=self._control)
        return spent.item() / meter.budget.amount

    def agree(self, told: bool) -> bool:
        flag = torch.tensor([told and self.main], dtype=torch.uint8)
        self._speak(self._distributed.broadcast, flag, 0, group=self._control)
        return bool(flag.item())

    @contextmanager
    def first(self) -> Iterator[None]:
        if not self.main:
            self._wait()
        yield
        if self.main:
            self._wait()

    def _wait(self) -> None:
        self._speak(self._distributed.barrier, group=self._control)

    def equal(self, module: nn.Module) -> None:
        for tensor in [*module.parameters(), *module.buffers()]:
            if is_spread(tensor):
                continue
            told = tensor.detach().contiguous()
            self._speak(self._distributed.broadcast, told, 0)
            tensor.data.copy_(told)

    def total(self, price: Price) -> Price:
        counts = torch.tensor([getattr(price, name) for name in COUNTED], dtype=torch.int64)
        self._speak(self._distributed.all_reduce, counts, group=self._control)
        return replace(price, **dict(zip(COUNTED, counts.tolist(), strict=True)))

    def own(self, price: Price, energy: Energy) -> tuple[Price, Energy]:
        if self.main:
            return price, energy
        return replace(price, **dict.fromkeys(COUNTED, 0)), NO_ENERGY

    def energy(self, energy: Energy) -> Energy:
        first, *others = self.gather(energy)
        return sum(others, start=first)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        self._speak(self._distributed.all_gather_object, values, value, group=self._control)
        return values

    def collect(self, value: Any) -> list[Any]:
        values: list[Any] | None = [None] * self.count if self.main else None
        self._speak(self._distributed.gather_object, value, values, group=self._control)
        return values or []

    def scatter(self, values: Sequence[Any]) -> Any:
        received: list[Any] = [None]
        given = list(values) if self.main else None
        self._speak(self._distributed.scatter_object_list, received, given, group=self._control)
        return received[0]

    @contextmanager
    def ordered(self, order: Any) -> Iterator[None]:
        self._give(order)
        self.busy = True
        try:
            yield
        except DivergedError:
            self.busy = False  # all of them have seen it
            raise
        self.busy = False

    def _give(self, order: Any) -> None:
        self._speak(self._distributed.broadcast_object_list, [order], 0, group=self._control)

    def take(self) -> Any:
        orders: list[Any] = [None]
        self._speak(self._distributed.broadcast_object_list, orders, 0, group=self._control)
        return orders[0]

    def end(self) -> None:
        if self.main and not self.busy:
            with suppress(UserError):  # one of them is gone, which its launcher tells
                self._give(None)
        if not self.busy:
            self._distributed.destroy_process_group()


def started_together() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1 and "RANK" in os.environ


def follows() -> bool:
    """Whether a launcher has started this process as another than the first of several."""
    return started_together() and os.environ["RANK"] != "0"


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that a launcher has started together with this one, or this one alone.

    `device` is as in the settings. Raises UserError where it cannot be shared.
    """
    if not started_together():
        yield ALONE
        return
    if device.startswith("cuda:"):
        raise UserError(f"device={device}: of several processes each has a GPU of its own. Possible: auto, cuda, cpu")
    ranks = Together(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield ranks
    finally:
        ranks.end()
