"""Looks at the student's samples along training: a cheap score, and a warning if the samples collapse.

The losses of methods that match distributions do not say whether the student improves. A look samples the averaged
student from noise of its own. It is outside the budget, and the training goes on as without it, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn

from distillbench.training.method import Method

MOST = 0.02  # of the network evaluations of a training: what all looks together may take
COLLAPSED = 0.5  # a spread below it is a warning ...
SETTLED = 0.5  # ... from this share of the budget on, or once it has been higher: one-step students begin blurred


@dataclass(frozen=True)
class ProgressPoint:
    """What a look at the averaged student saw, sampled with `nfe` evaluations at `fraction` of the budget."""

    fraction: float
    images: int
    nfe: int
    fd_8x8: float | None  # Fréchet distance of 8x8 pixels to the reference; None: samples that are not finite
    spread: float | None  # standard deviation of the samples over that of the reference, means over pixels


class Look(Protocol):
    """Scores samples of a method."""

    reference: str  # what samples are compared with, in words

    def evaluations(self, nfe: int) -> int:
        """Network evaluations of a call."""

    def preparation(self, method: Method) -> int:
        """Network evaluations of the reference, made at the first call."""

    def __call__(self, method: Method, nfe: int) -> tuple[float | None, float | None]:
        """`fd_8x8` and `spread` of samples with `nfe` evaluations."""


class Monitor:
    """Takes a look at each multiple of the share `every` of the budget, and at the end.

    The method is sampled with the first of `nfe` that it is ready for. A look is left out if all of them would take
    more than the share `most` of the evaluations of the training. `say` shows a line.
    """

    def __init__(
        self, look: Look, every: float, nfe: Sequence[int], say: Callable[[str], None], most: float = MOST
    ) -> None:
        self.look, self.every, self.nfe, self.say, self.most = look, every, nfe, say, most
        self.points: list[ProgressPoint] = []
        self.next = every  # share of the budget at which the next look is due
        self.spent = 0  # evaluations of all looks, those of the reference once even if the training is resumed
        self.failed = False

    def due(self, progress: float) -> bool:
        """Whether to look now; the same on all ranks. The next look is due later."""
        if progress < min(self.next, 1.0):
            return False
        self.next = round(self.every * (math.floor(progress / self.every + 1e-9) + 1), 12)
        return True

    def take(
        self, method: Method, average: nn.Module, phase: int, progress: float, images: int, evaluations: int
    ) -> None:
        """Look at `method` with the averaged weights, after `images` and `evaluations`, at `progress` of the budget.

        An error of the method ends the looks, not the training.
        """
        nfe = next((n for n in self.nfe if method.ready(n, phase)), None)
        if nfe is None or self.failed:
            return
        cost = self.look.evaluations(nfe) + (0 if self.spent else self.look.preparation(method))
        if self.spent + cost > self.most * evaluations / progress:
            return
        self.spent += cost
        try:
            with averaged(method, average):
                fd_8x8, spread = self.look(method, nfe)
        except Exception as error:  # a third-party method may raise anything
            self.failed = True
            line = (str(error).strip() or "no message").splitlines()[0]
            self.say(f"no scores along training from {progress:.0%} on: {type(error).__name__}: {line}")
            return
        warned = bool(self.note)
        self.points.append(ProgressPoint(progress, images, nfe, fd_8x8, spread))
        if self.note and not warned:
            self.say(f"warning: {self.note}")

    @property
    def words(self) -> str:
        """The last look, for the progress line."""
        if not self.points:
            return ""
        last = self.points[-1]
        seen = "samples are not finite"
        if last.fd_8x8 is not None and last.spread is not None:
            seen = f"FD of 8x8 pixels {last.fd_8x8:.3g}, spread {last.spread:.2f}"
        return f"; at {last.fraction:.0%} with {last.nfe} NFE: {seen}"

    @property
    def note(self) -> str:
        """The warning, for the rows; empty if the samples have not collapsed."""
        highest = 0.0
        for point in self.points:
            if (spread := point.spread) is None:
                continue
            if spread < COLLAPSED and (highest >= COLLAPSED or point.fraction >= SETTLED):
                last = self.points[-1]
                later = "" if last is point or last.spread is None else f", {last.spread:.2f} at {last.fraction:.0%}"
                return (
                    f"samples along training varied little, which may be a collapse: their standard deviation was "
                    f"{spread:.2f} of that of {self.look.reference} at {point.fraction:.0%} of the budget{later}"
                )
            highest = max(highest, spread)
        return ""

    def state(self) -> dict[str, Any]:
        """What the rest of the looks depends on, as plain values."""
        return {"points": [asdict(point) for point in self.points], "next": self.next, "spent": self.spent}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the result of :meth:`state`."""
        self.points = [ProgressPoint(**plain) for plain in state["points"]]
        self.next, self.spent = state["next"], state["spent"]


@contextmanager
def averaged(method: Method, average: nn.Module) -> Iterator[None]:
    """A block in which `average` is wherever `method` has its student, and every network is in evaluation mode.

    No tensor is copied or changed.
    """
    student, modes = method.student, {module: module.training for module in method.modules()}
    places = [(m, name) for m in modes for name, child in m._modules.items() if child is student]
    try:
        for module, name in places:
            module._modules[name] = average
        method.eval()
        yield
    finally:
        for module, name in places:
            module._modules[name] = student
        for module, training in modes.items():
            module.training = training
