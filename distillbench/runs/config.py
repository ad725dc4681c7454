"""Typed and checked settings from command-line arguments.

Hydra's Compose API reads the overrides. Every registered method, teacher and dataset is a config node made from its own
``Config`` dataclass, so ``methods=[boot,cm]`` and ``methods.boot.lr=3e-4`` are typed like everything else. Comma sweeps
(``seed=0,1,2``) become a grid of settings. An invalid setting is a :class:`UserError` with its full name.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from distillbench.datasets.augmentation import AugmentConfig
from distillbench.errors import UserError, nearest, quoted, unknown
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.options import option, require_between, require_one_of, require_positive
from distillbench.records.layout import CACHE, CELLS
from distillbench.registry import Registry
from distillbench.runs.config_grid import PointBuilder
from distillbench.runs.executor_config import EXECUTORS, ExecutorConfig, LocalConfig
from distillbench.runs.overrides import (
    CHOICES,
    GROUPS,
    LONGEST_NAME,
    below_value,
    config_folder,
    first_line,
    grid_points,
    no_dataset,
    no_method,
    no_setting,
    parse_override,
)
from distillbench.runs.released_teacher import released_teacher
from distillbench.runs.written_values import expand_home, is_enum, type_in_words, written_value
from distillbench.teachers.students import StudentConfig
from distillbench.training.budget import BudgetConfig, Limit
from distillbench.training.compute import ComputeConfig
from distillbench.training.method import MethodConfig

ON_OOM = ("fail", "accumulate")
RESERVED_NAMES = (".", "..", CELLS, CACHE)  # not for runs
LARGEST_INTEGER = 2**63 - 1


@dataclass
class StatesConfig:
    """Training states, from which an interrupted training resumes."""

    seconds: float = option(300.0, "between two states")
    keep: int = option(2, "how many of the last are kept")

    def __post_init__(self) -> None:
        require_between(self, 0, float("inf"), "seconds")
        require_between(self, 1, 100, "keep")


@dataclass
class RunConfig:
    """All settings of a run."""

    methods: dict[str, Any] = option({}, "the methods and their settings: methods=[boot,cm] methods.boot.lr=3e-4")
    dataset: Any = option(None, "the real images: dataset=digits")
    teacher: Any = option(None, "the frozen teacher: teacher=trained")
    conditional: bool = option(False, "class-conditional teacher and students, for a dataset with labels")
    guidance: float = option(1.0, "w of the teacher's classifier-free guidance, f_0 + w (f_c - f_0); 1: none")
    guidance_range: list[float] = option(
        [], "[LOW,HIGH]: students are trained on every w in it, and sampled with w = guidance"
    )
    budget: BudgetConfig = option(BudgetConfig, "how long every method trains")
    evaluation: EvaluationConfig = option(EvaluationConfig, "what is sampled and scored")
    student: StudentConfig = option(StudentConfig, "the network of the students: the teacher's, adapters, or another")
    compute: ComputeConfig = option(ComputeConfig, "precision, compilation and memory of networks in training")
    augment: AugmentConfig = option(AugmentConfig, "random augmentation of the real images of training")
    batch_size: int = option(128, "images of a training step, for every method")
    microbatch: int = option(
        0, "most images that a process computes at once (gradient accumulation); 0: its whole share of a batch"
    )
    on_oom: str = option(
        "fail", "if training runs out of memory: fail, or accumulate (start again with half of the images at once)"
    )
    seed: int = option(0, "training seed: noise, times and the order of the data")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(1, "CPU threads; small networks are fastest with one")
    executor: Any = option(None, "where cells run: executor=local, submitit (Slurm) or ray")
    isolate: bool = option(True, "run each cell in its own process, so that a crash fails one row only")
    cell_seconds: float = option(0.0, "time limit of the process of a cell; 0: none")
    states: StatesConfig = option(StatesConfig, "training states, from which an interrupted training resumes")
    estimate_seconds: float = option(20.0, "about the most that an estimate of the run's time may take; 0: none")
    energy: str = option("nvml", "how energy is measured: nvml (the GPU's counter) or zeus (an extra)")
    results_dir: str = option("results", "folder for records and tables", path=True)
    run_name: str = option("", "name of this run's folder in results_dir; empty: made from the dataset and the cells")

    def __post_init__(self) -> None:
        require_positive(self, "batch_size")
        require_between(self, 0, LARGEST_INTEGER, "seed")
        require_between(self, 1, os.cpu_count() or 1, "threads")
        require_one_of(self, "energy", ("nvml", "zeus"))
        require_between(self, 0, LARGEST_INTEGER, "microbatch")
        require_one_of(self, "on_oom", ON_OOM)
        require_between(self, 0, float("inf"), "cell_seconds", "estimate_seconds")
        if self.student.lora_rank and self.compute.shard:
            raise UserError(
                f"student.lora_rank={self.student.lora_rank} does not go with compute.shard=true: FSDP of adapters is "
                "untested. Adapters need little memory for gradients and moments: try it without sharding"
            )
        self._check_guidance()
        self._check_executor()
        if not self.results_dir.strip():
            raise UserError("results_dir must name a folder, got ''")
        if self.run_name and not _is_folder_name(self.run_name):
            wanted = "a plain folder name other than cells and cache"
            raise UserError(f"run_name must be {wanted}, got {quoted(self.run_name)}")

    def _check_executor(self) -> None:
        if self.executor is None:
            self.executor = LocalConfig(kind="local")
        where: ExecutorConfig = self.executor
        if isinstance(where, LocalConfig) and where.count > 1 and not self.isolate:
            raise UserError(
                f"executor.workers={where.count} needs isolate=true: parallel cells run in separate processes"
            )
        if isinstance(where, LocalConfig) and where.devices and self.device != "auto":
            raise UserError(f"device={self.device} and executor.devices exclude each other")
        if where.elsewhere and self.device.startswith("cuda:"):
            raise UserError(
                f"device={self.device} has no meaning with executor={where.kind}, which chooses. Write device=cuda"
            )
        if where.shares and self.evaluation.timing != "off":
            later = "Write evaluation.timing=off; the same command without it, one cell at a time, measures speed later"
            raise UserError(f"{where.shares}: parallel cells disturb each other's timing. {later}")
        if where.shares and self.budget.limit == Limit.seconds:
            raise UserError(f"{where.shares}: parallel cells slow each other down. Use another budget.limit")

    def _check_guidance(self) -> None:
        require_between(self, 0, float("inf"), "guidance")
        asked = "guidance_range" if self.guidance_range else f"guidance={self.guidance:g}"
        if not self.conditional and (self.guidance_range or self.guidance != 1):
            raise UserError(f"{asked} needs conditional=true: guidance needs a class-conditional teacher")
        if self.guidance_range:
            if len(self.guidance_range) != 2 or not 0 <= self.guidance_range[0] < self.guidance_range[1]:
                raise UserError(f"guidance_range must be [LOW,HIGH] with 0 <= LOW < HIGH, got {self.guidance_range}")
            low, high = self.guidance_range
            require_between(self, low, high, "guidance")


def _is_folder_name(name: str) -> bool:
    plain = Path(name).name == name and name.isprintable() and len(name.encode()) <= LONGEST_NAME
    return plain and name not in RESERVED_NAMES


def compose_runs(words: list[str], registry: Registry, need_methods: bool = True) -> list[RunConfig]:
    """One RunConfig for each point of the grid that the overrides `words` span. Raises UserError for invalid ones."""
    _store_nodes(registry)
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        points = grid_points([parse_override(word, registry) for word in words], registry)
        bases: dict[tuple[str, ...], DictConfig] = {}
        known: dict[tuple[str, ...], PointBuilder] = {}
        if len(points) == 1:
            runs = [_compose(points[0], bases, registry)[1]]
        else:
            runs = [_settings(point, bases, known, registry) for point in points]
    for run in runs:
        expand_home(run)
    if need_methods and not all(run.methods for run in runs):
        raise no_method(registry.methods)
    if any(run.executor != runs[0].executor for run in runs):
        raise UserError("executor cannot be swept: a run has one")
    return runs


def compose_group(words: list[str], name: str, group: type, registry: Registry) -> Any:
    """The settings of a group beside those of a run, such as tune.trials=16. Raises UserError for invalid ones."""
    base = OmegaConf.create({name: OmegaConf.structured(group)})
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        values = [parse_override(word, registry) for word in words]
    if swept := [str(value.input_line) for value in values if value.is_sweep_override()]:
        raise UserError(f"{name}.* takes one value of each setting, got {quoted(swept[0])}")
    try:
        return _instantiate(_changed(base, values))[name]
    except OmegaConfBaseException as error:
        raise _explained(error, values, base) from error


def to_yaml(config: RunConfig) -> str:
    """The settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _store_nodes(registry: Registry) -> None:
    """Store the Config of everything in `registry`, and of nothing else, as Hydra's config groups."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for kind, config in EXECUTORS.items():
        store.store(group="executor", name=kind, node=_default(config, kind))  # type: ignore[arg-type]  # a dataclass's type is hashable
    for group, kind in GROUPS.items():
        store.repo.pop(group, None)
        for name, entry in registry.of_kind(kind).items():
            package = f"methods.{name}" if group == "methods" else group
            store.store(group=group, name=name, package=package, node=_default(entry.cls.Config, name))


@functools.lru_cache(maxsize=256)
def _default(config: type, name: str) -> DictConfig:
    # Only `kind` is set here. The checks of a plugin's defaults run when they are composed.
    return typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(config), {"kind": name}))


# --- grid point to typed settings ------------------------------------------------------------------------------------


def _settings(
    point: list[Override], bases: dict[tuple[str, ...], DictConfig], known: dict[tuple[str, ...], PointBuilder],
    registry: Registry,
) -> RunConfig:  # fmt: skip
    """The settings at one grid point, made from a `known` point with the same choices if that is possible."""
    choices = _choices(point)
    if choices not in known:
        node, run = _compose(point, bases, registry)
        known[choices] = PointBuilder(node, run)
        if not known[choices].usable:
            return run
    given = [s for s in point if s.key_or_group not in CHOICES]
    try:
        node = known[choices].node
        values = [(s.key_or_group, str(s.input_line), written_value(s, node)) for s in given]
        return known[choices].build(values, _check_number)
    except Exception:  # invalid, or not buildable: composing raises the error with its message
        return _compose(point, bases, registry)[1]


def _choices(point: list[Override]) -> tuple[str, ...]:
    return tuple(str(s.input_line) for s in point if s.key_or_group in CHOICES)


def _compose(
    point: list[Override], bases: dict[tuple[str, ...], DictConfig], registry: Registry
) -> tuple[DictConfig, RunConfig]:
    """The settings at one grid point. `bases` caches the composition of the choices alone, which many points share."""
    choices = _choices(point)
    values = [s for s in point if s.key_or_group not in CHOICES]
    base: DictConfig | None = None
    try:
        if choices not in bases:
            bases[choices] = _keep_chosen(compose("config", list(choices)), registry)
        base = bases[choices]
        _check_dataset(base, registry)
        if family := released_teacher(point, base, registry):
            return _compose([*point, parse_override(f"teacher={family}", registry)], bases, registry)
        config = _changed(base, values)
        _check_groups(config, base, values)
        return config, _instantiate(config)
    except YAMLError as error:
        raise UserError(f"an experiment is not YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(error, values, base) from error


def _changed(base: DictConfig, values: list[Override]) -> DictConfig:
    config = copy.deepcopy(base)
    for setting in values:
        _check_name(setting.key_or_group, base)
        value = written_value(setting, base)
        replaces = isinstance(value, dict) and _takes_any_name(OmegaConf.select(config, setting.key_or_group))
        OmegaConf.update(config, setting.key_or_group, value, merge=not replaces)
    return config


def _keep_chosen(config: DictConfig, registry: Registry) -> DictConfig:
    """`config` without an experiment's settings for methods that are not chosen. These are checked, too."""
    for name, node in list(config.methods.items()):
        if dataclasses.is_dataclass(OmegaConf.get_type(node)):
            continue
        if name not in registry.methods and not registry.broken:  # otherwise it may belong to a broken plugin
            raise unknown("method", name, registry.methods, " in an experiment")
        try:
            if name in registry.methods:
                OmegaConf.merge(_default(registry.methods[name].cls.Config, name), node)
        except (OmegaConfBaseException, ValueError) as error:
            raise UserError(f"an experiment has an invalid setting of methods.{name}: {first_line(error)}") from error
        with open_dict(config):
            del config.methods[name]
    return config


