"""Every method that ships, trained on a simulated GPU and on the CPU: run by test_simulated_cuda_methods.py."""

from __future__ import annotations

import functools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distillbench.simulated_cuda import Record, install, recording

install()
torch.set_num_threads(1)

from distillbench.errors import UserError  # noqa: E402
from distillbench.registry import load_registry  # noqa: E402
from distillbench.testing.bench_networks import SHAPE  # noqa: E402
from distillbench.testing.method_bench import (  # noqa: E402
    CLASSES,
    CONDITIONINGS,
    IMAGES,
    SILENT,
    MethodBench,
    changed,
    weights_of,
    workspace_of,
)  # fmt: skip
from distillbench.training import data_stream  # noqa: E402
from distillbench.training.budget import BudgetConfig  # noqa: E402
from distillbench.training.checkpoints import Checkpoints  # noqa: E402
from distillbench.training.compute import ComputeConfig, Sampling, applied, sampling  # noqa: E402
from distillbench.training.data_stream import DataStream  # noqa: E402
from distillbench.training.loop import Loop, train  # noqa: E402
from distillbench.training.method import Method  # noqa: E402
from random_pictures import Pictures  # noqa: E402
from simulated import check, main  # noqa: E402

GPU = "cuda:0"
LABELS = os.environ.get("CONDITIONINGS", ",".join(CONDITIONINGS)).split(",")
SHIPPED = {n: e.cls for n, e in load_registry().methods.items() if e.plugin.distribution == "distillbench"}
METHODS = {name: SHIPPED[name] for name in os.environ.get("METHODS", ",".join(SHIPPED)).split(",")}


class Steps:
    """The number of recorded waits at the end of each step of each phase."""

    def __init__(self, record: Record) -> None:
        self.record, self.phase = record, -1
        self.ends: list[tuple[int, int]] = []  # phase, waits so far

    @contextmanager
    def watching(self, method: Method) -> Iterator[None]:
        start, after = method.start_phase, method.after_step

        def start_phase(index: int) -> None:
            self.phase = index
            start(index)

        def after_step() -> None:
            after()
            self.ends.append((self.phase, len(self.record.waits)))

        method.__dict__ |= {"start_phase": start_phase, "after_step": after_step}
        try:
            yield
        finally:
            del method.__dict__["start_phase"], method.__dict__["after_step"]

    def _ranges(self) -> list[tuple[int, int]]:
        """Index ranges of the waits between the ends of two steps of a phase, without those of its first step.

        The first step of a phase fills caches, and after the first step of all the loss is read.
        """
        ends = [(-1, 0), *self.ends]
        return [
            (begin, end)
            for (before, _), (phase, begin), (after, end) in zip(ends, ends[1:], ends[2:], strict=False)
            if before == phase == after
        ]

    def waits(self) -> dict[str, int]:
        """Number of waits in those ranges, by line."""
        waits = (wait for begin, end in self._ranges() for wait in self.record.waits[begin:end])
        return Counter(f"{wait.place}: {wait.what}" for wait in waits)

    def counted(self) -> int:
        """Number of steps in :meth:`waits`."""
        return len(self._ranges())


def trained(
    bench: MethodBench,
    config: ComputeConfig | None = None,
    microbatch: int = 0,
    folder: Path | None = None,
    ahead: int = 0,
) -> tuple[Method, Steps, list[Any]]:
    """A training by the harness's loop, with real images from its data stream."""
    method = bench.method()
    stream = DataStream(Pictures(64, SHAPE, CLASSES), 0, bench.device, ahead) if method.needs_data else None
    steps = 6 if len(method.phases()) == 1 else 4 * len(method.phases())
    budget = BudgetConfig(images=IMAGES * steps)
    workspace = workspace_of(method, Path(), budget, dry=True, device=bench.device)
    checkpoints = Checkpoints((0.5,), folder, (1, 2)) if folder is not None else None
    with recording(places=False) as record, applied(config or ComputeConfig(), method, bench.device):
        watched = Steps(record)
        with watched.watching(method):
            read = None if stream is None else stream.read
            loop = Loop(IMAGES, microbatch, config or ComputeConfig())
            done = train(method, method.config, workspace, read, loop, SILENT, checkpoints)
    if stream is not None:
        stream.close()
    return method.eval(), watched, done.checkpoints


def bench_of(name: str, label: str, device: str) -> MethodBench:
    return MethodBench(label, METHODS[name], None, CONDITIONINGS[label], 0, device=device)


