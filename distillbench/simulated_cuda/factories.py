"""torch's factory functions, and moves of CPU tensors to a device, for simulated GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._device
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from distillbench.simulated_cuda.checks import check_generator, mixed, note_copy_from_host
from distillbench.simulated_cuda.devices import CPU_GENERATOR, DEVICES, Generator
from distillbench.simulated_cuda.record import add_launch, within_backward
from distillbench.simulated_cuda.tensor import FactoriesOfOperators, SimulatedTensor, Wanted, from_python, moved

CREATING = (
    "empty", "zeros", "ones", "full", "arange", "linspace", "logspace", "eye", "empty_strided", "scalar_tensor",
    "tril_indices", "triu_indices", "hann_window", "hamming_window", "bartlett_window", "kaiser_window",
    "empty_permuted", "range",
)  # fmt: skip
DRAWING = ("rand", "randn", "randint", "randperm", "normal")
LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
IN_PLACE = ("normal_", "uniform_", "random_", "exponential_", "bernoulli_", "cauchy_", "geometric_", "log_normal_")
CHOOSING = ("bernoulli", "multinomial", "poisson")
COPYING = ("tensor", "as_tensor", "asarray")


def patch_factories() -> None:
    """Patch torch's factories for the simulated devices."""
    for name in (*CREATING, *DRAWING):
        if (real := vars(torch).get(name)) is not None:
            setattr(torch, name, _making(real, draws=name in DRAWING))
    for name in COPYING:
        setattr(torch, name, _copying(vars(torch)[name]))
    for name in LIKE:
        setattr(torch, name, _like(vars(torch)[name]))
    for name in NEW:
        setattr(torch.Tensor, name, _new(getattr(torch.Tensor, name)))
    for name in IN_PLACE:
        setattr(torch.Tensor, name, _drawing(getattr(torch.Tensor, name)))
    for name in CHOOSING:
        setattr(torch, name, _drawing(vars(torch)[name]))
        setattr(torch.Tensor, name, _drawing(getattr(torch.Tensor, name, vars(torch)[name])))
    _patch_tensors()
    torch.Generator = GeneratorOfAnyDevice  # type: ignore[misc]
    torch.autograd._engine_run_backward = _backward(torch.autograd._engine_run_backward)


def _device_of(kwargs: dict[str, Any]) -> Any:
    """The device given as an argument, or by ``with torch.device(...)``."""
    device = kwargs.get("device")
    if device is not None or not torch._C._len_torch_function_stack():
        return torch.utils._device.CURRENT_DEVICE if device is None else device
    contexts = (mode for mode in _get_current_function_mode_stack()[::-1] if isinstance(mode, DeviceContext))
    return next((context.device for context in contexts), None)


def _finished(
    elem: Tensor, index: int, again: Callable[[], Tensor] | None, operator: str, requires_grad: bool
) -> Tensor:
    add_launch(operator)
    if DEVICES.capture is not None and again is not None:
        DEVICES.capture.repeat(elem, again)
    return SimulatedTensor(elem, index, requires_grad)


def _making(real: Callable[..., Tensor], draws: bool) -> Callable[..., Tensor]:
    @functools.wraps(real)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        index, generator = DEVICES.index_of(_device_of(kwargs)), kwargs.get("generator")
        if index is None and draws and (home := _home_of(args)) is not None:  # torch.normal(mean)
            check_generator(generator, home)
            return real(*args, **kwargs)
        check_generator(generator, index)
        if index is None:
            pinned = kwargs.pop("pin_memory", False)
            with from_python():
                made = real(*args, **kwargs)
            return DEVICES.pin(made) if pinned else made
        if kwargs.pop("pin_memory", False):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        if draws and generator is None:
            kwargs["generator"] = DEVICES.generators[index]
        requires_grad = kwargs.pop("requires_grad", False)
        kwargs["device"] = "cpu"
        if kwargs.get("out") is not None:
            raise NotImplementedError("out= of a factory on a simulated GPU")

        def once() -> Tensor:
            with from_python():
                return real(*args, **kwargs)

        return _finished(once(), index, once, real.__name__, requires_grad)

    return make