def _check_dataset(base: DictConfig, registry: Registry) -> None:
    if base.dataset is None:
        raise no_dataset(registry.datasets)


def _check_name(path: str, base: DictConfig) -> None:
    """Refuse a setting that does not exist, and suggest the nearest name on the same level."""
    if path in CHOICES:
        return
    node: Any = base
    parts = path.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if not isinstance(node, DictConfig):
            raise below_value(path, where)
        if part not in list(node):  # not `in node`, which is False for settings without a default
            raise _no_setting(path, part, where, node)
        node = None if OmegaConf.is_missing(node, part) else node[part]


def _takes_any_name(node: Any) -> bool:
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict


def _no_setting(path: str, part: str, where: str, node: DictConfig) -> UserError:
    group, kind = OmegaConf.get_type(node), str(node.kind) if where in CHOICES[1:] else ""
    replaced = group.replaced if isinstance(group, type) and issubclass(group, MethodConfig) else {}
    return no_setting(path, part, where, map(str, node), kind, replaced)


def _check_groups(config: DictConfig, base: DictConfig, values: list[Override]) -> None:
    """Refuse a value for a whole group of settings, and a changed kind."""
    for path in ("dataset", "teacher", "executor", *(f"methods.{name}" for name in base.methods)):
        node, expected = OmegaConf.select(config, path), OmegaConf.select(base, path)
        if OmegaConf.get_type(node) is not OmegaConf.get_type(expected):
            raise UserError(f"{path} must be {_wanted_group(path, expected)}, got {_given(path, values)}")
        if node.kind != expected.kind:
            raise UserError(f"{path}.kind is {expected.kind!r} by choice and cannot be changed, got {node.kind!r}")


