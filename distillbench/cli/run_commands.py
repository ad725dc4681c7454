"""The commands that train and score: ``run``, ``score`` and ``teacher train``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from distillbench.cli.command_options import (
    BAD_INPUT,
    SOMETHING_FAILED,
    UserPath,
    before_plugins,
    output_file,
    waiting,
    with_plugins,
)
from distillbench.cli.completion import complete_setting
from distillbench.cli.terminal import new_console, print_plan, print_rows, print_table
from distillbench.errors import UserError
from distillbench.system.signals import stopping

if TYPE_CHECKING:
    from distillbench.registry import Registry
    from distillbench.runs.config import RunConfig


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """The flags of `run` and `score`."""

    dry_run: bool
    show_config: bool
    retry_failed: bool
    force: bool
    fail_fast: bool


def check_early(settings: Sequence[str], show_config: bool, folders: Sequence[str], **options: object) -> None:
    """Raise UserError at once, before the seconds that torch takes to load, for what can be told without it.

    That is a wrong name, a word for a number, or a dataset whose files are not there.
    """
    from distillbench.cli.plugin_table import kept_table
    from distillbench.storage.source_messages import without_files
    from distillbench.system.launchers import follows

    command = click.get_current_context().info_name or "run"
    try:
        if table := kept_table(folders):
            from distillbench.cli.settings_check import check_words

            own = ("tune.",) if command == "tune" else ()  # in no table of plugins
            words = [word for word in settings if not word.startswith(own)]
            check_words(words, table, need_methods=command != "score")
        if not show_config and (message := without_files(command, settings)):
            raise UserError(message)
    except UserError:
        if follows():  # rank 0 prints the error
            raise SystemExit(BAD_INPUT) from None
        raise


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The settings and flags of `run` and `score`."""

    @click.argument("settings", nargs=-1, shell_complete=complete_setting)
    @click.option("--dry-run", is_flag=True, help="Check everything and print the plan with its cost; run nothing.")
    @click.option("--show-config", is_flag=True, help="Print the settings as YAML; run nothing.")
    @click.option("--retry-failed", is_flag=True, help="Retry what failed or ran out of memory or time before.")
    @click.option("--force", is_flag=True, help="Do everything again, also what is finished.")
    @click.option("--fail-fast", is_flag=True, help="Stop at the first failing cell.")
    @before_plugins(check_early)
    @with_plugins
    @functools.wraps(command)
    def wrapped(registry: Registry, settings: Sequence[str], **flags: bool) -> None:
        command(registry, settings, RunFlags(**flags))

    return wrapped


@click.command()
@run_options
def run(registry: Registry, settings: Sequence[str], flags: RunFlags) -> None:
    """Train, sample and score methods; print and save the table.

    SETTINGS are Hydra overrides; values separated by commas make a grid. Quote brackets for your shell.

    \b
      'methods=[boot,cm]'      methods to compare   dataset=digits       images
      methods.boot.lr=3e-4     their settings       teacher=trained      the teacher
      budget.images=400000     length of training   seed=0,1,2           one training per seed
      device=auto              cpu, cuda, cuda:N    results_dir=results  where results go
      experiment=smoke         a prepared set of settings (configs/experiment)

    To resume an interrupted run, run the same command again: finished work is not repeated.
    """
    _run(registry, settings, flags)


@click.command()
@run_options
def score(registry: Registry, settings: Sequence[str], flags: RunFlags) -> None:
    """Sample and score only the teacher; train nothing.

    The teacher may be a checkpoint, or a student that others released.

    SETTINGS are those of `distillbench run`, without methods.

    \b
    distillbench score dataset=digits 'evaluation.teacher_samplers=[ddim,heun,dpmpp_2m]'
    distillbench score dataset=imagenet64 dataset.path=FILES teacher=consistency teacher.path=FOLDER \\
      'evaluation.teacher_samplers=[ddim,renoise]' 'evaluation.teacher_steps=[1,2]' conditional=true
    """
    given = [word for word in settings if word.partition("=")[0].split(".")[0] == "methods"]
    if given:
        raise UserError(f"score takes no method, got {given[0]!r}. To train methods use: distillbench run")
    _run(registry, settings, flags, need_methods=False)


def _run(registry: Registry, settings: Sequence[str], flags: RunFlags, need_methods: bool = True) -> None:
    from distillbench.runs.config import compose_runs, to_yaml
    from distillbench.runs.run_downloads import check_dataset_files
    from distillbench.storage.source_messages import user_line
    from distillbench.system.launchers import follows

    try:
        configs = compose_runs(list(settings), registry, need_methods)
        if not flags.show_config:
            check_dataset_files(configs, user_line("run" if need_methods else "score", settings))
    except UserError:
        if follows():  # rank 0 prints the error
            raise SystemExit(BAD_INPUT) from None
        raise
    if not need_methods:  # an experiment may name some
        configs = [dataclasses.replace(config, methods={}) for config in configs]
    if not flags.show_config:
        _run_configs(configs, registry, flags)
    elif not follows():
        click.echo("---\n".join(to_yaml(config) for config in configs), nl=False)


