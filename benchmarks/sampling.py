"""Sampling through the harness against a bare loop of forward passes of the same network.

    python benchmarks/sampling.py

One step is direct distillation's student, DDIM with 8 steps is the teacher. `method.sample` is the sampler alone, on
given noise, in batches of 256 (U-Net: 32); `Evaluator` also draws the noise of each image (with one generator each),
checks the samples and gathers them, as in a run. The bare loop gets its noise. Both are measured alternately.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bare_loops import THETA_1, angle
from measuring import SCENES, Pair, Scene, compare, machine, print_table
from torch import Tensor

from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import Solver
from distillbench.evaluation.evaluator import Evaluator, teacher_sampler
from distillbench.evaluation.features import Networks
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.system.progress import Progress

STEPS = 8


def bare(network: torch.nn.Module, eps: Tensor, steps: int) -> Tensor:
    """DDIM in angles on a uniform grid: x_0 (B,C,H,W)."""
    x = math.sin(THETA_1) * eps
    for k in range(steps, 0, -1):
        theta, phi = angle(k / steps), angle((k - 1) / steps)
        v = network(x, x.new_full((len(x),), k / steps))
        if k > 1:
            x = math.cos(phi - theta) * x + math.sin(phi - theta) * v
    return math.cos(theta) * x - math.sin(theta) * v


def rows(scene: Scene, images: int, batch: int, pairs: int, device: str, folder: Path) -> list[tuple[str, ...]]:
    pair = Pair(scene, "direct", images, device, folder)
    student, teacher = pair.method, pair.method.teacher
    config = EvaluationConfig(images=images, batch_size=batch, teacher_steps=[1])
    real = RealImages(scene.dataset, Networks(folder, device), folder)
    evaluator = Evaluator(config, {}, real, teacher, Progress(None))
    parts = torch.randn(images, *scene.dataset.shape, device=device).split(batch)
    samplers: dict[str, tuple[Callable, torch.nn.Module, int]] = {
        "one step": (student.sample, student.student.network, 1),
        f"DDIM-{STEPS}": (teacher_sampler(teacher, Solver.parse("ddim")), teacher.denoiser.network, STEPS),
    }
    found = []
    for name, (sample, network, nfe) in samplers.items():

        @torch.no_grad()
        def alone(sample: Callable = sample, nfe: int = nfe) -> Tensor:
            made = [sample(FixedNoise([eps]), nfe, UNCONDITIONAL).clamp(-1, 1).cpu() for eps in parts]
            return torch.cat(made)

        def whole(sample: Callable = sample, nfe: int = nfe) -> None:
            evaluator.measure(sample, nfe, 0, True, "")

        @torch.no_grad()
        def loop(network: torch.nn.Module = network, nfe: int = nfe) -> Tensor:
            return torch.cat([bare(network, eps, nfe).clamp(-1, 1).cpu() for eps in parts])

        apart = (alone() - loop()).abs().max().item()
        for what, call in (("method.sample", alone), ("Evaluator", whole)):
            ratio = compare(call, loop, pairs, device)
            numbers = f"{ratio.ours:.3f}", f"{ratio.theirs:.3f}", f"{ratio.value:.3f}", ratio.interval, f"{apart:.0e}"
            found.append((scene.name, name, what, *numbers))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=["mlp", "unet"])
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"mlp": (2048, 256), "unet": (128, 32), "tiny": (32, 16)}
    print(machine(arguments.device))
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.scenes:
            found += rows(SCENES[name](), *sizes[name], arguments.pairs, arguments.device, Path(scratch))
    headers = "scene", "sampler", "through", "harness s", "bare s", "ratio", "95 %", "largest difference"
    print_table(found, headers)


if __name__ == "__main__":
    main()
