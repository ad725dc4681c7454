"""Methods that sample in several steps, which begin at noise levels that are chosen after training.

The first step begins at the highest level of the method's grid. The others begin at levels that are spread evenly over
the grid's indices, or at levels tau = sigma / alpha from the setting ``sampling_levels``, as papers state them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.consistency import (
    ConsistencyFunction,
    multistep,
    segment_edges,
    segment_start,
    segmentwise,
)
from distillbench.errors import UserError
from distillbench.options import Among, option, require_between
from distillbench.teachers.teacher import Teacher
from distillbench.training.method import Method, MethodConfig

__all__ = ["MultistepMethod", "SegmentedMethod"]


def _checked(levels: Any) -> list[float]:
    """The levels of the setting for one number of evaluations."""
    if not isinstance(levels, list) or not levels or any(type(level) not in (int, float) for level in levels):
        raise UserError(f"sampling_levels must be a list of lists of numbers, such as [[0.8]], got {levels!r} in it")
    falling = [float(level) for level in levels]
    if not all(high > low for high, low in itertools.pairwise([math.inf, *falling, 0.0])):
        raise UserError(f"sampling_levels must list positive noise levels that fall, got {levels}")
    return falling


class MultistepMethod(Method):
    """A method whose ``sample`` begins its steps at ``sampling_times(nfe)``.

    `grid`: ascending times, (N,) float64, N > 1. Sampling starts at the last of them, and at the first no step begins.
    """

    grid: Tensor

    @dataclass
    class Config(MethodConfig):
        """Settings of such a method. Its own Config derives from this one."""

        sampling_levels: list = option(  # of lists of float, which OmegaConf refuses if they have an int
            [],
            "noise levels of steps after the first, [[A],[B,C]] for 2, 3 NFE; else of the grid",
            sampling=True,
            search=Among([[], [[0.2]], [[0.4]], [[0.8]], [[1.6]], [[3.2]], [[6.4]]]),
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            self.sampling_levels = [_checked(levels) for levels in self.sampling_levels]
            counts = [len(levels) for levels in self.sampling_levels]
            if len(set(counts)) != len(counts):
                raise UserError(
                    "sampling_levels must have one list for each number of evaluations: with one level for two, with "
                    f"two levels for three, and so on, got {self.sampling_levels}"
                )

        def require_free_levels(self, free: bool, setting: str) -> None:
            """Raise :class:`UserError` if levels are given but not `free` to choose, which `setting` decides."""
            if self.sampling_levels and not free:
                fixed = f"sampling_levels must be [] with {setting}={getattr(self, setting)}"
                raise UserError(f"{fixed}, which fixes the levels in training, got {self.sampling_levels}")

    def __init__(self, config: Any, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self._chosen: dict[tuple[float, ...], Tensor] = {}  # by their levels: no copy to a GPU for each batch

    @property
    def sampling_grid(self) -> Tensor:
        """The grid in sampling, if it is not the same as in training."""
        return self.grid

    def supports(self, nfe: int) -> bool:
        return 1 <= nfe < len(self.sampling_grid)

    def keeps_noise(self, nfe: int) -> bool:
        """With one evaluation; as a rule, more add fresh noise."""
        return nfe == 1

    def sampling_times(self, nfe: int) -> Tensor:
        """The ascending times for samplers that spread `nfe` steps evenly over the indices of a grid.

        They are the grid, or, with levels for this number of evaluations, its ends and the times of these levels,
        (nfe + 1,). Raises UserError for levels that are not between those of the grid's ends.
        """
        levels = next((levels for levels in self.config.sampling_levels if len(levels) == nfe - 1), None)
        if levels is None:
            return self.sampling_grid
        if tuple(levels) not in self._chosen:
            self._chosen[tuple(levels)] = self._times_of(levels)
        return self._chosen[tuple(levels)]

    def levels_at(self, nfe: int) -> list[float]:
        """The noise levels at which the steps after the first begin with `nfe` evaluations, falling."""
        times = self.sampling_times(nfe)
        begin = torch.linspace(len(times) - 1, 0, nfe + 1)[1:-1].round().long()
        return list(self.teacher.schedule.noise_level(times[begin.to(times.device)]).tolist())

    def _times_of(self, levels: list[float]) -> Tensor:
        schedule, grid = self.teacher.schedule, self.sampling_grid
        low, high = schedule.noise_level(grid[[0, -1]]).tolist()
        if not low < levels[-1] <= levels[0] < high:
            raise UserError(
                f"{self.name}: sampling_levels must lie between the ends of its grid, {low:.4g} and {high:.4g}, "
                f"got {levels}"
            )
        lam = torch.tensor(levels[::-1], dtype=torch.float64, device=grid.device).log()
        return torch.cat([grid[:1], schedule.t_of_lam(lam), grid[-1:]])

    def check_levels(self) -> None:
        """Raise UserError for levels outside the grid, or for a number of evaluations with which it cannot sample."""
        for levels in self.config.sampling_levels:
            if not self.supports(nfe := len(levels) + 1):
                able = ", ".join(str(n) for n in range(2, 1025) if self.supports(n)) or "none above 1"
                raise UserError(
                    f"{self.name}: sampling_levels has levels for {nfe} evaluations, {levels}, and it samples with: "
                    f"{able}"
                )
            self.sampling_times(nfe)


class SegmentedMethod(MultistepMethod):
    """A consistency model, of the whole trajectory or of each of its K segments.

    With K = 1 it samples by algorithm 1 of Song et al. 2023 (arXiv:2303.01469), in any number of steps. Otherwise the
    student maps each segment of the grid to the segment's own start (Heek et al. 2024, arXiv:2403.06807), in K
    evaluations without fresh noise.
    """

    student: ConsistencyFunction

    @dataclass
    class Config(MultistepMethod.Config):
        """Settings of such a method."""

        segments: int = option(1, "K, segments of the grid and evaluations of a sample; 1: any number of evaluations")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_between(self, 1, float("inf"), "segments")
            self.require_free_levels(self.segments == 1, "segments")

    def __init__(self, config: Any, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self._edges: tuple[Tensor, int, Tensor] | None = None  # a grid, its version, and its edges

    @property
    def edges(self) -> Tensor:
        """e_0 < ... < e_K, (K+1,), times of the grid. Computed again only if the grid is another or was changed."""
        grid = self.sampling_grid
        if self._edges is None or self._edges[0] is not grid or self._edges[1] != grid._version:
            self._edges = grid, grid._version, segment_edges(grid, self.config.segments)
        return self._edges[2]

    def segment_end(self, t: Tensor) -> tuple[Tensor, ...]:
        """Where F maps x_t to, as its last argument: (e_j,) with e_j < t <= e_(j+1), shape of t; () with K = 1."""
        return () if self.config.segments == 1 else (segment_start(self.edges, t),)

    def supports(self, nfe: int) -> bool:
        return super().supports(nfe) if self.config.segments == 1 else nfe == self.config.segments

    def keeps_noise(self, nfe: int) -> bool:
        return nfe == self.config.segments

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        if self.config.segments > 1:
            return segmentwise(self.student, self.edges, noise(0), c)
        return multistep(self.student, self.sampling_times(nfe), noise, nfe, c)
