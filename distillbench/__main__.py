"""``python -m distillbench``: the command line without the script, as launchers need it."""

from distillbench.cli.commands import main

main()
