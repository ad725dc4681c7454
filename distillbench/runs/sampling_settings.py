"""Settings of a method that only its sampling uses: ``option(..., sampling=True)``.

A training gets their defaults and its key does not have them, so students are sampled with other values without being
trained again. The keys of evaluations and of sampling speed have those that differ from the defaults.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from distillbench.runs.shared_context import plain_settings
from distillbench.training.method import MethodConfig


def as_trained(config: MethodConfig) -> MethodConfig:
    """The settings as a training sees them: those of sampling have their defaults."""
    return dataclasses.replace(config, **_defaults(config))


def training_settings(config: MethodConfig) -> dict[str, Any]:
    """The settings that decide a training, as plain values."""
    without = _defaults(config)
    return {name: value for name, value in plain_settings(config).items() if name not in without}


def sampling_settings(config: MethodConfig) -> dict[str, Any]:
    """The settings of sampling that differ from their defaults, as plain values."""
    return {
        name: plain_settings(value)
        for name, default in _defaults(config).items()
        if (value := getattr(config, name)) != default
    }


def _defaults(config: MethodConfig) -> dict[str, Any]:
    """The defaults of the settings of sampling, by name."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config)
        if f.metadata.get("sampling")
    }
