"""The cost of sampling, measured in the same way for every method and the teacher, in a fresh process.

| pass       | images at once            | what                                                                     |
|------------|---------------------------|--------------------------------------------------------------------------|
| memory     | ``evaluation.batch_size`` | peaks while sampling, after one warm-up call                             |
| latency    | 1                         | 3 warm-up calls; then at least 20, for at least ``timing_seconds``       |
| throughput | 1, 2, 4, ...              | per batch size one warm-up call, then calls for ``timing_seconds``       |
| FLOPs      | 1                         | by torch's counter                                                       |
| components | 1                         | latency of the teacher's latent decoder and of its text encoder          |

Each pass covers all nfe in ascending order before the next pass begins. A measurement can affect later ones (resident
memory, the allocator's blocks, imported modules), so the order is the same for every method: memory before the large
batches of throughput, FLOPs last since their counter imports torch's compiler, and few evaluations before many, so that
no row is charged for memory that another one left. Nothing is compiled. Networks run as for scores: in
``evaluation.precision``, and with ``cuda_graphs`` in CUDA graphs that the warm-up calls capture. FLOPs are those of the
network without CUDA graphs. Noise and conditioning are drawn before a call is timed.

The device is idle before and after a timed call. On the CPU the clock is read, on CUDA a pair of events is recorded, so
a latency includes the kernel launches from Python. A measurement takes at most 60 s of calls. A value that cannot be
measured is None, with the reason; the others are measured.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distillbench.datasets.dataset import Dataset
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.denoiser import NetworkCall
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.errors import Unavailable
from distillbench.metering.load import machine_load
from distillbench.metering.memory import Before, bytes_in_use, peak_gpu_mib, peak_rss_mib, release_memory
from distillbench.system.precision import Float32Flags
from distillbench.system.progress import Progress
from distillbench.system.subprocesses import ProcessError, call_in_fresh_process, in_words
from distillbench.teachers.students import AS_TEACHER, StudentForm
from distillbench.teachers.teacher import Teacher, TeacherSource
from distillbench.training.build import restored_method
from distillbench.training.compute import Sampling, sampling
from distillbench.training.flops import count_flops
from distillbench.training.method import Method

if TYPE_CHECKING:  # the fresh process imports no more than it needs
    from distillbench.evaluation.evaluator import Sampler
from distillbench.evaluation.timing import (
    LEAST_CALLS,
    MOST_SECONDS,
    OUT_OF_MEMORY,
    Timer,
    best_throughput,
    repeat,
    timer_of,
    warmed_up,
)

WATCHED_SECONDS = 0.25  # of sampling while memory is measured, every 20 ms
TEXT = "a photograph of a cat on a wooden table"


class SpeedError(Unavailable):
    """Nothing could be measured. The message, one line, is the reason for all empty values."""


@dataclass(frozen=True)
class Speed:
    """The cost of sampling with `nfe` evaluations; `missing` has the reasons for None, `notes` remarks on values.

    It has the fields of :class:`distillbench.records.records.SpeedRow`, without pydantic: that would add to the memory
    measured in the fresh process.
    """

    nfe: int
    latency_p50_ms: float | None = None  # batch 1, without decoder and text encoder
    latency_p95_ms: float | None = None
    images_per_second: float | None = None
    best_batch: int | None = None
    gflops: float | None = None  # of one image
    flops_not_counted: tuple[str, ...] = ()
    decoder_latency_ms: float | None = None  # p50, batch 1
    text_encoder_latency_ms: float | None = None
    peak_gpu_mib: float | None = None
    peak_gpu_reserved_mib: float | None = None
    peak_device_mib: float | None = None
    peak_rss_mib: float | None = None
    machine_load: float | None = None  # by other processes, of all rows together
    parameters: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


# --- jobs for a fresh process ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchSettings:
    """Global settings of torch in a process."""

    threads: int
    dtype: torch.dtype
    float32: Float32Flags
    cudnn_benchmark: bool
    cudnn_deterministic: bool
    deterministic: bool

    @staticmethod
    def now(threads: int) -> TorchSettings:
        """Those of this process, with `threads` threads."""
        return TorchSettings(
            threads,
            torch.get_default_dtype(),
            Float32Flags.now(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled(),
        )

    def apply(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        self.float32.apply()
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:  # this call imports torch's compiler
            torch.use_deterministic_algorithms(self.deterministic)


class LazyDataset(Dataset):
    """The attributes of a dataset, small enough to be pickled; it is opened again only if its images are read.

    Opening a dataset can take longer than all measurements, and few teachers read images.
    """

    def __init__(self, dataset: Dataset, config: Any) -> None:
        self.kind, self.config, self.count = type(dataset), config, len(dataset)
        for name in Dataset.__annotations__:  # the attributes of the contract
            setattr(self, name, getattr(dataset, name))

    @functools.cached_property
    def opened(self) -> Dataset:
        return self.kind(self.config)

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Tensor) -> Tensor:
        return self.opened.read(indices)

    def labels(self, indices: Tensor) -> Tensor:
        return self.opened.labels(indices)

    def __getattr__(self, name: str) -> Any:
        """Attributes outside the contract, which a teacher of the same plugin may use."""
        if name.startswith("__") or name == "opened":
            raise AttributeError(name)
        return getattr(self.opened, name)


@dataclass(frozen=True)
class Measurement:
    """What to measure, and for how long."""

    nfe: tuple[int, ...]
    device: str
    batch_size: int  # while memory is measured
    largest: int  # batch size to try for throughput
    timing_seconds: float
    sampling: Sampling = Sampling()  # how networks run
    before: Before = Before()


@dataclass(frozen=True)
class SpeedJob:
    """A measurement, and all that a fresh process needs to build the student or the teacher."""

    measurement: Measurement
    torch_settings: TorchSettings
    dataset: LazyDataset
    source: type[TeacherSource]
    teacher_config: Any
    conditioning: Conditioning
    cache: Path  # folder of teachers
    solver: str = ""  # of the teacher, if there is no method
    method: type[Method] | None = None
    method_config: Any = None
    seed: int = 0
    weights: Path | None = None  # of the student, safetensors
    students: StudentForm = AS_TEACHER


# --- processes -------------------------------------------------------------------------------------------------------


def measure_in_fresh_process(job: SpeedJob, limit_seconds: float) -> list[Speed]:
    """Run :func:`measure` in a fresh process, which is killed after `limit_seconds`. Raises SpeedError.

    The caller returns its cached GPU memory first. What it still holds is subtracted from the peaks.
    """
    release_memory()
    before = Before(in_use=bytes_in_use(job.measurement.device))
    job = dataclasses.replace(job, measurement=dataclasses.replace(job.measurement, before=before))
    try:
        return call_in_fresh_process(measure, job, limit_seconds)
    except ProcessError as error:
        raise SpeedError(str(error)) from error


def measure(job: SpeedJob) -> list[Speed]:
    """The cost of sampling for each nfe of `job`, ascending, measured in this process. Raises SpeedError."""
    measurement = job.measurement
    if measurement.device != "cpu":
        release_memory()
        tensors = torch.cuda.memory_allocated(measurement.device)
        measurement = dataclasses.replace(measurement, before=dataclasses.replace(measurement.before, tensors=tensors))
    try:
        job.torch_settings.apply()
        subject = make_subject(job)
    except Exception as error:  # third-party methods and teachers may raise anything
        raise SpeedError(in_words(error)) from error
    return measure_subject(subject, measurement, timer_of(measurement.device))


@dataclass(frozen=True)
class Subject:
    """The sampler to measure, and the teacher with its shapes and conditioning."""

    sampler: Sampler
    teacher: Teacher
    parameters: int | None = None  # of the network that samples


def make_subject(job: SpeedJob) -> Subject:
    """The trained student of `job`, or the teacher with its solver."""
    device = job.measurement.device
    source = job.source(job.teacher_config, job.dataset, job.cache, device, job.conditioning)
    teacher = source.load(Progress(None)).conditioned(job.conditioning).with_students(job.students)
    if job.method is None or job.weights is None:
        from distillbench.diffusion.samplers import Solver
        from distillbench.evaluation.evaluator import (
            teacher_sampler,  # takes half a second to import, which students do not need
        )

        return Subject(teacher_sampler(teacher, Solver.parse(job.solver)), teacher, _parameters(teacher.denoiser))
    from safetensors.torch import load_file

    state = load_file(job.weights, device=device)
    method = restored_method(job.method, job.method_config, teacher, job.seed, device, state)
    return Subject(method.sample, method.teacher, _parameters(method.student))


def _parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# --- the passes ------------------------------------------------------------------------------------------------------


class CachedNoise:
    """Draws noise in the warm-up call and returns the same tensors later, so that timed calls draw none."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise
        self.draws: dict[int, Tensor] = {}

    def __call__(self, k: int) -> Tensor:
        if k not in self.draws:
            self.draws[k] = self.noise(k)
        return self.draws[k]


