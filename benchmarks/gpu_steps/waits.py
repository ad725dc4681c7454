"""Training steps between log steps must not wait for the device: counted by torch's sync debug mode and profiler."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Conditioning
from distillbench.errors import UserError
from distillbench.training.budget import Meter
from gpu_steps import verdicts
from gpu_steps.clocks import synchronise
from gpu_steps.context import Context
from gpu_steps.training import ORDER, Enough, digits_scene, drive, free, unet_scene
from gpu_steps.verdicts import Verdict

QUIET = 2, 48  # steps between two log steps, the 1st and the 50th
REHEARSED = 2, 4


@contextmanager
def waits_seen(device: str, simulated: bool = False) -> Iterator[Counter[str]]:
    """Operations that wait for the device, by the innermost line of the project: torch warns of each in this mode.

    Plain calls of torch.cuda.synchronize are not among what torch warns of: they are counted here.
    """
    seen: Counter[str] = Counter()

    def note(message: object = "", *about: object, **more: object) -> None:
        if "called a synchronizing" in str(message):
            seen[_place()] += 1

    real = torch.cuda.synchronize

    def synchronized(*about: Any, **more: Any) -> None:
        note("called a synchronizing function")
        real(*about, **more)

    if device == "cpu":
        yield seen
        return
    if simulated:
        from distillbench.simulated_cuda import recording

        with recording() as record:
            yield seen
        seen.update(f"{Path(wait.place.file).name}:{wait.place.line}" for wait in record.waits)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.synchronize = synchronized
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize = real


def _place() -> str:
    """The innermost line of distillbench or a plugin."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent.name in ("distillbench", "builtin", "plugins") or path.stem.startswith("distillbench_"):
            return f"{path.name}:{frame.lineno}"
    return "elsewhere"


def waits(context: Context) -> None:
    """Every method, unguided and guided: no operation between two log steps may wait for the device."""
    conditionings = {
        "": WITHOUT_CLASSES,
        ", classes": Conditioning(10),
        ", guided": Conditioning(10, 2.0),
        ", w drawn": Conditioning(10, 2.0, (1.0, 3.0)),
    }
    with context.attempt("waits that the mode should see"):
        with waits_seen(context.device, context.simulated) as seen:
            torch.zeros(1, device=context.device).item()
        good = bool(seen) or not context.on_gpu
        context.say(
            verdicts.judge(good, "wrong", "waits that the mode should see", f"{sum(seen.values())}", "1: .item()")
        )
    first, last = REHEARSED if context.small else QUIET
    for name in ORDER[:2] if context.small else ORDER:
        for words, conditioning in conditionings.items():
            what = f"{name}{words}: waits"
            with context.attempt(what):
                context.need(2)
                try:
                    places = _waits_of(context, name, conditioning)
                except UserError as reason:
                    context.say(Verdict("skipped", what, str(reason)[:200]))
                    continue
                context.say(verdicts.judge_waits(what, places, last - first))
    free(context.device)
    for name in () if context.simulated else ORDER[:1] if context.small else ORDER:
        with context.attempt(f"{name}: profile"):
            context.need(5)
            _profile(context, name)


def _waits_of(context: Context, name: str, conditioning: Conditioning) -> Counter[str]:
    """In the steps of a small U-Net on digits."""
    first, last = REHEARSED if context.small else QUIET
    scene, stack, found = digits_scene(conditioning), ExitStack(), Counter[str]()

    def after(number: int, meter: Meter) -> None:
        nonlocal found
        if number == first:
            found = stack.enter_context(waits_seen(context.device, context.simulated))
        if number == last:
            stack.close()
            raise Enough

    with stack:
        drive(scene, name, context.device, context.folder / f"waits-{conditioning.w}", after)
    return found


def _profile(context: Context, name: str) -> None:
    """Kernels, waits and pageable copies of a step as CUPTI sees them: what no mode of torch can miss."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if context.on_gpu else [])
    first, last = (2, 3) if context.small else (5, 10)
    profiler, begin, seconds = profile(activities=activities), 0.0, 0.0

    def after(number: int, meter: Meter) -> None:
        nonlocal begin, seconds
        if number == first:
            synchronise(context.device)
            profiler.__enter__()
            begin = time.perf_counter()
        if number == last:
            synchronise(context.device)
            seconds = time.perf_counter() - begin
            profiler.__exit__(None, None, None)
            raise Enough

    scene = unet_scene(context, 4 if context.small else 32)
    drive(scene, name, context.device, context.folder / "profile", after)
    steps, events = last - first, Counter[str]()
    busy = 0.0
    for event in profiler.key_averages():
        events[event.key] += event.count
        if str(getattr(event, "device_type", "")).endswith("CUDA") and not event.key.startswith(ANNOTATIONS):
            busy += event.self_device_time_total
    found = {
        "kernels": sum(n for key, n in events.items() if "LaunchKernel" in key) / steps,
        "stream and device waits": sum(n for key, n in events.items() if key in WAITS)
        - 1,  # this step's own, at the end
        "pageable copies": sum(n for key, n in events.items() if "Memcpy" in key and "Pageable" in key),
        "busy": busy / 1e6 / seconds,
    }
    context.keep(f"profile {name}", found)
    if not context.on_gpu:
        return
    if not found["kernels"]:
        context.say(Verdict("skipped", f"{name}: profile", "the profiler sees no kernels here (CUPTI)"))
        return
    waits_a_step = (max(0, found["stream and device waits"]) + found["pageable copies"]) / steps
    figure = f"{found['kernels']:.0f} kernels a step, GPU busy {found['busy']:.0%} of the time at batch {scene.batch}, "
    figure += f"{waits_a_step:.1f} waits and pageable copies a step"
    told = str({key: count for key, count in events.items() if key in WAITS or "Memcpy" in key})
    context.say(verdicts.judge(waits_a_step < 0.5, "wrong", f"{name}: profile", figure, "no waits", told))


ANNOTATIONS = "Optimizer.", "ProfilerStep", "gpu_user"  # spans of kernels that are there by themselves, too
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