def _instantiate(config: DictConfig) -> Any:
    """Instantiate the dataclasses of `config`, innermost first, so that an error can name its group."""
    for path, node in _groups(config):
        try:
            OmegaConf.to_object(node)
        except UserError as error:
            raise UserError(_located(path, node, str(error))) from error
        except OmegaConfBaseException:
            raise
        except Exception as error:  # a third-party Config may raise anything
            raise UserError(f"{path or 'settings'}: {type(error).__name__}: {first_line(error)}") from error
        for name in node:
            _check_number(_join(path, str(name)), node[name])
    run = OmegaConf.to_object(config)
    try:
        OmegaConf.structured(run)
    except OmegaConfBaseException as error:  # an interpolation may have a value of another type
        raise UserError(f"{error.full_key or 'settings'}: {first_line(error)}") from error
    return run


def _groups(node: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """(path, node) of every dataclass in `node`, innermost first."""
    for name in node:
        if not OmegaConf.is_interpolation(node, str(name)) and isinstance(node[name], DictConfig):
            yield from _groups(node[name], _join(path, str(name)))
    if dataclasses.is_dataclass(OmegaConf.get_type(node)):
        yield path, node


def _check_number(path: str, given: Any) -> None:
    """Refuse a number that JSON records cannot hold."""
    for value in given if isinstance(given, ListConfig | list) else [given]:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path} must be finite, got {value}")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise UserError(f"{path} must be below 2^63, got {quoted(str(value))}")


