"""Steps about the device: what it is, its speed, its precision, its counters of memory and energy."""

from __future__ import annotations

import copy
import gc
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from distillbench.errors import Unavailable
from distillbench.metering.energy import energy
from distillbench.metering.memory import peak_gpu_mib
from distillbench.networks.architectures import UNet
from distillbench.training.compute import tf32
from gpu_steps import verdicts
from gpu_steps.clocks import Gauges, Sampled, clocks, gauges, median, milliseconds, synchronise, warm_up
from gpu_steps.context import Context, NotRun
from gpu_steps.verdicts import Verdict

MIB = 2**20
STARTS = ("CUDA", "NVIDIA", "TORCH", "PYTORCH", "NCCL", "OMP", "CUBLAS", "DISTILLBENCH")
LEVELS: dict[str, verdicts.Level] = {"ok": "ok", "warning": "look", "wrong": "wrong"}  # doctor's


def environment(context: Context) -> None:
    """Doctor's checks of the device, versions, NVML, MIG, compute mode, variables."""
    from pathlib import Path

    from distillbench.cli.doctor import findings
    from distillbench.cli.doctor_devices import check_device, check_threads
    from distillbench.cli.doctor_findings import Installation
    from distillbench.cli.doctor_numerics import check_numerics
    from distillbench.cli.doctor_packages import check_torch
    from distillbench.evaluation.pretrained_weights import weights_folder
    from distillbench.registry import load_registry

    context.keep("about", about(context.device))
    installation = Installation(load_registry(), Path(context.folder), weights_folder())
    for name, check in (
        ("torch", check_torch), ("device", check_device), ("threads", check_threads), ("float32", check_numerics)
    ):  # fmt: skip
        for finding in findings(check, installation):
            context.say(Verdict(LEVELS[finding.level], f"doctor: {name}", finding.line, "", finding.advice))
    own = {name: value for name, value in os.environ.items() if name.startswith(STARTS)}
    own = {name: value for name, value in own.items() if "TOKEN" not in name and "/" not in value}
    context.say(verdicts.judge_variables(own))
    with gauges(context.device) as found:
        if found is not None:
            _nvml(context, found)
        elif context.on_gpu:
            advice = "energy, *_peak_device_mib and clocks stay empty; install nvidia-ml-py, or give the container NVML"
            context.say(Verdict("look", "NVML", "not there", "", advice))


def about(device: str) -> dict[str, Any]:
    """Versions and the device, without names of hosts or folders."""
    found: dict[str, Any] = {
        "device": "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }
    if device == "cpu":
        return found
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda or f"hip {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory // MIB,
        "architectures": torch.cuda.get_arch_list(),
    }


def _nvml(context: Context, found: Gauges) -> None:
    name = found.ask("nvmlDeviceGetName")
    name = name if isinstance(name, str) else name.decode()
    theirs = torch.cuda.get_device_name(context.device)
    context.say(
        verdicts.judge(name == theirs, "look", "NVML's name of the device", name, theirs, "it may be another GPU")
    )
    modes = {0: "default", 2: "prohibited", 3: "exclusive process"}
    asked: dict[str, tuple[str, Callable[[Any], Verdict]]] = {
        "compute mode": ("nvmlDeviceGetComputeMode", lambda mode: _mode(modes.get(int(mode), str(mode)))),
        "MIG": ("nvmlDeviceGetMigMode", lambda mode: _mig(int(mode[0]), theirs)),
        "ECC": ("nvmlDeviceGetEccMode", lambda mode: Verdict("ok", "ECC", "on" if mode[0] else "off")),
        "persistence": ("nvmlDeviceGetPersistenceMode", lambda on: Verdict("ok", "persistence", "on" if on else "off")),
        "other processes": ("nvmlDeviceGetComputeRunningProcesses", lambda them: _others(len(them))),
    }
    for what, (function, verdict) in asked.items():
        try:
            context.say(verdict(found.ask(function)))
        except Unavailable as reason:
            context.say(Verdict("ok", what, f"cannot be told: {reason}"))


