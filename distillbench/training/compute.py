"""Precision, memory format, compilation and activation checkpointing of networks: settings that rows record.

They apply only to the networks of teacher and students. Inputs and outputs are in the default dtype, so schedules,
preconditioning, targets and losses stay in float32 and float64. The settings are attached to the counters that copies
of a network share (:class:`distillbench.diffusion.denoiser.Counter`): a copy is computed like its original, and a
student that is initialised from the teacher like a student.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from distillbench.diffusion.denoiser import Counter, NetworkCall
from distillbench.errors import UserError
from distillbench.metering.nvml import EXCLUSIVE_PROCESS, PROHIBITED, compute_mode
from distillbench.networks.calls import DTYPES, ConfiguredCall, networks_below
from distillbench.networks.cuda_graphs import Captured
from distillbench.options import option, require_between, require_one_of
from distillbench.system.precision import tf32

if TYPE_CHECKING:
    from distillbench.teachers.teacher import Teacher
    from distillbench.training.method import Method

PRECISIONS = ("fp32", "bf16", "fp16")
SAMPLED = ("fp32", "tf32", "bf16", "fp16")
ROUNDING = ("tf32", "channels_last", "compile")  # settings, besides the precision, that can change outputs
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # values that make cuBLAS deterministic
CHANGE_MODE = "Its administrator can change the mode: nvidia-smi -c DEFAULT"
AMPERE = (8, 0)  # compute capability
MOST_VARIANTS = 128  # compiled for one function: blocks of a network have many shapes, with and without gradient


@dataclass
class ComputeConfig:
    """How the networks are computed in training."""

    precision: str = option("fp32", "of students' networks in training: fp32, bf16 or fp16 (fp16 with loss scaling)")
    teacher_precision: str = option("same", "of the frozen teacher's networks in training: same, fp32, bf16 or fp16")
    tf32: bool = option(False, "on a GPU, float32 products and convolutions may round their factors to 10 bits")
    channels_last: bool = option(False, "convolutions keep the channels of a pixel together (NHWC)")
    compile: str = option("off", "torch.compile of whole networks, of their repeated blocks, or off")
    recompute: bool = option(False, "activation checkpointing: repeated blocks are recomputed in backward passes")
    shard: bool = option(False, "FSDP: weights, gradients and moments are sharded over the ranks")
    prefetch: int = option(2, "batches of real images that are prefetched for a GPU; 0: none")
    deterministic: bool = option(False, "only deterministic algorithms; an operator that has none fails the cell")
    cudnn_benchmark: bool = option(
        False, "cuDNN benchmarks its algorithms and takes the fastest, which may differ between runs"
    )

    def __post_init__(self) -> None:
        require_one_of(self, "precision", PRECISIONS)
        require_one_of(self, "teacher_precision", ("same", *PRECISIONS))
        require_one_of(self, "compile", ("off", "whole", "blocks"))
        require_between(self, 0, 1000, "prefetch")
        if self.deterministic and self.cudnn_benchmark:
            raise UserError("compute.deterministic=true does not go with compute.cudnn_benchmark=true")
        if self.shard:
            _check_sharded(self)

    @property
    def of_teacher(self) -> str:
        """The precision of the teacher's networks."""
        return self.precision if self.teacher_precision == "same" else self.teacher_precision


# --- in training -----------------------------------------------------------------------------------------------------


@contextmanager
def applied(config: ComputeConfig, method: Method, device: str) -> Iterator[None]:
    """A block in which the networks of `method`, of its teacher and of new copies are computed by `config`.

    Afterwards networks and torch's settings are as before. Raises UserError if `device` does not support a setting.
    """
    check_compute(config, device)
    teacher = method.teacher
    calls: dict[Counter, NetworkCall] = {
        teacher.teacher_rows: _call_of(config, config.of_teacher, device),
        teacher.student_rows: _call_of(config, config.precision, device),
    }
    with ExitStack() as stack:
        stack.enter_context(tf32(config.tf32, device))
        stack.enter_context(algorithms(config, device))
        if config.compile != "off":
            stack.enter_context(_many_variants())
        for counter, call in calls.items():
            stack.callback(call.undo)
            stack.enter_context(counter.calling(call))
        for counted in networks_below(method, teacher.denoiser):  # before copies are made, which keep the memory format
            if counted.counter in calls:  # a method may have networks with other counters
                calls[counted.counter].prepare(counted.network)
        yield


