"""The overhead of the harness in training: step times of each method, relative to the bare loops of bare_loops.py.

    python benchmarks/overhead.py                       # all methods, digits with its mlp, and a small U-Net
    python benchmarks/overhead.py --scenes mlp --methods boot sid --pairs 60
    python benchmarks/overhead.py --against own         # one of the two loops only
    python benchmarks/overhead.py --profile boot        # where the harness's time goes

There are two bare loops. `own` uses the method's own train_step, so that the difference is the harness's loop; `hand`
is written for the method and for one kind of teacher, with all coefficients of times computed ahead. Harness and bare
loop alternate after each stretch of steps, so that a drift of the machine affects both. While the harness runs, threads
sample the memory of process and GPU 50 times a second, and the GPU's energy is measured, as in every run; while the
bare loop runs they are paused. The ratio is the median over pairs of stretches, with the 95 % bootstrap interval over
pairs. Exit code 1 if the lower end of an interval is above 1.03.

On the CPU the time is the processor time of all threads of this process, which other processes do not lengthen. On
CUDA, and with --clock wall, it is wall-clock time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from bare_loops import LOOPS
from measuring import SCENES, Pair, Ratio, Scene, machine, print_table, synchronise

ALLOWED = 1.03
WARM_UP = 2  # stretches


BARE = {"own": "its own steps in a bare loop", "hand": "the loop written by hand"}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


class Enough(Exception):
    """All stretches are measured."""


def measure(
    scene: Scene,
    name: str,
    pairs: int,
    device: str,
    folder: Path,
    now: Callable[[], float] = time.process_time,
    against: str = "hand",
) -> Ratio:
    """Seconds of a step by the harness and by a bare loop, and their ratio."""
    stretch = scene.stretch
    pair = Pair(scene, name, (pairs + WARM_UP + 1) * stretch * scene.batch, device, folder)
    after_step, number, start = pair.method.after_step, 0, 0.0
    bare: Iterator[None] = iter(())
    times: tuple[list[float], list[float]] = ([], [])

    def wrapped() -> None:
        nonlocal number, bare, start
        after_step()
        number += 1
        if number % stretch:
            return
        synchronise(device)
        middle = now()
        if number == stretch:
            bare = pair.by_hand() if against == "hand" else pair.own_steps()[1]
        else:
            times[0].append((middle - start) / stretch)
        with pair.unwatched():
            middle = now()
            for _ in range(stretch):
                next(bare)
            synchronise(device)
            times[1].append((now() - middle) / stretch)
        start = now()
        if len(times[0]) == pairs + WARM_UP:
            raise Enough

    pair.method.after_step = wrapped
    with suppress(Enough):
        pair.train(watched=True)
    ours, theirs = times[0][WARM_UP:], times[1][WARM_UP : WARM_UP + pairs]
    return Ratio.of(ours, theirs)


def profile(scene: Scene, name: str, device: str, folder: Path, steps: int, lines: int) -> None:
    """Functions of the harness's training by the time that they take themselves."""
    pair, profiler = Pair(scene, name, steps * scene.batch, device, folder), cProfile.Profile()
    prepare = pair.method.prepare

    def prepared(workspace: object) -> None:
        prepare(workspace)
        profiler.enable()

    pair.method.prepare = prepared
    pair.train()
    profiler.disable()
    print(f"{name}, {scene.name}: {steps} steps, microseconds a step = total time / {steps}")
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=["mlp", "unet"])
    parser.add_argument("--against", nargs="+", choices=BARE, default=list(BARE))
    parser.add_argument("--pairs", type=int, default=200, help="of stretches, for each method")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, help="default: cpu, and wall on CUDA")
    parser.add_argument("--profile", choices=LOOPS, metavar="METHOD", help="print where the harness's time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, worst = arguments.device, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folders = (Path(scratch) / str(number) for number in range(10**6))
        if arguments.profile:
            scene = SCENES[arguments.scenes[0]]()
            profile(scene, arguments.profile, device, next(folders), 20 * scene.stretch, 40)
            return
        clock = arguments.clock or ("cpu" if device == "cpu" else "wall")
        print(f"{machine(device)}; seconds of the {'processor' if clock == 'cpu' else 'wall clock'}")
        for scene in (SCENES[name]() for name in arguments.scenes):
            take = partial(measure, scene, pairs=arguments.pairs, device=device, now=CLOCKS[clock])
            for bare in arguments.against:
                ratios = {name: take(name, folder=next(folders), against=bare) for name in arguments.methods}
                rows = [
                    (name, f"{r.ours * 1e3:.3f}", f"{r.theirs * 1e3:.3f}", f"{r.value:.3f}", r.interval)
                    for name, r in ratios.items()
                ]
                steps = f"{arguments.pairs} pairs of {scene.stretch} step{'s' if scene.stretch > 1 else ''}"
                print(f"\n{scene.name}, batch {scene.batch}, {steps}, against {BARE[bare]}\n")
                print_table(rows, ("method", "harness ms", "bare ms", "ratio", "95 %"))
                worst = max(worst, *(ratio.low for ratio in ratios.values()))
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
