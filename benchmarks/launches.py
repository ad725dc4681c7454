"""Launches of operators in a training step, counted on a simulated GPU, and which methods they would bound.

    python benchmarks/launches.py

No GPU is used and nothing is timed: all times are estimates. Launches are counted on `distillbench.simulated_cuda`,
with small images and a narrow U-Net, neither of which changes their number. Products and memory traffic are those of
the wide U-Net for one image more, counted on tensors without memory (device meta), times the batch. A step takes

    GPU    products / (peak * reached) + bytes of all other operators / (bandwidth * reached)
    host   launches * microseconds of a launch

and is bound by launches if the host takes longer: the GPU is then idle. CUDA graphs, or fewer and larger operators,
help there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from distillbench.simulated_cuda import Record, install, recording

GPU = "cuda:0"
SMALL, NARROW, IMAGES = (3, 8, 8), 16, 8  # what launches are counted on
CLASSES, STEPS = 10, 3
PEAKS = {"fp32": 67.0, "tf32": 495.0, "bf16": 989.0}  # TFLOP/s of dense products, NVIDIA H200 SXM, from its data sheet
REACHED = {"fp32": 0.65, "tf32": 0.45, "bf16": 0.40}  # shares of them that are assumed to be reached
TRAFFIC = {"fp32": 1.0, "tf32": 1.0, "bf16": 1.1}  # autocast leaves norms in float32, and casts
BANDWIDTH, REACHED_BANDWIDTH = 4.8, 0.75  # TB/s of the H200's data sheet; share assumed


# --- launches --------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """All steps to count have been taken."""


@dataclass(frozen=True)
class Step:
    """One training step: launches by part, and evaluations of networks for each image."""

    network: int
    backward: int
    outside: int
    forwards: float
    backwards: float

    @property
    def launches(self) -> int:
        return self.network + self.backward + self.outside


def count_step(cls: type, guided: bool, precision: str, depth: int) -> Step:
    """The third step of the first phase of a method, as the harness makes it; raises UserError for a refusal."""
    from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Conditioning
    from distillbench.diffusion.denoiser import Denoiser
    from distillbench.diffusion.schedules import VPCosine
    from distillbench.networks.architectures import UNet
    from distillbench.teachers.teacher import Teacher
    from distillbench.testing.method_bench import SILENT, workspace_of
    from distillbench.training.budget import BudgetConfig
    from distillbench.training.build import build_method
    from distillbench.training.compute import ComputeConfig, applied
    from distillbench.training.data_stream import DataStream
    from distillbench.training.loop import Loop, train

    conditioning = Conditioning(CLASSES, 2.0) if guided else WITHOUT_CLASSES
    make = lambda: UNet(SMALL, NARROW, depth, conditioning.classes)
    torch.manual_seed(0)
    denoiser = Denoiser(make(), VPCosine(), "v").to(GPU)
    teacher = Teacher("unet", denoiser, SMALL, "unet", conditioning=conditioning, blank=make)
    method = build_method(cls, cls.Config(), teacher, 0, GPU)
    after, ends = method.after_step, list[tuple[int, int, int]]()
    with recording(places=False) as record:

        def after_step() -> None:
            after()
            counters = method.teacher.teacher_rows, method.teacher.student_rows
            rows = sum(counter.rows for counter in counters), sum(counter.rows_with_gradient for counter in counters)
            ends.append((len(record.launches), *rows))
            if len(ends) == STEPS:
                raise Enough

        method.__dict__["after_step"] = after_step
        stream = DataStream(_pictures(), 0, GPU) if method.reads_data(method.config) else None
        workspace = workspace_of(
            method, Path(), BudgetConfig(images=2 * STEPS * IMAGES * len(method.phases())), dry=True, device=GPU
        )
        compute = ComputeConfig(precision=precision)
        with applied(compute, method, GPU), suppress(Enough):
            read = None if stream is None else stream.read
            train(method, method.config, workspace, read, Loop(IMAGES, compute=compute), SILENT)
    (begin, rows, gradients), (end, all_rows, all_gradients) = ends[-2:]
    step = Record(launches=record.launches[begin:end])
    parts = (step.launched(part) for part in ("network", "backward", "outside"))
    return Step(*parts, (all_rows - rows) / IMAGES, (all_gradients - gradients) / IMAGES)


def _pictures() -> Any:
    from distillbench.datasets.dataset import Dataset

    class Pictures(Dataset):
        name, licence, shape, sha256, classes = "pictures", "none", SMALL, "0" * 64, CLASSES

        def __init__(self) -> None:
            """Nothing to find."""

        def __len__(self) -> int:
            return 64

        def read(self, indices: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(indices), *SMALL, dtype=torch.uint8)

        def labels(self, indices: torch.Tensor) -> torch.Tensor:
            return indices % CLASSES

    return Pictures()


# --- the roofline ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Of one image: products in FLOP, and bytes that all other operators read and write, in float32."""

    flops: float
    bytes: float

    def milliseconds(self, images: float, precision: str, settings: argparse.Namespace) -> float:
        products = self.flops / (settings.peaks[precision] * 1e12 * settings.reached[precision])
        traffic = TRAFFIC[precision] * self.bytes / (settings.bandwidth * 1e12 * settings.reached_bandwidth)
        return 1000 * images * (products + traffic)


