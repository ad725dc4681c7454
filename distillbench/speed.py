"""The cost of sampling, measured in the same way for every method and the teacher, in a process of its own.

| pass       | images at once            | what                                                                     |
|------------|---------------------------|--------------------------------------------------------------------------|
| memory     | ``evaluation.batch_size`` | peaks while sampling, after one call that is not watched                 |
| latency    | 1                         | 3 calls to warm up; then at least 20, for at least ``timing_seconds``    |
| throughput | 1, 2, 4, ...              | of each batch one call to warm up, then calls for ``timing_seconds``     |
| FLOPs      | 1                         | by torch's counter                                                       |
| apart      | 1                         | latency of the teacher's decoder of latents, and of its encoder of texts |

Each pass goes over all nfe in ascending order before the next begins. What one measurement leaves behind (resident
memory, the allocator's blocks, modules) can move the next, so the order is the same for every method: memory before
the large batches of throughput, FLOPs last since their counter imports torch's compiler, and rows with few evaluations
before those with more, so that none is charged for memory that a hungrier one left. Nothing is compiled; networks are
computed as for scores, in ``evaluation.precision`` and, if asked, in CUDA graphs that the calls to warm up capture.
FLOPs are those of the plain network. Noise and conditions are drawn before a call is timed.

A timed call waits for the device before and after: on the CPU the clock is read, on CUDA a pair of events is recorded
on the idle device, so a latency holds the launches from Python. No measurement takes calls for more than 60 s. What
cannot be measured is left empty, with the reason; the rest is measured all the same.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distillbench.build import build_method
from distillbench.compute import Sampling, sampling
from distillbench.conditions import Conditioning
from distillbench.datasets import Dataset
from distillbench.denoiser import NetworkCall
from distillbench.errors import Unavailable
from distillbench.flops import count_flops
from distillbench.memory import Before, bytes_in_use, peak_gpu_mib, peak_rss_mib, release_memory
from distillbench.method import Method
from distillbench.noise import Noise, stream_key
from distillbench.precision import Float32Flags
from distillbench.processes import ProcessError, call_in_fresh_process, in_words
from distillbench.progress import Progress
from distillbench.teachers import Teacher, TeacherSource

if TYPE_CHECKING:  # the fresh process imports no more than what it measures
    from distillbench.evaluate import Sampler

WARM_UP_CALLS = 3
LEAST_CALLS = 20  # of a latency; fewer have no 95th percentile
MOST_SECONDS = 60.0  # of calls in one measurement
WATCHED_SECONDS = 0.25  # of sampling while memory is looked at, every 20 ms
GROWTH = 1.03  # of throughput from one doubling of the batch to the next, for it to count
STALLS = 2  # doublings in a row without it, after which no larger batch is tried
TEXT = "a photograph of a cat on a wooden table"

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class SpeedError(Unavailable):
    """Nothing could be measured; the message, one line, stands in for all values."""


@dataclass(frozen=True)
class Speed:
    """What sampling with `nfe` evaluations costs; None where `missing` gives the reason. `notes` are about values."""

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
    parameters: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


# --- what is measured, as plain values -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchSettings:
    """How torch computes in a process."""

    threads: int
    dtype: torch.dtype
    float32: Float32Flags
    cudnn_benchmark: bool
    cudnn_deterministic: bool
    deterministic: bool

    @staticmethod
    def now(threads: int) -> TorchSettings:
        """Those of this process, on `threads` threads."""
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
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:  # setting it imports torch's compiler
            torch.use_deterministic_algorithms(self.deterministic)


class KnownDataset(Dataset):
    """What a run knows of its dataset, small enough to be handed on; the images are read if someone asks for them.

    Reading a dataset can take longer than all that is measured here, and few teachers look at an image.
    """

    def __init__(self, dataset: Dataset, config: Any) -> None:
        self.kind, self.config, self.count = type(dataset), config, len(dataset)
        for name in Dataset.__annotations__:  # all that the contract knows
            setattr(self, name, getattr(dataset, name))

    @functools.cached_property
    def whole(self) -> Dataset:
        return self.kind(self.config)

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Tensor) -> Tensor:
        return self.whole.read(indices)

    def labels(self, indices: Tensor) -> Tensor:
        return self.whole.labels(indices)

    def __getattr__(self, name: str) -> Any:
        """What the contract does not know: a teacher of the same plugin may ask for it."""
        if name.startswith("__") or name == "whole":
            raise AttributeError(name)
        return getattr(self.whole, name)


@dataclass(frozen=True)
class Measurement:
    """What is measured of a sampler, and how long."""

    nfe: tuple[int, ...]
    device: str
    batch_size: int  # while memory is watched
    largest: int  # batch that is tried for throughput
    timing_seconds: float
    sampling: Sampling = Sampling()  # how networks are computed
    before: Before = Before()


@dataclass(frozen=True)
class SpeedJob:
    """A measurement and all that a fresh process needs to make what is measured."""

    measurement: Measurement
    torch_settings: TorchSettings
    dataset: KnownDataset
    source: type[TeacherSource]
    teacher_config: Any
    conditioning: Conditioning
    cache: Path  # of teachers
    solver: str = ""  # of the teacher itself, where there is no method
    method: type[Method] | None = None
    method_config: Any = None
    seed: int = 0
    weights: Path | None = None  # of the student, safetensors


# --- in which process ------------------------------------------------------------------------------------------------


def measure_in_fresh_process(job: SpeedJob, limit_seconds: float) -> list[Speed]:
    """:func:`measure` in a process that is started for it and killed after `limit_seconds`; raises SpeedError.

    The caller's torch gives memory that it only keeps back to the GPU first; what it holds on to does not count.
    """
    release_memory()
    before = Before(in_use=bytes_in_use(job.measurement.device))
    job = dataclasses.replace(job, measurement=dataclasses.replace(job.measurement, before=before))
    try:
        return call_in_fresh_process(measure, job, limit_seconds)
    except ProcessError as error:
        raise SpeedError(str(error)) from error


def measure(job: SpeedJob) -> list[Speed]:
    """The cost of sampling for each nfe of `job`, ascending, measured in this process; raises SpeedError."""
    measurement = job.measurement
    if measurement.device != "cpu":
        release_memory()
        tensors = torch.cuda.memory_allocated(measurement.device)
        measurement = dataclasses.replace(measurement, before=dataclasses.replace(measurement.before, tensors=tensors))
    try:
        job.torch_settings.apply()
        subject = make_subject(job)
    except Exception as error:  # a method and a teacher are a stranger's code
        raise SpeedError(in_words(error)) from error
    return measure_subject(subject, measurement, timer_of(measurement.device))


@dataclass(frozen=True)
class Subject:
    """What is measured: a sampler, and the teacher that knows its images and conditions."""

    sampler: Sampler
    teacher: Teacher
    parameters: int | None = None  # weights of the network that samples


def make_subject(job: SpeedJob) -> Subject:
    """The student of `job` as training left it, or the teacher with its solver."""
    device = job.measurement.device
    source = job.source(job.teacher_config, job.dataset, job.cache, device, job.conditioning)
    teacher = source.load(Progress(None)).asked(job.conditioning)
    if job.method is None or job.weights is None:
        from distillbench.evaluate import teacher_sampler  # half a second that students do not need
        from distillbench.samplers import Solver

        return Subject(teacher_sampler(teacher, Solver.parse(job.solver)), teacher, _parameters(teacher.denoiser))
    from safetensors.torch import load_file

    method = build_method(job.method, job.method_config, teacher, job.seed, device)
    method.load_state_dict(load_file(job.weights, device=device))
    method.eval()
    return Subject(method.sample, method.teacher, _parameters(method.student))


def _parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# --- clocks ----------------------------------------------------------------------------------------------------------


class Timer(Protocol):
    """Times one call: seconds from an idle device to an idle device."""

    def seconds(self, call: Callable[[], object]) -> float: ...


class CpuTimer:
    """By the clock, where work is done when a call returns."""

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaTimer:
    """By a pair of events in the stream; `cuda` is torch.cuda, but for tests without a GPU."""

    def __init__(self, device: str, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        stream = self.cuda.current_stream(self.device)
        self.cuda.synchronize(self.device)
        start.record(stream)
        call()
        end.record(stream)
        self.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1000


def timer_of(device: str) -> Timer:
    return CpuTimer() if device == "cpu" else CudaTimer(device)


def repeat(call: Callable[[], object], timer: Timer, least_calls: int, least_seconds: float) -> list[float]:
    """Seconds of each call: at least so many calls and so long, but never begun after 60 s of them."""
    seconds: list[float] = []
    total = 0.0
    while (len(seconds) < least_calls or total < least_seconds) and total < MOST_SECONDS:
        seconds.append(timer.seconds(call))
        total += seconds[-1]
    return seconds


def warmed_up(call: Callable[[], object], timer: Timer, least_calls: int, least_seconds: float) -> list[float]:
    """The same, after three calls that do not count."""
    repeat(call, timer, WARM_UP_CALLS, 0)
    return repeat(call, timer, least_calls, least_seconds)


# --- the passes ------------------------------------------------------------------------------------------------------


class KeptNoise:
    """Noise that is drawn when it is first asked for, by the call that warms up, and kept: later calls draw nothing."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise
        self.draws: dict[int, Tensor] = {}

    def __call__(self, k: int) -> Tensor:
        if k not in self.draws:
            self.draws[k] = self.noise(k)
        return self.draws[k]


