"""Networks sharded over two ranks: the same students as from one process, saved as full tensors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import VPCosine
from distillbench.errors import UserError
from distillbench.networks.architectures import ResidualMLP
from distillbench.system.dtensors import gather_full, is_sharded, local_shards
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted
from distillbench.teachers.teacher import Teacher
from distillbench.testing.method_bench import StopAfter
from distillbench.training.budget import BudgetConfig, Limit, Meter
from distillbench.training.checkpoints import Checkpoints
from distillbench.training.compute import ComputeConfig, applied
from distillbench.training.data_parallel import SINGLE_RANK, Ranks, joined
from distillbench.training.fsdp import Sharded, check_sharding, copied_for_sharding
from distillbench.training.loop import Loop, Trained, train
from distillbench.training.method import Method
from distillbench.training.optimizer_config import OptimizerConfig
from distillbench.training.optimizers import Optimizers
from distillbench.training.pairs import Workspace
from distillbench.training.resume import FollowerStates, Resume, States
from distillbench.training.share import WHOLE, Share
from tiny_training import SILENT
from two_ranks import BATCH, METHODS, SETTINGS, SHAPE, assert_alike, free_port, method_class, start_rank

SHARD, PLAIN = ComputeConfig(shard=True), ComputeConfig()
IMAGES = 4 * BATCH
RADAM = {"optimizer": "radam", "beta2": 0.9, "lr": 1.0, "lr_warmup": 0.0, "grad_clip": 1e-4, "grad_clip_by": "value"}
RADAM |= {"weight_decay": 0.1, "grad_nan_to_num": True, "ema_sigma_rel": 0.2}
LAST = {"microbatch": 2, "images": IMAGES - 3, "mu": 0.0}  # the last batch has 5 images, in parts
HALF = {"precision": "bf16", "recompute": True}
LAYERS = ("entry", "blocks.1")  # of the network itself, and a block, which are sharded each by itself


def network() -> ResidualMLP:
    made = ResidualMLP(SHAPE, width=7, depth=3)  # odd: one rank has more rows than the other
    torch.nn.init.normal_(made.exit.weight, std=0.3)
    return made


def new(name: str, **settings) -> Method:
    cls = method_class(name)
    torch.manual_seed(0)
    teacher = Teacher("tiny", Denoiser(network(), VPCosine(), "v"), SHAPE, "tiny", blank=network)
    return cls(cls.Config(**SETTINGS.get(name, {}) | settings), teacher)


def training(
    name: str, folder: Path, ranks: Ranks = SINGLE_RANK, compute: ComputeConfig = PLAIN, microbatch: int = 0,
    stop: int = 0, fractions: tuple[float, ...] = (), images: int = IMAGES, **settings,
) -> tuple[dict[str, torch.Tensor], Trained]:  # fmt: skip
    """A few steps of a method on a tiny teacher: its full weights (on rank 0) and the result of the training."""
    method = new(name, **settings)
    meter = Meter(BudgetConfig(limit=Limit.images, images=images), method.teacher, "cpu")
    workspace = Workspace(method.teacher, meter, folder, "cpu", 0, Progress(None), ranks=ranks)
    order = torch.Generator().manual_seed(1)

    def read(size: int) -> tuple[torch.Tensor, None]:
        share = replace(ranks.share, group=method.group_size)  # whole groups, as the harness reads them
        return share.of(2 * torch.rand(size, *SHAPE, generator=order) - 1), None

    resume = None
    if stop:
        states = (States if ranks.main else FollowerStates)(folder / "states", 1, Progress(None))
        resume = Resume(states, math.inf, {"order": order}, stop=StopAfter(stop))
    points = Checkpoints(fractions, folder, (1,)) if fractions else None
    given, loop = read if method.needs_data else None, Loop(BATCH, microbatch, compute, ranks)
    with applied(compute, method, "cpu"):
        left = train(method, method.config, workspace, given, loop, SILENT, points, resume)
    return gather_full(method.state_dict(), ranks.main), left


def loss(method: Method, share: Share = WHOLE) -> torch.Tensor:
    """A loss on the share's rows of four images."""
    generator = torch.Generator().manual_seed(2)
    images, times = torch.randn(4, *SHAPE, generator=generator), torch.rand(4, 1, 1, 1, generator=generator)
    return method.student(share.of(images), share.of(times)).square().sum()


