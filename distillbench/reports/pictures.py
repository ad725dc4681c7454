"""Samples of every row from the same noise, as PNG strips: one picture per row, its images side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from distillbench.errors import counted
from distillbench.records.statistics import TEACHER
from distillbench.reports.runs import RunData
from distillbench.reports.words import is_known, number, other_reasons

MOST_ROWS = 200
MOST_COLUMNS = 16
MOST_BYTES = 24 * 2**20  # of the PNGs of one grid; larger ones show fewer columns


@dataclass(frozen=True)
class Strip:
    """A row of a grid: `source` is a data URI of `count` images of width x height, or "" and `note` says why."""

    label: str
    nfe: str
    key: str
    source: str = ""
    count: int = 0
    width: int = 0
    height: int = 0
    note: str = ""
    teacher: bool = False


@dataclass(frozen=True)
class Grid:
    """The strips with images or with what failed, the teacher's first, the most evaluations on top."""

    strips: list[Strip]
    notes: list[str]

    @property
    def reference(self) -> Strip | None:
        """The teacher's with the most evaluations, to which others are compared."""
        return next((strip for strip in self.strips if strip.teacher and strip.source), None)

    @property
    def columns(self) -> int:
        return max((strip.count for strip in self.strips), default=0)


Rows = Sequence[tuple[RunData, str, Mapping[str, Any]]]  # run, label, row of its table


@dataclass(frozen=True, eq=False)
class _Shown:
    """A row of the grid and its images (N,C,H,W) uint8, None if there are none."""

    label: str
    row: Mapping[str, Any]
    images: np.ndarray | None


def grid(rows: Rows) -> Grid | None:
    """The grid of rows that may be compared; None without rows.

    Of rows with the same label and nfe, which differ in their seeds, the first is shown. There are at most MOST_ROWS
    rows, and as many of MOST_COLUMNS columns as MOST_BYTES allow.
    """
    chosen = _one_per_label(rows)
    if not chosen:
        return None
    notes = []
    seeds = {row["training_seed"] for _, _, row in chosen if is_known(row["training_seed"])}
    if len({(row["method"], row["training_seed"]) for _, _, row in rows}) > len({row["method"] for _, _, row in rows}):
        notes.append(f"Of several training seeds one is shown: {', '.join(map(str, sorted(seeds)))}.")
    if len(chosen) > MOST_ROWS:
        notes.append(f"The first {MOST_ROWS} of {len(chosen):,} rows are shown.")
    shown = _with_images(_teacher_first(chosen)[:MOST_ROWS])
    lost = [one for one in shown if one.images is None and one.row["status"] == "ok"]
    if lost:
        of = "these rows" if len(lost) == len(shown) else counted(len(lost), "row")
        notes.append(f"Samples of {of} are not kept: neither in this run's folder nor in cells/ beside it.")
    strips, columns = _strips_within_limit([one for one in shown if one not in lost])
    if columns < MOST_COLUMNS:
        notes.append(f"{counted(columns, 'column')} of {MOST_COLUMNS}, to keep this file small.")
    return Grid(strips, notes)


def _one_per_label(rows: Rows) -> Rows:
    """The first row of each label and nfe, one that is ok if there is one."""
    chosen: dict[tuple[str, object], tuple[RunData, str, Mapping[str, Any]]] = {}
    for run, label, row in rows:
        name = (label, row["nfe"] if is_known(row["nfe"]) else None)
        if name not in chosen or (chosen[name][2]["status"] != "ok" and row["status"] == "ok"):
            chosen[name] = (run, label, row)
    return list(chosen.values())


def _teacher_first(rows: Rows) -> Rows:
    """The teacher's rows, the most evaluations first, then the others in their order."""
    teachers = [one for one in rows if str(one[2]["method"]).startswith(TEACHER)]
    students = [one for one in rows if one not in teachers]
    return [*sorted(teachers, key=lambda one: -(one[2]["nfe"] or 0)), *students]


def _with_images(rows: Rows) -> list[_Shown]:
    """The rows with their images; each record is read once."""
    read: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    found = []
    for run, label, row in rows:
        images = None
        if is_known(row["key"]):
            place = (str(run.folder), str(row["key"]))
            if place not in read:
                read[place] = {nfe: images[:MOST_COLUMNS] for nfe, _, images in run.shown(place[1])}
            if row["status"] == "ok" and is_known(row["nfe"]):
                images = read[place].get(int(row["nfe"]))
        found.append(_Shown(label, row, images))
    return found


def _strips_within_limit(rows: Sequence[_Shown]) -> tuple[list[Strip], int]:
    """The strips, with as many columns as MOST_BYTES allow (one at least), and that number."""
    columns = MOST_COLUMNS
    while True:
        strips = [_strip(shown.label, shown.row, shown.images, columns) for shown in rows]
        size = sum(len(strip.source) for strip in strips)
        if size <= MOST_BYTES or columns == 1:
            return strips, columns
        columns = max(1, min(columns - 1, int(columns * MOST_BYTES / size)))


def _strip(label: str, row: Mapping[str, Any], images: np.ndarray | None, columns: int) -> Strip:
    nfe, key = number(row["nfe"]), str(row["key"]) if is_known(row["key"]) else ""
    teacher = str(row["method"]).startswith(TEACHER)
    if images is None or not len(images):
        bad = f"{row['status']}: {other_reasons(row['reason']) or 'no reason given'}"
        return Strip(label, nfe, key, note=bad, teacher=teacher)
    x = np.asarray(images[:columns]).transpose(0, 2, 3, 1)
    count, height, width, channels = x.shape
    picture = np.concatenate(list(x), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if channels == 1 else picture[..., :3]).save(buffer, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Strip(label, nfe, key, source, count, width, height, teacher=teacher)
