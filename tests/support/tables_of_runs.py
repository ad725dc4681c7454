"""Rows of tables, and the folders of runs that have them."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from distillbench.records.sample_grid import stack_shown
from distillbench.records.table import make_along, make_table, write_table
from distillbench.reports.runs import RunData

FID = {"unit": "", "direction": "lower", "network": "inception", "needs": "real", "protocol": "frechet/2"}
COLUMNS = {"fid": FID, "recall": FID | {"direction": "higher", "protocol": "prdc/1"}}
NAMES = {"dataset": "digits", "teacher": "trained-01234567", "method": "boot", "training_seed": 0, "sampling_seed": 0}
NAMES |= {"nfe": 1, "images": 2048, "budget": "1000 images", "protocol": "aaaa", "status": "ok", "reason": ""}
NAMES |= {
    "settings": "",
    "compute": "fp32",
    "reference": "",
    "device": "cpu (a model)",
    "key": "k",
    "train_seconds": 100.0,
    "sample_latency_p50_ms": 2.0,
}
TEACHER = {"method": "teacher:ddim", "training_seed": None, "budget": "", "train_seconds": None, "key": "t"}


def row(**changes):
    """A row of the table: an ok student, but for `changes`."""
    return NAMES | changes


def seeds(scores, **changes):
    """Rows of one method, one for each training seed, with these values of fid."""
    return [row(training_seed=k, fid=score, **changes) for k, score in enumerate(scores)]


def run_folder(folder, rows, columns=COLUMNS, configs=({"methods": {}, "seed": 0},), environment=None, along=None):
    """A run's folder as a run leaves it, from rows."""
    table = make_table(rows, list(columns))
    write_table(table, folder)
    if along is not None:
        write_table(along, folder, "along")
    (folder / "columns.json").write_text(json.dumps(columns))
    (folder / "config.yaml").write_text(yaml.safe_dump_all(list(configs)))
    (folder / "environment.json").write_text(json.dumps(environment or {"distillbench": "0.1.0"}))
    return folder


def run_data(name, rows, columns=COLUMNS, configs=({"methods": {}, "seed": 0},), environment=None):
    """A run as it is read, from rows; without a summary."""
    table, none = make_table(rows, list(columns)), make_along([], list(columns))
    environment = environment or {"distillbench": "0.1.0"}
    return RunData(Path(name), table, table[:0], none, dict(columns), list(configs), environment)


# --- a finished run, with records ------------------------------------------------------------------------------------

TOY_COLUMNS = {"fd_toy": {"unit": "", "direction": "lower", "network": "toy", "needs": "real", "protocol": "toy/1"}}
TOY_ROW = {
    "dataset": "digits",
    "teacher": "trained-1",
    "images": 64,
    "budget": "100 images",
    "protocol": "p",
    "status": "ok",
    "device": "cpu",
    "sampling_seed": 0,
}


def toy_rows(*seeds, method="boot", **more):
    """A row of one method for each training seed, whose fd_toy is 10 more than the seed."""
    return [
        TOY_ROW | {"method": method, "training_seed": s, "nfe": 1, "fd_toy": 10.0 + s, "key": f"k{s}"} | more
        for s in seeds
    ]


def finished_run(folder):
    """The folder "mine" in `folder`: a run of two training seeds, with the records of one cell beside it."""
    run, cell = folder / "mine", folder / "cells" / "c"
    run.mkdir(parents=True)
    cell.mkdir(parents=True)
    write_table(make_table(toy_rows(0, 1), ["fd_toy"]), run)
    (run / "columns.json").write_text(json.dumps(TOY_COLUMNS))
    (run / "environment.json").write_text('{"python": "3.11"}')
    (run / "config.yaml").write_text("seed: 0\nmethods: {boot: {lr: 0.1}}\n---\nseed: 1\nmethods: {boot: {lr: 0.1}}\n")
    base = {"sampling_seed": 0, "status": "ok"}
    record = {"rows": [{"nfe": 1, **base}, {"nfe": 2, **base, "status": "failed"}, {"nfe": 4, **base}]}
    (cell / "evaluation-k0.json").write_text(json.dumps(record))
    shown = [torch.full((2, 1, 4, 4), value, dtype=torch.uint8) for value in (7, 9)]
    save_file(stack_shown(shown), cell / "evaluation-k0.safetensors")
    return run
