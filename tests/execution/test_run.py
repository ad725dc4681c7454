"""Whole small runs: what they write, reuse, repair and report."""

import dataclasses
import io
import json
import os
import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from distillbench import Method, MethodConfig, option
from distillbench.cli import commands
from distillbench.evaluation.evaluator import Evaluator
from distillbench.execution.run import run
from distillbench.records.records import signed
from distillbench.registry import Entry, Plugin, load_registry
from distillbench.runs import cell as cell_module
from distillbench.runs.cell import AS_IS, Policy
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.storage.files import key_of, sha256_file
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted

COLUMNS = """
dataset teacher guidance method training_seed sampling_seed nfe images budget protocol status reason note
fd_efficientnet_lite0 teacher_rmse
train_images train_teacher_nfe train_student_nfe train_tflops
train_seconds train_teacher_seconds train_student_seconds train_compile_seconds train_other_seconds
train_joules train_peak_gpu_mib train_peak_gpu_reserved_mib train_peak_device_mib
train_peak_rss_mib clipped_steps nonfinite_steps machine_load_training machine_load_sampling
sample_gflops sample_latency_p50_ms sample_latency_p95_ms sample_images_per_second sample_best_batch
sample_decoder_latency_ms sample_text_encoder_latency_ms sample_peak_gpu_mib sample_peak_gpu_reserved_mib
sample_peak_device_mib sample_peak_rss_mib parameters trained_parameters student_lora_rank student_architecture
inputs settings tuning tuning_trials tuning_images tuning_seconds tuning_joules tuning_sampling_nfe
compute reference device key
"""
SCORES = ["fd_efficientnet_lite0", "teacher_rmse"]
BUDGET = 400  # not a multiple of the batch
SMALL = [
    "experiment=smoke",
    f"budget.images={BUDGET}",
    "batch_size=64",
    "evaluation.images=24",
    "evaluation.batch_size=16",
    "evaluation.timing_seconds=0.001",
    "evaluation.timing=inline",
    "evaluation.teacher_steps=[1,4]",
    "device=cpu",
]
SMALLER = [*SMALL, "dataset=digits", "evaluation.metrics=[teacher_rmse]", "run_name=here"]
TEACHER = ["teacher.width=16", "teacher.depth=1", "teacher.budget.images=512"]


@dataclasses.dataclass
class Ran:
    """A run in this process: its outcome, the rows as they arrived, its output, and its folder."""

    table: pd.DataFrame
    folder: Path
    failed: list[str]
    grown: pd.DataFrame
    said: str
    results: Path

    def row(self, method, nfe=1, seed=0):
        rows = self.table[(self.table["method"] == method) & (self.table["nfe"] == nfe)]
        (row,) = rows[rows["training_seed"] == seed].to_dict("records")
        return row

    def cell(self, method, seed=0):
        """The folder of a cell's records."""
        for file in self.results.glob("cells/*/train.json"):
            inputs = json.loads(file.read_bytes())["inputs"]
            if (inputs["method"]["name"], inputs["seed"]) == (method, seed):
                return file.parent
        raise LookupError(method)


def go(results, *words, registry=None, policy=AS_IS):
    registry = registry or load_registry()
    configs = compose_runs([*words, f'results_dir="{results}"'], registry)
    log, grown = io.StringIO(), []
    outcome = run(plan(configs, registry), configs, Progress(Console(file=log, width=300)), grown.append, policy)
    return Ran(outcome.table, outcome.folder, outcome.failed, pd.concat(grown), log.getvalue(), results)


def state(folder):
    """Every file below `folder` with its content and modification time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (sha256_file(path), path.stat().st_mtime_ns) for path in files}


def scores(table):
    return table[["method", "training_seed", "nfe", "status", *[name for name in SCORES if name in table]]]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of a dozen images."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def words(images):
    methods = ["methods=[boot,cm,pd,direct]", "seed=0,1"]
    return [
        *methods,
        "dataset=folder",
        f"dataset.path={images}",
        "dataset.resolution=8",
        "dataset.channels=1",
        *SMALL,
        *TEACHER,
    ]


@pytest.fixture(scope="module")
def first(words, tmp_path_factory):
    """All methods on the folder of images, two seeds."""
    return go(tmp_path_factory.mktemp("run") / "a new" / "folder", *words)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One method on digits, one score: the quickest run."""
    return go(tmp_path_factory.mktemp("small"), "methods=[boot]", *SMALLER)


