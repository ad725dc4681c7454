"""Pickles of NVIDIA's EDM networks, read without executing any code in them.

Such a file makes its reader call classes and functions, and (``torch_utils.persistence``) execute the network's source
code, which the file contains. Here :mod:`pickletools` splits the file into opcodes, and a stack machine executes only
those that build plain values. Names in the file are looked up only in :data:`CALLS`, :data:`CONTAINERS` and
:data:`DTYPES`, which hold functions of this module: a network becomes a :class:`PersistentObject` with the name of its
class and its attributes, and the source code is ignored. A file with any other name is refused.

Python's own ``pickle.Unpickler`` with a restricted ``find_class`` would not call anything else either, but it sets
attributes of any object, crashes the process on dict keys of deeply nested tuples, and takes the size of its memo from
the file.
"""

from __future__ import annotations

import pickletools
import reprlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from distillbench.errors import LONGEST_QUOTE, UserError, quoted

# What reading a damaged pickle can raise.
DAMAGED = ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError


class Refused(ValueError):
    """A file contains something that is not allowed."""


class RefusedName(Refused):
    """A file refers to `name`, which is not allowed."""

    def __init__(self, name: str) -> None:
        super().__init__(f"asks for {quoted(name)}, which no network needs")
        self.name = name


@dataclass
class PersistentObject:
    """An object represented by the name of its class and its attributes."""

    class_name: str
    state: dict[str, Any]


@dataclass
class _Dtype:
    """A numpy dtype: its code without the byte order, such as "f8", and the byte order."""

    code: str
    order: str = "="

    @property
    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


@dataclass
class Array:
    """A numpy array, whose values follow later in the file."""

    value: np.ndarray | None = None


@dataclass(frozen=True)
class _Bytes:
    """A tensor's storage that is not read."""


@dataclass(frozen=True)
class _Name:
    """An allowed name, and the function that replaces it."""

    name: str
    call: Callable[..., Any]


def read_pickle(file: Path, tensors: bool = True) -> Any:
    """The content of `file`: plain values, tensors on the CPU, and a :class:`PersistentObject` for each other object.

    With ``tensors=False`` their values are skipped, and tensors have only shapes (device "meta"). Raises UserError for
    a file that cannot be read, is not a pickle, or contains anything else.
    """
    try:
        with open(file, "rb") as stream:
            return _Machine(_CALLS_ON_META if not tensors else CALLS).run(pickletools.genops(stream))
    except Refused as error:
        raise UserError(
            f"{file.name!r} is refused, and nothing in it was executed: it {error}. Possible: pickles of networks as "
            "in NVIDIA's EDM release, of tensors, numbers, texts and plain containers"
        ) from error
    except DAMAGED as e:
        why = f"{type(e).__name__}: {e}".splitlines()[0][: 4 * LONGEST_QUOTE]
        raise UserError(f"{file.name!r} is not a readable pickle, or is damaged ({why})") from e


def read_arrays(stream: BinaryIO) -> Any:
    """Plain values and numpy arrays in a pickle of any protocol; strings of Python 2 become str. Raises ValueError."""
    try:
        return _Machine(CALLS_FOR_ARRAYS, old=True).run(pickletools.genops(stream))
    except Refused:
        raise
    except DAMAGED as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


# --- functions for the allowed names ---------------------------------------------------------------------------------


def _persistent_object(meta: Any) -> PersistentObject:
    """torch_utils.persistence: {"type": "class", "class_name": ..., "state": ..., "module_src": ...}."""
    if not (isinstance(meta, dict) and meta.get("type") == "class"):
        raise Refused("has a persistent object that is not of a class")
    name, state = meta.get("class_name"), meta.get("state")
    if not (isinstance(name, str) and isinstance(state, dict)):
        raise Refused("has a persistent object without a name or without attributes")
    return PersistentObject(name, state)


def _empty_dict() -> dict:
    return {}


