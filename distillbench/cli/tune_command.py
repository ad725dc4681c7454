"""The command ``tune``: methods with equally searched settings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from distillbench.cli.command_options import SOMETHING_FAILED, before_plugins, with_plugins
from distillbench.cli.run_commands import check_early
from distillbench.cli.terminal import new_console, print_plan, print_rows, print_table
from distillbench.errors import UserError
from distillbench.system.signals import stopping

if TYPE_CHECKING:
    from distillbench.registry import Registry
    from distillbench.runs.config import RunConfig


@click.command()
@click.argument("settings", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Check everything and print what the search will cost; run nothing.")
@click.option("--show-config", is_flag=True, help="Print the settings as YAML; run nothing.")
@click.option("--retry-failed", is_flag=True, help="Retry final trainings that failed. Trials stay as they ended.")
@before_plugins(check_early)
@with_plugins
def tune(registry: Registry, settings: Sequence[str], dry_run: bool, show_config: bool, retry_failed: bool) -> None:
    """Search the settings of methods on equal terms, and train the best of each anew.

    Every method gets the same number of trials, budget and sampler of settings. The search sees neither the seeds of
    the final trainings nor the noise of their scores.

    SETTINGS are those of `distillbench run`, without a seed, and:

    \b
      tune.trials=16               trials of each method, the first with its defaults
      tune.protocol=equal_trials   or self_tuned (a total budget each), or defaults (no search)
      tune.total.images=4800000    what each method may spend with self_tuned
      tune.metric=NAME tune.nfe=1  the score that is optimised
      tune.pruning=halving         trials that begin badly end after a quarter of the budget
      tune.after=[sampling_levels] settings of sampling that are searched after training
      tune.search_seeds=[1000]     training seeds of the trials
      tune.final_seeds=[0,1]       training seeds of the final trainings

    \b
    distillbench tune 'methods=[boot,cm,direct]' dataset=digits tune.trials=16

    To resume an interrupted search, run the same command again; two processes may work on one search.
    """
    from distillbench.execution.run_folder import labels_of
    from distillbench.runs.cell import AS_IS, Policy
    from distillbench.runs.forecast import forecast, why_none
    from distillbench.runs.run_downloads import asked, check_dataset_files
    from distillbench.storage.source_messages import user_line
    from distillbench.system.launchers import started_together
    from distillbench.system.progress import Progress
    from distillbench.tuning.estimate import estimate_lines
    from distillbench.tuning.prepare import prepare, read_settings
    from distillbench.tuning.tune import introduction
    from distillbench.tuning.tune import tune as run_tuning

    if started_together():
        raise UserError("tune uses one process: start it without torchrun or accelerate")
    config, wanted = read_settings(settings, registry)
    if show_config:
        click.echo(_as_yaml(config, wanted), nl=False)
        return
    check_dataset_files([config], user_line("tune", settings))
    console = new_console()
    progress = Progress(console)
    with stopping() as stop:
        downloads = asked([config], registry)
        for line in downloads.lines():
            progress.say(line)
        if downloads.needed_to_plan and dry_run:
            progress.say("dry run: nothing was downloaded. The plan is made from these files")
            return
        if not dry_run:
            downloads.fetch(progress)
        tuning = prepare(config, wanted, registry)
        if dry_run:
            for line in [*introduction(tuning, registry), *estimate_lines(tuning)]:
                progress.say(line)
            progress.say("the final trainings, as if the best settings were the defaults:")
            cells = tuning.final_cells
            print_plan(console, cells, forecast(cells, AS_IS), why_none(cells))
            return
        show = functools.partial(print_rows, progress, labels=labels_of(tuning.final_cells))
        tuned = run_tuning(tuning, registry, progress, show, stop, Policy(retry_failed))
    outcome = tuned.outcome
    print_table(console, outcome.table, outcome.summary, outcome.labels, outcome.influences)
    for line in tuned.lines(tuning):
        progress.say(line)
    progress.say(f"all columns, trials, samples and weights: {outcome.folder}")
    if not tuned.trained:
        progress.say("nothing was trained: all trials and final trainings were found")
    if outcome.failed:
        progress.say(f"not ok: {', '.join(outcome.failed)}")
        raise SystemExit(SOMETHING_FAILED)


def _as_yaml(config: RunConfig, wanted: object) -> str:
    from omegaconf import OmegaConf

    from distillbench.runs.config import to_yaml

    return to_yaml(config) + OmegaConf.to_yaml(OmegaConf.create({"tune": OmegaConf.structured(wanted)}))
