"""The training of a cell: what is measured around it, what happens when it fails, and its record."""

from __future__ import annotations

import dataclasses
import gc
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.dropout import seed_masks
from distillbench.errors import DivergedError, Unavailable, UserError
from distillbench.metering.energy import Energy, energy
from distillbench.metering.load import machine_load
from distillbench.metering.memory import bytes_on_gpu, peak_gpu_mib, peak_rss_mib, release_memory
from distillbench.records.records import (
    FINAL,
    CheckpointRecord,
    Cost,
    CurvePoint,
    ProgressPoint,
    Status,
    TrainRecord,
    write_record,
)
from distillbench.runs.cell_monitor import monitor_of
from distillbench.runs.cell_task import CellTask
from distillbench.runs.distances import COUNTED, Distances, lpips_flops
from distillbench.runs.sampling_settings import as_trained
from distillbench.runs.shared_context import Cell, SharedContext, build
from distillbench.storage.files import key_of, sha256_file, write_atomically
from distillbench.system.dtensors import gather_full
from distillbench.system.environment import device_name, environment
from distillbench.system.progress import Progress
from distillbench.system.signals import Stop
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import Meter, TrainingCost
from distillbench.training.checkpoints import Checkpoints
from distillbench.training.compute import applied
from distillbench.training.data_stream import DataStream
from distillbench.training.flops import NetworkFlops, denoisers_of, measured_flops, training_flops
from distillbench.training.fsdp import check_sharding, copied_for_sharding
from distillbench.training.loop import Loop, Trained, train
from distillbench.training.method import Method
from distillbench.training.monitor import Monitor
from distillbench.training.network_rows import NetworkRows
from distillbench.training.optimizer_config import optimizers_of
from distillbench.training.optimizers import warm_up
from distillbench.training.pairs import Workspace
from distillbench.training.resume import FollowerStates, Resume, States
from distillbench.training.share import parts_of

TRAIN, STUDENT, ERROR = "train.json", "student.safetensors", "error.txt"  # in the folder of a cell


def train_cell(
    cell: Cell, inputs: dict[str, Any], folder: Path, progress: Progress, stop: Stop, anew: bool = False
) -> TrainRecord:
    """Train the method of `cell`; write the record to `folder`, and the weights if the training succeeds.

    Resumes from the last state that an earlier process saved, unless `anew`. If memory runs out and the settings allow
    it, training starts again with half of the images at once. Raises Interrupted on a request to stop.
    """
    config = cell.shared.config
    check_sharding(config.compute, cell.shared.ranks.count)
    teacher = cell.shared.load_teacher(progress)
    common: dict[str, Any] = {"key": key_of(inputs), "inputs": inputs, "device": device_name(cell.shared.device)}
    common["environment"] = environment(cell.shared.device, config.threads)
    common["processes"] = cell.shared.ranks.count
    microbatch = config.microbatch
    while True:
        states = States(folder / "resume" / str(microbatch), config.states.keep, progress)
        if anew:
            states.clear()
        try:
            record = _trained(cell, teacher, common | {"microbatch": microbatch}, folder, progress, states, stop)
            break
        except UserError:
            raise
        except DivergedError as error:
            record = TrainRecord(**common, status="diverged", reason=str(error))
            break
        except Exception as error:  # a third-party method may raise anything; the other cells run
            status = status_of(error)
            smaller = _half(cell, microbatch)
            if status == "failed" or config.compute.shard or config.on_oom == "fail" or not smaller:
                record = TrainRecord(**common, status=status, reason=keep_traceback(error, folder, progress))
                break
        states.clear()
        free_memory()
        microbatch = smaller
        progress.say(f"{cell.label}: memory ran out; training starts again with {microbatch} images at once")
    write_record(folder / TRAIN, record)
    if cell.shared.ranks.busy:  # with FSDP the other ranks cannot leave their step
        raise UserError(f"{cell.label}: {record.reason}. The same command runs the other cells")
    if record.status in FINAL:
        states.clear()
        with suppress(OSError):  # damaged states that were set aside stay
            (folder / "resume").rmdir()
    return record


