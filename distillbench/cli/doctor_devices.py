"""Checks of ``distillbench doctor``: GPUs as torch and NVML see them, and CPU cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distillbench.cli.doctor_findings import MIB, Finding, Installation
from distillbench.errors import Unavailable, counted
from distillbench.system.subprocesses import in_words

LITTLE_GPU_MIB = 2 * 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch and NVML see it."""

    name: str
    capability: tuple[int, int]
    free_mib: float
    total_mib: float
    nvml_error: str = ""
    energy_error: str = ""
    mode: str = ""  # compute mode: "" where every process may use it
    architecture: str = ""  # AMD only, such as gfx90a

    @property
    def in_words(self) -> str:
        kind = self.architecture or f"compute capability {self.capability[0]}.{self.capability[1]}"
        return f"{self.name}, {kind}"


@dataclass(frozen=True)
class Cuda:
    """CUDA as torch sees it, or ROCm, which torch calls cuda too.

    `built_for`: torch's version of CUDA, "ROCm ...", or None. `seen`: number of GPUs that NVML finds (NVIDIA's only).
    `visible`: $CUDA_VISIBLE_DEVICES, None where it is not set.
    """

    built_for: str | None
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    seen: int = 0
    visible: str | None = None
    error: str = ""

    @property
    def rocm(self) -> bool:
        return (self.built_for or "").startswith("ROCm")

    @property
    def in_words(self) -> str:
        return f"{self.built_for}" if self.rocm else f"driver {self.driver or '?'}, CUDA {self.built_for}"


def judge_cuda(cuda: Cuda) -> Iterator[Finding]:
    if cuda.error:
        tool = "rocm-smi" if cuda.rocm else "nvidia-smi"
        advice = f"restart the process or the machine; {tool} shows the driver's state"
        yield Finding("wrong", f"torch cannot use CUDA: {cuda.error}", advice)
    elif not cuda.gpus:
        yield _no_gpu(cuda)
    for index, gpu in enumerate(cuda.gpus):
        yield from _judge_gpu(index, gpu, cuda)


def _no_gpu(cuda: Cuda) -> Finding:
    count = counted(cuda.seen, "GPU")
    if cuda.seen and cuda.built_for is None:
        advice = "install a CUDA build of torch and torchvision: https://pytorch.org/get-started/locally"
        return Finding("warning", f"cpu: NVML finds {count}, and this torch is built for the CPU only", advice)
    if cuda.seen and cuda.rocm:
        advice = "install a CUDA build of torch and torchvision: https://pytorch.org/get-started/locally"
        return Finding("warning", f"cpu: NVML finds {count}, and this torch is built for {cuda.built_for}", advice)
    if cuda.seen and cuda.visible is not None:
        line = f"cpu: NVML finds {count}, CUDA_VISIBLE_DEVICES={cuda.visible!r} leaves none"
        return Finding("warning", line, "unset it to use them")
    if cuda.seen:
        line = (
            f"NVML finds {count} and torch none: driver {cuda.driver or '?'}, torch is built for CUDA {cuda.built_for}"
        )
        return Finding("wrong", line, "update the driver, or install a torch that is built for an older CUDA")
    return Finding("ok", "cpu: there is no GPU here; energy and GPU memory will be empty in tables")


