"""The rows of a run as they come in, and the run's folder, which is written anew as they do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from distillbench.config import RunConfig, to_yaml
from distillbench.done import About, Done
from distillbench.engines import Looked
from distillbench.files import write_atomically
from distillbench.results import link_all
from distillbench.run_settings import write_settings
from distillbench.sample_grid import sample_grid
from distillbench.seen_files import SeenFiles
from distillbench.shared_context import Cell
from distillbench.statistics import summarise
from distillbench.table import make_along, make_table, write_table

SHARE = 0.05  # of the time, at most, that writing the folder takes while rows come in
ALWAYS_SECONDS = 0.2  # a folder that is written so quickly is written at once


@dataclass
class Outcome:
    """A finished run."""

    folder: Path
    table: pd.DataFrame
    summary: pd.DataFrame
    columns: dict[str, dict[str, str]]  # what each score declares
    failed: list[str]  # labels of the cells that are not ok


class Rarely:
    """Has something written when it has changed, but so rarely that this takes a small share of the time.

    What is put off is done by a thread when its time has come, whether or not more changes until then.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self.write = write
        self.lock = threading.Lock()  # of the writing
        self.changed = False
        self.due = 0.0
        self.timer: threading.Timer | None = None
        self.error: Exception | None = None

    def soon(self) -> None:
        """It has changed. Raises what went wrong in the thread, or here."""
        self.changed = True
        if self.error is not None:
            raise self.error
        if self.timer is not None and self.timer.is_alive():
            return
        wait = self.due - time.monotonic()
        if wait <= 0:
            self.now()
            return
        self.timer = threading.Timer(wait, self._put_off)
        self.timer.daemon = True
        self.timer.start()

    def now(self) -> None:
        with self.lock:
            begin, self.changed = time.monotonic(), False
            self.write()
            end = time.monotonic()
            self.due = end if end - begin < ALWAYS_SECONDS else end + (end - begin) * (1 / SHARE - 1)

    def last(self) -> None:
        """Write now, if anything has changed, and nothing later."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()
        if self.changed:
            self.now()

    def _put_off(self) -> None:
        try:
            self.now()
        except Exception as error:
            self.error = error


class RunTable:
    """The rows that there are, in the order of the cells, and the run's folder."""

    def __init__(
        self, folder: Path, cells: Sequence[Cell], configs: list[RunConfig], looked: Looked,
        on_rows: Callable[[pd.DataFrame], None],
    ) -> None:  # fmt: skip
        self.folder, self.configs, self.on_rows = folder, configs, on_rows
        self.abouts: list[About] = [one.about for one in looked.seen]
        scenes = {id(cell.scene): cell.scene for cell in cells}.values()
        self.columns = {name: cls.describe() for scene in scenes for name, cls in scene.metrics.items()}
        self.environment = looked.environment
        self.done: dict[int, Done] = {}
        self.files = SeenFiles(folder.parent / "cells")
        self.linked: set[Path] = set()
        self.texts: dict[str, str] = {}
        self.writing = Rarely(self._write)

    @property
    def failed(self) -> list[str]:
        """Labels of the cells that are not ok."""
        return [done.about.label for _, done in sorted(self.done.items()) if not done.ok]

    def missing(self) -> list[int]:
        """The cells that are not done yet."""
        return [index for index in range(len(self.abouts)) if index not in self.done]

    def add(self, cells: dict[int, Done]) -> None:
        """Show the rows of `cells`, by their index, all at once; the folder is written anew, now or soon."""
        for done in cells.values():
            if done.weights is not None:
                self.files.note(done.weights[0], done.weights_sha256)
        if cells:
            self._show(cells)
            self.writing.soon()

    def _show(self, cells: dict[int, Done]) -> None:
        self.done.update(cells)
        self.on_rows(make_table([row for done in cells.values() for row in done.rows], list(self.columns)))

    def finish(self, status: str, reason: str) -> Outcome:
        """The run as it is; cells that are missing have rows with nothing but a status."""
        abouts = {index: self.abouts[index] for index in self.missing()}
        if abouts:
            self._show({index: Done(about, about.without_scores(status, reason)) for index, about in abouts.items()})
            self.writing.changed = True
        self.writing.last()
        self.files.keep()
        return Outcome(self.folder, *self.written, self.columns, self.failed)

    def _write(self) -> None:
        """The run's folder as it is now."""
        done = [one for _, one in sorted(dict(self.done).items())]  # of a copy: rows come in while a thread writes
        table = make_table([row for one in done for row in one.rows], list(self.columns))
        summary = summarise(table, {name: told["direction"] for name, told in self.columns.items()})
        write_table(table, self.folder)
        write_table(summary, self.folder, "summary")
        along = [row for one in done for row in one.along]
        if along:
            write_table(make_along(along, list(self.columns)), self.folder, "along")
        self.texts = self.texts or self._texts()
        for name, text in self.texts.items():
            write_atomically(self.folder / name, lambda path, text=text: Path(path).write_text(text, encoding="utf-8"))
        links = {self.folder / "weights" / one.weights[1]: one.weights[0] for one in done if one.weights is not None}
        link_all({target: source for target, source in links.items() if target not in self.linked})
        self.linked |= links.keys()
        lines = [line for one in done for line in one.shown]
        write_atomically(self.folder / "samples.png", lambda path: sample_grid(lines).save(path, format="png"))
        self.written = table, summary

    def _texts(self) -> dict[str, str]:
        """Files that do not change any more, by their names."""
        return {
            "config.yaml": write_settings(self.configs, to_yaml),
            "columns.json": json.dumps(self.columns, indent=2) + "\n",
            "environment.json": json.dumps(self.environment, indent=2) + "\n",
        }
