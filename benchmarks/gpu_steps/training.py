"""Steps about training: step times in every setting, the harness's loop and bare loops, bit-identical repetitions."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from measuring import Colours, Pair, Scene
from torch import Tensor

from distillbench.builtin.digits import Digits
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import VPCosine
from distillbench.metering.energy import energy
from distillbench.metering.memory import peak_gpu_mib, peak_rss_mib
from distillbench.networks.architectures import UNet
from distillbench.system.progress import Progress, Step
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig, Meter, TrainingCost
from distillbench.training.compute import ComputeConfig, applied, tf32
from distillbench.training.data_stream import DataStream
from distillbench.training.flops import denoisers_of, measured_flops, training_flops
from distillbench.training.loop import Loop, train
from distillbench.training.network_rows import sum_of_rows
from distillbench.training.optimizers import warm_up as warm_up_optimizers
from distillbench.training.pairs import Workspace
from gpu_steps import verdicts
from gpu_steps.clocks import Marks, clocks, synchronise, warm_up
from gpu_steps.context import Context, NotRun
from gpu_steps.hardware import has_tf32
from gpu_steps.runs import has_determinism, weights_apart
from gpu_steps.verdicts import Verdict

MIB = 2**20
ENDLESS = 10**6  # steps of a budget that is never used up: the first phase of every method
SETTINGS: dict[str, ComputeConfig] = {
    "fp32": ComputeConfig(),
    "tf32": ComputeConfig(tf32=True),
    "bf16": ComputeConfig(precision="bf16"),
    "compile": ComputeConfig(precision="bf16", compile="blocks"),
    "channels_last": ComputeConfig(precision="bf16", channels_last=True),
    "recompute": ComputeConfig(precision="bf16", recompute=True),
}
ORDER = (
    "direct",
    "ct",
    "pd",
    "cm",
    "boot",
    "tract",
    "sid",
)  # cheap steps first: the last are left out for want of time


class Pictures(Colours):
    """2,048 smooth random images, 3x32x32, in memory."""

    name, shape, sha256 = "pictures", (3, 32, 32), "pictures"


class SmallPictures(Colours):
    """For rehearsals: 3x8x8."""

    name, shape, sha256 = "small pictures", (3, 8, 8), "small pictures"


def unet_scene(context: Context, batch: int = 0) -> Scene:
    """A U-Net of 34 M parameters on 3x32x32 with random weights; tiny in a rehearsal."""
    dataset, width, depth = (SmallPictures(), 8, 1) if context.small else (Pictures(), 128, 3)
    batch = batch or batch_of(context)

    def teacher(device: str) -> Teacher:
        torch.manual_seed(0)
        make = lambda: UNet(dataset.shape, width, depth)
        return Teacher("unet", Denoiser(make(), VPCosine(), "v").to(device), dataset.shape, "unet", blank=make)

    return Scene(f"unet {width}", dataset, teacher, batch, 1, {"direct": {"steps": 1, "pairs": max(2 * batch, 8)}})


def digits_scene(conditioning: Conditioning = WITHOUT_CLASSES, width: int = 16) -> Scene:
    """Digits, with a small U-Net of random weights, conditioned."""
    dataset = Digits(Digits.Config())

    def teacher(device: str) -> Teacher:
        torch.manual_seed(0)
        make = lambda: UNet(dataset.shape, width, 1, conditioning.classes)
        denoiser = Denoiser(make(), VPCosine(), "v").to(device)
        return Teacher("unet", denoiser, dataset.shape, "unet", conditioning=conditioning, blank=make)

    return Scene("digits, unet", dataset, teacher, 16, 1, {"direct": {"steps": 1, "pairs": 64}})


def batch_of(context: Context) -> int:
    """Images of a step: for the backward pass through the U-Net 56 MB are kept for each, in float32."""
    if context.batch or context.small or not context.on_gpu:
        return context.batch or 4
    gib = torch.cuda.get_device_properties(context.device).total_memory / 2**30
    return next(batch for least, batch in ((39, 256), (21, 128), (10, 64), (0, 32)) if gib >= least)


# --- driving the harness's loop --------------------------------------------------------------------------------------


class Enough(Exception):
    """All steps that are wanted are done."""


def drive(
    scene: Scene, name: str, device: str, folder: Path, after: Callable[[int, Meter], None],
    compute: ComputeConfig | None = None, images: int = 0, seed: int = 0,
) -> Any:  # fmt: skip
    """Train by the harness's own loop; `after(steps, meter)` is called after each step, and ends it by Enough."""
    compute = compute or ComputeConfig()
    pair = Pair(scene, name, images or ENDLESS * scene.batch, device, folder, seed)
    method, number = pair.method, 0
    del pair.teacher, pair.student
    data = DataStream(scene.dataset, seed, device, 0 if device == "cpu" else compute.prefetch)
    with ExitStack() as stack:
        stack.callback(data.close)
        stack.enter_context(applied(compute, method, device))
        meter = Meter(BudgetConfig(images=pair.images), method.teacher, device)
        workspace = Workspace(method.teacher, meter, folder / "pairs", device, seed, Progress(None))
        after_step = method.after_step

        def wrapped() -> None:
            nonlocal number
            after_step()
            number += 1
            after(number, meter)

        method.after_step = wrapped  # type: ignore[method-assign]
        read = data.read if method.reads_data(method.config) else None
        loop, step = Loop(scene.batch, compute=compute), Step(lambda fraction, note: None)
        stack.enter_context(suppress(Enough))
        train(method, pair.config, workspace, read, loop, step)
    return method


