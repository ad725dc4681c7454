"""Cells, and what several of them share: settings, dataset, teacher and evaluator."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from distillbench.datasets.dataset import Dataset
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Conditioning
from distillbench.diffusion.samplers import Solver
from distillbench.errors import Unavailable, UserError
from distillbench.evaluation.distributed import SharedNetworks
from distillbench.evaluation.evaluator import EVALUATION, ROW, Evaluator, features_kept
from distillbench.evaluation.features import Networks
from distillbench.evaluation.metric import Metric, Need
from distillbench.evaluation.pretrained_weights import weights_folder
from distillbench.evaluation.reference_statistics import RealImages, ReferenceFile
from distillbench.metering.energy import check_source
from distillbench.options import plain_settings
from distillbench.records.layout import ResultsFolder
from distillbench.registry import Entry, Registry
from distillbench.runs.config import RunConfig
from distillbench.runs.feature_order import FeatureOrder
from distillbench.runs.metric_choice import (
    check_real_features,
    chosen_metrics,
    described,
    features_in_words,
    read_references,
)
from distillbench.storage.files import canonical_json, check_room, check_writable
from distillbench.system.progress import Progress
from distillbench.teachers.latents import training_data
from distillbench.teachers.students import AS_TEACHER, StudentForm
from distillbench.teachers.teacher import Teacher, TeacherSource
from distillbench.training.budget import TrainingCost
from distillbench.training.build import build_method, restored_method
from distillbench.training.compute import check_access, check_compute, check_sampling
from distillbench.training.data_parallel import SINGLE_RANK, Ranks
from distillbench.training.method import Method, MethodConfig


def _settings_but(*names: str) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(RunConfig) if f.name not in names)


SHARED_SETTINGS = _settings_but("methods", "seed")  # settings that decide a context
CELL_SETTINGS = _settings_but("methods", "seed", "run_name")  # decide a method's cell, with the method's own
TEACHER_SETTINGS = tuple(
    name
    for name in CELL_SETTINGS
    if name not in ("budget", "batch_size", "guidance_range", "compute", "student", "augment")
)


@dataclass
class SharedContext:
    """What the cells of the same settings share. The teacher and the evaluator are made when they are first needed."""

    config: RunConfig
    registry: Registry
    device: str
    dataset: Dataset
    source: TeacherSource
    conditioning: Conditioning
    metrics: dict[str, type[Metric]]
    weights: Path  # folder of feature networks' weights
    references: list[ReferenceFile]
    teacher: Teacher | None = None
    evaluator: Evaluator | None = None
    students: StudentForm = AS_TEACHER
    ranks: Ranks = SINGLE_RANK  # the processes that train and sample together
    noise: str = EVALUATION  # the purpose of what is sampled: each has noise of its own
    cached_identities: dict[str, Any] | None = None  # in a block of `identities_cached`
    cached_protocol: str = ""  # the same

    @property
    def folder(self) -> ResultsFolder:
        return ResultsFolder.of(self.config.results_dir)

    def check_room(self) -> None:
        """Raise UserError unless the disk has room to score a row: before training, not only when it is needed."""
        check_room(self.folder.root, self.config.evaluation.bytes_of_row(self.dataset.shape), ROW)

    def load_teacher(self, progress: Progress) -> Teacher:
        if self.teacher is None:
            self.teacher = self.source.load(progress).conditioned(self.conditioning).with_students(self.students)
            if tuple(self.teacher.image_shape) != tuple(self.dataset.shape):
                shape = tuple(self.teacher.image_shape)
                raise UserError(
                    f"the teacher does not fit the dataset: it makes images of (C,H,W) = {shape}, the dataset's are "
                    f"{tuple(self.dataset.shape)}"
                )
        return self.teacher

    @contextmanager
    def identities_cached(self) -> Iterator[None]:
        """Look up the weights of feature networks once in the block, and not for each of thousands of cells."""
        self.cached_identities = self.metric_identities()
        try:
            yield
        finally:
            self.cached_identities, self.cached_protocol = None, ""

    def metric_identities(self) -> dict[str, Any]:
        """By metric: what decides its values, such as the weights that are installed."""
        if self.cached_identities is not None:
            return self.cached_identities
        real = {name: {"real": words} for name, cls in self.metrics.items() if (words := self._real(cls))}
        return {name: cls.identity(self.weights) | real.get(name, {}) for name, cls in self.metrics.items()}

    def _real(self, metric: type[Metric]) -> str:
        return features_in_words(metric, self.config.evaluation, self.dataset, self.references)

    def columns(self) -> dict[str, dict[str, str]]:
        """By metric: its declarations in this run, for tables and reports."""
        return described(self.metrics, self.config.evaluation, self.dataset, self.references)

    def training_images(self, progress: Progress) -> Dataset:
        """The images of the dataset, or their latents for a latent diffusion teacher."""
        cache = self.folder.cache("latents")
        return training_data(self.dataset, self.load_teacher(progress), cache, self.device, progress)

    def get_evaluator(self, progress: Progress) -> Evaluator:
        if self.evaluator is None:
            networks = Networks(self.weights, self.device)
            if self.ranks.count > 1:
                order = FeatureOrder(self.config, self.registry.selection)
                networks = SharedNetworks(self.weights, self.device, self.ranks, order)
            cache = self.folder.cache("references")
            real = RealImages(
                self.dataset, networks, cache, self.references, features_kept(self.metrics),
                self.config.evaluation.real_features,
            )  # fmt: skip
            answers = self.folder.cache("answers")
            parts = self.metrics, real, self.load_teacher(progress), progress, answers
            self.evaluator = Evaluator(self.config.evaluation, *parts, self.ranks, self.noise)
        return self.evaluator

    def release_evaluator(self) -> None:
        """Free the GPU memory of metrics and feature networks. They are made again when they are needed."""
        if self.device != "cpu":
            self.evaluator = None

    def describe_references(self, progress: Progress) -> dict[str, str]:
        """By feature network: the real images that the scores compare with."""
        compared = [cls for cls in self.metrics.values() if cls.needs & {Need.real, Need.real_images}]
        networks = {cls.network for cls in compared if cls.network is not None}
        real = self.get_evaluator(progress).real
        words = {network.name: real.describe(network) for network in sorted(networks, key=lambda n: n.name)}
        for cls in compared:
            if cls.network is not None and (part := self._real(cls)) and part not in words[cls.network.name]:
                words[cls.network.name] += f"; {part}"
        return words

    def unavailable_metrics(self) -> dict[str, str]:
        """Metrics whose weights are missing, with the reason."""
        reasons = {}
        for name, cls in self.metrics.items():
            try:
                if cls.network is not None:
                    cls.network.locate(self.weights)
            except Unavailable as reason:
                reasons[name] = str(reason)
        return reasons


@dataclass(frozen=True)
class PlanSpeed:
    """How fast the few steps of a plan were, which compute no gradients; 0: there were none."""

    image: float = 0.0  # seconds of a training image
    evaluation: float = 0.0  # seconds of a network evaluation
    pair_evaluations: int = 0  # before the first step of a phase


@dataclass
class Cell:
    """One method with its settings and a seed, or the teacher itself (`entry` None)."""

    shared: SharedContext
    name: str
    entry: Entry | None = None
    method_config: MethodConfig | None = None
    seed: int | None = None
    solver: Solver | None = None  # of the teacher itself
    cost: TrainingCost = field(default_factory=TrainingCost)  # estimated
    cost_varies: bool = False  # the estimate is a mean: the cost of a step is random
    plan_speed: PlanSpeed = PlanSpeed()
    compared: float = 0.0  # images that LPIPS evaluates for each training image, estimated
    group_size: int = 1  # the method's, once it is known
    nfe: list[int] = field(default_factory=list)  # of its rows
    cost_error: str = ""  # why the cost could not be estimated
    differs: str = ""  # the settings that tell it from other cells of the run, such as "lr=0.0001"

    @property
    def label(self) -> str:
        seed = "" if self.seed is None else f"(seed {self.seed})"
        return " ".join(filter(None, [self.name, self.differs, seed]))

    @property
    def names(self) -> tuple[str, str]:
        """The name of its method, or of the teacher's sampler, in tables; and the same in full."""
        if self.entry is not None:
            return self.entry.cls.names()
        sampler = self.sampler().label
        return f"teacher, {sampler}", f"the teacher, sampled with {sampler}"

    @property
    def reads_data(self) -> bool:
        """Whether it trains a method on real images."""
        return self.entry is not None and bool(self.entry.cls.reads_data(self.method_config))

    @property
    def augmentation(self) -> dict[str, Any]:
        """The settings of the augmentation of its real images, as plain values; {} without."""
        return self.shared.config.augment.plain() if self.reads_data else {}

    def sampler(self) -> Solver:
        """Of the teacher's rows."""
        assert self.solver is not None
        return self.solver


