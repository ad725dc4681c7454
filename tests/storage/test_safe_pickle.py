"""Pickles give plain values and tensors; everything else is refused by name and not executed."""

from __future__ import annotations

import contextlib
import io
import pickle
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distillbench.errors import UserError
from distillbench.storage.safe_pickle import LEGACY_MAGIC, PersistentObject, read_pickle


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "network.pkl"


@pytest.fixture
def marker(tmp_path) -> Path:
    """What hostile files try to make."""
    return tmp_path / "marker"


def read(file: Path, content: bytes, tensors: bool = True):
    file.write_bytes(content)
    return read_pickle(file, tensors)


# --- opcodes by hand: pickles that no pickler here would write --------------------------------------------------------


def value(plain: object) -> bytes:
    """Opcodes that push a plain value."""
    return pickle.dumps(plain, 2)[2:-1]


def name(full: str) -> bytes:
    """Opcodes that push what a dotted name stands for."""
    module, _, attribute = full.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(full: str, *args: object) -> bytes:
    """Opcodes that call a name with plain values, or with what opcodes push."""
    pushed = b"".join(arg if isinstance(arg, bytes) else value(arg) for arg in args)
    return name(full) + b"(" + pushed + b"tR"


def pickled(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


# --- what is read ----------------------------------------------------------------------------------------------------

PLAIN = {
    "numbers": [1, 2**70, -5, 300, 70_000, 1.5, float("inf"), None, True, False],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "texts": ["", "ä" * 300, b"", b"xx", b"\x00\xff" * 300],
    "sets": [set(), {1, 2}, frozenset("ab")],
    "ordered": OrderedDict(b=1, a=2),
    "size": torch.Size([1, 2]),
    "dtype": torch.float16,
    1: {},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_out_as_they_went_in(file, protocol):
    assert read(file, pickle.dumps(PLAIN, protocol)) == PLAIN


def test_a_value_referred_to_twice_is_one_object(file):
    shared = [1]
    first, second = read(file, pickle.dumps([shared, shared]))
    assert first is second
    loop: list = []
    loop.append((loop,))
    out = read(file, pickle.dumps(loop))
    assert out[0][0] is out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_come_out_as_they_went_in(file, protocol, dtype):
    matrix = (10 * torch.randn(3, 4)).to(dtype)
    tensors = [matrix, matrix.t(), matrix[1:, ::2], matrix[0, 0], matrix[:0], matrix.view(1, 3, 4, 1)]
    out = read(file, pickle.dumps(tensors, protocol))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, out, strict=True))
    out = read(file, pickle.dumps(tensors, protocol), tensors=False)
    assert [(t.shape, t.device.type) for t in out] == [(t.shape, "meta") for t in tensors]


def test_parameters_come_out_as_tensors(file):
    parameter = nn.Parameter(torch.randn(3))
    out = read(file, pickle.dumps(parameter))
    assert torch.equal(out, parameter) and not out.requires_grad


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpys_numbers_come_out_as_pythons(file, protocol):
    numbers = [np.sqrt(0.5), np.float32(0.1), np.int64(-7), np.bool_(True), np.float64(3).astype(">f8")]
    out = read(file, pickle.dumps(numbers, protocol))
    assert out == [float(np.sqrt(0.5)), float(np.float32(0.1)), -7, True, 3.0]
    assert [type(number) for number in out] == [float, float, int, bool, float]
    array = np.arange(6.0).reshape(2, 3)
    for pushed in (array, array.T):
        assert np.array_equal(read(file, pickle.dumps(pushed, protocol)).value, pushed)


def test_older_names_of_numpy_are_supported(file):
    dtype = call("numpy.dtype", "f8", False, True)
    scalar = call("numpy.core.multiarray.scalar", dtype, _latin1(np.float64(0.25).tobytes()))
    assert read(file, pickled(scalar)) == 0.25


def test_container_modules_come_out_as_persistent_objects(file):
    module = nn.ModuleDict({"a": nn.ModuleList(), "b": nn.Sequential()})
    out = read(file, pickle.dumps(module))
    assert isinstance(out, PersistentObject) and out.class_name == "ModuleDict"
    kinds = {name: child.class_name for name, child in out.state["_modules"].items()}
    assert kinds == {"a": "ModuleList", "b": "Sequential"} and out.state["training"] is True