def free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


# --- step times ------------------------------------------------------------------------------------------------------


def step_times(context: Context, setting: str) -> None:
    """Of all methods in one setting, with the share of the peak and the peak of memory."""
    compute, precision = SETTINGS[setting], {"fp32": "fp32", "tf32": "tf32"}.get(setting, "bf16")
    if compute.tf32 and not has_tf32(context):
        raise NotRun("no units for TF32 here")
    scene, rows = unet_scene(context), dict[str, Any]()
    context.keep("batch", scene.batch)
    if context.on_gpu:
        warm_up_optimizers(context.device)
        warm_up(context.device)
    with clocks(context.device) as seen:
        _methods_in(context, scene, setting, compute, precision, rows)
    if context.on_gpu:
        context.say(verdicts.judge_clocks(seen))


def _methods_in(
    context: Context, scene: Scene, setting: str, compute: ComputeConfig, precision: str, rows: dict[str, Any]
) -> None:
    longest = 60.0 if compute.compile != "off" else 5.0  # seconds of a method
    for name in ORDER[:2] if context.small else ORDER:
        what = f"{name}, {setting}: a step"
        with context.attempt(what):
            context.need(1 if context.small else 1.5 * longest)
            begin = time.monotonic()
            try:
                rows[name] = _timed(context, scene, name, compute, precision)
            except torch.OutOfMemoryError:
                context.say(
                    Verdict("look", what, f"memory ran out at batch {scene.batch}", "", "choose a smaller --batch")
                )
                free(context.device)
                continue
            found = rows[name]
            context.keep("steps", rows)
            share, predicted = found["share"], found["predicted_ms"]
            context.say(verdicts.judge_step(what, found["ms"], found["wall_ms"], share, predicted))
            if found["graphs"]:
                advice = "torch's compiler worked within the timed steps: these times are not those of a step"
                context.say(Verdict("look", f"{what}: compiled meanwhile", f"{found['graphs']} graphs", "0", advice))
            longest = max(longest if compute.compile == "off" else 5.0, time.monotonic() - begin)
        free(context.device)


