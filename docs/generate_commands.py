"""Writes docs/commands.md, the reference of commands and settings, from the code: ``python docs/generate_commands.py``.

Commands and options come from click, settings from the dataclasses that the command line fills.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from distillbench.cli.commands import cli
from distillbench.runs.config import RunConfig, describe_options
from distillbench.runs.executor_config import EXECUTORS

PAGE = Path(__file__).resolve().parent / "commands.md"
HEAD = """# Command reference

Every command with its options, then every setting of a run. This page is written by `docs/generate_commands.py` from
the code; `distillbench COMMAND --help` prints the same. Every command also takes `--help` (`-h`).

## Exit codes

| code | meaning |
|---|---|
| 0 | success |
| 1 | the command ran, and something failed: a cell that is not ok, a check, a damaged file, a regression |
| 2 | wrong input: the message says what was given and what is possible; nothing was trained |
| 130, 143 | interrupted by Ctrl-C or SIGTERM; the same command resumes |

## Completion

`bash`, `zsh` and `fish` complete commands and options after

    eval "$(_DISTILLBENCH_COMPLETE=bash_source distillbench)"

with the shell's name in `bash_source` (fish: [another line](installation.md#completion-of-the-command-line)).
"""
SETTINGS = """## Settings

`distillbench run` and `distillbench score` take settings as `name=value`
([Hydra's override syntax](https://hydra.cc/docs/advanced/override_grammar/basic/)); values separated by commas make a
grid. `--show-config` prints all of them with their values. The settings of one method, dataset or teacher are listed by
`distillbench describe NAME`.
"""


def page() -> str:
    """The content of docs/commands.md."""
    sections = [HEAD, _contents()]
    sections += [_section(name, command) for name, command in _all()]
    sections += [SETTINGS, _settings(RunConfig, "", skip=("executor",))]
    for kind, config in sorted(EXECUTORS.items()):
        sections += [f"With `executor={kind}`:\n", _settings(config, "executor.", skip=("kind",))]
    return "\n".join(sections)


def _all() -> Iterator[tuple[str, click.Command]]:
    return _commands(cli, "distillbench")


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """The commands that do something, by their full names: groups only hold commands."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _contents() -> str:
    links = ((f"[{name.removeprefix('distillbench ')}](#{name.replace(' ', '-')})", c) for name, c in _all())
    rows = [f"| {link} | {_cell(command.get_short_help_str(200))} |" for link, command in links]
    return "\n".join(["## Commands\n", "| command | |", "|---|---|", *rows, ""])


def _section(name: str, command: click.Command) -> str:
    arguments = " ".join(
        p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)
    )
    lines = [f"## {name}\n", f"    {name} {'[OPTIONS] ' * _has_options(command)}{arguments}".rstrip() + "\n"]
    lines += _help(command)
    rows = [_option(p) for p in command.params if isinstance(p, click.Option)]
    return "\n".join([*lines, *(["| option | |", "|---|---|", *rows, ""] if rows else [])])


def _has_options(command: click.Command) -> bool:
    return any(isinstance(p, click.Option) for p in command.params)


def _help(command: click.Command) -> Iterator[str]:
    """The paragraphs of the help; those that click must not wrap become blocks of code."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if not paragraph.startswith("\b"):
            yield paragraph + "\n"
            continue
        code = paragraph.removeprefix("\b\n")
        language = "bash" if any("distillbench " in line for line in code.splitlines()) else "text"
        yield f"```{language}\n{code}\n```\n"


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    if not option.is_flag:
        names += f" {option.make_metavar(click.Context(click.Command('')))}"
    notes = ["required"] * option.required + ["several allowed"] * (
        option.multiple and "several" not in (option.help or "")
    )
    if option.show_default and option.default is not None:
        notes.append(f"default: {option.default}")
    return f"| {_cell(names)} | {_cell(' '.join([option.help or '', *(f'({note})' for note in notes)]).strip())} |"


def _settings(config: type, prefix: str, skip: tuple[str, ...]) -> str:
    rows = [
        f"| `{prefix}{name}` | {f'`{_cell(default)}`' if default else ''} | {_cell(text)} |"
        for name, default, text in describe_options(config)
        if name.split(".")[0] not in skip
    ]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    """A text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    PAGE.write_text(page())
