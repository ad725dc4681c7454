"""The rows of an evaluation that is not finished: an interruption loses the row in progress, not those before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillbench.records.influences import tensor_name
from distillbench.records.records import CheckpointScores, EvaluationRecord, RowRecord, read_record, write_record
from distillbench.storage.files import write_atomically

INFLUENCE = "influence "  # before the name of a tensor
NONE: Mapping[str, Tensor] = MappingProxyType({})
PREFIX = "rows-"  # of the file's name, before the key of the evaluation


class ScoredRows:
    """Rows that are ok, with the samples to show, in two files in the folder of a cell.

    `empty`: the record of the evaluation without rows. Rows of another student or device, or of other settings, are not
    found. With `fresh` none are.
    """

    def __init__(self, folder: Path, empty: EvaluationRecord, fresh: bool = False) -> None:
        self.path, self.record = folder / f"{PREFIX}{empty.key}.json", empty
        self.shown: dict[str, Tensor] = {}
        if not fresh:
            self._read()

    def _read(self) -> None:
        try:
            found = read_record(self.path, EvaluationRecord, self.record.inputs)
            shown = load_file(self._images) if found is not None and self._images.is_file() else {}
        except (ValueError, OSError, SafetensorError):
            return  # they are computed again
        if found is not None and (found.weights_sha256, found.device) == (
            self.record.weights_sha256,
            self.record.device,
        ):
            self.record, self.shown = found, shown

    @property
    def _images(self) -> Path:
        return self.path.with_suffix(".safetensors")

    def find(self, nfe: int, seed: int, fraction: float | None = None) -> tuple[RowRecord, Tensor | None] | None:
        """A row, at `fraction` of the training or (None) after it, and its samples if they were kept; or None."""
        for row in self.record.rows if fraction is None else self.record.along:
            if _name(row) == _name_of(nfe, seed, fraction):
                return row, self.shown.get(_name(row))
        return None

    def influences(self) -> dict[str, Tensor]:
        """Those of all rows, by the names of their file."""
        return {name.removeprefix(INFLUENCE): t for name, t in self.shown.items() if name.startswith(INFLUENCE)}

    def keep(self, row: RowRecord, images: Tensor | None, influences: Mapping[str, Tensor] = NONE) -> None:
        """Write down a row, if it is ok, its samples, and its images' influences by score."""
        if row.status != "ok":
            return
        if images is not None:  # first: where the row is, its samples are
            self.shown[_name(row)] = images.contiguous()
        for score, values in influences.items():
            self.shown[INFLUENCE + tensor_name(row.nfe, row.sampling_seed, score)] = values.contiguous()
        if images is not None or influences:
            write_atomically(self._images, lambda path: save_file(self.shown, path))
        name = "along" if isinstance(row, CheckpointScores) else "rows"
        self.record = self.record.model_copy(update={name: [*getattr(self.record, name), row]})
        write_record(self.path, self.record)

    def discard(self) -> None:
        """Remove the files: the record of the whole evaluation is written."""
        self.path.unlink(missing_ok=True)
        self._images.unlink(missing_ok=True)


def _name(row: RowRecord) -> str:
    return _name_of(row.nfe, row.sampling_seed, row.fraction if isinstance(row, CheckpointScores) else None)


def _name_of(nfe: int, seed: int, fraction: float | None) -> str:
    return f"{nfe} {seed} {'' if fraction is None else fraction}"