def _call_of(config: ComputeConfig, precision: str, device: str) -> NetworkCall:
    plain = {name: value for name, value in training_identity(config, device).items() if name in ROUNDING}
    if precision != "fp32":
        plain["precision"] = precision
    if {config.precision, config.of_teacher} == {"fp32"} and not (
        config.channels_last or config.compile != "off" or config.recompute
    ):
        return NetworkCall(plain)
    return ConfiguredCall(device_type(device), precision, config.channels_last, config.compile, config.recompute, plain)


def grad_scaler(config: ComputeConfig, device: str) -> torch.amp.GradScaler | None:
    """The loss scaler for fp16, which skips steps whose gradients overflowed; None for other precisions."""
    return torch.amp.GradScaler(device_type(device)) if config.precision == "fp16" else None


def last_batch(config: ComputeConfig) -> AbstractContextManager[Any]:
    """A block for a smaller batch than the others: what would need compilation for it runs eagerly."""
    return nullcontext() if config.compile == "off" else torch.compiler.set_stance("eager_on_recompile")


@contextmanager
def algorithms(config: ComputeConfig, device: str) -> Iterator[None]:
    """A block in which torch and cuDNN choose algorithms by `config`, whatever the process has set."""
    cudnn, enabled = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before = cudnn.benchmark, cudnn.deterministic, torch.is_deterministic_algorithms_warn_only_enabled()
    if device != "cpu":
        cudnn.benchmark, cudnn.deterministic = config.cudnn_benchmark, config.deterministic
    if config.deterministic:  # only then, since setting it imports torch's compiler
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, warn_only = before
        if config.deterministic:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _many_variants() -> AbstractContextManager[Any]:
    """A block with a higher limit of compiled variants of a function; beyond it torch only warns and runs eagerly."""
    import torch._dynamo.config as dynamo  # seconds to import

    return dynamo.patch(cache_size_limit=MOST_VARIANTS)  # the name in all versions since 2.6


# --- in evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How networks are computed in sampling, for scores and for timing."""

    precision: str = "fp32"
    cuda_graphs: bool = False


def sampling_call(asked: Sampling, device: str) -> NetworkCall:
    """The network call for these settings. With CUDA graphs it holds its captured graphs."""
    check_sampling(asked, device)
    call: NetworkCall = NetworkCall()
    if asked.precision in DTYPES:
        call = ConfiguredCall(device_type(device), asked.precision, plain=sampling_identity(asked, device))
    return Captured(call, device) if asked.cuda_graphs else call


@contextmanager
def sampling(asked: Sampling, teacher: Teacher, device: str, call: NetworkCall | None = None) -> Iterator[None]:
    """A block in which the networks of `teacher` and of its students are computed with the settings of sampling.

    `call` is that of an earlier block with the same settings, whose CUDA graphs are reused; None: a new one.
    """
    call = call or sampling_call(asked, device)
    call.begin()
    with (
        tf32(asked.precision == "tf32", device),
        teacher.teacher_rows.calling(call),
        teacher.student_rows.calling(call),
    ):
        yield


# --- what is recorded ------------------------------------------------------------------------------------------------


def training_identity(config: ComputeConfig, device: str) -> dict[str, Any]:
    """The settings that differ from the defaults, for the cache key of a training; on a GPU always with tf32.

    Otherwise results from before this setting existed would be found, which had torch's defaults.
    """
    defaults = ComputeConfig()
    plain = {name: value for name, value in vars(config).items() if value != getattr(defaults, name)}
    if device == "cpu":
        plain.pop("prefetch", None)
        return plain
    return plain | {"tf32": config.tf32}


def sampling_identity(asked: Sampling, device: str) -> dict[str, Any]:
    """The same for an evaluation; on a GPU always with the precision."""
    plain: dict[str, Any] = {"cuda_graphs": True} if asked.cuda_graphs else {}
    return plain if device == "cpu" and asked.precision == "fp32" else plain | {"precision": asked.precision}


def in_words(config: ComputeConfig | None, asked: Sampling) -> str:
    """The column `compute` of a row, such as "bf16, teacher fp16, tf32; sampling fp32"; `config` None: no training.

    Just "fp32" if nothing differs from the defaults.
    """
    sampled = asked.precision + (", cuda_graphs" if asked.cuda_graphs else "")
    trained = sampled if config is None else _training_in_words(config)
    return (
        trained if trained == sampled == "fp32" else "; ".join(([trained] if config else []) + [f"sampling {sampled}"])
    )


