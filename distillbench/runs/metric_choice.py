"""The metrics and the reference files of a run, found by the names in its settings."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path

from distillbench.datasets.dataset import Dataset
from distillbench.errors import UserError, unknown
from distillbench.evaluation.metric import Metric, Need
from distillbench.evaluation.reference_statistics import (
    ReferenceFile,
    check_reference,
    drawn_in_words,
    provenance_of,
    read_reference,
)
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.registry import Registry


def chosen_metrics(config: EvaluationConfig, registry: Registry) -> dict[str, type[Metric]]:
    """The metric classes by name, with patterns expanded. Raises UserError for a name that is not registered."""
    names: dict[str, None] = {}
    for name in config.metrics:
        found = [name] if name in registry.metrics else sorted(fnmatch.filter(registry.metrics, name))
        if not found:
            raise unknown("metric", name, registry.metrics, " in evaluation.metrics")
        names |= dict.fromkeys(found)
    return {name: registry.metrics[name].cls for name in names}


def metric_to_optimise(
    metrics: Mapping[str, type[Metric]], asked: str | None, config: EvaluationConfig, none: str, where: str
) -> str:
    """The name of the score that a search optimises: `asked`, or the first that has a direction.

    Raises UserError, which begins with `none` if no score has a direction; `where` says where they are named.
    """
    able = [name for name, cls in metrics.items() if cls.direction != "none"]
    if not able:
        raise UserError(f"{none} can be optimised: evaluation.metrics={config.metrics}")
    name = asked or able[0]
    if name not in able:
        raise unknown("metric to optimise", name, able, where)
    return name


def read_references(
    config: EvaluationConfig, metrics: dict[str, type[Metric]], dataset: Dataset, weights: Path
) -> list[ReferenceFile]:
    """The reference files, each used by some metric. Raises UserError for a file that does not fit the run."""
    networks = {cls.network.name: cls.network for cls in metrics.values() if cls.network}
    files: dict[str, ReferenceFile] = {}
    for word in config.references:
        file = read_reference(Path(word))
        name = str(file.provenance.get("network", ""))
        if file.provenance and name not in networks:
            asked = ", ".join(sorted(networks)) or "none"
            raise UserError(f"{word}: a reference of network {name!r}, and this run's metrics use: {asked}")
        network = networks.get(name)
        identity = network.identity(weights) if network else {}
        check_reference(file, provenance_of(dataset, identity), network.width if network else 0)
        if name in files:
            raise UserError(f"{word} and {files[name].path.name} are both references of network {name!r}")
        files[name] = file
    return list(files.values())


def references_of(config: EvaluationConfig, metric: type[Metric]) -> list[str]:
    """The reference files of the settings that `metric` compares with."""
    if metric.network is None:
        return []
    name = metric.network.name
    return [word for word in config.references if read_reference(Path(word)).provenance.get("network") == name]


def check_real_features(
    config: EvaluationConfig, metrics: Mapping[str, type[Metric]], dataset: Dataset, references: Sequence[ReferenceFile]
) -> None:
    """Raise UserError if evaluation.real_features keeps fewer features than a metric needs."""
    for name, metric in metrics.items():
        drawn = features_in_words(metric, config, dataset, references) == drawn_in_words(config.real_features)
        if drawn and config.real_features < metric.fewest_real:
            raise UserError(
                f"evaluation.real_features={config.real_features} is too few for {name}, which needs the features of "
                f"at least {metric.fewest_real:,} real images (0: all)"
            )


def features_in_words(
    metric: type[Metric], config: EvaluationConfig, dataset: Dataset, references: Sequence[ReferenceFile]
) -> str:
    """Which real images' features `metric` compares with, if not those of all; else the empty string."""
    if not {Need.real_images, Need.features} <= metric.needs or metric.network is None:
        return ""
    file = next((file for file in references if file.provenance["network"] == metric.network.name), None)
    if file is not None and file.features is not None:
        return f"features of {len(file.features):,} real images in {file.path.name}"
    count = config.real_features
    return drawn_in_words(count) if 0 < count < len(dataset) else ""


def described(
    metrics: Mapping[str, type[Metric]], config: EvaluationConfig, dataset: Dataset,
    references: Sequence[ReferenceFile],
) -> dict[str, dict[str, str]]:  # fmt: skip
    """By metric: its declarations, for tables and reports."""
    found = {}
    for name, cls in metrics.items():
        found[name] = cls.describe()
        if words := features_in_words(cls, config, dataset, references):
            found[name]["protocol"] += f"; {words}"
    return found
