"""A tensor that is the CPU's to torch's C++ and a GPU's to Python, and refuses to mix devices as CUDA does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from distillbench.simulated_cuda.devices import CPU_GENERATOR, DEVICES, Generator
from distillbench.simulated_cuda.record import add_copy, add_launch, add_wait, place

H2D, D2H, D2D = "host to device", "device to host", "device to device"
# Operators for which CUDA has to know a result on the host: a size, a number or an error code.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "is_nonzero", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "histc", "_linalg_eigh", "_linalg_svd",
    "_linalg_check_errors", "linalg_eig", "linalg_lstsq", "_linalg_solve_ex", "linalg_cholesky", "linalg_inv",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# They read two tensors element by element, and take a number that lies in the memory of the CPU as one of them.
TAKES_NUMBERS = {"copy_", "fill_", "masked_fill", "masked_fill_", "addcmul_", "addcdiv_", "lerp_", "scalar_tensor"}


@dataclass(frozen=True)
class Operator:
    """What the simulation knows of an operator."""

    name: str
    is_view: bool
    takes_numbers: bool  # tensors of no dimension may be the CPU's
    draws: bool  # random numbers
    takes_generator: bool


@cache
def operator_of(func: Any) -> Operator:
    name = func._schema.name.split("::")[1]
    pointwise = torch.Tag.pointwise in func.tags or name.startswith("_foreach_") or name in TAKES_NUMBERS
    return Operator(
        name,
        func.is_view or name in ("_unsafe_view", "_reshape_alias"),
        pointwise or name.startswith("_fused_"),
        torch.Tag.nondeterministic_seeded in func.tags,
        any(argument.name == "generator" for argument in func._schema.arguments),
    )


class SimulatedTensor(torch.Tensor):
    """Wraps `elem`, a tensor of the CPU that nobody else holds, as one of device `index`."""

    elem: Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor, index: int, requires_grad: bool = False) -> SimulatedTensor:
        DEVICES.count_storage(elem, index)
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip
        wrapper.elem, wrapper.index = elem, index
        return wrapper

    # what Python sees

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
        """Memory is freed when nothing holds it: there is nothing to do."""

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

    # what moves or reads it

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
        return self.to(torch.device("cuda", DEVICES.current) if device is None else torch.device("cuda", device)
                       if isinstance(device, int) else device)  # fmt: skip

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
        if isinstance(value, bool | int | float):  # CUDA fills, and C++ would copy a tensor of the CPU
            value = SimulatedTensor(torch.tensor(value, dtype=self.dtype), self.index)
        torch.Tensor.__setitem__(self, key, value)

    @property
    def data(self) -> Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, SimulatedTensor):
            raise RuntimeError("incompatible tensor type: data of the CPU for a tensor of a simulated GPU")
        torch.Tensor.data.__set__(self, value)
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
            twin._is_param = True  # what makes it a torch.nn.Parameter
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError("a tensor of a simulated GPU cannot be pickled: move it to the CPU first")

    def _wait(self, what: str) -> None:
        DEVICES.refuse_while_capturing(what)
        add_wait(what)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


# --- operators -------------------------------------------------------------------------------------------------------


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def unwrapped(value: Any) -> Any:
    """The CPU's tensors of all simulated ones in `value`."""
    if isinstance(value, SimulatedTensor):
        return value.elem
    if isinstance(value, list | tuple):
        return type(value)(map(unwrapped, value))
    if isinstance(value, dict):
        return {name: unwrapped(part) for name, part in value.items()}
    return value


