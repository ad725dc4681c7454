"""The command line. Each command imports what it needs when it runs, so that --help is fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from distillbench.cli import completion
from distillbench.cli.command_options import BAD_INPUT, INTERRUPTED, SOMETHING_FAILED, TERMINATED
from distillbench.cli.data_commands import data, fetch, reference
from distillbench.cli.plugin_commands import check, describe, list_, new_plugin, plugins
from distillbench.cli.result_commands import clean, compare, doctor, export, leaderboard, merge, report, show
from distillbench.cli.run_commands import run, score, teacher, tune_levels
from distillbench.cli.sample_commands import samples
from distillbench.cli.tune_command import tune
from distillbench.cli.versions import print_version
from distillbench.errors import DivergedError, Unavailable, UserError
from distillbench.system.output_encoding import replace_unwritable
from distillbench.system.signals import Interrupted

COMMANDS: tuple[click.Command, ...] = (
    *(run, tune, tune_levels, score, teacher),
    *(list_, describe, check, new_plugin, plugins),
    *(data, fetch, reference, samples),
    *(show, report, leaderboard, compare, merge, export, doctor, clean),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=print_version,
    help="Show the versions of distillbench, Python, torch and CUDA.",
)
def cli() -> None:
    """Compare methods that distil diffusion models: one frozen teacher, one budget, one evaluator.

    \b
    distillbench run 'methods=[boot,cm,pd,direct]' dataset=digits
    distillbench list methods
    distillbench describe boot
    """


for command in COMMANDS:
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors that the user can correct become one message and exit code 2."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    os.environ["MPLBACKEND"] = "agg"  # child processes inherit it; matplotlib refuses a notebook's backend there
    replace_unwritable()
    completion.install()
    try:
        cli.main(words, prog_name="distillbench", standalone_mode=False)
    except (click.Abort, Interrupted) as interrupted:
        if os.environ.get("RANK", "0") == "0":  # other ranks are silent
            click.echo("interrupted; progress is saved: run the same command again to resume", err=True)
        terminated = isinstance(interrupted, Interrupted) and interrupted.name == "SIGTERM"
        raise SystemExit(TERMINATED if terminated else INTERRUPTED) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (UserError, Unavailable, OSError, DivergedError) as error:
        if "--debug" in words:
            sys.excepthook(*sys.exc_info())
        click.echo(f"error: {error}", err=True)
        raise SystemExit(SOMETHING_FAILED if isinstance(error, DivergedError) else BAD_INPUT) from None
