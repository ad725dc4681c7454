"""``distillbench data check``: read every image of a dataset once and report what is found."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from distillbench.datasets.dataset import Dataset, to_uint8
from distillbench.datasets.image_dataset import FileDataset
from distillbench.datasets.image_readers import map_in_order
from distillbench.errors import UserError, printable
from distillbench.records.sample_grid import sample_grid
from distillbench.storage.files import write_atomically
from distillbench.system.progress import Progress

if TYPE_CHECKING:
    from distillbench.registry import Registry

BATCH = 256  # images read at a time
LISTED = 10  # names that a list shows
COLUMNS, ROWS = 8, 8  # of the grid of images


@dataclass
class Report:
    """The findings. `facts` are (name, value) texts; images have the names of their source."""

    facts: list[tuple[str, str]]
    images: int = 0
    damaged: list[str] = field(default_factory=list)  # one message per damaged image
    duplicates: list[list[str]] = field(default_factory=list)  # names of images with identical bytes
    mean: list[float] = field(default_factory=list)  # per channel, of pixels in [-1, 1]
    std: list[float] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # distinct warnings of Pillow
    shown: Tensor | None = None  # (N,C,H,W) uint8, the first images

    @property
    def ok(self) -> bool:
        return not self.damaged

    def lines(self) -> list[tuple[str, str]]:
        """Everything as (name, value)."""
        found = list(self.facts)
        if self.images:
            read = self.images - len(self.damaged)
            found.append(("read", f"{read:,} of {self.images:,} images"))
            moments = [f"mean {_numbers(self.mean)}, standard deviation {_numbers(self.std)}"] if self.mean else []
            found += [("pixels in [-1, 1]", text) for text in moments]
            repeated = sum(len(group) - 1 for group in self.duplicates)
            groups = [" = ".join(group[:3]) + (" = ..." if len(group) > 3 else "") for group in self.duplicates]
            found.append(("duplicates", f"{repeated:,}: {_listed(groups)}" if repeated else "none"))
            found += [("warnings of Pillow", _listed(self.remarks))] if self.remarks else []
            found.append(("damaged", f"{len(self.damaged):,}: {_listed(self.damaged)}" if self.damaged else "none"))
        return found


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _listed(names: Sequence[str]) -> str:
    more = f"; and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return "; ".join(names[:LISTED]) + more


def check(dataset: Dataset, progress: Progress | None = None) -> Report:
    """Read every image of `dataset` once. Damaged images are reported and not raised."""
    report = Report(_facts(dataset), len(dataset))
    progress = progress or Progress(None)
    sums = torch.zeros(2, dataset.shape[0], dtype=torch.float64)
    count = 0
    shown: list[Tensor] = []
    with progress.step(f"reading {dataset.name}") as step, warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        for start in range(0, len(dataset), BATCH):
            images = _read(dataset, range(start, min(start + BATCH, len(dataset))), report)
            values = images.double().transpose(0, 1).flatten(1) / 127.5 - 1
            sums += torch.stack([values.sum(1), values.square().sum(1)])
            count += values.shape[1]
            if sum(len(part) for part in shown) < COLUMNS * ROWS:
                shown.append(images)
            step.advance((start + BATCH) / len(dataset), f"{len(report.damaged)} damaged" if report.damaged else "")
    of_pillow = [remark for remark in remarks if "PIL" in Path(remark.filename).parts]
    report.remarks = list(dict.fromkeys(" ".join(str(remark.message).split()) for remark in of_pillow))
    if count:
        mean = sums[0] / count
        report.mean, report.std = mean.tolist(), (sums[1] / count - mean.square()).clamp(min=0).sqrt().tolist()
        report.shown = torch.cat(shown)[: COLUMNS * ROWS]
    if isinstance(dataset, FileDataset):
        report.duplicates = _duplicates(dataset)
    return report


def _read(dataset: Dataset, indices: range, report: Report) -> Tensor:
    """The readable images at `indices`, uint8; the messages of the others are added to the report."""
    if not isinstance(dataset, FileDataset):
        return to_uint8(dataset.read(torch.tensor(indices)))

    def read(index: int) -> np.ndarray | str:
        try:
            return dataset.image(index)
        except UserError as error:
            return str(error).removeprefix("dataset.path: ")

    found = map_in_order(read, indices, dataset.workers)
    report.damaged += [message for message in found if isinstance(message, str)]
    good = [image for image in found if not isinstance(image, str)]
    return torch.from_numpy(np.stack(good)) if good else torch.empty(0, *dataset.shape, dtype=torch.uint8)


def _facts(dataset: Dataset) -> list[tuple[str, str]]:
    channels, height, width = dataset.shape
    facts = [("dataset", dataset.name)]
    if isinstance(dataset, FileDataset):
        facts += [("source", f"{dataset.reader.kind}, {dataset.path}")]
        published = dataset.count.get(dataset.config.split)
        compared = f" ({published:,} are published)" if published not in (None, len(dataset)) else ""
        facts += [("images", f"{len(dataset):,}{compared}")]
    else:
        facts += [("images", f"{len(dataset):,}")]
    facts += [("shape", f"{channels} {'channel' if channels == 1 else 'channels'}, {height}x{width}")]
    facts += [("split", dataset.split), ("resizer", dataset.resizer), *_classes(dataset)]
    facts += [("note", note) for note in dataset.notes]
    return [*facts, ("sha256", dataset.sha256), ("licence", dataset.licence)]


def _classes(dataset: Dataset) -> list[tuple[str, str]]:
    if dataset.prompts is not None:
        first = [repr(text if len(text) <= 60 else f"{text[:60]}...") for text in dataset.prompts[:3]]
        asked = f", {len(dataset.evaluated):,} of them for evaluation" if dataset.evaluated is not None else ""
        name = "captions" if len(dataset) else "prompts"
        return [(name, f"{len(dataset.prompts):,}{asked}: {', '.join(first)}{', ...' * (len(dataset.prompts) > 3)}")]
    if not dataset.classes or not len(dataset):
        return [("classes", f"{dataset.classes:,}" if dataset.classes else "none: the images have no labels")]
    counts = torch.bincount(dataset.labels(torch.arange(len(dataset))), minlength=dataset.classes).tolist()
    names = list(dataset.class_names) if isinstance(dataset, FileDataset) else []
    names = names if len(names) == len(counts) else [str(number) for number in range(len(counts))]
    listed = [f"{name} {number:,}" for name, number in zip(names, counts, strict=True)]
    empty = sum(not number for number in counts)
    spread = f"{min(counts):,} to {max(counts):,} images each" + (f", {empty:,} without any" if empty else "")
    return [("classes", f"{dataset.classes:,}, {spread}" + (f": {', '.join(listed)}" if len(listed) <= 20 else ""))]


def _duplicates(dataset: FileDataset) -> list[list[str]]:
    """Groups of images with the same CRC-32 and size, in order."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, checksum in enumerate(dataset.reader.checksums(dataset.workers)):
        groups.setdefault(checksum, []).append(index)
    return [[dataset.reader.name(i) for i in group] for group in groups.values() if len(group) > 1]


