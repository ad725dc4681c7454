"""What the commands share: exit codes, option types and decorators."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from distillbench.cli.loading import load_plugins, origin
from distillbench.errors import UserError, nearest, quoted

if TYPE_CHECKING:
    from pathlib import Path


BAD_INPUT, SOMETHING_FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143


class UserPath(click.Path):
    """A path in which a leading ``~`` is the user's home: shells do not expand it after ``--output=``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


class Choice(click.Choice):
    """One of some words; the error for another one has the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            words = [str(choice) for choice in self.choices]
            near = nearest(str(value), words)
            self.fail(f"{quoted(str(value))}.{near} Possible: {', '.join(words)}", param, ctx)


def plugin_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that loads plugins."""
    folders = click.option(
        "--plugins-dir", "folders", multiple=True, type=UserPath(file_okay=False), envvar="DISTILLBENCH_PLUGINS_DIR",
        help="Folder whose Python files are plugins too; can be repeated. [$DISTILLBENCH_PLUGINS_DIR]",
    )  # fmt: skip
    return folders(click.option("--debug", is_flag=True, help="Show tracebacks.")(command))


def with_plugins(command: Callable[..., None]) -> Callable[..., None]:
    """Load the plugins and pass the registry to `command` as ``registry``; warn about plugins that failed to load."""

    @plugin_options
    @functools.wraps(command)
    def loaded(*arguments: Any, folders: Sequence[str], debug: bool, **options: Any) -> None:
        first, began = "distillbench.registry" not in sys.modules, time.time()
        with waiting("loading torch and the plugins ..."):
            registry = load_plugins(folders)
        for plugin in registry.broken:
            click.echo(f"warning: plugin {origin(plugin)} is left out: {plugin.error}", err=True)
            if debug:
                click.echo(plugin.traceback, err=True)
        try:
            command(*arguments, registry=registry, **options)
        except UserError:
            from distillbench.system.launchers import started_together

            if first and not started_together():  # so that the next wrong name is told without torch
                from distillbench.cli.plugin_table import keep, table_of

                keep(table_of(registry), registry, began)
            raise

    return loaded


@contextmanager
def waiting(line: str) -> Iterator[None]:
    """Show `line` in a terminal while the block runs."""
    shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    if shown:
        sys.stderr.write(line)
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            sys.stderr.write("\r" + " " * len(line) + "\r")
            sys.stderr.flush()


def before_plugins(check: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call ``check(**options)`` before a command loads its plugins, for errors that can be told without them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def checked(*arguments: Any, **options: Any) -> None:
            check(**options)
            command(*arguments, **options)

        return checked

    return decorate


debuggable = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")


def output_file(output: str, suffix: str) -> Path:
    """`output` as a path. Raises UserError unless it ends in `suffix` and its folder can be written to."""
    from pathlib import Path

    from distillbench.storage.files import check_writable

    path = Path(output)
    if path.suffix != suffix:
        raise UserError(f"--output must name a {suffix} file, got {output!r}")
    check_writable(path.parent, "--output")
    return path
