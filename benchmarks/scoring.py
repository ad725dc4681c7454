"""Time of scoring 2,048 images of 32x32 on EfficientNet-Lite0, relative to the bare forward passes.

Also the Fréchet distance, compared with torch-fidelity and clean-fid. Prints medians and ratios.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --pairs 1      # their distances take most of a minute each

Scoring is the cost of a row without sampling: resizing, features, moments and the distance. The bare forward passes are
those of timm's network as loaded (ours has its batch norms folded), on prepared inputs, in the same batches. Both are
measured alternately, so that a drift of the machine affects both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measuring import Ratio, compare, machine, print_table

from distillbench.builtin.efficientnet_lite0 import EfficientNetLite0, network_input
from distillbench.evaluation.features import ImageSet, Networks, full_precision
from distillbench.evaluation.frechet import GaussianStatistics, frechet_distance

IMAGES, SIDE = 2048, 32
FEATURES, WIDTH = 5000, 2048


def scoring(pairs: int) -> Ratio:
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

    return compare(score, bare, pairs, wall=True)


def frechet(pairs: int) -> dict[str, tuple[Ratio, float]]:
    """Of each library: seconds, and how far its distance is from ours, relative."""
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

    found = {}
    for name, theirs in (("torch-fidelity", fidelity), ("clean-fid", clean)):
        values: list[float] = []
        ratio = compare(ours, lambda theirs=theirs, values=values: values.append(theirs()), pairs, wall=True)
        found[name] = ratio, abs(ours() / values[0] - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    print(machine())
    ratios: dict[str, tuple[Ratio, float | None]] = {"timm, forward passes alone": (scoring(pairs), None)}
    ratios |= {f"{name}, distance of {WIDTH} features": of for name, of in frechet(pairs).items()}
    rows = [
        (name, f"{r.ours:.2f}", f"{r.theirs:.2f}", f"{r.value:.3f}", r.interval, "" if off is None else f"{off:.1e}")
        for name, (r, off) in ratios.items()
    ]
    print_table(rows, ("against", "ours s", "theirs s", "ratio", "95 %", "difference"))


if __name__ == "__main__":
    main()
