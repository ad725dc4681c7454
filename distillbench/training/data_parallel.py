"""The ranks that train one student, each on its own rows of every batch (data parallel).

They are started by ``accelerate launch`` or ``torchrun``. Rank 0 plans, writes files and decides; the other ranks
follow its orders (:mod:`distillbench.execution.followers`). All draw the random numbers of whole batches from the same
seed, so a batch does not depend on the number of ranks. Gradients are summed
(:mod:`distillbench.training.gradient_reduction`), and the weights of all ranks stay bit-identical.

Decisions that depend on a clock, a signal or a counter are made by rank 0, or on the sum over all ranks: a message of
a few bytes over gloo, for which no device waits. Each such message also says whether its rank has failed. If one has,
all ranks learn of it at their next message, leave the joint block and raise the same error.
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

from distillbench.errors import DivergedError, UserError
from distillbench.metering.energy import NO_ENERGY, Energy
from distillbench.system.dtensors import is_sharded
from distillbench.system.launchers import by_mpi, check_alone, started_together
from distillbench.training.failures import Failed, Failure, LostError, translated, worst
from distillbench.training.network_rows import sum_of_rows
from distillbench.training.share import WHOLE, Share

if TYPE_CHECKING:
    from distillbench.training.budget import Meter, TrainingCost
    from distillbench.training.gradient_reduction import GradientReduction

# How long a rank waits for the others.
ORDER_TIMEOUT = timedelta(days=30)  # messages over gloo: rank 0 may be evaluating
TENSOR_TIMEOUT = timedelta(minutes=10)  # such as gradients, which all send within a step: NCCL on GPUs
MESSAGE_NUMBERS = 3  # most numbers in a message
SUMMED_FIELDS = (
    "teacher_nfe", "student_nfe", "teacher_backward", "student_backward", "student_backward_input", "stand_in_nfe",
    "stand_in_backward", "teacher_along", "student_along",
)  # fields of TrainingCost that are summed over ranks  # fmt: skip


class Ranks:
    """A single process; :class:`DataParallelRanks` is for several."""

    share: Share = WHOLE
    busy = False  # in a joint block, where followers take no order

    @property
    def count(self) -> int:
        return self.share.count

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which decides and writes."""
        return self.share.index == 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum the tensors over all ranks, in place."""

    def all_reduce_number(self, number: float) -> float:
        """The sum of `number` over all ranks."""
        return number

    def progress(self, meter: Meter) -> float:
        """Used share of the budget: images and evaluations of all ranks, seconds of rank 0."""
        return meter.progress()

    def status(self, meter: Meter, due: bool) -> tuple[float, bool]:
        """The progress, and whether a state is `due` on rank 0: one message for both."""
        return meter.progress(), due

    def broadcast_flag(self, decision: bool) -> bool:
        """The decision of rank 0."""
        return decision

    def main_first(self) -> AbstractContextManager[None]:
        """A block that rank 0 runs before the others."""
        return _nothing()

    def broadcast_module(self, module: nn.Module) -> None:
        """Copy the tensors of `module` from rank 0 to all ranks, except for sharded ones."""

    def sum_cost(self, cost: TrainingCost) -> TrainingCost:
        """The cost on all ranks together."""
        return cost

    def sum_energy(self, energy: Energy) -> Energy:
        """The energy of all ranks together."""
        return energy

    def own_cost(self, cost: TrainingCost, energy: Energy) -> tuple[TrainingCost, Energy]:
        """This rank's part of a total cost and energy: everything on rank 0, nothing on the others."""
        return cost, energy

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order, on every rank."""
        return [value]

    def gather(self, value: Any) -> list[Any]:
        """The same on rank 0; [] on the others."""
        return [value]

    def scatter(self, values: Sequence[Any]) -> Any:
        """This rank's own of the `values` of rank 0, one for each rank."""
        return values[0]

    def lead(self, order: Any, recovers: bool = True) -> AbstractContextManager[None]:
        """A joint block on rank 0: the other ranks receive `order` and run the same block in :meth:`follow`.

        If it fails on one rank, it raises the same error on all of them, and they can take another order. With
        ``recovers=False`` they cannot: the others may wait within the block for messages that never come.
        """
        return _nothing()

    def follow(self, recovers: bool = True) -> AbstractContextManager[None]:
        """The same block on the other ranks."""
        return _nothing()

    def next_order(self) -> Any:
        """The next order of rank 0; None: the run is over."""

    def close(self) -> None:
        """Leave the process group. Rank 0 ends the others too, unless a joint block was interrupted."""


