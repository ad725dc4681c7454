"""Nothing dies of a terminal that lacks our characters, after hours of work."""

import io
import os
import subprocess
import sys

import click
import pytest

from distillbench.system.output_encoding import replace_unwritable


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "fd v 1 > 2 e ? 8x8, 1 +-2, +-: half, +-"),
        ("cp1252", "fd v 1 > 2 é ? 8×8, 1 ± 2, ±: half, ±"),
        ("utf-8", "fd ↓ 1 → 2 é ? 8×8, 1 ± 2, ±: half, ±"),
    ],
)
def test_characters_missing_in_an_encoding_are_replaced(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # some other stream is left as it is
    replace_unwritable()
    click.echo("fd ↓ 1 → 2 é \udc80 8×8, 1 ± 2, ±: half, ±", nl=False)
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == shown


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_tables_are_printed_in_any_encoding(encoding):
    code = (
        "from distillbench.system.output_encoding import replace_unwritable\n"
        "from distillbench.cli.terminal import new_console\n"
        "from distillbench.reports.terminal_table import new_table\n"
        "replace_unwritable()\n"
        "table = new_table(['method', 'fd_↓'], [True, False])\n"
        "table.add_row('boot σ', '1 ± 2')\n"
        "new_console().print(table)\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("1 +-2" if encoding == "ascii" else "1 ± 2") in done.stdout.decode(encoding)


def test_the_backend_of_a_notebook_does_not_reach_matplotlib():
    code = "from distillbench.cli.commands import main\ntry:\n    main(['--version'])\nfinally:\n    import matplotlib"
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
