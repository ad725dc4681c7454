"""Scoring 2,048 images of 32x32 on EfficientNet-Lite0 against the bare forward passes; the Fréchet distance against
torch-fidelity's and clean-fid's. Prints medians and ratios.

    python benchmarks/scoring.py

Scoring is all that a row costs beside sampling: blocks, resizing, features, moments and the distance. Bare is timm's
network alone, as it is loaded (ours has its batch norms folded), on inputs that are ready, in the same blocks. Pairs
are measured in turn, so that a machine that drifts moves both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from distillbench.builtin.efficientnet_lite0 import EfficientNetLite0, network_input
from distillbench.features import ImageSet, Networks, full_precision
from distillbench.frechet import GaussianStatistics, frechet_distance

IMAGES, SIDE, PAIRS = 2048, 32, 5
FEATURES, WIDTH = 5000, 2048


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(title: str, ours: Callable[[], object], theirs: Callable[[], object], allowed: float) -> None:
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(PAIRS)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(x / y for x, y in pairs)
    print(f"{title}: {a:.2f} s against {b:.2f} s, ratio {ratio:.3f} (allowed {allowed})")


def scoring() -> None:
    import timm

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), generator=generator).to(torch.uint8)
    networks = Networks(Path("."), "cpu")
    network = networks.get(EfficientNetLite0)
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval().to(memory_format=torch.channels_last)
    inputs = [network_input(x).to(memory_format=torch.channels_last) for x in images.split(network.batch)]
    real = GaussianStatistics.of(torch.randn(FEATURES, EfficientNetLite0.width, generator=generator))
    assert real.cholesky is not None  # kept from row to row, as of a run's real images

    def score() -> float:
        seen = ImageSet(lambda: images.split(1000), IMAGES, (3, SIDE, SIDE), networks)
        return frechet_distance(real, seen.statistics(EfficientNetLite0))

    def bare() -> None:
        with torch.inference_mode(), full_precision():
            for x in inputs:
                plain(x)

    compare(f"scoring {IMAGES} images of {SIDE}x{SIDE} / bare forward passes", score, bare, 1.05)


def frechet() -> None:
    from cleanfid.fid import frechet_distance as frechet_distance_of_clean_fid
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -3, WIDTH, dtype=torch.float64)
    x, y = (torch.randn(FEATURES, WIDTH, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    a, b = fid_features_to_statistics(x), fid_features_to_statistics(1.1 * y)

    def ours() -> float:  # anew each time, nothing kept
        mine = [GaussianStatistics(FEATURES, torch.from_numpy(s["mu"]), torch.from_numpy(s["sigma"])) for s in (a, b)]
        return frechet_distance(*mine)

    def fidelity() -> float:
        return next(iter(fid_statistics_to_metric(a, b, False).values()))

    def clean() -> float:
        return float(frechet_distance_of_clean_fid(a["mu"], a["sigma"], b["mu"], b["sigma"]))

    for name, theirs in (("torch-fidelity", fidelity), ("clean-fid", clean)):
        print(f"distances differ by {abs(ours() / theirs() - 1):.1e}, relative")
        compare(f"{WIDTH}-d Fréchet distance / {name}'s", ours, theirs, 0.7)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    scoring()
    frechet()


if __name__ == "__main__":
    main()
