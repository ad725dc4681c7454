"""Several processes that train one student: the same student as one process alone, counted and kept once."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from distillbench.budget import BudgetConfig, Limit, Meter
from distillbench.conditions import UNCONDITIONAL
from distillbench.denoiser import Denoiser
from distillbench.dropout import seed_masks
from distillbench.energy import Energy
from distillbench.errors import UserError
from distillbench.method import WHOLE, Batch, Share
from distillbench.networks import ResidualMLP
from distillbench.pairs import Workspace
from distillbench.progress import Progress, Step
from distillbench.ranks import ALONE, Ranks, joined
from distillbench.registry import load_registry
from distillbench.resume import Followed, Resume, States
from distillbench.schedules import VPCosine
from distillbench.signals import Interrupted
from distillbench.teachers import Teacher
from distillbench.testbench import StopAfter
from distillbench.train import Loop, Trained, train

SHAPE, BATCH, STEPS = (1, 4, 4), 8, 6
SMALL = {"direct": {"pairs": 16, "steps": 2}, "tract": {"steps": [4, 2, 1]}, "pd": {"steps": 4}}
SILENT = Step(lambda fraction, note: None)
METHODS = sorted(load_registry().methods)


class Forgetful(ResidualMLP):
    """Half of the pixels are dropped in training."""

    def forward(self, x, time, embedding=None, c=UNCONDITIONAL):
        return super().forward(torch.nn.functional.dropout(x, 0.5, self.training), time, embedding, c)


def network(kind: type[ResidualMLP] = ResidualMLP) -> ResidualMLP:
    made = kind(SHAPE, width=8, depth=1)
    torch.nn.init.normal_(made.exit.weight, std=0.3)
    return made


def training(
    name: str, folder: Path, ranks: Ranks = ALONE, parts: int = 1, limit: Limit = Limit.images, stop: int = 0,
    kind: type[ResidualMLP] = ResidualMLP,
) -> tuple[dict[str, torch.Tensor], Trained]:  # fmt: skip
    """A few steps of a method on a tiny teacher; its weights, and what the training left."""
    cls = load_registry().methods[name].cls
    torch.manual_seed(0)
    made = partial(network, kind)
    teacher = Teacher("tiny", Denoiser(made(), VPCosine(), "v"), SHAPE, "tiny", blank=made)
    method = cls(cls.Config(**SMALL.get(name, {})), teacher)
    meter = Meter(BudgetConfig(limit=limit, images=BATCH * STEPS, nfe=300), teacher, "cpu")
    workspace = Workspace(teacher, meter, folder, "cpu", 0, Progress(None))
    order = torch.Generator().manual_seed(1)

    def read(size: int) -> tuple[torch.Tensor, None]:
        return ranks.share.of(2 * torch.rand(size, *SHAPE, generator=order) - 1), None

    resume = None
    if stop:
        states = (States if ranks.main else Followed)(folder / "states", 1, Progress(None))
        resume = Resume(states, math.inf, {"order": order}, stop=StopAfter(stop))
    given = read if cls.needs_data else None
    seed_masks(0, ranks.share.index)
    left = train(method, method.config, workspace, given, Loop(BATCH, parts, ranks=ranks), SILENT, resume=resume)
    return dict(method.state_dict()), left


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def together(rank: int, port: int, folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()})
    with joined("cpu") as ranks:
        assert ranks.share == Share(rank, 2) and ranks.main == (rank == 0)
        counted = {}
        for name in METHODS:
            weights, left = training(name, folder, ranks)
            save_file(weights, folder / f"{name}-{rank}.safetensors")
            counted[name] = asdict(left.price) | {"losses": [point.loss for point in left.curve]}
        _, left = training("cm", folder, ranks, limit=Limit.nfe)
        counted["cm, nfe"] = asdict(left.price)
        try:
            training("cm", folder, ranks, stop=3 if ranks.main else 99)  # the follower is told nothing
        except Interrupted:
            counted["interrupted"] = True
        weights, left = training("cm", folder, ranks, stop=99)
        save_file(weights, folder / f"resumed-{rank}.safetensors")
        counted["resumed"] = asdict(left.price)
        (folder / "forgetful").mkdir(exist_ok=True)
        for stop in (0, 3, 99):
            kept = 99 if stop == 3 and not ranks.main else stop
            with suppress(Interrupted):
                weights, _ = training("cm", folder / "forgetful", ranks, stop=kept, kind=Forgetful)
                save_file(weights, folder / f"forgetful-{stop}-{rank}.safetensors")
        counted["mask"] = torch.rand(4).tolist()
        (folder / f"counted-{rank}.json").write_text(json.dumps(counted))
        assert ranks.energy(Energy(1.0)) == Energy(2.0)
        assert ranks.energy(Energy(1.0) if rank else Energy(None, "none")).reason == "none"
        assert ranks.main or ranks.take() is None


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(together, (free_port(), folder), nprocs=2)
    return folder


def alike(ours, theirs):
    """Equal but for the order in which float32 numbers were added, whose last digits Adam's first steps magnify."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_does(two, name, tmp_path):
    torch.set_num_threads(1)
    weights, left = training(name, tmp_path)
    main, follower = (load_file(two / f"{name}-{rank}.safetensors") for rank in range(2))
    alike(main, weights)
    assert all(torch.equal(tensor, follower[key]) for key, tensor in main.items())
    counted = json.loads((two / "counted-0.json").read_text())[name]
    price = asdict(left.price)
    for field in (field for field in price if field.endswith(("nfe", "backward", "input", "images"))):
        assert counted[field] == price[field], field
    assert counted["losses"] == pytest.approx([point.loss for point in left.curve], rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_steps_in_parts_are_the_whole_steps(name, tmp_path):
    torch.set_num_threads(1)
    alike(training(name, tmp_path, parts=2)[0], training(name, tmp_path)[0])


def test_a_budget_in_evaluations_is_that_of_all(two, tmp_path):
    counted = json.loads((two / "counted-0.json").read_text())["cm, nfe"]
    _, left = training("cm", tmp_path, limit=Limit.nfe)
    assert counted["images"] == left.price.images
    assert counted["teacher_nfe"] == left.price.teacher_nfe and counted["student_nfe"] == left.price.student_nfe


def test_all_stop_together_and_go_on_together(two):
    counted = [json.loads((two / f"counted-{rank}.json").read_text()) for rank in range(2)]
    assert [each["interrupted"] for each in counted] == [True, True]
    resumed, whole = load_file(two / "resumed-0.safetensors"), load_file(two / "cm-0.safetensors")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())
    assert counted[0]["resumed"]["teacher_nfe"] == counted[0]["cm"]["teacher_nfe"]