def _mode(mode: str) -> Verdict:
    if mode == "default":
        return Verdict("ok", "compute mode", mode)
    advice = "one process at a time may use this GPU: runs with isolate=true (the default) may find it busy"
    return Verdict("look", "compute mode", mode, "default", advice)


def _mig(on: int, name: str) -> Verdict:
    if not on:
        return Verdict("ok", "MIG", "off")
    advice = "memory and joules by NVML may be of the whole board; no data sheet applies"
    return Verdict("look", "MIG", f"on ({name})", "off", advice)


def _others(count: int) -> Verdict:
    """This step's own process is one, where NVML sees it at all (in containers it often does not)."""
    if count <= 1:
        return Verdict("ok", "other processes on the GPU", "none is seen")
    return Verdict("look", "other processes on the GPU", str(count - 1), "none", "their work is in every time here")


# --- bare limits -----------------------------------------------------------------------------------------------------


def limits(context: Context) -> None:
    """Products and copies as fast as they come, and the clocks meanwhile."""
    device, size = context.device, 256 if context.small else 8192
    name = "cpu" if not context.on_gpu else torch.cuda.get_device_name(device)
    peak, reached = verdicts.peak_of(name), dict[str, float]()
    seconds = 0.05 if context.small else 2.0
    warm_up(device, seconds)
    with clocks(device) as seen:
        for precision in ("fp32", "tf32", "bf16"):
            if precision == "tf32" and not context.on_gpu:
                continue
            with context.attempt(f"{precision} products"), tf32(precision == "tf32", device):
                reached[precision] = _products(device, size, precision, seconds)
                sheet = None if peak is None else peak.of(precision)
                what = f"{precision} products of {size}x{size}"
                context.say(verdicts.judge_limit(what, reached[precision], sheet, "TFLOP/s", verdicts.LIMITS_REACHED))
        with context.attempt("copies"):
            reached["copies"] = _copies(device, 2**20 if context.small else 2**30, seconds)
            sheet = None if peak is None else peak.memory
            context.say(
                verdicts.judge_limit("copies on the device", reached["copies"], sheet, "GB/s", verdicts.COPIES_REACHED)
            )
    if context.on_gpu:
        context.say(verdicts.judge_clocks(seen))
    context.keep("reached", reached)
    context.keep("peak", None if peak is None else vars(peak))


