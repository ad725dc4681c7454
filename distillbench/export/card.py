"""The model card of an exported student: README.md with the front matter that model hubs read.

Text from plugins, teachers and data is escaped: as YAML by yaml, in Markdown by :func:`plain` and by fences that are
longer than any in the text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from distillbench.export.adapters import FILE
from distillbench.options import plain_settings
from distillbench.reports.labels import METHOD
from distillbench.runs.plan import student_settings

if TYPE_CHECKING:
    from distillbench.export.forms import Form
    from distillbench.export.run_export import Student

SPECIAL = re.compile(r"([\\`*_\[\]|<>~$&])")
KEYS = ("dataset", "teacher", "guidance", "method", "nfe", "images", "budget", "protocol", "settings")


@dataclass(frozen=True)
class Card:
    """The subject of a card."""

    student: Student
    form: Form
    difference: float  # largest one between the images and the student's, in [-1, 1]


def write_card(folder: Path, card: Card) -> None:
    """Write README.md."""
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: Card) -> str:
    """The whole card."""
    student = card.student
    method, teacher = student.cell.name, student.teacher
    about = {
        "library_name": "diffusers",
        "license": "unknown",
        "pipeline_tag": "text-to-image" if "prompt" in card.form.asks else "unconditional-image-generation",
        "tags": ["distillbench", "diffusion-distillation", "one-step", method],
    }
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---",
        f"# {plain(teacher.label)} in one step, by {plain(method)}",
        f"A student that {plain(method)} distilled from the diffusion model {plain(teacher.label)}, written by "
        "`distillbench export`. Its licence depends on those of the teacher and the data, which distillbench does not "
        "know: check them before you use or share it.",
        "## Sampling",
        _fenced(_example(card), "python"),
        *_hints(card),
        *_adapters(student),
        "## Origin",
        *_origin(student),
        "## Scores",
        *_scores(student),
        "## Conversion to a pipeline",
        f"{card.form.fold} Loaded from this folder, its images differ from the student's by at most "
        f"{card.difference:.1e} in [-1, 1].",
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: Any) -> str:
    """A text on one line, with the special characters of Markdown and HTML escaped.

    >>> plain("a|b\\n<c>")
    'a\\\\|b \\\\<c\\\\>'
    """
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _example(card: Card) -> str:
    form = card.form
    loading = "".join(f", {name}={value!r}" for name, value in form.loading.items())
    asks = ", ".join(f"{name}={value!r}" for name, value in {**form.asks, **_few(form.asks)}.items())
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{loading})\n'
        f"images = pipeline({asks}).images\n"
    )


def _few(asks: dict[str, Any]) -> dict[str, Any]:
    """The same with four images."""
    return {name: value[:4] if isinstance(value, list) else 4 for name, value in asks.items() if name in COUNTED}


COUNTED = ("batch_size", "class_labels", "prompt")


def _hints(card: Card) -> list[str]:
    hints = []
    if card.form.loading:
        hints.append("`trust_remote_code=True` lets diffusers run the Python files of this folder: read them first.")
    if "num_inference_steps" in card.form.asks:
        hints.append("The student samples in one step: `num_inference_steps` must be 1.")
    if "guidance_scale" in card.form.asks:
        hints.append("Guidance is distilled into the weights: `guidance_scale` must be 1.")
    return hints


def _adapters(student: Student) -> list[str]:
    """How to use the file of the adapters, if the student has any."""
    adapters = student.cell.shared.students.adapters
    if adapters is None:
        return []
    return [
        f"Its adapters (LoRA, rank {adapters.rank}, alpha {adapters.alpha:g}) are merged into the weights of this "
        f"pipeline. `{FILE}` has them alone, with the keys of peft and diffusers, for the network of "
        f"{plain(student.teacher.label)}. What the method adds to that network, such as an embedding of a second time, "
        "is only in the pipeline."
    ]


def _origin(student: Student) -> list[str]:
    cell, record, teacher = student.cell, student.record, student.teacher
    assert cell.entry is not None
    shared, plugin = cell.shared, cell.entry.plugin
    dataset, conditioning, environment = shared.dataset, teacher.conditioning, record.environment
    packages = environment.get("packages") or {}
    network = ", ".join(student_settings(shared.config.student)) or "all weights of the teacher's network"
    git = environment.get("git") or {}
    commit = git.get("commit") or "not known (installed)"
    guidance = "none" if not conditioning.guided else f"w = {conditioning.w:g}, f_0 + w (f_c - f_0)"
    if conditioning.w_range is not None:
        guidance += f"; trained for every w in {list(conditioning.w_range)}, exported for this one"
    facts = {
        "teacher": teacher.label,
        "teacher's weights": f"sha256 {teacher.sha256}",
        "method": f"{cell.name}, {cell.entry.cls.paper}",
        "plugin": f"{plugin.name} of {plugin.distribution} {plugin.version}",
        "student": network,
        "dataset": f"{dataset.name} (sha256 {dataset.sha256}; licence: {dataset.licence})",
        "guidance": guidance,
        "budget": f"{shared.config.budget.in_words}, batch {shared.config.batch_size}, seed {cell.seed}",
        **_costs(student),
        "student's weights": f"sha256 {record.weights_sha256}",
        "trained on": record.device,
        "distillbench": f"{environment.get('distillbench')}, commit {commit}"
        + (", with uncommitted changes" if git.get("dirty") else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
    }
    rows = [f"| {plain(name)} | {plain(value)} |" for name, value in facts.items()]
    return [
        "\n".join(["| | |", "|---|---|", *rows]),
        f"Settings of {plain(cell.name)}:",
        _fenced(yaml.safe_dump(plain_settings(cell.method_config), sort_keys=False, allow_unicode=True), "yaml"),
        "The teacher, as distillbench loaded or trained it:",
        _fenced(json.dumps(teacher.provenance, indent=2, default=str, ensure_ascii=False), "json"),
    ]


def _costs(student: Student) -> dict[str, str]:
    cost = student.record.cost
    if cost is None:
        return {}
    words = [
        f"{cost.images:,} images",
        f"{cost.seconds:,.1f} s",
        f"{cost.teacher_nfe:,} evaluations of the teacher",
        f"{cost.student_nfe:,} of the student",
    ]
    words += [f"{cost.tflops:,.3g} TFLOP"] if cost.tflops is not None else []
    words += [f"{cost.joules:,.0f} J"] if cost.joules is not None else []
    return {"training cost": ", ".join(words)}


def _scores(student: Student) -> list[str]:
    """The student's scores at one step, with the intervals of its method if the run has several seeds."""
    table, cell = pd.read_csv(student.run / "table.csv"), student.cell
    kept = table[(table["method"] == cell.name) & (table["training_seed"] == cell.seed) & (table["nfe"] == 1)]
    kept = kept[kept["status"] == "ok"]
    columns = _json(student.run / "columns.json")
    metrics = [name for name in columns if name != METHOD and name in kept and kept[name].notna().any()]
    if not metrics:
        return ["No score was measured at one step."]
    summary = _summary(student.run, kept)
    lines = ["| score | value | unit | better | interval |", "|---|---|---|---|---|"]
    for name in metrics:
        declared = columns[name]
        value = kept[name].dropna()
        facts = (f"{value.mean():.6g}", declared.get("unit", ""), declared.get("direction", ""))
        cells = [name, *facts, _interval(summary, name)]
        lines.append(f"| {' | '.join(map(plain, cells))} |")
    images = ", ".join(f"{int(n):,}" for n in sorted(set(kept["images"])))
    seeds = len(set(kept["sampling_seed"]))
    return [
        "\n".join(lines),
        f"n = {images} images per sampling seed, means over {seeds} sampling seed{'s' if seeds > 1 else ''}; compared "
        f"with: {plain(', '.join(sorted(set(kept['reference'].dropna()))) or 'the teacher')}.",
    ]


def _summary(run: Path, kept: pd.DataFrame) -> pd.DataFrame:
    """The row of summary.csv that is the mean of the rows `kept`."""
    try:
        summary = pd.read_csv(run / "summary.csv")
    except (OSError, ValueError):
        return pd.DataFrame()
    shared = [name for name in KEYS if name in summary and name in kept]
    first = kept.iloc[0]
    same = [summary[name].isna() if pd.isna(first[name]) else summary[name] == first[name] for name in shared]
    return summary[pd.concat(same, axis=1).all(axis=1)]


def _interval(summary: pd.DataFrame, name: str) -> str:
    found = []
    for seeds in ("training", "sampling"):
        low, high = f"{name}_{seeds}_low", f"{name}_{seeds}_high"
        if low in summary and len(summary) == 1 and summary[[low, high]].notna().all(axis=None):
            found.append(f"{summary[low].iloc[0]:.6g} to {summary[high].iloc[0]:.6g} over {seeds} seeds (95 %)")
    return "; ".join(found) or "one seed"


def _json(file: Path) -> dict[str, dict[str, str]]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
