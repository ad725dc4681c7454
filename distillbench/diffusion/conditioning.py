"""Conditioning of a batch: classes or texts, and the weight of classifier-free guidance.

Classifier-free guidance (Ho & Salimans 2021, arXiv:2207.12598) in the one convention of this project, Imagen's:

    f_w = f_0 + w (f_c - f_0),     w = 1 is no guidance; Ho & Salimans' own w is w - 1

| symbol       | meaning                                                | shape      |
|--------------|--------------------------------------------------------|------------|
| c            | condition: labels, w, text, image                      | of a batch |
| labels       | classes 0, ..., classes - 1; `classes` stands for none | (B,) int64 |
| text         | texts as the teacher's text encoder gives them         | (B,L,D)    |
| image        | images that an upscaler enlarges                       | (B,C,h,w)  |
| augmentation | labels of an augmented image, 0 for none               | (B,9)      |
| w            | guidance weight                                        | (B,1,1,1)  |
| f_c          | denoiser given the class                               | (B,C,H,W)  |
| f_0          | denoiser given no class                                | (B,C,H,W)  |

Texts have labels too: label i is prompt i of the dataset, and the label for none is the empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distillbench.diffusion.noise import Noise, stream_key, uniform
from distillbench.system.transfers import to_device

__all__ = ["UNCONDITIONAL", "WITHOUT_CLASSES", "Condition", "Conditioning"]


@dataclass(frozen=True)
class Condition:
    """The condition of each image of a batch. A method passes it to every network that it evaluates."""

    labels: Tensor | None = None  # None: unconditional
    w: Tensor | None = None  # None: not guided
    guides: bool = True  # False: w is 1 everywhere; the student has it as an input, the teacher is evaluated once
    text: Tensor | None = None
    image: Tensor | None = None
    augmentation: Tensor | None = None  # None: images are as in the dataset, as with labels of 0

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """The condition of some images of the batch, such as ``c[:10]``, or those at the indices `rows`."""
        return self.of_rows(lambda part: part[rows])

    def of_rows(self, pick: Callable[[Tensor], Tensor]) -> Condition:
        """The condition of the images whose rows `pick` takes from a tensor of the batch."""
        own = (self.labels, self.w, self.text, self.image, self.augmentation)
        labels, w, text, image, augmentation = (None if part is None else pick(part) for part in own)
        return Condition(labels, w, self.guides, text, image, augmentation)


UNCONDITIONAL = Condition()


class Texts(Protocol):
    """Encoded prompts, by label."""

    def __call__(self, labels: Tensor, device: torch.device) -> Tensor:
        """(B,L,D) on `device`, of `labels` (B,) on any device; the label after the last prompt has the empty text."""

    def empty(self, count: int, device: torch.device) -> Tensor:
        """The empty text, `count` times: (count,L,D)."""

    def seconds(self, count: int) -> float:
        """Seconds that the encoding of `count` of the prompts took."""


class SmallImages(Protocol):
    """The images that an upscaler enlarges: samples of the base model from its own noise."""

    shape: tuple[int, int, int]  # of the base model's noise

    def __call__(self, eps: Tensor, c: Condition) -> Tensor:
        """Images from `eps` (B, *shape) for condition `c`, as the upscaler takes them; without gradients."""


@dataclass(frozen=True)
class Conditioning:
    """Conditions of a run: one of `classes` (0: unconditional), and a guidance weight w, fixed or from `w_range`.

    Evaluation uses the classes in `evaluated`, training the classes before them (prompts: training prompts come
    first). If `evaluated` is None, both use all classes.
    """

    classes: int = 0
    w: float = 1.0
    w_range: tuple[float, float] | None = None  # training draws w uniformly and feeds it to the student
    evaluated: range | None = None
    texts: Texts | None = field(default=None, compare=False)
    small: SmallImages | None = field(default=None, compare=False)

    @property
    def guided(self) -> bool:
        return self.w_range is not None or self.w != 1

    @property
    def evaluations(self) -> int:
        """Network evaluations of the teacher's denoiser for one image of the evaluation, which is guided by `w`."""
        return 1 if self.w == 1 else 2

    @property
    def trained(self) -> int:
        """The number of classes in training: 0, ..., trained - 1."""
        return self.classes if self.evaluated is None else self.evaluated.start

    def draw(
        self,
        size: int,
        generator: torch.Generator,
        device: str,
        labels: Tensor | None,
        share: Callable[[Tensor], Tensor] = lambda rows: rows,
        drop: float = 0.0,
    ) -> Condition:
        """The condition of a training batch: of its real images' `labels`, or of random classes where there are none.

        Random numbers are drawn for all `size` images; `share` picks this rank's rows, and `labels` has only these.
        If the run is guided, each image has no class with probability `drop`.
        """
        if not self.classes:
            return UNCONDITIONAL
        on = generator.device
        if labels is None:
            labels = share(torch.randint(0, self.trained, (size,), generator=generator, device=on))
        if drop and self.guided:
            without = share(torch.rand(size, generator=generator, device=on) < drop)
            labels = torch.where(without.to(labels.device), self.classes, labels)
        w = None
        if self.w_range is not None:
            low, high = self.w_range
            w = share(low + (high - low) * torch.rand(size, generator=generator, device=on, dtype=torch.float64))
        eps = None
        if self.small is not None:
            dtype = torch.get_default_dtype()
            eps = share(torch.randn(size, *self.small.shape, generator=generator, device=on, dtype=dtype))
        return self._condition(labels, w, eps, device)

    def of_images(self, indices: Sequence[int], device: str) -> Condition:
        """The condition of the images `indices` of an evaluation: class i mod their number, guided by `w`."""
        if not self.classes:
            return UNCONDITIONAL
        labels = self.labels_of_images(indices)
        return self._condition(labels, None, self._small_noise(stream_key("small images", 0), indices), device)

    def labels_of_images(self, indices: Sequence[int]) -> Tensor:
        """(N,) int64: the classes in evaluation."""
        asked = self.evaluated or range(self.classes)
        return torch.tensor([asked[index % len(asked)] for index in indices], dtype=torch.int64)

    def of_pairs(self, stream: int, indices: Sequence[int], device: str) -> Condition:
        """The condition of noise-image pairs: class i mod their number; w, where drawn, belongs to the pair's index."""
        if not self.classes:
            return UNCONDITIONAL
        w = None
        if self.w_range is not None:
            low, high = self.w_range
            w = low + (high - low) * torch.from_numpy(uniform(stream, indices))
        labels = torch.tensor([index % self.trained for index in indices], dtype=torch.int64)
        return self._condition(labels, w, self._small_noise(stream, indices), device)

    def example(self, count: int, device: torch.device) -> Condition:
        """A condition of `count` images with the right shapes, without w: class 0, the empty text, a grey image."""
        if not self.classes:
            return UNCONDITIONAL
        labels = torch.zeros(count, dtype=torch.int64, device=device)
        image = None if self.small is None else torch.zeros(count, *self.small.shape, device=device)
        return Condition(labels, text=None if self.texts is None else self.texts.empty(count, device), image=image)

    def none(self, c: Condition) -> Condition:
        """The same images without class, text and guidance."""
        assert c.labels is not None
        labels = torch.full_like(c.labels, self.classes)
        text = None if self.texts is None else self.texts.empty(len(labels), labels.device)
        return Condition(labels, text=text, image=c.image, augmentation=c.augmentation)

    def _small_noise(self, stream: int, indices: Sequence[int]) -> Tensor | None:
        return None if self.small is None else Noise(stream, indices, self.small.shape)(0)

    def _condition(self, labels: Tensor, w: Tensor | None, eps: Tensor | None, device: str) -> Condition:
        there = to_device(labels, device)
        c = Condition(there, text=None if self.texts is None else self.texts(labels, there.device))
        if self.small is not None and eps is not None:
            c = replace(c, image=self.small(to_device(eps, device), c))
        if not self.guided:
            return c
        guides = w is not None or self.w != 1
        w = torch.full((len(labels),), self.w, dtype=torch.float64, device=device) if w is None else w
        return replace(c, w=to_device(w.view(-1, 1, 1, 1), device).to(torch.get_default_dtype()), guides=guides)

    def plain(self) -> dict[str, Any]:
        """What a training depends on, as plain values; where w is drawn, the w of evaluation is not part of it."""
        if not self.classes:
            return {}
        drawn = self.w_range is not None
        return {"classes": self.classes, "guidance_range" if drawn else "guidance": list(self.w_range or [self.w])}

    def evaluation_identity(self) -> dict[str, Any]:
        """What the conditions of an evaluation depend on, as plain values."""
        evaluated = None if self.evaluated is None else [self.evaluated.start, self.evaluated.stop]
        return {"classes": self.classes, "w": self.w, "evaluated": evaluated} if self.classes else {}


WITHOUT_CLASSES = Conditioning()
