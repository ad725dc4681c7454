"""FLOPs, counted by torch: of any call, of one image through a network, and of a whole training.

One multiply-add is two FLOPs. torch has formulas for matrix products, convolutions and attention, forward and backward.
Other operators that compute are listed, not estimated (``Counted.not_counted``): for the networks of this project these
are element-wise operations, which grow with the pixels and not with the weights.

    FLOPs of a training = sum over kinds of networks of
        forward x F + to_weights x B_w + to_input x B_x + along x J

| symbol   | meaning                                                                                        |
|----------|------------------------------------------------------------------------------------------------|
| forward, to_weights, to_input, along | rows (images) of networks of that kind, counted at the networks    |
| F        | FLOPs of the forward pass of one row                                                           |
| B_w, B_x | of its backward pass to the weights that get a gradient (not to the input); to the input alone |
| J        | of its derivative along a direction in x_t and t (forward mode), besides F                     |

Each is measured on that network, with the weights that require a gradient: fewer for an adapter (LoRA) than for full
training. The sum equals ``count_flops`` of real training steps if all matrix products of a method are in its denoisers;
layers that a method adds itself, such as the embedding of a second time, are not counted, nor is what these rows do not
say: a backward pass through a tangent, and activations that are computed again in a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.denoiser import Counter, Denoiser
from distillbench.errors import Unavailable
from distillbench.system.dtensors import class_of
from distillbench.teachers.teacher import Teacher
from distillbench.training.network_rows import SEPARATOR, NetworkRows, name_of

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
    backward: int  # to the weights that get a gradient, not to the input; 0 for an analytic denoiser
    backward_input: int  # to the input alone
    along: int = 0  # of the derivative along a direction, besides the forward pass; 0 if it was not asked for
    not_counted: tuple[str, ...] = ()


def network_flops(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    conditioning: Conditioning = WITHOUT_CLASSES,
    device: str = "cpu",
    all_weights: bool = True,
    along: bool = False,
    features: Sequence[str] = (),
) -> NetworkFlops:
    """FLOPs of one image of `shape` (C,H,W), including the embedding of a guidance weight.

    The backward pass is to all weights, or with ``all_weights=False`` to those that require a gradient. With `along`
    the derivative along a direction in x_t and t is counted too, with the attention that has one (SDPBackend.MATH);
    raises Unavailable if an operator has no forward-mode derivative. With `features`, names of submodules, the backward
    pass starts from their outputs and not from the network's.

    Counters, weights, gradients, buffers and random generators are not changed.
    """
    schedule, dtype = denoiser.schedule, torch.get_default_dtype()
    x_t = torch.zeros(ROWS, *shape, device=device, dtype=dtype)
    t = torch.full((ROWS, 1, 1, 1), (schedule.t_min + schedule.t_max) / 2, device=device, dtype=torch.float64)
    c = conditioning.of_images(range(ROWS), device)
    of: nn.Module = _Features(denoiser, features) if features else denoiser
    buffers = {name: buffer.detach().clone() for name, buffer in of.named_buffers()}
    trained = {name for name, weight in of.named_parameters() if all_weights or weight.requires_grad}

    def run(x: Tensor, t: Tensor, need_weights: bool) -> tuple[Tensor, list[Tensor]]:
        weights = {name: weight.detach() for name, weight in of.named_parameters()}
        wanted = [weight.requires_grad_() for name, weight in weights.items() if need_weights and name in trained]
        return functional_call(of, weights | buffers, (x, t, c)), wanted

    def backward(x: Tensor, need_weights: bool) -> Counted:
        out, wanted = run(x, t, need_weights)
        inputs = wanted or [x]
        if not out.requires_grad:  # no weights, or nothing that depends on x
            return Counted(0, ())
        return count_flops(lambda: torch.autograd.grad(out.sum(), inputs, allow_unused=True))

    both = lambda x, t: run(x, t, False)[0]

    def derivative() -> Counted:
        with sdpa_kernel(SDPBackend.MATH):
            return count_flops(lambda: jvp(both, (x_t, t), (torch.ones_like(x_t), torch.ones_like(t))))

    with _uncounted(denoiser), _restored_random_state(device), torch.inference_mode(False):
        with torch.no_grad():
            forward = count_flops(lambda: both(x_t, t))
            try:
                twice = derivative() if along else forward
            except (NotImplementedError, RuntimeError) as error:
                raise Unavailable(f"a network has no forward-mode derivative: {str(error).splitlines()[0]}") from error
        with torch.enable_grad():
            to_weights, to_input = backward(x_t, True), backward(x_t.clone().requires_grad_(), False)
    names = {name for counted in (forward, twice, to_weights, to_input) for name in counted.not_counted}
    return NetworkFlops(
        forward=forward.flops // ROWS,
        backward=to_weights.flops // ROWS,
        backward_input=to_input.flops // ROWS,
        along=(twice.flops - forward.flops) // ROWS,
        not_counted=tuple(sorted(names)),
    )


class _Features(nn.Module):
    """All numbers in the features `names` of a denoiser, (B, numbers)."""

    def __init__(self, denoiser: Denoiser, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        _, features = self.denoiser.features(self.names, x_t, t, c, f_gradient=False)
        return torch.cat([feature.flatten(1) for feature in features.values()], dim=1)


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


def measured_flops(
    rows: Iterable[NetworkRows], teacher: Teacher, networks: Sequence[Denoiser], device: str = "cpu"
) -> dict[NetworkRows, NetworkFlops]:
    """The FLOPs of one row of each kind in `rows`, measured on the teacher, on `networks` or on a new student.

    The keys are :attr:`NetworkRows.kind`.

    `networks` are those that a method has trained. Raises Unavailable if none of them is of the kind of `rows`.
    """
    with _restored_random_state(device):  # new weights of a student are drawn
        known = [teacher.denoiser, *networks, teacher.student().to(device)]
    found: dict[tuple[int, bool, bool, str], NetworkFlops] = {}
    of_kind: dict[NetworkRows, NetworkFlops] = {}
    for each in rows:
        same = [d for d in known if _size(d) == (each.network, each.weights)]
        if each.counted == "student":  # its guidance weight may be an input
            same = [d for d in same if d is not teacher.denoiser] or same
        alike = [d for d in same if each.trained in (0, each.weights, _trained(d))]
        if not alike:
            why = "has left none of its class and size" if not same else "no longer trains the same weights of it"
            raise Unavailable(f"FLOPs of {each.network} with {each.weights:,} weights: the method {why}")
        key = id(alike[0]), each.trained in (0, each.weights), each.along > 0, each.features
        if key not in found:
            names = each.features.split(SEPARATOR) if each.features else ()
            found[key] = network_flops(alike[0], teacher.shape, teacher.conditioning, device, key[1], key[2], names)
        of_kind[each.kind] = found[key]
    return of_kind


def _size(denoiser: Denoiser) -> tuple[str, int]:
    return name_of(class_of(denoiser.network)), sum(weight.numel() for weight in denoiser.network.parameters())


def _trained(denoiser: Denoiser) -> int:
    return sum(weight.numel() for weight in denoiser.network.parameters() if weight.requires_grad)


def denoisers_of(method: nn.Module) -> list[Denoiser]:
    """The networks of a method whose FLOPs can be measured."""
    return [module for module in method.modules() if isinstance(module, Denoiser)]


def training_flops(rows: Iterable[NetworkRows], flops: Mapping[NetworkRows, NetworkFlops]) -> int:
    """FLOPs of a training in the denoisers of teacher and students; `flops` by :attr:`NetworkRows.kind`."""
    return sum(
        each.forward * one.forward
        + each.to_weights * one.backward
        + each.to_input * one.backward_input
        + each.along * one.along
        for each, one in ((each, flops[each.kind]) for each in rows)
    )