def for_all(function: Any) -> dict[str, Any]:
    """The values of `function` for every method and conditioning; None if the method does not support it."""
    found = {}
    for name in METHODS:
        for label in LABELS:
            try:
                found[f"{name}/{label}"] = function(name, label)
            except UserError:
                found[f"{name}/{label}"] = None
            except Exception as error:
                found[f"{name}/{label}"] = {"error": f"{type(error).__name__}: {error}"}
    return found


@functools.cache
def on_both(name: str, label: str) -> tuple[Any, Any]:
    return tuple(trained(bench_of(name, label, device)) for device in ("cpu", GPU))  # type: ignore[return-value]


@check
def weights() -> dict[str, Any]:
    """Names of weights that are not bit-identical to those of the run on the CPU."""

    def differing(name: str, label: str) -> Any:
        (cpu, _, _), (gpu, _, _) = on_both(name, label)
        return changed(weights_of(cpu), {key: value.cpu() for key, value in weights_of(gpu).items()})

    return for_all(differing)


@check
def waits() -> dict[str, Any]:
    """Waits of steps that do not read the loss, by line, and the number of these steps."""
    return for_all(lambda name, label: [(steps := on_both(name, label)[1][1]).waits(), steps.counted()])


@check
def checkpoints() -> dict[str, Any]:
    """Checksums of the checkpoints at half of the budget, on both devices."""

    def sums(name: str) -> list[list[str]]:
        found = []
        for device in ("cpu", GPU):
            with tempfile.TemporaryDirectory() as folder:
                points = trained(bench_of(name, "guided", device), folder=Path(folder))[2]
                found.append([point.sha256 for point in points])
        return found

    return {name: _or_error(sums, name) for name in METHODS}


@check
def samples() -> dict[str, Any]:
    """By number of evaluations: whether samples equal those of the CPU, plain and from CUDA graphs."""

    def equal(name: str, label: str) -> Any:
        (cpu, _, _), (gpu, _, _) = on_both(name, label)
        found = {}
        for n in [n for n in range(1, 9) if cpu.supports(n)][:3]:
            images = []
            for method, device in ((cpu, "cpu"), (gpu, GPU)):
                bench = bench_of(name, label, device)
                images.append(bench.sample(n, method).cpu())
            with torch.no_grad(), sampling(Sampling(cuda_graphs=True), gpu.teacher, GPU):
                for _ in range(2):
                    images.append(bench_of(name, label, GPU).sample(n, gpu).cpu())
            found[n] = [torch.equal(images[0], other) for other in images[1:]]
        return found

    return for_all(equal)


@check
def restored() -> dict[str, Any]:
    """Names of weights that differ after a training was interrupted and resumed by a new object."""

    def differing(name: str, label: str) -> Any:
        bench = bench_of(name, label, GPU)
        whole = weights_of(bench.run.method)
        return changed(whole, weights_of(bench.train_interrupted(3)))

    return {
        f"{name}/{label}": value
        for label in ("unconditional", "guidance drawn")
        for name in METHODS
        for value in [_or_error(differing, name, label)]
    }


def _or_error(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except UserError:
        return None
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


COMPUTED = {
    "bf16": ComputeConfig(precision="bf16"),
    "bf16 and recompute": ComputeConfig(precision="bf16", recompute=True),
    "fp16": ComputeConfig(precision="fp16"),
    "channels_last": ComputeConfig(channels_last=True, tf32=True),
}


@check
def computed() -> dict[str, Any]:
    """Waits of steps in other precisions and in two parts. Losses must be finite, or the training would fail."""
    return {
        f"{name}/{way}": _or_error(_waits_of, bench_of(name, "unconditional", GPU), config, IMAGES // 2)
        for way, config in COMPUTED.items()
        for name in METHODS
    }


def _waits_of(bench: MethodBench, config: ComputeConfig, microbatch: int = 0, ahead: int = 0) -> dict[str, int]:
    return trained(bench, config, microbatch, ahead=ahead)[1].waits()


@check
def read_ahead() -> dict[str, Any]:
    """Waits of the steps of methods with data, with prefetched images."""
    held, data_stream.HELD_BYTES = data_stream.HELD_BYTES, 0
    try:
        found = {}
        for name in [name for name, cls in METHODS.items() if cls.needs_data]:
            for label in ("unconditional", "classes"):
                found[f"{name}/{label}"] = _or_error(_waits_of, bench_of(name, label, GPU), ComputeConfig(), 0, 2)
        return found
    finally:
        data_stream.HELD_BYTES = held


main()