SINGLE_RANK = Ranks()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class DataParallelRanks(Ranks):
    """Several ranks, connected by Hugging Face accelerate."""

    def __init__(self, cpu: bool) -> None:
        import torch.distributed as distributed
        from accelerate import PartialState

        os.environ.setdefault("OMP_NUM_THREADS", "1")  # accelerate would set its own; the setting `threads` decides
        state = PartialState(cpu=cpu, timeout=TENSOR_TIMEOUT)
        self.share = Share(state.process_index, state.num_processes)
        self.device = str(state.device)
        self.reduction: GradientReduction | None = None  # of the training that runs
        self._distributed = distributed
        self._control = distributed.new_group(backend="gloo", timeout=ORDER_TIMEOUT)

    def _send(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a collective of torch.distributed. Raises LostError if another rank does not answer."""
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if (meant := translated(error)) is error:
                raise
            raise meant from error

    # --- messages of a few numbers, which also say whether a rank has failed ---

    def exchange(self, *numbers: float) -> list[list[float]]:
        """The numbers (at most MESSAGE_NUMBERS) of every rank in order. Raises Failed if a rank has failed."""
        return self._exchange(None, *numbers)

    def _exchange(self, error: Exception | None, *numbers: float) -> list[list[float]]:
        numbers += (0.0,) * (MESSAGE_NUMBERS - len(numbers))  # all messages have one length, whatever they are about
        mine = torch.tensor([error is not None, *numbers], dtype=torch.float64)
        table = torch.empty(self.count * len(mine), dtype=torch.float64)
        self._send(self._distributed.all_gather_into_tensor, table, mine, group=self._control)
        rows = table.view(self.count, -1).tolist()
        if any(failed for failed, *_ in rows):
            raise Failed(self._agreed_error(error))
        return [theirs for _, *theirs in rows]

    def _agreed_error(self, error: Exception | None) -> Exception:
        """The error that all ranks raise, this one's or another's. Sums of gradients that have begun are completed."""
        rank = self.share.index
        failure = None if error is None else Failure.of(error, rank)
        begun = (0, 0) if self.reduction is None else self.reduction.under_way()
        rows: list[Any] = [None] * self.count
        self._send(self._distributed.all_gather_object, rows, (failure, begun), group=self._control)
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
                if not recovers and not isinstance(own, DivergedError):  # all ranks have raised it
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
            with suppress(LostError):  # one of them has died, and its launcher says so
                self._send(self._distributed.broadcast_object_list, [None], 0, group=self._control)
        if not self.busy:
            self._distributed.destroy_process_group()

    # --- decisions and sums of numbers ---

    def all_reduce_number(self, number: float) -> float:
        return sum(theirs for theirs, *_ in self.exchange(number))

    def progress(self, meter: Meter) -> float:
        if meter.budget.limit == "images":
            return meter.progress()  # every rank counts whole batches
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

    def sum_cost(self, cost: TrainingCost) -> TrainingCost:
        counts, networks = zip(
            *self.all_gather(([getattr(cost, n) for n in SUMMED_FIELDS], cost.networks)), strict=True
        )
        total: dict[str, Any] = {name: sum(each) for name, *each in zip(SUMMED_FIELDS, *counts, strict=True)}
        return replace(cost, networks=sum_of_rows(each for own in networks for each in own), **total)

    def own_cost(self, cost: TrainingCost, energy: Energy) -> tuple[TrainingCost, Energy]:
        if self.main:
            return cost, energy
        return replace(cost, networks=(), **dict.fromkeys(SUMMED_FIELDS, 0)), NO_ENERGY

    def sum_energy(self, energy: Energy) -> Energy:
        first, *others = self.all_gather(energy)
        return sum(others, start=first)

    # --- messages of Python objects ---

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

    # --- tensors on the device ---

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._send(self._distributed.all_reduce, tensor)

    def start_all_reduce(self, buffer: Tensor) -> Any:
        """Begin to sum the buffers of all ranks, in place; :meth:`wait_for` the result."""
        return self._send(self._distributed.all_reduce, buffer, async_op=True)

    def wait_for(self, work: Any) -> None:
        """Order what follows after the sum; on a GPU this process does not wait itself."""
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
    """The ranks of the launcher that has started this process, or a single one without a launcher.

    `device` is the setting. Raises UserError if several ranks cannot use it.
    """
    if not started_together():
        check_alone()
        yield SINGLE_RANK
        return
    if device.startswith("cuda:"):
        raise UserError(f"device={device}: each of several ranks has its own GPU. Possible: auto, cuda, cpu")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if by_mpi() and not on_cpu:
        raise UserError(f"device={device}: accelerate starts processes by MPI for CPUs only. Possible: cpu")
    ranks = DataParallelRanks(on_cpu)
    try:
        yield ranks
    finally:
        ranks.close()
