"""A tensor on the CPU for torch's C++ and on a GPU for Python, which raises CUDA's errors for mixed devices."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distillbench.simulated_cuda.checks import (
    D2D,
    D2H,
    DevicesMixed,
    Operator,
    check_devices,
    check_waits,
    home,
    note_copy_from_host,
    operator_of,
    tensors_of,
    unwrapped,
)
from distillbench.simulated_cuda.devices import CPU_GENERATOR, DEVICES, OfDevice
from distillbench.simulated_cuda.record import add_copy, add_launch, add_wait

DATA: Any = torch.Tensor.data  # a descriptor
FACTORIES = {"zeros", "ones", "empty", "empty_strided", "full", "scalar_tensor", "arange", "eye", "linspace"}


class SimulatedTensor(OfDevice, torch.Tensor):
    """Wraps `elem`, a CPU tensor without other users, as a tensor of device `index`."""

    elem: Tensor
    index: int

    @staticmethod
    def __new__(cls, elem: Tensor, index: int, requires_grad: bool = False) -> SimulatedTensor:
        DEVICES.count_storage(elem, index)
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=torch.device("cpu"), requires_grad=requires_grad,
        )  # fmt: skip
        wrapper.elem, wrapper.index = elem, index
        return wrapper

    # attributes in Python

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return self.index

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def pin_memory(self, device: Any = None) -> NoReturn:
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None:
        """Nothing to do: memory is freed when its last tensor is."""

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        if dtype is None:
            return torch.Tensor.type(self.elem).replace("torch.", "torch.cuda.")
        return self.to(dtype)

    def __repr__(self, **about: Any) -> str:
        self._wait("repr")
        return torch.Tensor.__repr__(self.elem.detach())[:-1] + f", device='{self.device}')"

    # moves and reads

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        wanted = Wanted.of(args, kwargs)
        target = self.index if wanted.device is None else DEVICES.index_of(wanted.device)
        dtype = wanted.dtype or self.dtype
        if target == self.index:
            layout = {} if wanted.memory_format is None else {"memory_format": wanted.memory_format}
            return torch.Tensor.to(self, dtype, copy=wanted.copy, **layout)
        source = self if dtype == self.dtype else torch.Tensor.to(self, dtype)
        return _moved(source, target, wanted)

    def cpu(self, memory_format: Any = None) -> Tensor:
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Tensor:
        device = DEVICES.current if device is None else device
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device)

    def numpy(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    __array__ = numpy

    def tolist(self) -> Any:
        self._wait("tolist")
        return self.elem.tolist()

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, bool | int | float):  # CUDA fills; C++ would copy a CPU tensor
            value = SimulatedTensor(torch.tensor(value, dtype=self.dtype), self.index)
        torch.Tensor.__setitem__(self, key, value)

    @property
    def data(self) -> Tensor:
        return DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, SimulatedTensor):
            raise RuntimeError("incompatible tensor type: data of the CPU for a tensor of a simulated GPU")
        DATA.__set__(self, value)
        self.elem, self.index = value.elem, value.index

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user support the deepcopy protocol at the moment"
            )
        twin = SimulatedTensor(self.elem.detach().clone(), self.index, self.requires_grad)
        add_launch("clone")
        if vars(self).get("_is_param"):
            twin._is_param = True  # marks a torch.nn.Parameter
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError("a tensor of a simulated GPU cannot be pickled: move it to the CPU first")

    def _wait(self, what: str) -> None:
        DEVICES.refuse_while_capturing(what)
        add_wait(what)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A composite operator may create CPU tensors in C++ and mix devices: then run it again in a mode for them."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return func(*args, **kwargs)
            except DevicesMixed as mixed:
                ours = (t for t in tensors_of([*args, *kwargs.values()]) if isinstance(t, SimulatedTensor))
                try:
                    with FactoriesOfOperators(next(ours).index):
                        return func(*args, **kwargs)
                except Exception:
                    raise mixed from None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


# --- operators -------------------------------------------------------------------------------------------------------


class _Python(threading.local):
    """Whether a factory was called from Python, which names the device, and not within an operator."""

    depth = 0


PYTHON = _Python()


@contextmanager
def from_python() -> Iterator[None]:
    PYTHON.depth += 1
    try:
        yield
    finally:
        PYTHON.depth -= 1


class FactoriesOfOperators(TorchDispatchMode):
    """Tensors that C++ creates "on the device of" a simulated tensor, which is the CPU to C++, become simulated."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        made = not PYTHON.depth and func._schema.name.removeprefix("aten::") in FACTORIES
        return SimulatedTensor(out, self.index) if made else out