def _half(cell: Cell, microbatch: int) -> int:
    """About half of the images that a process has computed at once, in whole groups; 0 if that was one group."""
    count, group = cell.shared.ranks.count, cell.group_size
    share = -(-(cell.shared.config.batch_size // group) // count)  # in groups
    at_once = min(microbatch // group, share) if microbatch else share
    return (at_once + 1) // 2 * group if at_once > 1 else 0


def status_of(error: Exception) -> Status:
    """The status of what raised `error`: oom if memory ran out (torch has no error class for that on the CPU)."""
    ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return "oom" if ran_out else "failed"


def free_memory() -> None:
    """Collect garbage and return the memory of torch's allocators."""
    gc.collect()
    release_memory()


@dataclass(frozen=True)
class TrainOrder:
    """What non-zero ranks need to train: the cell, the images at once, and the folder of training states."""

    task: CellTask
    microbatch: int
    folder: Path


@dataclass(frozen=True)
class Measured:
    """A successful training, and what was measured on all ranks."""

    method: Method
    trained: Trained
    weights: dict[str, Tensor]  # gathered; {} on non-zero ranks
    energy: Energy
    peaks: dict[str, tuple[float | None, str]]  # MiB on the rank with the most, or the reason for None
    no_compile_seconds: str
    device: str  # its name; all names if the training was resumed on another
    monitor: Monitor | None
    load: float | None  # by other processes


def follow_training(cell: Cell, order: TrainOrder, progress: Progress, stop: Stop) -> None:
    """What non-zero ranks do for a training. Writes nothing."""
    states = FollowerStates(order.folder, cell.shared.config.states.keep, progress)
    _train(cell, order.microbatch, cell.shared.load_teacher(progress), order.folder, progress, states, stop)


def _train(
    cell: Cell, microbatch: int, teacher: Teacher, folder: Path, progress: Progress, states: States, stop: Stop
) -> Measured:
    """Train the method of `cell` on this rank's rows of every batch."""
    shared, config = cell.shared, cell.shared.config
    assert cell.entry is not None and cell.method_config is not None and cell.seed is not None
    ranks, compute = shared.ranks, config.compute
    cache = shared.folder.cache("pairs")
    torch.set_num_threads(config.threads)
    for optimizer in sorted(set(optimizers_of(cell.method_config).values())):
        warm_up(shared.device, optimizer)
    shared.release_evaluator()
    ahead = 0 if shared.device == "cpu" else compute.prefetch
    with ExitStack() as stack:
        data = None
        if cell.reads_data:
            images, flip = shared.training_images(progress), config.augment.flip
            data = DataStream(images, cell.seed, shared.device, ahead, ranks.share, flip)
            stack.callback(data.close)
            data.preload(progress)  # not part of the budget, like all preparation of data
        step = stack.enter_context(progress.step(f"{cell.label}: training"))
        load = stack.enter_context(machine_load())
        rss = stack.enter_context(peak_rss_mib())
        gpu = stack.enter_context(peak_gpu_mib(shared.device, _own_bytes(cell, teacher)))
        joules = stack.enter_context(energy(shared.device, config.energy))
        if compute.shard:
            teacher = stack.enter_context(copied_for_sharding(teacher))
        settings = as_trained(cell.method_config)
        cell_as_trained = dataclasses.replace(cell, method_config=settings)
        method = build(cell_as_trained, teacher, "cpu" if compute.shard else shared.device)
        cell.group_size = method.group_size
        if data is not None:
            data.share = dataclasses.replace(ranks.share, group=method.group_size)
        seed_masks(cell.seed, ranks.share.index)
        stack.enter_context(applied(compute, method, shared.device))
        if not compute.shard:  # with FSDP that happens when it is sharded
            ranks.broadcast_module(method)
        meter = Meter(config.budget, teacher, shared.device, watches=(rss, gpu), energy=joules)
        method.distances = Distances(teacher, meter, shared.weights, shared.device)
        given = method.teacher, meter, cache, shared.device, cell.seed, progress
        workspace = Workspace(*given, energy_source=config.energy, ranks=ranks, shard=compute.shard)
        points = config.evaluation.checkpoints
        fractions = tuple((k + 1) / (points + 1) for k in range(points))
        checkpoints = Checkpoints(fractions, folder, tuple(cell.nfe))
        order = {} if data is None else {"order": data}
        watched = {"rss": rss, "gpu": gpu, "gpu_reserved": gpu.reserved, "device": gpu.device}
        resume = Resume(states, config.states.seconds, order, watched, stop, devices=[device_name(shared.device)])
        loop = Loop(config.batch_size, microbatch, compute, ranks, config.augment)
        read = None if data is None else data.read
        monitor = monitor_of(cell, teacher, microbatch, progress)
        trained = train(method, settings, workspace, read, loop, step, checkpoints, resume, monitor)
    peaks = {
        "peak_gpu_mib": gpu,
        "peak_gpu_reserved_mib": gpu.reserved,
        "peak_device_mib": gpu.device,
        "peak_rss_mib": rss,
    }
    weights = gather_full(method.state_dict(), ranks.main)
    largest = {name: _largest(ranks.all_gather((peak.mib, peak.reason))) for name, peak in peaks.items()}
    used, device = ranks.sum_energy(meter.energy()), ", then ".join(resume.devices)
    return Measured(method, trained, weights, used, largest, meter.no_compile_seconds, device, monitor, load.fraction)


def _own_bytes(cell: Cell, teacher: Teacher) -> int | None:
    """GPU bytes of the teacher before training; None: all in use, if the process was started for this cell."""
    if cell.shared.config.isolate and cell.shared.ranks.count == 1:
        return None
    networks = [teacher.denoiser, *([teacher.start] if teacher.start is not None else [])]
    return bytes_on_gpu(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))


def _largest(peaks: list[tuple[float | None, str]]) -> tuple[float | None, str]:
    """The largest of all ranks; None if one rank has none."""
    missing = [peak for peak in peaks if peak[0] is None]
    return missing[0] if missing else max(peaks, key=lambda peak: peak[0] or 0.0)


def _trained(
    cell: Cell, teacher: Teacher, common: dict[str, Any], folder: Path, progress: Progress, states: States, stop: Stop
) -> TrainRecord:
    """Train, write the weights and return the record."""
    shared = cell.shared
    microbatch = common["microbatch"]
    if cell.reads_data:
        shared.training_images(progress)  # rank 0 makes the latents first, the other ranks read them
    order = TrainOrder(CellTask.of(cell), microbatch, states.folder)
    with shared.ranks.lead(order, recovers=not shared.config.compute.shard):
        measured = _train(cell, microbatch, teacher, folder, progress, states, stop)
    method, trained, used = measured.method, measured.trained, measured.energy
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in measured.weights.items()}
    write_atomically(folder / STUDENT, lambda path: save_file(tensors, path))
    missing = {name: reason for name, (_, reason) in measured.peaks.items() if reason}
    missing |= {"joules": used.reason} if used.reason else {}
    missing |= {"compile_seconds": measured.no_compile_seconds} if measured.no_compile_seconds else {}
    flops, reason = _flops(trained.cost, teacher, [] if shared.config.compute.shard else denoisers_of(method), shared)
    missing |= {"tflops": reason} if reason else {}
    alone = shared.ranks.count == 1
    missing |= {} if alone else {"machine_load": "several processes train: their work cannot be told from others'"}
    counts = trained.counts
    if counts.complete and counts.clipped is None:
        missing["clipped_steps"] = "grad_clip=0: gradients are not clipped"
    not_counted = sorted({name for one in flops.values() for name in one.not_counted})
    peaks: dict[str, Any] = {name: mib for name, (mib, _) in measured.peaks.items()}
    return TrainRecord(
        **common | {"device": measured.device},
        status="ok",
        cost=_recorded_cost(trained.cost, used, flops),
        **peaks,
        machine_load=measured.load if alone else None,
        parameters=sum(p.numel() for p in method.student.parameters()),
        trained_parameters=sum(p.numel() for p in method.student.parameters() if p.requires_grad),
        student_inputs=method.inputs,
        accumulate=parts_of(shared.config.batch_size, microbatch, shared.ranks.count, method.group_size),
        weights_sha256=sha256_file(folder / STUDENT),
        updates=counts.updates if counts.complete else None,
        clipped_steps=counts.clipped if counts.complete else None,
        nonfinite_steps=counts.nonfinite if counts.complete else None,
        curve=[CurvePoint(**dataclasses.asdict(point)) for point in trained.curve],
        **_seen(measured.monitor, method.note),
        checkpoints=[
            CheckpointRecord(
                fraction=c.fraction,
                file=c.file,
                sha256=c.sha256,
                ready=list(c.ready),
                cost=_recorded_cost(c.cost, c.energy, flops),
            )
            for c in trained.checkpoints
        ],
        flops_not_counted=not_counted,
        missing=missing,
    )


def _seen(monitor: Monitor | None, note: str) -> dict[str, Any]:
    """What was seen of samples along training, and what the method notes, as fields of the record."""
    if monitor is None:
        return {"note": note}
    points = [ProgressPoint(**dataclasses.asdict(point)) for point in monitor.points]
    return {
        "progress": points,
        "progress_reference": monitor.look.reference,
        "note": "; ".join(filter(None, [note, monitor.note])),
    }


def _flops(
    cost: TrainingCost, teacher: Teacher, networks: list[Denoiser], shared: SharedContext
) -> tuple[dict[NetworkRows, NetworkFlops], str]:
    """FLOPs of one row of each kind in `cost`, or {} and the reason why they are unknown."""
    try:
        if teacher.conditioning.small is not None:
            raise Unavailable("the evaluations of an upscaler's base model are not counted apart from its own")
        rows = [each for each in cost.networks if each.counted != COUNTED]
        if sum(each.forward for each in rows) != cost.teacher_nfe + cost.student_nfe:
            raise Unavailable("a part of the training was counted by an earlier version of distillbench")
        return measured_flops(rows, teacher, networks, shared.device) | lpips_flops(cost.networks), ""
    except Unavailable as reason:
        return {}, str(reason)
    except Exception as error:  # a third-party network may raise anything
        return {}, f"its FLOPs cannot be counted: {type(error).__name__}"


def _recorded_cost(cost: TrainingCost, used: Energy, flops: Mapping[NetworkRows, NetworkFlops]) -> Cost:
    tflops = training_flops(cost.networks, flops) / 1e12 if flops else None
    return Cost(**dataclasses.asdict(cost), tflops=tflops, joules=used.joules)


def keep_traceback(error: Exception, folder: Path, progress: Progress) -> str:
    """Write the traceback to a file next to the record; return one line for the row."""
    text = traceback.format_exc()
    write_atomically(folder / ERROR, lambda path: Path(path).write_text(text, encoding="utf-8"))
    line = (str(error).strip() or "no message").splitlines()[0]
    progress.say(f"{type(error).__name__}: {line} (traceback in {folder / ERROR})")
    return f"{type(error).__name__}: {line}"
