"""The straight line: settings -> plan of cells -> teacher -> method -> train -> sample -> measure -> rows -> table.

A cell is one training of one method (or the teacher itself) and its evaluation. It has a key made from all that decides
its numbers; a cell whose record is there is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import distillbench
from distillbench.budget import Meter, Price
from distillbench.config import RunConfig, to_yaml
from distillbench.datasets import Dataset
from distillbench.environment import device_name, environment
from distillbench.errors import DivergedError, UserError
from distillbench.evaluate import Evaluator, Sampler, teacher_sampler
from distillbench.files import key_of, sha256_file, write_atomically
from distillbench.memory import peak_gpu_mib, peak_rss_mib
from distillbench.method import Batch, Method, MethodConfig
from distillbench.pairs import Workspace
from distillbench.progress import Progress
from distillbench.registry import Entry, Registry
from distillbench.results import (
    FINAL,
    CurvePoint,
    EvaluationRecord,
    RowRecord,
    TrainRecord,
    link_or_copy,
    make_table,
    read_record,
    sample_grid,
    stack_shown,
    table_row,
    unstack_shown,
    write_record,
    write_table,
)
from distillbench.teachers import Teacher, TeacherPlan, TeacherSource
from distillbench.train import DataStream, train

TRAIN_PROTOCOL = 1  # raise when the loop, the samplers or the networks change what a training gives
EVALUATION_PROTOCOL = 1  # raise when evaluation changes a number that no metric's protocol names
TEACHER_ROW = "teacher:ddim"


@dataclass
class Scene:
    """What cells share: the settings, the dataset, the family of the teacher, and the teacher once it is needed."""

    config: RunConfig
    registry: Registry
    device: str
    dataset: Dataset
    source: TeacherSource
    teacher: Teacher | None = None
    evaluator: Evaluator | None = None

    def loaded(self, progress: Progress) -> Teacher:
        if self.teacher is None:
            self.teacher = self.source.load(progress)
            if tuple(self.teacher.shape) != tuple(self.dataset.shape):
                raise UserError(
                    f"the teacher does not fit the dataset: it makes images of (C,H,W) = {tuple(self.teacher.shape)}, "
                    f"the dataset's are {tuple(self.dataset.shape)}"
                )
        return self.teacher

    def evaluation(self, progress: Progress) -> Evaluator:
        if self.evaluator is None:
            teacher = self.loaded(progress)
            parts = self.config.evaluation, self.dataset, teacher, self.registry, self.device, progress
            self.evaluator = Evaluator(*parts)
        return self.evaluator


@dataclass
class Cell:
    """One method with its settings and a seed, or the teacher itself (`entry` None)."""

    scene: Scene
    name: str
    entry: Entry | None = None
    method_config: MethodConfig | None = None
    seed: int | None = None
    price: Price = field(default_factory=Price)  # foreseen
    nfe: list[int] = field(default_factory=list)  # of its rows

    @property
    def label(self) -> str:
        return self.name if self.seed is None else f"{self.name} (seed {self.seed})"


@dataclass
class Finished:
    """A cell's records, made now or found."""

    cell: Cell
    training: TrainRecord | None
    evaluation: EvaluationRecord
    folder: Path
    shown: list[Tensor]

    @property
    def failed(self) -> bool:
        return any(row.status != "ok" for row in self.evaluation.rows)


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(configs: list[RunConfig], registry: Registry) -> list[Cell]:
    """The cells of all settings, checked as far as can be without training, each with its price. Writes nothing."""
    cells: list[Cell] = []
    scenes: dict[str, Scene] = {}
    seen: set[str] = set()
    for config in configs:
        scene = _scene(config, registry, scenes)
        todo = [Cell(scene, TEACHER_ROW, nfe=sorted(config.evaluation.teacher_nfe))]
        for name, method_config in config.methods.items():
            todo.append(Cell(scene, name, registry.get("methods", method_config.kind), method_config, config.seed))
        for cell in todo:
            identity = key_of([id(cell.scene), cell.name, _plain(cell.method_config), cell.seed])
            if identity not in seen:
                seen.add(identity)
                _foresee(cell)
                cells.append(cell)
    return cells