class SharedContexts:
    """Shared contexts by their settings, each made once.

    In a grid of thousands of points most settings are the same objects, so their text is cached by `id`.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, SharedContext] = {}
        self._texts: dict[int, tuple[Any, str]] = {}  # by id: the settings (which keeps the id valid), and their text

    def of(self, config: RunConfig, registry: Registry) -> SharedContext:
        """The context of these settings, the same for all that differ only in methods and seed."""
        identity = self._settings(config, SHARED_SETTINGS)
        if identity not in self.known:
            self.known[identity] = _make_context(config, registry)
        return self.known[identity]

    def identity(self, cell: Cell) -> Hashable:
        """Equal for cells that occur twice in a grid, such as the teacher's rows at several budgets."""
        names = CELL_SETTINGS if cell.entry is not None else TEACHER_SETTINGS
        if not cell.reads_data:  # then nothing is augmented
            names = tuple(name for name in names if name != "augment")
        settings = self._settings(cell.shared.config, names)
        return settings, cell.name, self.text(cell.method_config), cell.seed

    def _settings(self, config: RunConfig, names: Sequence[str]) -> Hashable:
        values = (getattr(config, name) for name in names)
        return tuple(value if type(value) in (str, int, float, bool) else self.text(value) for value in values)

    def text(self, value: Any) -> str:
        """The settings as JSON; equal settings have equal texts."""
        if not dataclasses.is_dataclass(value):
            return canonical_json(value)
        if id(value) not in self._texts:
            self._texts[id(value)] = value, canonical_json(plain_settings(value))
        return self._texts[id(value)][1]


