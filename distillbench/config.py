"""From the words of the command line to checked, typed settings.

Hydra's Compose API reads the overrides. Every registered method, teacher and dataset is a config node made from its own
``Config`` dataclass, so ``methods=[boot,cm]`` and ``methods.boot.lr=3e-4`` are typed like everything else. Comma sweeps
(``seed=0,1,2``) become a grid of settings.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distillbench.budget import BudgetConfig
from distillbench.errors import UserError, nearest, unknown
from distillbench.evaluate import EvaluationConfig
from distillbench.options import option, require_between, require_positive
from distillbench.registry import Registry

HERE = Path(__file__).resolve().parent
GROUPS = {"methods": "methods", "dataset": "datasets", "teacher": "teachers"}  # config group: kind in the registry


@dataclass
class RunConfig:
    """Everything that a run depends on."""

    methods: dict[str, Any] = option({}, "the methods and their settings: methods=[boot,cm] methods.boot.lr=3e-4")
    dataset: Any = option(None, "the real images: dataset=digits")
    teacher: Any = option(None, "the frozen teacher: teacher=trained")
    budget: BudgetConfig = option(BudgetConfig, "how long every method trains")
    evaluation: EvaluationConfig = option(EvaluationConfig, "what is sampled and scored")
    batch_size: int = option(128, "images in a training step, for every method")
    seed: int = option(0, "seed of training: noise, times and the order of the data")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    threads: int = option(1, "CPU threads; small networks are fastest, and undisturbed, on one")
    results_dir: str = option("results", "where records and tables go")
    run_name: str = option("", "folder of this run below results_dir; empty: made from the dataset and what is run")

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "threads")
        require_between(self, 0, 2**63 - 1, "seed")
        if self.run_name and (Path(self.run_name).name != self.run_name or self.run_name in (".", "..")):
            raise UserError(f"run_name must be a plain folder name, got {self.run_name!r}")


def config_folder() -> Path:
    """The folder of YAML files: inside the package (wheel) or beside it (checkout)."""
    for folder in (HERE / "configs", HERE.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"the configuration files are missing: no config.yaml in {HERE / 'configs'}; reinstall distillbench")


def compose_runs(overrides: list[str], registry: Registry, need_methods: bool = True) -> list[RunConfig]:
    """One RunConfig for each point of the grid that `overrides` span. Raises UserError for whatever does not fit."""
    _store_nodes(registry)
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        parsed = _parse(overrides)
        _check_choices(parsed, registry)
        runs = [_compose(list(point), registry) for point in itertools.product(*map(_alternatives, parsed))]
    if need_methods and not all(run.methods for run in runs):
        raise UserError(f"no method given. Write methods=[NAME,...]; possible: {', '.join(sorted(registry.methods))}")
    return runs


def to_yaml(config: RunConfig) -> str:
    """The settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _store_nodes(registry: Registry) -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for group, kind in GROUPS.items():
        for name, entry in registry.of_kind(kind).items():
            package = f"methods.{name}" if group == "methods" else group
            store.store(group=group, name=name, package=package, node=_default(entry.cls.Config, name))


def _default(config: type, name: str) -> Any:
    # Checks of a plugin's defaults run when they are composed, not here: here only the kind is filled in.
    return OmegaConf.merge(OmegaConf.structured(config), {"kind": name})


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise UserError(f"cannot read the settings {' '.join(overrides)!r}: {_first_line(error)}") from error


def _alternatives(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _check_choices(parsed: list[Override], registry: Registry) -> None:
    for override in parsed:
        key = override.key_or_group
        if key in GROUPS:
            possible = _options(key)
        elif key == "experiment":
            possible = [*_options(key), "null"]
        else:
            continue
        for name in _names(override):
            if name not in possible:
                raise unknown(key.removesuffix("s"), name, possible)
    if not any(o.key_or_group == "dataset" for o in parsed):
        raise UserError(f"no dataset given. Write dataset=NAME; possible: {', '.join(_options('dataset'))}")


def _names(override: Override) -> list[str]:
    if override.is_sweep_override():
        values = [value.strip() for value in override.sweep_string_iterator()]
        return [name.strip() for value in values for name in value.strip("[]").split(",")]
    value = override.value()
    return [str(item) for item in value] if isinstance(value, list) else ["null" if value is None else str(value)]


def _options(group: str) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra

    return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def _compose(overrides: list[str], registry: Registry) -> RunConfig:
    shown = " ".join(overrides)
    choices = [o for o in overrides if o.split("=")[0].lstrip("+~") in (*GROUPS, "experiment")]
    try:
        _check_keys(overrides, compose("config", choices))
        config = compose("config", overrides)
        _check_kinds(config, registry)
        run = OmegaConf.to_object(config)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(f"cannot use the settings {shown!r}: {_first_line(cause)}{_setting(cause)}") from error
    assert isinstance(run, RunConfig)
    return run


def _check_keys(overrides: list[str], base: DictConfig) -> None:
    """Refuse a setting that does not exist, with its nearest neighbour on the same level."""
    for override in overrides:
        node: Any = base
        path = override.split("=")[0].lstrip("+~")
        for depth, part in enumerate(parts := path.split(".")):
            if not isinstance(node, DictConfig) or part not in node:
                where = ".".join(parts[:depth])
                if not isinstance(node, DictConfig):
                    raise UserError(f"no setting '{path}': '{where}' is a value, it has no settings below it")
                if where == "methods":
                    raise UserError(f"no setting '{path}': '{part}' is not among methods=[{','.join(map(str, node))}]")
                level = f" in '{where}'" if where else ""
                if not where and part == "experiment":
                    break
                names = sorted(str(name) for name in node)
                raise UserError(f"no setting '{part}'{level}.{nearest(part, names)} Possible: {', '.join(names)}")
            node = node[part]


def _check_kinds(config: DictConfig, registry: Registry) -> None:
    for group, kind in GROUPS.items():
        nodes = config.methods.items() if group == "methods" else [(group, config[group])]
        for name, node in nodes:
            expected = registry.get(kind, node.kind).cls.Config
            if OmegaConf.get_type(node) is not expected:
                raise UserError(f"{name}.kind is set by the choice of {group}; it cannot be changed to {node.kind!r}")


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _setting(error: BaseException) -> str:
    key = getattr(error, "full_key", None)
    return f" (setting {key})" if key else ""


def describe_options(config: Any) -> list[tuple[str, str, str, str]]:
    """(name, type, default, help) of every setting of a Config dataclass, nested ones as `outer.inner`."""
    rows = []
    for f in dataclasses.fields(config):
        if f.name == "kind":
            continue
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
        if dataclasses.is_dataclass(default):
            inner = describe_options(type(default))
            rows += [(f"{f.name}.{name}", kind, value, text) for name, kind, value, text in inner]
        else:
            shown = getattr(default, "value", default)
            rows.append((f.name, str(f.type), str(shown), f.metadata.get("help", "")))
    return rows
