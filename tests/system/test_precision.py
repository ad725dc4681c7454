"""Flags of float32 products: set and put back whatever the process has used before, in new and in old versions."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from distillbench.system.precision import Float32Flags, float32_products

SETTINGS = (  # what a process may have done before; mixes stay for its life, so that each needs one of its own
    "pass",
    "b.cuda.matmul.allow_tf32 = True; b.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('medium')",
    "b.fp32_precision = 'tf32'",
    "b.fp32_precision = 'ieee'",
    "b.cuda.matmul.fp32_precision = 'tf32'",
    "b.cudnn.conv.fp32_precision = 'ieee'",
    "b.cudnn.fp32_precision = 'ieee'; torch.set_float32_matmul_precision('high')",
    "b.mkldnn.matmul.fp32_precision = 'bf16'; b.cudnn.rnn.fp32_precision = 'ieee'",
)
PROCESS = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "1"
import torch
from distillbench.system.precision import tf32
from distillbench.evaluation.features import full_precision
from distillbench.system.precision import Float32Flags, _read, CUDA, CPU
from distillbench.evaluation.sampling_speed import TorchSettings

b = torch.backends
older = lambda: (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, torch.get_float32_matmul_precision())
newer = lambda: [_read(name) for name in (*CUDA, *CPU)]
newest = _read("cuda.matmul") is not None
for setting in sys.argv[1:]:
    if "fp32" in setting and not newest:
        continue
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0, setting
        continue
    exec(setting)
    before, flags, settings = newer(), Float32Flags.now(), TorchSettings.now(1)
    for allowed in (False, True):
        with tf32(allowed, "cuda"):
            assert older() == (allowed, allowed, "high" if allowed else "highest")
            if newest:
                assert newer() == 3 * ["tf32" if allowed else "ieee"] + 3 * ["ieee"]
            with full_precision():
                assert older() == (False, False, "highest") and {*newer()} <= {"ieee", None}
            assert older()[0] is allowed
        assert newer() == before and Float32Flags.now() == flags
    if newest:
        b.fp32_precision = "none"
    settings.apply()
    assert newer() == before and TorchSettings.now(1) == settings
    with tf32(True, "cpu"):
        assert newer() == before
    os._exit(0)
"""


def test_both_sets_of_flags_say_the_same_whatever_was_used_before():
    ran = subprocess.run([sys.executable, "-c", PROCESS, *SETTINGS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def old_torch(monkeypatch):
    """torch.backends as before 2.9, and float32_matmul_precision, which is the same flag as that of cuBLAS."""

    class Matmul:
        precision = "highest"

        @property
        def allow_tf32(self) -> bool:
            return self.precision != "highest"

    matmul = Matmul()
    backends = SimpleNamespace(
        cuda=SimpleNamespace(matmul=matmul), cudnn=SimpleNamespace(allow_tf32=True), mkldnn=SimpleNamespace()
    )
    monkeypatch.setattr(torch, "backends", backends)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul.precision)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: setattr(matmul, "precision", value))
    return backends


def test_before_torch_2_9_there_is_one_set(old_torch):
    old_torch.cuda.matmul.precision = "medium"
    before = Float32Flags.now()
    assert before == Float32Flags((), "medium", True)
    with float32_products():
        assert not old_torch.cuda.matmul.allow_tf32 and not old_torch.cudnn.allow_tf32
        with float32_products(tf32=True):
            assert old_torch.cuda.matmul.allow_tf32 and old_torch.cudnn.allow_tf32
        assert not old_torch.cuda.matmul.allow_tf32 and not old_torch.cudnn.allow_tf32
    assert Float32Flags.now() == before


def test_flags_come_back_after_an_error():
    before = Float32Flags.now()
    with pytest.raises(KeyError), float32_products(tf32=not before.cudnn_tf32):
        raise KeyError
    assert Float32Flags.now() == before
