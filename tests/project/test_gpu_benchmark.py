"""benchmarks/gpu.py: its verdicts on given values, its files, and that a failing step does not stop the others.

What it measures on a GPU cannot be tried here; `--rehearse` runs the same steps on the CPU.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
from gpu_steps import verdicts  # noqa: E402
from gpu_steps.clocks import Sampled  # noqa: E402
from gpu_steps.context import Context, NotRun  # noqa: E402
from gpu_steps.page import page, summary  # noqa: E402
from gpu_steps.runs import weights_apart  # noqa: E402
from gpu_steps.verdicts import Verdict  # noqa: E402
from gpu_steps.waits import waits_seen  # noqa: E402

H200 = verdicts.PEAKS["H200"]


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A10", 125),
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364),
    ],
)  # fmt: skip
def test_the_peak_of_a_device_is_that_of_its_data_sheet(name, bf16):
    assert verdicts.peak_of(name).of("bf16") == bf16


def test_other_devices_and_slices_have_no_data_sheet():
    """The name of an A100 contains that of an A10, and the name of a slice that of its board."""
    unknown = ("NVIDIA GeForce RTX 5090", "AMD Instinct MI300X", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu")
    assert [verdicts.peak_of(name) for name in unknown] == [None] * 4
    assert verdicts.peak_of("NVIDIA A100-SXM4-40GB").memory == 1555


def test_data_sheets_are_consistent():
    """More for less precision; and copies of an image bound a step below its products, or neither has the unit."""
    for peak in verdicts.PEAKS.values():
        known = [value for value in (peak.fp32, peak.tf32, peak.bf16) if value is not None]
        assert known == sorted(known) and 100 < peak.memory < 10_000


# verdict, its level
CASES = {
    "near the data sheet": (verdicts.judge_limit("x", 790, 989, "TFLOP/s", (0.6, 0.4)), "ok"),
    "half of it": (verdicts.judge_limit("x", 500, 989, "TFLOP/s", (0.6, 0.4)), "look"),
    "more than it": (verdicts.judge_limit("x", 1100, 989, "TFLOP/s", (0.6, 0.4)), "look"),
    "no data sheet": (verdicts.judge_limit("x", 1100, None, "TFLOP/s", (0.6, 0.4)), "ok"),
    "float32": (verdicts.judge_precision("fp32", 6e-7), "ok"),
    "TF32 where float32 was asked for": (verdicts.judge_precision("fp32", 4e-4), "wrong"),
    "TF32 that is off": (verdicts.judge_precision("tf32", 6e-7), "look"),
    "bfloat16": (verdicts.judge_precision("bf16", 1e-2), "ok"),
    "not a number": (verdicts.judge_precision("bf16", float("nan")), "wrong"),
    "equal counts": (verdicts.judge_counts("boot", {"train_images": 2000}, {"train_images": 2000}), "ok"),
    "other counts": (verdicts.judge_counts("boot", {"train_images": 2000}, {"train_images": 1999}), "wrong"),
    "a count that is missing": (verdicts.judge_counts("boot", {}, {"train_images": 1999}), "wrong"),
    "no counts": (verdicts.judge_counts("boot", {}, {}), "wrong"),
    "the teacher's score": (verdicts.judge_teacher_score("fd", 627.4865, 627.4861), "ok"),
    "the teacher's score, near": (verdicts.judge_teacher_score("fd", 630.0, 627.5), "look"),
    "the teacher's score, off": (verdicts.judge_teacher_score("fd", 700.0, 627.5), "wrong"),
    "the teacher's score, none": (verdicts.judge_teacher_score("fd", float("nan"), 627.5), "wrong"),
    "students of other seeds": (verdicts.judge_student_score("boot", [1700, 1750, 1800], [1690, 1780, 1720]), "ok"),
    "students of another kind": (verdicts.judge_student_score("boot", [4000, 4050, 4010], [1690, 1780, 1720]), "wrong"),
    "all rows": (verdicts.judge_rows("x", ["ok", "ok"], ["", ""], 2), "ok"),
    "a row that failed": (verdicts.judge_rows("x", ["ok", "failed"], ["", "mixed devices"], 2), "wrong"),
    "a row that is missing": (verdicts.judge_rows("x", ["ok"], [""], 2), "wrong"),
    "found again": (verdicts.judge_found("x", [], 0), "ok"),
    "trained again": (verdicts.judge_found("x", [], 1), "wrong"),
    "a reference made again": (verdicts.judge_found("x", ["a.npz"], 0), "wrong"),
    "the same bits": (verdicts.judge_weights("x", 0.0, True, must=True), "ok"),
    "other bits, which must not be": (verdicts.judge_weights("x", 1e-9, False, must=True), "wrong"),
    "other bits, which may be": (verdicts.judge_weights("x", 1e-6, False, must=False), "ok"),
    "other weights": (verdicts.judge_weights("x", 0.5, False, must=False), "wrong"),
    "cut off": (verdicts.judge_interrupted(143, 7, 7), "ok"),
    "cut off when it was done": (verdicts.judge_interrupted(143, 0, 7), "look"),
    "ended otherwise": (verdicts.judge_interrupted(1, 7, 7), "wrong"),
    "out of memory": (verdicts.judge_memory_error(["oom", "ok"]), "ok"),
    "out of memory, taken for a failure": (verdicts.judge_memory_error(["failed", "ok"]), "wrong"),
    "out of memory, and so is the next": (verdicts.judge_memory_error(["oom", "oom"]), "wrong"),
    "in parts": (verdicts.judge_parts("ok", 8), "ok"),
    "not in parts": (verdicts.judge_parts("oom", 8), "wrong"),
    "no waits": (verdicts.judge_waits("x", {}, 46), "ok"),
    "a wait": (verdicts.judge_waits("x", {"train.py:3": 1}, 46), "look"),
    "a wait a step": (verdicts.judge_waits("x", {"data_stream.py:80": 46}, 46), "wrong"),
    "a steady step": (verdicts.judge_step("x", [50.0] * 12, 50.0, 0.4, 54.0), "ok"),
    "a step faster than the device": (verdicts.judge_step("x", [1.0] * 12, 1.0, 2.0, 54.0), "wrong"),
    "a step far from the roofline": (verdicts.judge_step("x", [150.0] * 12, 150.0, 0.1, 54.0), "look"),
    "a step that does too little": (verdicts.judge_step("x", [10.0] * 12, 10.0, 0.9, 54.0), "look"),
    "events that do not enclose the work": (verdicts.judge_step("x", [10.0] * 12, 50.0, 0.4, 10.0), "look"),
    "steps that slow down": (verdicts.judge_step("x", [50.0] * 6 + [70.0] * 6, 60.0, 0.4, 54.0), "look"),
    "a ratio": (verdicts.judge_ratio("x", 1.02, 1.0, 1.05), "ok"),
    "a loop that costs": (verdicts.judge_ratio("x", 1.2, 1.1, 1.3), "look"),
    "a capture for each shape": (verdicts.judge_captures(2, 2), "ok"),
    "a capture for each row": (verdicts.judge_captures(6, 2), "look"),
    "equal samples": (verdicts.judge_equal("x", 0.0, 0.0), "ok"),
    "other samples": (verdicts.judge_equal("x", 1e-6, 0.0), "wrong"),
    "samples that are no numbers": (verdicts.judge_equal("x", float("nan"), 1.0), "wrong"),
    "what was taken": (verdicts.judge_allocation("x", 1024, 1026, 64), "ok"),
    "the gauge of another GPU": (verdicts.judge_allocation("x", 1024, 0, 64), "wrong"),
    "somebody else's memory": (verdicts.judge_allocation("x", 1024, 3000, 64), "look"),
    "joules that agree": (verdicts.judge_energy("x", 6900, 7000, 700, 10), "ok"),
    "joules that lag": (verdicts.judge_energy("x", 5600, 7000, 700, 10), "look"),
    "joules of something else": (verdicts.judge_energy("x", 1000, 7000, 700, 10), "wrong"),
    "more watts than the limit": (verdicts.judge_energy("x", 14000, 14000, 700, 10), "wrong"),
    "load": (verdicts.judge_load(100, 650), "ok"),
    "no load": (verdicts.judge_load(100, 101), "wrong"),
    "variables": (verdicts.judge_variables({"OMP_NUM_THREADS": "1", "CUDA_LAUNCH_BLOCKING": "0"}), "ok"),
    "a variable that makes every launch wait": (verdicts.judge_variables({"CUDA_LAUNCH_BLOCKING": "1"}), "look"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_verdict(case):
    verdict, level = CASES[case]
    assert verdict.level == level
    assert verdict.figure and (verdict.advice or level == "ok")


def moment(mhz=1900, throttle=0, celsius=50, watts=600):
    return {"sm_mhz": mhz, "throttle": throttle, "celsius": celsius, "watts": watts}


def test_clocks_are_held_down_by_heat_but_may_be_by_the_power_cap():
    assert verdicts.judge_clocks([moment(), moment(throttle=0x4)]).level == "ok"
    assert verdicts.judge_clocks([moment(), moment(throttle=0x44)]).level == "look"
    assert "heat" in verdicts.judge_clocks([moment(throttle=0x20)]).figure
    assert verdicts.judge_clocks([moment(), moment(1200)]).level == "look"
    assert verdicts.judge_clocks([]).level == "skipped"


def test_the_roofline_is_that_of_the_review():
    """Direct distillation on an H200 at batch 256: 11.64 TFLOP a step, 29 + 25 ms in bf16 and 290 ms in float32."""
    bf16 = verdicts.roofline_ms(11.64, 0, 256, "bf16", H200.bf16, H200.memory)
    fp32 = verdicts.roofline_ms(11.64, 0, 256, "fp32", H200.fp32, H200.memory)
    assert bf16 == pytest.approx(29 + 25, rel=0.1) and fp32 == pytest.approx(290, rel=0.05)


def test_settings_are_compared():
    ms = {"fp32": 290.0, "tf32": 75.0, "bf16": 54.0, "compile": 60.0}
    found = {
        verdict.what: verdict.level for verdict in verdicts.judge_settings(ms, {"bf16": 100.0, "recompute": 60.0}, True)
    }
    assert found == {
        "tf32 beside fp32": "ok", "bf16 beside fp32": "ok", "compile beside bf16": "look",
        "recompute beside bf16": "ok",
    }  # fmt: skip
    assert list(verdicts.judge_settings({"fp32": 1.0, "bf16": 2.0}, {}, tensor_cores=False)) == []


def test_power_is_integrated_over_time():
    """100 W for one second, then 300 W for another; samples at both ends are missing."""
    sampled = Sampled(lambda: 0.0)
    sampled.seen = [(0.1, 100.0), (1.0, 100.0), (1.0, 300.0), (1.9, 300.0), (5.0, 9.0)]
    assert sampled.integral(0.0, 2.0) == pytest.approx(400.0)


def test_waits_are_counted_by_their_warnings_and_nothing_else(monkeypatch):
    """torch warns of each wait, and once of the mode itself, but not of calls of synchronize."""
    mode = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda to: warnings.warn(mode, stacklevel=1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    with waits_seen("cuda") as seen:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (function x)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        torch.cuda.synchronize()
    assert sum(seen.values()) == 4


def test_weights_are_compared_by_norm_and_bit_by_bit():
    a = {"w": torch.tensor([3.0, 4.0])}
    assert weights_apart(a, {"w": torch.tensor([3.0, 4.0])}) == (0.0, True)
    apart, equal = weights_apart({"w": torch.tensor([3.0, 4.5])}, a)
    assert apart == pytest.approx(0.5 / 5) and not equal
    assert weights_apart(a, {}) == (float("inf"), False)


# --- the command -----------------------------------------------------------------------------------------------------


def context_in(folder, seconds=100.0):
    return Context("cpu", True, folder, folder / "lines", seconds)


def lines(folder):
    return [json.loads(line)["verdict"] for line in (folder / "lines").read_text().splitlines()]


def test_an_error_in_a_part_of_a_step_is_a_verdict(tmp_path):
    context = context_in(tmp_path)
    with context.attempt("first"):
        raise RuntimeError("CUDA error\nsecond line")
    with context.attempt("second"):
        raise NotRun("no such units")
    context.say(Verdict("ok", "third", "fine"))
    assert [(v["what"], v["level"]) for v in lines(tmp_path)] == [
        ("first", "wrong"),
        ("second", "skipped"),
        ("third", "ok"),
    ]
    assert lines(tmp_path)[0]["figure"] == "RuntimeError: CUDA error"
    with pytest.raises(NotRun):
        context_in(tmp_path, seconds=0.1).need(5)


def test_steps_are_chosen_by_name():
    names = lambda only, skip: [kind.name for kind in gpu.chosen(only, skip)]
    assert names([], []) == gpu.NAMES and len(set(gpu.NAMES)) == len(gpu.NAMES)
    assert names(["waits", "speed"], ["speed-compile"]) == [
        n for n in gpu.NAMES if n == "waits" or (n.startswith("speed-") and n != "speed-compile")
    ]


def test_every_step_has_a_function():
    from gpu_steps.child import function_of

    assert all(callable(function_of(name)) for name in gpu.NAMES)


FAKE = """
import json, os, sys, time
order = json.loads(open(sys.argv[1]).read())
say = lambda **about: open(order["output"], "a").write(json.dumps(about) + "\\n")
say(verdict={"level": "ok", "what": "begun", "figure": "1", "expected": "", "advice": ""})
say(name="about", value={"device": "NVIDIA Made Up", "capability": "9.0"})
print("in", os.getcwd(), flush=True)
if order["step"] == "limits":
    os.abort()