# The magic number at the start of files of torch.save before 1.6, and of a pickled tensor's storage.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _storage(content: Any) -> torch.storage.TypedStorage:
    """A tensor's values, stored in the old format of torch.save, which is itself a pickle."""
    if not (isinstance(content, bytes) and content.startswith(LEGACY_MAGIC)):
        raise Refused("has a tensor whose values are not in torch's own format")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that typed storages are deprecated
            storage = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle.UnpicklingError, struct.error, EOFError, ...
        why = " ".join(str(error).split())[:LONGEST_QUOTE]
        raise Refused(f"has a tensor whose values torch does not load with weights_only=True ({why}...)") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise Refused(f"has a {type(storage).__name__} where a tensor's values should be")
    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *_: Any) -> Tensor:
    """A tensor that lies within its storage and has no overlapping elements."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise Refused("has a tensor without values")
    untyped, dtype = storage._untyped_storage, storage.dtype
    held, size, stride = untyped.nbytes() // dtype.itemsize, _numbers(size), _numbers(stride)
    last = _numbers([offset])[0] + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and not (last < held and _distinct(size, stride)):
        raise Refused("has a tensor larger than its values")
    return torch.empty(0, dtype=dtype).set_(untyped, offset, size, stride)


def _distinct(size: list[int], stride: list[int]) -> bool:
    """Whether no two elements of a tensor share memory."""
    dims = sorted((step, n) for n, step in zip(size, stride, strict=True) if n > 1)
    return all(step > 0 for step, _ in dims) and all(b >= a * n for (a, n), (b, _) in pairwise(dims))


def _tensor_on_meta(storage: Any, offset: Any, size: Any, *_: Any) -> Tensor:
    return torch.empty(_numbers(size), device="meta")


def _numbers(values: Any) -> list[int]:
    if not (isinstance(values, tuple | list) and all(type(n) is int and 0 <= n < 2**48 for n in values)):
        raise Refused("has a tensor without a shape")
    return list(values)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("has a parameter that is no tensor")
    return data


_KINDS = "biuf"  # numpy's booleans, integers and floating-point numbers


def _dtype(code: Any, align: Any = False, copy: Any = True) -> _Dtype:
    if not (isinstance(code, str) and code[:1] in _KINDS and code[1:] in ("1", "2", "4", "8")):
        raise Refused(f"has numpy values of the type {quoted(code if isinstance(code, str) else reprlib.repr(code))}")
    return _Dtype(code)


def _scalar(dtype: Any, content: Any) -> bool | int | float:
    if not (isinstance(dtype, _Dtype) and isinstance(content, bytes)):
        raise Refused("has a numpy number without a value")
    return np.frombuffer(content, dtype.numpy, count=1).item()


def _array(cls: Any, shape: Any, typecode: Any) -> Array:
    return Array()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """An array as it is stored by protocol 5."""
    return Array(_array_of((1, shape, dtype, order == "F", content)))


def _collection(make: Callable[[list], Any]) -> Callable[..., Any]:
    def collection(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise Refused("has a set that is not made from a list")
        return make([_key(item) for item in items])

    return collection


def _encode(text: Any, encoding: Any = "") -> bytes:
    """Bytes as they are stored by protocols below 3."""
    if not (isinstance(text, str) and encoding == "latin1"):
        raise Refused("asks for a text in another encoding than latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


def _never(*_: Any) -> NoReturn:
    raise Refused("calls a type")


# The functions that a file may call, by name.
CALLS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "dnnlib.util.EasyDict": _empty_dict,
    "collections.OrderedDict": _empty_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": lambda sizes=(): tuple(_numbers(sizes)),
    "numpy.dtype": _dtype,
    "numpy.ndarray": _never,
    "_codecs.encode": _encode,
    **{
        f"{module}.multiarray.{name}": call
        for module in ("numpy.core", "numpy._core")
        for name, call in (("scalar", _scalar), ("_reconstruct", _array))
    },
    **{
        f"{module}.{name}": call
        for module in ("builtins", "__builtin__")
        for name, call in (("set", _collection(set)), ("frozenset", _collection(frozenset)), ("bytes", _no_bytes))
    },
}

_CALLS_ON_META = CALLS | {
    "torch._utils._rebuild_tensor_v2": _tensor_on_meta,
    "torch.storage._load_from_bytes": lambda content: _Bytes(),
}

CALLS_FOR_ARRAYS = {name: call for name, call in CALLS.items() if name.startswith(("numpy.", "_codecs."))} | {
    f"{module}.numeric._frombuffer": _from_buffer for module in ("numpy.core", "numpy._core")
}

# Container modules of torch, which become a PersistentObject too.
CONTAINERS = {f"torch.nn.modules.container.{name}": name for name in ("ModuleDict", "ModuleList", "Sequential")}

DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


# --- the stack machine -----------------------------------------------------------------------------------------------


def _key(value: Any) -> Any:
    """A key of a dict or item of a set, which must be a scalar, so that hashing it is cheap."""
    if not isinstance(value, str | int | float | bytes | None | torch.dtype):
        raise Refused(f"has a {type(value).__name__} as a key")
    return value


def _pairs(items: list) -> Iterator[tuple[Any, Any]]:
    if len(items) % 2:
        raise Refused("has a key without a value")
    return zip(items[::2], items[1::2], strict=True)


_MARK = object()

_VALUES = {  # opcodes that push their argument
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

# Opcodes of protocols 0 and 1, Python 2's strings and protocol 5's buffers: used for arrays, not for EDM's networks.
_OLD_VALUES = ("INT", "LONG", "FLOAT", "STRING", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "BYTEARRAY8")


class _Machine:
    """The stack machine of pickle's protocols 2 to 5, restricted to opcodes that build values and look up names.

    `old`: protocols 0 and 1 too.
    """

    def __init__(self, calls: dict[str, Callable[..., Any]], old: bool = False) -> None:
        self.calls, self.old = calls, old
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, opcodes: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> Any:
        """Execute `opcodes` to the end of the pickle. Returns the value on the stack."""
        steps: dict[str, Callable[[Any], None]] = {
            "GLOBAL": lambda arg: self.push(self.look_up(*arg.split(" ", 1))),
            "STACK_GLOBAL": lambda arg: self.push(self.look_up(*self.pop(2))),
            "REDUCE": lambda arg: self.push(self.call(*self.pop(2))),
            "NEWOBJ": lambda arg: self.push(self.call(*self.pop(2))),
            "BUILD": lambda arg: self.build(*self.pop(1)),
            "TUPLE": lambda arg: self.push(tuple(self.pop_to_mark())),
            "FROZENSET": lambda arg: self.push(frozenset(map(_key, self.pop_to_mark()))),
            "APPEND": lambda arg: self.append(self.pop(1)),
            "APPENDS": lambda arg: self.append(self.pop_to_mark()),
            "SETITEM": lambda arg: self.set_items(self.pop(2)),
            "SETITEMS": lambda arg: self.set_items(self.pop_to_mark()),
            "ADDITEMS": lambda arg: self.add_items(self.pop_to_mark()),
            "POP": lambda arg: self.discard(),
            "POP_MARK": lambda arg: self.discard(to_mark=True),
            "DUP": lambda arg: self.push(self.top(object)),
            "MEMOIZE": lambda arg: self.remember(len(self.memo)),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self.remember),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda arg: self.push(self.recall(arg))),
            **dict.fromkeys(("PROTO", "FRAME"), lambda arg: None),
            **dict.fromkeys(_VALUES, self.push),
        }
        if self.old:
            steps |= {
                "LIST": lambda arg: self.push(self.pop_to_mark()),
                "DICT": lambda arg: self.push({_key(key): value for key, value in _pairs(self.pop_to_mark())}),
                "PUT": self.remember,
                "GET": lambda arg: self.push(self.recall(arg)),
                **dict.fromkeys(_OLD_VALUES, self.push),
            }
        for opcode, arg, _ in opcodes:
            name = opcode.name
            if name in _CONSTANTS:
                self.push(_CONSTANTS[name]())
            elif name in _TUPLES:
                self.push(tuple(self.pop(_TUPLES[name])))
            elif name == "STOP":
                (result,) = self.pop(1)
                return result
            elif name in steps:
                steps[name](arg)
            else:
                raise Refused(f"uses pickle's opcode {name}")
        raise Refused("has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        """Pop the `count` values on top of the stack."""
        values = self.stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            raise Refused("takes values that are not on its stack")
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list[Any]:
        """Pop the values above the last mark, and the mark."""
        values: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)
        raise Refused("takes values that are not on its stack")

    def top(self, kind: type) -> Any:
        if not self.stack or self.stack[-1] is _MARK or not isinstance(self.stack[-1], kind):
            raise Refused(f"has no {kind.__name__} where it fills one")
        return self.stack[-1]

    def discard(self, to_mark: bool = False) -> None:
        if to_mark:
            self.pop_to_mark()
        elif not self.stack:
            raise Refused("takes values that are not on its stack")
        else:
            self.stack.pop()

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        self.top(dict).update((_key(key), value) for key, value in _pairs(values))

    def add_items(self, values: list[Any]) -> None:
        self.top(set).update(map(_key, values))

    def remember(self, index: int) -> None:
        self.memo[index] = self.top(object)

    def recall(self, index: int) -> Any:
        if index not in self.memo:
            raise Refused("refers to a value that is not in its memo")
        return self.memo[index]

    def look_up(self, module: Any, name: Any) -> Any:
        """The replacement of a name in the file."""
        full = f"{module}.{name}"
        if full in DTYPES:
            return DTYPES[full]
        if full in CONTAINERS:
            return _Name(full, lambda: PersistentObject(CONTAINERS[full], {}))
        if full in self.calls:
            return _Name(full, self.calls[full])
        raise RefusedName(full)

    def call(self, name: Any, args: Any) -> Any:
        """The result of calling the replacement of a name with `args`."""
        if not (isinstance(name, _Name) and isinstance(args, tuple)):
            raise Refused("calls something that is not a name")
        try:
            return name.call(*args)
        except TypeError as error:
            raise Refused(f"passes wrong arguments to {name.name}") from error

    def build(self, state: Any) -> None:
        """Set the state of the object on top of the stack."""
        target = self.top(object)
        if isinstance(target, PersistentObject) and isinstance(state, dict):
            target.state.update(state)
        elif isinstance(target, _Dtype):
            target.order = _byte_order(state)
        elif isinstance(target, Array):
            target.value = _array_of(state)
        elif state != {}:  # a plain dict may have an empty state
            raise Refused(f"sets attributes of a {type(target).__name__}")


def _byte_order(state: Any) -> str:
    """The byte order in numpy.dtype's state (version, byte order, ...)."""
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    if order not in ("<", ">", "|", "="):
        raise Refused("has a numpy type without a byte order")
    return order


def _array_of(state: Any) -> np.ndarray:
    """The array of numpy.ndarray's state (version, shape, dtype, whether the order is Fortran's, bytes)."""
    if not (isinstance(state, tuple) and len(state) == 5):
        raise Refused("has a numpy array without values")
    _, shape, dtype, columns_first, content = state
    content = content.encode("latin1") if isinstance(content, str) else content
    if not (isinstance(dtype, _Dtype) and isinstance(content, bytes | bytearray)):
        raise Refused("has a numpy array without plain values")
    return np.frombuffer(content, dtype.numpy).reshape(_numbers(shape), order="F" if columns_first else "C")
