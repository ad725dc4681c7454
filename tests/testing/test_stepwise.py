"""Methods whose steps differ, whose work is random, or that compare images in groups: checks, plans and training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from rich.console import Console

from analytic import make_workspace, mlp_teacher, same_weights, weights_of
from distillbench import Batch, Condition, Conditioning, Phase, UserError
from distillbench.cli.terminal import print_plan
from distillbench.execution.followers import check_rows
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.testing.checks import Doubt
from distillbench.testing.conformance import check_method
from distillbench.testing.method_bench import WITHOUT_CLASSES, MethodBench
from distillbench.testing.methods_training import parts
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench.training.share import WHOLE, Share
from faults import failed, found_in, gatherer
from stepwise import Ctm, Dmd2, Groups, registry
from tiny_training import SILENT

SHAPE = (2, 1, 1)


def bench(cls, **settings) -> MethodBench:
    return MethodBench("unconditional", cls, cls.Config(**settings), WITHOUT_CLASSES, 0)


def findings(cls):
    """The findings of all checks but `device` and `matches`, by check."""
    return {finding.check: finding for finding in found_in("methods", cls, "trains", all_checks=True)}


def planned(tmp_path, *words):
    """The cell of the method in a plan."""
    every = registry()
    common = ["dataset=digits", "device=cpu", "evaluation.nfe=[]", f"results_dir={tmp_path}"]
    return next(cell for cell in plan(compose_runs([*common, *words], every), every) if cell.entry is not None)


# --- a cycle of steps ------------------------------------------------------------------------------------------------


def test_a_method_that_trains_its_generator_in_every_fifth_step_conforms():
    found = findings(Dmd2)
    assert not failed(list(found.values())) and not any(finding.doubt for finding in found.values())
    assert "2 trained" in found["steps"].message
    cycle = "the mean of a cycle of 5 steps: students 1 with gradient and 2 without, teacher 0.2 without"
    assert cycle in found["gradients"].message  # 3 of students in each step, one of the teacher in the last


@pytest.mark.nightly
@pytest.mark.parametrize("cls", [Dmd2, Ctm, Groups])
def test_methods_whose_steps_differ_conform_on_all_benches(cls):
    found = check_method(cls, distribution_images=0)
    assert not failed(found)
    assert [finding.check for finding in found if finding.ok is None] in (["matches"], ["condition_sampled", "matches"])


def test_a_plan_takes_the_mean_of_a_cycle(tmp_path):
    """In four of five steps: rollout, generator and fake score; in the fifth also the teacher."""
    cell = planned(tmp_path, "methods=[dmd2_toy]", "budget.images=12800", "evaluation.nfe=[2]")
    assert (cell.cost.teacher_nfe, cell.cost.student_nfe) == (12_800 // 5, 3 * 12_800)
    assert not cell.cost_varies and not cell.cost_error
    budget = "budget.limit=nfe", "budget.nfe=32000"
    assert planned(tmp_path, "methods=[dmd2_toy]", "evaluation.nfe=[2]", *budget).cost.images == 10_000


@pytest.mark.parametrize("after", [7, pytest.param(12, marks=pytest.mark.nightly)])
def test_a_training_resumes_in_the_middle_of_a_cycle(after):
    tested = bench(Dmd2)
    assert same_weights(weights_of(tested.run.method), weights_of(tested.train_interrupted(after)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("cls", "kind"), [(Dmd2, "adamw"), (Groups, "radam")])
def test_accumulation_trains_the_same_weights(cls, kind, tmp_path):
    """RAdam's first updates are proportional to the gradient, so it shows a wrong scale, which Adam does not."""
    trained = []
    for microbatch in (0, 8):
        torch.manual_seed(0)
        method = cls(cls.Config(optimizer=kind), mlp_teacher())
        workspace = make_workspace(method.teacher, tmp_path, BudgetConfig(images=7 * 16))
        train(method, method.config, workspace, None, Loop(16, microbatch), SILENT)
        trained.append(weights_of(method))
    assert trained[0].keys() == trained[1].keys()
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], rtol=1e-6, atol=1e-9)


FAULTS, fault = gatherer()


@fault("phases", "at least 1, got 0")
class NoStep(Dmd2):
    def phases(self):
        return [Phase(cycle=0)]


@fault("steps", "declare Phase(cycle=n)")
class Undeclared(Dmd2):
    def phases(self):
        return [Phase()]


@fault("cost", "Phase.cycle is the number of steps after which the cost repeats")
class UndeclaredCost(Ctm):
    """Twice the evaluations in every second step."""

    def phases(self):
        return [Phase()]

    def train_step(self, batch):
        if batch.step % 2:
            self.teacher.denoise(batch.noise(), batch.uniform(), batch.c)
        yield from super().train_step(_Two(batch))


class _Two:
    """A batch of a CTM that takes two steps of the teacher."""

    def __init__(self, batch):
        self.noise, self.c, self.one_integer = batch.noise, batch.c, lambda low, high: 2


@fault("cost", "Phase(cost_varies=True) if it is random")
class UndeclaredChance(Ctm):
    def phases(self):
        return [Phase()]


@fault("data", "possible are noise, rollout, pairs, got 'latents'")
class UnknownInputs(Ctm):
    inputs = "latents"


@fault("data", "possible are noise, rollout, pairs, got 'data'")
class NoData(Ctm):
    inputs = "data"


@pytest.mark.parametrize(("cls", "check", "message"), FAULTS)
def test_a_fault_is_found_by_its_check(cls, check, message):
    found = failed(found_in("methods", cls, check))
    assert list(found) == [check] and message in found[check]