@dataclass
class _Row:
    """The values of one nfe so far."""

    nfe: int
    values: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, value: float | None, reason: str = "") -> None:
        self.values[name] = value
        if value is None:
            self.missing[name] = reason

    @contextmanager
    def attempt(self, *names: str) -> Iterator[None]:
        """If the block raises, the values `names` that are not there yet are missing, with the error as reason."""
        try:
            yield
        except OUT_OF_MEMORY:
            reason = "memory ran out"
        except Exception as error:  # a third-party sampler may raise anything
            reason = in_words(error)
        else:
            return
        self.missing |= {name: reason for name in names if name not in self.values}


def measure_subject(subject: Subject, measurement: Measurement, timer: Timer) -> list[Speed]:
    """The cost of a sampler for each nfe of `measurement`, ascending."""
    rows = [_Row(nfe) for nfe in sorted(measurement.nfe)]
    computed = sampling(measurement.sampling, subject.teacher, measurement.device)
    with machine_load() as load, torch.no_grad(), computed:
        for one_pass in (_memory, _latency, _throughput, _flops):
            for row in rows:
                one_pass(row, subject, measurement, timer)
                _clean_up(measurement.device)
        components = _components(subject, measurement, timer)
    for row in rows:  # they do not depend on nfe
        row.values |= components.values
        row.missing |= components.missing
    return [
        Speed(
            row.nfe,
            **row.values,
            machine_load=load.fraction,
            parameters=subject.parameters,
            missing=row.missing,
            notes=row.notes,
        )
        for row in rows
    ]


