"""Settings that a device does not support, and the choice of algorithms, for imagined GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from analytic import mlp_teacher
from distillbench.errors import UserError
from distillbench.registry import load_registry
from distillbench.runs.cell_training import _own_bytes
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.training.compute import (
    ComputeConfig,
    Sampling,
    algorithms,
    applied,
    check_compute,
    check_sampling,
    in_words,
)


def test_bf16_is_an_error_on_old_gpus_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == "cuda:1" else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    check_compute(ComputeConfig("bf16"), "cuda:0")
    check_compute(ComputeConfig("fp16"), "cuda:1")
    with pytest.raises(UserError, match=r"compute\.precision=bf16: Tesla T4 has no units"):
        check_compute(ComputeConfig("bf16"), "cuda:1")
    with pytest.raises(UserError, match=r"evaluation\.precision=bf16: Tesla T4"):
        check_sampling(Sampling("bf16"), "cuda:1")
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose capabilities mean something else
    check_compute(ComputeConfig("bf16"), "cuda:1")


def test_tf32_is_an_error_on_amd_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    with pytest.raises(UserError, match=r"compute\.tf32=true needs an NVIDIA GPU.*ROCm 6\.4"):
        check_compute(ComputeConfig(tf32=True), "cuda")
    with pytest.raises(UserError, match=r"evaluation\.precision=tf32 needs an NVIDIA GPU.*ROCm 6\.4"):
        check_sampling(Sampling("tf32"), "cuda")


# --- algorithms ------------------------------------------------------------------------------------------------------


def test_deterministic_algorithms_are_set_in_training_only():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    teacher = mlp_teacher()
    method = SimpleNamespace(teacher=teacher, modules=teacher.student().modules)
    cudnn.benchmark = True  # by other code
    try:
        with algorithms(ComputeConfig(), "cuda"):
            assert (cudnn.benchmark, cudnn.deterministic) == (False, False)
        with algorithms(ComputeConfig(cudnn_benchmark=True), "cuda"):
            assert cudnn.benchmark
        with algorithms(ComputeConfig(deterministic=True), "cuda"):
            assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
            assert torch.are_deterministic_algorithms_enabled()
        with applied(ComputeConfig(deterministic=True), method, "cpu"):
            assert torch.are_deterministic_algorithms_enabled() and cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled() and cudnn.benchmark
    finally:
        cudnn.benchmark, cudnn.deterministic = before[:2]
        torch.use_deterministic_algorithms(before[2])


def test_deterministic_training_needs_the_cublas_workspace(monkeypatch):
    deterministic = ComputeConfig(deterministic=True)
    check_compute(deterministic, "cpu")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    check_compute(deterministic, "cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8 .* and it is ':0:0'"):
        check_compute(deterministic, "cuda")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(UserError, match="and it is not set"):
        check_compute(deterministic, "cuda:1")
    with pytest.raises(UserError, match="does not go with"):
        ComputeConfig(deterministic=True, cudnn_benchmark=True)


def test_rows_say_which_algorithms_were_asked_for():
    assert in_words(ComputeConfig(deterministic=True), Sampling()) == "fp32, deterministic; sampling fp32"
    assert in_words(ComputeConfig(cudnn_benchmark=True), Sampling()) == "fp32, cudnn_benchmark; sampling fp32"


# --- processes that share a GPU --------------------------------------------------------------------------------------


def test_a_plan_checks_the_compute_mode(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "distillbench.runs.shared_context.check_access", lambda device, alone: asked.append((device, alone))
    )
    registry, words = load_registry(), ["dataset=digits", "methods=[direct]", "device=cpu", f"results_dir={tmp_path}"]
    for more in ([], ["isolate=false"], ["isolate=false", "evaluation.timing=inline"]):
        plan(compose_runs([*words, *more], registry), registry)
    inline = "evaluation.timing=inline"
    assert asked == [("cpu", ["isolate=false", inline]), ("cpu", [inline]), ("cpu", [])]


def test_memory_of_earlier_cells_is_subtracted_if_there_are_any():
    def cell(isolate: bool, count: int) -> SimpleNamespace:
        return SimpleNamespace(
            shared=SimpleNamespace(config=SimpleNamespace(isolate=isolate), ranks=SimpleNamespace(count=count))
        )

    teacher = mlp_teacher()  # on the CPU
    assert _own_bytes(cell(True, 1), teacher) is None
    assert _own_bytes(cell(False, 1), teacher) == _own_bytes(cell(True, 2), teacher) == 0