class _Traffic(TorchDispatchMode):
    """Bytes in and out of every operator that is no view, allocation or product."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func._overloadpacket.__name__
        moves = not func.is_view and "empty" not in name and name != "_unsafe_view"
        if moves and func._overloadpacket not in flop_registry:
            tensors = [*_tensors(args), *_tensors([out])]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def work_of(call: Callable[[], Any]) -> Work:
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        call()
    return Work(flops.get_total_flops(), traffic.bytes)


def network_work(side: int, width: int, depth: int) -> tuple[int, Work, Work]:
    """Parameters of the U-Net, and the work of a forward without gradient and of a backward pass."""
    from distillbench.networks.architectures import UNet

    network = UNet((3, side, side), width, depth).to("meta")

    def works(images: int) -> list[Work]:
        x, time = torch.empty(images, 3, side, side, device="meta"), torch.empty(images, device="meta")
        with torch.no_grad():
            forward = work_of(lambda: network(x, time))
        return [forward, work_of(lambda: network(x, time).sum().backward())]

    # what one image more takes: weights are read and written once for all of a batch
    forward, both = (
        Work((eight.flops - four.flops) / 4, (eight.bytes - four.bytes) / 4)
        for four, eight in zip(works(4), works(8), strict=True)
    )
    backward = Work(both.flops - forward.flops, both.bytes - forward.bytes)
    return sum(p.numel() for p in network.parameters()), forward, backward


# --- tables ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", help="(all)")
    add("--batch", type=int, default=128)
    add("--side", type=int, default=32, help="of the images, in pixels")
    add("--width", type=int, default=120, help="of the U-Net")
    add("--depth", type=int, default=3, help="its blocks a level; with width 120 it has 30 M parameters")
    add("--launch-us", type=float, default=7.0, help="microseconds of the host for one operator in eager Python")
    add("--bandwidth", type=float, default=BANDWIDTH, help="TB/s")
    add("--reached-bandwidth", type=float, default=REACHED_BANDWIDTH, help="share of it")
    for name in PEAKS:
        add(f"--{name}", type=float, default=PEAKS[name], help="TFLOP/s of products")
        add(f"--reached-{name}", type=float, default=REACHED[name], help="share of it")
    settings = parser.parse_args()
    settings.peaks = {name: vars(settings)[name] for name in PEAKS}
    settings.reached = {name: vars(settings)[f"reached_{name}"] for name in PEAKS}
    torch.set_num_threads(1)
    install()
    report(settings)


def report(settings: argparse.Namespace) -> None:
    from measuring import METHODS, print_table

    from distillbench.errors import UserError

    parameters, forward, backward = network_work(settings.side, settings.width, settings.depth)
    print(
        f"U-Net of width {settings.width}, depth {settings.depth}: {parameters / 1e6:.1f} M parameters; at "
        f"{settings.side}x{settings.side} an image takes {forward.flops / 1e9:.1f} GFLOP and "
        f"{forward.bytes / 1e6:.0f} MB forward, {backward.flops / 1e9:.1f} GFLOP and {backward.bytes / 1e6:.0f} MB "
        f"backward (float32)\n"
    )
    counts, times = [], []
    for name in settings.methods or sorted(METHODS):
        for guided in (False, True):
            try:
                steps = {p: count_step(METHODS[name], guided, p, settings.depth) for p in ("fp32", "bf16")}
            except UserError:
                continue
            label = f"{name}, guided" if guided else name
            plain, half = steps["fp32"], steps["bf16"]
            counts.append(
                (label, f"{plain.forwards:g}", f"{plain.backwards:g}", f"{plain.network:,}", f"{plain.backward:,}",
                 f"{plain.outside:,}", f"{plain.launches:,}", f"{half.launches:,}")
            )  # fmt: skip
            times.append((label, *_judged(steps, forward, backward, settings)))
    print_table(
        counts,
        ("method", "forwards", "with backward", "launches in networks", "in backward passes", "outside", "all, fp32",
         "all, bf16"),
    )  # fmt: skip
    print()
    heads = [f"{what} {precision}" for precision in PEAKS for what in ("GPU ms", "host / GPU")]
    print_table(times, ("method", "host ms fp32, tf32", "host ms bf16", *heads, "bound by launches in"))


def _judged(steps: dict[str, Step], forward: Work, backward: Work, settings: argparse.Namespace) -> Iterator[str]:
    """Milliseconds of the host, then of the GPU in each precision with the ratio, then where launches bound."""
    host = {precision: step.launches * settings.launch_us / 1000 for precision, step in steps.items()}
    yield from (f"{milliseconds:.1f}" for milliseconds in host.values())
    bound = []
    for precision in PEAKS:
        kind = "bf16" if precision == "bf16" else "fp32"
        step = steps[kind]
        gpu = forward.milliseconds(step.forwards * settings.batch, precision, settings)
        gpu += backward.milliseconds(step.backwards * settings.batch, precision, settings)
        yield from (f"{gpu:.0f}", f"{host[kind] / gpu:.2f}")
        bound += [precision] if host[kind] > gpu else []
    yield ", ".join(bound) or "none"


if __name__ == "__main__":
    main()
