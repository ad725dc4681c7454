"""The cost of sampling: by imagined clocks and devices exactly, and of real cells in a fresh process."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distillbench.evaluation.sampling_speed
from by_day import by_day
from distillbench.diffusion.conditioning import UNCONDITIONAL, WITHOUT_CLASSES, Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.samplers import Solver
from distillbench.diffusion.schedules import SCHEDULES, VPCosine
from distillbench.errors import Unavailable, UserError
from distillbench.evaluation.sampling_speed import (
    CachedNoise,
    LazyDataset,
    Measurement,
    SpeedError,
    Subject,
    TorchSettings,
    best_throughput,
    make_subject,
    measure,
    measure_in_fresh_process,
    measure_subject,
)
from distillbench.evaluation.timing import (
    LEAST_CALLS,
    MOST_SECONDS,
    WARM_UP_CALLS,
    CpuTimer,
    CudaTimer,
    repeat,
    timer_of,
)
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import build
from distillbench.runs.speed_job import speed_job
from distillbench.system.progress import Progress
from distillbench.system.subprocesses import ProcessError, call_in_fresh_process
from distillbench.teachers.teacher import Teacher
from distillbench.training.build import build_method
from distillbench.training.method import Method

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (1, 2, 2)
LINEAR_FLOPS = 2 * 4 * 4  # of one image through the toy's only layer
TIMED = ("latency_p50_ms", "latency_p95_ms", "images_per_second", "best_batch")


@pytest.fixture(autouse=True)
def brief_looks(monkeypatch):
    """Memory is looked at during one call and no longer, but in fresh processes."""
    monkeypatch.setattr(distillbench.evaluation.sampling_speed, "WATCHED_SECONDS", 0)


# --- a process of its own: children that import no torch -------------------------------------------------------------


def test_a_call_runs_in_another_process():
    assert call_in_fresh_process(eval, "1 + 1", 60) == 2
    pid, loaded = call_in_fresh_process(eval, "__import__('os').getpid(), list(__import__('sys').modules)", 60)
    assert pid != os.getpid() and not psutil.pid_exists(pid)
    assert "pytest" not in loaded


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("__import__('sys').exit('enough')", "SystemExit: enough"),
        ("__import__('os')._exit(3)", r"the process died \(exit code 3\)"),
        ("[print('so far', flush=True), __import__('os').abort()]", r"\(killed by SIGABRT\); its last words: so far$"),
        ("lambda: 0", r"[Pp]ickl"),
    ],
)
def test_its_errors_are_one_line(code, reason, capfd):
    with pytest.raises(ProcessError, match=reason) as caught:
        call_in_fresh_process(eval, code, 60)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_its_traceback_is_a_note():
    with pytest.raises(ProcessError) as caught:
        call_in_fresh_process(eval, "1 / 0", 60)
    assert "Traceback" in caught.value.__notes__[0]


def test_messages_of_user_errors_are_not_changed():
    code = "from distillbench.errors import UserError as E\nraise E('no such file')"
    with pytest.raises(ProcessError, match=r"^no such file\nTraceback"):
        call_in_fresh_process(exec, code, 60)


def test_it_is_killed_after_its_time_limit(tmp_path):
    file = tmp_path / "pid"
    code = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    with pytest.raises(ProcessError, match=r"killed: it was not done after 1\.5 s"):
        call_in_fresh_process(exec, code, 1.5)
    assert not file.exists() or not psutil.pid_exists(int(file.read_text()))


def test_an_argument_that_cannot_be_pickled_is_an_error():
    with pytest.raises(ProcessError, match=r"cannot be sent to another process: .*local"):
        call_in_fresh_process(lambda x: x, 0, 60)


UNGUARDED = """
print("script")
from distillbench.system.subprocesses import call_in_fresh_process
print(call_in_fresh_process(eval, "6 * 7", 60))
"""


@pytest.mark.parametrize("how", by_day(["stdin", "-c", "file", "-m"], ("stdin", "file")))
def test_it_starts_from_any_script_without_running_the_script_again(how, tmp_path):
    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    words = {"stdin": ["-"], "-c": ["-c", UNGUARDED], "file": ["unguarded.py"], "-m": ["-m", "unguarded"]}[how]
    done = subprocess.run(
        [sys.executable, *words],
        input=UNGUARDED if how == "stdin" else "",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.stdout, done.stderr) == ("script\n42\n", "")


def test_it_ends_by_itself_when_its_caller_is_killed(tmp_path):
    file = tmp_path / "pid"
    code = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid()) + ' '); time.sleep(1.5)"
    script = f"from distillbench.system.subprocesses import call_in_fresh_process as f\nf(exec, {code!r}, 60)"
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    wait_until(lambda: file.exists() and file.read_text().endswith(" "))
    caller.kill()
    caller.wait()
    wait_until(lambda: not running(int(file.read_text())))


def wait_until(done):
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- clocks ----------------------------------------------------------------------------------------------------------


class ImaginedTimer:
    """A call costs what `cost` says; `calls` counts them."""

    def __init__(self, cost):
        self.cost, self.calls = cost, 0

    def seconds(self, call):
        self.calls += 1
        size = call()
        return self.cost(size)


class ImaginedCuda:
    """torch.cuda with a clock that the test moves, and a log of what was asked of it."""

    def __init__(self):
        self.log, self.milliseconds = [], 0.0

    def synchronize(self, device):
        self.log.append(f"wait {device}")

    def current_stream(self, device):
        return f"stream of {device}"

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace()

        def record(stream):
            self.log.append(f"event in {stream}")
            event.at = self.milliseconds

        event.record = record
        event.elapsed_time = lambda end: end.at - event.at
        return event


def test_cuda_is_timed_by_events_on_an_idle_device():
    cuda = ImaginedCuda()

    def call():
        cuda.log.append("call")
        cuda.milliseconds += 250

    assert CudaTimer("cuda:1", cuda).seconds(call) == 0.25
    event = "event in stream of cuda:1"
    assert cuda.log == ["wait cuda:1", event, "call", event, "wait cuda:1"]


def test_each_device_has_its_timer(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    assert isinstance(timer_of("cpu"), CpuTimer) and isinstance(timer_of("cuda:1"), CudaTimer)
    distillbench.evaluation.sampling_speed._clean_up("cpu")
    assert not emptied
    distillbench.evaluation.sampling_speed._clean_up("cuda:1")
    assert emptied


def test_the_cpu_is_timed_by_the_clock():
    assert CpuTimer().seconds(lambda: time.sleep(0.02)) >= 0.02


@pytest.mark.parametrize(
    ("cost", "calls"),
    [(0.01, 50), (0.5, 20), (10.0, 6), (100.0, 1)],  # by seconds, by calls, at most 60 s, at least one
)
def test_calls_are_repeated_by_count_and_seconds_up_to_a_minute(cost, calls):
    assert len(repeat(lambda: 1, ImaginedTimer(lambda size: cost), LEAST_CALLS, 0.4999999)) == calls


# --- throughput ------------------------------------------------------------------------------------------------------


def best(rates, largest=256, out_of_memory_at=10**9):
    """The best batch where batches of 1, 2, 4, ... make so many images a second; and those that were tried."""
    tried = []

    def make_call(size):
        tried.append(size)
        if size >= out_of_memory_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: size

    timer = ImaginedTimer(lambda size: size / rates[int(math.log2(size))])
    return best_throughput(make_call, timer, largest, 1e-9), tried


@pytest.mark.parametrize(
    ("rates", "batch", "tried"),
    [
        ([100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600], 256, 9),  # grows to the end
        ([100, 200, 201, 202, 999], 8, 4),  # two doublings in a row below 3 %: what is faster is taken all the same
        ([100, 200, 201, 300, 301, 302, 999], 32, 6),  # one of them is not enough
        ([100, 90, 95, 999], 1, 3),  # never
        ([100, 90, 103, 104, 105, 999], 16, 5),  # growth counts from the best so far
    ],
)
def test_the_batch_doubles_until_two_doublings_gain_less_than_three_per_cent(rates, batch, tried):
    found, sizes = best(rates)
    assert found.batch == batch
    assert found.images_per_second == pytest.approx(rates[int(math.log2(batch))])
    assert sizes == [2**k for k in range(tried)]
    assert found.note == ""


def test_no_batch_is_larger_than_the_largest():
    found, sizes = best([1.5**k for k in range(9)], largest=24)
    assert (found.batch, sizes) == (16, [1, 2, 4, 8, 16])


def test_out_of_memory_ends_the_search_for_the_best_batch():
    found, _ = best([1.5**k for k in range(9)], out_of_memory_at=16)
    assert (found.batch, found.note) == (8, "memory ran out at batch 16")
    with pytest.raises(torch.OutOfMemoryError):
        best([1.0], out_of_memory_at=1)


def test_throughput_leaves_out_the_warm_up_call():
    times = iter([9.0, 0.1, 0.3])
    found = best_throughput(lambda size: lambda: size, ImaginedTimer(lambda size: next(times)), 1, 0.35)
    assert found.images_per_second == pytest.approx(2 / 0.4)


# --- a toy of one layer ----------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    embedding_channels = 1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x, time, embedding=None, c=None):
        return self.layer(x.flatten(1)).view(x.shape)


def toy(sampler=None, conditioning=WITHOUT_CLASSES, **parts):
    denoiser = Denoiser(OneLayer(), VPCosine(), "x0")
    teacher = Teacher("toy", denoiser, SHAPE, "toy", conditioning=conditioning, **parts)

    def one_after_the_other(noise, nfe, c):
        x = noise(0)
        for _ in range(nfe):
            x = denoiser(x, torch.full((len(x), 1, 1, 1), 0.5, dtype=torch.float64), c)
        return x

    return Subject(sampler or one_after_the_other, teacher, 16)


def brief(nfe=(1, 2), batch_size=4, largest=4):
    return Measurement(tuple(nfe), "cpu", batch_size, largest, 0.001)


def test_flops_are_those_of_the_layers_once_for_each_evaluation():
    one, two = measure_subject(toy(), brief(), CpuTimer())
    assert one.gflops == LINEAR_FLOPS / 1e9
    assert two.gflops == 2 * one.gflops
    assert isinstance(one.flops_not_counted, tuple)
    assert one.parameters == two.parameters == 16


def test_rows_ascend_and_empty_values_have_reasons():
    rows = measure_subject(toy(), brief([4, 1, 2]), CpuTimer())
    assert [row.nfe for row in rows] == [1, 2, 4]
    for row in rows:
        check_complete(row)
        assert set(row.missing) == {
            "peak_gpu_mib",
            "peak_gpu_reserved_mib",
            "peak_device_mib",
            "decoder_latency_ms",
            "text_encoder_latency_ms",
        }
        assert row.missing["peak_gpu_mib"] == "no GPU in use"
        assert (row.missing["decoder_latency_ms"], row.missing["text_encoder_latency_ms"]) == ("no latents", "no texts")


def check_complete(row):
    values = dataclasses.asdict(row)
    for name in ("missing", "notes", "flops_not_counted"):
        del values[name]
    assert {name for name, value in values.items() if value is None} == set(row.missing)
    least = {"machine_load": 0}  # an idle machine has none
    assert all(value > 0 or value == least.get(name) for name, value in values.items() if value is not None)
    assert all(row.missing.values())
    if row.latency_p95_ms is not None:
        assert row.latency_p95_ms >= row.latency_p50_ms


def test_a_gpu_has_three_memory_peaks(monkeypatch):
    @contextmanager
    def peak_gpu_mib(device):
        device_wide = SimpleNamespace(mib=None, reason="NVML: Not Supported")
        yield SimpleNamespace(mib=3.0, reason="", reserved=SimpleNamespace(mib=5.0, reason=""), device=device_wide)

    monkeypatch.setattr(distillbench.evaluation.sampling_speed, "peak_gpu_mib", peak_gpu_mib)
    row = measure_subject(toy(), brief([1]), CpuTimer())[0]
    assert (row.peak_gpu_mib, row.peak_gpu_reserved_mib, row.peak_device_mib) == (3, 5, None)
    assert row.missing["peak_device_mib"] == "NVML: Not Supported"


def test_passes_cover_all_nfe_in_a_fixed_order():
    def calls(order):
        log = []

        def sampler(noise, nfe, c):
            log.append((nfe, len(noise(0))))
            return len(noise(0))

        measure_subject(toy(sampler), brief(order, batch_size=8, largest=2), ImaginedTimer(lambda size: 1.0))
        return log

    log = calls([1, 2])
    passes = [(8, 2), (1, WARM_UP_CALLS + LEAST_CALLS), (1, 2), (2, 2), (1, 1)]  # size and calls
    assert [size for nfe, size in log if nfe == 1] == [size for size, count in passes for _ in range(count)]
    assert [size for nfe, size in log if nfe == 1] == [size for nfe, size in log if nfe == 2]
    assert [nfe for nfe, size in log][:4] == [1, 1, 2, 2]
    assert log == calls([2, 1])


def test_latency_leaves_out_warm_up_calls():
    times = iter([50.0, 0.0, 0.0, *[k / 1000 for k in range(1, 20)], 1.0])
    subject, measurement = toy(), brief([1])
    row = distillbench.evaluation.sampling_speed._Row(1)
    distillbench.evaluation.sampling_speed._latency(
        row, subject, measurement, ImaginedTimer(lambda images: next(times))
    )
    assert row.values["latency_p50_ms"] == pytest.approx(10.5)
    assert row.values["latency_p95_ms"] == pytest.approx(19 + 0.05 * (1000 - 19))  # of 20: a twentieth past the 19th


def test_slow_samplers_have_no_95th_percentile():
    row = measure_subject(toy(), brief([1], largest=1), ImaginedTimer(lambda images: 25.0))[0]
    assert (row.latency_p50_ms, row.latency_p95_ms) == (25_000, None)
    assert row.missing["latency_p95_ms"] == f"only 3 calls in {MOST_SECONDS:g} s"


def test_out_of_memory_empties_only_the_values_that_need_it():
    def sampler(noise, nfe, c):
        if len(noise(0)) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return noise(0)

    (row,) = measure_subject(toy(sampler), brief([1], batch_size=32, largest=64), ImaginedTimer(lambda images: 0.01))
    assert row.best_batch == 8
    assert row.images_per_second == pytest.approx(800)
    assert row.notes == {"best_batch": "memory ran out at batch 16"}
    assert row.missing["peak_rss_mib"] == row.missing["peak_gpu_mib"] == "memory ran out"
    assert row.latency_p50_ms == pytest.approx(10)
    check_complete(dataclasses.replace(row, gflops=1.0))

    def hungry(noise, nfe, c):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (row,) = measure_subject(toy(hungry), brief([1]), CpuTimer())
    assert {row.missing[name] for name in TIMED} == {"memory ran out"}


def test_a_failing_sampler_has_reasons_and_other_rows_have_values():
    def sampler(noise, nfe, c):
        if nfe == 2:
            raise ValueError("two is\ntoo many")
        return toy().sampler(noise, nfe, c)

    one, two = measure_subject(toy(sampler), brief(), CpuTimer())
    assert {two.missing[name] for name in (*TIMED, "gflops", "peak_rss_mib")} == {"ValueError: two is"}
    assert not set(one.missing) & {*TIMED, "gflops", "peak_rss_mib"}


def test_uncountable_flops_empty_only_their_column(monkeypatch):
    def count_flops(call):
        raise Unavailable("no formula")

    monkeypatch.setattr(distillbench.evaluation.sampling_speed, "count_flops", count_flops)
    row = measure_subject(toy(), brief([1]), CpuTimer())[0]
    assert (row.gflops, row.flops_not_counted, row.missing["gflops"]) == (None, (), "no formula")
    assert row.latency_p50_ms and row.images_per_second and row.peak_rss_mib


def test_decoder_and_text_encoder_are_timed_separately():
    given = []

    def decode(latents):
        given.append(tuple(latents.shape))
        return 7.0

    def encode(texts):
        given.append(texts)
        return 3.0

    subject = toy(lambda noise, nfe, c: 1.0, decode=decode, encode=encode)
    kept = subject.teacher.on(SCHEDULES["vp_linear"]())
    assert (kept.decode, kept.encode) == (decode, encode)
    rows = measure_subject(subject, brief(), ImaginedTimer(lambda answer: answer / 1000))
    for row in rows:
        assert row.latency_p50_ms == pytest.approx(1)
        assert row.decoder_latency_ms == pytest.approx(7)
        assert row.text_encoder_latency_ms == pytest.approx(3)
    shapes, texts = given[: len(given) // 2], given[len(given) // 2 :]
    assert set(shapes) == {(1, *SHAPE)} and len(shapes) == WARM_UP_CALLS + LEAST_CALLS
    assert all(len(text) == 1 and text[0] for text in texts)


def test_a_failing_decoder_empties_only_its_latency():
    row = measure_subject(toy(decode=lambda latents: latents.no_such), brief([1]), CpuTimer())[0]
    assert row.missing["decoder_latency_ms"].startswith("AttributeError: ")
    assert row.latency_p50_ms and row.missing["text_encoder_latency_ms"] == "no texts"


def test_noise_is_drawn_in_the_warm_up_call_and_not_while_timed():
    drawn = []
    noise = CachedNoise(lambda k: drawn.append(k) or torch.full((1,), float(k)))
    for _ in range(3):
        assert [noise(k).item() for k in (0, 3, 2)] == [0, 3, 2]
    assert drawn == [0, 3, 2]


def test_images_are_sampled_with_their_classes():
    seen = set()

    def sampler(noise, nfe, c):
        seen.add((len(noise(0)), tuple(c.labels.tolist()), c.w.shape))
        return noise(0)

    measure_subject(toy(sampler, Conditioning(classes=3, w=2.0)), brief([1], largest=2), CpuTimer())
    assert seen == {(n, tuple(i % 3 for i in range(n)), (n, 1, 1, 1)) for n in (1, 2, 4)}


# --- jobs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def cells(registry, tmp_path_factory):
    """The teacher and one student on digits, planned."""
    words = ["experiment=smoke", "methods=[cm]", "methods.cm.schedule=vp_linear", "dataset=digits", "device=cpu"]
    words += ["evaluation.metrics=[]", "evaluation.timing_seconds=0.001", "evaluation.largest_timed_batch=4"]
    words += ["evaluation.batch_size=8", "seed=3", f"results_dir={tmp_path_factory.mktemp('results')}"]
    return plan(compose_runs(words, registry), registry)


@pytest.fixture(scope="module")
def student(cells, tmp_path_factory):
    """A method as it is before training, and the file of its weights."""
    cell = cells[-1]
    teacher = cell.shared.load_teacher(Progress(None))
    method = build_method(cell.entry.cls, cell.method_config, teacher, cell.seed, "cpu")
    for weight in method.student.parameters():
        weight.data += 0.01
    file = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_file({name: tensor.clone() for name, tensor in method.state_dict().items()}, file)
    return method.eval(), file


def test_a_method_is_built_as_for_training(cells):
    cell = cells[-1]
    teacher = cell.shared.load_teacher(Progress(None))
    ours, theirs = build_method(cell.entry.cls, cell.method_config, teacher, 3, "cpu"), build(cell, teacher)
    assert type(ours.teacher.schedule) is type(theirs.teacher.schedule)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_a_job_rebuilds_the_trained_student(cells, student):
    method, file = student
    job = pickle.loads(pickle.dumps(speed_job(cells[-1], file, [1, 2])))
    subject = make_subject(job)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = method.sample(lambda k: noise, 2, UNCONDITIONAL)
        assert torch.equal(subject.sampler(lambda k: noise, 2, UNCONDITIONAL), expected)
    assert subject.parameters == sum(p.numel() for p in method.student.parameters())
    assert subject.teacher.sha256 == method.teacher.sha256


def test_a_job_without_weights_builds_the_teacher_with_its_solver(cells):
    job = dataclasses.replace(speed_job(cells[0], None, [2]), solver="heun")
    subject, noise = make_subject(job), torch.randn(2, 1, 8, 8)
    heun, teacher = Solver.parse("heun"), subject.teacher
    expected = heun.solve(teacher.denoise, teacher.schedule, noise, heun.steps(3))
    assert torch.allclose(subject.sampler(lambda k: noise, 3, UNCONDITIONAL), expected)
    assert subject.parameters == sum(p.numel() for p in teacher.denoiser.parameters())


def test_a_student_in_a_fresh_process(cells, student, capfd):
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    one, two = measure_in_fresh_process(speed_job(cells[-1], student[1], [2, 1]), 300)
    assert capfd.readouterr() == ("", "")
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == before
    for row in (one, two):
        check_complete(row)
        assert not set(row.missing) & {*TIMED, "gflops", "peak_rss_mib"}
    assert (one.nfe, two.nfe) == (1, 2)
    assert two.gflops == 2 * one.gflops > 0


def test_the_teacher_in_this_process(cells):
    one, two = measure(speed_job(cells[0], None, [1, 2]))
    check_complete(one)
    assert two.gflops == 2 * one.gflops > 0


def test_errors_around_a_measurement_are_speed_errors(cells, student, tmp_path):
    job = speed_job(cells[-1], student[1], [1])
    with pytest.raises(SpeedError, match=r"killed: it was not done after 0\.01 s"):
        measure_in_fresh_process(job, 0.01)

    class Local(Method):
        pass

    with pytest.raises(SpeedError, match=r"cannot be sent to another process: .*Local"):
        measure_in_fresh_process(dataclasses.replace(job, method=Local), 60)
    with pytest.raises(SpeedError, match=r"FileNotFoundError|No such file"):
        measure(dataclasses.replace(job, weights=tmp_path / "none.safetensors"))
    assert issubclass(SpeedError, Unavailable)


def test_a_job_is_small_and_opens_the_dataset_only_on_demand(cells):
    shared = cells[0].shared
    dataset = pickle.loads(pickle.dumps(LazyDataset(shared.dataset, shared.config.dataset)))
    assert len(pickle.dumps(speed_job(cells[0], None, [1]))) < 5000
    known = ("name", "licence", "shape", "sha256", "classes", "distribution")
    assert all(getattr(dataset, name) == getattr(shared.dataset, name) for name in known)
    assert len(dataset) == len(shared.dataset)
    assert "opened" not in vars(dataset)
    indices = torch.tensor([5, 0])
    assert torch.equal(dataset.read(indices), shared.dataset.read(indices))
    assert torch.equal(dataset.labels(indices), shared.dataset.labels(indices))
    assert torch.equal(dataset.targets, shared.dataset.targets)  # no part of the contract
    with pytest.raises(AttributeError, match="no_such"):
        dataset.no_such  # noqa: B018


def test_an_analytic_teacher_travels_with_its_dataset(registry, tmp_path):
    words = ["methods=[cm]", "dataset=gmm", "teacher=gmm", "experiment=smoke", "device=cpu", "evaluation.metrics=[]"]
    cell = plan(compose_runs([*words, f"results_dir={tmp_path}"], registry), registry)[0]
    subject = make_subject(pickle.loads(pickle.dumps(speed_job(cell, None, [1]))))
    assert subject.teacher.sha256 == cell.shared.load_teacher(Progress(None)).sha256


def test_torch_settings_are_those_of_the_parent_process():
    before = TorchSettings.now(torch.get_num_threads())
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
        changed = pickle.loads(pickle.dumps(TorchSettings.now(1)))
        before.apply()
        assert TorchSettings.now(before.threads) == before != changed
        changed.apply()
        assert TorchSettings.now(1) == changed
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
    finally:
        before.apply()


def test_user_errors_keep_their_message(cells, monkeypatch):
    def load(source, progress):
        raise UserError("the teacher is missing")

    monkeypatch.setattr(type(cells[0].shared.source), "load", load)
    with pytest.raises(SpeedError, match=r"^the teacher is missing$"):
        measure(speed_job(cells[0], None, [1]))
