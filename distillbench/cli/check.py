"""``distillbench check NAME``: run the conformance suite on everything of that name, and print a line per check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from distillbench.cli.terminal import width
from distillbench.datasets.dataset import Dataset
from distillbench.errors import UserError
from distillbench.registry import KINDS, Registry
from distillbench.runs.config import compose_runs
from distillbench.testing.bench_networks import USUALLY_COMPUTED, Computed
from distillbench.testing.conformance import findings_of

WORDS = {True: "ok", False: "FAIL", None: "-"}
DEFAULTS = {"dataset": "gmm", "teacher": "gmm"}  # to compose the settings of a run


def check_name(
    registry: Registry, name: str, settings: Sequence[str], distribution_images: int, computed: Computed
) -> bool:
    """Check everything called `name` and print the findings; True if no check fails."""
    kinds = [kind for kind in KINDS if name in registry.of_kind(kind)]
    if not kinds:
        raise registry.no("method, teacher, dataset or metric", name, {n for k in KINDS for n in registry.of_kind(k)})
    possible = {word: kind for kind in kinds for word in _settings_of(kind, name)}
    for word in settings:
        if not word.startswith(tuple(possible)):
            raise UserError(
                f"check {name} takes settings that begin with {', '.join(possible) or 'nothing'}, got {word!r}"
            )
    if computed != USUALLY_COMPUTED and kinds != ["methods"]:
        raise UserError(f"--network, --precision and --recompute are for methods, not for {', '.join(kinds)}")
    found = [_check(registry, kind, name, settings, distribution_images, computed) for kind in kinds]
    return all(found)


def _settings_of(kind: str, name: str) -> list[str]:
    """The prefixes of the settings that a check of this kind accepts."""
    own = {"methods": [f"methods.{name}."], "teachers": ["teacher.", "dataset=", "dataset."], "datasets": ["dataset."]}
    return own.get(kind, [])


def _check(
    registry: Registry, kind: str, name: str, settings: Sequence[str], distribution_images: int, computed: Computed
) -> bool:
    config, dataset = _composed(
        registry, kind, name, [w for w in settings if w.startswith(tuple(_settings_of(kind, name)))]
    )
    counts, doubts = dict.fromkeys(WORDS, 0), 0
    cls = registry.get(kind, name).cls
    for finding in findings_of(kind, cls, config, distribution_images, dataset, computed):
        counts[finding.ok] += 1
        heading = f"{'look' if finding.doubt else WORDS[finding.ok]:<4}  {finding.check:<20}  "
        doubts += finding.doubt
        click.echo(click.wrap_text(finding.message, width(), heading, " " * len(heading)))
    look = f" ({doubts} to confirm)" if doubts else ""
    summary = f"{counts[True]} ok{look}, {counts[False]} failed, {counts[None]} not applicable"
    click.echo(f"{kind.removesuffix('s')} {name}: {summary}")
    return not counts[False]


def _composed(registry: Registry, kind: str, name: str, settings: Sequence[str]) -> tuple[Any, Dataset | None]:
    """The settings of the class to check, and the dataset to check a teacher on, if one is named."""
    group = kind.removesuffix("s")
    if kind == "metrics":
        return None, None
    chosen = DEFAULTS | ({"methods": f"[{name}]"} if kind == "methods" else {group: name})
    named = [word for word in settings if word.startswith("dataset=")]
    words = [f"{key}={value}" for key, value in chosen.items() if not (named and key == "dataset")]
    configs = compose_runs([*words, *settings], registry, need_methods=kind == "methods")
    if len(configs) > 1:
        raise UserError(f"check takes one value of each setting, these settings have {len(configs)} combinations")
    if kind == "methods":
        return configs[0].methods[name], None
    if not named or kind == "datasets":
        return getattr(configs[0], group), None
    return configs[0].teacher, registry.get("datasets", configs[0].dataset.kind).cls(configs[0].dataset)
