"""The kind of a method and its numbers of evaluations, from what its class declares and what its object says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distillbench.testing.method_bench import CONDITIONINGS, USUAL_NFE, MethodBench
from distillbench.training.method import Method

KINDS = {
    "trajectory": "a sample approximates the teacher's from the same noise",
    "distribution": "samples have the teacher's distribution, not its noise",
    "from data": "learned from real images alone, without the teacher",
    "other": "cannot be built at default settings",
}


@dataclass(frozen=True)
class MethodFacts:
    """Of a method at default settings."""

    kind: str  # of KINDS
    reads_data: bool
    nfe: str  # the numbers of evaluations that it supports: "1", "1, 2, 4", "1 to 8", "any number"; "" if unknown


def kind_of(method: Method) -> str:
    """Of KINDS. It is decided at the fewest evaluations: further ones may add fresh noise."""
    if not method.uses_teacher:
        return "from data"
    fewest = next((n for n in USUAL_NFE if method.supports(n)), 1)
    return "trajectory" if method.keeps_noise(fewest) else "distribution"


def facts_of(cls: Any) -> MethodFacts:
    """Of a method class; it is built on a small teacher, under the first kind of conditioning that it accepts."""
    for label, conditioning in CONDITIONINGS.items():
        try:
            method = MethodBench(label, cls, None, conditioning, 0).method()
            supported = [n for n in USUAL_NFE if method.supports(n)]
            nfe = "any number" if len(supported) == len(USUAL_NFE) else in_words(supported)
            return MethodFacts(kind_of(method), bool(cls.reads_data(method.config)), nfe)
        except Exception:  # it may refuse this conditioning; `distillbench check` says why
            continue
    return MethodFacts("other", bool(cls.needs_data), "")


def in_words(numbers: Sequence[int]) -> str:
    """Ascending `numbers` as text, three or more successive ones as a range: "1 to 8, 16"."""
    runs = (list(run) for _, run in itertools.groupby(enumerate(numbers), lambda place: place[1] - place[0]))
    texts = ([str(number) for _, number in run] for run in runs)
    return ", ".join(f"{text[0]} to {text[-1]}" if len(text) > 2 else ", ".join(text) for text in texts)