def _run_configs(configs: list[RunConfig], registry: Registry, flags: RunFlags) -> None:
    """Run the cells of `configs`, or print their plan; ranks other than 0 follow rank 0."""
    from distillbench.execution.followers import follow, in_these_processes
    from distillbench.execution.run import run as run_cells
    from distillbench.execution.run_folder import labels_of
    from distillbench.runs.cell import Policy
    from distillbench.runs.forecast import forecast, why_none
    from distillbench.runs.plan import plan
    from distillbench.runs.run_downloads import asked
    from distillbench.system.progress import Progress
    from distillbench.training.data_parallel import joined
    from distillbench.training.fsdp import check_sharding

    console = new_console()
    progress = Progress(console)
    policy = Policy(flags.retry_failed, flags.force, flags.fail_fast)
    with stopping() as stop, joined(configs[0].device) as ranks:
        if not ranks.main:
            follow(ranks, stop)
            return
        downloads = asked(configs, registry)
        for line in downloads.lines():
            progress.say(line)
        if downloads.needed_to_plan and flags.dry_run:
            progress.say("dry run: nothing was downloaded. The plan is made from these files")
            return
        if not flags.dry_run:
            downloads.fetch(progress)
        with waiting("planning the cells ..."):
            cells = plan(configs, registry)
        if flags.dry_run:
            print_plan(console, cells, forecast(cells, policy), why_none(cells))
            raise SystemExit(SOMETHING_FAILED if any(cell.cost_error for cell in cells) else 0)
        for config in configs:
            check_sharding(config.compute, ranks.count)
        if ranks.count > 1:
            configs = in_these_processes(cells, configs, ranks, progress)
        labels = labels_of(cells)
        show = functools.partial(print_rows, progress, labels=labels)
        outcome = run_cells(cells, configs, progress, show, policy, stop, show_found=False)
    print_table(console, outcome.table, outcome.summary, outcome.labels, outcome.influences)
    progress.say(f"all columns, samples and weights: {outcome.folder}")
    if outcome.failed:
        progress.say(f"not ok: {', '.join(outcome.failed)}")
        raise SystemExit(SOMETHING_FAILED)


@click.command()
@click.argument("run_folder", type=UserPath())
@click.option("--method", help="Its student, as NAME or NAME-seedS-KEY. [the only method that has levels to choose]")
@click.option("--seed", type=click.IntRange(min=0), help="Training seed of the student. [the first]")
@click.option("--nfe", type=click.IntRange(min=2), help="Search for 2, ..., NFE evaluations. [the most of the run]")
@click.option("--metric", help="Score of the run to optimise. [the first with a direction]")
@click.option("--images", type=click.IntRange(min=1), help="Samples of each candidate. [evaluation.images]")
@click.option("--candidates", type=click.IntRange(min=1), default=40, show_default=True, help="Levels, at most.")
@click.option(
    "--sampling-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the search's noise."
)
@click.option("--evaluate", is_flag=True, help="Add rows with the levels to the run. Nothing is trained.")
@with_plugins
def tune_levels(
    registry: Registry, run_folder: str, method: str | None, seed: int | None, nfe: int | None, metric: str | None,
    images: int | None, candidates: int, sampling_seed: int, evaluate: bool,
) -> None:  # fmt: skip
    """Search the noise levels at which a finished student is sampled in several steps.

    For 2, 3, ... evaluations the best next level is found by ternary search (Song et al. 2023), which assumes that the
    score has one minimum. All candidates are sampled from the same noise. It is not that of the run's scores, which
    stay unbiased. An interrupted search continues.

    \b
    distillbench run 'methods=[cm]' dataset=digits run_name=digits
    distillbench tune-levels results/digits --nfe 2
    distillbench tune-levels results/digits --nfe 2 --evaluate
    """
    from pathlib import Path

    from distillbench.cli.terminal import print_tuning
    from distillbench.runs.level_tuning import Wanted, check_trained
    from distillbench.runs.level_tuning import tune_levels as search
    from distillbench.system.launchers import started_together
    from distillbench.system.progress import Progress

    if started_together():
        raise UserError("tune-levels uses one process: start it without torchrun or accelerate")
    console, folder = new_console(), Path(run_folder)
    progress = Progress(console)
    with stopping():
        if evaluate:
            check_trained(folder, registry, progress)
        wanted = Wanted(method, seed, nfe, metric, images, candidates, sampling_seed)
        tuning = search(folder, wanted, registry, progress)
    print_tuning(console, tuning, evaluate)
    if evaluate and tuning.chosen != tuning.present:
        _run_configs([*tuning.configs, *tuning.tuned], registry, RunFlags(False, False, False, False, False))


@click.group()
def teacher() -> None:
    """Train teachers."""


@teacher.command("train")
@click.argument("settings", nargs=-1, shell_complete=complete_setting)
@click.option("--output", "-o", type=UserPath(dir_okay=False), help="File to write. [a file in the results' cache]")
@with_plugins
def train_teacher(registry: Registry, settings: tuple[str, ...], output: str | None) -> None:
    """Train the teacher of a dataset and write its weights (safetensors).

    \b
    distillbench teacher train dataset=digits --output digits-teacher.safetensors
    distillbench run 'methods=[boot]' dataset=digits teacher.path=digits-teacher.safetensors
    """
    from pathlib import Path

    from distillbench.execution.run import train_teacher_of
    from distillbench.runs.config import compose_runs
    from distillbench.runs.run_downloads import fetch_asked
    from distillbench.storage.files import check_writable
    from distillbench.system.progress import Progress

    configs = compose_runs(list(settings), registry, need_methods=False)
    file = None if output is None else output_file(output, ".safetensors")
    if file is not None and len(configs) > 1:
        raise UserError(f"--output takes one teacher, the settings describe {len(configs)}")
    for config in configs if file is None else []:
        check_writable(Path(config.results_dir))
    progress = Progress(new_console())
    fetch_asked(configs, registry, progress)
    for config in configs:
        progress.say(f"written: {train_teacher_of(config, registry, file, progress)}")
