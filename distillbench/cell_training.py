"""The training of a cell: what is measured round it, what becomes of it when it fails, and its record."""

from __future__ import annotations

import dataclasses
import gc
import traceback
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distillbench.budget import Meter, Price
from distillbench.compute import applied
from distillbench.data_stream import DataStream
from distillbench.dropout import seed_masks
from distillbench.energy import Energy, energy
from distillbench.environment import device_name, environment
from distillbench.errors import DivergedError, Unavailable, UserError
from distillbench.files import key_of, sha256_file, write_atomically
from distillbench.flops import NetworkFlops, family_flops, training_flops
from distillbench.fully_sharded import check_shared, trained_from
from distillbench.memory import bytes_on_gpu, peak_gpu_mib, peak_rss_mib, release_memory
from distillbench.method import Method
from distillbench.optimizers import warm_up
from distillbench.pairs import Workspace
from distillbench.progress import Progress
from distillbench.results import FINAL, CheckpointRecord, Cost, CurvePoint, Status, TrainRecord, write_record
from distillbench.resume import Followed, Resume, States
from distillbench.shards import whole
from distillbench.shared_context import Cell, build
from distillbench.signals import Stop
from distillbench.tasks import Task
from distillbench.teachers import Teacher
from distillbench.train import Loop, Trained, train
from distillbench.training_checkpoints import Checkpoints

TRAIN, STUDENT, ERROR = "train.json", "student.safetensors", "error.txt"  # in the folder of a cell


def train_cell(
    cell: Cell, inputs: dict[str, Any], folder: Path, progress: Progress, stop: Stop, anew: bool = False
) -> TrainRecord:
    """Train the method of `cell` and keep in `folder` what came of it: the record, and the weights if all went well.

    It goes on from the last state that an earlier process left, unless it is to be done `anew`. Where memory runs out
    and the settings allow it, training begins again with each step in twice as many parts. Raises Interrupted when it
    is told to stop.
    """
    config = cell.scene.config
    check_shared(config.compute, cell.scene.ranks.count)
    teacher = cell.scene.loaded(progress)
    about: dict[str, Any] = {"key": key_of(inputs), "inputs": inputs, "device": device_name(cell.scene.device)}
    about["environment"] = environment(cell.scene.device, config.threads)
    about["processes"] = cell.scene.ranks.count
    parts = config.accumulate
    while True:
        states = States(folder / "resume" / str(parts), config.states.keep, progress)
        if anew:
            states.clear()
        try:
            record = _trained(cell, teacher, about | {"accumulate": parts}, folder, progress, states, stop)
            break
        except UserError:
            raise
        except DivergedError as error:
            record = TrainRecord(**about, status="diverged", reason=str(error))
            break
        except Exception as error:  # a method is a stranger's code; the other cells go on
            status = status_of(error)
            most = config.batch_size // cell.scene.ranks.count  # images of a step in one process
            if status == "failed" or config.compute.shard or config.on_oom == "fail" or 2 * parts > most:
                record = TrainRecord(**about, status=status, reason=keep_traceback(error, folder, progress))
                break
        states.clear()
        free_memory()
        parts *= 2
        progress.say(f"{cell.label}: memory ran out; training anew, each step in {parts} parts")
    write_record(folder / TRAIN, record)
    if cell.scene.ranks.busy:  # the others are in the midst of a step, which only networks that are spread do not leave
        raise UserError(f"{cell.label}: {record.reason}. The same command goes on with the other cells")
    if record.status in FINAL:
        states.clear()
        with suppress(OSError):  # states that were set aside stay
            (folder / "resume").rmdir()
    return record


def status_of(error: Exception) -> Status:
    """Of what ended with `error`: oom where memory ran out (on the CPU torch has no error of its own for it)."""
    ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return "oom" if ran_out else "failed"


def free_memory() -> None:
    """What nothing refers to any more."""
    gc.collect()
    release_memory()


