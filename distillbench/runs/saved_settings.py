"""The settings of a run, as its folder has them: config.yaml, one document for each point of a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distillbench.errors import UserError
from distillbench.records.settings_file import SEPARATOR, read_settings
from distillbench.registry import Registry
from distillbench.runs.config import RunConfig


def text_of_run(run_folder: Path, name: str) -> str:
    """The text of the file `name` of a run. Raises UserError if there is none."""
    try:
        return (run_folder / name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        inside = run_folder.iterdir() if run_folder.is_dir() else ()
        runs = ", ".join(sorted(path.name for path in inside if (path / "config.yaml").is_file()))
        raise UserError(
            f"no run in {str(run_folder)!r}: it has no {name}{f'. Runs in it: {runs}' if runs else ''}"
        ) from error


def read_config(text: str, registry: Registry) -> list[RunConfig]:
    """The settings in a run's config.yaml, one for each document. Raises UserError if they cannot be read."""
    return typed_settings(plain_documents(text), registry)


def plain_documents(text: str) -> list[Any]:
    """The documents of a run's config.yaml as plain values. Raises UserError if they cannot be read."""
    load = lambda part: [OmegaConf.to_container(OmegaConf.create(one)) for one in SEPARATOR.split(part)]
    with _readable():
        return read_settings(text, load)


def typed_settings(documents: Sequence[Any], registry: Registry) -> list[RunConfig]:
    """The settings in `documents`. Raises UserError if this version has other settings."""
    with _readable():
        return [_typed(document, registry) for document in documents]


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (OmegaConfBaseException, YAMLError, AttributeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"config.yaml cannot be read; it may be of another version of distillbench: {why}") from error


def _typed(document: Any, registry: Registry) -> RunConfig:
    plain: Any = OmegaConf.create(document)
    plain.pop("executor", None)  # does not affect the student
    typed: Any = OmegaConf.structured(RunConfig)
    entries = [("dataset", "datasets", "dataset"), ("teacher", "teachers", "teacher")]
    entries += [(f"methods.{name}", "methods", f"methods.{name}") for name in plain.methods]
    for path, kind, place in entries:
        name = str(OmegaConf.select(plain, f"{place}.kind"))
        OmegaConf.update(typed, path, OmegaConf.structured(registry.get(kind, name).cls.Config), force_add=True)
    config = OmegaConf.to_object(OmegaConf.merge(typed, plain))
    assert isinstance(config, RunConfig)
    return config