def persistent(source: str, class_name: str = "Linear") -> bytes:
    """A persistent object as its file has it, with its source text."""
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": {"n": 1}}
    easy = name("dnnlib.util.EasyDict") + b")\x81" + value(meta)[1:].removeprefix(b"q\x00")
    return call("torch_utils.persistence._reconstruct_persistent_obj", easy)


def test_the_source_code_in_a_file_is_ignored(file, marker):
    out = read(file, pickled(persistent(f"open({str(marker)!r}, 'w')\nclass Linear: pass")))
    assert out == PersistentObject("Linear", {"n": 1})
    assert not marker.exists()


# --- what is refused -------------------------------------------------------------------------------------------------


def storage_bytes(hostile: bytes) -> bytes:
    """What torch takes for a tensor's values in its old format, with a hostile pickle where their description is."""
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})) + hostile


def touches(marker: Path) -> bytes:
    return call("os.system", f"touch {marker}")


LIVE = {  # these do harm when Python's own unpickler reads them, which the test shows
    "os.system": touches,
    "posix.system": lambda marker: call("posix.system", f"touch {marker}"),
    "builtins.eval": lambda marker: call("builtins.eval", f"open({str(marker)!r}, 'w')"),
    "builtins.exec": lambda marker: call("builtins.exec", f"open({str(marker)!r}, 'w')"),
    "builtins.open": lambda marker: call("builtins.open", str(marker), "w"),
    "builtins.__import__": lambda marker: b"0".join([call("builtins.__import__", "os"), touches(marker)]),
    "builtins.getattr": lambda marker: _called(
        call("builtins.getattr", call("builtins.__import__", "os"), "system"), f"touch {marker}"
    ),
    "functools.partial": lambda marker: _called(call("functools.partial", name("os.system"), f"touch {marker}")),
    "operator.attrgetter": lambda marker: _called(
        _called(call("operator.attrgetter", "system"), call("builtins.__import__", "os")), f"touch {marker}"
    ),
    "operator.methodcaller": lambda marker: _called(
        call("operator.methodcaller", "system", f"touch {marker}"), call("builtins.__import__", "os")
    ),
    "copyreg._reconstructor": lambda marker: b"0".join(
        [call("copyreg._reconstructor", name("builtins.object"), name("builtins.object"), None), touches(marker)]
    ),
    "subprocess.getoutput": lambda marker: call("subprocess.getoutput", f"touch {marker}"),
    "pickle.loads": lambda marker: call("pickle.loads", _latin1(pickled(touches(marker)))),
    "torch.storage._load_from_bytes": lambda marker: call(
        "torch.storage._load_from_bytes", _latin1(storage_bytes(pickled(touches(marker))))
    ),
    "pathlib.Path": lambda marker: _called(
        call("builtins.getattr", call("pathlib.PosixPath", str(marker)), "touch"),
    ),
}


def _called(function: bytes, *args: object) -> bytes:
    return function + call("x.x", *args).removeprefix(name("x.x"))


def _latin1(content: bytes) -> bytes:
    return call("_codecs.encode", content.decode("latin1"), "latin1")


@pytest.mark.parametrize("tensors", [True, False])
@pytest.mark.parametrize("what", LIVE)
def test_a_hostile_file_is_refused_and_executes_nothing(file, marker, what, tensors):
    content = pickled(LIVE[what](marker))
    if what == "torch.storage._load_from_bytes" and not tensors:
        assert "_Bytes" in repr(read(file, content, tensors))  # not looked at, then
    else:
        with pytest.raises(UserError, match=r"is refused, and nothing in it was executed: it ") as caught:
            read(file, content, tensors)
        assert "Possible: pickles of networks as in NVIDIA's EDM release" in str(caught.value)
    assert not marker.exists()
    with contextlib.suppress(EOFError):  # torch's, when the harm is done
        pickle.loads(content)  # the test is worth something: this is what the file was made to do
    assert marker.exists()


@pytest.mark.parametrize("what", [
    "os.system", "builtins.eval", "builtins.exec", "builtins.getattr", "functools.partial", "operator.attrgetter",
    "copyreg._reconstructor", "torch.load", "torch.nn.Linear", "torch_utils.persistence.import_hook", "numpy.load",
    "torch.nn.modules.container.ModuleDict.__init__", "collections.OrderedDict.fromkeys", "types.CodeType",
    "torch._utils._rebuild_tensor_v2.__globals__", "torch._utils.os.system", "builtins.object",
    "torch._utils._rebuild_tensor_v3", "distillbench.storage.safe_pickle._storage",
])  # fmt: skip
@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL"])
def test_the_refused_name_is_in_the_message(file, what, opcode):
    module, _, attribute = what.rpartition(".")
    opcodes = name(what) if opcode == "GLOBAL" else value(module) + value(attribute) + b"\x93"
    with pytest.raises(UserError) as caught:
        read(file, pickled(opcodes))
    assert f"it asks for '{what}', which no network needs" in str(caught.value).replace("...", "")