@pytest.fixture
def copied(small, tmp_path):
    """A copy of `small`, to be changed."""
    shutil.copytree(small.results, tmp_path / "results")
    return dataclasses.replace(small, results=tmp_path / "results")


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_columns_have_a_fixed_order(first):
    assert list(first.table.columns) == COLUMNS.split()


def test_there_is_one_row_for_each_dataset_teacher_method_seed_and_nfe(first):
    names = ["dataset", "teacher", "method", "training_seed", "nfe"]
    rows = {tuple(row) for row in first.table[names[2:]].fillna(-1).itertuples(index=False)}
    expected = {("teacher:ddim", -1, 1), ("teacher:ddim", -1, 4)}
    expected |= {
        (m, s, n)
        for m, many in [("boot", [1]), ("cm", [1, 2, 4]), ("pd", [1, 2, 4]), ("direct", [1])]
        for s in (0, 1)
        for n in many
    }
    assert rows == expected
    assert not first.table.duplicated(names).any()
    assert (first.table["dataset"] == "folder").all()
    inputs = dict(zip(first.table["method"], first.table["inputs"], strict=True))
    assert inputs == {"teacher:ddim": "", "boot": "noise", "cm": "data", "pd": "data", "direct": "pairs"}
    assert first.table["teacher"].nunique() == 1


def test_all_rows_are_ok_and_empty_values_have_reasons(first):
    assert first.failed == []
    assert (first.table["status"] == "ok").all()
    assert first.table["sample_peak_gpu_mib"].isna().all()
    assert first.table["reason"].str.contains("sample_peak_gpu_mib.* empty: no GPU in use").all()
    full = ["fd_efficientnet_lite0", "sample_latency_p50_ms", "sample_latency_p95_ms", "sample_images_per_second"]
    full += ["sample_best_batch", "sample_gflops", "sample_peak_rss_mib", "images", "protocol"]
    full += ["parameters", "device", "key", "reference"]
    assert first.table[full].notna().all(axis=None)
    assert (first.table["device"].str.startswith("cpu (")).all()


def test_the_teacher_with_most_steps_is_the_reference(first):
    teacher = first.table[first.table["method"] == "teacher:ddim"].set_index("nfe")
    assert teacher.loc[4, "teacher_rmse"] == 0
    assert teacher.loc[1, "teacher_rmse"] > 0
    assert teacher.filter(like="train_").isna().all(axis=None)


def test_every_method_trained_on_the_same_number_of_images(first):
    students = first.table[first.table["training_seed"].notna()]
    assert (students["train_images"] == BUDGET).all()
    positive = ["train_seconds", "train_teacher_nfe", "train_student_nfe", "train_peak_rss_mib", "train_tflops"]
    assert (students[positive] > 0).all(axis=None)
    parts = students[["train_teacher_seconds", "train_student_seconds", "train_other_seconds"]]
    assert (parts > 0).all(axis=None)
    assert np.allclose(parts.sum(axis=1).astype(float), students["train_seconds"].astype(float), rtol=1e-9)


def test_the_plan_estimated_the_exact_cost(first, words):
    registry = load_registry()
    cells = plan(compose_runs([*words, f'results_dir="{first.results}"'], registry), registry)
    for cell in (cell for cell in cells if cell.entry is not None):
        row = first.row(cell.name, cell.nfe[0], cell.seed)
        assert cell.cost.images == row["train_images"]
        assert cell.cost.teacher_nfe == pytest.approx(row["train_teacher_nfe"], rel=0.02)
        assert cell.cost.student_nfe == pytest.approx(row["train_student_nfe"], rel=0.02)


def test_rows_arrive_one_by_one(first):
    pd.testing.assert_frame_equal(first.grown.reset_index(drop=True), first.table)


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_folder_has_the_files_that_the_readme_lists(first):
    names = {path.name for path in first.folder.iterdir()}
    tables = {f"{name}.{kind}" for name in ("table", "summary") for kind in ("csv", "parquet")}
    texts = {"columns.json", "config.yaml", "command.txt", "environment.json"}
    assert names == tables | texts | {"samples.png", "samples", "weights", "influences"}
    assert first.folder.parent == first.results


def test_csv_and_parquet_are_the_table(first):
    pd.testing.assert_frame_equal(pd.read_parquet(first.folder / "table.parquet"), first.table)
    types = first.table.dtypes.to_dict()
    empty = {name: [""] for name, kind in types.items() if str(kind) != "string"}
    csv = pd.read_csv(first.folder / "table.csv", dtype=types, keep_default_na=False, na_values=empty)
    pd.testing.assert_frame_equal(csv, first.table)


