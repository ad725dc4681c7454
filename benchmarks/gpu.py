"""A test of this project on a GPU: one command, at most 25 minutes, with a verdict on each measurement.

    python benchmarks/gpu.py                          # on cuda:0, all steps
    python benchmarks/gpu.py --device cuda:1 --only runs resume
    python benchmarks/gpu.py --skip oom energy --minutes 10
    python benchmarks/gpu.py --rehearse               # on the CPU, tiny: tries the script, not a GPU

Each step runs in a separate process with a time limit: a crash, a hang or a lack of memory affects only that step.
After each step a JSON file and a page are written again, so that a kill loses at most the current step. They are named
by the time of the run and go to results/gpu/DEVICE, or to the folder of --output. Steps that no longer fit into
--minutes are reported as not run. This process never uses the GPU. Exit code 1 if a verdict is "wrong".

docs/gpu.md says what each step means and what to do about it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "plugins")]  # a clone that is not installed

from gpu_steps import verdicts  # noqa: E402
from gpu_steps.context import path_of_python  # noqa: E402
from gpu_steps.page import page, summary  # noqa: E402
from gpu_steps.verdicts import Verdict  # noqa: E402

from distillbench._version import __version__  # noqa: E402

MOST_MINUTES = 25.0
REHEARSAL = 300.0  # seconds of a step that is rehearsed, on machines that are slow or do other work
LEAST_SHARE = 0.3  # of a step's limit, without which it is not begun
LOG = 4000  # characters of a step's log that the JSON keeps where something is not ok


@dataclass(frozen=True)
class Kind:
    """A step: seconds that it may take on a GPU, and what it is in a few words."""

    name: str
    seconds: float
    about: str


STEPS = (
    Kind("environment", 60, "doctor's checks of the device, NVML, MIG, compute mode, variables"),
    Kind("limits", 45, "products and copies beside the data sheet; clocks"),
    Kind("precision", 60, "errors of fp32, tf32, fp16, bf16 against float64"),
    Kind("runs", 240, "all methods by the command line on CUDA and CPU; a second process in the same folder"),
    Kind("resume", 240, "SIGTERM in the middle, and the same command again"),
    Kind("waits", 150, "operations that wait for the device between log steps, and kernels a step"),
    Kind("speed-fp32", 120, "step times of a U-Net of 34 M parameters, all methods"),
    Kind("speed-bf16", 75, "the same under autocast"),
    Kind("speed-tf32", 75, "the same with TF32"),
    Kind("loop", 150, "the harness's loop beside bare loops"),
    Kind("graphs", 75, "CUDA graphs: equal samples, latencies, captures"),
    Kind("memory", 40, "torch's allocator beside NVML, peaks of a cell"),
    Kind("energy", 50, "the counter of joules beside power over time"),
    Kind("oom", 120, "a batch that does not fit, then one that does; on_oom=accumulate"),
    Kind("together", 120, "two commands in one folder; torchrun"),
    Kind("bits", 75, "the same training twice"),
    Kind("bits-deterministic", 60, "the same with compute.deterministic=true"),
    Kind("speed-compile", 240, "step times with bf16 and compile=blocks"),
    Kind("speed-channels_last", 75, "step times with bf16 and channels_last"),
    Kind("speed-recompute", 75, "step times with bf16 and recompute"),
    Kind("sampling", 75, "samples a second beside a bare loop"),
    Kind("scoring", 90, "features a second, Fréchet and kernel distance, precision, density"),
)  # in the order in which they matter
NAMES = [kind.name for kind in STEPS]


class Run:
    """All steps of one call, and the two files with their results."""

    def __init__(self, device: str, mode: str, output: Path, minutes: float, batch: int, patience: float = 1.0) -> None:
        self.device, self.mode, self.minutes, self.batch = device, mode, minutes, batch
        self.patience = patience  # times the limit of a step
        self.begin, now = time.monotonic(), datetime.now(UTC)
        output.mkdir(parents=True, exist_ok=True)
        self.files = [output / f"{now:%Y-%m-%dT%H%M%S}{ending}" for ending in (".json", ".md")]
        self.report: dict[str, Any] = {
            "format": 1, "mode": mode, "device": device, "date": f"{now:%Y-%m-%d}", "commit": commit(), "minutes": 0.0,
            "steps": {},
        }  # fmt: skip

    @property
    def left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.begin)

    def write(self) -> None:
        """Write both files atomically."""
        self.report["minutes"] = (time.monotonic() - self.begin) / 60
        for path, text in zip(self.files, (json.dumps(self.report, indent=1), page(self.report)), strict=True):
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_text(text)
            temporary.replace(path)

    def all(self, kinds: Sequence[Kind], scratch: Path) -> None:
        for kind in kinds:
            limit = self.patience * kind.seconds if self.mode == "gpu" else REHEARSAL
            print(f"\n{kind.name}: {kind.about} (at most {min(limit, max(self.left, 0)):.0f} s)", flush=True)
            if self.left < LEAST_SHARE * limit:
                self._end(kind.name, "not run: no time was left", 0.0, [], {}, "")
                continue
            self._step(kind.name, min(limit, self.left), scratch / kind.name)
            self.write()
        self._compare()
        self.write()

    def _end(self, name: str, end: str, seconds: float, found: list[dict], data: dict[str, Any], log: str) -> None:
        if end != "done":
            level: verdicts.Level = "skipped" if end.startswith("not run") else "wrong"
            found.append(asdict(Verdict(level, name, end, "", "" if level == "skipped" else "see its log in the JSON")))
            show(found[-1])
        step = {"end": end, "seconds": seconds, "verdicts": found, "data": data}
        if any(verdict["level"] in ("look", "wrong") for verdict in found):
            step["log"] = log
        self.report["steps"][name] = step

    def _step(self, name: str, limit: float, folder: Path) -> None:
        """Run one step in a separate process and print its verdicts as they arrive."""
        folder.mkdir(parents=True)
        lines, log, order = (folder / file for file in ("lines.jsonl", "log.txt", "order.json"))
        lines.touch()
        earlier = {step: found["data"] for step, found in self.report["steps"].items()}
        words = {"step": name, "device": self.device, "small": self.mode != "gpu", "folder": str(folder)}
        words |= {"output": str(lines), "seconds": limit, "batch": self.batch, "earlier": earlier}
        order.write_text(json.dumps(words | {"simulated": self.mode == "simulated"}))
        begin, end = time.monotonic(), "done"
        found: list[dict] = []
        data: dict[str, Any] = {}
        with log.open("w") as written, lines.open() as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpu_steps.child", str(order)],
                stdout=written, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(name, folder),
                start_new_session=True,
            )  # fmt: skip
            try:
                while True:
                    ended = process.poll() is not None
                    for line in _whole_lines(told):
                        if "verdict" in line:
                            found.append(line["verdict"])
                            show(line["verdict"])
                        else:
                            data[line["name"]] = line["value"]
                    if ended:
                        break
                    if time.monotonic() - begin > limit:
                        end = f"killed after {limit:.0f} s"
                        break
                    time.sleep(0.1)
            except KeyboardInterrupt:
                self._end(name, "not run to its end: stopped", time.monotonic() - begin, found, data, "")
                raise
            finally:
                kill_tree(process)
        if end == "done" and process.returncode:
            code = process.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            end = f"its process died ({how})"
        plain = without_paths(log.read_text(errors="replace"), folder)[-LOG:]
        self._end(name, end, time.monotonic() - begin, found, data, plain)

    def _compare(self) -> None:
        """Compare settings, over the methods that were measured in all of them."""
        steps = self.report["steps"]
        times = {
            name.removeprefix("speed-"): step["data"]["steps"]
            for name, step in steps.items()
            if "steps" in step["data"]
        }
        both = set.intersection(*(set(found) for found in times.values())) if times else set()
        if len(times) < 2 or not both or self.mode != "gpu":
            return
        mean = lambda name, what: verdicts.geometric_mean([times[name][method][what] for method in both])
        about = steps.get("environment", {}).get("data", {}).get("about", {})
        tensor_cores = float(about.get("capability", "8.0")) >= 8.0
        ms, peaks = ({name: mean(name, what) for name in times} for what in ("median_ms", "peak_mib"))
        print("\nsettings", flush=True)
        found = [asdict(verdict) for verdict in verdicts.judge_settings(ms, peaks, tensor_cores)]
        for verdict in found:
            show(verdict)
        self._end("settings", "done", 0.0, found, {"methods": sorted(both), "ms": ms, "peak_mib": peaks}, "")


def _whole_lines(file: Any) -> Iterator[dict[str, Any]]:
    """The complete lines that were written since the last call."""
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield json.loads(line)


def show(verdict: dict[str, str]) -> None:
    expected = f"; expected: {verdict['expected']}" if verdict["expected"] else ""
    level = "not run" if verdict["level"] == "skipped" else verdict["level"]
    print(f"  {level:8}{verdict['what']}: {verdict['figure']}{expected}", flush=True)
    if verdict["advice"] and verdict["level"] != "ok":
        print(f"          {verdict['advice']}", flush=True)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End a step's process and all that it started, also in other sessions."""
    try:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def without_paths(text: str, scratch: Path) -> str:
    """A log without the names of folders on this machine."""
    for folder, word in ((str(scratch), "SCRATCH"), (str(ROOT), "."), (sys.prefix, "PYTHON"), (str(Path.home()), "~")):
        text = text.replace(folder, word) if len(folder) > 1 else text
    return text


