"""Records come back as they were written or not at all; tables have the same columns and types whatever happened."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from distillbench.records.records import (
    Cost,
    CurvePoint,
    EvaluationRecord,
    OtherVersion,
    RowRecord,
    SpeedRecord,
    SpeedRow,
    TrainRecord,
    read_record,
    signed,
    write_record,
)
from distillbench.records.sample_grid import sample_grid, stack_shown, unstack_shown
from distillbench.records.table import FIRST, LAST, make_table, table_row, write_table
from distillbench.storage.files import key_of

INPUTS = {"seed": 3, "config": {"lr": 1e-3, "steps": 8}, "method": None, "list": [1, 2]}
NAMES = {
    "dataset": "digits",
    "teacher": "trained-01234567",
    "method": "boot",
    "training_seed": 0,
    "settings": "",
    "compute": "fp32",
    "budget": "",
    "protocol": "",
    "reference": "",
    "device": "cpu",
    "key": "k",
}
COST = Cost(
    images=1000, seconds=1.5, teacher_seconds=0.5, student_seconds=0.75, other_seconds=0.25, teacher_nfe=2000,
    student_nfe=3000, teacher_backward=0, student_backward=1000, tflops=0.125,
)  # fmt: skip
SPEED = SpeedRecord(
    key="", inputs={}, device="cpu", environment={},
    rows=[SpeedRow(nfe=1, latency_p50_ms=0.5, images_per_second=1234.5, missing={"peak_gpu_mib": "no GPU in use"})],
)  # fmt: skip


def train_record(**changes):
    fields = {
        "key": key_of(INPUTS),
        "inputs": INPUTS,
        "status": "ok",
        "cost": COST,
        "peak_rss_mib": 700.25,
        "parameters": 12,
        "weights_sha256": "ab",
        "curve": [CurvePoint(images=500, seconds=0.5, loss=0.25)],
        "missing": {"peak_gpu_mib": "no GPU in use"},
        "device": "cpu (a model)",
        "environment": {"python": "3.11"},
    }
    return TrainRecord(**(fields | changes))


def row_record(**changes):
    fields = {
        "nfe": 1,
        "sampling_seed": 7,
        "scores": {"fid": 12.5, "rmse": None},
        "missing": {"rmse": "fresh noise"},
    }
    return RowRecord(**(fields | changes))


def row(training=None, speed=SPEED, **changes):
    return table_row(NAMES, row_record(**changes), training, speed, ["fid", "rmse"])


def test_a_row_says_what_its_student_was_trained_on():
    assert row(train_record(student_inputs="rollout"))["inputs"] == "rollout"
    older = make_table([{name: value for name, value in row().items() if name != "inputs"}], [])
    assert row()["inputs"] == "" and older["inputs"].tolist() == [""]


# --- records ---------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = train_record()
    write_record(tmp_path / "train.json", record)
    assert read_record(tmp_path / "train.json", TrainRecord, INPUTS) == record


def test_a_record_is_plain_json(tmp_path):
    write_record(tmp_path / "train.json", train_record())
    plain = json.loads((tmp_path / "train.json").read_text())
    assert (plain["inputs"], plain["schema_version"]) == (INPUTS, 3)
    assert plain["key"] == key_of(plain["inputs"])


def test_a_missing_record_is_none(tmp_path):
    assert read_record(tmp_path / "train.json", TrainRecord, INPUTS) is None


def damages():
    whole = train_record().model_dump_json()
    fields = json.loads(whole)
    sign = lambda plain: json.dumps(signed(plain)).encode()
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2].encode(),
        "not text": b"\xff\xfe\x00\x81",
        "not a record": b"[]",
        "a field is missing": sign({k: v for k, v in fields.items() if k != "status"}),
        "a field too many": sign(fields | {"extra": 1}),
        "another type": sign(fields | {"parameters": "many"}),
        "another status": sign(fields | {"status": "fine"}),
        "no checksum": whole.encode(),
        "another value": sign(fields).replace(b'"parameters": 12', b'"parameters": 13'),
        "deep nesting": b"[" * 100_000,
        "not a number": sign(fields).replace(b"700.25", b"NaN"),
        "a key of other inputs": sign(fields | {"key": "0" * 16}),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_record_is_an_error(tmp_path, damage):
    (tmp_path / "train.json").write_bytes(damages()[damage])
    with pytest.raises(ValueError, match=r"train\.json is damaged"):
        read_record(tmp_path / "train.json", TrainRecord, INPUTS)


def test_older_records_are_read_and_newer_ones_refused(tmp_path):
    record, path = train_record(), tmp_path / "train.json"
    plain = json.loads(record.model_dump_json())
    path.write_text(json.dumps(plain | {"schema_version": 2}))  # had no checksum
    assert read_record(path, TrainRecord, INPUTS) == record
    path.write_text(json.dumps(signed(plain | {"schema_version": 4})))
    with pytest.raises(OtherVersion, match=r"train\.json is of version 4, this distillbench reads 2, 3"):
        read_record(path, TrainRecord, INPUTS)


def test_a_folder_instead_of_a_record_is_an_error(tmp_path):
    (tmp_path / "train.json").mkdir()
    with pytest.raises(ValueError, match="damaged"):
        read_record(tmp_path / "train.json", TrainRecord, INPUTS)


def test_a_record_with_other_inputs_is_an_error(tmp_path):
    write_record(tmp_path / "train.json", train_record())
    with pytest.raises(ValueError, match="other inputs"):
        read_record(tmp_path / "train.json", TrainRecord, INPUTS | {"seed": 4})


@pytest.mark.parametrize(
    ("statuses", "whole"),
    [(["ok", "ok"], "ok"), (["ok", "diverged"], "ok"), (["ok", "failed"], "failed"), ([], "ok")],
)
def test_an_evaluation_is_final_unless_a_row_failed(statuses, whole):
    """Failed rows are tried again by the next run; a divergence is a result."""
    rows = [row_record(status=status) for status in statuses]
    assert EvaluationRecord(key="", inputs={}, rows=rows, device="cpu", environment={}).status == whole


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_student_row_has_the_training_cost():
    cells = row(train_record())
    assert {name: cells[name] for name in ("train_images", "train_seconds", "train_peak_rss_mib")} == {
        "train_images": 1000,
        "train_seconds": 1.5,
        "train_peak_rss_mib": 700.25,
    }
    assert (cells["train_teacher_nfe"], cells["train_student_nfe"]) == (2000, 3000)
    assert (cells["fid"], cells["rmse"], cells["nfe"], cells["status"]) == (12.5, None, 1, "ok")
    assert (cells["sampling_seed"], cells["sample_latency_p50_ms"], cells["train_tflops"]) == (7, 0.5, 0.125)


def test_a_row_has_the_speed_of_its_nfe():
    """And has none, with the reason, where speed was not measured."""
    assert row(train_record(), nfe=2).get("sample_latency_p50_ms") is None
    without = row(train_record(), SPEED.model_copy(update={"rows": [], "reason": "killed"}))
    assert (
        without["sample_latency_p50_ms"] is None
        and "sample_*, machine_load_sampling empty: killed" in without["reason"]
    )


def test_the_load_by_other_processes_is_in_a_row_and_older_records_say_that_they_lack_it():
    timed = SPEED.model_copy(update={"rows": [one.model_copy(update={"machine_load": 0.25}) for one in SPEED.rows]})
    cells = row(train_record(machine_load=0.5), timed)
    assert (cells["machine_load_training"], cells["machine_load_sampling"]) == (0.5, 0.25)
    assert "machine_load" not in cells["reason"]
    old = row(train_record(), SPEED)
    assert old["machine_load_training"] is None and old["machine_load_sampling"] is None
    assert "machine_load_training empty: not recorded by the version that trained" in old["reason"]
    assert "machine_load_sampling empty: not recorded by the version that measured" in old["reason"]


def test_the_reason_lists_every_empty_column():
    reason = row(train_record())["reason"]
    assert "rmse empty: fresh noise" in reason
    assert "train_peak_gpu_mib, sample_peak_gpu_mib empty: no GPU in use" in reason


def test_the_reason_of_a_failure_comes_first():
    assert row(train_record(), status="failed", reason="ValueError: no")["reason"].startswith("ValueError: no; ")


def test_a_teacher_row_has_no_training_cost():
    cells = row(None)
    assert all(cells.get(name) is None for name in LAST if name.startswith("train_"))
    assert "nothing is distilled" in cells["reason"]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_columns_and_types_do_not_depend_on_the_rows():
    empty, full = make_table([], ["fid", "rmse"]), make_table([row(train_record()), row(None)], ["fid", "rmse"])
    assert list(full.columns) == [*FIRST, "fid", "rmse", *LAST]
    assert (empty.dtypes == full.dtypes).all()
    assert str(full["training_seed"].dtype) == str(full["train_images"].dtype) == "Int64"


def test_csv_and_parquet_hold_the_same_table(tmp_path):
    teacher = row(None) | {"method": "teacher:ddim", "training_seed": None}
    table = make_table(
        [row(train_record()), row(train_record(), reason='a "quoted", reason\nof two lines'), teacher], ["fid", "rmse"]
    )
    write_table(table, tmp_path)
    types = {name: dtype for name, dtype in table.dtypes.items()}
    from_csv = pd.read_csv(
        tmp_path / "table.csv", dtype=types, keep_default_na=False, na_values={n: [""] for n in numbers(table)}
    )
    pd.testing.assert_frame_equal(from_csv, table)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.parquet"]


def numbers(table):
    return [name for name in table.columns if str(table[name].dtype) in ("Int64", "Float64")]


# --- weights and pictures --------------------------------------------------------------------------------------------


def test_samples_keep_their_order():
    shown = [torch.full((2, 1, 4, 4), k, dtype=torch.uint8) for k in range(12)]
    restored = unstack_shown(dict(reversed(list(stack_shown(shown).items()))))
    assert all(torch.equal(a, b) for a, b in zip(restored, shown, strict=True))
    assert unstack_shown(stack_shown([])) == []


def columns_of(picture, line, count, side=48):
    """The images of a line, cut out from the right edge."""
    pixels = np.asarray(picture)
    top = 4 + line * (side + 4)
    lefts = [picture.width - (count - k) * (side + 4) for k in range(count)]
    return [pixels[top : top + side, left : left + side] for left in lefts]


def test_the_picture_has_a_line_for_each_row():
    grey = torch.arange(3 * 64, dtype=torch.uint8).view(3, 1, 8, 8)
    picture = sample_grid([("boot, 1 NFE", grey), ("a much longer label", 255 - grey)])
    assert picture.height == 4 + 2 * (48 + 4)
    for line, images in enumerate((grey, 255 - grey)):
        for image, seen in zip(images, columns_of(picture, line, 3), strict=True):
            expected = image[0].repeat_interleave(6, 0).repeat_interleave(6, 1)[..., None].expand(-1, -1, 3)
            assert np.array_equal(seen, expected.numpy())


def test_the_picture_shows_colours_and_large_images(tmp_path):
    colour = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    sample_grid([("colour", colour)]).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        for image, seen in zip(colour, columns_of(picture, 0, 2, side=64), strict=True):
            assert np.array_equal(seen, image.permute(1, 2, 0).numpy())


def test_a_picture_without_rows_can_be_written():
    assert sample_grid([]).size == (48, 48)
