"""Several ranks that train one student: the same student as a single process, counted and saved once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from by_day import by_day
from distillbench.builtin.pixels import Spread, TeacherRmse
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.dropout import seed_masks
from distillbench.diffusion.samplers import Solver
from distillbench.diffusion.schedules import VPCosine
from distillbench.errors import DivergedError, UserError
from distillbench.evaluation.distributed import SampleOrder, SharedNetworks
from distillbench.evaluation.evaluator import Evaluator, teacher_sampler
from distillbench.evaluation.features import FeatureNetwork, Networks
from distillbench.evaluation.progress_scores import PixelScores
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.evaluation.stored_images import StoredImages
from distillbench.execution.followers import check_rows
from distillbench.metering.energy import Energy
from distillbench.networks.adapters import Adapters
from distillbench.networks.architectures import ResidualMLP
from distillbench.registry import load_registry
from distillbench.runs.config import RunConfig
from distillbench.runs.feature_order import FeatureOrder
from distillbench.system.launchers import by_mpi, follows, rank_and_count, started_together
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted
from distillbench.teachers.students import AS_TEACHER, StudentForm
from distillbench.teachers.teacher import Teacher
from distillbench.testing.method_bench import StopAfter
from distillbench.training import gradient_reduction, pairs
from distillbench.training.budget import BudgetConfig, Limit, Meter
from distillbench.training.compute import Sampling
from distillbench.training.data_parallel import SINGLE_RANK, Ranks, joined
from distillbench.training.failures import LostError, translated
from distillbench.training.loop import Loop, Trained, train
from distillbench.training.method import Batch, Method
from distillbench.training.monitor import Monitor
from distillbench.training.optimizer_config import OptimizerConfig
from distillbench.training.optimizers import Optimizers
from distillbench.training.pairs import Workspace
from distillbench.training.resume import FollowerStates, Resume, States
from distillbench.training.share import WHOLE, Share, parts_of
from random_pictures import Pictures
from tiny_training import SILENT
from two_ranks import BATCH, METHODS, SETTINGS, SHAPE, assert_alike, free_port, method_class, start_rank

STEPS = 6
BY_DAY = ("boot", "cm", "continuous_time", "adversarial", "direct", "imm", "pd", "sid")
SMALL_BUCKET, PAIRS_AT_ONCE = 256, 4  # bytes; several buckets and rounds, as there are of real networks


class WithDropout(ResidualMLP):
    """Drops half of the pixels in training."""

    def forward(self, x, time, embedding=None, c=UNCONDITIONAL):
        return super().forward(torch.nn.functional.dropout(x, 0.5, self.training), time, embedding, c)


def network(kind: type[ResidualMLP] = ResidualMLP) -> ResidualMLP:
    made = kind(SHAPE, width=8, depth=1)
    torch.nn.init.normal_(made.exit.weight, std=0.3)
    return made


def training(
    name: str, folder: Path, ranks: Ranks = SINGLE_RANK, microbatch: int = 0, limit: Limit = Limit.images,
    stop: int = 0, kind: type[ResidualMLP] = ResidualMLP, cls: type[Method] | None = None,
    monitor: Monitor | None = None, students: StudentForm = AS_TEACHER,
) -> tuple[dict[str, torch.Tensor], Trained]:  # fmt: skip
    """A few steps of a method on a tiny teacher; its weights and the result of the training."""
    cls = cls or method_class(name)
    torch.manual_seed(0)
    made = partial(network, kind)
    teacher = Teacher("tiny", Denoiser(made(), VPCosine(), "v"), SHAPE, "tiny", blank=made, students=students)
    method = cls(cls.Config(**SETTINGS.get(name, {})), teacher)
    meter = Meter(BudgetConfig(limit=limit, images=BATCH * STEPS, nfe=300), teacher, "cpu")
    workspace = Workspace(teacher, meter, folder, "cpu", 0, Progress(None), ranks=ranks)
    order = torch.Generator().manual_seed(1)

    def read(size: int) -> tuple[torch.Tensor, None]:
        share = replace(ranks.share, group=method.group_size)  # whole groups, as the harness reads them
        return share.of(2 * torch.rand(size, *SHAPE, generator=order) - 1), None

    resume = None
    if stop:
        states = (States if ranks.main else FollowerStates)(folder / "states", 1, Progress(None))
        resume = Resume(states, math.inf, {"order": order}, stop=StopAfter(stop))
    given = read if cls.needs_data else None
    seed_masks(0, ranks.share.index)
    loop = Loop(BATCH, microbatch, ranks=ranks)
    left = train(method, method.config, workspace, given, loop, SILENT, resume=resume, monitor=monitor)
    return dict(method.state_dict()), left


def train_each(names: Iterable[str], rank: int, folder: Path, ranks: Ranks) -> dict[str, dict]:
    """What the trainings of these methods cost, and their losses; their weights are saved in `folder`."""
    counted = {}
    for name in names:
        weights, left = training(name, folder, ranks)
        save_file(weights, folder / f"{name}-{rank}.safetensors")
        losses = [point.loss for point in left.curve]
        counted[name] = asdict(left.cost) | {"losses": losses, "updates": left.counts.state()}
    return counted


def run_rank_of_others(rank: int, port: int, folder: Path) -> None:
    """The main function of each of two ranks that train the methods which are left to the night."""
    start_rank(rank, port)
    gradient_reduction.BUCKET_BYTES, pairs.BATCH = SMALL_BUCKET, PAIRS_AT_ONCE
    with joined("cpu") as ranks:
        counted = train_each([name for name in METHODS if name not in BY_DAY], rank, folder, ranks)
    (folder / f"counted-{rank}.json").write_text(json.dumps(counted))


def run_rank(rank: int, port: int, folder: Path) -> None:
    """The main function of each of two ranks."""
    start_rank(rank, port)
    gradient_reduction.BUCKET_BYTES, pairs.BATCH = SMALL_BUCKET, PAIRS_AT_ONCE
    with joined("cpu") as ranks:
        assert ranks.share == Share(rank, 2) and ranks.main == (rank == 0)
        counted = train_each(BY_DAY, rank, folder, ranks)
        seen = Monitor(PixelScores(None, 5, 2, Sampling(), "cpu"), 0.3, (1,), print, most=1e9)
        weights, left = training("cm", folder, ranks, monitor=seen)
        save_file(weights, folder / f"looks-{rank}.safetensors")
        counted["looks"] = asdict(left.cost) | {"points": len(seen.points)}
        _, left = training("cm", folder, ranks, limit=Limit.nfe)
        counted["cm, nfe"] = asdict(left.cost)
        try:
            training("cm", folder, ranks, stop=3 if ranks.main else 99)  # rank 1 is not told to stop
        except Interrupted:
            counted["interrupted"] = True
        weights, left = training("cm", folder, ranks, stop=99)
        save_file(weights, folder / f"resumed-{rank}.safetensors")
        counted["resumed"] = asdict(left.cost)
        (folder / "forgetful").mkdir(exist_ok=True)
        for stop in (0, 3, 99):
            kept = 99 if stop == 3 and not ranks.main else stop
            with suppress(Interrupted):
                weights, _ = training("cm", folder / "forgetful", ranks, stop=kept, kind=WithDropout)
                save_file(weights, folder / f"forgetful-{stop}-{rank}.safetensors")
        counted["mask"] = torch.rand(4).tolist()
        (folder / f"counted-{rank}.json").write_text(json.dumps(counted))
        weights, _ = training("sid", folder, ranks, BATCH // 4)
        save_file(weights, folder / f"parts-{rank}.safetensors")
        (folder / f"sums-{rank}.json").write_text(json.dumps(summed(ranks, folder)))
        (folder / f"failures-{rank}.json").write_text(json.dumps(failures(ranks, folder)))
        first_features_only(ranks, folder)
        scored_by_both(ranks, folder)
        assert ranks.sum_energy(Energy(1.0)) == Energy(2.0)
        assert ranks.sum_energy(Energy(1.0) if rank else Energy(None, "none")).reason == "none"
        assert ranks.main or ranks.next_order() is None


class Brightness(FeatureNetwork):
    name, protocol, width, batch = "brightness", "1", 1, 2

    def __init__(self) -> None:
        pass

    def __call__(self, images):
        return images.float().mean((1, 2, 3))[:, None]


def first_features_only(ranks: Ranks, folder: Path) -> None:
    """Rank 0 fails after the first of eight blocks of features; both ranks then take the next message."""
    networks = SharedNetworks(folder, "cpu", ranks, FeatureOrder(None, None))
    networks._loaded[Brightness] = Brightness()
    images = torch.arange(16, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    if ranks.main:
        with pytest.raises(MemoryError), closing(networks.extract(Brightness, [images])) as features:
            assert next(features).tolist() == [[0.0], [1.0]]
            raise MemoryError
    else:
        assert ranks.next_order().network == "brightness"
        with ranks.follow():
            networks.follow_extraction(Brightness)
    assert not ranks.busy and ranks.all_gather(ranks.share.index) == [0, 1]


def judge(folder: Path, ranks: Ranks) -> tuple[Evaluator, Callable]:
    """An evaluator of 20 images in batches of 8, and a sampler."""
    torch.manual_seed(0)
    teacher = Teacher("tiny", Denoiser(network(), VPCosine(), "v"), SHAPE, "tiny")
    config = EvaluationConfig(images=20, batch_size=8, teacher_steps=[4])
    real = RealImages(Pictures(4, SHAPE), Networks(folder, "cpu"), folder)
    metrics = {"teacher_rmse": TeacherRmse, "spread": Spread}
    evaluator = Evaluator(config, metrics, real, teacher, Progress(None), folder / "answers", ranks)
    return evaluator, teacher_sampler(teacher, Solver.parse("ddim"))


def scored_by_both(ranks: Ranks, folder: Path) -> None:
    """The teacher's samples, a row, a row for which the disk of rank 0 has no room, and the row again."""
    evaluator, sampler = judge(folder, ranks)
    if ranks.main:
        order = SampleOrder("task")
        measured = evaluator.measure(sampler, 2, 0, True, "two steps", order)
        with patch.object(StoredImages, "add", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
            evaluator.measure(sampler, 2, 0, True, "two steps", order)
        assert evaluator.measure(sampler, 2, 0, True, "two steps", order).scores == measured.scores
        (folder / "scores.json").write_text(json.dumps(measured.scores))
        return
    for fails in (False, False, True, False):
        given = ranks.next_order()
        raised = pytest.raises(RuntimeError, match="on rank 0: OSError: full") if fails else nullcontext()
        with raised, ranks.follow():
            evaluator.follow_sampling(None if given.teacher_samples else sampler, given)


class ThreeLayers(torch.nn.Module):
    """A network of which some layers are not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(3)])


USES = [((0,), (0, 0)), ((0, 0), (0, 1)), ((1, 0), (1,)), ((0, 2, 2), (1,)), ((2, 1, 0), (2, 1, 0))]  # by update, rank


def part_loss(network: ThreeLayers, update: int, rank: int, part: int) -> torch.Tensor:
    """The loss of a rank in one of two parts, through the layers of USES in order."""
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(100 * update + 10 * rank + part))
    for index in USES[update][rank]:
        x = torch.tanh(network.layers[index](x))
    return x.square().sum()


def summed(ranks: Ranks, folder: Path) -> list[dict[str, list[int]]]:
    """For each update: which gradients are None, and how many buckets were sent before and in the last backward pass.

    The gradients are saved in `folder`.
    """
    updates, network, optimizers = [], ThreeLayers(), Optimizers(OptimizerConfig(), ranks=ranks)
    for update in range(len(USES)):
        counts = []
        for part in range(2):
            loss = part_loss(network, update, ranks.share.index, part)
            optimizers.differentiate(network, loss, first=part == 0, last=part == 1)
            counts.append(len(optimizers.summed[network].sent))
        optimizers.summed[network].finish()
        gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        none = [name for name, weight in network.named_parameters() if weight.grad is None]
        save_file({name: g.clone() for name, g in gradients.items()}, folder / f"sum-{update}-{ranks.share.index}.st")
        updates.append({"none": none, "sent": counts, "buckets": len(optimizers.summed[network].buckets)})
    return updates


def failing(stage: str, error: Exception, where: tuple[int, ...], step: int, ranks: Ranks) -> type[Method]:
    """Consistency distillation that raises `error` on the ranks `where`."""
    cls, here = load_registry().methods["cm"].cls, ranks.share.index in where

    class Failing(cls):
        steps = 0

        def fails(self, at: str) -> bool:
            return here and at == stage and self.steps in (0, step)

        def prepare(self, workspace: Workspace) -> None:
            if self.fails("prepare"):
                raise error

        def train_step(self, batch):
            self.steps += 1
            if self.fails("forward"):
                raise error
            for network, loss in super().train_step(batch):
                if self.fails("backward"):
                    weights = list(network.parameters())
                    weights[len(weights) // 2].register_hook(self.throw)
                if self.fails("bucket"):
                    patch.object(gradient_reduction, "Bucket", self.throw).start()
                yield network, loss
                if self.fails("after the update"):
                    raise error

        def throw(self, argument):
            patch.stopall()
            raise error

        def after_step(self) -> None:
            super().after_step()
            if self.fails("after_step"):
                raise error

        def end_phase(self, index, average) -> None:
            if here and stage == "end_phase":
                raise error

    return Failing


FAILURES = {  # stage, error, ranks, step
    "rank 1, before its first backward pass": ("forward", ValueError("boom"), (1,), 1),
    "rank 1, in a forward pass": ("forward", ValueError("boom"), (1,), 3),
    "rank 0, in a forward pass": ("forward", ValueError("boom"), (0,), 3),
    "both": ("forward", ValueError("boom"), (0, 1), 3),
    "rank 1, in a backward pass": ("backward", ValueError("boom"), (1,), 3),
    "rank 1, out of memory": ("backward", torch.OutOfMemoryError("CUDA out of memory"), (1,), 3),
    "rank 1, out of memory for its buckets": ("bucket", torch.OutOfMemoryError("CUDA out of memory"), (1,), 1),
    "rank 1, in prepare": ("prepare", ValueError("boom"), (1,), 0),
    "rank 1, after an update": ("after the update", ValueError("boom"), (1,), 3),
    "rank 0, after a step": ("after_step", ValueError("boom"), (0,), STEPS),
    "rank 1, at the end": ("end_phase", ValueError("boom"), (1,), 0),
    "rank 1, UserError": ("forward", UserError("set it to 2"), (1,), 3),
    "rank 1, not finite": ("forward", DivergedError("nan"), (1,), 3),
}


def failures(ranks: Ranks, folder: Path) -> dict[str, list[str]]:
    """What each training raises on this rank. After each of them a training without errors gives the usual weights."""
    raised_by = {}
    for name, (stage, error, where, step) in FAILURES.items():
        try:
            with ranks.follow():
                training("cm", folder, ranks, cls=failing(stage, error, where, step, ranks))
        except Exception as raised:
            raised_by[name] = [type(raised).__name__, str(raised), *getattr(raised, "__notes__", [])]
        weights, _ = training("cm", folder, ranks)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in load_file(folder / "cm-0.safetensors").items())
    return raised_by


LORA = StudentForm(Adapters(2, 2.0))


def run_rank_of_adapters(rank: int, port: int, folder: Path) -> None:
    """The main function of each of two ranks that train adapters."""
    start_rank(rank, port)
    with joined("cpu") as ranks:
        for name in ("cm", "sid"):
            save_file(training(name, folder, ranks, students=LORA)[0], folder / f"{name}-{rank}.safetensors")


@pytest.mark.nightly
def test_two_ranks_train_the_same_adapters_as_one(tmp_path):
    pytest.importorskip("peft")
    torch.multiprocessing.spawn(run_rank_of_adapters, (free_port(), tmp_path), nprocs=2)
    for name in ("cm", "sid"):
        weights, _ = training(name, tmp_path, students=LORA)
        assert any("lora_" in key for key in weights)
        main, follower = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        assert_alike(main, weights)
        assert all(torch.equal(tensor, follower[key]) for key, tensor in main.items())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(run_rank, (free_port(), folder), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    torch.multiprocessing.spawn(run_rank_of_others, (free_port(), folder), nprocs=2)
    return folder


@pytest.mark.parametrize("name", by_day(METHODS, BY_DAY))
def test_two_ranks_train_the_same_weights_as_one(request, name, tmp_path):
    two = request.getfixturevalue("two" if name in BY_DAY else "others")
    torch.set_num_threads(1)
    weights, left = training(name, tmp_path)
    main, follower = (load_file(two / f"{name}-{rank}.safetensors") for rank in range(2))
    assert_alike(main, weights)
    assert all(torch.equal(tensor, follower[key]) for key, tensor in main.items())
    counted = json.loads((two / "counted-0.json").read_text())[name]
    cost = asdict(left.cost)
    for field in (field for field in cost if field.endswith(("nfe", "backward", "input", "images"))):
        assert counted[field] == cost[field], field
    assert counted["losses"] == pytest.approx([point.loss for point in left.curve], rel=1e-4)
    assert counted["updates"] == left.counts.state()


def test_two_ranks_have_the_scores_of_one(two, tmp_path):
    torch.set_num_threads(1)
    evaluator, sampler = judge(tmp_path, SINGLE_RANK)
    assert json.loads((two / "scores.json").read_text()) == evaluator.measure(sampler, 2, 0, True, "two steps").scores
    (ours,), (theirs,) = ((folder / "answers").glob("*.npy") for folder in (tmp_path, two))
    assert ours.read_bytes() == theirs.read_bytes()


def test_rank_0_looks_at_samples_and_neither_rank_notices(two):
    counted = [json.loads((two / f"counted-{rank}.json").read_text()) for rank in range(2)]
    assert [one["looks"].pop("points") for one in counted] == [3, 0]
    for field in (field for field in counted[0]["looks"] if not field.endswith("seconds")):
        assert counted[0]["looks"][field] == counted[0]["cm"][field], field
    for rank in range(2):
        looks, plain = (load_file(two / f"{name}-{rank}.safetensors") for name in ("looks", "cm"))
        assert all(torch.equal(tensor, looks[key]) for key, tensor in plain.items())


def test_gradient_accumulation_on_two_ranks_changes_nothing(two, tmp_path):
    torch.set_num_threads(1)
    assert_alike(load_file(two / "parts-0.safetensors"), training("sid", tmp_path)[0])


def test_gradients_are_sums_over_ranks_whichever_weights_each_used(two):
    """Against one network in which the losses of all ranks are differentiated one after the other."""
    torch.set_num_threads(1)
    network = ThreeLayers()
    for update in range(len(USES)):
        network.zero_grad()
        for rank in range(2):
            for part in range(2):
                part_loss(network, update, rank, part).backward()
        theirs = [load_file(two / f"sum-{update}-{rank}.st") for rank in range(2)]
        ours = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        assert theirs[0].keys() == theirs[1].keys() == ours.keys(), update
        for name, gradient in ours.items():
            torch.testing.assert_close(theirs[0][name], gradient, rtol=1e-5, atol=1e-7)
            assert torch.equal(theirs[0][name], theirs[1][name])


def test_a_gradient_in_a_bucket_has_the_strides_of_its_weight():
    """Fused optimisers need the same strides."""
    weight = torch.nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    other = torch.nn.Parameter(torch.zeros(5))
    weight.grad = gradient = torch.randn(4, 3, 2, 2)
    bucket = gradient_reduction.Bucket([weight, other])
    bucket.buffer.fill_(7.0)
    bucket.fill()
    assert weight.grad is bucket.views[0] and weight.grad.stride() == weight.stride() != gradient.stride()
    assert torch.equal(weight.grad, gradient) and other.grad is None
    assert torch.equal(bucket.buffer.sort()[0], torch.cat([gradient.flatten(), torch.zeros(5)]).sort()[0])


def test_buckets_are_sent_during_the_last_backward_pass_only(two):
    updates = json.loads((two / "sums-0.json").read_text())
    assert [update["sent"][0] for update in updates] == [0] * len(USES)  # not before the last part
    assert updates[0]["sent"] == [0, 0]  # the order is not known yet
    assert updates[1]["sent"] == [0, 1] and updates[1]["buckets"] > updates[0]["buckets"]  # newly used weights
    assert updates[-1]["sent"] == [0, updates[-1]["buckets"]] == [0, 3]  # all of them


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_one_rank_is_raised_on_all(two, name):
    _, error, where, _ = FAILURES[name]
    raised = [json.loads((two / f"failures-{rank}.json").read_text())[name] for rank in range(2)]
    first, other = where[0], 1 - where[0]
    assert raised[first][:2] == [type(error).__name__, str(error)]
    kind, text, *notes = raised[other]
    if isinstance(error, UserError | DivergedError):
        assert (kind, text) == (type(error).__name__, str(error))
    else:
        expected = "OutOfMemoryError" if isinstance(error, torch.OutOfMemoryError) else "RuntimeError"
        assert (kind, text) == (expected, f"on rank {first}: {type(error).__name__}: {error}")
        assert notes[0].startswith(f"Traceback of rank {first}:")


def test_errors_of_torch_distributed_are_translated():
    own = torch.OutOfMemoryError("CUDA out of memory")
    assert translated(own) is own
    ended = translated(RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:46"))
    late = translated(RuntimeError("Timed out waiting 600000ms for recv operation to complete"))
    other = translated(torch.distributed.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error\nmore"))
    assert all(isinstance(error, LostError) for error in (ended, late, other))
    assert "another rank has ended" in str(ended)
    assert "does not answer (Timed out waiting 600000ms" in str(late)
    assert "DistBackendError: NCCL error in: x.cpp:1, unhandled cuda error;" in str(other)


def test_ranks_share_the_computation_of_pairs(two, tmp_path, monkeypatch):
    """The file is bit-identical to that of one rank, but under another key, since its seconds differ."""
    torch.set_num_threads(1)
    monkeypatch.setattr(pairs, "BATCH", PAIRS_AT_ONCE)
    training("direct", tmp_path)
    files = [
        {load_file(file)["x_0"].shape[0]: file for file in folder.glob("*/targets.safetensors")}
        for folder in (tmp_path, two)
    ]
    ours, theirs = (of_folder[16] for of_folder in files)
    assert files[0][12].read_bytes() == files[1][12].read_bytes()  # the held-out ones
    assert ours.read_bytes() == theirs.read_bytes() and ours.parent.name != theirs.parent.name
    of_one, of_two = (json.loads((file.parent / "manifest.json").read_text()) for file in (ours, theirs))
    assert of_two["recipe"] == of_one["recipe"] | {"processes": 2}
    assert of_two["teacher_nfe"] == of_one["teacher_nfe"] == 16 * SETTINGS["direct"]["steps"]


@pytest.mark.parametrize("name", METHODS)
def test_gradient_accumulation_changes_nothing(name, tmp_path):
    torch.set_num_threads(1)
    assert_alike(training(name, tmp_path, microbatch=BATCH // 2)[0], training(name, tmp_path)[0])


def test_a_budget_in_evaluations_counts_all_ranks(two, tmp_path):
    counted = json.loads((two / "counted-0.json").read_text())["cm, nfe"]
    _, left = training("cm", tmp_path, limit=Limit.nfe)
    assert counted["images"] == left.cost.images
    assert counted["teacher_nfe"] == left.cost.teacher_nfe and counted["student_nfe"] == left.cost.student_nfe


def test_all_ranks_stop_and_resume_together(two):
    counted = [json.loads((two / f"counted-{rank}.json").read_text()) for rank in range(2)]
    assert [each["interrupted"] for each in counted] == [True, True]
    resumed, whole = load_file(two / "resumed-0.safetensors"), load_file(two / "cm-0.safetensors")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())
    assert counted[0]["resumed"]["teacher_nfe"] == counted[0]["cm"]["teacher_nfe"]


def test_dropout_masks_differ_between_ranks_and_are_restored(two):
    """The weights of all ranks are bit-identical, also to those of an uninterrupted training."""
    whole, resumed = (
        [load_file(two / f"forgetful-{stop}-{rank}.safetensors") for rank in range(2)] for stop in (0, 99)
    )
    assert all(torch.equal(tensor, other[key]) for key, tensor in whole[0].items() for other in (whole[1], *resumed))
    assert not (two / "forgetful-3-0.safetensors").exists()  # that one was interrupted
    masks = [json.loads((two / f"counted-{rank}.json").read_text())["mask"] for rank in range(2)]
    assert masks[0] != masks[1]


def test_shares_together_are_the_batch():
    draw = lambda share: Batch(7, SHAPE, torch.Generator().manual_seed(0), "cpu", None, share=share)
    whole, shares = draw(WHOLE), [draw(Share(index, 3)) for index in range(3)]
    assert [share.size for share in shares] == [3, 2, 2] and sum(share.size for share in shares) == whole.size
    for numbers in (Batch.noise, Batch.uniform, lambda batch: batch.integers(0, 100)):
        rows = [numbers(share) for share in shares]
        expected = numbers(whole)
        for index, part in enumerate(rows):
            assert torch.equal(part, expected[index::3])
        assert torch.equal(rows[0][:1], expected[:1])  # the first row of the first share is the first of the batch


def test_parts_of_a_batch_share_random_numbers():
    generator = torch.Generator().manual_seed(0)
    batch = Batch(5, SHAPE, generator, "cpu", None)
    first, second = batch.parts(2)
    again = Batch(5, SHAPE, torch.Generator().manual_seed(0), "cpu", None)
    ours = [(part.noise(), part.integers(0, 9)) for part in (first, second)]
    eps, k = again.noise(), again.integers(0, 9)
    assert torch.equal(ours[0][0], eps[::2]) and torch.equal(ours[1][0], eps[1::2])
    assert torch.equal(ours[1][1], k[1::2])
    assert batch.parts(1) == [batch] and len(batch.parts(9)) == 5


def test_a_part_has_at_most_the_images_of_a_microbatch():
    """And no part of any rank is empty. Only where a rank has fewer images than parts are needed is one larger."""
    assert [parts_of(2048, 64, count) for count in (1, 8, 64)] == [32, 4, 1]
    assert parts_of(100, 0) == parts_of(100, 500) == 1 and parts_of(100, 64) == 2 and parts_of(12, 7, group=3) == 2
    for size, microbatch, count, group in itertools.product((4, 12, 60), (1, 3, 5, 8, 60), (1, 2, 3), (1, 4)):
        if size // group < count:
            continue
        parts = parts_of(size, microbatch, count, group)
        shares = [Share(rank, count, group).size(size) for rank in range(count)]
        sizes = [[Share(k, parts, group).size(share) for k in range(parts)] for share in shares]
        assert [sum(of_rank) for of_rank in sizes] == shares and min(map(min, sizes)) > 0
        allowed = max(group, microbatch // group * group)
        assert max(map(max, sizes)) <= allowed or parts == min(shares) // group, (size, microbatch, count, group)


def test_one_process_is_a_single_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cuda:1") as ranks:
        assert ranks is SINGLE_RANK and ranks.main and ranks.count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="has its own GPU"), joined("cuda:1"):
        pass


def test_the_environment_of_accelerate_is_understood(monkeypatch):
    """Environments recorded from `accelerate launch`, and those of MPI by its documentation (not run here)."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with joined("cpu") as ranks:  # --cpu --num_processes 1
        assert ranks is SINGLE_RANK
    monkeypatch.setenv("MASTER_PORT", "29500")  # --cpu --num_processes 2
    with pytest.raises(UserError, match=r"several processes and has started one.*torchrun"), joined("cpu"):
        pass
    monkeypatch.setenv("PMI_RANK", "1")  # --cpu --num_processes 2 --mpirun_hostfile FILE
    monkeypatch.setenv("PMI_SIZE", "2")
    assert rank_and_count() == (1, 2) and started_together() and follows() and by_mpi()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")  # srun: independent processes
    assert rank_and_count() == (0, 1) and not follows() and not by_mpi()
    with joined("cpu") as ranks:
        assert ranks is SINGLE_RANK
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_and_count() == (1, 2) and not by_mpi()


@pytest.mark.parametrize(
    ("count", "images", "batch", "refused"),
    [(2, 640, 128, ""), (2, 641, 128, "budget.images=641 leaves a last batch of 1"), (3, 642, 128, "last batch of 2"),
     (4, 6, 3, "batch_size=3, and each of 4 processes"), (2, 642, 128, "")],
)  # fmt: skip
def test_every_rank_must_have_a_row_of_every_batch(count, images, batch, refused):
    config = RunConfig(budget=BudgetConfig(images=images), batch_size=batch)
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        check_rows(config, count)


THIRD_PARTY = """
import os
import signal

import torch

from distillbench import Method, MethodConfig, hookimpl
from distillbench.diffusion.samplers import time_like

FOLLOWS = os.environ.get("RANK") == "1"


class Failing(Method):
    paper, needs_data, steps = "none", False, 0
    Config = MethodConfig

    def train_step(self, batch):
        eps, self.steps = batch.noise(), self.steps + 1
        if FOLLOWS and self.steps == 3:
            self.third_step(batch)
        yield self.student, (self.student(eps, time_like(eps, self.teacher.schedule.t_max)) - eps).square().mean()

    def third_step(self, batch):
        pass

    def sample(self, noise, nfe, c):
        return self.student(noise(0), time_like(noise(0), self.teacher.schedule.t_max))


class FailsInTraining(Failing):
    name = "fails_in_training"

    def third_step(self, batch):
        raise ValueError("no luck")


class FailsInSampling(Failing):
    name = "fails_in_sampling"

    def sample(self, noise, nfe, c):
        if FOLLOWS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().sample(noise, nfe, c)


class NeedsMuch(Failing):
    name = "needs_much"

    def third_step(self, batch):
        if batch.size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")


class Dies(Failing):
    name = "dies"

    def third_step(self, batch):
        os.kill(os.getpid(), signal.SIGKILL)


@hookimpl(api=2)
def register_methods(register):
    for method in (FailsInTraining, FailsInSampling, NeedsMuch, Dies):
        register(method)
"""


@dataclasses.dataclass(frozen=True)
class Torchrun:
    """Runs started by torchrun with two processes, in a folder."""

    folder: Path

    def run(self, methods: str, results: str) -> subprocess.CompletedProcess:
        (self.folder / "plugins").mkdir(exist_ok=True)
        (self.folder / "plugins" / "failing.py").write_text(THIRD_PARTY)
        words = [
            "dataset=digits", "budget.images=640", "methods.direct.pairs=64", "evaluation.images=64", "device=cpu",
            "evaluation.batch_size=16", "evaluation.timing=off", "evaluation.teacher_steps=[4]", "run_name=two",
            "evaluation.metrics=[teacher_rmse]", "on_oom=accumulate", f"--plugins-dir={self.folder / 'plugins'}",
        ]  # fmt: skip
        launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        about = ["-m", "distillbench", "run", f"methods={methods}", *words, f"results_dir={self.folder / results}"]
        return subprocess.run([sys.executable, *launch, *about], capture_output=True, text=True, timeout=300)

    def records(self, results: str) -> tuple[dict, dict]:
        """Those of direct's training and evaluation."""
        files = (path for path in (self.folder / results).glob("cells/*/train.json"))
        (train,) = (path for path in files if '"direct"' in path.read_text())
        (evaluation,) = train.parent.glob("evaluation-*.json")
        return json.loads(train.read_text()), json.loads(evaluation.read_text())


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_one_message(tmp_path):
    """Rows, files and weights are written once, and finished rows stay."""
    torchrun = Torchrun(tmp_path)
    done = torchrun.run("[direct,dies]", "alone")
    assert done.returncode != 0 and done.stderr.count("another rank has ended") == 1, done.stderr[-3000:]
    assert done.stdout.count("direct, seed 0") + done.stderr.count("direct, seed 0") == 1
    train, scores = torchrun.records("alone")
    assert train["processes"] == 2 and train["cost"]["images"] == 640 and train["status"] == "ok"
    assert scores["rows"][0]["status"] == "ok"


@pytest.mark.nightly
def test_a_cell_that_fails_on_one_rank_is_a_row_and_other_rows_do_not_change(tmp_path):
    torchrun = Torchrun(tmp_path)
    done = torchrun.run("[fails_in_training,fails_in_sampling,needs_much,direct]", "among")
    assert done.returncode != 0 and "has ended" not in done.stderr, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "among" / "two" / "table.csv").set_index("method")
    assert len(table) == 5
    reason = "RuntimeError: on rank 1: ValueError: no luck"
    assert tuple(table.loc["fails_in_training", ["status", "reason"]]) == ("failed", reason)
    reason = "OutOfMemoryError: on rank 1: OutOfMemoryError: CUDA out of memory"
    assert table.loc["fails_in_sampling", "status"] == "oom"
    assert table.loc["fails_in_sampling", "reason"].startswith(reason)
    assert table.loc["needs_much", "status"] == "ok"
    assert table.loc["needs_much", "settings"] == "microbatch=16 (memory ran out with more), processes=2"
    (traceback,) = (path.read_text() for path in tmp_path.glob("among/cells/*/error.txt") if "luck" in path.read_text())
    assert "in third_step" in traceback

    torchrun.run("[direct]", "alone")
    (train, scores), (train_among, scores_among) = torchrun.records("alone"), torchrun.records("among")
    assert train_among["weights_sha256"] == train["weights_sha256"]
    assert scores_among["rows"][0]["scores"] == scores["rows"][0]["scores"]