@dataclass(frozen=True)
class TrainOrder:
    """What a follower needs to train along: the same cell, in as many parts, from the newest of the same states."""

    task: Task
    parts: int
    folder: Path


@dataclass(frozen=True)
class Measured:
    """A training that went well, and what was measured round it, in all processes."""

    method: Method
    trained: Trained
    weights: dict[str, Tensor]  # whole; {} in all processes but the main one
    energy: Energy
    peaks: dict[str, tuple[float | None, str]]  # of the process that took most, in MiB, or why there is none
    no_compile_seconds: str
    device: str  # its name; of a training that went on elsewhere, both


def train_along(cell: Cell, order: TrainOrder, progress: Progress, stop: Stop) -> None:
    """A follower's part of a training. Nothing is written."""
    states = Followed(order.folder, cell.scene.config.states.keep, progress)
    _train(cell, order.parts, cell.scene.loaded(progress), order.folder, progress, states, stop)


def _train(
    cell: Cell, parts: int, teacher: Teacher, folder: Path, progress: Progress, states: States, stop: Stop
) -> Measured:
    """Train the method of `cell`, in this process's rows of every batch."""
    scene, config = cell.scene, cell.scene.config
    assert cell.entry is not None and cell.method_config is not None and cell.seed is not None
    ranks, compute, needs_data = scene.ranks, config.compute, cell.entry.cls.needs_data
    cache = Path(config.results_dir) / "cache" / "pairs"
    torch.set_num_threads(config.threads)
    warm_up(scene.device)
    scene.release_evaluator()
    ahead = 0 if scene.device == "cpu" else compute.prefetch
    with ExitStack() as stack:
        data = None
        if needs_data:
            data = DataStream(scene.trained_on(progress), cell.seed, scene.device, ahead, ranks.share)
            stack.callback(data.close)
            data.preload(progress)  # outside the budget, like all preparation of data
        step = stack.enter_context(progress.step(f"{cell.label}: training"))
        rss = stack.enter_context(peak_rss_mib())
        gpu = stack.enter_context(peak_gpu_mib(scene.device, _own_bytes(cell, teacher)))
        joules = stack.enter_context(energy(scene.device, config.energy))
        if compute.shard:
            teacher = stack.enter_context(trained_from(teacher))
        method = build(cell, teacher, "cpu" if compute.shard else scene.device)
        seed_masks(cell.seed, ranks.share.index)
        stack.enter_context(applied(compute, method, scene.device))
        if not compute.shard:  # else when it is spread
            ranks.equal(method)
        meter = Meter(config.budget, teacher, scene.device, watches=(rss, gpu), energy=joules)
        given = method.teacher, meter, cache, scene.device, cell.seed, progress
        workspace = Workspace(*given, energy_source=config.energy, ranks=ranks)
        points = config.evaluation.checkpoints
        fractions = tuple((k + 1) / (points + 1) for k in range(points))
        checkpoints = Checkpoints(fractions, folder, tuple(cell.nfe))
        order = {} if data is None else {"order": data}
        watched = {"rss": rss, "gpu": gpu, "gpu_reserved": gpu.reserved, "device": gpu.device}
        resume = Resume(states, config.states.seconds, order, watched, stop, devices=[device_name(scene.device)])
        loop = Loop(config.batch_size, parts, compute, ranks)
        read = None if data is None else data.read
        trained = train(method, cell.method_config, workspace, read, loop, step, checkpoints, resume)
    peaks = {
        "peak_gpu_mib": gpu,
        "peak_gpu_reserved_mib": gpu.reserved,
        "peak_device_mib": gpu.device,
        "peak_rss_mib": rss,
    }
    weights = whole(method.state_dict(), ranks.main)
    largest = {name: _largest(ranks.gather((peak.mib, peak.reason))) for name, peak in peaks.items()}
    used, device = ranks.energy(meter.energy()), ", then ".join(resume.devices)
    return Measured(method, trained, weights, used, largest, meter.no_compile_seconds, device)