def test_masks_differ_between_processes_and_go_on_in_each(two):
    """The weights of all are equal to the bit, and those of a training that was never disturbed."""
    whole, resumed = (
        [load_file(two / f"forgetful-{stop}-{rank}.safetensors") for rank in range(2)] for stop in (0, 99)
    )
    assert all(torch.equal(tensor, other[key]) for key, tensor in whole[0].items() for other in (whole[1], *resumed))
    assert not (two / "forgetful-3-0.safetensors").exists()  # that one was interrupted
    masks = [json.loads((two / f"counted-{rank}.json").read_text())["mask"] for rank in range(2)]
    assert masks[0] != masks[1]


def test_shares_are_the_batch():
    draw = lambda share: Batch(7, SHAPE, torch.Generator().manual_seed(0), "cpu", None, share=share)
    whole, shares = draw(WHOLE), [draw(Share(index, 3)) for index in range(3)]
    assert [share.size for share in shares] == [3, 2, 2] and sum(share.size for share in shares) == whole.size
    for numbers in (Batch.noise, Batch.uniform, lambda batch: batch.integers(0, 100)):
        rows = [numbers(share) for share in shares]
        together = numbers(whole)
        for index, part in enumerate(rows):
            assert torch.equal(part, together[index::3])
        assert torch.equal(rows[0][:1], together[:1])  # the first of the first share is the first of all


def test_parts_draw_once():
    generator = torch.Generator().manual_seed(0)
    batch = Batch(5, SHAPE, generator, "cpu", None)
    first, second = batch.parts(2)
    again = Batch(5, SHAPE, torch.Generator().manual_seed(0), "cpu", None)
    ours = [(part.noise(), part.integers(0, 9)) for part in (first, second)]
    eps, k = again.noise(), again.integers(0, 9)
    assert torch.equal(ours[0][0], eps[::2]) and torch.equal(ours[1][0], eps[1::2])
    assert torch.equal(ours[1][1], k[1::2])
    assert batch.parts(1) == [batch] and len(batch.parts(9)) == 5


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cuda:1") as ranks:
        assert ranks is ALONE and ranks.main and ranks.count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="a GPU of its own"), joined("cuda:1"):
        pass


@pytest.mark.slow
def test_a_run_started_by_torchrun(tmp_path):
    """Its rows, its files and its weights are there once; the second time there is nothing to do."""
    words = [
        "methods=[direct]", "dataset=digits", "budget.images=640", "methods.direct.pairs=64", "evaluation.images=64",
        "evaluation.timing=off", "evaluation.teacher_steps=[4]", "evaluation.metrics=[teacher_rmse]", "device=cpu",
        f"results_dir={tmp_path}", "run_name=two",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run([*launch, "-m", "distillbench", "run", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("direct seed 0") + done.stderr.count("direct seed 0") == 1
    (record,) = (path for path in tmp_path.glob("cells/*/train.json") if "direct" in path.read_text())
    told = json.loads(record.read_text())
    assert told["processes"] == 2 and told["cost"]["images"] == 640 and told["status"] == "ok"
    assert len((tmp_path / "two" / "table.csv").read_text().splitlines()) == 3
