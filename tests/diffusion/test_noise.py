"""Noise by name: what it depends on, what it does not, and that it is standard normal."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from scipy.stats import kstest

from distillbench.diffusion.noise import FixedNoise, Noise, prefetched, stream_key

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (2, 3, 4)


def draw(stream: int, indices, k: int = 0, shape=SHAPE) -> torch.Tensor:
    return Noise(stream, indices, shape)(k)


def test_noise_of_an_image_does_not_depend_on_the_batch_or_the_order():
    stream = stream_key("evaluation", 3)
    together = draw(stream, range(10), k=2)
    for size in (1, 3, 10):
        parts = [draw(stream, range(first, min(first + size, 10)), k=2) for first in range(0, 10, size)]
        assert torch.equal(torch.cat(parts), together)
    order = [7, 0, 9, 7]
    assert torch.equal(draw(stream, order, k=2), together[order])


def test_noise_of_an_image_can_be_asked_for_again_in_any_order_of_draws():
    noise = Noise(stream_key("evaluation", 0), range(4), SHAPE)
    second, first = noise(1), noise(0)
    assert torch.equal(noise(0), first) and torch.equal(noise(1), second)


class Noted(Noise):
    """Notes which draws are made, and in which thread; in memory of the CPU."""

    def __init__(self, name: str, drawn: list) -> None:
        super().__init__(stream_key("evaluation", 0), [ord(name)], SHAPE)
        self.name, self.noted = name, drawn

    def drawn(self, k: int) -> torch.Tensor:
        self.noted.append((f"{self.name}{k}", threading.current_thread() is threading.main_thread()))
        return super().drawn(k)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_noise_that_is_drawn_ahead_is_the_same(device):
    """For a GPU by a thread, and fresh noise too once it is expected."""
    drawn: list[tuple[str, bool]] = []
    for name, noise in zip("abc", prefetched((Noted(name, drawn) for name in "abc"), device), strict=True):
        for k in (0, 0, 1, 2):
            assert torch.equal(noise(k), draw(noise.indices and stream_key("evaluation", 0), [ord(name)], k))
        assert list(noise.indices) == [ord(name)]
    here = [call for call, main in drawn if main]
    if device == "cpu":
        assert here == [f"{name}{k}" for name in "abc" for k in (0, 0, 1, 2)]
    else:
        assert here == ["a1", "a2"]  # of the first batch nobody knew that they would be asked for
        calls = [call for call, _ in drawn]
        assert sorted(calls) == sorted(f"{name}{k}" for name in "abc" for k in range(3))


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = draw(5, range(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw(5, range(3)), a)


def test_streams_indices_and_draws_are_unrelated():
    """Correlations of 20 000 pairs stay within 5 / sqrt(n) of 0."""
    n, shape = 5000, (2, 2, 1)
    base = draw(stream_key("evaluation", 0), range(n), 0, shape)
    others = {
        "purpose": draw(stream_key("pairs", 0), range(n), 0, shape),
        "seed": draw(stream_key("evaluation", 1), range(n), 0, shape),
        "draw": draw(stream_key("evaluation", 0), range(n), 1, shape),
        "index": draw(stream_key("evaluation", 0), range(1, n + 1), 0, shape),
        "pixel": base.flip(1),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(base.numel()), name


def test_streams_of_different_purposes_and_seeds_have_different_names():
    names = {stream_key(purpose, seed) for purpose in ("pairs", "evaluation", "timing") for seed in range(50)}
    assert len(names) == 150
    assert stream_key("pairs", 1) != stream_key("pairs/1", 0)
    assert all(0 <= name < 2**64 for name in names)


def test_all_64_bits_of_a_name_count():
    """A float64 on the way would round neighbouring names above 2^53 to one."""
    for stream in (1, 2**53, 2**63, 2**64 - 2):
        assert not torch.equal(draw(stream, range(2)), draw(stream + 1, range(2)))


def test_draws_of_a_large_image_do_not_run_into_the_next_draw():
    """Draw k + 1 must not be a later part of draw k's sequence: no value of it occurs there."""
    shape = (3, 64, 64)
    first, second = draw(9, [0], 0, shape).flatten(), draw(9, [0], 1, shape).flatten()
    next_image = draw(9, [1], 0, shape).flatten()
    for other in (second, next_image):  # equal float32 values occur by chance, equal runs of three do not
        runs = {tuple(run) for run in first.unfold(0, 3, 1).tolist()}
        assert not any(tuple(run) in runs for run in other.unfold(0, 3, 1).tolist())


def test_noise_is_standard_normal():
    """Mean, variance, skewness, kurtosis within 5 standard errors, and Kolmogorov-Smirnov, on 60 000 numbers."""
    x = draw(stream_key("evaluation", 0), range(2500)).flatten()
    n = len(x)
    moments = [(x.mean(), 0, 1), (x.square().mean(), 1, 2), ((x**3).mean(), 0, 15), ((x**4).mean(), 3, 96)]
    for moment, expected, variance in moments:
        assert abs(moment.item() - expected) < 5 * math.sqrt(variance / n)
    assert kstest(x.numpy(), "norm").pvalue > 1e-3


def test_noise_comes_in_the_default_dtype_from_the_same_float32_numbers():
    wide = draw(1, range(3))
    torch.set_default_dtype(torch.float32)
    narrow = draw(1, range(3))
    assert wide.dtype is torch.float64 and narrow.dtype is torch.float32
    assert torch.equal(wide.float(), narrow) and wide.shape == (3, *SHAPE)


def test_fixed_noise_gives_what_it_was_given():
    draws = [torch.zeros(1), torch.ones(1)]
    assert FixedNoise(draws)(1) is draws[1]
