"""The processes that train one student together, each on its own rows of every batch (data parallel).

They are started by ``accelerate launch`` or ``torchrun``. The first is the main one: it plans, writes and decides; the
others follow its orders (:mod:`distillbench.following`). All draw the numbers of whole batches from one generator, so
that a batch is the same however many share it. Gradients are summed (:mod:`distillbench.gradient_reduction`), and the
weights of all stay equal to the bit.

Decisions that hang on a clock, a signal or a counter are the main one's, or are made on the sum of all: a message of a
few bytes over gloo, for which no device waits. Each such message also says whether its process is well. Where one has
failed, all learn of it at their next message, leave what they do together and raise the same error.
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
from distillbench.failures import Failed, Failure, LostError, of_message, worst
from distillbench.launchers import by_mpi, check_alone, started_together
from distillbench.shards import is_sharded
from distillbench.share import WHOLE, Share

if TYPE_CHECKING:
    from distillbench.budget import Meter, Price
    from distillbench.gradient_reduction import GradientReduction

# How long a process waits for the others.
FOR_ORDERS = timedelta(days=30)  # of the main one, which may be evaluating: messages over gloo
FOR_TENSORS = timedelta(minutes=10)  # such as gradients, which all send within a step: NCCL on GPUs
NUMBERS = 3  # that a message can hold
COUNTED = (
    "teacher_nfe", "student_nfe", "teacher_backward", "student_backward", "student_backward_input", "stand_in_nfe",
    "stand_in_backward",
)  # fields of a price that add up over processes  # fmt: skip


class Ranks:
    """One process alone; what several do otherwise is in :class:`DataParallelRanks`."""

    share: Share = WHOLE
    busy = False  # in the midst of what all do, where followers take no order

    @property
    def count(self) -> int:
        return self.share.count

    @property
    def main(self) -> bool:
        """Whether this process is the one that decides and writes."""
        return self.share.index == 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Add up the tensors of all processes, in place."""

    def all_reduce_number(self, number: float) -> float:
        """The sum of the numbers of all processes."""
        return number

    def progress(self, meter: Meter) -> float:
        """Used share of the budget: images and evaluations of all processes, seconds of the main one."""
        return meter.progress()

    def status(self, meter: Meter, due: bool) -> tuple[float, bool]:
        """The progress, and whether a state is `due` in the main process: one message for both."""
        return meter.progress(), due

    def broadcast_flag(self, decision: bool) -> bool:
        """The decision of the main process."""
        return decision

    def main_first(self) -> AbstractContextManager[None]:
        """A block that the main process goes through before the others."""
        return _nothing()

    def broadcast_module(self, module: nn.Module) -> None:
        """Give all processes the tensors of the main one, but those that are spread over them."""

    def sum_price(self, price: Price) -> Price:
        """The price of all processes."""
        return price

    def sum_energy(self, energy: Energy) -> Energy:
        """The energy of all processes."""
        return energy

    def own_price(self, price: Price, energy: Energy) -> tuple[Price, Energy]:
        """This process's part of a price and an energy of all: the main one has it all."""
        return price, energy

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, in each of them."""
        return [value]

    def gather(self, value: Any) -> list[Any]:
        """The same in the main process; [] in the others."""
        return [value]

    def scatter(self, values: Sequence[Any]) -> Any:
        """This process's own of the main one's `values`."""
        return values[0]

    def lead(self, order: Any, recovers: bool = True) -> AbstractContextManager[None]:
        """A block that the followers go through as well, by this order: what it holds is done by all.

        Where it fails in one process, it raises the same error in all of them, and they can be given another order;
        not so without `recovers`, where the others may wait within the block for messages that never come.
        """
        return _nothing()

    def follow(self, recovers: bool = True) -> AbstractContextManager[None]:
        """The same block in a follower."""
        return _nothing()

    def next_order(self) -> Any:
        """The next order of the main process; None: to end."""

    def close(self) -> None:
        """Part from the others, who are told to end unless they are in the midst of something."""


SINGLE_RANK = Ranks()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class DataParallelRanks(Ranks):
    """Several processes, joined by Hugging Face accelerate."""

    def __init__(self, cpu: bool) -> None:
        import torch.distributed as distributed
        from accelerate import PartialState

        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the settings' threads hold; accelerate would set its own
        state = PartialState(cpu=cpu, timeout=FOR_TENSORS)
        self.share = Share(state.process_index, state.num_processes)
        self.device = str(state.device)
        self.reduction: GradientReduction | None = None  # of the training that runs
        self._distributed = distributed
        self._control = distributed.new_group(backend="gloo", timeout=FOR_ORDERS)

    def _send(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Raise LostError where another process does not answer."""
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if (meant := of_message(error)) is error:
                raise
            raise meant from error

    # --- messages of a few numbers, with which each process says that it is well ---

    def exchange(self, *numbers: float) -> list[list[float]]:
        """The numbers (at most NUMBERS) of every process, in their order. Raises Failed where one has failed."""
        return self._exchange(None, *numbers)

    def _exchange(self, error: Exception | None, *numbers: float) -> list[list[float]]:
        numbers += (0.0,) * (NUMBERS - len(numbers))  # all messages are of one length, whatever they are about
        mine = torch.tensor([error is not None, *numbers], dtype=torch.float64)
        table = torch.empty(self.count * len(mine), dtype=torch.float64)
        self._send(self._distributed.all_gather_into_tensor, table, mine, group=self._control)
        rows = table.view(self.count, -1).tolist()
        if any(failed for failed, *_ in rows):
            raise Failed(self._agreed_error(error))
        return [theirs for _, *theirs in rows]

    def _agreed_error(self, error: Exception | None) -> Exception:
        """The error that all raise: this process's own, or another's. Gradients on their way are summed first."""
        rank = self.share.index
        failure = None if error is None else Failure.of(error, rank)
        under_way = (0, 0) if self.reduction is None else self.reduction.under_way()
        rows: list[Any] = [None] * self.count
        self._send(self._distributed.all_gather_object, rows, (failure, under_way), group=self._control)
        if self.reduction is not None:
            self.reduction.give_up([begun for _, begun in rows])
            self.reduction = None
        chosen = worst([failure for failure, _ in rows if failure is not None])
        return error if error is not None and chosen.rank == rank else chosen.error()

    @contextmanager
    def lead(self, order: Any, recovers: bool = True) -> Iterator[None]:
        self._send(self._distributed.broadcast_object_list, [order], 0, group=self._control)
        with self.follow(recovers):
            yield

    @contextmanager
    def follow(self, recovers: bool = True) -> Iterator[None]:
        self.busy = True
        error: Exception | None = None
        try:
            try:
                yield
            except LostError:
                raise
            except Exception as own:
                if not recovers and not isinstance(own, DivergedError):  # which all of them have seen
                    raise
                error = own
            self._exchange(error)
        except Failed as failed:
            error = failed.error
        self.busy, self.reduction = False, None
        if error is not None:
            raise error

    def next_order(self) -> Any:
        orders: list[Any] = [None]
        self._send(self._distributed.broadcast_object_list, orders, 0, group=self._control)
        return orders[0]

    def close(self) -> None:
        if self.main and not self.busy:
            with suppress(LostError):  # one of them is gone, which its launcher tells
                self._send(self._distributed.broadcast_object_list, [None], 0, group=self._control)
        if not self.busy:
            self._distributed.destroy_process_group()

    # --- decisions and sums of numbers ---

    def all_reduce_number(self, number: float) -> float:
        return sum(theirs for theirs, *_ in self.exchange(number))

    def progress(self, meter: Meter) -> float:
        if meter.budget.limit == "images":
            return meter.progress()  # counted in whole batches by all
        return self.status(meter, False)[0]

    def status(self, meter: Meter, due: bool) -> tuple[float, bool]:
        rows = self.exchange(meter.spent(), due)
        limit, (spent, due_in_main, *_) = meter.budget.limit, rows[0]
        if limit == "nfe":
            spent = sum(theirs for theirs, *_ in rows)
        return spent / meter.budget.amount, bool(due_in_main)

    def broadcast_flag(self, decision: bool) -> bool:
        return bool(self.exchange(decision)[0][0])

    @contextmanager
    def main_first(self) -> Iterator[None]:
        if not self.main:
            self.exchange()
        yield
        if self.main:
            self.exchange()

    def sum_price(self, price: Price) -> Price:
        counts = self.all_gather([getattr(price, name) for name in COUNTED])
        return replace(price, **{name: sum(each) for name, *each in zip(COUNTED, *counts, strict=True)})

    def own_price(self, price: Price, energy: Energy) -> tuple[Price, Energy]:
        if self.main:
            return price, energy
        return replace(price, **dict.fromkeys(COUNTED, 0)), NO_ENERGY

    def sum_energy(self, energy: Energy) -> Energy:
        first, *others = self.all_gather(energy)
        return sum(others, start=first)

    # --- messages of other things ---

    def all_gather(self, value: Any) -> list[Any]:
        self.exchange()
        values: list[Any] = [None] * self.count
        self._send(self._distributed.all_gather_object, values, value, group=self._control)
        return values

    def gather(self, value: Any) -> list[Any]:
        self.exchange()
        values: list[Any] | None = [None] * self.count if self.main else None
        self._send(self._distributed.gather_object, value, values, group=self._control)
        return values or []

    def scatter(self, values: Sequence[Any]) -> Any:
        self.exchange()
        received: list[Any] = [None]
        given = list(values) if self.main else None
        self._send(self._distributed.scatter_object_list, received, given, group=self._control)
        return received[0]

    # --- tensors of the device ---

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._send(self._distributed.all_reduce, tensor)

    def start_all_reduce(self, buffer: Tensor) -> Any:
        """Add up the buffers of all processes, in place, while this one goes on; see :meth:`wait_for`."""
        return self._send(self._distributed.all_reduce, buffer, async_op=True)

    def wait_for(self, work: Any) -> None:
        """What is done with the buffer from now on comes after its sum; on a GPU, this process goes on at once."""
        self._send(work.wait)

    def broadcast_module(self, module: nn.Module) -> None:
        self.exchange()
        for tensor in [*module.parameters(), *module.buffers()]:
            if is_sharded(tensor):
                continue
            received = tensor.detach().contiguous()
            self._send(self._distributed.broadcast, received, 0)
            tensor.data.copy_(received)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that a launcher has started together with this one, or this one alone.

    `device` is as in the settings. Raises UserError where it cannot be shared.
    """
    if not started_together():
        check_alone()
        yield SINGLE_RANK
        return
    if device.startswith("cuda:"):
        raise UserError(f"device={device}: of several processes each has a GPU of its own. Possible: auto, cuda, cpu")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if by_mpi() and not on_cpu:
        raise UserError(f"device={device}: accelerate starts processes by MPI for CPUs only. Possible: cpu")
    ranks = DataParallelRanks(on_cpu)
    try:
        yield ranks
    finally:
        ranks.close()
