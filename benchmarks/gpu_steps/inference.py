"""Steps about sampling and scoring: CUDA graphs, latency, throughput, features and distances."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measuring import Pair, Scene

from distillbench.builtin.efficientnet_lite0 import EfficientNetLite0
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import Solver
from distillbench.evaluation.evaluator import Evaluator, teacher_sampler
from distillbench.evaluation.features import ImageSet, Networks
from distillbench.evaluation.metric import Samples
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.registry import load_registry
from distillbench.system.progress import Progress
from distillbench.training.compute import Sampling, sampling
from gpu_steps import verdicts
from gpu_steps.clocks import median, milliseconds, synchronise, warm_up
from gpu_steps.context import Context, NotRun
from gpu_steps.training import digits_scene, unet_scene


def graphs(context: Context) -> None:
    """Samples by CUDA graphs are those without, sooner at small batches; and how often they are captured."""
    if not context.on_gpu:
        raise NotRun("CUDA graphs need a GPU")
    scene, device = unet_scene(context, 16), context.device
    pair = Pair(scene, "direct", 1000, device, context.folder)
    samplers: dict[str, tuple[Callable[..., Any], int]] = {
        "one step": (pair.method.sample, 1),
        "DDIM-8": (teacher_sampler(pair.method.teacher, Solver.parse("ddim")), 8),
    }
    warm_up(device)
    rows = dict[str, Any]()
    for name, (sampler, nfe) in samplers.items():
        for batch in (1, 16):
            with context.attempt(f"{name}, batch {batch}: CUDA graphs"), torch.no_grad():
                eps = torch.randn(batch, *scene.dataset.shape, device=device)
                call = lambda sampler=sampler, eps=eps, nfe=nfe: sampler(FixedNoise([eps]), nfe, UNCONDITIONAL)
                found = {}
                for words, asked in (("plain", Sampling()), ("graphs", Sampling(cuda_graphs=True))):
                    with sampling(asked, pair.method.teacher, device):
                        found[words] = call().clone(), milliseconds(call, device, 20, 0.5, apart=True)
                apart = (found["plain"][0] - found["graphs"][0]).abs().max().item()
                context.say(verdicts.judge_equal(f"{name}, batch {batch}: samples by CUDA graphs", apart, 0.0))
                plain, fast = (median(found[words][1]) for words in ("plain", "graphs"))
                rows[f"{name}, batch {batch}"] = {"plain_ms": plain, "graphs_ms": fast}
                context.keep("latency", rows)
                figure = f"{plain:.2f} ms, {fast:.2f} ms by graphs"
                sooner = fast < 1.1 * plain
                context.say(
                    verdicts.judge(sooner, "look", f"{name}, batch {batch}: latency", figure, "graphs are no slower")
                )
    with context.attempt("CUDA graphs of three rows"):
        _captures(context)


@contextmanager
def captured() -> Iterator[list[float]]:
    """When each capture of a graph began."""
    real, seen = torch.cuda.graph, list[float]()

    def counted(*about: Any, **more: Any) -> Any:
        seen.append(time.perf_counter())
        return real(*about, **more)

    torch.cuda.graph = counted  # type: ignore[assignment,misc]
    try:
        yield seen
    finally:
        torch.cuda.graph = real  # type: ignore[misc]


def _captures(context: Context) -> None:
    """Three rows of one evaluator, 40 images in batches of 16: two shapes, of a student's network and no other."""
    pair = Pair(digits_scene(), "direct", 1000, context.device, context.folder)
    config = EvaluationConfig(images=40, batch_size=16, teacher_steps=[1], cuda_graphs=True)
    real = RealImages(pair.scene.dataset, Networks(context.folder, context.device), context.folder)
    evaluator = Evaluator(config, {}, real, pair.method.teacher, Progress(None))
    evaluator.measure(pair.method.sample, 1, 0, True, "")  # with the teacher's answers
    with captured() as seen:
        for _ in range(3):
            evaluator.measure(pair.method.sample, 1, 0, True, "")
    context.say(verdicts.judge_captures(len(seen), 2))


