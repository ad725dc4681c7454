"""Loading a training batch: the harness's DataStream against a torch DataLoader and against a bare index.

    python benchmarks/loading.py

Images are 8-bit and in memory; a batch is drawn with replacement and returned as floats in [-1, 1] on the device.
The bare index is ``images[torch.randint(...)].float() / 127.5 - 1``; bare float images are converted once, ahead. The
DataLoader draws with a RandomSampler and collates, without processes of its own (they cost more for such images).
Reading images from files is measured by reading.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measuring import SCENES, compare, machine, print_table
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from distillbench.datasets.dataset import Dataset, to_float
from distillbench.training.data_stream import DataStream


def loaders(dataset: Dataset, batch: int, batches: int, device: str) -> dict[str, Callable[[], None]]:
    """Functions by name; each reads `batches` batches."""
    generator = torch.Generator().manual_seed(0)
    images = dataset.read(torch.arange(len(dataset)))
    floats = to_float(images).to(device)
    stream = DataStream(dataset, 0, device)
    sampler = RandomSampler(range(len(images)), replacement=True, num_samples=batch * batches, generator=generator)
    loader = DataLoader(TensorDataset(images), batch, sampler=sampler)

    def draw() -> Tensor:
        return torch.randint(len(images), (batch,), generator=generator)

    def ours() -> None:
        for _ in range(batches):
            stream.read(batch)

    def index() -> None:
        for _ in range(batches):
            images[draw()].to(device).float() / 127.5 - 1

    def float_index() -> None:
        for _ in range(batches):
            floats.index_select(0, draw().to(device))

    def torch_loader() -> None:
        for (x,) in loader:
            x.to(device).float() / 127.5 - 1

    return {"": ours, "bare index": index, "bare float images": float_index, "torch DataLoader": torch_loader}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=["mlp", "unet"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=50, help="of one timing")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(arguments.device))
    found = []
    for name in arguments.scenes:
        scene = SCENES[name]()
        calls = loaders(scene.dataset, arguments.batch, arguments.batches, arguments.device)
        ours = calls.pop("")
        for title, theirs in calls.items():
            ratio = compare(ours, theirs, arguments.pairs, arguments.device)
            microseconds = (f"{1e6 * value / arguments.batches:.0f}" for value in (ratio.ours, ratio.theirs))
            found.append((scene.dataset.name, title, *microseconds, f"{ratio.value:.3f}", ratio.interval))
    print_table(found, ("images", "against", "DataStream us", "theirs us", "ratio", "95 %"))


if __name__ == "__main__":
    main()