def _scene(config: RunConfig, registry: Registry, scenes: dict[str, Scene]) -> Scene:
    """The scene of these settings, shared by all that differ in methods and seed only."""
    shared = _plain(config)
    for name in ("methods", "seed"):
        del shared[name]
    identity = key_of(shared)
    if identity not in scenes:
        device = choose_device(config.device)
        torch.set_num_threads(config.threads)
        check_writable(Path(config.results_dir))
        config.evaluation.check_metrics(registry)
        dataset = registry.get("datasets", config.dataset.kind).cls(config.dataset)
        family = registry.get("teachers", config.teacher.kind).cls
        source = family(config.teacher, dataset, Path(config.results_dir) / "cache" / "teachers", device)
        source.plan()
        scenes[identity] = Scene(config, registry, device, dataset, source)
    return scenes[identity]


def _foresee(cell: Cell) -> None:
    """Build the method and let it take one step of two images in each phase: what it counts is the price."""
    if cell.entry is None or cell.method_config is None:
        return
    scene, config = cell.scene, cell.scene.config
    teacher = scene.source.untrained()
    meter = Meter(config.budget, teacher, scene.device)
    method = _build(cell, teacher)
    cell.nfe = [n for n in sorted(config.evaluation.nfe) if method.supports(n)]
    if not cell.nfe:
        raise UserError(f"{cell.name} supports none of evaluation.nfe={config.evaluation.nfe}")
    workspace = Workspace(teacher, meter, Path(), scene.device, 0, Progress(None), dry=True)
    method.prepare(workspace)
    ahead = meter.teacher_nfe
    phases = method.phases()
    per_image = [0.0, 0.0]
    data = DataStream(scene.dataset, 0, scene.device)
    for index, phase in enumerate(phases):
        method.start_phase(index)
        before = meter.teacher_nfe, meter.student_nfe
        for _ in method.train_step(_batch(cell, data)):
            pass
        share = phase.share / sum(p.share for p in phases)
        per_image[0] += share * (meter.teacher_nfe - before[0]) / 2
        per_image[1] += share * (meter.student_nfe - before[1]) / 2
        method.end_phase(index, method.student)
    images = config.budget.images if config.budget.limit == "images" else 0
    if config.budget.limit == "nfe":
        images = int(max(0, config.budget.nfe - ahead) / sum(per_image))
    cell.price = Price(images, 0.0, ahead + round(images * per_image[0]), round(images * per_image[1]))


def _batch(cell: Cell, data: DataStream) -> Batch:
    assert cell.entry is not None
    read = data.read if cell.entry.cls.needs_data else None
    return Batch(2, cell.scene.dataset.shape, torch.Generator().manual_seed(0), cell.scene.device, read)


def _build(cell: Cell, teacher: Teacher) -> Method:
    assert cell.entry is not None
    torch.manual_seed(cell.seed or 0)  # what a method adds to the teacher's network starts from this
    return cell.entry.cls(cell.method_config, teacher).to(cell.scene.device)


