"""Rows of an unfinished evaluation are found again, and only those that are still right."""

from __future__ import annotations

import pytest
import torch

from distillbench.records.records import CheckpointScores, EvaluationRecord, RowRecord
from distillbench.runs.scored_rows import ScoredRows
from distillbench.storage.files import key_of

INPUTS = {"images": 4, "nfe": [1, 2]}
IMAGES = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)


def empty(inputs: dict = INPUTS, weights: str = "ab", device: str = "cpu") -> EvaluationRecord:
    given = {"weights_sha256": weights, "device": device, "environment": {}}
    return EvaluationRecord(key=key_of(inputs), inputs=inputs, rows=[], **given)


@pytest.fixture
def kept(tmp_path) -> ScoredRows:
    rows = ScoredRows(tmp_path, empty())
    rows.keep(RowRecord(nfe=1, sampling_seed=0, scores={"fid": 0.1}, missing={"kid": "few"}), IMAGES)
    rows.keep(RowRecord(nfe=1, sampling_seed=1, scores={"fid": 0.2}), None)
    rows.keep(RowRecord(nfe=2, sampling_seed=0, status="diverged", reason="nan"), None)
    rows.keep(CheckpointScores(nfe=1, sampling_seed=0, fraction=0.5, scores={"fid": 0.3}), None)
    return rows


def test_rows_are_found_again_with_their_samples(kept, tmp_path):
    again = ScoredRows(tmp_path, empty())
    row, images = again.find(1, 0)
    assert (row.scores, row.missing) == ({"fid": 0.1}, {"kid": "few"}) and torch.equal(images, IMAGES)
    assert again.find(1, 1)[0].scores == {"fid": 0.2} and again.find(1, 1)[1] is None
    assert again.find(2, 0) is None  # not ok: tried again
    along, _ = again.find(1, 0, 0.5)
    assert isinstance(along, CheckpointScores) and along.scores == {"fid": 0.3} and again.find(1, 0, 0.25) is None
    again.keep(RowRecord(nfe=2, sampling_seed=0, scores={"fid": 0.4}), IMAGES + 1)
    last = ScoredRows(tmp_path, empty())
    assert torch.equal(last.find(1, 0)[1], IMAGES) and torch.equal(last.find(2, 0)[1], IMAGES + 1)


@pytest.mark.parametrize("other", [empty({"images": 5}), empty(weights="cd"), empty(device="another CPU")])
def test_rows_of_something_else_are_not_found(kept, tmp_path, other):
    assert ScoredRows(tmp_path, other).find(1, 0) is None


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 100])
def test_damaged_files_are_computed_again(kept, tmp_path, suffix, damage):
    kept.path.with_suffix(suffix).write_bytes(damage)
    again = ScoredRows(tmp_path, empty())
    assert again.find(1, 0) is None
    again.keep(RowRecord(nfe=1, sampling_seed=0, scores={"fid": 0.1}), IMAGES)
    assert torch.equal(ScoredRows(tmp_path, empty()).find(1, 0)[1], IMAGES)


def test_force_finds_none_and_a_finished_evaluation_leaves_no_file(kept, tmp_path):
    assert ScoredRows(tmp_path, empty(), fresh=True).find(1, 0) is None
    kept.path.with_suffix(".safetensors").unlink()  # a row whose samples are lost
    row, images = ScoredRows(tmp_path, empty()).find(1, 0)
    assert row.scores == {"fid": 0.1} and images is None
    kept.discard()
    assert not list(tmp_path.iterdir())
    kept.discard()


def test_influences_of_kept_rows_are_found_again(tmp_path):
    """What was scored before an interruption has its influences in the evaluation that goes on."""
    record = EvaluationRecord(key=key_of({"a": 1}), inputs={"a": 1}, rows=[], device="cpu", environment={})
    rows = ScoredRows(tmp_path, record)
    values = torch.arange(4.0)
    rows.keep(RowRecord(nfe=2, sampling_seed=7, scores={"fd": 1.0}), None, {"fd": values})
    again = ScoredRows(tmp_path, record)
    assert again.find(2, 7)[1] is None
    assert {name: found.tolist() for name, found in again.influences().items()} == {"2/7/fd": values.tolist()}
    assert ScoredRows(tmp_path, record, fresh=True).influences() == {}
