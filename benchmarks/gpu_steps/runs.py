"""Steps that run the command line as a user does."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from distillbench.training.compute import ComputeConfig
from gpu_steps import verdicts
from gpu_steps.context import Context, NotRun, stop, wait_for
from gpu_steps.verdicts import Verdict

METHODS = ("boot", "cm", "ct", "direct", "pd", "sid", "tract")
TERMINATED = 143  # exit code after SIGTERM
COUNTED = ("train_images", "train_teacher_nfe", "train_student_nfe")
COLUMN = "fd_efficientnet_lite0"


def _table(folder: Path) -> list[dict[str, str]]:
    path = folder / "table.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _students(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if not row["method"].startswith("teacher:")]


def _command(context: Context, results: Path, name: str, *words: str, device: str = "") -> list[str]:
    own = [f"device={device or context.device}", f"results_dir={results}", f"run_name={name}"]
    return ["run", "dataset=digits", *own, *words]


def _methods(names: Iterable[str]) -> str:
    return f"methods=[{','.join(names)}]"


def _judge_table(context: Context, what: str, folder: Path, count: int) -> list[dict[str, str]]:
    rows = _table(folder)
    statuses, reasons = [row["status"] for row in rows], [row["reason"] for row in rows]
    context.say(verdicts.judge_rows(what, statuses, reasons, count))
    return rows


# --- all methods, on CUDA and on the CPU -----------------------------------------------------------------------------


def runs(context: Context) -> None:
    """All methods, short, on the device and on the CPU; then a second process in the same folder, and the defaults."""
    seeds = 1 if context.small else 3
    methods = ("boot", "direct") if context.small else METHODS
    short = [_methods(methods), "experiment=smoke", "evaluation.timing=off", "seed=" + ",".join(map(str, range(seeds)))]
    if context.small:
        short += ["budget.images=256", "methods.direct.pairs=64"]
    ours, theirs = context.folder / "cuda", context.folder / "cpu"
    on_cpu = context.start(*_command(context, theirs, "a", *short, device="cpu"))  # beside it: the GPU does not notice
    context.run(*_command(context, ours, "a", *short))
    rows = _judge_table(context, f"short runs on {context.device}", ours / "a", 2 + seeds * len(methods))
    on_cpu.wait(max(1.0, context.left))
    others = _judge_table(context, "short runs on the CPU", theirs / "a", 2 + seeds * len(methods))
    with context.attempt("CUDA beside CPU"):
        _compare(context, rows, others)
    with context.attempt("a second process in the same folder"):
        _second(context, ours, short, methods)
    with context.attempt("a run at default settings"):
        _defaults(context)


def _compare(context: Context, rows: list[dict[str, str]], others: list[dict[str, str]]) -> None:
    for method in dict.fromkeys(row["method"] for row in _students(rows)):
        mine, theirs = ([r for r in table if r["method"] == method] for table in (rows, others))
        counts = [{name: int(float(r[name])) for name in COUNTED if r[name]} for r in (mine[0], theirs[0])]
        context.say(verdicts.judge_counts(method, *counts))
        for nfe in dict.fromkeys(row["nfe"] for row in mine):
            scores = [[float(r[COLUMN]) for r in t if r["nfe"] == nfe and r[COLUMN]] for t in (mine, theirs)]
            if all(scores):
                context.say(verdicts.judge_student_score(f"{method}, {nfe} NFE: {COLUMN}", *scores))
    for row in (r for r in rows if r["method"].startswith("teacher:")):
        other = next(r for r in others if (r["method"], r["nfe"]) == (row["method"], row["nfe"]))
        what = f"{COLUMN} of {row['nfe']} steps"
        context.say(verdicts.judge_teacher_score(what, float(row[COLUMN]), float(other[COLUMN])))


def _files(results: Path, pattern: str) -> dict[str, int]:
    """Files below a results folder and when they were written."""
    return {str(path.relative_to(results)): path.stat().st_mtime_ns for path in results.glob(pattern)}


def _second(context: Context, results: Path, short: list[str], methods: tuple[str, ...]) -> None:
    """Another process: other scores of the same students. It must find students and the reference, and use them."""
    students, kept = _files(results, "cells/*/train.json"), _files(results, "cache/references/*.npz")
    if not students or not kept:
        raise NotRun("the first process kept nothing")
    context.run(*_command(context, results, "b", *short, "evaluation.images=48"))
    after = _files(results, "cells/*/train.json")
    changed = [name for name, when in (students | kept).items() if (results / name).stat().st_mtime_ns != when]
    context.say(verdicts.judge_found("a second process in the same folder", changed, len(after.keys() - students)))
    _judge_table(context, "scores by the second process", results / "b", 2 + len(methods))


def _defaults(context: Context) -> None:
    """What a user types: a process for each cell, and one for the timing."""
    methods = ("boot",) if context.small else ("boot", "cm")
    words = [_methods(methods), "budget.images=" + ("128" if context.small else "20000"), "evaluation.images=64"]
    words += ["evaluation.teacher_steps=[1,4]", "evaluation.largest_timed_batch=16", "evaluation.timing_seconds=0.05"]
    if context.small:
        words += ["evaluation.timing=inline", "isolate=false", "evaluation.timing_seconds=0.01"]
    context.run(*_command(context, context.folder / "default", "a", *words))
    rows = _judge_table(context, "a run at default settings", context.folder / "default" / "a", 2 + len(methods))
    if not context.on_gpu:
        return
    for column in ("sample_latency_p50_ms", "sample_images_per_second", "sample_peak_gpu_mib", "train_peak_gpu_mib"):
        asked = _students(rows) if column.startswith("train") else rows
        empty = [row["reason"] for row in asked if not row[column]]
        figure = f"{len(asked) - len(empty)} of {len(asked)} filled"
        context.say(verdicts.judge(not empty, "wrong", f"column {column}", figure, "all", "".join(empty[:1])[:300]))
    mib, why = [row["sample_peak_device_mib"] for row in rows], "".join(row["reason"] for row in rows[:1])[:300]
    figure = ", ".join(value or "empty" for value in mib)
    context.say(verdicts.judge(all(mib), "look", "column sample_peak_device_mib", figure, "all filled", why))


# --- resume ----------------------------------------------------------------------------------------------------------


def has_determinism() -> bool:
    return "deterministic" in vars(ComputeConfig())


def resume(context: Context) -> None:
    """Trainings cut off by SIGTERM in the middle, all methods side by side on one device, and gone on with."""
    methods = ("boot",) if context.small else METHODS
    _resumed(context, "resume", methods, [], must=False)
    if not has_determinism():
        context.say(Verdict("skipped", "resume with compute.deterministic=true", "there is no such setting yet"))
        return
    with context.attempt("resume with compute.deterministic=true"):
        context.need(5 if context.small else 60)
        some = ("boot",) if context.small else ("boot", "ct", "sid")
        _resumed(context, "resume, deterministic", some, ["compute.deterministic=true"], must=True)


def _resumed(context: Context, what: str, methods: tuple[str, ...], more: list[str], must: bool) -> None:
    images = 6_400 if context.small else 60_000
    words = [_methods(methods), f"budget.images={images}", "evaluation.timing=off", "evaluation.images=16"]
    words += ["evaluation.teacher_steps=[1]", "evaluation.metrics=[teacher_rmse]", f"executor.workers={len(methods)}"]
    words += ["states.seconds=0.1", *more]
    words += ["methods.direct.pairs=256", "methods.direct.steps=8"] if "direct" in methods else []
    if len(methods) == 1:
        words.remove("executor.workers=1")
    name = "deterministic" if must else "plain"
    whole, cut = context.folder / f"{name}-whole", context.folder / f"{name}-cut"
    cublas = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if must else {}  # which torch demands of a deterministic run
    context.run(*_command(context, whole, "a", *words), **cublas)
    process = context.start(*_command(context, cut, "a", *words), **cublas)
    in_middle = lambda: len({p.parents[2] for p in cut.glob("cells/*/resume/*/state-*.safetensors")}) == len(methods)
    wait_for(in_middle, 0.6 * context.left, process)
    code = stop(process, patience=max(5.0, context.left / 3))
    left = {p.parents[2] for p in cut.glob("cells/*/resume/*/state-*.safetensors")}
    context.say(verdicts.judge_interrupted(code, len(left), len(methods)))
    context.run(*_command(context, cut, "a", *words), **cublas)
    rows, others = _students(_table(cut / "a")), _students(_table(whole / "a"))
    _judge_table(context, f"{what}: the same command again", cut / "a", 1 + len(methods))
    for row in {row["method"]: row for row in rows}.values():
        other = next(r for r in others if r["method"] == row["method"])
        counts = [{name: int(float(r[name])) for name in COUNTED if r[name]} for r in (row, other)]
        context.say(verdicts.judge_counts(f"{what}: {row['method']}, cut off and whole", *counts))
    for method in methods:
        with context.attempt(f"{what}: weights of {method}"):
            apart, equal = weights_apart(*(_weights(results, method) for results in (cut, whole)))
            context.say(verdicts.judge_weights(f"{what}: weights of {method}", apart, equal, must))


def _weights(results: Path, method: str) -> dict[str, torch.Tensor]:
    (path,) = results.glob(f"a/weights/{method}-seed0-*.safetensors")
    return load_file(path)


def weights_apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, bool]:
    """rms difference over rms weight, and whether every tensor is equal."""
    if a.keys() != b.keys():
        return math.inf, False
    equal = all(torch.equal(a[name], b[name]) for name in a)
    off = sum((a[name].double() - b[name].double()).square().sum().item() for name in a)
    size = sum(b[name].double().square().sum().item() for name in b)
    return math.sqrt(off / max(size, 1e-300)), equal


# --- out of memory ---------------------------------------------------------------------------------------------------

LEFT_MIB = 4096  # that other processes find free while this one holds the rest
IMAGES = 600_000  # of a batch that does not fit into it: an MLP of digits keeps 28 KiB an image for its backward pass


def out_of_memory(context: Context) -> None:
    """A batch that does not fit while this process holds most of the memory; then in parts."""
    if not context.on_gpu:
        raise NotRun("it needs a GPU")
    if context.simulated:
        _in_parts(context, 10_000, DISTILLBENCH_SIMULATED_GPU_BYTES=str(2**26))
        return
    free, _ = torch.cuda.mem_get_info(context.device)
    ballast = []
    for _ in range(max(0, free // 2**20 - LEFT_MIB) // 256):
        try:
            ballast.append(torch.empty(2**28, dtype=torch.uint8, device=context.device))
        except torch.OutOfMemoryError:
            break
    context.keep("ballast_mib", 256 * len(ballast))
    _in_parts(context, IMAGES)


def _in_parts(context: Context, images: int, **variables: str) -> None:
    common = [_methods(["ct"]), f"batch_size={images}", "evaluation.images=16", "evaluation.timing=off"]
    common += ["evaluation.teacher_steps=[1]", "evaluation.nfe=[1]", "evaluation.metrics=[teacher_rmse]"]
    results = context.folder / "oom"
    context.run(*_command(context, results, "a", *common, f"budget.images={images},200"), **variables)
    rows = _students(_table(results / "a"))
    rows.sort(key=lambda row: -int(float(row["budget"].split()[0])) if row["budget"] else 0)
    context.say(verdicts.judge_memory_error([row["status"] for row in rows]))
    with context.attempt("on_oom=accumulate"):
        more = [f"budget.images={images}", "on_oom=accumulate"]
        context.run(*_command(context, results, "b", *common, *more), **variables)
        status = next((row["status"] for row in _students(_table(results / "b"))), "no row")
        records = [json.loads(path.read_text()) for path in results.glob("cells/*/train.json")]
        parts = max((record["accumulate"] for record in records if record["status"] == "ok"), default=1)
        context.say(verdicts.judge_parts(status, parts))


# --- two processes ---------------------------------------------------------------------------------------------------


def together(context: Context) -> None:
    """Two commands in one folder at the same time; and, where there are two GPUs, one training on both."""
    methods = ("direct",) if context.small else ("boot", "cm", "direct")
    words = [_methods(methods), "experiment=smoke", "evaluation.timing=off"]
    words += ["budget.images=256", "methods.direct.pairs=64"] if context.small else ["isolate=true"]
    results = context.folder / "both"
    processes = [context.start(*_command(context, results, name, *words)) for name in ("a", "b")]
    codes = [process.wait(max(1.0, context.left)) for process in processes]
    what = "two commands in one folder at the same time"
    context.say(verdicts.judge(codes == [0, 0], "wrong", what, f"exit codes {codes}", "[0, 0]"))
    tables = [_judge_table(context, f"table of command {n}", results / n, 2 + len(methods)) for n in ("a", "b")]
    keys = [sorted((row["key"], row[COLUMN]) for row in table) for table in tables]
    same = keys[0] == keys[1]
    context.say(verdicts.judge(same, "wrong", "their tables", "equal" if same else "different", "equal"))
    count = torch.cuda.device_count() if context.device.startswith("cuda") and not context.simulated else 0
    cpu = not context.on_gpu
    if count < 2 and not cpu:
        context.say(Verdict("skipped", "one training on two GPUs", f"{count} GPU here"))
        if context.simulated:
            return
        with context.attempt("two processes of one training on one GPU"):
            _refused(context, words)
        return
    with context.attempt("one training on two devices"):
        _torchrun(context, words, methods, "cpu" if cpu else "cuda")


def _torchrun(context: Context, words: list[str], methods: tuple[str, ...], device: str) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", "-m", "distillbench"]
    begin, results = time.monotonic(), context.folder / "ranks"
    words = [word for word in words if not word.startswith("isolate")]
    code = context.run(*_command(context, results, "a", *words, device=device), before=launch)
    context.say(verdicts.judge(code == 0, "wrong", "torchrun with two processes", f"exit code {code}", "0"))
    rows = _judge_table(context, "table of two processes", results / "a", 2 + len(methods))
    alone = {(row["method"], row["nfe"]): row for row in _table(context.folder / "both" / "a")}
    for row in (row for row in rows if row["method"].startswith("teacher:") and row[COLUMN]):
        other = alone[row["method"], row["nfe"]]
        what = f"{COLUMN} of {row['nfe']} steps, two processes beside one"
        context.say(verdicts.judge_teacher_score(what, float(row[COLUMN]), float(other[COLUMN])))
    context.keep("torchrun_seconds", time.monotonic() - begin)


def _refused(context: Context, words: list[str]) -> None:
    """More processes than GPUs: one message, soon, and no hang."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", "-m", "distillbench"]
    begin = time.monotonic()
    words = [word for word in words if not word.startswith("isolate")]
    code = context.run(*_command(context, context.folder / "refused", "a", *words, device="cuda"), before=launch)
    seconds = time.monotonic() - begin
    figure = f"exit code {code} after {seconds:.0f} s"
    what, advice = "two processes of one training on one GPU", "it ran: their seconds are not those of two GPUs"
    context.say(verdicts.judge(code != 0, "look", what, figure, "refused in words", advice))
