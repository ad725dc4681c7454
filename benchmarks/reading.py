"""Speed of reading images, relative to training on them: images per second, and time of reading over time of a step.

    python benchmarks/reading.py IMAGES.zip

The step is forward, backward and Adam of a tiny U-Net (width 16, one block a level) on one thread, at the dataset's
own shape. Reading is measured from the source (nothing kept: ``memory_mib=0``) and from memory, as in later epochs.
Batches of reading and training alternate, so that a drift of the machine affects both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distillbench.builtin.folder import Folder
from distillbench.datasets.dataset import to_float
from distillbench.networks.architectures import UNet

WIDTH, DEPTH, ROUNDS = 16, 1, 7


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def training_step(shape: tuple[int, int, int]) -> Callable[[Tensor], None]:
    network = UNet(shape, WIDTH, DEPTH)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        network(x, torch.rand(len(x)), None, None).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Reading images against training on them.")
    parser.add_argument("path", help="images: a zip, a folder or another source")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=Folder.Config().workers)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def opened(memory_mib: int) -> Folder:
        settings = {"resolution": arguments.resolution, "workers": arguments.workers, "memory_mib": memory_mib}
        return Folder(Folder.Config(path=arguments.path, **settings))

    cold, warm = opened(0), opened(1 << 20)
    warm.read(torch.arange(len(warm)))
    step = training_step(cold.shape)
    generator = torch.Generator().manual_seed(0)
    times: list[tuple[float, ...]] = []
    for _ in range(ROUNDS + 2):
        indices = torch.randint(len(cold), (arguments.batch,), generator=generator)
        x = to_float(warm.read(indices))
        reads = [seconds(partial(dataset.read, indices)) for dataset in (cold, warm)]
        times.append((*reads, seconds(partial(step, x))))
    source, memory, training = zip(*times[2:], strict=True)
    step_s = statistics.median(training)
    print(f"{len(cold)} images of {cold.shape}, batches of {arguments.batch}, {arguments.workers} workers")
    print(f"training step: {step_s * 1e3:.1f} ms, {arguments.batch / step_s:,.0f} images/s")
    for name, took in (("source", source), ("memory", memory)):
        median = statistics.median(took)
        ratio = statistics.median(a / b for a, b in zip(took, training, strict=True))
        rate = arguments.batch / median
        print(f"from {name}: {median * 1e3:.2f} ms, {rate:,.0f} images/s, reading / training step {ratio:.4f} (< 1)")


if __name__ == "__main__":
    main()