def test_code_hidden_deep_in_a_network_is_refused(file, marker):
    state = pickle.dumps({"ema": 0}, 2)[2:-1]
    meta = b"}(" + value("type") + value("class") + value("class_name") + value("A") + value("state") + b"}("
    meta += value("_modules") + touches(marker) + b"uu"
    loss = call("torch_utils.persistence._reconstruct_persistent_obj", meta)
    content = pickled(state + value("loss_fn") + loss + b"s")
    with pytest.raises(UserError, match=r"os\.system"):
        read(file, content)
    assert not marker.exists()


def buffer_of(save) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("content, words", [
    (lambda marker: pickled(touches(marker)), "not in torch's own format"),
    (lambda marker: LEGACY_MAGIC, "does not load with weights_only=True"),
    (lambda marker: storage_bytes(pickled(touches(marker))), "does not load with weights_only=True"),
    (lambda marker: storage_bytes(pickle.dumps({"a": 1}, 2)) + pickle.dumps([], 2), "a dict where a tensor's values"),
    (lambda marker: buffer_of(lambda b: torch.save(torch.ones(2), b)), "not in torch's own format"),
    (lambda marker: buffer_of(lambda b: torch.jit.save(torch.jit.script(nn.SiLU()), b)), "not in torch's own format"),
    (lambda marker: b"", "not in torch's own format"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_values_of_tensors_must_have_torchs_format(file, marker, content, words):
    pushed = pickle.dumps(content(marker), 4)[2:]
    proto4 = b"\x80\x04" + name("torch.storage._load_from_bytes") + _unframed(pushed) + b"\x85R."
    with pytest.raises(UserError, match=words):
        read(file, proto4)
    assert not marker.exists()


def _unframed(body: bytes) -> bytes:
    """The opcodes of a protocol 4 pickle between its frame's header and its end."""
    return (body[9:] if body[:1] == b"\x95" else body).removesuffix(b".")


class Rebuilt:
    """Pickles as a tensor of a storage of six numbers, with an arbitrary shape."""

    def __init__(self, offset, size, stride) -> None:
        self.args = torch.arange(6.0).storage(), offset, size, stride, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


@pytest.mark.parametrize("offset, size, stride, fits", [
    (0, (2, 3), (3, 1), True),
    (0, (3, 2), (1, 3), True),
    (3, (3,), (1,), True),
    (0, (), (), True),
    (0, (0, 10), (10, 1), True),
    (0, (7,), (1,), False),
    (1, (2, 3), (3, 1), False),
    (0, (10**6, 10**6), (0, 0), False),
    (0, (4, 3), (1, 1), False),
    (0, (2, 3), (3, -1), False),
    (-1, (2,), (1,), False),
    (6, (), (), False),
    (2**62, (2,), (2**62,), False),
    (0, (2, 3), (3,), False),
    (0, "ab", (1, 1), False),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_tensors_stay_within_their_values(file, offset, size, stride, fits):
    content = pickle.dumps(Rebuilt(offset, size, stride))
    if fits:
        assert torch.equal(read(file, content), torch.arange(6.0).as_strided(size, stride, offset))
    else:
        with pytest.raises(UserError, match=r"network\.pkl"):
            read(file, content)


@pytest.mark.parametrize("opcodes, words", [
    (name("collections.OrderedDict") + value((None, {"fromkeys": 1})) + b"b", "sets attributes of a _Name"),
    (name("collections.OrderedDict") + b")R" + value({"__class__": 1}) + b"b", "sets attributes of a dict"),
    (persistent("") + value((None, {"class_name": "x"})) + b"b", "sets attributes of a PersistentObject"),
    (name("torch._utils._rebuild_tensor_v2") + value({"__setstate__": 1}) + b"b", "sets attributes of a _Name"),
    (value([1]) + value({"__setstate__": 1}) + b"b", "sets attributes of a list"),
    (value("text") + b")R", "calls something that is not a name"),
    (persistent("") + b")R", "calls something that is not a name"),
    (name("torch.float32") + b")R", "calls something that is not a name"),
    (name("numpy.ndarray") + b")R", "calls a type"),
    (call("numpy.dtype", "O8"), "numpy values of the type 'O8'"),
    (call("numpy.dtype", "V1000000000"), "numpy values of the type"),
    (call("numpy._core.multiarray._reconstruct", 1, 2, 3) + value((1, (2,), "f8", False, [1])) + b"b", "plain values"),
    (call("_codecs.encode", "x", "rot13"), "another encoding"),
    (call("torch_utils.persistence._reconstruct_persistent_obj", {"type": "module"}), "not of a class"),
    (call("torch_utils.persistence._reconstruct_persistent_obj", {"type": "class"}), "without a name"),
    (call("torch_utils.persistence._reconstruct_persistent_obj"), "passes wrong arguments to"),
    (call("collections.OrderedDict", [["a", 1]]), "passes wrong arguments to"),
    (call("torch._utils._rebuild_parameter", 1, True, None), "a parameter that is no tensor"),
    (b"(ios\nsystem\n", "opcode INST"),
    (b"(cos\nsystem\no", "os.system"),
    (b"Pid\n", "opcode PERSID"),
    (value(1) + b"Q", "opcode BINPERSID"),
    (b"\x82\x01", "opcode EXT1"),
    (name("collections.OrderedDict") + b"))\x92", "opcode NEWOBJ_EX"),
    (b"\x97", "opcode NEXT_BUFFER"),
    (b"I1\n", "opcode INT"),
    (b"R", "takes values that are not on its stack"),
    (b"(b", "takes values that are not on its stack"),
    (b"(", "takes values that are not on its stack"),
    (b"t", "takes values that are not on its stack"),
    (b"", "takes values that are not on its stack"),
    (value(1) + value(2) + b"s", "no dict where it fills one"),
    (value(0) + value(1) + value(2) + b"s", "no dict where it fills one"),
    (b"}(K\x01u", "a key without a value"),
    (b"}" + value((1,)) + value(1) + b"s", "a tuple as a key"),
    (b"h\x07", "refers to a value that is not in its memo"),
])  # fmt: skip
def test_opcodes_cannot_be_misused(file, opcodes, words):
    with pytest.raises(UserError, match=words):
        read(file, pickled(opcodes))


# --- what would crash or fill the machine ----------------------------------------------------------------------------


def test_deep_nesting_large_memos_and_doubling_are_harmless(file):
    start = time.monotonic()
    with pytest.raises(UserError, match="a tuple as a key"):
        read(file, pickled(b"})" + b"\x85" * 200_000 + b"Ns"))  # Python's own reader overflows the C stack here
    assert isinstance(read(file, pickled(b")" + b"\x85" * 200_000)), tuple)
    assert read(file, pickled(b"Nr\xff\xff\xff\xff")) is None  # and reserves 64 GiB here
    doubled = b")" + b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(200))
    assert isinstance(read(file, pickled(doubled)), tuple)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("opcodes", [
    b"\x8e" + (2**62).to_bytes(8, "little") + b"x",  # BINBYTES8
    b"B\xff\xff\xff\xffx",
    b"\x8b\xff\xff\xff\x7fx",  # LONG4
    b"X\x02\x00\x00\x00\xff\xff",  # text that is no UTF-8
    b"\xff",
    b"cos",
])  # fmt: skip
def test_damaged_files_are_one_message(file, opcodes):
    with pytest.raises(UserError, match=r"'network\.pkl' is not a readable pickle, or is damaged \("):
        read(file, pickled(opcodes))


def test_other_files_are_one_message(file, tmp_path):
    for content in (b"", b"<!DOCTYPE html>", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1"):
        with pytest.raises(UserError, match=r"'network\.pkl' is not a readable pickle|is refused"):
            read(file, content)
    with pytest.raises(UserError, match="not a readable pickle"):
        read_pickle(tmp_path)


def sample() -> bytes:
    state = {"w": torch.arange(3.0), "n": np.sqrt(0.5), "plain": [1, "a", {2}, (None,)]}
    return pickle.dumps(state, 4)


def test_every_truncation_is_one_message(file):
    content = sample()
    for length in range(len(content)):
        with pytest.raises(UserError):
            read(file, content[:length])


@pytest.mark.filterwarnings("ignore")
def test_every_flipped_byte_is_read_or_one_message(file):
    content = sample()
    generator = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= int(generator.integers(1, 256))
        try:
            read(file, bytes(changed))
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10