def test_the_picture_has_a_line_for_every_row(first):
    with Image.open(first.folder / "samples.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert len(pixels) == 4 + len(first.table) * (48 + 4)
    assert pixels.std() > 10


def test_the_weights_are_those_of_the_records(first):
    files = sorted((first.folder / "weights").iterdir())
    assert len(files) == 8
    for method in ("boot", "cm", "pd", "direct"):
        for seed in (0, 1):
            record = json.loads((first.cell(method, seed) / "train.json").read_bytes())
            (file,) = [path for path in files if path.name == f"{method}-seed{seed}-{record['key']}.safetensors"]
            assert sha256_file(file) == record["weights_sha256"]
            tensors = load_file(file)
            assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
            assert not [name for name in tensors if name.startswith("teacher")]


def test_keys_are_the_hashes_of_the_inputs_in_the_records(first):
    records = [*first.results.glob("cells/*/train.json"), *first.results.glob("cells/*/evaluation-*.json")]
    assert len(records) == 8 + 9
    for path in records:
        record = json.loads(path.read_bytes())
        assert key_of(record["inputs"]) == record["key"]
        assert record["key"] == (path.parent.name if path.stem == "train" else path.stem.removeprefix("evaluation-"))
    evaluations = {json.loads(path.read_bytes())["key"] for path in records if path.stem != "train"}
    assert set(first.table["key"]) == evaluations


def test_the_inputs_are_everything_that_decides_a_training(first):
    inputs = json.loads((first.cell("boot", 1) / "train.json").read_bytes())["inputs"]
    assert inputs["seed"] == 1
    assert inputs["budget"] == {"limit": "images", "amount": BUDGET}
    assert inputs["batch_size"] == 64
    assert inputs["config"]["lr"] == first_config(first)["methods"]["boot"]["lr"]
    assert {"name", "distribution", "version", "source_sha256"} <= set(inputs["method"])
    assert len(inputs["teacher_sha256"]) == len(inputs["dataset_sha256"]) == 64
    assert {"protocol", "distillbench", "dataset", "teacher", "device", "threads"} <= set(inputs)


def first_config(ran):
    return next(iter(yaml.safe_load_all((ran.folder / "config.yaml").read_text())))


def test_the_resolved_settings_are_next_to_the_table(first, images):
    runs = list(yaml.safe_load_all((first.folder / "config.yaml").read_text()))
    assert [run["seed"] for run in runs] == [0, 1]
    assert list(runs[0]["methods"]) == ["boot", "cm", "pd", "direct"]
    assert runs[0]["dataset"]["path"] == str(images)
    assert runs[0]["budget"]["images"] == BUDGET


def test_the_environment_is_next_to_the_table_without_names_or_paths(first):
    text = (first.folder / "environment.json").read_text()
    environment = json.loads(text)
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert {"python", "git", "cpu", "cpu_cores", "memory_mib", "gpu", "threads"} <= set(environment)
    for private in (platform.node(), str(Path.home()), os.getcwd()):
        assert private not in text


# --- again -----------------------------------------------------------------------------------------------------------


def refuse_work(monkeypatch):
    """Make training and sampling raise."""

    def refuse(*arguments, **more):
        raise AssertionError("a finished cell is run again")

    for name in (
        "distillbench.runs.cell_training.train",
        "distillbench.builtin.trained.train",
        "distillbench.runs.shared_context.Evaluator",
        "distillbench.runs.cell.measure",
    ):
        monkeypatch.setattr(name, refuse)


def test_the_same_command_again_finds_all_results(first, words, monkeypatch):
    assert first.said.count("training the teacher") == 1
    before = state(first.results / "cells"), state(first.results / "cache")
    refuse_work(monkeypatch)
    again = go(first.results, *words)
    assert (state(first.results / "cells"), state(first.results / "cache")) == before
    assert again.folder == first.folder
    pd.testing.assert_frame_equal(again.table, first.table)
    assert "training the teacher" not in again.said


def test_a_part_of_a_run_is_found(first, words, monkeypatch):
    refuse_work(monkeypatch)
    part = go(first.results, *words, "methods=[cm]", "seed=1")
    assert part.folder != first.folder
    assert part.row("cm", 2, 1) == first.row("cm", 2, 1)
    assert set(part.table["method"]) == {"teacher:ddim", "cm"}


@pytest.mark.parametrize("word", ["methods.boot.lr=0.5", "budget.images=300", "batch_size=32", "seed=5"])
def test_other_settings_are_another_training(copied, word, monkeypatch):
    refuse_work(monkeypatch)
    another = go(copied.results, "methods=[boot]", *SMALLER, word)
    assert another.failed == [f"boot (seed {5 if word == 'seed=5' else 0})"]
    assert "AssertionError: a finished cell is run again" in another.said


def test_two_runs_with_the_same_seed_are_equal(small, tmp_path):
    """Scores, weights and samples are equal to the bit in new folders."""
    other = go(tmp_path, "methods=[boot]", *SMALLER)
    pd.testing.assert_frame_equal(scores(other.table), scores(small.table))
    hashes = [json.loads((ran.cell("boot") / "train.json").read_bytes())["weights_sha256"] for ran in (other, small)]
    assert hashes[0] == hashes[1]
    assert (other.folder / "samples.png").read_bytes() == (small.folder / "samples.png").read_bytes()


def test_another_seed_gives_another_student(first):
    assert first.row("boot", seed=0)["teacher_rmse"] != first.row("boot", seed=1)["teacher_rmse"]


def test_scores_do_not_depend_on_the_batch_of_evaluation(small, tmp_path):
    other = go(tmp_path, "methods=[boot]", *SMALLER, "evaluation.batch_size=7")
    assert scores(other.table)["teacher_rmse"].to_list() == pytest.approx(
        scores(small.table)["teacher_rmse"].to_list(), rel=1e-5
    )


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **fields):
    path.write_text(json.dumps(signed(json.loads(path.read_bytes()) | fields)))


