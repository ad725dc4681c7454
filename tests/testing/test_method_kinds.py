"""Kinds of methods: what `distillbench list methods` and the gallery tell apart."""

from __future__ import annotations

import pytest

from distillbench import UserError
from distillbench.testing.checks import Fault
from distillbench.testing.method_bench import CONDITIONINGS, MethodBench
from distillbench.testing.method_kinds import KINDS, MethodFacts, facts_of, in_words
from distillbench.testing.methods_steps import data
from distillbench_boot import Boot
from distillbench_cm import ConsistencyDistillation
from distillbench_ct import ConsistencyTraining
from distillbench_ect import EasyConsistencyTuning
from distillbench_sid import ScoreIdentityDistillation


@pytest.mark.parametrize(
    ("cls", "kind", "reads_data", "nfe"),
    [
        (Boot, "trajectory", False, "1"),
        (ConsistencyDistillation, "trajectory", True, "1 to 8"),  # keeps its noise at one evaluation only
        (ScoreIdentityDistillation, "distribution", False, "1"),
        (ConsistencyTraining, "from data", True, "any number"),
        (EasyConsistencyTuning, "from data", True, "any number"),  # with source=teacher it would be "trajectory"
    ],
)
def test_kinds_come_from_what_methods_declare(cls, kind, reads_data, nfe):
    assert facts_of(cls) == MethodFacts(kind, reads_data, nfe) and kind in KINDS


def test_a_method_is_built_with_guidance_if_it_needs_it():
    class Guided(Boot):
        def __init__(self, config, teacher):
            super().__init__(config, teacher)
            if not teacher.conditioning.guided:
                raise UserError("only guided teachers")

    assert facts_of(Guided).kind == "trajectory"


def test_a_method_that_cannot_be_built_is_listed_too():
    class Broken(Boot):
        needs_data = True

        def __init__(self, config, teacher):
            raise RuntimeError("no luck")

    assert facts_of(Broken) == MethodFacts("other", True, "")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([1], "1"),
        ([1, 2], "1, 2"),
        ([1, 2, 4, 8], "1, 2, 4, 8"),
        ([1, 2, 3, 5, 6, 7, 8, 16], "1 to 3, 5 to 8, 16"),
    ],
)
def test_numbers_in_words(numbers, text):
    assert in_words(numbers) == text


def test_a_method_that_says_to_use_no_teacher_must_not_evaluate_it():
    class Liar(ScoreIdentityDistillation):
        uses_teacher = False

    with pytest.raises(Fault, match="learn from data alone and evaluates the teacher: remove uses_teacher = False"):
        data(MethodBench("one", Liar, None, CONDITIONINGS["unconditional"], 0))
    assert "as declared" in data(MethodBench("one", ConsistencyTraining, None, CONDITIONINGS["unconditional"], 0))