if order["step"] == "precision":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    say(name="child", value=child.pid)
    time.sleep(600)
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Steps that print a word and then crash, hang or end, instead of the real ones."""
    (tmp_path / "gpu_steps").mkdir()
    (tmp_path / "gpu_steps" / "__init__.py").touch()
    (tmp_path / "gpu_steps" / "child.py").write_text(FAKE)
    monkeypatch.setattr(gpu, "environment", lambda step, scratch: os.environ | {"PYTHONPATH": str(tmp_path)})
    return gpu.Run("cuda", "gpu", tmp_path / "out", 25.0, 0)


@pytest.mark.nightly
def test_a_step_that_crashes_or_hangs_does_not_stop_the_others(fake, tmp_path, capsys):
    kinds = [gpu.Kind(name, 4.0, name) for name in ("environment", "limits", "precision", "runs")]
    fake.all(kinds, tmp_path / "scratch")
    report = json.loads(fake.files[0].read_text())
    ends = {name: step["end"] for name, step in report["steps"].items()}
    assert ends["environment"] == ends["runs"] == "done"
    assert ends["limits"] == "its process died (SIGABRT)" and ends["precision"] == "killed after 4 s"
    assert [v["level"] for v in report["steps"]["limits"]["verdicts"]] == ["ok", "wrong"]
    assert "log" in report["steps"]["limits"] and "log" not in report["steps"]["runs"]
    assert str(gpu.ROOT) not in fake.files[0].read_text()
    assert gone(report["steps"]["precision"]["data"]["child"])
    text = fake.files[1].read_text()
    assert text.startswith("# NVIDIA Made Up\n") and "rehearsal" not in text and summary(report) in text
    assert summary(report) == "4 ok, 0 look, 2 wrong, 0 not run"
    assert "killed after 4 s" in capsys.readouterr().out


def gone(pid):
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_steps_beyond_the_time_limit_are_reported_as_skipped(fake, tmp_path):
    fake.minutes = 0.01
    fake.all([gpu.Kind("runs", 100.0, "runs"), gpu.Kind("bits", 100.0, "bits")], tmp_path / "scratch")
    report = json.loads(fake.files[0].read_text())
    assert {v["level"] for step in report["steps"].values() for v in step["verdicts"]} == {"skipped"}
    assert summary(report) == "0 ok, 0 look, 0 wrong, 2 not run"


def test_a_page_can_be_rendered_from_any_report():
    verdict = {"level": "look", "what": "a|b", "figure": "1\n2", "expected": "", "advice": "x"}
    row = {"median_ms": 54.0, "images_per_second": 4740.0, "share": 0.22, "predicted_ms": None, "peak_mib": None}
    steps = {
        "speed-bf16": {
            "end": "done",
            "seconds": 3.0,
            "verdicts": [verdict],
            "data": {"batch": 256, "steps": {"ct": row}},
        }
    }
    text = page({"mode": "simulated", "device": "cuda", "date": "2026-01-01", "minutes": 1.0, "steps": steps})
    assert "a&#124;b" in text and "| 1 2 " in text and "**look**" in text and "rehearsal (simulated)" in text
    assert "Batch 256" in text and "4,740" in text and "22%" in text


def test_a_clone_that_is_not_installed_has_its_plugins(tmp_path):
    """Its entry points are read from pyproject.toml."""
    folder = gpu.entry_points(tmp_path)
    code = "from importlib.metadata import *; print(version('distillbench'), *sorted(e.name for e in "
    code += "distribution('distillbench').entry_points))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"boot", "digits", "trained"} <= set(done.stdout.split())


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--only", "nothing"], ["--rehearse", "--simulated"]])
def test_invalid_arguments_are_errors(words, capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(words)
    assert end.value.code == 2 and "usage" in capsys.readouterr().err


def test_without_a_gpu_there_is_a_message(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "name_of", lambda device: "")
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2 and "torch finds no GPU" in capsys.readouterr().err


def rehearsed(tmp_path, *names):
    with pytest.raises(SystemExit) as end:
        gpu.main(["--rehearse", "--output", str(tmp_path), "--only", *names])
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    wrong = [(v, report["steps"]) for s in report["steps"].values() for v in s["verdicts"] if v["level"] == "wrong"]
    assert end.value.code == 0 and not wrong, wrong
    assert all(step["end"] == "done" for step in report["steps"].values())
    return report["steps"]


@pytest.mark.nightly
def test_a_rehearsal(tmp_path):
    """Steps that take less than about ten seconds."""
    steps = rehearsed(tmp_path, "precision", "speed-bf16")
    assert [v["level"] for v in steps["precision"]["verdicts"]] == ["ok", "skipped", "ok", "ok"]
    assert steps["speed-bf16"]["data"]["steps"].keys() == {"direct", "ct"}


@pytest.mark.slow
@pytest.mark.nightly
def test_a_rehearsal_of_the_other_steps(tmp_path):
    """Steps that run the command line, and steps that measure many pairs."""
    names = "environment", "limits", "runs", "resume", "waits", "loop", "bits", "sampling", "scoring"
    steps = rehearsed(tmp_path, *names)
    cut = next(v for v in steps["resume"]["verdicts"] if v["what"] == "SIGTERM in the middle")
    assert cut["level"] == "ok", cut
    assert any(v["what"].startswith("a second process") and v["level"] == "ok" for v in steps["runs"]["verdicts"])
