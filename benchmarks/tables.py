"""Seconds and peak memory of table, summary and report with many rows.

    python benchmarks/tables.py                 # 100,000 rows
    python benchmarks/tables.py --rows 1000

Rows are 10 sampling seeds of 10 training seeds of 4 numbers of evaluations of so many methods. Each part runs in a
separate process, which returns its seconds without imports, and its peak memory minus that before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from measuring import machine, print_table

from distillbench.cli.terminal import new_console
from distillbench.records.statistics import summarise
from distillbench.records.table import make_table, write_table

METRICS = ("fd_toy", "rmse_toy")
SEEDS, NFE = 10, (1, 2, 4, 8)
COLUMN = {"unit": "", "direction": "lower", "network": "toy", "needs": "real", "protocol": "toy/1"}
FIXED = {
    "dataset": "digits", "teacher": "trained-01234567", "guidance": None, "settings": "", "images": 2048,
    "budget": "300,000 images", "protocol": "p", "device": "cpu", "status": "ok", "reason": "",
}  # fmt: skip


def made_rows(count: int) -> list[dict]:
    draw, rows = random.Random(0), []
    for number in range(count):
        rest, sampling = divmod(number, SEEDS)
        rest, training = divmod(rest, SEEDS)
        method, nfe = divmod(rest, len(NFE))
        score = 10 + method + draw.gauss(0, 1)
        row = FIXED | {"method": f"method{method:04}", "nfe": NFE[nfe], "key": f"k{number}"}
        row |= {"training_seed": training, "sampling_seed": sampling, "train_seconds": 60 + draw.random()}
        rows.append(row | {"fd_toy": score, "rmse_toy": score / 100})
    return rows


def table(folder: Path, count: int) -> Callable[[], object]:
    rows = made_rows(count)

    def make() -> None:
        write_table(make_table(rows, METRICS), folder)

    return make


def summary(folder: Path, count: int) -> Callable[[], object]:
    frame = pd.read_parquet(folder / "table.parquet")
    return lambda: summarise(frame, dict.fromkeys(METRICS, "lower"))


def reading(folder: Path, count: int) -> Callable[[], object]:
    from distillbench.reports.runs import read_run

    return lambda: read_run(folder)


def report(folder: Path, count: int) -> Callable[[], object]:
    import distillbench.reports.html  # noqa: F401  (is not to be timed)
    from distillbench.reports.write import report_runs

    (folder / "columns.json").write_text(json.dumps(dict.fromkeys(METRICS, COLUMN)))
    (folder / "environment.json").write_text("{}")
    (folder / "config.yaml").write_text("seed: 0\nmethods: {}\n")
    return lambda: report_runs((str(folder),), ("html",), None, (), (), None, False, new_console())


PARTS = {"table": table, "summary": summary, "reading the run": reading, "HTML report": report}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(part: str, folder: Path, count: int, results: multiprocessing.SimpleQueue) -> None:
    call = PARTS[part](folder, count)
    before, start = peak_mib(), time.perf_counter()
    call()
    results.put((time.perf_counter() - start, peak_mib() - before, peak_mib()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    print(machine())
    found, context = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "results" / "many"
        folder.mkdir(parents=True)
        for part in arguments.parts:
            results = context.SimpleQueue()
            process = context.Process(target=measured, args=(part, folder, arguments.rows, results))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{part} ended with exit code {process.exitcode}")
            seconds, grown, peak = results.get()
            found.append((part, f"{arguments.rows:,}", f"{seconds:.2f}", f"{grown:.0f}", f"{peak:.0f}"))
    print_table(found, ("part", "rows", "seconds", "memory grown MiB", "peak MiB"))


if __name__ == "__main__":
    main()