def _training_in_words(config: ComputeConfig) -> str:
    words = [config.precision]
    if config.of_teacher != config.precision:
        words.append(f"teacher {config.of_teacher}")
    words += [name for name in ("tf32", "channels_last") if getattr(config, name)]
    words += [f"compile={config.compile}"] if config.compile != "off" else []
    last = ("recompute", "shard", "deterministic", "cudnn_benchmark")
    return ", ".join(words + [name for name in last if getattr(config, name)])


def changed(config: ComputeConfig | None, asked: Sampling) -> list[str]:
    """The settings that differ from their defaults, as on the command line."""
    defaults: list[tuple[str, Any, Any]] = [("evaluation", asked, Sampling())]
    if config is not None:
        defaults.insert(0, ("compute", config, ComputeConfig()))
    return [
        f"{group}.{name}={value}"
        for group, ours, usual in defaults
        for name, value in vars(ours).items()
        if value != getattr(usual, name)
    ]


# --- what a device can do --------------------------------------------------------------------------------------------


def device_type(device: str) -> str:
    """cpu or cuda."""
    return device.split(":")[0]


def check_compute(config: ComputeConfig, device: str) -> None:
    """Raise UserError for settings that `device` does not support."""
    if config.tf32:
        check_tf32("compute.tf32=true", device)
    if config.cudnn_benchmark and device == "cpu":
        raise UserError("compute.cudnn_benchmark=true needs a GPU, and device is cpu")
    if config.deterministic and device != "cpu" and not torch.version.hip:
        _check_workspace()
    precisions = {config.precision, config.of_teacher}
    _check_precision(
        "compute.precision" if config.precision in DTYPES else "compute.teacher_precision", precisions, device
    )


def check_sampling(asked: Sampling, device: str) -> None:
    """The same for the settings of evaluation."""
    if asked.cuda_graphs and device == "cpu":
        raise UserError("evaluation.cuda_graphs=true needs a GPU, and device is cpu")
    if asked.precision == "tf32":
        check_tf32("evaluation.precision=tf32", device)
    _check_precision("evaluation.precision", {asked.precision}, device)


def check_access(device: str, alone: Sequence[str]) -> None:
    """Raise UserError for a GPU in a compute mode that allows no process, or one where the run needs several.

    `alone`: the settings with which one process would be enough.
    """
    mode = "" if device == "cpu" else compute_mode(device)
    if mode == PROHIBITED:
        raise UserError(f"device={device} is in the compute mode {mode}: no process may use it. {CHANGE_MODE}")
    if mode == EXCLUSIVE_PROCESS and alone:
        raise UserError(
            f"device={device} is in the compute mode {mode}: one process at a time may use it, and this run has "
            f"several. Set {' '.join(alone)}. {CHANGE_MODE}"
        )


def _check_sharded(config: ComputeConfig) -> None:
    """Raise UserError for settings that do not work with sharded weights."""
    asked = {
        f"compile={config.compile}, which was never tried with gathered weights": config.compile != "off",
        "channels_last=true, whose memory format cannot be sharded": config.channels_last,
        "precision=fp16, whose loss scale each rank would set for itself. Possible: bf16, fp32": (
            config.precision == "fp16"
        ),
    }
    for words in (words for words, is_set in asked.items() if is_set):
        raise UserError(f"compute.shard=true does not go with compute.{words}")


def check_tf32(setting: str, device: str) -> None:
    """Raise UserError if the device has no TF32."""
    if device == "cpu" or torch.version.hip:
        here = "device is cpu" if device == "cpu" else f"this torch is built for AMD GPUs (ROCm {torch.version.hip})"
        raise UserError(f"{setting} needs an NVIDIA GPU, and {here}")


def _check_workspace() -> None:
    """Raise UserError if cuBLAS is not deterministic. It reads the variable once, at its first use."""
    value = os.environ.get(WORKSPACE)
    if value not in WORKSPACES:
        got = "is not set" if value is None else f"is {value!r}"
        raise UserError(
            f"compute.deterministic=true needs {WORKSPACE}={WORKSPACES[0]} or {WORKSPACES[1]} in the environment from "
            f"the start, and it {got}. Put it before the command: {WORKSPACE}={WORKSPACES[0]} distillbench run ..."
        )


def _check_precision(setting: str, precisions: set[str], device: str) -> None:
    """Raise UserError for bf16 on NVIDIA GPUs before Ampere: torch would emulate it, slower than fp32."""
    if "bf16" not in precisions or device == "cpu" or torch.version.hip:
        return
    if torch.cuda.get_device_capability(device) < AMPERE:
        raise UserError(
            f"{setting}=bf16: {torch.cuda.get_device_name(device)} has no units for it. Possible: fp16, fp32"
        )
