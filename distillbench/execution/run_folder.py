"""The rows of a run as they arrive, and the run's folder, which is updated as they do."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from distillbench.execution.workers import Scan
from distillbench.records.influences import InfluenceFiles, run_file
from distillbench.records.layout import CELLS
from distillbench.records.sample_grid import sample_grid
from distillbench.records.sample_strips import write_strips
from distillbench.records.settings_file import write_settings
from distillbench.records.statistics import summarise
from distillbench.records.table import make_along, make_table, write_table
from distillbench.reports.labels import METHOD, Labels
from distillbench.reports.reproduce import COMMAND
from distillbench.runs.cell_result import CellResult
from distillbench.runs.config import RunConfig, to_yaml
from distillbench.runs.run_command import run_commands
from distillbench.runs.shared_context import Cell
from distillbench.storage.files import write_atomically, write_text
from distillbench.storage.hash_cache import HashCache
from distillbench.storage.links import link_all

WRITING_SHARE = 0.05  # of the run's time: the most that updates of the folder take
QUICK_SECONDS = 0.2  # a folder that is written so quickly is updated for each cell


@dataclass
class Outcome:
    """A finished run."""

    folder: Path
    table: pd.DataFrame
    summary: pd.DataFrame
    labels: Labels  # the declarations of each score, and the names of each method
    failed: list[str]  # labels of the cells that are not ok
    fresh: int  # cells that were run, and not found

    @property
    def influences(self) -> list[InfluenceFiles]:
        """Where the influences of its images are found."""
        return [InfluenceFiles(self.folder)]


class ThrottledWriter:
    """Calls `write` after changes, but so rarely that writing takes a small share of the time.

    A write that has to wait is done by a timer thread, even if nothing changes in the meantime.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self.write = write
        self.lock = threading.Lock()  # held while writing
        self.changed = False
        self.due = 0.0
        self.timer: threading.Timer | None = None
        self.error: Exception | None = None

    def schedule(self) -> None:
        """Write now or later. Raises the error of an earlier write in the timer thread."""
        self.changed = True
        if self.error is not None:
            raise self.error
        if self.timer is not None and self.timer.is_alive():
            return
        wait = self.due - time.monotonic()
        if wait <= 0:
            self.write_now()
            return
        self.timer = threading.Timer(wait, self._write_in_thread)
        self.timer.daemon = True
        self.timer.start()

    def write_now(self) -> None:
        with self.lock:
            begin, self.changed = time.monotonic(), False
            self.write()
            end = time.monotonic()
            self.due = end if end - begin < QUICK_SECONDS else end + (end - begin) * (1 / WRITING_SHARE - 1)

    def flush(self) -> None:
        """Write now if anything has changed, and stop the timer."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()
        if self.changed:
            self.write_now()

    def _write_in_thread(self) -> None:
        try:
            self.write_now()
        except Exception as error:
            self.error = error


def merged_columns(every: Sequence[dict[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    """The declarations of each score. A protocol that differs between rows, as with other real images, has them all."""
    protocols: dict[str, dict[str, None]] = {}
    for columns in every:
        for name, facts in columns.items():
            protocols.setdefault(name, {})[facts["protocol"]] = None
    known = {name: facts for columns in every for name, facts in columns.items()}
    return {name: facts | {"protocol": ", or ".join(protocols[name])} for name, facts in known.items()}


def labels_of(cells: Sequence[Cell]) -> Labels:
    """The names of the scores and methods of `cells` for people, and what each score declares."""
    contexts = {id(cell.shared): cell.shared for cell in cells}.values()
    names = {cell.name: cell.names for cell in cells}
    methods = {name: {"label": short, "title": full} for name, (short, full) in names.items()}
    return Labels(merged_columns([shared.columns() for shared in contexts]), methods)


class RunTable:
    """The results so far, in the order of the cells, and the run's folder."""

    def __init__(
        self, folder: Path, cells: Sequence[Cell], configs: list[RunConfig], scan: Scan,
        on_rows: Callable[[pd.DataFrame], None], tuning: Mapping[str, Mapping[str, Any]],
    ) -> None:  # fmt: skip
        """`on_rows` gets new rows. Their index is what tells their cells apart, such as "lr=0.0001".

        `tuning`: by method, what its rows say of the search for its settings.
        """
        self.tuning = tuning
        self.folder, self.configs, self.on_rows = folder, configs, on_rows
        self.descriptions = scan.descriptions
        self.labels = labels_of(cells)
        self.columns = self.labels.columns
        self.environment = {"date": datetime.now(UTC).date().isoformat(), **scan.environment}
        self.results: dict[int, CellResult] = {}
        self.files = HashCache(folder.parent / CELLS)
        self.linked: set[Path] = set()
        self.fresh = 0
        self.texts: dict[str, str] = {}
        self.writer = ThrottledWriter(self._write)

    @property
    def failed(self) -> list[str]:
        """Labels of the cells that are not ok."""
        return [result.description.label for _, result in sorted(self.results.items()) if not result.ok]

    def unfinished(self) -> list[int]:
        """The indices of the cells without a result."""
        return [index for index in range(len(self.descriptions)) if index not in self.results]

    def add(self, results: dict[int, CellResult], show: bool = True) -> None:
        """Show the rows of `results`, by the cells' indices, and update the folder now or later."""
        for result in results.values():
            if result.weights is not None:
                self.files.note(result.weights[0], result.weights_sha256)
        results = {index: self._with_tuning(result) for index, result in results.items()}
        self.results.update(results)
        if results and show:
            self._show(results)
        if results:
            self.writer.schedule()

    def _show(self, results: dict[int, CellResult]) -> None:
        rows = [(result.description.differs, row) for result in results.values() for row in result.rows]
        table = make_table([row for _, row in rows], list(self.columns))
        self.on_rows(table.set_axis([differs for differs, _ in rows]))

    def add_fresh(self, results: dict[int, CellResult]) -> None:
        """The same for cells that were run now."""
        self.fresh += len(results)
        self.add(results)

    def _with_tuning(self, result: CellResult) -> CellResult:
        """The result, whose rows say how their settings were searched."""
        added = dict(self.tuning.get(result.description.columns["method"], {}))
        if not added:
            return result
        why = added.pop("reason", "")
        rows = [row | added | {"reason": "; ".join(filter(None, [row["reason"], why]))} for row in result.rows]
        return dataclasses.replace(result, rows=rows)

    def finish(self, status: str, reason: str) -> Outcome:
        """The run as it is. Unfinished cells get rows with this status and no scores."""
        missing = {index: self.descriptions[index] for index in self.unfinished()}
        if missing:
            ended = {index: CellResult(one, one.status_rows(status, reason)) for index, one in missing.items()}
            ended = {index: self._with_tuning(result) for index, result in ended.items()}
            self.results.update(ended)
            self._show(ended)
            self.writer.changed = True
        self.writer.flush()
        self.files.keep()
        return Outcome(self.folder, *self.written, self.labels, self.failed, self.fresh)

    def _write(self) -> None:
        results = [one for _, one in sorted(dict(self.results).items())]  # a copy: the timer thread writes, too
        table = make_table([row for one in results for row in one.rows], list(self.columns))
        summary = summarise(table, self.labels.directions)
        write_table(table, self.folder)
        write_table(summary, self.folder, "summary")
        along = [row for one in results for row in one.along]
        if along:
            write_table(make_along(along, list(self.columns)), self.folder, "along")
        self.texts = self.texts or self._texts()
        for name, text in self.texts.items():
            write_text(self.folder / name, text)
        links = {self.folder / "weights" / one.weights[1]: one.weights[0] for one in results if one.weights is not None}
        for one in results:
            if one.influences is not None:
                links[run_file(self.folder, one.description.evaluation_key)] = one.influences
        link_all({target: source for target, source in links.items() if target not in self.linked})
        self.linked |= links.keys()
        lines = [(label, images) for one in results for label, _, images in one.shown]
        write_atomically(self.folder / "samples.png", lambda path: sample_grid(lines).save(path, format="png"))
        write_strips(
            self.folder,
            ((one.description.columns["key"], nfe, images.numpy()) for one in results for _, nfe, images in one.shown),
        )
        self.written = table, summary

    def _texts(self) -> dict[str, str]:
        """The contents of files that do not change during the run, by name."""
        return {
            "config.yaml": write_settings(self.configs, to_yaml),
            COMMAND: "".join(f"{command}\n" for command in run_commands(self.configs)),
            "columns.json": json.dumps({**self.columns, METHOD: self.labels.methods}, indent=2, ensure_ascii=False)
            + "\n",
            "environment.json": json.dumps(self.environment, indent=2) + "\n",
        }
