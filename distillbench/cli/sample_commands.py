"""``distillbench samples``: files of samples, written and scored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from distillbench.cli.command_options import UserPath, output_file, with_plugins
from distillbench.cli.terminal import new_console, print_definitions
from distillbench.errors import counted

if TYPE_CHECKING:
    from distillbench.registry import Registry


@click.group()
def samples() -> None:
    """Export or score files of samples (.npz, as guided-diffusion has them)."""


@samples.command("export")
@click.argument("run_folder", type=UserPath())
@click.option("--method", required=True, help="Method of the student, or a row of the teacher, such as teacher:ddim.")
@click.option("--nfe", required=True, type=click.IntRange(min=1), help="Network evaluations of each image.")
@click.option("--seed", type=click.IntRange(min=0), help="The training seed, if the run has several.")
@click.option("--sampling-seed", type=click.IntRange(min=0), help="[the run's first]")
@click.option("--images", type=click.IntRange(min=1), help="Number of images. [evaluation.images of the run]")
@click.option("--output", "-o", required=True, type=UserPath(dir_okay=False), help="File to write (.npz).")
@with_plugins
def export_samples(
    registry: Registry, run_folder: str, method: str, nfe: int, seed: int | None, sampling_seed: int | None,
    images: int | None, output: str,
) -> None:  # fmt: skip
    """Write the samples of a row, sampled again from the noise that its scores were computed from.

    The evaluation suite of guided-diffusion reads the file: `arr_0` holds 8-bit images (N,H,W,3), `arr_1` the classes
    of a conditional run.

    \b
    distillbench run 'methods=[boot]' dataset=digits run_name=digits
    distillbench samples export results/digits --method boot --nfe 1 -o boot.npz
    """
    from pathlib import Path

    from distillbench.export.samples import Row, export_samples
    from distillbench.system.progress import Progress

    file, row = output_file(output, ".npz"), Row(method, nfe, seed, sampling_seed, images)
    count = export_samples(Path(run_folder), row, file, registry, Progress(new_console()))
    click.echo(f"written: {file}, {count:,} images of {method}, {nfe} NFE")


@samples.command("score")
@click.argument("file", type=UserPath(dir_okay=False))
@click.argument("settings", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_plugins
def score_samples(registry: Registry, file: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Score the images in FILE, whoever made them.

    SETTINGS choose the real images (`dataset`) and the scores (`evaluation.metrics`, `evaluation.references`,
    `evaluation.real_features`). Scores that need the teacher's samples are empty.

    \b
    distillbench samples score boot.npz dataset=digits 'evaluation.metrics=[fd_efficientnet_lite0]'
    """
    import json
    from pathlib import Path

    from distillbench.runs.scored_files import score_file
    from distillbench.system.progress import Progress

    found = score_file(Path(file), settings, registry, Progress(new_console()))
    if as_json:
        said = {"images": found.images, "scores": found.scores, "missing": found.missing}
        protocols = {name: facts["protocol"] for name, facts in found.columns.items()}
        click.echo(json.dumps(said | {"protocols": protocols}, indent=2))
        return
    click.echo(f"{Path(file).name}: {counted(found.images, 'image')}")
    print_definitions(
        (name, _in_words(value, name, found.missing, found.columns)) for name, value in found.scores.items()
    )


def _in_words(value: float | None, name: str, missing: dict[str, str], columns: dict[str, dict[str, str]]) -> str:
    if value is None:
        return f"no value: {missing[name]}"
    return f"{value:.6g} ({columns[name]['unit']})"