def _own_bytes(cell: Cell, teacher: Teacher) -> int | None:
    """What of the GPU's memory is the cell's before it begins; None: all, since the process is there for it alone."""
    if cell.scene.config.isolate and cell.scene.ranks.count == 1:
        return None
    networks = [teacher.denoiser, *([teacher.start] if teacher.start is not None else [])]
    return bytes_on_gpu(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))


def _largest(peaks: list[tuple[float | None, str]]) -> tuple[float | None, str]:
    """Of the processes that trained together; none where one of them has none."""
    missing = [peak for peak in peaks if peak[0] is None]
    return missing[0] if missing else max(peaks, key=lambda peak: peak[0] or 0.0)


def _trained(
    cell: Cell, teacher: Teacher, about: dict[str, Any], folder: Path, progress: Progress, states: States, stop: Stop
) -> TrainRecord:
    """The record of a training that goes well. The weights are written."""
    scene = cell.scene
    parts = about["accumulate"]
    if cell.entry is not None and cell.entry.cls.needs_data:
        scene.trained_on(progress)  # followers find what has to be made
    order = TrainOrder(Task.of(cell), parts, states.folder)
    with scene.ranks.ordered(order, recovers=not scene.config.compute.shard):
        measured = _train(cell, parts, teacher, folder, progress, states, stop)
    method, trained, used = measured.method, measured.trained, measured.energy
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in measured.weights.items()}
    write_atomically(folder / STUDENT, lambda path: save_file(tensors, path))
    missing = {name: reason for name, (_, reason) in measured.peaks.items() if reason}
    missing |= {"joules": used.reason} if used.reason else {}
    missing |= {"compile_seconds": measured.no_compile_seconds} if measured.no_compile_seconds else {}
    try:
        if teacher.conditioning.small is not None:
            raise Unavailable("the evaluations of an upscaler's base model are not told apart from its own")
        flops = family_flops(teacher, scene.device)
        not_counted = sorted({name for counted in flops for name in counted.not_counted})
    except Unavailable as reason:
        flops, not_counted = None, []
        missing["tflops"] = str(reason)
    except Exception as error:  # a network is a stranger's code
        flops, not_counted = None, []
        missing["tflops"] = f"its FLOPs cannot be counted: {type(error).__name__}"
    return TrainRecord(
        **about | {"device": measured.device},
        status="ok",
        cost=_cost(trained.price, used, flops),
        **{name: mib for name, (mib, _) in measured.peaks.items()},
        parameters=sum(p.numel() for p in method.student.parameters()),
        weights_sha256=sha256_file(folder / STUDENT),
        curve=[CurvePoint(**dataclasses.asdict(point)) for point in trained.curve],
        checkpoints=[
            CheckpointRecord(
                fraction=c.fraction,
                file=c.file,
                sha256=c.sha256,
                ready=list(c.ready),
                cost=_cost(c.price, c.energy, flops),
            )
            for c in trained.checkpoints
        ],
        flops_not_counted=not_counted,
        missing=missing,
    )


def _cost(price: Price, used: Energy, flops: tuple[NetworkFlops, NetworkFlops] | None) -> Cost:
    tflops = None if flops is None else training_flops(price, *flops) / 1e12
    return Cost(**dataclasses.asdict(price), tflops=tflops, joules=used.joules)


def keep_traceback(error: Exception, folder: Path, progress: Progress) -> str:
    """One line for the row; the traceback goes to a file beside the record."""
    text = traceback.format_exc()
    write_atomically(folder / ERROR, lambda path: Path(path).write_text(text, encoding="utf-8"))
    line = (str(error).strip() or "no message").splitlines()[0]
    progress.say(f"{type(error).__name__}: {line} (traceback in {folder / ERROR})")
    return f"{type(error).__name__}: {line}"