def _judge_gpu(index: int, gpu: Gpu, cuda: Cuda) -> Iterator[Finding]:
    where = f"cuda:{index} ({gpu.in_words})"
    built = cuda.architectures
    if not (runs_on_amd(gpu.architecture, built) if cuda.rocm else runs_on(gpu.capability, built)):
        line = f"{where}: this torch is built for {', '.join(cuda.architectures)} and cannot run on it"
        yield Finding("wrong", line, "install a torch that is built for it, or set device=cpu")
        return
    memory = f"{gpu.free_mib / 1024:,.1f} of {gpu.total_mib / 1024:,.1f} GiB free"
    line = f"{where}: {memory}, {cuda.in_words}"
    if gpu.free_mib < LITTLE_GPU_MIB:
        yield Finding("warning", line, "little memory is free: another process uses it (see nvidia-smi)")
    else:
        yield Finding("ok", line)
    if gpu.mode:
        line = f"cuda:{index}: compute mode is {gpu.mode}: not every process may use the GPU"
        yield Finding("warning", line, "runs need isolate=false evaluation.timing=inline, or nvidia-smi -c DEFAULT")
    if cuda.rocm:
        line = f"cuda:{index}: NVML does not read AMD GPUs, train_joules and *_peak_device_mib will be empty"
        yield Finding("ok", line)
    elif gpu.nvml_error:
        line = f"cuda:{index}: {gpu.nvml_error}; train_joules and *_peak_device_mib will be empty"
        yield Finding("warning", line, "ask the administrator of this machine or container for NVML (libnvidia-ml)")
    elif gpu.energy_error:
        line = f"cuda:{index}: no energy counter ({gpu.energy_error}); train_joules will be empty"
        yield Finding("warning", line, "energy=zeus integrates the power draw instead; it needs the package zeus")
    else:
        yield Finding("ok", f"cuda:{index}: NVML and its energy counter can be read")


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code built for `architectures` (sm_80, compute_90) runs on a GPU with this compute capability.

    Machine code (sm_*) runs on GPUs of the same major version and the same or a later minor one; PTX (compute_*) is
    compiled for any later GPU.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        if len(digits) < 2:
            continue
        built = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def runs_on_amd(architecture: str, architectures: Sequence[str]) -> bool:
    """Whether code built for `architectures` runs on an AMD GPU such as gfx90a:sramecc+:xnack- (modes after ":").

    Code for gfx11-generic runs on every gfx11*. True where torch lists no architectures, as nothing is known then.
    """
    name = architecture.partition(":")[0]
    built = [one.partition(":")[0] for one in architectures]
    generic = (one.removesuffix("-generic").replace("-", "") for one in built if one.endswith("-generic"))
    return not built or not name or name in built or any(name.startswith(one) for one in generic)


def check_device(installation: Installation) -> Iterator[Finding]:
    """Whether torch can use the GPUs, and NVML can measure them."""
    yield from judge_cuda(find_cuda())


def find_cuda() -> Cuda:
    """CUDA and the GPUs of this machine."""
    import torch

    driver, seen = _driver()
    built_for = f"ROCm {torch.version.hip}" if torch.version.hip else torch.version.cuda
    facts: dict[str, Any] = {"built_for": built_for, "driver": driver, "seen": seen}
    facts["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return Cuda(**facts)
    try:
        gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
        return Cuda(**facts, architectures=tuple(torch.cuda.get_arch_list()), gpus=gpus)
    except RuntimeError as error:
        return Cuda(**facts, error=in_words(error))


def _gpu(index: int) -> Gpu:
    import torch

    from distillbench.metering.nvml import gpu_of

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    nvml_error = energy_error = mode = ""
    try:
        with gpu_of(f"cuda:{index}") as gpu:
            gpu.used_bytes()
            with suppress(Unavailable):
                mode = gpu.compute_mode()
            try:
                gpu.joules()
            except Unavailable as reason:
                energy_error = str(reason)
    except Unavailable as reason:
        nvml_error = str(reason)
    capability = properties.major, properties.minor
    architecture = properties.gcnArchName if torch.version.hip else ""
    return Gpu(properties.name, capability, free / MIB, total / MIB, nvml_error, energy_error, mode, architecture)


def _driver() -> tuple[str, int]:
    """The driver's version and its number of GPUs, from NVML; ("", 0) without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no pynvml, no library or no driver
        return "", 0
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
        return version if isinstance(version, str) else version.decode(), pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return "", 0
    finally:
        pynvml.nvmlShutdown()


def judge_threads(cores: int, usable: int, variables: dict[str, str]) -> Iterator[Finding]:
    """`usable`: cores that this process may use. `variables`: environment variables that set the number of threads."""
    listed = "".join(f", {name}={value}" for name, value in sorted(variables.items()))
    yield Finding("ok", f"{usable} of {cores} cores; a run uses threads=N of them, 1 by default{listed}")
    for name, value in sorted(variables.items()):
        if not value.isdigit() or not int(value):
            yield Finding("warning", f"{name}={value!r} is not a number of threads", f"unset {name}")
        elif int(value) > usable:
            advice = f"export {name}={usable}"
            yield Finding("warning", f"{name}={value} is more than the {usable} cores here: timings are wrong", advice)


def check_threads(installation: Installation) -> Iterator[Finding]:
    """Cores that this process may use, and environment variables that ask for more threads."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    yield from judge_threads(cores, usable, {name: os.environ[name] for name in names if name in os.environ})