def commit() -> str:
    """The commit of the checkout; "" if git does not know it."""
    try:
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(step: str, scratch: Path) -> dict[str, str]:
    """Of the steps' processes: this checkout's code and, where it is not installed, its entry points."""
    paths = path_of_python()
    try:
        importlib.metadata.distribution("distillbench")
    except importlib.metadata.PackageNotFoundError:
        paths = os.pathsep.join([paths, str(entry_points(scratch.parent / "entry_points"))])
    own = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if step == "bits-deterministic":
        own["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once, when cuBLAS starts; torch demands it
    return os.environ | own


def entry_points(folder: Path) -> Path:
    """A folder that, on Python's path, makes a clone's plugins known as if it were installed."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    about = folder / f"distillbench-{__version__}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: distillbench\nVersion: {__version__}\n"
    (about / "METADATA").write_text(metadata + "".join(f"Requires-Dist: {need}\n" for need in project["dependencies"]))
    lines = (f"{name} = {value}\n" for name, value in project["entry-points"]["distillbench"].items())
    (about / "entry_points.txt").write_text("[distillbench]\n" + "".join(lines))
    return folder


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[Kind]:
    """Steps by name; `speed` stands for all of its settings."""
    meant = lambda kind, words: any(kind.name == word or kind.name.startswith(f"{word}-") for word in words)
    return [kind for kind in STEPS if (not only or meant(kind, only)) and not meant(kind, skip)]


def name_of(device: str) -> str:
    """Of the GPU, asked in another process; "" where torch finds none."""
    code = f"import torch; print(torch.cuda.get_device_name({device!r}) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines and not done.returncode else ""


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    possible = sorted({*NAMES, "speed"})
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=possible,
        default=[],
        metavar="STEP",
        help="these alone, with three times the time for each: " + ", ".join(NAMES),
    )
    parser.add_argument(
        "--skip", nargs="+", choices=possible, default=[], metavar="STEP", help="`speed` is all of speed-*"
    )
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES, help="of all steps together, on a GPU")
    parser.add_argument("--batch", type=int, default=0, help="of the U-Net; 0: 256, less on GPUs of less than 39 GiB")
    parser.add_argument("--output", type=Path, help="folder of the two files; default: results/gpu/DEVICE")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--rehearse", action="store_true", help="on the CPU, everything tiny")
    where.add_argument(
        "--simulated", action="store_true", help="the same on a simulated GPU: the code for CUDA, on a CPU"
    )
    given = parser.parse_args(words)
    if not re.fullmatch(r"cuda(:\d+)?", given.device):
        parser.error(f"--device {given.device}: possible are cuda and cuda:N; on the CPU use --rehearse")
    device, mode, name = given.device, "gpu", ""
    if given.rehearse:
        device, mode, name = "cpu", "rehearsal", "rehearsal"
    elif given.simulated:
        if importlib.util.find_spec("distillbench.simulated_cuda") is None:
            parser.error("--simulated: this version of distillbench has no simulated GPU")
        device, mode, name = "cuda", "simulated", "simulated"
    name = name or name_of(device)
    if not name:
        print(f"torch finds no GPU {device}: see `distillbench doctor`. On the CPU: --rehearse", file=sys.stderr)
        raise SystemExit(2)
    folder = given.output or ROOT / "results" / "gpu" / re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    minutes = given.minutes if mode == "gpu" else REHEARSAL * len(STEPS) / 60
    run = Run(device, mode, folder, minutes, given.batch, 3.0 if given.only else 1.0)
    signal.signal(signal.SIGTERM, _told_to_stop)
    print(f"{name}; {run.files[1]}")
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as scratch:
        try:
            run.all(chosen(given.only, given.skip), Path(scratch))
        except KeyboardInterrupt:
            run.write()
            print(f"\nstopped; what was found: {run.files[1]}", file=sys.stderr)
            raise SystemExit(130) from None
    print(f"\n{summary(run.report)}\n{run.files[0]}\n{run.files[1]}")
    raise SystemExit(any(v["level"] == "wrong" for step in run.report["steps"].values() for v in step["verdicts"]))


def _told_to_stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