def _clean_up(device: str) -> None:
    """Return the GPU memory of the last pass."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()


def _call(subject: Subject, device: str, nfe: int, size: int, keep: bool = True) -> Callable[[], Tensor]:
    """A call that samples `size` images; with `keep` the first call draws the noise for all calls."""
    indices = range(size)
    noise: Any = Noise(stream_key("timing", 0), indices, subject.teacher.shape, device)
    noise = CachedNoise(noise) if keep else noise
    c = subject.teacher.conditioning.of_images(indices, device)
    return lambda: subject.sampler(noise, nfe, c)


def _memory(row: _Row, subject: Subject, measurement: Measurement, timer: Timer) -> None:
    """Draws new noise in each call: cached noise is not memory that sampling needs."""
    names = ("peak_gpu_mib", "peak_gpu_reserved_mib", "peak_device_mib", "peak_rss_mib")
    with row.attempt(*names):
        call = _call(subject, measurement.device, row.nfe, measurement.batch_size, keep=False)
        timer.seconds(call)
        with peak_rss_mib() as rss, peak_gpu_mib(measurement.device) as gpu:
            repeat(call, timer, 1, WATCHED_SECONDS)
        if measurement.sampling.cuda_graphs:
            gpu.mib, gpu.reason = None, "torch's allocator does not see what tensors within CUDA graphs hold"
        measurement.before.subtract_from(gpu)
        for name, peak in zip(names, (gpu, gpu.reserved, gpu.device, rss), strict=True):
            row.put(name, peak.mib, peak.reason)


def _latency(row: _Row, subject: Subject, measurement: Measurement, timer: Timer) -> None:
    with row.attempt("latency_p50_ms", "latency_p95_ms"):
        call = _call(subject, measurement.device, row.nfe, 1)
        seconds = warmed_up(call, timer, LEAST_CALLS, measurement.timing_seconds)
        row.put("latency_p50_ms", 1000 * statistics.median(seconds))
        enough = len(seconds) >= LEAST_CALLS
        p95 = 1000 * float(np.percentile(seconds, 95)) if enough else None
        row.put("latency_p95_ms", p95, f"only {len(seconds)} calls in {MOST_SECONDS:g} s")


def _throughput(row: _Row, subject: Subject, measurement: Measurement, timer: Timer) -> None:
    with row.attempt("images_per_second", "best_batch"):
        make_call = functools.partial(_call, subject, measurement.device, row.nfe)
        best = best_throughput(make_call, timer, measurement.largest, measurement.timing_seconds)
        row.put("images_per_second", best.images_per_second)
        row.put("best_batch", best.batch)
        if best.note:
            row.notes["best_batch"] = best.note


def _flops(row: _Row, subject: Subject, measurement: Measurement, timer: Timer) -> None:
    with row.attempt("gflops"):
        teacher, plain = subject.teacher, NetworkCall()  # the counter sees no operators in a replayed graph
        with teacher.teacher_rows.calling(plain), teacher.student_rows.calling(plain):
            counted = count_flops(_call(subject, measurement.device, row.nfe, 1))
        row.put("gflops", counted.flops / 1e9)
        row.values["flops_not_counted"] = counted.not_counted


def _components(subject: Subject, measurement: Measurement, timer: Timer) -> _Row:
    """The latent decoder and the text encoder, which are not part of the sampling latency."""
    teacher, found = subject.teacher, _Row(nfe=0)
    latent = Noise(stream_key("timing", 0), range(1), teacher.shape, measurement.device)(0)
    calls: dict[str, Callable[[], object] | None] = {
        "decoder_latency_ms": None if teacher.decode is None else functools.partial(teacher.decode, latent),
        "text_encoder_latency_ms": None if teacher.encode is None else functools.partial(teacher.encode, [TEXT]),
    }
    for (name, call), reason in zip(calls.items(), ("no latents", "no texts"), strict=True):
        with found.attempt(name):
            with ExitStack() as stack:  # moving a module to the device is not part of its latency
                for module in teacher.offloaded:
                    stack.enter_context(module.on_device())
                seconds = [] if call is None else warmed_up(call, timer, LEAST_CALLS, measurement.timing_seconds)
            found.put(name, 1000 * statistics.median(seconds) if seconds else None, reason)
    return found
