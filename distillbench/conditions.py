"""What images are asked for: a class, and how strongly the teacher is guided towards it.

Classifier-free guidance (Ho & Salimans 2021, arXiv:2207.12598) in the one convention of this project, Imagen's:

    f_w = f_0 + w (f_c - f_0),     w = 1 is none; Ho & Salimans write w - 1 for it

| symbol | meaning                                                | shape             |
|--------|--------------------------------------------------------|-------------------|
| c      | condition: labels and w                                | of a batch        |
| labels | classes 0, ..., classes - 1; `classes` stands for none | (B,) int64        |
| w      | guidance weight                                        | (B,1,1,1)         |
| f_c    | denoiser given the class                               | (B,C,H,W)         |
| f_0    | denoiser given no class                                | (B,C,H,W)         |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillbench.noise import uniform


@dataclass(frozen=True)
class Condition:
    """What each image of a batch is asked to be. A method hands it on to every network that it evaluates."""

    labels: Tensor | None = None  # None: unconditional
    w: Tensor | None = None  # None: not guided
    guides: bool = True  # False: w is 1 throughout; a student is told it, the teacher needs no second evaluation

    def __getitem__(self, rows: slice) -> Condition:
        """The condition of some images of the batch, such as ``c[:10]``."""
        labels = None if self.labels is None else self.labels[rows]
        return Condition(labels, None if self.w is None else self.w[rows], self.guides)


UNCONDITIONAL = Condition()


@dataclass(frozen=True)
class Conditioning:
    """How a run conditions: on one of `classes` (0: not at all), and guided by w, or by w drawn from `w_range`."""

    classes: int = 0
    w: float = 1.0
    w_range: tuple[float, float] | None = None  # training draws w uniformly and feeds it to the student

    @property
    def guided(self) -> bool:
        return self.w_range is not None or self.w != 1

    @property
    def evaluations(self) -> int:
        """Network evaluations of the teacher's answer to one image of an evaluation, which is guided by `w`."""
        return 1 if self.w == 1 else 2

    def draw(self, size: int, generator: torch.Generator, device: str, labels: Tensor | None) -> Condition:
        """The condition of a training batch: of its real images' `labels`, or of random classes where there are none.

        `labels` (size,) int64.
        """
        if not self.classes:
            return UNCONDITIONAL
        if labels is None:
            labels = torch.randint(0, self.classes, (size,), generator=generator)
        w = None
        if self.w_range is not None:
            low, high = self.w_range
            w = low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)
        return self._condition(labels, w, device)

    def of_images(self, indices: Sequence[int], device: str) -> Condition:
        """The condition of the images `indices` of an evaluation: class i mod `classes`, guided by `w`."""
        return self._condition(self._labels(indices), None, device) if self.classes else UNCONDITIONAL

    def of_pairs(self, stream: int, indices: Sequence[int], device: str) -> Condition:
        """The condition of noise-image pairs: class i mod `classes`, w from the pair's own name where it is drawn."""
        if not self.classes:
            return UNCONDITIONAL
        w = None
        if self.w_range is not None:
            low, high = self.w_range
            w = low + (high - low) * torch.from_numpy(uniform(stream, indices))
        return self._condition(self._labels(indices), w, device)

    def _labels(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor([index % self.classes for index in indices], dtype=torch.int64)

    def _condition(self, labels: Tensor, w: Tensor | None, device: str) -> Condition:
        if not self.guided:
            return Condition(labels.to(device))
        guides = w is not None or self.w != 1
        w = torch.full((len(labels),), self.w) if w is None else w
        return Condition(labels.to(device), w.view(-1, 1, 1, 1).to(device, torch.get_default_dtype()), guides)

    def plain(self) -> dict[str, Any]:
        """What decides a training, as plain values; where w is drawn, the w of evaluation is not part of it."""
        if not self.classes:
            return {}
        drawn = self.w_range is not None
        return {"classes": self.classes, "guidance_range" if drawn else "guidance": list(self.w_range or [self.w])}


WITHOUT_CLASSES = Conditioning()