def grid_picture(images: Tensor) -> Image.Image:
    """A picture of the first images (N,C,H,W) uint8, `COLUMNS` per line, with the index of the first in each line."""
    lines = images[: COLUMNS * ROWS].split(COLUMNS)
    if len(lines) > 1 and len(lines[-1]) < COLUMNS:  # sample_grid is as wide as its shortest line
        missing = COLUMNS - len(lines[-1])
        lines = (*lines[:-1], torch.cat([lines[-1], images.new_full((missing, *images.shape[1:]), 255)]))
    return sample_grid([(f"{number * COLUMNS}", line) for number, line in enumerate(lines)], columns=COLUMNS)


def command(settings: Sequence[str], registry: Registry, grid: Path | None, console: Console) -> int:
    """``distillbench data check SETTINGS``: print the report, write a picture to `grid`, return the exit code."""
    from rich import box
    from rich.table import Table

    from distillbench.reports.terminal_table import put
    from distillbench.runs.config import compose_runs
    from distillbench.runs.run_downloads import fetch_asked

    if grid is not None and grid.suffix != ".png":
        raise UserError(f"--grid must name a .png file, got {str(grid)!r}")
    configs = compose_runs(list(settings), registry, need_methods=False)
    if len(configs) > 1:
        raise UserError(f"data check takes one dataset, but the settings describe {len(configs)} runs")
    fetch_asked(configs, registry, Progress(console))
    dataset = registry.get("datasets", configs[0].dataset.kind).cls(configs[0].dataset)
    report = check(dataset, Progress(console))
    table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report.lines():
        table.add_row(name, printable(value))
    put(console, table)
    if grid is not None and report.shown is not None:
        picture = grid_picture(report.shown)
        write_atomically(grid, lambda path: picture.save(path, format="png"))
        console.print(f"written: {grid}", markup=False, soft_wrap=True)
    if grid is not None and report.shown is None:
        console.print(f"no images, so {grid} is not written", markup=False, soft_wrap=True)
    return 0 if report.ok else 1