def _dispatched(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    operator = operator_of(func)
    tensors = _tensors([*args, *kwargs.values()])
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    if not ours:  # a factory that C++ calls for itself
        return func(*args, **kwargs)
    index = ours[0].index
    if len(ours) != len(tensors) or any(tensor.index != index for tensor in ours):
        _check_devices(func, operator, args, kwargs, tensors)
    _check_waits(operator, args, kwargs)
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
    """The same computation, from and to the same memory."""
    before = _tensors([out])

    def replay() -> None:
        after = _tensors([func(*args, **kwargs)])
        for mine, new in zip(before, after, strict=True):
            if mine.data_ptr() != new.data_ptr():
                mine.copy_(new)

    return replay


def _check_waits(operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Note it where CUDA waits for the device."""
    name = operator.name
    masked = name in INDEXING and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    sized = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in WAITING or masked or sized:
        what = "item" if name == "_local_scalar_dense" else "a mask as an index" if masked else name
        DEVICES.refuse_while_capturing(what)
        add_wait(what)


def _check_devices(func: Any, operator: Operator, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    """Copies are noted; raise RuntimeError where torch does not take tensors of these devices together."""
    if operator.name == "copy_":
        _note_copy(args[0], args[1], bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False)))
        return
    if operator.name in INDEXING and isinstance(args[0], SimulatedTensor):
        indices = [index for index in args[1] if index is not None]
        values = [value for value in args[2:3] if isinstance(value, Tensor) and value.ndim]
        if all(_home(value) == args[0].index for value in values) and all(
            _home(index) in (None, args[0].index) for index in indices
        ):
            for index in (index for index in indices if _home(index) is None):
                note_copy_from_host(index.numel() * index.element_size(), DEVICES.is_pinned(index), True)
            return
    elif operator.takes_numbers:
        listed = _tensors(value for value in args if isinstance(value, list | tuple))
        of_devices = {_home(tensor) for tensor in tensors if tensor.ndim or any(tensor is one for one in listed)}
        of_devices |= {_home(tensor) for tensor in tensors} - {None}
        if len(of_devices) <= 1:
            return
    raise mixed(tensors, f"operator aten::{operator.name}")


def mixed(tensors: list[Tensor], where: str) -> RuntimeError:
    """The error for tensors that are not on one device."""
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {_in_words(tensors)}! "
        f"({where} at {place()})"
    )


def _home(tensor: Tensor) -> int | None:
    """The device's index; None: the CPU."""
    return tensor.index if isinstance(tensor, SimulatedTensor) else None


def _in_words(tensors: list[Tensor]) -> str:
    """The devices, and the shape of the first tensor on each."""
    first = {str(tensor.device): tuple(tensor.shape) for tensor in reversed(tensors)}
    names = [f"{device} {shape}" for device, shape in sorted(first.items(), reverse=True)]
    return ", ".join(names[:-1]) + " and " + names[-1]


def _with_generator(operator: Operator, args: Any, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
    """Random numbers come from a generator of the device. One that is given was checked before C++ unwrapped it."""
    given = kwargs.get("generator") or next((arg for arg in args if isinstance(arg, CPU_GENERATOR)), None)
    if given is not None or not operator.takes_generator:
        return kwargs
    return kwargs | {"generator": DEVICES.generators[index]}


def check_generator(generator: Any, index: int | None) -> None:
    """Raise RuntimeError for a generator that is not of the device `index`; None: the CPU."""
    if generator is None:
        return
    own = generator.index if isinstance(generator, Generator) else None
    if own != index:
        wanted, found = ("cpu" if one is None else f"cuda:{one}" for one in (index, own))
        if own is None or index is None:  # of another kind of device
            wanted, found = wanted.split(":")[0], found.split(":")[0]
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}' (at {place()})")
    capture = DEVICES.capture
    if capture is None or index is None or generator in (DEVICES.generators[index], *capture.generators):
        return
    raise RuntimeError(
        "Attempt to increase offset for a CUDA generator not in capture mode: register it with "
        f"CUDAGraph.register_generator_state (at {place()})"
    )


# --- copies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What a call of Tensor.to asks for."""

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


def note_copy_from_host(size: int, pinned: bool, blocking: bool) -> None:
    """A copy to a device. From pageable memory it is never asynchronous."""
    if not pinned or blocking:
        DEVICES.refuse_while_capturing("copy from the host")
    add_copy(H2D, size, pinned, blocking or not pinned)


def _note_copy(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    size = source.numel() * source.element_size()
    if isinstance(target, SimulatedTensor) and isinstance(source, SimulatedTensor):
        add_copy(D2D, size, False, False)
    elif isinstance(target, SimulatedTensor):
        pinned = DEVICES.is_pinned(source)
        note_copy_from_host(size, pinned, not non_blocking)
    else:
        pinned = DEVICES.is_pinned(target)
        if not (pinned and non_blocking):
            DEVICES.refuse_while_capturing("copy to the host")
        add_copy(D2H, size, pinned, not (pinned and non_blocking))


class _Moved(torch.autograd.Function):
    """A copy on another device, through which gradients flow back."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, target: int | None, wanted: Wanted) -> Tensor:
        ctx.source, ctx.wanted = _home(source), wanted
        return moved_without_gradient(source, target, wanted)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return moved_without_gradient(gradient, ctx.source, Wanted(dtype=gradient.dtype)), None, None


def _moved(source: Tensor, target: int | None, wanted: Wanted) -> Tensor:
    if source.requires_grad and torch.is_grad_enabled():
        return _Moved.apply(source, target, wanted)
    return moved_without_gradient(source, target, wanted)


def moved(source: Tensor, target: int | None, wanted: Wanted) -> Tensor:
    """`source` on another device; `target`: its index, None for the CPU."""
    if wanted.dtype is not None and wanted.dtype != source.dtype:
        source = torch.Tensor.to(unwrapped(source), wanted.dtype) if _home(source) is None else source.to(wanted.dtype)
    return _moved(source, target, wanted)


def moved_without_gradient(source: Tensor, target: int | None, wanted: Wanted) -> Tensor:
    """The same, as a copy that no gradient knows of. One to the host that is not blocking goes to pinned memory."""
    size = source.numel() * source.element_size()
    plain = unwrapped(source.detach())
    if _home(source) is None:
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