def choose_device(name: str) -> str:
    """"auto" becomes cuda where there is one; raises UserError for a device that does not exist here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    if name != "cuda" and not name.startswith("cuda:"):
        raise UserError(f"no device {name!r}. Possible: auto, cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"device={name}: torch finds no CUDA device here. Possible: auto, cpu")
    count = torch.cuda.device_count()
    index = name.removeprefix("cuda").removeprefix(":") or "0"
    if not (index.isdigit() and int(index) < count):
        raise UserError(f"no device {name!r}. Possible: {', '.join(f'cuda:{i}' for i in range(count))}")
    return name


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in `folder`, or in the closest parent that exists. Leaves nothing."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        tempfile.TemporaryFile(dir=parent).close()
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"{parent} is read-only")
    except OSError as error:
        raise UserError(f"results_dir: cannot write to {str(folder)!r}: {error.strerror or error}") from error


# --- one cell --------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, progress: Progress) -> Finished:
    """Train and evaluate `cell`, or read what an earlier run left of it."""
    teacher = cell.scene.loaded(progress)
    inputs = _train_inputs(cell, teacher)
    key = key_of(inputs)
    folder = Path(cell.scene.config.results_dir) / "cells" / key
    training = None
    if cell.entry is not None:
        training = _known(folder / "train.json", TrainRecord, inputs, progress)
        weights = folder / "student.safetensors"
        if training is not None and training.status == "ok" and not _intact(weights, training.weights_sha256):
            progress.say(f"{cell.label}: the weights of the record are missing or damaged; training again")
            training = None
        if training is None or training.status not in FINAL:
            training = _train(cell, teacher, key, inputs, folder, progress)
    return _evaluated(cell, training, key, folder, progress)


def _train_inputs(cell: Cell, teacher: Teacher) -> dict[str, Any]:
    """Everything that decides the weights and the price of a cell, as plain values."""
    config = cell.scene.config
    inputs: dict[str, Any] = {
        "protocol": TRAIN_PROTOCOL,
        "distillbench": distillbench.__version__,
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "dataset": cell.scene.dataset.name,
        "dataset_sha256": cell.scene.dataset.sha256,
        "device": cell.scene.device.split(":")[0],
        "threads": config.threads,
    }
    if cell.entry is None:
        return inputs | {"method": None}
    return inputs | {
        "method": cell.entry.identity(),
        "config": _plain(cell.method_config),
        "budget": {"limit": config.budget.limit.value, "amount": config.budget.amount},
        "batch_size": config.batch_size,
        "seed": cell.seed,
    }


def _evaluation_inputs(cell: Cell, train_key: str) -> dict[str, Any]:
    """Everything else that decides the numbers of a cell's rows."""
    names = cell.scene.config.evaluation.metrics
    protocols = {name: cell.scene.registry.get("metrics", name).cls.protocol for name in names}
    config = _plain(cell.scene.config.evaluation) | {"metrics": protocols, "nfe": cell.nfe}
    reference = max(config.pop("teacher_nfe"))
    return {"protocol": EVALUATION_PROTOCOL, "train_key": train_key, "reference_nfe": reference, **config}


def _known(path: Path, kind: Any, inputs: dict[str, Any], progress: Progress) -> Any:
    try:
        return read_record(path, kind, inputs)
    except ValueError as error:
        progress.say(f"{error}; it is made again")
        return None


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _train(
    cell: Cell, teacher: Teacher, key: str, inputs: dict[str, Any], folder: Path, progress: Progress
) -> TrainRecord:
    scene, config = cell.scene, cell.scene.config
    assert cell.entry is not None and cell.method_config is not None and cell.seed is not None
    about = {"key": key, "inputs": inputs, "device": device_name(scene.device)}
    about["environment"] = environment(scene.device, config.threads)
    cache = Path(config.results_dir) / "cache" / "pairs"
    try:
        label = f"{cell.label}: training"
        with progress.step(label) as step, peak_rss_mib() as rss, peak_gpu_mib(scene.device) as gpu:
            method = _build(cell, teacher)
            meter = Meter(config.budget, teacher, scene.device)
            workspace = Workspace(teacher, meter, cache, scene.device, cell.seed, progress)
            data = DataStream(scene.dataset, cell.seed, scene.device)
            read = data.read if cell.entry.cls.needs_data else None
            trained = train(method, cell.method_config, workspace, read, config.batch_size, step)
    except DivergedError as error:
        return _keep(folder, TrainRecord(**about, status="diverged", reason=str(error)))
    except UserError:
        raise
    except Exception as error:  # a method is a stranger's code; the other cells go on
        return _keep(folder, TrainRecord(**about, status="failed", reason=_reason(error, folder, progress)))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in method.state_dict().items()}
    write_atomically(folder / "student.safetensors", lambda path: save_file(tensors, path))
    return _keep(
        folder,
        TrainRecord(
            **about,
            status="ok",
            **dataclasses.asdict(trained.price),
            peak_gpu_mib=gpu.mib,
            peak_rss_mib=rss.mib,
            parameters=sum(p.numel() for p in method.student.parameters()),
            weights_sha256=sha256_file(folder / "student.safetensors"),
            curve=[CurvePoint(**dataclasses.asdict(point)) for point in trained.curve],
            missing={"peak_gpu_mib": gpu.reason} if gpu.reason else {},
        ),
    )