def _timed(context: Context, scene: Scene, name: str, compute: ComputeConfig, precision: str) -> dict[str, Any]:
    device, count, before = context.device, 2 if context.small else 12, 0.0
    first = 2 if context.small else 4  # steps that do not count: libraries choose algorithms, memory is taken
    marks, costs, walls, graphs = Marks(device), list[TrainingCost](), list[float](), list[int]()

    def after(number: int, meter: Meter) -> None:
        nonlocal count, before
        if number == first - 1:
            synchronise(device)
            before = time.perf_counter()
        if number < first:
            return
        if number == first:
            synchronise(device)
            count = min(count, max(4, int(6 / (time.perf_counter() - before))))  # of slow steps fewer
            _edge(device, meter, costs, graphs)
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats(device)
            walls.append(time.perf_counter())
        marks.add()
        if number == first + count:
            synchronise(device)
            walls.append(time.perf_counter())
            _edge(device, meter, costs, graphs)
            raise Enough

    method = drive(scene, name, device, context.folder / "steps", after, compute)
    ms = marks.between()
    peak = torch.cuda.max_memory_allocated(device) / MIB if device != "cpu" else None
    paid = _difference(costs[1], costs[0])
    flops = measured_flops(paid.networks, method.teacher, denoisers_of(method), device)
    tflop = training_flops(paid.networks, flops) / 1e12 / len(ms)
    both = paid.teacher_backward + paid.student_backward
    forward = paid.teacher_nfe + paid.student_nfe - both
    given = context.earlier.get("limits", {})
    sheets = verdicts.peak_of(torch.cuda.get_device_name(device)) if device != "cpu" else None
    peaks, reached = {} if sheets is None else vars(sheets), given.get("reached") or {}
    sheet = peaks.get(precision) or reached.get(precision)
    speed, middle = peaks.get("memory") or reached.get("copies"), sorted(ms)[len(ms) // 2]
    predicted = share = None
    if sheet and context.on_gpu and not context.small:
        share = tflop / (middle * 1e-3) / sheet
        if speed:
            images = forward // len(ms), both // len(ms)
            predicted = verdicts.roofline_ms(tflop, *images, precision, sheet, speed)
    return {
        "ms": ms, "median_ms": middle, "wall_ms": 1e3 * (walls[1] - walls[0]) / len(ms), "tflop": tflop, "share": share,
        "images_per_second": 1e3 * scene.batch / middle, "peak_mib": peak, "predicted_ms": predicted,
        "graphs": graphs[1] - graphs[0],
    }  # fmt: skip


def _edge(device: str, meter: Meter, costs: list[TrainingCost], graphs: list[int]) -> None:
    from torch._dynamo.utils import counters

    synchronise(device)
    costs.append(meter.cost())
    graphs.append(counters["stats"]["unique_graphs"])


def _difference(late: TrainingCost, early: TrainingCost) -> TrainingCost:
    """Of what is counted."""
    before = asdict(early)
    counts = {name: value - before[name] for name, value in asdict(late).items() if isinstance(value, int)}
    return replace(late, networks=sum_of_rows(late.networks, early.networks), **counts)


# --- the harness beside bare loops -----------------------------------------------------------------------------------


def loop(context: Context) -> None:
    """Step times of the harness over those of bare loops, at the size of the U-Net, with TF32: it hides least there."""
    from overhead import measure

    scene, rows = unet_scene(context), dict[str, Any]()
    if context.on_gpu:
        warm_up_optimizers(context.device)
        warm_up(context.device)
    for against in ("own", "hand"):
        for name in ORDER[:1] if context.small else ORDER:
            what = f"{name}: harness beside {'its own steps' if against == 'own' else 'a loop by hand'}"
            with context.attempt(what), tf32(has_tf32(context), context.device):
                context.need(1 if context.small else 8)
                pairs, folder = 2 if context.small else 9, context.folder / f"{against}-{name}"
                ratio = measure(scene, name, pairs, context.device, folder, time.perf_counter, against)
                rows[f"{name}, {against}"] = vars(ratio)
                context.keep("ratios", rows)
                verdict = verdicts.judge_ratio(what, ratio.value, ratio.low, ratio.high)
                context.say(verdicts.unjudged(verdict) if context.small else verdict)
            free(context.device)
    with context.attempt("watches of a cell"):
        context.need(1 if context.small else 10)
        _watches(context)


def _watches(context: Context) -> None:
    """What a cell watches while it trains (memory by two threads, joules) costs, on and off in turn in one training.

    At a small batch, where the host is the slower of the two and a thread that takes it from Python is felt.
    """
    device, stretch, turns = context.device, (1, 4) if context.small else (25, 16), 0
    times: tuple[list[float], list[float]] = ([], [])
    stack, begin = ExitStack(), 0.0

    def after(number: int, meter: Meter) -> None:
        nonlocal begin, turns
        if number < 5 or (number - 5) % stretch[0]:
            return
        synchronise(device)
        if begin:
            times[turns % 2].append((time.perf_counter() - begin) / stretch[0])
            turns += 1
        stack.close()
        if turns == stretch[1]:
            raise Enough
        if turns % 2:
            stack.enter_context(peak_rss_mib())
            stack.enter_context(peak_gpu_mib(device))
            stack.enter_context(energy(device))
        synchronise(device)
        begin = time.perf_counter()

    with stack:
        drive(digits_scene(), "ct", device, context.folder / "watches", after)
    from measuring import Ratio

    ratio = Ratio.of(times[1][1:], times[0][1:])  # pairs of neighbours
    context.keep("watches", vars(ratio))
    verdict = verdicts.judge_ratio("watches of a cell, small steps", ratio.value, ratio.low, ratio.high, 1.05)
    context.say(verdicts.unjudged(verdict) if context.small else verdict)


# --- bits ------------------------------------------------------------------------------------------------------------


def bits(context: Context) -> None:
    """The same few steps twice, from the same seed: equal to the bit, though nobody asked for it?"""
    _twice(context, ComputeConfig(), must=False)


def deterministic_bits(context: Context) -> None:
    """The same with compute.deterministic=true: they must be."""
    if not has_determinism():
        raise NotRun("there is no setting compute.deterministic yet")
    _twice(context, ComputeConfig(**DETERMINISTIC), must=True)


DETERMINISTIC: dict[str, Any] = {"deterministic": True}


def _twice(context: Context, compute: ComputeConfig, must: bool) -> None:
    scene, rows = unet_scene(context, 4 if context.small else 16), dict[str, Any]()
    for name in ORDER[:1] if context.small else ("direct", "ct", "boot", "sid"):
        what = f"{name}: the same training twice"
        with context.attempt(what):
            context.need(1 if context.small else 6)
            a, b = (_weights(context, scene, name, compute) for _ in range(2))
            apart, equal = weights_apart(a, b)
            rows[name] = {"apart": apart, "equal": equal}
            context.keep("bits", rows)
            context.say(verdicts.judge_weights(what, apart, equal, must))
    free(context.device)


def _weights(context: Context, scene: Scene, name: str, compute: ComputeConfig) -> dict[str, Tensor]:
    """Of the student after eight steps."""

    def after(number: int, meter: Meter) -> None:
        if number == (2 if context.small else 8):
            raise Enough

    method = drive(scene, name, context.device, context.folder / "bits", after, compute)
    return {key: value.detach().cpu().clone() for key, value in method.student.state_dict().items()}