def _make_context(config: RunConfig, registry: Registry) -> SharedContext:
    device = device_of(config)
    check_writable(Path(config.results_dir))
    if not config.executor.elsewhere:  # other machines have their own devices
        check_compute(config.compute, device)
        check_sampling(config.evaluation.sampling, device)
        in_process = config.evaluation.timing == "process"
        check_access(device, ["isolate=false"] * config.isolate + ["evaluation.timing=inline"] * in_process)
    metrics = chosen_metrics(config.evaluation, registry)
    check_source(config.energy)
    dataset, source, conditioning = make_source(config, registry, device)
    source.plan()
    schedule = source.untrained().schedule
    for solver in config.evaluation.solvers():
        for steps in config.evaluation.teacher_steps:
            solver.times(schedule, steps)  # raises if the time grid has no such number of steps
    weights = weights_folder()
    references = read_references(config.evaluation, metrics, dataset, weights)
    check_real_features(config.evaluation, metrics, dataset, references)
    parts = config, registry, device, dataset, source, conditioning, metrics, weights, references
    return SharedContext(*parts, students=StudentForm.of(config.student))


def make_source(config: RunConfig, registry: Registry, device: str) -> tuple[Dataset, TeacherSource, Conditioning]:
    """The dataset, the source of the teacher and their conditioning, by the settings."""
    dataset = registry.get("datasets", config.dataset.kind).cls(config.dataset)
    if config.conditional and not dataset.classes:
        raise UserError(f"conditional=true needs class labels, and dataset={dataset.name} has none")
    drawn = tuple(config.guidance_range)
    family = registry.get("teachers", config.teacher.kind).cls
    _check_reads(config, dataset, family)
    conditioning = WITHOUT_CLASSES
    if config.conditional:
        w_range = (drawn[0], drawn[1]) if drawn else None
        conditioning = Conditioning(dataset.classes, config.guidance, w_range, dataset.evaluated)
    cache = ResultsFolder.of(config.results_dir).cache("teachers")
    return dataset, family(config.teacher, dataset, cache, device, conditioning), conditioning


def _check_reads(config: RunConfig, dataset: Dataset, family: type[TeacherSource]) -> None:
    """Refuse a text-to-image teacher without texts, and a class-conditional one with texts."""
    name = config.teacher.kind
    if family.reads == "texts" and not (config.conditional and dataset.prompts):
        missing = "conditional=true" if dataset.prompts else "a dataset with texts, such as dataset=prompts"
        raise UserError(f"teacher={name} is a text-to-image model and needs {missing}")
    if family.reads != "texts" and config.conditional and dataset.prompts:
        raise UserError(f"conditional=true: teacher={name} is class-conditional, and dataset={dataset.name} has texts")


def build(cell: Cell, teacher: Teacher, device: str = "") -> Method:
    """The untrained method of a cell, with its networks on `device` (default: the run's)."""
    assert cell.entry is not None and cell.method_config is not None
    return build_method(cell.entry.cls, cell.method_config, teacher, cell.seed or 0, device or cell.shared.device)


def restored(cell: Cell, teacher: Teacher, weights: Path) -> Method:
    """The method of a cell with the weights of a finished training or of a checkpoint, in evaluation mode."""
    assert cell.entry is not None and cell.method_config is not None
    device = cell.shared.device
    state = load_file(weights, device=device)
    return restored_method(cell.entry.cls, cell.method_config, teacher, cell.seed or 0, device, state)


def device_of(config: RunConfig) -> str:
    """The first device of a run. If other machines run the cells, this one plans on the CPU.

    Raises UserError for a device that does not exist here.
    """
    if config.executor.elsewhere:
        return "cpu"
    devices = [choose_device(name) for name in config.executor.devices] or [choose_device(config.device)]
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise UserError(f"executor.devices must be of one kind, got {', '.join(devices)}")
    return devices[0]


def choose_device(name: str) -> str:
    """Resolve "auto" to cuda if torch finds a GPU, else cpu. Raises UserError for a device that does not exist here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    if name != "cuda" and not name.startswith("cuda:"):
        raise UserError(f"no device {name!r}. Possible: auto, cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"device={name}: torch finds no CUDA device here. Possible: auto, cpu")
    count = torch.cuda.device_count()
    index = name.removeprefix("cuda").removeprefix(":") or "0"
    if not (index.isdigit() and int(index) < count):
        raise UserError(f"no device {name!r}. Possible: {', '.join(f'cuda:{i}' for i in range(count))}")
    return name
