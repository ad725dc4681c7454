"""Every check of `distillbench doctor`, passing and failing, on made-up measurements and on real folders."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
from pathlib import Path
from random import Random

import pandas as pd
import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from distillbench import Unavailable
from distillbench.cli import (
    clean,
    doctor_devices,
    doctor_disk,
    doctor_numerics,
    doctor_packages,
    doctor_plugins,
    doctor_results,
)
from distillbench.cli.doctor import CHECKS, examine, findings
from distillbench.cli.doctor_devices import Cuda, Gpu
from distillbench.cli.doctor_disk import Disk
from distillbench.cli.doctor_findings import Finding, Installation
from distillbench.cli.doctor_packages import Package
from distillbench.evaluation.features import FeatureNetwork
from distillbench.evaluation.pretrained_weights import WeightsFile
from distillbench.records.records import (
    CheckpointRecord,
    Cost,
    EvaluationRecord,
    RowRecord,
    SpeedRecord,
    TrainRecord,
    signed,
    write_record,
)
from distillbench.registry import Entry, Plugin, Registry, Source, load_registry
from distillbench.storage.downloads import VARIABLE as DOWNLOADS
from distillbench.storage.downloads import fetch, offered
from distillbench.storage.files import key_of
from distillbench.storage.sources import URL, SourceFile
from distillbench.storage.sources import Source as Download
from distillbench.system.progress import Progress

COST = Cost(
    images=1, seconds=1, teacher_seconds=0, student_seconds=1, other_seconds=0, teacher_nfe=0, student_nfe=1,
    teacher_backward=0, student_backward=1,
)  # fmt: skip
ABOUT = {"device": "cpu", "environment": {}}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Installation:
    monkeypatch.setenv(DOWNLOADS, str(tmp_path / "downloads"))
    return Installation(Registry(), tmp_path / "results", tmp_path / "weights")


def lines_of(check, here) -> list[tuple[str, str]]:
    return [(finding.level, finding.line) for finding in findings(check, here)]


def levels(found) -> list[str]:
    return [finding.level for finding in found]


def train(root: Path, name: str = "a", status: str = "ok", weights: bytes = b"weights") -> Path:
    """A cell as a training leaves it."""
    inputs = {"method": name}
    folder = root / "cells" / key_of(inputs)
    folder.mkdir(parents=True)
    (folder / "student.safetensors").write_bytes(weights)
    (folder / "checkpoint-1.safetensors").write_bytes(b"early")
    early = {"fraction": 0.5, "file": "checkpoint-1.safetensors", "sha256": hashlib.sha256(b"early").hexdigest()}
    record = TrainRecord(
        key=folder.name, inputs=inputs, status=status, weights_sha256=hashlib.sha256(weights).hexdigest(), cost=COST,
        checkpoints=[CheckpointRecord(**early, ready=[1], cost=COST)], **ABOUT,
    )  # fmt: skip
    write_record(folder / "train.json", record)
    return folder


# --- all of it -------------------------------------------------------------------------------------------------------


def printed(checks, **options) -> tuple[bool, list[str]]:
    console = Console(width=80, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    fine = examine(Registry(), Path("nowhere"), console, checks=checks, **options)
    return fine, [line.rstrip() for line in console.export_text().splitlines()]


def test_findings_are_printed_with_level_and_advice():
    checks = [
        ("one", lambda here: iter([Finding("ok", "fine")])),
        ("two", lambda here: iter([Finding("warning", "so so, " * 12, "look [here]\x1b[31m")])),
    ]
    fine, lines = printed(checks)
    assert fine
    assert lines == [
        "ok      one        fine",
        "warning two        so so, so so, so so, so so, so so, so so, so so, so so, so",
        "                   so, so so, so so, so so,",
        "                   to do: look [here] [31m",
        "0 errors, 1 warning",
    ]


def test_a_check_that_raises_becomes_a_finding_and_the_other_checks_still_run():
    def broken(here):
        yield Finding("ok", "so far")
        raise ZeroDivisionError("by 0")

    fine, lines = printed([("bad", broken), ("good", lambda here: iter([Finding("ok", "fine")]))])
    assert not fine
    assert lines[1] == "wrong   bad        this could not be checked: ZeroDivisionError: by 0"
    assert lines[2:] == ["ok      good       fine", "1 error, 0 warnings"]


def test_all_checks_pass_in_this_environment(tmp_path, monkeypatch):
    """All checks as the command runs them; they leave no files behind."""
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path / "weights"))
    console = Console(width=80, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    train(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    registry = load_registry()
    examine(registry, tmp_path, console)
    text = console.export_text()
    assert all(name in text for name, _ in CHECKS)
    assert "could not be checked" not in text
    for check in ("float32", "plugins", "records", "students", "states"):
        assert re.search(rf"^ok +{check}", text, re.M) and not re.search(rf"^wrong +{check}", text, re.M)
    assert sorted(tmp_path.rglob("*")) == before


# --- packages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requirement", "version", "error", "optional", "level", "line"),
    [
        ("a>=1,<2", "1.5", "", False, None, ""),
        ("a>=1,<2", "2.0", "", False, "wrong", "me needs a<2,>=1, 2.0 is installed"),
        ("a>=1", "", "", False, "wrong", "me needs a: not installed"),
        ("a>=1", "odd version", "", False, "wrong", "me needs a>=1, odd version is installed"),
        ("a>=1", "1.1", "ImportError: broken", False, "wrong", "a 1.1 cannot be imported: ImportError: broken"),
        ("a>=1", "0.9", "", True, "warning", "me needs a>=1, 0.9 is installed"),
        ("a>=1", "", "", True, None, ""),
        ("a>=1", "2.0.dev1+cu118", "", False, None, ""),
    ],
)
def test_a_package_must_be_installed_in_its_version_range(requirement, version, error, optional, level, line):
    found = Package(Requirement(requirement), "me", version, error, optional).judged()
    assert (found and found.level, found.line if found else "") == (level, line)
    assert found is None or found.advice.startswith("pip install")


def test_python_must_be_in_its_version_range():
    assert doctor_packages.judge_python("3.12.1", ">=3.11").level == "ok"
    assert doctor_packages.judge_python("3.10.1", ">=3.11") == Finding(
        "wrong", "Python 3.10.1, distillbench needs >=3.11", "create an environment with that Python"
    )


def metadata(monkeypatch, declared: list[str], versions: dict[str, str]) -> None:
    monkeypatch.setattr(doctor_packages.importlib.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(doctor_packages, "_version", lambda name: versions.get(name, ""))


def test_declared_requirements_are_checked(monkeypatch, here):
    declared = [
        "json>=1",
        "zeus>=2; extra == 'zeus'",
        "win; sys_platform == 'none'",
        "not a requirement",
        "colorsys>=3",
    ]
    metadata(monkeypatch, declared, {"json": "1.0", "colorsys": "2.0"})
    assert [package.requirement.name for package in doctor_packages.needed("x", False)] == ["json", "zeus", "colorsys"]
    assert lines_of(doctor_packages.check_packages, here) == [
        ("ok", f"Python {platform.python_version()}"),
        ("wrong", "distillbench needs colorsys>=3, 2.0 is installed"),
    ]


def test_a_broken_or_missing_module_is_reported(monkeypatch, tmp_path):
    (tmp_path / "broken_module.py").write_text("raise OSError('libgone.so')")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor_packages._import_error("broken-module", True) == "OSError: libgone.so"
    assert doctor_packages._import_error("broken-module", False) == ""  # is there
    assert doctor_packages._import_error("leaving-module", True) == "SystemExit: 3"
    assert doctor_packages._import_error("a-name-unlike-its-module", True) == ""
    monkeypatch.setitem(doctor_packages.MODULES, "pillow", "no_such_module")
    assert doctor_packages._import_error("pillow", False) == "no module 'no_such_module'"


@pytest.mark.parametrize(
    ("torch_version", "cudas", "level", "line"),
    [
        ("2.9.1+cu130", ("13.0", "13.0"), "ok", "torch 2.9.1+cu130, torchvision 0.24.1"),
        ("2.9.1+cpu", (None, None), "ok", "torch 2.9.1+cpu, torchvision 0.24.1"),
        ("2.8.0", (None, None), "wrong", "torch 2.8.0, torchvision 0.24.1, which needs torch==2.9.1"),
        ("2.9.1", ("13.0", None), "warning", "torch 2.9.1, torchvision 0.24.1: built for CUDA 13.0 and CPUs"),
    ],
)
def test_torch_and_torchvision_must_fit(torch_version, cudas, level, line):
    found = doctor_packages.judge_torchvision(torch_version, "0.24.1", "==2.9.1", cudas)
    assert (found.level, found.line) == (level, line)


def test_cuda_version_numbers():
    assert [doctor_packages.cuda_version(number) for number in (12060, 13000, 11080, -1)] == [
        "12.6",
        "13.0",
        "11.8",
        None,
    ]


def test_torchvision_works_here(here, monkeypatch):
    assert set(levels(findings(doctor_packages.check_torch, here))) <= {"ok", "warning"}
    monkeypatch.setattr("torchvision.ops.nms", lambda boxes, scores, threshold: torch.tensor([0, 1]))
    assert lines_of(doctor_packages.check_torch, here)[-1] == (
        "wrong",
        "torchvision's nms keeps [0, 1] of three boxes instead of [0, 2]",
    )


# --- device ----------------------------------------------------------------------------------------------------------

H100 = Gpu("H100", (9, 0), 70_000, 80_000)
CUDA = Cuda("12.8", ("sm_80", "sm_90"), (H100,), "570.1", seen=1)


def one_gpu(**changed) -> Cuda:
    return dataclasses.replace(CUDA, gpus=(dataclasses.replace(H100, **changed),))


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        (Cuda(None), [("ok", "cpu: there is no GPU here; energy and GPU memory will be empty in tables")]),
        (Cuda(None, seen=2), [("warning", "cpu: NVML finds 2 GPUs, and this torch is built for the CPU only")]),
        (
            Cuda("12.8", seen=1, visible=""),
            [("warning", "cpu: NVML finds 1 GPU, CUDA_VISIBLE_DEVICES='' leaves none")],
        ),
        (
            Cuda("12.8", seen=1, driver="470.2"),
            [("wrong", "NVML finds 1 GPU and torch none: driver 470.2, torch is built for CUDA 12.8")],
        ),
        (Cuda("12.8", error="RuntimeError: sticky"), [("wrong", "torch cannot use CUDA: RuntimeError: sticky")]),
        (
            CUDA,
            [
                (
                    "ok",
                    "cuda:0 (H100, compute capability 9.0): 68.4 of 78.1 GiB free, driver 570.1, CUDA 12.8",
                ),
                ("ok", "cuda:0: NVML and its energy counter can be read"),
            ],
        ),
        (
            one_gpu(capability=(12, 0)),
            [
                (
                    "wrong",
                    "cuda:0 (H100, compute capability 12.0): this torch is built for sm_80, sm_90 and cannot run on it",
                )
            ],
        ),
    ],
)
def test_verdicts_on_cuda(cuda, expected):
    assert [(found.level, found.line) for found in doctor_devices.judge_cuda(cuda)] == expected


def test_a_gpu_without_free_memory_or_without_nvml():
    assert levels(doctor_devices.judge_cuda(one_gpu(free_mib=500))) == ["warning", "ok"]
    found = list(doctor_devices.judge_cuda(one_gpu(nvml_error="NVML: Driver Not Loaded")))
    assert levels(found) == ["ok", "warning"] and "NVML: Driver Not Loaded; train_joules" in found[1].line
    found = list(doctor_devices.judge_cuda(one_gpu(energy_error="NVML: Not Supported")))
    assert levels(found) == ["ok", "warning"] and "energy=zeus" in found[1].advice


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((12, 0), ["sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((7, 0), ["compute_80"], False),
        ((9, 0), [], False),
        ((9, 0), ["gfx942"], False),
    ],
)
def test_which_code_runs_on_which_gpu(capability, architectures, runs):
    assert doctor_devices.runs_on(capability, architectures) is runs


MI300X = Gpu("AMD Instinct MI300X", (9, 4), 190_000, 196_000, "NVML knows none", architecture="gfx942:sramecc+:xnack-")
ROCM = Cuda("ROCm 6.4", ("gfx90a", "gfx942"), (MI300X,))
ON_AMD = "cuda:0 (AMD Instinct MI300X, gfx942:sramecc+:xnack-)"


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        (
            ROCM,
            [
                ("ok", f"{ON_AMD}: 185.5 of 191.4 GiB free, ROCm 6.4"),
                ("ok", "cuda:0: NVML does not read AMD GPUs, train_joules and *_peak_device_mib will be empty"),
            ],
        ),
        (
            dataclasses.replace(ROCM, architectures=("gfx90a", "gfx1100")),
            [("wrong", f"{ON_AMD}: this torch is built for gfx90a, gfx1100 and cannot run on it")],
        ),
        (Cuda("ROCm 6.4", seen=1), [("warning", "cpu: NVML finds 1 GPU, and this torch is built for ROCm 6.4")]),
        (Cuda("ROCm 6.4"), [("ok", "cpu: there is no GPU here; energy and GPU memory will be empty in tables")]),
    ],
)
def test_verdicts_on_amd_gpus(cuda, expected):
    assert [(found.level, found.line) for found in doctor_devices.judge_cuda(cuda)] == expected


@pytest.mark.parametrize(
    ("architecture", "built", "runs"),
    [
        ("gfx90a:sramecc+:xnack-", ["gfx90a", "gfx942"], True),
        ("gfx90a", ["gfx90a:xnack+"], True),
        ("gfx1103", ["gfx11-generic"], True),
        ("gfx942", ["gfx9-4-generic"], True),
        ("gfx1201", ["gfx90a", "gfx1100"], False),
        ("gfx1201", [], True),  # not known
    ],
)
def test_which_code_runs_on_which_amd_gpu(architecture, built, runs):
    assert doctor_devices.runs_on_amd(architecture, built) is runs


def test_an_exclusive_compute_mode_is_reported():
    found = list(doctor_devices.judge_cuda(one_gpu(mode="EXCLUSIVE_PROCESS")))
    assert levels(found) == ["ok", "warning", "ok"] and "compute mode is EXCLUSIVE_PROCESS" in found[1].line


def test_cuda_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_devices, "_driver", lambda: ("570.1", 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert doctor_devices.find_cuda() == Cuda(torch.version.cuda, driver="570.1", seen=1, visible="7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def sticky(index):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "get_device_properties", sticky)
    assert doctor_devices.find_cuda().error == "RuntimeError: CUDA error: an illegal memory access"
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert doctor_devices.find_cuda().built_for == "ROCm 6.4.1"


def test_facts_about_a_gpu_come_from_torch_and_nvml(monkeypatch):
    """The GPU is made up."""

    class Asked:
        def used_bytes(self):
            return 1

        def joules(self):
            raise Unavailable("NVML: Not Supported")

        def compute_mode(self):
            return "PROHIBITED"

    class Block:
        def __enter__(self):
            return Asked()

        def __exit__(self, *error):
            return None

    properties = type("Properties", (), {"name": "T", "major": 7, "minor": 5})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**30, 2**34))
    monkeypatch.setattr("distillbench.metering.nvml.gpu_of", lambda device: Block())
    assert doctor_devices._gpu(0) == Gpu("T", (7, 5), 1024, 16384, "", "NVML: Not Supported", "PROHIBITED")


# --- threads and numbers ---------------------------------------------------------------------------------------------


def test_threads():
    assert levels(doctor_devices.judge_threads(8, 4, {})) == ["ok"]
    assert levels(doctor_devices.judge_threads(8, 4, {"OMP_NUM_THREADS": "4"})) == ["ok"]
    found = list(doctor_devices.judge_threads(8, 4, {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "many"}))
    assert [(f.level, f.line) for f in found[1:]] == [
        ("warning", "MKL_NUM_THREADS='many' is not a number of threads"),
        ("warning", "OMP_NUM_THREADS=8 is more than the 4 cores here: timings are wrong"),
    ]


def test_threads_here(here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert levels(findings(doctor_devices.check_threads, here)) == ["ok", "warning"]


@pytest.mark.parametrize(
    ("product", "step", "repeats", "expected"),
    [
        (4e-7, 1e-7, True, ["ok"]),
        (4e-4, 1e-7, True, ["wrong"]),  # TF32
        (4e-7, 1e-2, True, ["wrong"]),
        (float("nan"), float("nan"), True, ["wrong", "wrong"]),
        (4e-7, 1e-7, False, ["warning", "ok"]),
    ],
)
def test_verdicts_on_float32(product, step, repeats, expected):
    assert levels(doctor_numerics.judge_numerics("cuda:0", product, step, repeats)) == expected


def test_float32_here(here):
    threads, seed = torch.get_num_threads(), torch.get_rng_state()
    assert levels(findings(doctor_numerics.check_numerics, here)) == ["ok"]
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), seed)


def test_steps_that_do_not_repeat_are_reported(here, monkeypatch):
    """The steps run with the default settings of training, not with deterministic algorithms."""
    seen = []

    def trained(network, side, device, dtype):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return torch.full((3,), float(len(seen)), dtype=torch.float64)

    monkeypatch.setattr(doctor_numerics, "_trained", trained)
    assert doctor_numerics._repeats("cpu") is False and seen == [False, False]
    assert levels(findings(doctor_numerics.check_numerics, here)) == ["wrong", "warning"]


def test_reduced_precision_is_reported(here, monkeypatch):
    """Products whose mantissas are cut to the 10 bits of TF32."""
    whole = doctor_numerics._product

    def reduced(device, dtype):
        product = whole(device, dtype)
        return product.to(torch.float16).double() if dtype == torch.float32 else product

    monkeypatch.setattr(doctor_numerics, "_product", reduced)
    found = findings(doctor_numerics.check_numerics, here)
    assert levels(found) == ["wrong"] and "TF32" in found[0].advice


# --- disk ------------------------------------------------------------------------------------------------------------

DISK = Disk(50_000, None, "ext4", "rw")


def room(**changed) -> Finding:
    return doctor_disk.judge_room("results (x)", dataclasses.replace(DISK, **changed), "wrong", "make room")


def test_free_space_of_a_disk():
    assert room() == Finding("ok", "results (x): 48.8 GiB free on ext4")
    assert room(kind="nfs4") == Finding("ok", "results (x): 48.8 GiB free on nfs4, a network file system")
    assert room(free_mib=3000).level == "warning"
    assert room(free_mib=100) == Finding("wrong", "results (x): 0.1 GiB free on ext4", "make room")
    assert room(inodes=5) == Finding("wrong", "results (x): 48.8 GiB free on ext4, room for 5 more files", "make room")
    assert room(inodes=5_000_000).level == "ok"
    assert room(write_error="Read-only file system").line == "results (x): cannot be written to: Read-only file system"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"rename_error": "no"}, [("wrong", "x: a file cannot be replaced atomically: no")]),
        ({"lock_error": "no"}, [("wrong", "x: files cannot be locked: no")]),
        (
            {"link_error": "no"},
            [("warning", "x: no hard links: no; students' weights are copied and take twice the space")],
        ),
        ({"kind": "nfs4", "options": "rw,vers=4.2"}, []),
        (
            {"kind": "nfs", "options": "rw,local_lock=all"},
            [("warning", "x: other machines do not see locks (nfs: mounted with local_lock=all)")],
        ),
        ({"kind": "fuse.sshfs"}, [("warning", "x: other machines do not see locks (fuse.sshfs: has no locks)")]),
        ({"kind": "ext4", "options": "nolock"}, []),
    ],
)
def test_links_locks_and_replacing_on_a_disk(changed, expected):
    found = doctor_disk.judge_files("x", dataclasses.replace(DISK, **changed))
    assert [(finding.level, finding.line) for finding in found] == expected


def test_the_disk_here_works_and_no_probe_is_left(tmp_path):
    disk = doctor_disk.find_disk(tmp_path / "not" / "yet")
    assert disk.free_mib > 0 and not any((disk.write_error, disk.link_error, disk.rename_error, disk.lock_error))
    assert not list(tmp_path.rglob("*"))


def test_a_disk_that_cannot_link_replace_or_lock(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "replace", lambda a, b: None)
    monkeypatch.setattr("filelock.FileLock", lambda *arguments, **options: contextlib.nullcontext())
    disk = doctor_disk.find_disk(tmp_path)
    assert disk.link_error == "Operation not supported"
    assert disk.rename_error == "the old file is still there afterwards"
    assert disk.lock_error == "two locks on one file at once"


def test_a_results_folder_that_cannot_be_written_to(tmp_path, here):
    (tmp_path / "results").write_text("a file")
    assert doctor_disk.find_disk(tmp_path / "results").write_error.endswith("is not a folder")
    assert lines_of(doctor_disk.check_disk, here)[0][0] == "wrong"


def test_a_weights_folder_that_cannot_be_written_to_is_a_warning(tmp_path, here):
    (tmp_path / "weights").write_text("a file")
    (tmp_path / "downloads").write_text("a file")
    for level, line in lines_of(doctor_disk.check_disk, here)[-2:]:
        assert level == "warning" and "cannot be written to" in line


def test_downloads_that_are_complete_damaged_or_left_over(tmp_path, here, monkeypatch):
    assert lines_of(doctor_disk.check_downloads, here) == [("ok", f"no downloads in {tmp_path / 'downloads'} yet")]
    (tmp_path / "net.pkl").write_bytes(b"whole")
    file = SourceFile((tmp_path / "net.pkl").as_uri())
    source = Download("net", "teacher", "edm", "Net", "CC0", "an institute", URL, files=(file,))
    monkeypatch.setattr(doctor_disk, "known", lambda: {"net": source})
    path = fetch(offered(source), Progress(None))
    assert lines_of(doctor_disk.check_downloads, here) == [("ok", "complete (--thorough hashes them): net")]
    path.write_bytes(b"other")  # of the same size
    thorough = dataclasses.replace(here, thorough=True)
    found = findings(doctor_disk.check_downloads, thorough)
    assert found == [Finding("wrong", "net: files are missing or damaged", "distillbench fetch net")]
    part = path.with_name("other.pkl.part")
    part.write_bytes(b"part")
    os.utime(part, (0, 0))
    found = findings(doctor_disk.check_downloads, here)[-1]
    assert (found.level, found.advice) == ("warning", "distillbench clean --downloads")
    assert found.line.startswith("left over of downloads: 1 file, ")


# --- results ---------------------------------------------------------------------------------------------------------


def test_no_results_yet(here):
    assert lines_of(doctor_results.check_caches, here) == [("ok", f"no results in {here.results_dir} yet")]
    assert lines_of(doctor_results.check_records, here) == [("ok", "0 records can be read")]


def test_sizes_of_caches_and_leftover_files(here):
    cell = train(here.results_dir, weights=b"x" * 2**20)
    (here.results_dir / "cache" / "pairs").mkdir(parents=True)
    assert lines_of(doctor_results.check_caches, here) == [("ok", "1 cell 1.0 MiB, cache/pairs 0.0 MiB")]
    (cell / "resume").mkdir()
    (cell / "resume" / "aside-state-1-0.safetensors").write_bytes(b"x" * 2**20)
    found = findings(doctor_results.check_caches, here)
    assert (found[1].level, found[1].line) == ("warning", "left over: 1 states, 1.0 MiB")
    assert found[1].advice == f"distillbench clean --results-dir {here.results_dir}"


def test_undamaged_records(here):
    folder = train(here.results_dir)
    rows = [RowRecord(nfe=1, sampling_seed=0)]
    for name, kind, more in (("evaluation", EvaluationRecord, {"rows": rows}), ("speed", SpeedRecord, {})):
        inputs = {"of": name}
        write_record(folder / f"{name}-{key_of(inputs)}.json", kind(key=key_of(inputs), inputs=inputs, **more, **ABOUT))
    assert lines_of(doctor_results.check_records, here) == [("ok", "3 records can be read")]


def test_failed_records_are_counted(here):
    train(here.results_dir, "a", "failed")
    train(here.results_dir, "b", "diverged")
    assert lines_of(doctor_results.check_records, here) == [
        ("warning", "1 record of failed work"),
        ("ok", "2 records can be read"),
    ]


DAMAGE = {  # how the text of a record is changed
    "empty": lambda content: "",
    "broken": lambda content: json.dumps(content)[:50],
    "list": lambda content: "[]",
    "deep": lambda content: "[" * 100_000,
    "another key": lambda content: json.dumps(content | {"key": "0" * 16}),
    "other inputs": lambda content: json.dumps(content | {"inputs": {"method": "z"}}),
    "another's": lambda content: json.dumps(content | {"inputs": {"method": "z"}, "key": key_of({"method": "z"})}),
    "no inputs": lambda content: json.dumps({name: value for name, value in content.items() if name != "inputs"}),
    "wrong type": lambda content: json.dumps(content | {"cost": "much"}),
    "new field": lambda content: json.dumps(content | {"surprise": 1}),
    "not a number": lambda content: json.dumps(content | {"inputs": {"method": float("nan")}}),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_records_are_named(here, how):
    path = train(here.results_dir) / "train.json"
    train(here.results_dir, "b")
    path.write_text(DAMAGE[how](json.loads(path.read_text())))
    name = f"{path.parent.name}/train.json"
    assert lines_of(doctor_results.check_records, here) == [
        ("wrong", f"1 of 2 records damaged: {name}"),
        ("ok", "1 record can be read"),
    ]


def test_records_of_another_version_are_not_damaged(here):
    path = train(here.results_dir) / "train.json"
    path.write_text(json.dumps({"schema_version": 1, "method": "a"}))
    assert lines_of(doctor_results.check_records, here) == [
        ("warning", f"1 record of another version of distillbench: {path.parent.name}/train.json")
    ]


def test_weights_of_students(here, tmp_path):
    folder = train(here.results_dir)
    assert lines_of(doctor_results.check_students, here) == [("ok", "2 weights files as recorded")]
    (folder / "student.safetensors").write_bytes(b"other")
    (folder / "checkpoint-1.safetensors").unlink()
    assert lines_of(doctor_results.check_students, here) == [
        ("wrong", f"1 weights file missing: {folder.name}/checkpoint-1.safetensors"),
        ("wrong", f"1 weights file not as recorded: {folder.name}/student.safetensors"),
    ]


def test_a_record_cannot_name_a_file_outside_its_cell(here, tmp_path):
    path = train(here.results_dir) / "train.json"
    (tmp_path / "secret").write_bytes(b"early")
    text = path.read_text().replace("checkpoint-1.safetensors", "../../../secret")
    path.write_text(json.dumps(signed(json.loads(text))))
    assert lines_of(doctor_results.check_students, here) == [
        ("wrong", f"1 weights file missing: {path.parent.name}: '../../../secret'")
    ]


def test_large_weights_are_hashed_only_when_thorough(here, monkeypatch):
    folder = train(here.results_dir, weights=b"x" * 2**20)
    (folder / "student.safetensors").write_bytes(b"y" * 2**20)
    monkeypatch.setattr(doctor_results, "HASHED_MIB", 0.5)
    line = "1 weights file as recorded; 1 large one not read (--thorough does)"
    assert lines_of(doctor_results.check_students, here) == [("ok", line)]
    assert lines_of(doctor_results.check_students, dataclasses.replace(here, thorough=True))[0][0] == "wrong"


def test_training_checkpoints(here):
    folder = train(here.results_dir) / "resume" / "1"
    assert lines_of(doctor_results.check_states, here) == [("ok", "no interrupted training")]
    folder.mkdir(parents=True)
    digits = hashlib.sha256(b"state").hexdigest()[:16]
    (folder / f"state-000000000010-{digits}.safetensors").write_bytes(b"state")
    going_on = ("ok", "1 interrupted training: the same command resumes")
    assert lines_of(doctor_results.check_states, here) == [going_on]
    broken = f"state-000000000020-{digits}.safetensors"
    (folder / broken).write_bytes(b"broken")
    (folder / "aside-state-000000000005-0.safetensors").write_bytes(b"broken")
    assert lines_of(doctor_results.check_states, here) == [
        ("warning", f"1 training checkpoint damaged: {folder.parent.parent.name}/resume/1/{broken}"),
        ("warning", "1 damaged training checkpoint set aside"),
        going_on,
    ]


def test_flipped_bits_are_found_and_no_check_breaks(here):
    """In any file: no check raises, and damaged weights are always reported."""
    random = Random(0)
    root = here.results_dir
    folder = train(root)
    (folder / "resume").mkdir()
    digits = hashlib.sha256(b"state").hexdigest()[:16]
    (folder / "resume" / f"state-000000000010-{digits}.safetensors").write_bytes(b"state")
    (root / "run").mkdir()
    pd.DataFrame({"key": [key_of("e")]}).to_parquet(root / "run" / "table.parquet")
    reading = (
        doctor_results.check_caches,
        doctor_results.check_records,
        doctor_results.check_students,
        doctor_results.check_states,
    )
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    for _ in range(100):
        path = random.choice(files)
        whole = bytearray(path.read_bytes())
        broken = whole[:]
        broken[random.randrange(len(broken))] ^= 1 << random.randrange(8)
        path.write_bytes(broken)
        found = [finding for check in reading for finding in findings(check, here)]
        clean.find(root, list(clean.KINDS), 0.0)
        assert not [finding for finding in found if "could not be checked" in finding.line]
        if path.suffix == ".safetensors":
            assert {"warning", "wrong"} & set(levels(found)), path
        path.write_bytes(whole)


# --- plugins and networks --------------------------------------------------------------------------------------------


def test_loaded_and_broken_plugins(here):
    def broken():
        raise ImportError("no module 'gone'")

    registry = load_registry([Source("mine", "my-package", "1.2", broken)])
    found = lines_of(doctor_plugins.check_plugins, dataclasses.replace(here, registry=registry))
    assert found[0] == ("wrong", "mine (my-package 1.2) is left out: ImportError: no module 'gone'")
    assert found[1] == ("wrong", "0 plugins loaded: 0 methods, 0 teachers, 0 datasets, 0 metrics")
    registry.plugins = [Plugin("a", "p", "1"), Plugin("b", "p", "1", not_selected="DISTILLBENCH_PLUGINS=a")]
    found = lines_of(doctor_plugins.check_plugins, dataclasses.replace(here, registry=registry))
    assert found == [("ok", "1 plugin loaded: 0 methods, 0 teachers, 0 datasets, 0 metrics; not selected: b")]


def with_network(here, content: bytes = b"whole", url: str = "https://x", mib: int = 1) -> Installation:
    class Network(FeatureNetwork):
        name = "net"
        weights = WeightsFile("net.pth", hashlib.sha256(content).hexdigest(), url, "MIT", mib)

    metric = type("Score", (), {"network": Network})
    return dataclasses.replace(here, registry=Registry(metrics={"score": Entry(metric, Plugin("p", "p", "1"))}))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_network_weights_present_missing_or_damaged(here):
    here = with_network(here)
    found = findings(doctor_plugins.check_networks, here)
    line = "net: no weights, its scores will be empty"
    assert found == [Finding("warning", line, "distillbench fetch net (1 MiB)")]
    here.weights.mkdir()
    (here.weights / "net.pth").write_bytes(b"whole")
    assert lines_of(doctor_plugins.check_networks, here) == [("ok", "weights present and undamaged: net")]
    (here.weights / "net.pth").write_bytes(b"broken")
    found = findings(doctor_plugins.check_networks, here)
    assert levels(found) == ["wrong"] and found[0].advice == "distillbench fetch net"
    assert found[0].line.startswith("net.pth is not the file that net is defined by: sha256")


def test_weights_in_a_package_must_exist(here):
    found = findings(doctor_plugins.check_networks, with_network(here, url=""))
    assert levels(found) == ["wrong"] and found[0].advice == "reinstall the package that contains them"


def test_large_network_weights_are_hashed_only_when_thorough(here, monkeypatch):
    monkeypatch.setattr(doctor_plugins, "LARGE_MIB", 0)
    here = with_network(here)
    here.weights.mkdir()
    (here.weights / "net.pth").write_bytes(b"x" * 2**20)
    assert lines_of(doctor_plugins.check_networks, here) == [
        ("ok", "weights present, too large to hash now: net (--thorough hashes them)")
    ]
    assert lines_of(doctor_plugins.check_networks, dataclasses.replace(here, thorough=True))[0][0] == "wrong"


def test_a_network_that_raises_is_reported(here, monkeypatch):
    here = with_network(here)

    def broken(folder):
        raise ImportError("its package is gone")

    monkeypatch.setattr(here.registry.metrics["score"].cls.network, "locate", broken)
    line = "net: its weights cannot be located: ImportError: its package is gone"
    assert lines_of(doctor_plugins.check_networks, here) == [("wrong", line)]


def test_files_of_a_killed_doctor_are_cleaned(tmp_path):
    """Its probe is named like a temporary file."""
    train(tmp_path)
    probe = tmp_path / f"{doctor_disk.TEMPORARY}x" / "a"
    probe.parent.mkdir()
    probe.write_bytes(b"first")
    assert clean.find(tmp_path, ["temporary"], 0.0)[0].files == [probe]
