"""Caches that depend on the device: pairs, encoded texts, latents, teachers; and the device of a row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import distillbench.training.pairs
from distillbench import Dataset
from distillbench.builtin.digits import Digits
from distillbench.builtin.trained import METADATA, Trained
from distillbench.diffusion.conditioning import Conditioning
from distillbench.registry import load_registry
from distillbench.runs.cell_keys import speed_inputs
from distillbench.runs.cell_result import _device
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.system.environment import device_name
from distillbench.system.precision import Float32Flags
from distillbench.system.progress import Progress
from distillbench.teachers import encoded_prompts, latents
from distillbench.teachers.encoded_prompts import encode_prompts
from distillbench.teachers.latents import training_data
from distillbench.training.resume import Resume, State, States
from pair_requests import request_pairs

SILENT = Progress(None)
OTHER = "cpu (another model)"


# --- prices ----------------------------------------------------------------------------------------------------------


def test_pairs_are_cached_per_device(tmp_path, monkeypatch):
    solved = lambda: request_pairs(tmp_path)[1]
    assert (solved(), solved()) == (12, 0)
    monkeypatch.setattr(distillbench.training.pairs, "device_name", lambda device: OTHER)
    assert (solved(), solved()) == (12, 0)
    recipes = [json.loads(file.read_text())["recipe"] for file in tmp_path.glob("*/manifest.json")]
    assert {recipe.pop("device") for recipe in recipes} == {OTHER, device_name("cpu")} and recipes[0] == recipes[1]


def test_encoded_texts_are_cached_per_device(tmp_path, monkeypatch):
    calls: list[tuple[int, Float32Flags]] = []

    def encode(texts: list[str]) -> torch.Tensor:
        calls.append((len(texts), Float32Flags.now()))
        return torch.ones(len(texts), 1, 2)

    table = lambda device: encode_prompts(["a", "b"], encode, "e", tmp_path, device, SILENT)
    with torch.no_grad():
        table("cpu"), table("cpu")
        assert [count for count, _ in calls] == [1, 2]
        monkeypatch.setattr(encoded_prompts, "device_name", lambda device: f"{device} (a GPU)")
        table("cuda"), table("cuda")
    assert [count for count, _ in calls] == [1, 2, 1, 2]
    flags = calls[-1][1]
    assert (flags.matmul, flags.cudnn_tf32) == ("highest", False) and calls[0][1] == Float32Flags.now()


# --- latents and teachers in float32 ---------------------------------------------------------------------------------


def test_latents_on_a_gpu_are_in_float32_under_another_key(tmp_path, monkeypatch):
    seen: list[Float32Flags] = []

    def encode(dataset, teacher, path: Path, shape, device, progress) -> None:
        seen.append(Float32Flags.now())
        with open(path, "wb") as file:
            np.save(file, np.zeros(shape, np.float32))

    class Pictures(Dataset):
        name, licence, shape, sha256 = "pictures", "none", (1, 8, 8), "0" * 64
        __init__ = lambda self: None
        __len__ = lambda self: 3
        read = lambda self, indices: None

    monkeypatch.setattr(latents, "_encode", encode)
    teacher = SimpleNamespace(to_latents=True, to_posterior=None, sha256="1" * 64, shape=(1, 4, 4))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for device in ("cpu", "cpu", "cuda:1", "cuda:0"):
            training_data(Pictures(), teacher, tmp_path, device, SILENT)
    assert [flags.cudnn_tf32 for flags in seen] == [True, False]
    recipes = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert [recipe.get("tf32") for recipe in sorted(recipes, key=len)] == [None, False]


def source(folder: Path, device: str, **changes) -> Trained:
    config = Trained.Config(kind="trained", network="mlp", width=16, depth=1, batch_size=64, **changes)
    config.budget.images = 128
    return Trained(config, Digits(Digits.Config()), folder, device, Conditioning())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The file of a teacher trained on the CPU."""
    return source(tmp_path_factory.mktemp("teachers"), "cpu").train(None, SILENT)