def held(ranks: Ranks, folder: Path) -> dict[str, int]:
    """Elements of a network, its gradients and its moments: on this rank, and in full."""
    method = new("direct")
    Sharded(method, True, ranks, "cpu")
    student, optimizers = method.student, Optimizers(OptimizerConfig(), ranks=ranks)
    optimizers.differentiate(student, loss(method, ranks.share), first=True)
    gradients = [weight.grad for weight in student.parameters()]
    by_name = {name: weight.grad for name, weight in student.named_parameters()}
    if full := gather_full(by_name, ranks.main):
        save_file(full, folder / "gradients.safetensors")
    optimizers.step(student, 1.0)
    moments = list(optimizers.state(method).tensors.values())
    of = [*student.parameters(), *gradients, *(moment for moment in moments if moment.ndim)]
    with pytest.raises(AssertionError, match="deepcopy"):
        method.student.copy(method.teacher.student_rows)
    assert all(is_sharded(tensor) for tensor in of)
    return {"here": sum(tensor.numel() for tensor in local_shards(of)), "all": sum(tensor.numel() for tensor in of)}


def run_rank(rank: int, port: int, folder: Path) -> None:
    """The main function of each of two ranks."""
    start_rank(rank, port)
    with joined("cpu") as ranks:
        told = {"held": held(ranks, folder)}

        def keep(as_name: str, name: str, compute: ComputeConfig = SHARD, **how) -> None:
            weights, left = training(name, folder, ranks, compute, **how)
            told[as_name] = asdict(left.cost) | {"losses": [point.loss for point in left.curve]}
            if ranks.main:
                save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / f"{as_name}.safetensors")

        for name in METHODS:
            keep(name, name, fractions=(0.5,) if name == "cm" else ())
        keep("parts", "boot", microbatch=BATCH // 4)
        keep("last", "cm", **LAST)
        for layer in LAYERS:
            keep(layer, "adversarial", layer=layer)
        keep("half features", "adversarial", ComputeConfig(**HALF, shard=True))
        keep("half derivative", "continuous_time", ComputeConfig(**HALF, shard=True))
        keep("half", "sid", ComputeConfig(**HALF, shard=True), grad_clip=1e9)
        keep("half unsharded", "sid", ComputeConfig(**HALF), grad_clip=1e9)
        with pytest.raises(Interrupted):
            training("tract", folder, ranks, SHARD, stop=3 if ranks.main else 99)
        if ranks.main:
            (folder / "copy").mkdir()
            (state,) = (folder / "states").iterdir()
            (folder / "copy" / state.name).write_bytes(state.read_bytes())
        keep("resumed", "tract", stop=99)
        keep("radam", "tract", **RADAM)
        told["radam clipped"] = training("tract", folder, ranks, SHARD, **RADAM)[1].counts.state()
        with pytest.raises(Interrupted):
            training("tract", folder / "radam", ranks, SHARD, stop=3 if ranks.main else 99, **RADAM)
        weights, _ = training("tract", folder / "radam", ranks, SHARD, stop=99, **RADAM)
        if ranks.main:
            save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / "radam resumed.safetensors")
        (folder / f"told-{rank}.json").write_text(json.dumps(told))
        assert ranks.main or ranks.next_order() is None


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(run_rank, (free_port(), folder), nprocs=2)
    return folder


def told(two: Path, rank: int = 0) -> dict:
    return json.loads((two / f"told-{rank}.json").read_text())


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*METHODS, "parts", "last", "radam", *LAYERS])
def test_sharded_networks_train_the_same_weights(two, name, tmp_path):
    torch.set_num_threads(1)
    how = {"parts": {"name": "boot", "microbatch": BATCH // 4}, "last": {"name": "cm"} | LAST}
    how["radam"] = {"name": "tract"} | RADAM
    how |= {layer: {"name": "adversarial", "layer": layer} for layer in LAYERS}
    how = how.get(name, {"name": name})
    weights, left = training(folder=tmp_path, **how)
    assert_alike(load_file(two / f"{name}.safetensors"), weights)
    theirs, cost = told(two)[name], asdict(left.cost)
    for field in (field for field in cost if field.endswith(("nfe", "backward", "input", "images"))):
        assert theirs[field] == cost[field], field
    assert theirs["losses"] == pytest.approx([point.loss for point in left.curve], rel=1e-4)
    if name == "radam":
        assert left.counts.clipped and told(two)["radam clipped"] == left.counts.state()


@pytest.mark.nightly
def test_sharding_changes_nothing_in_half_precision_with_recomputation(two):
    ours, theirs = (load_file(two / f"{name}.safetensors") for name in ("half", "half unsharded"))
    assert ours.keys() == theirs.keys()
    for (
        name,
        tensor,
    ) in ours.items():  # Adam rounds the ends of a tensor differently (no vectors)
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-8)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["half features", "half derivative"])
def test_features_and_derivatives_of_sharded_networks_in_half_precision_with_recomputation(two, name, tmp_path):
    """As from one process, but for the rounding of bf16."""
    torch.set_num_threads(1)
    method = {"half features": "adversarial", "half derivative": "continuous_time"}[name]
    _, left = training(method, tmp_path, compute=ComputeConfig(**HALF))
    assert told(two)[name]["losses"] == pytest.approx([point.loss for point in left.curve], rel=0.02)


