"""Shared by the benchmarks: alternating measurements, ratios with an interval, the machine, and small scenes."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_loops import LOOPS, Task, own_steps
from tabulate import tabulate

from distillbench.builtin.digits import Digits
from distillbench.builtin.trained import Trained
from distillbench.datasets.dataset import Dataset, to_float
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import VPCosine
from distillbench.metering.energy import EnergyWatch
from distillbench.metering.energy import energy as count_energy
from distillbench.metering.memory import peak_gpu_mib, peak_rss_mib
from distillbench.networks.architectures import ResidualMLP, UNet
from distillbench.runs.config import StatesConfig
from distillbench.system.progress import Progress, Step
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig, Meter, Watch
from distillbench.training.build import build_method
from distillbench.training.data_stream import DataStream
from distillbench.training.loop import Loop, train
from distillbench.training.method import Method
from distillbench.training.pairs import Workspace
from distillbench.training.resume import Resume, States
from distillbench_boot import Boot
from distillbench_cm import ConsistencyDistillation
from distillbench_ct import ConsistencyTraining
from distillbench_direct import Direct
from distillbench_pd import ProgressiveDistillation
from distillbench_sid import ScoreIdentityDistillation
from distillbench_tract import Tract

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Boot, ConsistencyDistillation, ConsistencyTraining, Direct, ProgressiveDistillation,
        ScoreIdentityDistillation, Tract,
    )
}  # fmt: skip
DRAWS = 2000  # of the bootstrap


# --- ratios ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """The median ratio of pairs that were measured alternately, with the 95 % bootstrap interval over pairs."""

    ours: float  # median seconds
    theirs: float
    value: float
    low: float
    high: float

    @staticmethod
    def of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        ratios = np.array(ours) / np.array(theirs)
        drawn = np.random.default_rng(0).integers(len(ratios), size=(DRAWS, len(ratios)))
        low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
        value = float(np.median(ratios))
        return Ratio(statistics.median(ours), statistics.median(theirs), value, float(low), float(high))

    @property
    def interval(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"


def seconds(call: Callable[[], object], device: str = "cpu", wall: bool = False) -> float:
    """From an idle device to an idle device. On the CPU, but with `wall`, those of this process on the processor."""
    now = time.perf_counter if wall or device != "cpu" else time.process_time
    synchronise(device)
    start = now()
    call()
    synchronise(device)
    return now() - start


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, device: str = "cpu", wall: bool = False
) -> Ratio:
    """Each once to warm up, then in turn; which of a pair comes first changes from pair to pair."""
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        order = ((0, ours), (1, theirs)) if number % 2 else ((1, theirs), (0, ours))
        for column, call in order:
            times[column].append(seconds(call, device, wall))
    return Ratio.of(*times)


def print_table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> None:
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True), flush=True)


def machine(device: str = "cpu") -> str:
    """One line without names of hosts or folders."""
    what = torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} thread(s)"
    cores = len(os.sched_getaffinity(0))
    return f"torch {torch.__version__}, Python {platform.python_version()}, {cores} cores, {device}: {what}"


# --- scenes ----------------------------------------------------------------------------------------------------------


class Colours(Dataset):
    """2,048 smooth random images, 3x16x16, in memory."""

    name, licence, shape, sha256 = "colours", "none", (3, 16, 16), "colours"

    def __init__(self, config: Any = None) -> None:
        coarse = torch.randn(2048, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        smooth = torch.nn.functional.interpolate(coarse, self.shape[1:], mode="bicubic")
        self.images = ((smooth.tanh() + 1) * 127.5).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        return self.images[indices]


@dataclass(frozen=True)
class Scene:
    """A dataset, a teacher of it, and how long to measure: steps per stretch, pairs of stretches."""

    name: str
    dataset: Dataset
    teacher: Callable[[str], Teacher]  # a new one on a device
    batch: int
    stretch: int
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of methods, where making ready costs much


def digits_mlp() -> Scene:
    """The default run: the shipped teacher of digits, an MLP, in batches of 128."""
    dataset = Digits(Digits.Config())

    def teacher(device: str) -> Teacher:
        return Trained(Trained.Config(), dataset, Path("cache"), device).load(Progress(None))

    return Scene("digits, mlp", dataset, teacher, 128, 1, {"direct": {"steps": 2, "pairs": 8192}})


def colour_unet(width: int = 16, batch: int = 16) -> Scene:
    """A U-Net with random weights on 3x16x16."""
    dataset = Colours()

    def teacher(device: str) -> Teacher:
        torch.manual_seed(0)
        make = lambda: UNet(dataset.shape, width, 1)
        return Teacher("unet", Denoiser(make(), VPCosine(), "v").to(device), dataset.shape, "unet", blank=make)

    return Scene("3x16x16, unet", dataset, teacher, batch, 1, {"direct": {"steps": 1, "pairs": 512}})


def tiny_mlp() -> Scene:
    """For tests: digits and an MLP of width 16."""
    dataset = Digits(Digits.Config())

    def teacher(device: str) -> Teacher:
        torch.manual_seed(0)
        make = lambda: ResidualMLP(dataset.shape, 16, 1)
        network = make()
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        return Teacher("mlp", Denoiser(network, VPCosine(), "v").to(device), dataset.shape, "mlp", blank=make)

    return Scene("digits, tiny mlp", dataset, teacher, 16, 2, {"direct": {"steps": 2, "pairs": 32}})


SCENES: dict[str, Callable[[], Scene]] = {"mlp": digits_mlp, "unet": colour_unet, "tiny": tiny_mlp}


class Pair:
    """A method's training by the harness, and all that its bare loop needs: both start from the same weights."""

    def __init__(self, scene: Scene, name: str, images: int, device: str, folder: Path, seed: int = 0) -> None:
        self.scene, self.images, self.device, self.seed, self.folder = scene, images, device, seed, folder
        self.name, cls = name, METHODS[name]
        self.config = cls.Config(**scene.settings.get(name, {}))
        self.method = self.build()
        self.teacher = copy.deepcopy(self.method.teacher.denoiser.network)
        self.student = copy.deepcopy(self.method.student)
        self.watches: tuple[Watch, ...] = ()

    def build(self) -> Method:
        """The method as it is before training."""
        cls, scene = METHODS[self.name], self.scene
        return build_method(cls, self.config, scene.teacher(self.device), self.seed, self.device)

    def _workspace(self, method: Method, energy: EnergyWatch | None = None) -> Workspace:
        meter = Meter(BudgetConfig(images=self.images), method.teacher, self.device, self.watches, energy)
        return Workspace(method.teacher, meter, self.folder / "pairs", self.device, self.seed, Progress(None))

    def train(self, advance: Callable[[float, str], None] = lambda fraction, note: None, watched: bool = False) -> Any:
        """By the harness, with a meter and states as in a run; no checkpoints.

        `watched`: threads sample memory and the GPU's energy is measured, as in every training of a run.
        """
        if not watched:
            return self._train(advance, None)
        with peak_rss_mib() as rss, peak_gpu_mib(self.device) as gpu, count_energy(self.device) as joules:
            self.watches = rss, gpu
            return self._train(advance, joules)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """A block without measurements by threads."""
        with ExitStack() as stack:
            for watch in self.watches:
                stack.enter_context(watch.paused())
            yield

    def _train(self, advance: Callable[[float, str], None], energy: EnergyWatch | None) -> Any:
        method, device, config = self.method, self.device, self.config
        workspace, data = self._workspace(method, energy), DataStream(self.scene.dataset, self.seed, device)
        states = StatesConfig()
        resume = Resume(States(self.folder / "states", states.keep, Progress(None)), states.seconds)
        read = data.read if method.reads_data(method.config) else None
        return train(method, config, workspace, read, Loop(self.scene.batch), Step(advance), resume=resume)

    def by_hand(self) -> Iterator[None]:
        """Its bare loop."""
        return LOOPS[self.name](self.task())

    def own_steps(self) -> tuple[Task, Iterator[None]]:
        """A bare loop of the method's own steps, and where it ends. Pairs are found that the harness has made."""
        method, task = self.build(), self.task()
        workspace = self._workspace(method)
        method.prepare(workspace)
        workspace.meter.stop()
        read = (lambda size: (task.x_0(size), None)) if method.reads_data(method.config) else None
        return task, own_steps(method, task, read)

    def task(self, on_device: bool = True) -> Task:
        """For the bare loop; random numbers are drawn on the device, or on the CPU as the harness does."""
        at = self.device if on_device else "cpu"
        draws, order = (torch.Generator(at).manual_seed(self.seed) for _ in range(2))
        dataset, config = self.scene.dataset, self.config
        task = Task(self.teacher, config, dataset.shape, self.scene.batch, self.images, draws, self.device, order=order)
        task.real = to_float(dataset.read(torch.arange(len(dataset)))).to(self.device)
        if isinstance(self.method, Boot):
            task.embedding = self.student.target_time
        if isinstance(self.method, ConsistencyTraining):
            task.fresh = lambda: copy.deepcopy(self.student.denoiser.network)
        if isinstance(self.method, Direct):
            eps, x_0, _ = self.method.store.read(torch.arange(config.pairs))
            task.pairs = eps, x_0
        return task