@dataclass
class _Row:
    """The values of one nfe, as they are found."""

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
        """Whatever goes wrong in the block leaves those of the values `names` empty that are not yet there."""
        try:
            yield
        except OUT_OF_MEMORY:
            reason = "memory ran out"
        except Exception as error:  # a sampler is a stranger's code
            reason = in_words(error)
        else:
            return
        self.missing |= {name: reason for name in names if name not in self.values}


def measure_subject(subject: Subject, measurement: Measurement, timer: Timer) -> list[Speed]:
    """The cost of a sampler for each nfe of `measurement`, ascending."""
    rows = [_Row(nfe) for nfe in sorted(measurement.nfe)]
    with torch.no_grad(), sampling(measurement.sampling, subject.teacher, measurement.device):
        for one_pass in (_memory, _latency, _throughput, _flops):
            for row in rows:
                one_pass(row, subject, measurement, timer)
                _clean_up(measurement.device)
        apart = _apart(subject, measurement, timer)
    for row in rows:  # the same for all: it does not depend on nfe
        row.values |= apart.values
        row.missing |= apart.missing
    return [
        Speed(row.nfe, **row.values, parameters=subject.parameters, missing=row.missing, notes=row.notes)
        for row in rows
    ]


def _clean_up(device: str) -> None:
    """What the pass before needs no longer goes back to the device."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()


def _call(subject: Subject, device: str, nfe: int, size: int, keep: bool = True) -> Callable[[], Tensor]:
    """Sampling `size` images; with `keep` the first call draws the noise for all."""
    indices = range(size)
    noise: Any = Noise(stream_key("timing", 0), indices, subject.teacher.shape, device)
    noise = KeptNoise(noise) if keep else noise
    c = subject.teacher.conditioning.of_images(indices, device)
    return lambda: subject.sampler(noise, nfe, c)


def _memory(row: _Row, subject: Subject, measurement: Measurement, timer: Timer) -> None:
    """Noise is drawn anew in each call: kept draws are no memory that sampling needs."""
    names = ("peak_gpu_mib", "peak_gpu_reserved_mib", "peak_device_mib", "peak_rss_mib")
    with row.attempt(*names):
        call = _call(subject, measurement.device, row.nfe, measurement.batch_size, keep=False)
        timer.seconds(call)
        with peak_rss_mib() as rss, peak_gpu_mib(measurement.device) as gpu:
            repeat(call, timer, 1, WATCHED_SECONDS)
        if measurement.sampling.cuda_graphs:
            gpu.mib, gpu.reason = None, "torch's allocator does not see what tensors within CUDA graphs hold"
        measurement.before.leave_out(gpu)
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
        teacher, plain = subject.teacher, NetworkCall()  # a replayed graph shows no operators
        with teacher.teacher_rows.calling(plain), teacher.student_rows.calling(plain):
            counted = count_flops(_call(subject, measurement.device, row.nfe, 1))
        row.put("gflops", counted.flops / 1e9)
        row.values["flops_not_counted"] = counted.not_counted


def _apart(subject: Subject, measurement: Measurement, timer: Timer) -> _Row:
    """The decoder and the text encoder, which no latency of sampling contains."""
    teacher, found = subject.teacher, _Row(nfe=0)
    latent = Noise(stream_key("timing", 0), range(1), teacher.shape, measurement.device)(0)
    calls: dict[str, Callable[[], object] | None] = {
        "decoder_latency_ms": None if teacher.decode is None else functools.partial(teacher.decode, latent),
        "text_encoder_latency_ms": None if teacher.encode is None else functools.partial(teacher.encode, [TEXT]),
    }
    for (name, call), reason in zip(calls.items(), ("no latents", "no texts"), strict=True):
        with found.attempt(name):
            with ExitStack() as awake:  # moving a module to the device is not part of its latency
                for module in teacher.parked:
                    awake.enter_context(module.on_device())
                seconds = [] if call is None else warmed_up(call, timer, LEAST_CALLS, measurement.timing_seconds)
            found.put(name, 1000 * statistics.median(seconds) if seconds else None, reason)
    return found


@dataclass(frozen=True)
class Throughput:
    """The most images a second that were found, at which batch, and what kept larger ones from being tried."""

    images_per_second: float
    batch: int
    note: str = ""


def best_throughput(
    make_call: Callable[[int], Callable[[], object]], timer: Timer, largest: int, least_seconds: float
) -> Throughput:
    """Tries batches of 1, 2, 4, ... up to `largest`, until two doublings in a row bring less than 3 % or memory ends.

    `make_call(size)` gives the call that makes `size` images. Raises what it raises; OutOfMemoryError only for one.
    """
    best = Throughput(0.0, 0)
    stalls, size = 0, 1
    while size <= largest and stalls < STALLS:
        try:
            call = make_call(size)
            timer.seconds(call)
            seconds = repeat(call, timer, 1, least_seconds)
        except OUT_OF_MEMORY:
            if not best.batch:
                raise
            return dataclasses.replace(best, note=f"memory ran out at batch {size}")
        rate = size * len(seconds) / sum(seconds)
        stalls = 0 if rate >= GROWTH * best.images_per_second else stalls + 1
        if rate > best.images_per_second:
            best = Throughput(rate, size)
        size *= 2
    return best
