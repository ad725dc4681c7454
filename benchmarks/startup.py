"""Startup time of commands: ``distillbench --help``, ``list methods`` and a dry run, relative to ``import torch``.

    python benchmarks/startup.py

Each is a separate process, with a warm file cache; commands alternate. The ratio is to ``python -c "import torch"``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial

from measuring import compare, machine, print_table

BASELINE = [sys.executable, "-c", "import torch"]
MODULE = [sys.executable, "-m", "distillbench"]
RUN = ["run", "methods=[boot,cm,pd,direct]", "dataset=digits", "estimate_seconds=0", "--dry-run"]
COMMANDS = {
    "distillbench --help": [*MODULE, "--help"],
    "distillbench list methods": [*MODULE, "list", "methods"],
    f"distillbench {' '.join(RUN)}": [*MODULE, *RUN],
    'python -c "import distillbench"': [sys.executable, "-c", "import distillbench"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    print(machine())
    found = []
    with tempfile.TemporaryDirectory() as folder:

        def call(command: list[str]) -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)

        for title, command in COMMANDS.items():
            ratio = compare(partial(call, command), partial(call, BASELINE), arguments.pairs, wall=True)
            found.append((title, f"{ratio.ours:.2f}", f"{ratio.theirs:.2f}", f"{ratio.value:.2f}", ratio.interval))
    print_table(found, ("command", "s", "import torch s", "ratio", "95 %"))


if __name__ == "__main__":
    main()