def throughput(context: Context) -> None:
    """Samples a second through the sampler and through the evaluator, beside a bare loop (benchmarks/sampling.py)."""
    import sampling as benchmark

    scene: Scene = unet_scene(context)
    if context.on_gpu:
        warm_up(context.device)
    images, batch, pairs = (16, 8, 2) if context.small else (1024, 256, 5)
    found = benchmark.rows(scene, images, batch, pairs, context.device, context.folder)
    rows = []
    for _, sampler, through, ours, theirs, value, interval, apart in found:
        low, _, high = interval.partition(" to ")
        what = f"{sampler} through {through} beside a bare loop"
        verdict = verdicts.judge_ratio(what, float(value), float(low), float(high), 1.1)
        context.say(verdicts.unjudged(verdict) if context.small else verdict)
        rate = images / float(ours) if float(ours) else None
        rows.append({"sampler": sampler, "through": through, "images_per_second": rate, "bare_s": float(theirs)})
        context.say(verdicts.judge_equal(f"{sampler}: samples beside a bare loop", float(apart), 1e-3))
    context.keep("throughput", rows)


def scoring(context: Context) -> None:
    """Features a second, and the time of each distance; scores on the device beside those on the CPU."""
    device, count = context.device, 32 if context.small else 10_000
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (count, 3, 32, 32), generator=generator).to(torch.uint8) for _ in range(2)]
    images[1] = (images[1] // 2 + 64).to(torch.uint8)  # another distribution
    kept, seconds = frozenset({EfficientNetLite0}), dict[str, float]()

    def seen(at: str, number: int, few: int = count) -> ImageSet:
        mine = images[number][:few]
        return ImageSet(lambda: mine.split(1000), few, (3, 32, 32), Networks(Path("."), at), kept)

    seen(device, 0, min(count, 256)).features(EfficientNetLite0)  # loads, and chooses algorithms
    a, b = seen(device, 0), seen(device, 1)
    with _timing(seconds, "features", device):
        a.features(EfficientNetLite0), b.features(EfficientNetLite0)
    rate = 2 * count / seconds["features"]
    what, enough = "features of EfficientNet-Lite0", rate > 2000 or context.small
    context.say(verdicts.judge(enough, "look", what, f"{rate:,.0f} images/s", "2,000 or more on a GPU"))
    metrics = load_registry().metrics
    for name in (f"{score}_efficientnet_lite0" for score in ("fd", "kd", "precision", "density")):
        with context.attempt(name):
            context.need(1 if context.small else 20)
            with _timing(seconds, name, device):
                value = metrics[name].cls().score(_samples(a, b))
            figure = f"{value:.4g} in {seconds[name]:.2f} s"
            what, soon = f"{name} of {count:,} images", seconds[name] < 30
            context.say(verdicts.judge(soon, "look", what, figure, "below 30 s", "it may not use the GPU"))
    context.keep("seconds", seconds | {"images": count})
    if context.on_gpu:
        few, score = min(count, 1024), metrics["fd_efficientnet_lite0"].cls().score
        mine, theirs = (score(_samples(seen(at, 0, few), seen(at, 1, few))) for at in (device, "cpu"))
        context.say(verdicts.judge_equal("Fréchet distance, relative, CUDA beside CPU", abs(mine / theirs - 1), 1e-3))


def _samples(images: ImageSet, real: ImageSet) -> Samples:
    nothing = torch.zeros(images.count, *images.shape)
    return Samples(nothing, nothing, images, real, real, False)


@contextmanager
def _timing(seconds: dict[str, float], name: str, device: str) -> Iterator[None]:
    synchronise(device)
    start = time.perf_counter()
    yield
    synchronise(device)
    seconds[name] = time.perf_counter() - start
