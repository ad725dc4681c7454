"""FLOPs, counted by torch: of any call, of one image through a network, and of a whole training.

One multiply-add is two FLOPs. torch has formulas for matrix products, convolutions and attention, forward and backward.
Other operators that compute are listed, not estimated (``Counted.not_counted``): for the networks of this project these
are element-wise operations, which grow with the pixels and not with the weights.

    FLOPs of a training = sum over networks of (images forward x FLOPs forward + images backward x FLOPs backward)

with the images that the counters of teacher and students hold (:class:`distillbench.training.budget.Price`). A backward
pass counts what it must compute: for a student gradients of the weights, without the input of the first layer; for a
frozen network gradients of the input alone. The sum equals ``count_flops`` of real training steps if all matrix
products of a method are in its denoisers; layers that a method adds itself, such as the embedding of a second time, are
not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Conditioning
from distillbench.diffusion.denoiser import Counter, Denoiser
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import Price

ROWS = 2  # images per measurement; a network with batch normalisation needs more than one

# Operators whose floating-point outputs are copied, selected or converted inputs, constants or random numbers.
# fmt: off
NO_ARITHMETIC = frozenset({
    "_to_copy", "_unsafe_index", "_unsafe_view", "cat", "clone", "constant_pad_nd", "contiguous", "copy", "copy_",
    "embedding", "empty_like", "fill", "fill_", "flip", "full_like", "gather", "index", "index_select",
    "lift_fresh", "masked_fill", "masked_fill_", "masked_select", "native_channel_shuffle", "new_empty",
    "new_empty_strided", "new_full", "new_ones", "new_zeros", "normal_", "ones_like", "pixel_shuffle",
    "pixel_unshuffle", "rand_like", "randn_like", "repeat", "resize_", "roll", "scatter", "select_backward",
    "select_scatter", "set_", "slice_backward", "slice_scatter", "stack", "take", "uniform_",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "where", "zero", "zero_", "zeros_like",
})
# fmt: on


@dataclass(frozen=True)
class Counted:
    """FLOPs of a call, and the names of operators that computed but have no FLOP formula in torch."""

    flops: int
    not_counted: tuple[str, ...]


def count_flops(call: Callable[[], Any]) -> Counted:
    """FLOPs of ``call()``, including its backward passes; a multiply-add is two."""
    with _Names() as names, FlopCounterMode(display=False) as counter:
        call()
    return Counted(counter.get_total_flops(), tuple(sorted(names.seen)))


class _Names(TorchDispatchMode):
    """Records the operators that compute and have no FLOP formula.

    An operator computes if it takes a tensor, returns floating-point numbers, is not a view and not in NO_ARITHMETIC
    (torch's tags do not say: a copy is "pointwise" too). So comparisons, integers, allocation and random numbers are
    left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        if packet not in flop_registry and name not in NO_ARITHMETIC and not func.is_view and _floating(out):
            given = [*args, *(kwargs or {}).values()]
            if any(True for _ in _tensors(given)):
                self.seen.add(f"{func.namespace}.{name}")
        return out


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _floating(out: Any) -> bool:
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in _tensors(out))


@dataclass(frozen=True)
class NetworkFlops:
    """FLOPs of one image (row) through a network."""

    forward: int
    backward: int  # to all weights, not to the input; 0 for an analytic denoiser
    backward_input: int  # to the input alone
    not_counted: tuple[str, ...] = ()


def network_flops(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    conditioning: Conditioning = WITHOUT_CLASSES,
    device: str = "cpu",
) -> NetworkFlops:
    """FLOPs of one image of `shape` (C,H,W), including the embedding of a guidance weight.

    Counters, weights, gradients, buffers and random generators are not changed.
    """
    schedule, dtype = denoiser.schedule, torch.get_default_dtype()
    x_t = torch.zeros(ROWS, *shape, device=device, dtype=dtype)
    t = torch.full((ROWS, 1, 1, 1), (schedule.t_min + schedule.t_max) / 2, device=device, dtype=torch.float64)
    c = conditioning.of_images(range(ROWS), device)
    buffers = {name: buffer.detach().clone() for name, buffer in denoiser.named_buffers()}

    def run(x: Tensor, need_weights: bool) -> tuple[Tensor, list[Tensor]]:
        weights = {name: weight.detach() for name, weight in denoiser.named_parameters()}
        wanted = [weight.requires_grad_() for weight in weights.values() if need_weights]
        return functional_call(denoiser, weights | buffers, (x, t, c)), wanted

    def backward(x: Tensor, need_weights: bool) -> Counted:
        out, wanted = run(x, need_weights)
        inputs = wanted or [x]
        if not out.requires_grad:  # no weights, or nothing that depends on x
            return Counted(0, ())
        return count_flops(lambda: torch.autograd.grad(out.sum(), inputs, allow_unused=True))

    with _uncounted(denoiser), _restored_random_state(device), torch.inference_mode(False):
        with torch.no_grad():
            forward = count_flops(lambda: run(x_t, False))
        with torch.enable_grad():
            to_weights, to_input = backward(x_t, True), backward(x_t.clone().requires_grad_(), False)
    names = {*forward.not_counted, *to_weights.not_counted, *to_input.not_counted}
    costs = forward.flops // ROWS, to_weights.flops // ROWS, to_input.flops // ROWS
    return NetworkFlops(*costs, not_counted=tuple(sorted(names)))


@contextmanager
def _uncounted(denoiser: Denoiser) -> Iterator[None]:
    counter, denoiser.counted.counter = denoiser.counted.counter, Counter()
    try:
        yield
    finally:
        denoiser.counted.counter = counter


def _restored_random_state(device: str) -> AbstractContextManager[None]:
    """A block after which torch's global random generators are restored."""
    return torch.random.fork_rng([] if device == "cpu" else [device])


def family_flops(teacher: Teacher, device: str = "cpu") -> tuple[NetworkFlops, NetworkFlops]:
    """FLOPs of one image through the teacher's network, and through a student's."""
    with _restored_random_state(device):  # new weights of a student are drawn
        student = teacher.student().to(device)
    parts = teacher.shape, teacher.conditioning, device
    return network_flops(teacher.denoiser, *parts), network_flops(student, *parts)


def training_flops(price: Price, teacher: NetworkFlops, student: NetworkFlops) -> int:
    """FLOPs of a training in the denoisers of teacher and students, from the counts in `price`."""
    own = price.teacher_nfe - price.stand_in_nfe
    own_backward = price.teacher_backward - price.stand_in_backward
    to_weights = price.student_backward - price.student_backward_input
    to_input = price.student_backward_input + price.stand_in_backward
    return (
        own * teacher.forward
        + own_backward * teacher.backward_input
        + (price.student_nfe + price.stand_in_nfe) * student.forward
        + to_weights * student.backward
        + to_input * student.backward_input
    )