def _copying(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Data of the host: a tensor on the CPU, then copied from pageable memory."""

    @functools.wraps(real)
    def copy(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        device = _device_of(kwargs)
        index = DEVICES.index_of(device)
        if isinstance(data, SimulatedTensor):
            kwargs.pop("device", None)
            result = real(data, *args, **kwargs)
            return result if device is None else result.to(device)
        if index is None:
            pinned = kwargs.pop("pin_memory", False)
            with from_python():
                made = real(data, *args, **kwargs)
            return DEVICES.pin(made) if pinned else made
        requires_grad = kwargs.pop("requires_grad", False)
        with from_python():
            made = real(data, *args, **kwargs | {"device": "cpu"})
        note_copy_from_host(made.numel() * made.element_size(), DEVICES.is_pinned(made), True)
        return SimulatedTensor(made.detach().clone(), index, requires_grad)

    return copy


def _like(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(real)
    def make(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is None:
            return real(like, *args, **kwargs)
        index = DEVICES.index_of(device)
        requires_grad = kwargs.pop("requires_grad", False)
        kwargs["device"] = "cpu"
        plain = like.elem if isinstance(like, SimulatedTensor) else like.detach()
        made = real(plain, *args, **kwargs)
        if index is None:
            return made.requires_grad_(requires_grad) if requires_grad else made
        return _finished(made, index, lambda: real(plain, *args, **kwargs), real.__name__, requires_grad)

    return make


def _new(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(real)
    def make(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        index = like.index if isinstance(like, SimulatedTensor) else None
        wanted = index if device is None else DEVICES.index_of(device)
        if wanted == index and real.__name__ != "new_tensor":
            return real(like, *args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        plain = like.elem if isinstance(like, SimulatedTensor) else like
        made = real(plain, *args, **kwargs)
        if real.__name__ == "new_tensor" and wanted is not None:
            note_copy_from_host(made.numel() * made.element_size(), False, True)
        if wanted is None:
            return made.requires_grad_(requires_grad) if requires_grad else made
        return _finished(made, wanted, None, real.__name__, requires_grad)

    return make


def _drawing(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Check that the generator is of the device of the tensors."""

    @functools.wraps(real)
    def draw(*args: Any, **kwargs: Any) -> Tensor:
        check_generator(kwargs.get("generator"), _home_of(args))
        return real(*args, **kwargs)

    return draw


def _home_of(values: Iterable[Any]) -> int | None:
    """The index of the device of the first simulated tensor in `values`; None without one."""
    return next((value.index for value in values if isinstance(value, SimulatedTensor)), None)


# --- tensors of the CPU ----------------------------------------------------------------------------------------------


def _patch_tensors() -> None:
    to = torch.Tensor.to

    @functools.wraps(to)
    def move(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self, SimulatedTensor):  # its own method decides
            return to(self, *args, **kwargs)
        wanted = Wanted.of(args, kwargs)
        index = DEVICES.index_of(wanted.device)
        return to(self, *args, **kwargs) if index is None else moved(self, index, wanted)

    def cuda(self: Tensor, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Tensor:
        index = DEVICES.current if device is None else DEVICES.index_of(device)
        return moved(self, index, Wanted(non_blocking=non_blocking, memory_format=memory_format))

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        return self if DEVICES.is_pinned(self) else DEVICES.pin(self.clone())

    torch.Tensor.to = move
    torch.Tensor.cuda = cuda
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = lambda self, device=None: DEVICES.is_pinned(self)  # type: ignore[arg-type]
    type_as = torch.Tensor.type_as
    torch.Tensor.type_as = lambda self, other: (
        self.to(other)
        if isinstance(other, SimulatedTensor) or isinstance(self, SimulatedTensor)
        else type_as(self, other)
    )


class _GeneratorOfAnyDevice(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, CPU_GENERATOR)

    def __call__(cls, device: Any = "cpu") -> Any:
        index = DEVICES.index_of(device)
        return CPU_GENERATOR(device) if index is None else Generator(index)


class GeneratorOfAnyDevice(metaclass=_GeneratorOfAnyDevice):
    """Replaces the class torch.Generator."""


# --- backward passes -------------------------------------------------------------------------------------------------


def _backward(run: Callable[..., Any]) -> Callable[..., Any]:
    run = within_backward(run)

    @functools.wraps(run)
    def backward(roots: Any, *args: Any, **kwargs: Any) -> Any:
        index = next((root.index for root in roots if isinstance(root, SimulatedTensor)), None)
        if index is None:
            return run(roots, *args, **kwargs)
        for root, gradient in zip(roots, args[0] if args else (), strict=False):
            if gradient is not None and isinstance(root, SimulatedTensor) is not isinstance(gradient, SimulatedTensor):
                raise mixed([root, gradient], "a gradient that is given")
        with FactoriesOfOperators(index):
            return run(roots, *args, **kwargs)

    return backward
