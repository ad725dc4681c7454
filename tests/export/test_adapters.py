"""A run with adapters and with a smaller network: keys, rows, and the exported pipeline with its file of adapters."""

from __future__ import annotations

import dataclasses
import io
import json

import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from distillbench.diffusion import time_like, x_at_t_max
from distillbench.errors import UserError
from distillbench.execution.run import run
from distillbench.export import write
from distillbench.export.adapters import FILE, METADATA
from distillbench.export.run_export import find_student
from distillbench.networks.adapters import adapted_layers
from distillbench.records.records import TrainRecord, load_record
from distillbench.registry import load_registry
from distillbench.runs.cell_keys import train_inputs
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.storage.files import key_of
from distillbench.system.progress import Progress

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")

SILENT = Progress(None)
WORDS = [
    "experiment=smoke", "methods=[direct]", "dataset=digits", "methods.direct.pairs=64", "methods.direct.steps=4",
    "budget.images=256", "batch_size=32", "evaluation.images=16", "evaluation.batch_size=16", "evaluation.nfe=[1]",
    "evaluation.timing=inline", "evaluation.timing_seconds=0.01", "evaluation.largest_timed_batch=1",
    "evaluation.metrics=[teacher_rmse]", "device=cpu", "isolate=false",
]  # fmt: skip
SMALL = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
    "layers_per_block": 1, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 4,
}  # fmt: skip


@dataclasses.dataclass
class Ran:
    folder: object
    registry: object
    table: pd.DataFrame
    file: object  # of the small architecture


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    """One folder for the whole network, adapters and a small network."""
    base, registry = tmp_path_factory.mktemp("run"), load_registry()
    file = base / "small.json"
    file.write_text(json.dumps(SMALL))
    common = [*WORDS, f'results_dir="{base}/results"', "run_name=here"]
    forms = [[], ["student.lora_rank=2", "student.lora_alpha=4"], [f'student.architecture="{file}"']]
    configs = [config for form in forms for config in compose_runs([*common, *form], registry)]
    log = io.StringIO()
    outcome = run(plan(configs, registry), configs, Progress(Console(file=log, width=300)), lambda rows: None)
    assert not outcome.failed, log.getvalue()
    return Ran(outcome.folder, registry, pd.read_parquet(outcome.folder / "table.parquet"), file)


def names(ran: Ran) -> list[str]:
    """The names of the three students, in the order of the rows."""
    found = {load_record(file, TrainRecord).key: load_record(file, TrainRecord)
             for file in ran.folder.parent.glob("cells/*/train.json")}  # fmt: skip
    order = [next(key for key, record in found.items() if list(record.inputs.get("student", {}))[:1] == first)
             for first in ([], ["lora_rank"], ["architecture"])]  # fmt: skip
    return [f"direct-seed0-{key}" for key in order]


def test_rows_say_what_was_trained(ran):
    rows = ran.table[ran.table["method"] == "direct"]
    whole, lora, small = (row for _, row in rows.iterrows())
    assert whole["trained_parameters"] == whole["parameters"] == lora["parameters"]
    assert lora["trained_parameters"] < whole["parameters"] > small["parameters"] == small["trained_parameters"]
    assert (lora["student_lora_rank"], lora["settings"].split(", methods")[0]) == (
        2, "student.lora_rank=2, student.lora_alpha=4.0, steps=4, pairs=64")  # fmt: skip
    assert pd.isna(whole["student_lora_rank"]) and pd.isna(small["student_lora_rank"])
    assert small["student_architecture"].startswith("UNet2DModel-") and whole["student_architecture"] == ""
    assert "student.architecture=small.json" in small["settings"] and "student" not in whole["settings"]
    assert lora["train_tflops"] < whole["train_tflops"] and lora["sample_gflops"] == whole["sample_gflops"]
    assert rows["protocol"].nunique() == 1 and rows["key"].nunique() == 3


def test_the_teacher_is_evaluated_once(ran):
    teacher = ran.table[ran.table["method"].str.startswith("teacher:")]
    assert teacher["nfe"].is_unique and teacher["student_lora_rank"].isna().all()


def test_without_settings_of_students_the_key_is_as_before(ran):
    (cell,) = (c for c in plan(compose_runs([*WORDS, f'results_dir="{ran.folder.parent}"'], ran.registry), ran.registry)
               if c.entry is not None)  # fmt: skip
    inputs = train_inputs(cell, cell.shared.load_teacher(SILENT))
    assert "student" not in inputs
    assert names(ran)[0] == f"direct-seed0-{key_of(inputs)}"


def test_the_exported_pipeline_is_merged_and_the_adapters_lie_beside_it(ran, tmp_path):
    name = names(ran)[1]
    write.export(ran.folder, name, None, tmp_path / "out", ran.registry, SILENT)
    student = find_student(ran.folder, name, None, ran.registry, SILENT)
    assert not any(adapted_layers(student.method.state_dict()))
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        settings = json.loads(file.metadata()[METADATA])
    assert (settings["r"], settings["lora_alpha"]) == (2, 4.0)
    base, saved = student.teacher.student(), load_file(tmp_path / "out" / FILE)
    plain = student.teacher.trainable_copy().eval()
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), plain.network)
    outcome = peft.set_peft_model_state_dict(plain.network, saved)
    assert not outcome.unexpected_keys and saved.keys() == peft.get_peft_model_state_dict(base.network).keys()
    eps, schedule = torch.randn(8, 1, 8, 8), student.teacher.schedule
    with torch.no_grad():
        ours = student.method.sample(lambda k: eps, 1, student.teacher.conditioning.of_images(range(8), "cpu"))
        theirs = plain(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max))
        teachers = student.teacher.denoise(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max))
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, teachers, atol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its adapters (LoRA, rank 2, alpha 4) are merged" in card and r"student.lora\_rank=2" in card


def test_a_small_student_is_exported(ran, tmp_path):
    write.export(ran.folder, names(ran)[2], None, tmp_path / "out", ran.registry, SILENT)
    assert not (tmp_path / "out" / FILE).exists()
    assert "student.architecture=small.json" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_of_a_method_that_needs_the_teachers_weights_is_refused(ran, tmp_path):
    words = [*WORDS, "methods=[pd]", f'student.architecture="{ran.file}"', f'results_dir="{tmp_path}"']
    words = [word for word in words if "direct" not in word]
    with pytest.raises(
        UserError,
        match=r"the student of pd starts from the teacher's weights.* work from random weights: cm, ct, direct",
    ):
        plan(compose_runs(words, ran.registry), ran.registry)


def test_adapters_are_refused_where_networks_are_sharded():
    words = [*WORDS, "student.lora_rank=2", "compute.shard=true"]
    with pytest.raises(UserError, match=r"student\.lora_rank=2 does not go with compute\.shard=true"):
        compose_runs(words, load_registry())