def changed(file: Path, to: Path, **about) -> None:
    """`file` with other words `about` it; None leaves one out."""
    with safe_open(file, framework="pt") as tensors:
        told = json.loads(tensors.metadata()[METADATA]) | about
    told = {name: value for name, value in told.items() if value is not None}
    save_file(load_file(file), to, metadata={METADATA: json.dumps(told)})


def test_a_teacher_names_its_device_and_cpu_keys_stay(made):
    recipe = source(made.parent, "cpu").recipe()
    assert "tf32" not in recipe and source(made.parent, "cuda").recipe() == recipe | {"tf32": False}
    with safe_open(made, framework="pt") as tensors:
        told = json.loads(tensors.metadata()[METADATA])
    assert told["device"] == device_name("cpu") and told["recipe"] == recipe


def test_a_teacher_is_used_on_cpu_and_gpu(made, tmp_path):
    assert source(made.parent, "cpu")._file() == source(made.parent, "cuda")._file() == made
    on_gpu = tmp_path / source(tmp_path, "cuda")._name(source(tmp_path, "cuda").recipe())
    changed(made, on_gpu, device="cuda (NVIDIA H200)")
    assert source(tmp_path, "cpu")._file() == source(tmp_path, "cuda:1")._file() == on_gpu


@pytest.mark.parametrize("device", [None, "cuda (NVIDIA H200)"])
def test_a_teacher_of_unknown_precision_is_not_used_on_a_gpu(made, tmp_path, device):
    """Files of older versions do not name their device; on the CPU they are still used."""
    old = tmp_path / made.name
    changed(made, old, device=device)
    assert source(tmp_path, "cuda")._file() is None and source(tmp_path, "cpu")._file() == old


def test_a_teacher_with_tf32_has_another_key(made):
    assert source(made.parent, "cuda", tf32=True)._file() is None
    with pytest.raises(distillbench.UserError, match=r"teacher\.tf32=true needs an NVIDIA GPU"):
        source(made.parent, "cpu", tf32=True).plan()


def test_old_peaks_of_sampling_are_measured_again(tmp_path):
    registry = load_registry()
    words = ["dataset=digits", "methods=[direct]", "device=cpu", f"results_dir={tmp_path}"]
    cell = plan(compose_runs(words, registry), registry)[-1]
    on_cpu = speed_inputs(cell, "k")
    cell.shared.device = "cuda:1"
    assert "memory" not in on_cpu and speed_inputs(cell, "k").items() > on_cpu.items()


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "evaluation", "speed", "told"),
    [
        ("a", "a", "a", "a"),
        ("a", "b", None, "a"),  # scores do not depend on the device, the cost of training does
        ("a", "a", "b", "a; sampling b"),
        (None, "a", "b", "b"),
        (None, "a", None, "a"),
    ],
)
def test_a_row_names_the_device_of_its_costs(training, evaluation, speed, told):
    records = (
        training and SimpleNamespace(device=training),
        SimpleNamespace(device=evaluation),
        SimpleNamespace(device=speed or "here", rows=[1] if speed else []),
    )
    assert _device(*records) == told


def test_a_training_resumed_on_another_device_names_both(tmp_path):
    states = States(tmp_path, 2, SILENT)

    def went_on(device: str) -> list[str]:
        resume = Resume(states, 1.0, devices=[device])
        if (state := states.newest()) is not None:
            resume.restore_peaks(state)
        resume.save(len(resume.devices), State(values={}))
        return resume.devices

    assert went_on("a") == went_on("a") == ["a"]
    assert went_on("b") == went_on("b") == ["a", "b"]
    old = Resume(states, 1.0, devices=["c"])
    old.restore_peaks(State(values={"peaks": {}}))
    assert old.devices == ["c"]