# --- error messages --------------------------------------------------------------------------------------------------


def _located(path: str, node: DictConfig, message: str) -> str:
    """`message` of the dataclass at `path`, with the full name of the setting."""
    if not path or message.startswith(f"{path}."):
        return message
    return f"{path}.{message}" if message.split(" ")[0] in list(node) else f"{path}: {message}"


def _explained(error: Exception, values: list[Override], base: DictConfig | None) -> UserError:
    """An error of Hydra or OmegaConf, in terms of the command line."""
    if base is None or not isinstance(error, OmegaConfBaseException) or not error.full_key:
        return UserError(f"cannot use the settings: {first_line(error, 2)}")
    path = error.full_key.partition("[")[0]
    parent, _, name = path.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    hints = typing.get_type_hints(OmegaConf.get_type(node))
    if name not in list(node):
        return _no_setting(path, name, parent, node)
    if name not in hints:
        return UserError(f"cannot use {path}={_given(path, values)}: {first_line(error)}")
    wanted = _wanted_group(path, node[name]) if dataclasses.is_dataclass(hints[name]) else type_in_words(hints[name])
    given = _given(path, values)
    if isinstance(error, MissingMandatoryValue):
        return UserError(f"{path} must be given: {wanted}")
    if not given or isinstance(error, InterpolationResolutionError):
        return UserError(f"{path} must be {wanted}: {first_line(error)}")
    near = nearest(given.strip("'"), [member.name for member in hints[name]]) if is_enum(hints[name]) else ""
    return UserError(f"{path} must be {wanted}, got {given}{near and '.'}{near}")


def _given(path: str, values: list[Override]) -> str:
    """The value on the command line that decides the setting at `path`, in quotes, or an empty string."""
    deciding = [s for s in values if path == s.key_or_group or path.startswith(f"{s.key_or_group}.")]
    return quoted(str(deciding[-1].input_line).partition("=")[2]) if deciding else ""


def _wanted_group(path: str, node: DictConfig) -> str:
    names = [str(name) for name in node if name != "kind"]
    return f"a group of settings, to be changed one by one ({path}.{names[0] if names else 'NAME'}=...)"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def describe_options(config: type) -> list[tuple[str, str, str]]:
    """(name, default, help) of every setting of a Config dataclass, nested ones as `outer.inner`."""
    return [row[:3] for row in described_types(config)]


def described_types(config: type) -> list[tuple[str, str, str, str, str]]:
    """The same with "int", "float", "bool" or "" for another type, and the type in words."""
    return list(_described(OmegaConf.structured(config)))


def _described(node: DictConfig) -> Iterator[tuple[str, str, str, str, str]]:
    defaults: Any = OmegaConf.to_container(node, enum_to_str=True)
    config: Any = OmegaConf.get_type(node)
    hints = typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        inner = OmegaConf.get_type(node, f.name)
        if dataclasses.is_dataclass(inner):
            for name, default, help_, kind, wanted in _described(node[f.name]):
                yield f"{f.name}.{name}", default, help_, kind, wanted
        elif f.name != "kind":
            default = defaults[f.name]
            hint = hints[f.name]
            kind = hint.__name__ if hint in (int, float, bool) else ""
            text = "null" if default is None else str(default)
            yield f.name, text, f.metadata.get("help", ""), kind, type_in_words(hint)
