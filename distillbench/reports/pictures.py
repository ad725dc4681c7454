"""Samples of every row from the same noise, as PNG strips: one picture a row, its images side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from distillbench.reports.runs import RunData
from distillbench.reports.words import counted, is_known, number, other_reasons

MOST_ROWS = 200
MOST_COLUMNS = 16
MOST_BYTES = 24 * 2**20  # of PNG in one grid: beyond, fewer columns are shown


@dataclass(frozen=True)
class Strip:
    """A row of a grid: `source` is a data URI of `count` images of width x height, or empty and `note` says why."""

    label: str
    nfe: str
    key: str
    source: str = ""
    count: int = 0
    width: int = 0
    height: int = 0
    note: str = ""


@dataclass(frozen=True)
class Grid:
    strips: list[Strip]
    notes: list[str]

    @property
    def columns(self) -> int:
        return max((strip.count for strip in self.strips), default=0)


def grid(rows: Sequence[tuple[RunData, str, Mapping[str, Any]]]) -> Grid | None:
    """The grid of rows (run, label, row of its table), which may be compared; None if there is no row at all.

    Of rows of one label and nfe, which differ in seeds, the first is shown. At most MOST_ROWS rows, and as many
    columns of MOST_COLUMNS as MOST_BYTES allow.
    """
    chosen: dict[tuple[str, object], tuple[RunData, Mapping[str, Any]]] = {}
    for run, label, row in rows:
        name = (label, row["nfe"] if is_known(row["nfe"]) else None)
        if name not in chosen or (chosen[name][1]["status"] != "ok" and row["status"] == "ok"):
            chosen[name] = (run, row)
    if not chosen:
        return None
    notes = []
    seeds = {row["training_seed"] for _, row in chosen.values() if is_known(row["training_seed"])}
    if len({(row["method"], row["training_seed"]) for _, _, row in rows}) > len({row["method"] for _, _, row in rows}):
        notes.append(f"Of several training seeds one is shown: {', '.join(map(str, sorted(seeds)))}.")
    if len(chosen) > MOST_ROWS:
        notes.append(f"The first {MOST_ROWS} of {len(chosen):,} rows are shown.")
    kept: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    found: list[tuple[str, RunData, Mapping[str, Any], np.ndarray | None]] = []
    for (label, _), (run, row) in list(chosen.items())[:MOST_ROWS]:
        key = str(row["key"]) if is_known(row["key"]) else ""
        place = (str(run.folder), key)
        if key and place not in kept:
            kept[place] = {nfe: images[:MOST_COLUMNS] for nfe, _, images in run.shown(key)}
        good = row["status"] == "ok" and is_known(row["nfe"])
        found.append((label, run, row, kept.get(place, {}).get(int(row["nfe"])) if good else None))
    columns = MOST_COLUMNS
    while True:
        strips = [_strip(label, row, images, columns) for label, _, row, images in found]
        size = sum(len(strip.source) for strip in strips)
        if size <= MOST_BYTES or columns == 1:
            break
        columns = max(1, min(columns - 1, int(columns * MOST_BYTES / size)))
    if columns < MOST_COLUMNS:
        notes.append(f"{counted(columns, 'column')} of {MOST_COLUMNS}, to keep this file small.")
    return Grid(strips, notes)


def _strip(label: str, row: Mapping[str, Any], images: np.ndarray | None, columns: int) -> Strip:
    nfe, key = number(row["nfe"]), str(row["key"]) if is_known(row["key"]) else ""
    if images is None or not len(images):
        gone = "its samples are not kept here: the records in cells/ are gone or damaged"
        bad = f"{row['status']}: {other_reasons(row['reason']) or 'no reason given'}"
        return Strip(label, nfe, key, note=gone if row["status"] == "ok" else bad)
    x = np.asarray(images[:columns]).transpose(0, 2, 3, 1)
    count, height, width, channels = x.shape
    picture = np.concatenate(list(x), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if channels == 1 else picture[..., :3]).save(buffer, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Strip(label, nfe, key, source, count, width, height)