@pytest.mark.nightly
def test_each_rank_holds_its_shards_of_weights_gradients_and_moments(two):
    counts = [told(two, rank)["held"] for rank in range(2)]
    assert counts[0]["here"] + counts[1]["here"] == counts[0]["all"] == counts[1]["all"]
    assert all(0.45 < count["here"] / count["all"] < 0.55 for count in counts)


@pytest.mark.nightly
def test_gradients_of_sharded_networks_are_summed(two):
    """Adam is nearly invariant to their scale, so trainings alone would not show an error."""
    method = new("direct")
    for rank in range(2):  # one share at a time: on some CPUs a whole batch is rounded differently, by 1e-6
        loss(method, Share(rank, 2)).backward()
    spread = load_file(two / "gradients.safetensors")
    for name, weight in method.student.named_parameters():
        torch.testing.assert_close(spread[name], weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_a_sharded_training_resumes_bit_identically(two):
    for one, other in (("resumed", "tract"), ("radam resumed", "radam")):
        resumed, straight = (load_file(two / f"{name}.safetensors") for name in (one, other))
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in straight.items())
    assert told(two)["resumed"]["teacher_nfe"] == told(two)["tract"]["teacher_nfe"]


def layout(path: Path) -> dict[str, tuple]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in tensors.items()}


@pytest.mark.nightly
def test_a_state_of_sharded_networks_has_full_tensors(two, tmp_path):
    torch.set_num_threads(1)
    with pytest.raises(Interrupted):
        training("tract", tmp_path / "ours", stop=3)
    (ours,), (theirs,) = ((folder).iterdir() for folder in (tmp_path / "ours" / "states", two / "copy"))
    of_two = {name: kind for name, kind in layout(theirs).items() if not name.startswith("masks/1/")}
    assert layout(ours) == of_two  # rank 1 adds its own state of dropout
    (two / "copy").rename(two / "states-of-one")
    (tmp_path / "one").mkdir()
    (two / "states-of-one").rename(tmp_path / "one" / "states")
    weights, _ = training("tract", tmp_path / "one", stop=99)  # a single process resumes from the state of two ranks
    assert_alike(weights, load_file(two / "tract.safetensors"))


@pytest.mark.nightly
def test_checkpoints_and_students_have_full_tensors(two, tmp_path):
    torch.set_num_threads(1)
    weights, _ = training("cm", tmp_path, fractions=(0.5,))
    assert layout(two / "cm.safetensors") == {name: ("F32", list(tensor.shape)) for name, tensor in weights.items()}
    ours, theirs = (folder / "checkpoint-1.safetensors" for folder in (tmp_path, two))
    assert layout(ours) == layout(theirs)
    assert_alike(load_file(theirs), load_file(ours))


def test_settings_that_do_not_work_with_sharding_are_errors(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"this is a single process. Start .* with `torchrun"):
        training("direct", tmp_path, compute=SHARD)
    for setting, value in (("compile", "blocks"), ("channels_last", True), ("precision", "fp16")):
        with pytest.raises(UserError, match=f"compute.shard=true does not go with compute.{setting}="):
            ComputeConfig(shard=True, **{setting: value})
    monkeypatch.setattr(torch, "__version__", "2.8.0+cpu")
    with pytest.raises(UserError, match=r"needs torch 2\.\d+ or newer, this is torch 2\.8\.0"):
        check_sharding(SHARD, 2)
    check_sharding(PLAIN, 1)


def test_a_copied_teacher_keeps_its_counters():
    method = new("cm")
    teacher = method.teacher
    with copied_for_sharding(teacher) as copied:
        assert copied.denoiser.network is not teacher.denoiser.network
        assert copied.teacher_rows is teacher.teacher_rows and copied.student_rows is teacher.student_rows
        assert not any(weight.requires_grad for weight in copied.denoiser.parameters())


@pytest.mark.nightly
def test_a_sharded_run_started_by_torchrun(tmp_path):
    words = [
        "methods=[direct]", "dataset=digits", "budget.images=640", "methods.direct.pairs=64", "evaluation.images=64",
        "evaluation.timing=off", "evaluation.teacher_steps=[4]", "evaluation.metrics=[teacher_rmse]", "device=cpu",
        "compute.shard=true", "evaluation.checkpoints=1", f"results_dir={tmp_path}", "run_name=two",
    ]  # fmt: skip
    run = ["-m", "distillbench", "run", *words]
    alone = subprocess.run([sys.executable, *run], capture_output=True, text=True, timeout=300)
    assert alone.returncode == 2 and "torchrun" in alone.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run([*launch, *run], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = (path for path in tmp_path.glob("cells/*/train.json") if "direct" in path.read_text())
    kept = json.loads(record.read_text())
    assert kept["status"] == "ok" and kept["inputs"]["compute"] == {"shard": True} and kept["cost"]["tflops"]
    assert "shard" in (tmp_path / "two" / "table.csv").read_text()