def flip(path):
    """Change a digit of a number."""
    text = path.read_text()
    at = re.search(r"\d\.\d+", text).start() + 2
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


DAMAGE = {
    "the record of training is cut": ("train.json", cut, "train.json is damaged"),
    "a digit of a score is another": ("evaluation-*.json", flip, ".json is damaged"),
    "the record of training is of other inputs": (
        "train.json",
        lambda p: edit(p, inputs={}),
        "train.json has other inputs",
    ),
    "the weights are cut": ("student.safetensors", cut, "weights of the record are missing or damaged"),
    "the weights are missing": ("student.safetensors", Path.unlink, "weights of the record are missing or damaged"),
    "the record of evaluation is cut": ("evaluation-*.json", cut, ".json is damaged"),
    "the record of evaluation is of an old schema": (
        "evaluation-*.json",
        lambda p: edit(p, extra=1),
        ".json is damaged",
    ),
    "the samples are cut": ("evaluation-*.safetensors", cut, ""),
    "the samples are missing": ("evaluation-*.safetensors", Path.unlink, ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_reported_and_made_again(small, copied, damage):
    pattern, harm, message = DAMAGE[damage]
    (path,) = copied.cell("boot").glob(pattern)
    harm(path)
    mended = go(copied.results, "methods=[boot]", *SMALLER)
    assert message in mended.said
    pd.testing.assert_frame_equal(scores(mended.table), scores(small.table))
    files = [sorted(path.name for path in ran.cell("boot").iterdir()) for ran in (copied, small)]
    assert files[0] == files[1]


def test_after_a_repair_nothing_is_left_to_do(copied, monkeypatch):
    cut(copied.cell("boot") / "train.json")
    mended = go(copied.results, "methods=[boot]", *SMALLER)
    refuse_work(monkeypatch)
    pd.testing.assert_frame_equal(go(copied.results, "methods=[boot]", *SMALLER).table, mended.table)


# --- failures --------------------------------------------------------------------------------------------------------


class Stranger(Method):
    """A correct method, except for the fault in its settings."""

    paper, needs_data = "none", False
    Config = MethodConfig

    def train_step(self, batch):
        eps = batch.noise()
        yield self.student, (self.student(eps, self.at_T(eps)) - eps).square().mean()

    def at_T(self, eps):
        return torch.full((len(eps), 1, 1, 1), self.teacher.schedule.t_max, dtype=torch.float64)

    def supports(self, nfe):
        return nfe <= 2

    def sample(self, noise, nfe, c):
        x_0 = self.student(noise(0), self.at_T(noise(0)))
        return x_0 if nfe == 1 else self.student(noise(1), self.at_T(noise(1)))


class Raises(Stranger):
    name = "raises"

    def train_step(self, batch):
        if batch.size > 32:  # a plan tries a few images
            raise ValueError("no luck\nin two lines")
        yield from super().train_step(batch)


class RaisesAtOnce(Stranger):
    name = "raises_at_once"

    def train_step(self, batch):
        raise ValueError("no luck at all")
        yield


class CannotBeMade(Stranger):
    name = "cannot_be_made"

    def __init__(self, config, teacher):
        raise ZeroDivisionError("not even made")


class BecomesNan(Stranger):
    name = "becomes_nan"

    def train_step(self, batch):
        for network, loss in super().train_step(batch):
            yield network, loss * (float("nan") if batch.size > 32 else 1.0)


class SamplesNan(Stranger):
    name = "samples_nan"

    def sample(self, noise, nfe, c):
        return super().sample(noise, nfe, c) * (float("nan") if nfe == 2 else 1.0)


class SamplesNothing(Stranger):
    name = "samples_nothing"

    def sample(self, noise, nfe, c):
        return super().sample(noise, nfe, c)[:, :, :4] if nfe == 2 else super().sample(noise, nfe, c)


class CountsWrong(Stranger):
    name = "counts_wrong"

    def sample(self, noise, nfe, c):
        return super().sample(noise, 1, c)


class Peeks(Stranger):
    name = "peeks"

    def train_step(self, batch):
        yield self.student, (self.student(batch.noise(), self.at_T(batch.x_0)) - batch.x_0).square().mean()


STRANGERS = [Raises, BecomesNan, SamplesNan, SamplesNothing, CountsWrong]


def with_strangers(*classes):
    registry = load_registry()
    entries = {cls.name: Entry(cls, Plugin(cls.name, "stranger", "1.0")) for cls in classes}
    return dataclasses.replace(registry, methods=registry.methods | entries)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Methods that fail in every way, and a last one that works."""
    names = ",".join(cls.name for cls in STRANGERS)
    results = tmp_path_factory.mktemp("strange")
    return go(results, f"methods=[{names},boot]", *SMALLER, registry=with_strangers(*STRANGERS))


@pytest.mark.parametrize(
    ("method", "nfe", "status", "reason"),
    [
        ("raises", 1, "failed", "ValueError: no luck"),
        ("raises", 2, "failed", "ValueError: no luck"),
        ("becomes_nan", 1, "diverged", "the loss is nan after "),
        ("becomes_nan", 2, "diverged", "the loss is nan after "),
        ("samples_nan", 1, "ok", ""),
        ("samples_nan", 2, "diverged", "samples with 2 evaluations are not finite"),
        ("samples_nothing", 1, "ok", ""),
        ("samples_nothing", 2, "failed", "RuntimeError: samples must have shape (16, 1, 8, 8), got (16, 1, 4, 8)"),
        ("counts_wrong", 1, "ok", ""),
        ("counts_wrong", 2, "failed", "RuntimeError: requested 2 evaluations per image, counted 1"),
        ("boot", 1, "ok", ""),
    ],
)
def test_failed_cells_have_a_status_and_reason_and_the_others_finish(strange, method, nfe, status, reason):
    row = strange.row(method, nfe)
    assert row["status"] == status
    assert row["reason"].startswith(reason)
    assert "\n" not in row["reason"]
    assert pd.isna(row["teacher_rmse"]) == (status != "ok")


def test_the_run_says_which_cells_are_not_ok(strange):
    assert strange.failed == [f"{cls.name} (seed 0)" for cls in STRANGERS]


def test_a_failed_training_has_no_cost_and_no_weights(strange):
    for method in ("raises", "becomes_nan"):
        row = strange.row(method)
        assert pd.isna(row["train_images"])
        assert not (strange.cell(method) / "student.safetensors").exists()
    names = {path.name.split("-")[0] for path in (strange.folder / "weights").iterdir()}
    assert names == {"samples_nan", "samples_nothing", "counts_wrong", "boot"}


def test_the_traceback_is_next_to_the_record(strange):
    text = (strange.cell("raises") / "error.txt").read_text()
    assert text.startswith("Traceback")
    assert "no luck\nin two lines" in text
    assert str(strange.cell("raises") / "error.txt") in strange.said


def test_the_picture_shows_the_rows_that_are_ok(strange):
    with Image.open(strange.folder / "samples.png") as picture:
        assert picture.height == 4 + (strange.table["status"] == "ok").sum() * (48 + 4)


@pytest.mark.slow
def test_retry_failed_runs_failed_cells_and_force_runs_all(tmp_path):
    words = ["methods=[raises,becomes_nan]", *SMALLER]
    first = go(tmp_path, *words, registry=with_strangers(Raises, BecomesNan))
    (error,) = tmp_path.glob("cells/*/error.txt")
    mended = type("Mended", (Stranger,), {"name": "raises", "__module__": __name__})  # the same file, so the same key
    calm = type("Calm", (Stranger,), {"name": "becomes_nan", "__module__": __name__})
    again = go(tmp_path, *words, registry=with_strangers(mended, calm))
    assert "not ok in an earlier run: raises (seed 0), becomes_nan (seed 0) (--retry-failed" in again.said
    pd.testing.assert_frame_equal(again.table, first.table)
    later = go(tmp_path, *words, registry=with_strangers(mended, calm), policy=Policy(retry_failed=True))
    assert (later.row("raises")["status"], later.failed) == ("ok", ["becomes_nan (seed 0)"])
    assert not error.exists()
    forced = go(tmp_path, *words, registry=with_strangers(mended, calm), policy=Policy(force=True))
    assert (forced.row("becomes_nan")["status"], forced.failed) == ("ok", [])


class Sampled(Stranger):
    """Has a setting of sampling, so that cells share a training."""

    name = "sampled"

    @dataclasses.dataclass
    class Config(MethodConfig):
        shift: float = option(0.0, "added to samples", sampling=True)

    def sample(self, noise, nfe, c):
        return super().sample(noise, nfe, c) + self.config.shift


@pytest.mark.nightly
def test_force_trains_once_for_cells_that_share_a_training(tmp_path, monkeypatch):
    words, trained = ["methods=[sampled]", "methods.sampled.shift=0,0.1", *SMALLER], []
    registry, train_cell = with_strangers(Sampled), cell_module.train_cell
    go(tmp_path, *words, registry=registry)
    (record,) = tmp_path.glob("cells/*/train.json")
    before = record.read_bytes()
    monkeypatch.setattr(cell_module, "train_cell", lambda *given: trained.append(1) or train_cell(*given))
    forced = go(tmp_path, *words, registry=registry, policy=Policy(force=True))
    assert len(trained) == 1 and not forced.failed and record.read_bytes() != before
    assert forced.table.loc[forced.table["method"] == "sampled", "key"].nunique() == 2
    go(tmp_path, *words, registry=registry, policy=Policy(force=True))
    assert len(trained) == 2  # once each time


@pytest.mark.nightly
@pytest.mark.parametrize("row", range(5))
def test_an_interruption_within_scoring_loses_the_row_in_progress_alone(tmp_path, monkeypatch, row):
    """And the table is that of a run without one, to the last digit."""
    words = ["methods=[boot]", *SMALLER, *TEACHER, "evaluation.seeds=[0,1]", "evaluation.timing=off"]
    words += ["evaluation.checkpoints=1"]
    measure, labels = Evaluator.measure, []

    def interrupted(self, sampler, nfe, seed, keeps_noise, label, order=None):
        labels.append((label, nfe, seed))
        if len(labels) == 3 + row:
            raise Interrupted("SIGTERM")
        return measure(self, sampler, nfe, seed, keeps_noise, label, order)

    whole = go(tmp_path / "whole", *words)
    monkeypatch.setattr(Evaluator, "measure", interrupted)
    with pytest.raises(Interrupted):
        go(tmp_path / "cut", *words)
    again = go(tmp_path / "cut", *words)
    (twice,) = {one for one in labels if labels.count(one) > 1}
    assert labels.count(twice) == 2 and twice == labels[2 + row]
    pd.testing.assert_frame_equal(scores(again.table), scores(whole.table))
    assert (again.folder / "samples.png").read_bytes() == (whole.folder / "samples.png").read_bytes()
    assert not list((tmp_path / "cut" / "cells").glob("*/rows-*"))


def test_fail_fast_skips_later_cells(tmp_path):
    words = ["methods=[raises,boot]", *SMALLER]
    ran = go(tmp_path, *words, registry=with_strangers(Raises), policy=Policy(fail_fast=True))
    assert ran.row("boot")["status"] == "skipped"
    assert ran.row("boot")["reason"] == "--fail-fast, and an earlier cell is not ok"
    assert ran.failed == ["raises (seed 0)", "boot (seed 0)"]
    whole = go(tmp_path, *words, registry=with_strangers(Raises))
    assert whole.failed == ["raises (seed 0)"]


class NeedsMuch(Stranger):
    """Has memory for ten images."""

    name = "needs_much"

    def train_step(self, batch):
        if batch.size > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")
        yield from super().train_step(batch)


def test_out_of_memory_has_a_status_or_splits_the_steps(tmp_path):
    words = ["methods=[needs_much]", *SMALLER]
    failed = go(tmp_path, *words, registry=with_strangers(NeedsMuch)).row("needs_much")
    assert failed["status"] == "oom" and "Tried to allocate 1 PiB" in failed["reason"]
    ran = go(tmp_path, *words, "on_oom=accumulate", registry=with_strangers(NeedsMuch))
    row = ran.row("needs_much")
    assert (row["status"], row["settings"]) == ("ok", "microbatch=8 (memory ran out with more)")
    assert row["train_images"] == BUDGET
    assert ran.said.count("memory ran out; training starts again") == 3
    asked = go(tmp_path, *words, "microbatch=8", registry=with_strangers(NeedsMuch)).row("needs_much")
    assert (asked["status"], asked["settings"]) == ("ok", "microbatch=8")
    assert asked["teacher_rmse"] == row["teacher_rmse"]


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (RaisesAtOnce, "ValueError: no luck at all"),
        pytest.param(CannotBeMade, "ZeroDivisionError: not even made", marks=pytest.mark.nightly),
        (Peeks, "RuntimeError: the method declares that it reads no data (needs_data) but asks for real images"),
    ],
)
def test_a_method_that_fails_in_the_plan_fails_alone(tmp_path, cls, reason):
    """An error of a third-party method in the plan is reported in its row."""
    ran = go(tmp_path, f"methods=[{cls.name},boot]", *SMALLER, registry=with_strangers(cls))
    row = ran.row(cls.name)
    assert (row["status"], row["reason"][: len(reason)]) == ("failed", reason)
    assert ran.row("boot")["status"] == "ok"


def test_a_dry_run_says_what_would_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distillbench.registry.load_registry", lambda *selected: with_strangers(RaisesAtOnce))
    with pytest.raises(SystemExit) as done:
        commands.main(
            [
                "run",
                "methods=[raises_at_once,boot]",
                *SMALLER,
                f"results_dir={tmp_path}",
                "estimate_seconds=0",
                "--dry-run",
            ]
        )
    out, err = capsys.readouterr()
    assert (done.value.code, err) == (1, "")
    assert "raises_at_once (seed 0) would fail: ValueError: no luck at all\n" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("methods", "code"), [("boot", 0), ("boot,becomes_nan", 1), pytest.param("raises", 1, marks=pytest.mark.nightly)]
)
def test_the_exit_code_says_whether_something_failed(tmp_path, monkeypatch, capsys, methods, code):
    monkeypatch.setattr("distillbench.registry.load_registry", lambda *selected: with_strangers(Raises, BecomesNan))
    monkeypatch.setenv("COLUMNS", "80")
    try:
        commands.main(["run", f"methods=[{methods}]", *SMALLER, f"results_dir={tmp_path}"])
        done = 0
    except SystemExit as stopped:
        done = stopped.code
    out, err = capsys.readouterr()
    assert (done, err) == (code, "")
    assert ("not ok: " in out) == (code == 1)
    assert "becomes nan, seed 0, 1 NFE, noise 0: diverged: the loss is nan" in out or "becomes_nan" not in methods
    assert max(map(len, table_of(out))) <= 80


def table_of(out):
    lines = out.splitlines()
    rule = next(index for index, line in enumerate(lines) if line.startswith("───"))
    return lines[rule - 3 : rule + 3]


# --- teachers --------------------------------------------------------------------------------------------------------


def test_a_teacher_is_trained_once_and_found_by_its_recipe(first, words, tmp_path):
    (file,) = (first.results / "cache" / "teachers").iterdir()
    assert first.table["teacher"].iloc[0].startswith("trained-")
    copied = tmp_path / "cache" / "teachers"
    copied.mkdir(parents=True)
    shutil.copy(file, copied)
    quick = [*words, "methods=[boot]", "seed=0", "evaluation.metrics=[teacher_rmse]"]
    found = go(tmp_path, *quick)
    assert "training the teacher" not in found.said
    assert found.table["teacher"].iloc[0] == first.table["teacher"].iloc[0]
    assert found.row("boot")["teacher_rmse"] == first.row("boot")["teacher_rmse"]


def test_other_data_or_another_recipe_is_another_teacher(first, words):
    registry = load_registry()
    for word in ("dataset.resolution=4", "teacher.seed=1", "teacher.width=24", "teacher.budget.images=600"):
        configs = compose_runs([*words, f'results_dir="{first.results}"', word], registry)
        assert plan(configs, registry)[0].shared.source.plan().origin == "to be trained"


def test_a_given_teacher_file_is_used_with_any_recipe(first, words, tmp_path):
    (file,) = (first.results / "cache" / "teachers").iterdir()
    shutil.copy(file, tmp_path / "mine.safetensors")
    quick = [*words, "methods=[boot]", "seed=0", "evaluation.metrics=[teacher_rmse]", "teacher.width=0"]
    ran = go(tmp_path / "results", *quick, f"teacher.path={tmp_path / 'mine.safetensors'}")
    assert ran.row("boot")["teacher_rmse"] == first.row("boot")["teacher_rmse"]
    assert not (tmp_path / "results" / "cache" / "teachers").exists()


def test_a_damaged_teacher_in_the_cache_is_made_again(first, words, tmp_path):
    shutil.copytree(first.results / "cache", tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "teachers").iterdir()
    cut(file)
    ran = go(tmp_path, *words, "methods=[boot]", "seed=0", "evaluation.metrics=[teacher_rmse]")
    assert "training the teacher" in ran.said
    assert ran.row("boot")["teacher_rmse"] == first.row("boot")["teacher_rmse"]


# --- grids -----------------------------------------------------------------------------------------------------------


def test_a_grid_over_datasets_is_one_table(images, tmp_path):
    """Rows and pictures of both datasets, although their images differ in size."""
    data = ["dataset=folder", f"dataset.path={images}", "dataset.resolution=8,4", "dataset.channels=1"]
    ran = go(tmp_path, "methods=[boot]", *data, *SMALL, *TEACHER, "evaluation.metrics=[teacher_rmse]")
    assert len(ran.table) == 2 * 3
    assert ran.table["teacher"].nunique() == 2
    assert (ran.table["status"] == "ok").all()


def test_one_setting_of_a_method_can_be_swept(copied):
    ran = go(copied.results, "methods=[boot]", *SMALLER, "methods.boot.lr=1e-3,4e-3")
    boot = ran.table[ran.table["method"] == "boot"]
    assert boot["settings"].to_list() == ["lr=0.001", "lr=0.004"]
    assert boot["key"].nunique() == 2
    assert len(list((ran.folder / "weights").glob("boot-seed0-*"))) == 2 + 1  # and that of the run before


def test_results_that_two_grid_points_share_are_made_once(copied, monkeypatch):
    ran = go(copied.results, "methods=[boot],[boot,direct]", *SMALLER, "seed=0,1")
    assert ran.table["method"].value_counts().to_dict() == {"teacher:ddim": 2, "boot": 2, "direct": 2}


def test_rows_have_a_note_if_heun_is_unstable(tmp_path):
    """The teacher's rows, and those that are compared with its samples."""
    words = ["methods=[boot]", *SMALLER, *TEACHER, "evaluation.timing=off", "budget.images=64"]
    ran = go(tmp_path, *words, "evaluation.teacher_samplers=[heun]", "evaluation.teacher_steps=[1,4]")
    notes = {(row["method"], row["nfe"]): row["note"] for row in ran.table.to_dict("records")}
    unstable = "heun is unstable in 4 steps: in one of them the second slope has weight 117"
    assert notes["teacher:heun", 7].startswith(unstable)
    assert notes["teacher:heun", 1] == notes["boot", 1]
    assert notes["boot", 1].startswith(f"compared with the teacher's answers by {unstable}")


def test_rows_that_were_found_can_be_left_out_and_names_for_people_are_kept(copied):
    registry = load_registry()
    configs = compose_runs(["methods=[boot]", *SMALLER, f'results_dir="{copied.results}"'], registry)
    log, shown = io.StringIO(), []
    progress = Progress(Console(file=log, width=300))
    outcome = run(plan(configs, registry), configs, progress, shown.append, show_found=False)
    assert not shown and len(outcome.table) == len(copied.table)
    assert f"2 of 2 cells found in {copied.results / 'cells'}, nothing is trained or sampled" in log.getvalue()
    declared = json.loads((outcome.folder / "columns.json").read_text())
    assert declared["teacher_rmse"]["label"] == "RMSE to teacher"
    assert {name: one["label"] for name, one in declared["method"].items()} == {
        "teacher:ddim": "teacher, DDIM",
        "boot": "BOOT",
    }