# --- random work -----------------------------------------------------------------------------------------------------


def test_a_random_cost_that_is_declared_conforms():
    found = findings(Ctm)
    assert not failed(list(found.values()))
    assert "random, so " in found["cost"].message


def test_a_plan_takes_the_mean_of_random_costs_and_says_so(tmp_path, capsys):
    cell = planned(tmp_path, "methods=[ctm_toy]", "budget.images=12800")
    numbers = [Batch(8, SHAPE, torch.Generator().manual_seed(0), "cpu", None, step=step) for step in range(16)]
    mean = sum(batch.one_integer(1, 7) for batch in numbers) / 16
    assert cell.cost.teacher_nfe == round(12_800 * mean) and cell.cost.student_nfe == 12_800
    assert cell.cost_varies
    print_plan(Console(width=120), [cell])
    assert "ctm_toy: evaluations are about these, because steps have random costs" in capsys.readouterr().out


def test_cost_steps_are_whole_cycles():
    assert [Phase(cycle=n).cost_steps for n in (1, 5)] == [1, 5]
    assert [Phase(cycle=n, cost_varies=True).cost_steps for n in (1, 5, 16)] == [16, 20, 64]


def test_one_integer_is_the_same_in_all_parts_and_ranks_and_uniform_over_steps():
    def numbers(step, seed=0, phase=0, share=WHOLE, count=1):
        batch = Batch(8, SHAPE, torch.Generator().manual_seed(seed), "cpu", None, share=share, step=step, phase=phase)
        return [[part.one_integer(3, 13), part.one_integer(3, 13)] for part in batch.parts(count)]

    (whole,) = numbers(5)
    assert numbers(5, count=2) == [whole, whole]
    assert numbers(5, share=Share(1, 2)) == numbers(5, share=Share(0, 2)) == [whole]
    drawn = {key: [numbers(step, **key_of(key))[0] for step in range(400)] for key in ("", "seed", "phase")}
    assert drawn[""] != drawn["seed"] and drawn[""] != drawn["phase"]
    flat = torch.tensor(drawn[""]).flatten()
    assert flat.min() == 3 and flat.max() == 12
    assert ((flat.bincount(minlength=13)[3:] - 80).square() / 80).sum() < 28  # chi^2 of 9 degrees, p = .001


def key_of(name):
    return {name: 1} if name else {}


def test_one_integer_takes_nothing_from_the_generator():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    Batch(8, SHAPE, generator, "cpu", None).one_integer(0, 10)
    assert torch.equal(before, generator.get_state())
    later = torch.Generator()
    later.set_state(before)  # as a training that is resumed
    assert later.initial_seed() == generator.initial_seed()


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [4, pytest.param(3, marks=pytest.mark.nightly), 16])
def test_a_loss_within_groups_has_the_gradient_of_the_whole_step_in_parts(M):
    assert not isinstance(parts(bench(Groups, M=M)), Doubt)


def test_without_whole_groups_it_has_another_gradient():
    class Torn(Groups):
        group_size = 1

    assert isinstance(parts(bench(Torn, M=4)), Doubt)


@pytest.mark.nightly
def test_a_method_with_groups_conforms():
    found = findings(Groups)
    assert not failed(list(found.values())) and not any(finding.doubt for finding in found.values())


def test_groups_are_dealt_out_in_turn():
    rows = torch.arange(12)
    assert [Share(i, 2, 3).of(rows).tolist() for i in range(2)] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert [Share(i, 3, 3).size(12) for i in range(3)] == [6, 3, 3]
    c = Condition(labels=rows)
    assert c.of_rows(Share(1, 2, 2).view).labels.tolist() == [2, 3, 6, 7, 10, 11]
    make = partial(Batch, 12, SHAPE, device="cpu", read=None, conditioning=Conditioning(5))
    whole = make(generator=torch.Generator().manual_seed(0))
    for rank in range(2):
        batch = make(generator=torch.Generator().manual_seed(0), share=Share(rank, 2, 2))
        first, second = batch.parts(2)
        noise = [part.noise() for part in (first, second)]
        labels = [part.random_c().labels for part in (first, second)]
        if not rank:
            expected = whole.noise(), whole.random_c().labels
        of_rank = [[0, 1, 8, 9], [4, 5]] if rank == 0 else [[2, 3, 10, 11], [6, 7]]
        for index, rows in enumerate(of_rank):
            assert torch.equal(noise[index], expected[0][rows]) and torch.equal(labels[index], expected[1][rows])
        assert len(batch.parts(9)) == 3
    with pytest.raises(ValueError, match="groups of 5 images cannot have 12"):
        make(generator=torch.Generator(), share=Share(group=5))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch_size=126", "budget.images=1000"], "groups of 4: batch_size=126 must be divisible by 4"),
        (["batch_size=128", "budget.images=1001"], "groups of 4: budget.images=1001 must be divisible by 4"),
        (["batch_size=16", "microbatch=3"], "microbatch must be at least 4, or 0 for the whole batch, got 3"),
        (["methods.groups_toy.M=0"], "at least 1, got 0"),
    ],
)
def test_a_plan_refuses_batches_that_are_no_whole_groups(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, "methods=[groups_toy]", *words)


def test_each_rank_needs_a_group(tmp_path):
    cell = planned(tmp_path, "methods=[groups_toy]", "batch_size=16", "budget.images=1028")
    assert cell.group_size == 4 and not cell.cost_error
    with pytest.raises(UserError, match="leaves a last batch of 4, and each of 2 processes must have a group of 4"):
        check_rows(cell.shared.config, 2, cell.group_size)