def _products(device: str, size: int, precision: str, seconds: float) -> float:
    """TFLOP/s of the median product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    times = milliseconds(lambda: torch.mm(a, b, out=c), device, 5, seconds)
    return 2 * size**3 / (median(times) * 1e-3) / 1e12


def _copies(device: str, size: int, seconds: float) -> float:
    """GB/s of the median copy, read and written."""
    a, b = (torch.empty(size, device=device, dtype=torch.uint8) for _ in range(2))
    return 2 * size / (median(milliseconds(lambda: b.copy_(a), device, 10, seconds)) * 1e-3) / 1e9


# --- precision -------------------------------------------------------------------------------------------------------


def precision(context: Context) -> None:
    """A U-Net in each precision of the settings beside float64 on the CPU: float32 must not be TF32."""
    from distillbench.diffusion.denoiser import Denoiser
    from distillbench.diffusion.schedules import VPCosine
    from distillbench.teachers.teacher import Teacher
    from distillbench.training.compute import Sampling, sampling

    torch.manual_seed(0)
    width, shape = (8, (3, 8, 8)) if context.small else (64, (3, 32, 32))
    network = UNet(shape, width, 1)
    x, t = torch.randn(4, *shape), torch.tensor([0.125, 0.25, 0.5, 0.75], dtype=torch.float64).view(4, 1, 1, 1)
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        wanted = exact(x.double(), t.flatten())
        teacher = Teacher("unet", Denoiser(network, VPCosine(), "v").to(context.device), shape, "unet")
        for name in ("fp32", "tf32", "fp16", "bf16"):
            if name == "tf32" and not has_tf32(context):
                context.say(Verdict("skipped", "tf32: error of a U-Net", "no units for it here"))
                continue
            with context.attempt(f"{name}: error of a U-Net"), sampling(Sampling(name), teacher, context.device):
                given = x.to(context.device), t.to(context.device)
                got = teacher.denoiser.output(*given).double().cpu()
                error = ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()
                context.say(verdicts.judge_precision(name, error))


def has_tf32(context: Context) -> bool:
    """Whether the device has units for TF32: NVIDIA's from Ampere on."""
    return context.on_gpu and torch.version.hip is None and torch.cuda.get_device_capability(context.device)[0] >= 8


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(context: Context) -> None:
    """Torch's allocator beside NVML, and the peaks that a cell is given, of an allocation of known size."""
    device = context.device
    if not context.on_gpu:
        raise NotRun("it needs a GPU")
    size = 64 if context.small else 1024
    take = lambda mib: torch.empty(mib * MIB, dtype=torch.uint8, device=device)
    synchronise(device)
    torch.zeros(1, device=device)  # the context is made before
    with gauges(device) as found:
        used = (lambda: found.gpu.used_bytes() / MIB) if found else None
        before, seen = torch.cuda.memory_allocated(device) / MIB, used() if used else 0.0
        held = take(size)
        synchronise(device)
        rose = torch.cuda.memory_allocated(device) / MIB - before
        context.say(verdicts.judge_allocation("torch's allocator", size, rose, 1))
        if used:
            context.say(verdicts.judge_allocation("NVML's memory in use", size, used() - seen, 64))
            context.keep("in_use_before_mib", seen)
        del held
    torch.cuda.empty_cache()
    with peak_gpu_mib(device) as peak:
        held = take(size)
        held.fill_(1)
        del held
        torch.cuda.empty_cache()
        take(size // 4).fill_(1)
        time.sleep(0.1)  # NVML is looked at every 20 ms
    context.say(verdicts.judge_allocation("peak of a cell: tensors", size + before, peak.mib or 0.0, 2))
    what = "peak of a cell: torch's allocator"
    if peak.reserved.mib is None:
        context.say(Verdict("skipped", what, peak.reserved.reason))
    else:
        context.say(verdicts.judge_allocation(what, size, peak.reserved.mib, 64))
    context.keep("device_peak_mib", peak.device.mib)
    gc.collect()
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated(device) / MIB - before
    context.say(verdicts.judge_equal("memory that is given back, MiB", abs(left), 1.0))


# --- energy ----------------------------------------------------------------------------------------------------------


def energy_step(context: Context) -> None:
    """Joules of the project's counter beside power read every 20 ms: at rest, then under load."""
    if not context.on_gpu:
        raise NotRun("it needs a GPU")
    seconds, found_watts = (2.5 if context.small else 10.0), dict[str, float]()
    with gauges(context.device) as found:
        if found is None:
            raise NotRun("it needs NVML")
        try:
            found.watts(), found.gpu.joules()
        except Unavailable as reason:
            raise NotRun(str(reason)) from reason
        synchronise(context.device)
        time.sleep(0.2 if context.small else 3.0)  # until power has fallen
        for what, work in (("at rest", time.sleep), ("under load", lambda s: warm_up(context.device, s))):
            if what == "under load":
                work(0.2 if context.small else 2.0)  # until power has risen, where it is a mean over a second
            with Sampled(found.watts) as power:
                with energy(context.device) as watch:
                    begin = time.perf_counter()
                    work(seconds)
                    synchronise(context.device)
                    end = time.perf_counter()
                used = watch.used
                time.sleep(0.05)
            if used.joules is None:
                context.say(Verdict("look", f"joules {what}", used.reason, "a number"))
                continue
            integral = power.integral(begin, end)
            context.say(verdicts.judge_energy(f"joules {what}", used.joules, integral, found.limit(), end - begin))
            found_watts[what] = used.joules / (end - begin)
    if len(found_watts) == 2 and not context.simulated:  # whose power is a constant
        context.say(verdicts.judge_load(found_watts["at rest"], found_watts["under load"]))
    context.keep("watts", found_watts)