def _keep(folder: Path, record: TrainRecord) -> TrainRecord:
    write_record(folder / "train.json", record)
    return record


def _reason(error: Exception, folder: Path, progress: Progress) -> str:
    """One line for the row; the traceback goes to a file beside the record."""
    text = traceback.format_exc()
    write_atomically(folder / "error.txt", lambda path: Path(path).write_text(text))
    line = (str(error).strip() or "no message").splitlines()[0]
    progress.say(f"{type(error).__name__}: {line} (traceback in {folder / 'error.txt'})")
    return f"{type(error).__name__}: {line}"


def _evaluated(
    cell: Cell, training: TrainRecord | None, train_key: str, folder: Path, progress: Progress
) -> Finished:
    scene = cell.scene
    inputs = _evaluation_inputs(cell, train_key)
    key = key_of(inputs)
    path = folder / f"evaluation-{key}.json"
    record = _known(path, EvaluationRecord, inputs, progress)
    shown = _read_shown(path.with_suffix(".safetensors"))
    if record is not None and record.status in FINAL and shown is not None:
        return Finished(cell, training, record, folder, shown)
    about = {"key": key, "inputs": inputs, "device": device_name(scene.device)}
    about["environment"] = environment(scene.device, scene.config.threads)
    if training is not None and training.status != "ok":
        rows = [RowRecord(nfe=nfe, status=training.status, reason=training.reason) for nfe in cell.nfe]
        record, shown = EvaluationRecord(**about, rows=rows), []
    else:
        rows, shown = _rows(cell, folder, progress)
        record = EvaluationRecord(**about, rows=rows)
    tensors = stack_shown(shown)
    write_atomically(path.with_suffix(".safetensors"), lambda temporary: save_file(tensors, temporary))
    write_record(path, record)
    return Finished(cell, training, record, folder, shown)


def _read_shown(path: Path) -> list[Tensor] | None:
    try:
        return unstack_shown(load_file(path)) if path.is_file() else None
    except (SafetensorError, KeyError, OSError):
        return None


def _rows(cell: Cell, folder: Path, progress: Progress) -> tuple[list[RowRecord], list[Tensor]]:
    """The rows of a trained student, or of the teacher, and the samples to be shown of those that are ok."""
    teacher = cell.scene.loaded(progress)
    rows, shown = [], []
    try:
        evaluator = cell.scene.evaluation(progress)
        method = _restored(cell, teacher, folder) if cell.entry is not None else None
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, folder, progress)
        return [RowRecord(nfe=nfe, status="failed", reason=reason) for nfe in cell.nfe], []
    for nfe in cell.nfe:
        sampler: Sampler = teacher_sampler(teacher) if method is None else method.sample
        keeps_noise = True if method is None else method.keeps_noise(nfe)
        try:
            measured = evaluator.measure(sampler, nfe, keeps_noise, cell.label)
        except DivergedError as error:
            rows.append(RowRecord(nfe=nfe, status="diverged", reason=str(error)))
        except Exception as error:
            rows.append(RowRecord(nfe=nfe, status="failed", reason=_reason(error, folder, progress)))
        else:
            plain = {f.name: getattr(measured, f.name) for f in dataclasses.fields(measured) if f.name != "shown"}
            rows.append(RowRecord(**plain))
            shown.append(measured.shown)
    return rows, shown


def _restored(cell: Cell, teacher: Teacher, folder: Path) -> Method:
    """The method with the weights that training left, whether that was now or in an earlier run."""
    method = _build(cell, teacher)
    method.load_state_dict(load_file(folder / "student.safetensors", device=cell.scene.device))
    return method.eval()


# --- all cells -------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """A finished run."""

    folder: Path
    table: Any  # pandas.DataFrame
    failed: list[str]  # labels of the cells that are not ok