def _dispatched(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    operator = operator_of(func)
    tensors = tensors_of([*args, *kwargs.values()])
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    if not ours:  # a factory called within an operator
        return func(*args, **kwargs)
    index = ours[0].index
    if len(ours) != len(tensors) or any(tensor.index != index for tensor in ours):
        check_devices(func, operator, args, kwargs, tensors)
    check_waits(operator, args, kwargs)
    if operator.draws:
        kwargs = _with_generator(operator, args, kwargs, index)
    if not operator.is_view:
        add_launch(operator.name)
    args, kwargs = unwrapped(args), unwrapped(kwargs)
    out = _computed(func, operator, args, kwargs, index)
    known = {id(tensor.elem): tensor for tensor in ours} | {id(t): t for t in tensors}
    result = _wrapped(out, index, known)
    if DEVICES.capture is not None and not operator.is_view:
        DEVICES.capture.tape.append(_again(func, args, kwargs, out))
    return result


def _computed(func: Any, operator: Operator, args: Any, kwargs: Any, index: int) -> Any:
    if not operator.draws or operator.takes_generator:
        return func(*args, **kwargs)
    generator, before = DEVICES.generators[index], torch.get_rng_state()  # the device's default generator
    torch.set_rng_state(generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _wrapped(value: Any, index: int, known: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else SimulatedTensor(value, index)
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(part, index, known) for part in value)
    return value


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """The same computation on the same memory."""
    before = tensors_of([out])

    def replay() -> None:
        after = tensors_of([func(*args, **kwargs)])
        for result, new in zip(before, after, strict=True):
            if result.data_ptr() != new.data_ptr():
                result.copy_(new)

    return replay


def _with_generator(operator: Operator, args: Any, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
    """Random numbers come from a generator of the device. A given one was checked before C++ unwrapped it."""
    given = kwargs.get("generator") or next((arg for arg in args if isinstance(arg, CPU_GENERATOR)), None)
    if given is not None or not operator.takes_generator:
        return kwargs
    return kwargs | {"generator": DEVICES.generators[index]}


# --- copies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The arguments of Tensor.to."""

    device: Any = None
    dtype: torch.dtype | None = None
    non_blocking: bool = False
    copy: bool = False
    memory_format: Any = None

    @staticmethod
    def of(args: Sequence[Any], kwargs: dict[str, Any]) -> Wanted:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        flags = list(args)
        other = kwargs.get("other")
        if flags and isinstance(flags[0], Tensor):
            other = flags.pop(0)
        if other is not None:
            device, dtype = other.device, other.dtype
        elif flags and isinstance(flags[0], torch.dtype):
            dtype = flags.pop(0)
        elif flags:
            device = flags.pop(0)
            dtype = flags.pop(0) if flags and not isinstance(flags[0], bool) else dtype
        names = dict(zip(("non_blocking", "copy"), flags, strict=False)) | kwargs
        return Wanted(
            device, dtype, names.get("non_blocking", False), names.get("copy", False), kwargs.get("memory_format")
        )


class _Moved(torch.autograd.Function):
    """A differentiable copy on another device."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, target: int | None, wanted: Wanted) -> Tensor:
        ctx.source, ctx.wanted = home(source), wanted
        return moved_without_gradient(source, target, wanted)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return moved_without_gradient(gradient, ctx.source, Wanted(dtype=gradient.dtype)), None, None


def _moved(source: Tensor, target: int | None, wanted: Wanted) -> Tensor:
    if source.requires_grad and torch.is_grad_enabled():
        return _Moved.apply(source, target, wanted)
    return moved_without_gradient(source, target, wanted)


def moved(source: Tensor, target: int | None, wanted: Wanted) -> Tensor:
    """`source` on another device; `target` is its index, None for the CPU."""
    if wanted.dtype is not None and wanted.dtype != source.dtype:
        source = torch.Tensor.to(unwrapped(source), wanted.dtype) if home(source) is None else source.to(wanted.dtype)
    return _moved(source, target, wanted)


def moved_without_gradient(source: Tensor, target: int | None, wanted: Wanted) -> Tensor:
    """The same, not differentiable. A non-blocking copy to the host goes to pinned memory."""
    size = source.numel() * source.element_size()
    plain = unwrapped(source.detach())
    if home(source) is None:
        note_copy_from_host(size, DEVICES.is_pinned(plain), not wanted.non_blocking)
    elif target is None:
        if not wanted.non_blocking:
            DEVICES.refuse_while_capturing("copy to the host")
        add_copy(D2H, size, wanted.non_blocking, not wanted.non_blocking)
    else:
        add_copy(D2D, size, False, False)
    with torch.no_grad():
        copy = plain.clone() if wanted.memory_format is None else plain.clone(memory_format=wanted.memory_format)
    if target is not None:
        if DEVICES.capture is not None:
            DEVICES.capture.repeat(copy, lambda: plain)
        return SimulatedTensor(copy, target)
    return DEVICES.pin(copy) if wanted.non_blocking else copy