def run(cells: list[Cell], configs: list[RunConfig], progress: Progress, on_rows) -> Outcome:
    """Run every cell, write the run's folder anew after each, and give each cell's rows to `on_rows` as they come."""
    finished: list[Finished] = []
    metrics = list(dict.fromkeys(name for config in configs for name in config.evaluation.metrics))
    folder = _run_folder(cells, configs[0], progress)
    rows: list[dict[str, Any]] = []
    for cell in cells:
        done = run_cell(cell, progress)
        finished.append(done)
        new = _table_rows(done, metrics)
        rows += new
        on_rows(make_table(new, metrics))
        _write_run(folder, configs, finished, make_table(rows, metrics))
    failed = [done.cell.label for done in finished if done.failed]
    return Outcome(folder, make_table(rows, metrics), failed)


def _table_rows(done: Finished, metrics: list[str]) -> list[dict[str, Any]]:
    cell, teacher = done.cell, done.cell.scene.teacher
    assert teacher is not None
    names = {"dataset": cell.scene.dataset.name, "teacher": teacher.name, "method": cell.name, "seed": cell.seed}
    count = sum(p.numel() for p in teacher.denoiser.parameters())
    parameters = count if done.training is None else done.training.parameters
    key, device = done.evaluation.key, done.evaluation.device
    return [table_row(names, row, done.training, key, device, metrics, parameters) for row in done.evaluation.rows]


def _run_folder(cells: list[Cell], config: RunConfig, progress: Progress) -> Path:
    """The folder of a run: its given name, or one made from what decides the table, so that it is found again."""
    name = config.run_name
    if not name:
        train_keys = [key_of(_train_inputs(cell, cell.scene.loaded(progress))) for cell in cells]
        keys = [key_of(_evaluation_inputs(cell, key)) for cell, key in zip(cells, train_keys, strict=True)]
        name = f"{config.dataset.kind}-{key_of(sorted(keys))[:8]}"
    return Path(config.results_dir) / name


def _write_run(folder: Path, configs: list[RunConfig], finished: list[Finished], table: Any) -> None:
    write_table(table, folder)
    texts = {
        "config.yaml": "---\n".join(to_yaml(config) for config in configs),
        "environment.json": json.dumps(environment(finished[0].cell.scene.device, configs[0].threads), indent=2) + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: Path(path).write_text(text))
    for done in finished:
        if done.training is not None and done.training.status == "ok":
            target = folder / "weights" / f"{done.cell.name}-seed{done.cell.seed}-{done.training.key}.safetensors"
            link_or_copy(done.folder / "student.safetensors", target)
    _write_grids(folder, finished)


def _write_grids(folder: Path, finished: list[Finished]) -> None:
    """samples.png: every row of the table that is ok, from the same noise."""
    lines = []
    for done in finished:
        good = [row for row in done.evaluation.rows if row.status == "ok"]
        for row, images in zip(good, done.shown, strict=True):
            lines.append((f"{done.cell.label}, {row.nfe} NFE", images))
    write_atomically(folder / "samples.png", lambda path: sample_grid(lines).save(path, format="png"))


def _plain(value: Any) -> Any:
    """A settings dataclass as plain values."""
    if value is None:
        return None
    return json.loads(json.dumps(dataclasses.asdict(value)))


def teacher_plan(cells: list[Cell]) -> list[tuple[str, str, TeacherPlan]]:
    """(dataset, teacher, plan) of every scene among the cells."""
    scenes = {id(cell.scene): cell.scene for cell in cells}.values()
    return [(scene.dataset.name, scene.source.name, scene.source.plan()) for scene in scenes]


def train_teacher_of(config: RunConfig, registry: Registry, output: Path | None, progress: Progress) -> Path:
    """Train the teacher of `config` anew; write it to `output`, or to where a run looks for it. Returns the file."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    dataset = registry.get("datasets", config.dataset.kind).cls(config.dataset)
    family = registry.get("teachers", config.teacher.kind).cls
    source = family(config.teacher, dataset, Path(config.results_dir) / "cache" / "teachers", device)
    return source.train(output, progress)
