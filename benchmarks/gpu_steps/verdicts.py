"""The verdicts of benchmarks/gpu.py on measured values: functions of plain numbers, which need no GPU.

ok: as expected. look: must be explained before a figure is used. wrong: the project or the machine gives wrong
results. skipped: not run, and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "look", "wrong", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """One line: the measurement, its figure, what was expected, and what to do if it is not ok."""

    level: Level
    what: str
    figure: str
    expected: str = ""
    advice: str = ""


def judge(good: bool, otherwise: Level, what: str, figure: str, expected: str = "", advice: str = "") -> Verdict:
    """ok, or `otherwise` with advice."""
    return Verdict("ok" if good else otherwise, what, figure, expected, "" if good else advice)


def unjudged(verdict: Verdict) -> Verdict:
    """The verdict in a rehearsal, whose times mean nothing."""
    return Verdict("ok", verdict.what, verdict.figure, "not judged in a rehearsal")


# --- what a device can do --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Dense peaks of a data sheet: TFLOP/s of products (None: no such units) and GB/s of memory."""

    fp32: float
    tf32: float | None
    bf16: float | None
    memory: float

    def of(self, precision: str) -> float | None:
        return {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16}[precision]


# The first name that a device's name contains counts: longer names come first. Vendors' data sheets, without sparsity;
# of GeForce, products that add up in float32.
PEAKS: dict[str, Peak] = {
    "B200": Peak(75.0, 1100.0, 2250.0, 7700.0),
    "GH200": Peak(67.0, 495.0, 989.0, 4000.0),
    "H200": Peak(67.0, 495.0, 989.0, 4800.0),
    "H100 PCIe": Peak(51.0, 378.0, 756.0, 2000.0),
    "H100 NVL": Peak(60.0, 418.0, 835.0, 3900.0),
    "H100": Peak(67.0, 495.0, 989.0, 3350.0),
    "A100-SXM4-80GB": Peak(19.5, 156.0, 312.0, 2039.0),
    "A100 80GB": Peak(19.5, 156.0, 312.0, 1935.0),
    "A100": Peak(19.5, 156.0, 312.0, 1555.0),
    "A10G": Peak(31.2, 35.0, 70.0, 600.0),
    "A10": Peak(31.2, 62.5, 125.0, 600.0),
    "A40": Peak(37.4, 74.8, 149.7, 696.0),
    "L40S": Peak(91.6, 183.0, 362.0, 864.0),
    "L4": Peak(30.3, 60.0, 121.0, 300.0),
    "RTX 6000 Ada": Peak(91.1, 182.0, 364.0, 960.0),
    "RTX A6000": Peak(38.7, 77.4, 154.8, 768.0),
    "RTX 4090": Peak(82.6, 82.6, 165.2, 1008.0),
    "RTX 3090": Peak(35.6, 35.6, 71.0, 936.0),
    "V100": Peak(15.7, None, None, 900.0),
    "T4": Peak(8.1, None, None, 320.0),
}
LIMITS_REACHED = (
    0.6,
    0.4,
)  # of a data sheet's peak: from the first on ok, below the second the figures are not the GPU's
COPIES_REACHED = 0.7, 0.4


def peak_of(name: str) -> Peak | None:
    """Of the device that torch calls `name`; None where it is not in the table, or a MIG slice."""
    plain = name.lower()
    if "mig" in plain.split():
        return None
    return next((peak for part, peak in PEAKS.items() if _is_in(part.lower(), plain)), None)


def _is_in(part: str, name: str) -> bool:
    """Whether all words of `part` are words of `name`: "a100" is in "nvidia a100-sxm4-40gb", and "a10" is not."""
    words = name.replace("-", " ").split()
    return all(word in words for word in part.replace("-", " ").split())


def judge_limit(what: str, reached: float, peak: float | None, unit: str, levels: tuple[float, float]) -> Verdict:
    """A bare limit beside the data sheet."""
    figure = f"{reached:,.4g} {unit}"
    if peak is None:
        return Verdict("ok", what, figure, "no data sheet of this device is in gpu_steps/verdicts.py")
    share, expected = reached / peak, f"from {levels[0]:.0%} of the data sheet's {peak:,.4g} {unit} on"
    figure += f", {share:.0%} of its data sheet"
    if share > 1.05:
        return Verdict("look", what, figure, expected, "more than there is: the table or the timing is wrong")
    if share < levels[0]:
        advice = "another process, a power limit or heat: nvidia-smi -q -d PERFORMANCE,CLOCK,POWER"
        advice += ". Below " + f"{levels[1]:.0%} no time of this page counts" if share < levels[1] else ""
        return Verdict("look", what, figure, expected, advice)
    return Verdict("ok", what, figure, expected)


THROTTLES = {  # of NVML's clocks event reasons
    0x04: "power cap", 0x08: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)",
    0x80: "power brake",
}  # fmt: skip
HARMLESS = ("power cap",)  # the usual state of a large GPU under full load


def throttles(bits: int) -> list[str]:
    """Why clocks are low, in words."""
    return [words for bit, words in THROTTLES.items() if bits & bit]


def judge_clocks(seen: Sequence[Mapping[str, float]]) -> Verdict:
    """`seen`: clock (MHz), temperature (degrees), watts and the bits of what held it down, at several times."""
    if not seen:
        return Verdict("skipped", "clocks under load", "NVML does not tell", "", "times may be of a throttled GPU")
    mhz = [moment["sm_mhz"] for moment in seen]
    reasons = sorted({words for moment in seen for words in throttles(int(moment["throttle"]))})
    figure = f"{min(mhz):,.0f} to {max(mhz):,.0f} MHz, up to {max(m['celsius'] for m in seen):.0f} degrees, "
    figure += f"{max(m['watts'] for m in seen):.0f} W; held down by: {', '.join(reasons) or 'nothing'}"
    expected = "nothing but a power cap, clocks within 15 %"
    bad = [words for words in reasons if words not in HARMLESS]
    if bad:
        return Verdict("look", "clocks under load", figure, expected, "cool it, or repeat: these times are too long")
    if min(mhz) < 0.85 * max(mhz):
        return Verdict("look", "clocks under load", figure, expected, "repeat, with clocks locked if you may")
    return Verdict("ok", "clocks under load", figure, expected)


def judge_variables(variables: Mapping[str, str]) -> Verdict:
    """Of the environment, those that change results or times."""
    shown = ", ".join(f"{name}={value}" for name, value in sorted(variables.items())) or "none"
    bad = [f"{name}={value}" for name, value in variables.items() if name in BAD and value not in ("", "0")]
    if bad:
        return Verdict(
            "look", "environment variables", shown, "none of these", "; ".join(BAD[b.split("=")[0]] for b in bad)
        )
    return Verdict("ok", "environment variables", shown)


BAD = {
    "CUDA_LAUNCH_BLOCKING": "CUDA_LAUNCH_BLOCKING waits after every kernel: no time here counts. Unset it",
    "NVIDIA_TF32_OVERRIDE": "NVIDIA_TF32_OVERRIDE changes precision behind torch. Unset it",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "PYTORCH_NO_CUDA_MEMORY_CACHING makes every allocation wait. Unset it",
}

# --- precision -------------------------------------------------------------------------------------------------------

# Relative root-mean-square error of a network's answer against float64: 2^-24 per rounding in float32, 2^-11 of the
# factors in TF32 and fp16, 2^-8 in bf16; sums of rounding errors over some hundred layers. Each range is 30 times wide
# to both sides of the middle, and they are far enough apart to tell float32 from TF32.
ERRORS = {"fp32": (1e-9, 2e-5), "tf32": (5e-5, 5e-2), "fp16": (5e-5, 5e-2), "bf16": (5e-4, 2e-1)}


def judge_precision(precision: str, error: float) -> Verdict:
    """Whether a network is computed in the precision that was asked for."""
    low, high = ERRORS[precision]
    what, figure, expected = f"{precision}: error of a U-Net", f"{error:.1e}", f"{low:.0e} to {high:.0e}"
    if not math.isfinite(error) or error > high:
        return Verdict("wrong", what, figure, expected, "it is computed with less precision than was asked for")
    if error < low:
        return Verdict("look", what, figure, expected, "the setting does nothing here: the answer is more precise")
    return Verdict("ok", what, figure, expected)


# --- the command line ------------------------------------------------------------------------------------------------

TEACHER_TOLERANCE = 1e-3  # relative
FLOOR = 0.02  # relative, of a student's score


def judge_counts(method: str, cuda: Mapping[str, int], cpu: Mapping[str, int]) -> Verdict:
    """What was counted in training, on both devices: the same numbers."""
    apart = {name: (cuda.get(name), cpu.get(name)) for name in cpu if cuda.get(name) != cpu.get(name)}
    what = f"{method}: counts on CUDA and CPU"
    if apart or not cpu:
        told = ", ".join(f"{name} {a} and {b}" for name, (a, b) in apart.items()) or "nothing was counted"
        return Verdict("wrong", what, told, "equal", "the cost of training depends on the device: report it")
    return Verdict("ok", what, ", ".join(f"{name} {value:,}" for name, value in cpu.items()), "equal")


def judge_teacher_score(column: str, cuda: float, cpu: float) -> Verdict:
    """The teacher's score: the same weights and, by counter-based generators, the same noise on both devices.

    What differs is rounding of float32 (1e-6 an image after some dozen steps), which moves a few of the 8-bit pixels by
    one level: a thousandth of a Fréchet distance is far above that, and far below what TF32 (5e-4 a product) moves.
    """
    off = abs(cuda - cpu) / max(abs(cpu), 1e-12)
    what, figure = f"teacher: {column} on CUDA and CPU", f"{cuda:.6g} and {cpu:.6g}, {off:.1e} apart"
    expected = f"at most {TEACHER_TOLERANCE:g} of the value"
    if not off <= TEACHER_TOLERANCE:
        level: Level = "wrong" if not off <= 10 * TEACHER_TOLERANCE else "look"
        return Verdict(level, what, figure, expected, "sampling or scoring differs: see the step `precision`")
    return Verdict("ok", what, figure, expected)


def judge_student_score(name: str, cuda: Sequence[float], cpu: Sequence[float]) -> Verdict:
    """A student's scores of some training seeds on either device.

    The noise of training is drawn on the device, and CUDA's generator is another one: students differ as those of two
    seeds do. So the difference of the means is held to 6 standard errors of the seeds (a t of 4 degrees of freedom
    exceeds that once in 250 times by chance), but not to less than 2 % of the value.
    """
    mean_a, mean_b = math.fsum(cuda) / len(cuda), math.fsum(cpu) / len(cpu)
    degrees = len(cuda) + len(cpu) - 2
    squares = sum((x - mean_a) ** 2 for x in cuda) + sum((x - mean_b) ** 2 for x in cpu)
    error = math.sqrt(squares / max(degrees, 1) * (1 / len(cuda) + 1 / len(cpu)))
    allowed, off = max(6 * error, FLOOR * abs(mean_b)), abs(mean_a - mean_b)
    what = f"{name}: mean of {len(cpu)} seeds on CUDA and CPU"
    figure, expected = f"{mean_a:.5g} and {mean_b:.5g}", f"at most {allowed:.3g} apart, of the spread over seeds"
    if not off <= allowed:
        level: Level = "wrong" if not off <= 2 * allowed else "look"
        return Verdict(level, what, figure, expected, "train longer on both devices before it is believed or dismissed")
    return Verdict("ok", what, figure, expected)


def judge_rows(what: str, statuses: Sequence[str], reasons: Sequence[str], count: int) -> Verdict:
    """Rows of a table: as many as there should be, all of them ok."""
    bad = [f"{status}: {reason}" for status, reason in zip(statuses, reasons, strict=True) if status != "ok"]
    figure = f"{len(statuses) - len(bad)} of {len(statuses)} rows are ok"
    if bad or len(statuses) < count:
        advice = "; ".join(dict.fromkeys(bad))[:400] or "rows are missing: see the step's log"
        return Verdict("wrong", what, figure, f"{count} rows", advice)
    return Verdict("ok", what, figure)


def judge_found(what: str, changed: Sequence[str], made: int) -> Verdict:
    """A second process: nothing that the first made may be made again. `made`: students trained by the second."""
    figure = f"{made} students trained again, {len(changed)} files of the first written again"
    if changed or made:
        return Verdict("wrong", what, figure, "0 and 0", f"what is kept was not found: {', '.join(changed[:3])}")
    return Verdict("ok", what, figure, "0 and 0")


def judge_weights(what: str, apart: float, equal: bool, must: bool, allowed: float = 1e-3) -> Verdict:
    """Weights of two trainings that should be the same. `apart`: rms difference over rms weight."""
    figure = "equal to the bit" if equal else f"{apart:.1e} apart"
    if must:
        level: Level = "ok" if equal else "wrong"
        return Verdict(
            level, what, figure, "equal to the bit", "" if equal else "determinism does not hold here: report it"
        )
    if not apart <= allowed:
        advice = "more than rounding grows to in so few steps: see the step `bits`"
        return Verdict(
            "wrong" if not apart <= 30 * allowed else "look", what, figure, f"at most {allowed:g} apart", advice
        )
    return Verdict("ok", what, figure, f"at most {allowed:g} apart")


def judge_interrupted(code: int, cut: int, count: int) -> Verdict:
    """Trainings that SIGTERM should have cut off in the middle. `cut`: those that left a state and no result."""
    what, figure = "SIGTERM in the middle", f"exit code {code}, {cut} of {count} trainings cut off with a state kept"
    if code != 143:
        return Verdict("wrong", what, figure, "exit code 143", "see the step's log")
    if cut == 0:
        return Verdict("look", what, figure, "all of them", "they were done before, or had not begun: repeat it alone")
    return Verdict("ok" if cut == count else "look", what, figure, "all of them")


def judge_memory_error(statuses: Sequence[str]) -> Verdict:
    """Statuses of the cell that does not fit and of the next one, which does."""
    figure, expected = ", ".join(statuses) or "no rows", "oom, then ok"
    if list(statuses) == ["oom", "ok"]:
        return Verdict("ok", "a batch that does not fit, then one that does", figure, expected)
    advice = "an out-of-memory error was taken for something else, or hurt the next cell"
    return Verdict("wrong", "a batch that does not fit, then one that does", figure, expected, advice)


def judge_parts(status: str, parts: int) -> Verdict:
    """The same batch with on_oom=accumulate."""
    what, figure = "on_oom=accumulate", f"{status} in {parts} parts"
    if status == "ok" and parts > 1:
        return Verdict("ok", what, figure, "ok in 2 parts or more")
    return Verdict("wrong", what, figure, "ok in 2 parts or more", "memory of the failed attempt may not be given back")


# --- steps of training -----------------------------------------------------------------------------------------------


def judge_waits(what: str, places: Mapping[str, int], steps: int) -> Verdict:
    """`places`: file:line of each wait for the device in `steps` steps without a log step, and how often."""
    total = sum(places.values())
    figure = f"{total} waits in {steps} steps"
    if not total:
        return Verdict("ok", what, figure, "0")
    told = ", ".join(f"{place} ({count}x)" for place, count in sorted(places.items(), key=lambda p: -p[1])[:4])
    return Verdict("wrong" if total >= steps else "look", what, figure, "0", told)


SHARES = {"fp32": 0.65, "tf32": 0.45, "bf16": 0.40}  # of the peak that convolutions are assumed to reach
MEMORY_SHARE = 0.75
TRAFFIC = 0.15e9, 0.35e9  # bytes an image: forward, and with backward, of element-wise work and norms of the U-Net


def roofline_ms(tflop: float, forward: int, both: int, precision: str, tflops: float, gbytes: float) -> float:
    """Milliseconds of a step: products, and memory traffic that does not overlap with them.

    `forward` and `both` are images that go through the U-Net without and with a backward pass. Norms and activations
    stay in float32 under autocast; one cast more is 10 %.
    """
    traffic = (forward * TRAFFIC[0] + both * TRAFFIC[1]) * (1.1 if precision == "bf16" else 1.0)
    return 1e3 * (tflop / (tflops * SHARES[precision]) + traffic / (gbytes * 1e9 * MEMORY_SHARE))


def judge_step(what: str, times: Sequence[float], wall: float, share: float | None, predicted: float | None) -> Verdict:
    """`times`: milliseconds of each step by events; `wall`: of one by the clock; `share` of the device's peak."""
    ordered = sorted(times)
    middle = ordered[len(ordered) // 2]
    figure = f"{middle:.2f} ms ({ordered[0]:.2f} to {ordered[-1]:.2f})"
    figure += "" if share is None else f", {share:.0%} of the peak"
    expected = "" if predicted is None else f"{predicted:.1f} ms by the roofline"
    problems = []
    if share is not None and share > 1:
        advice = "faster than the device can be: the work is not done within the timed stretch"
        return Verdict("wrong", what, figure, expected, advice)
    if abs(wall - math.fsum(times) / len(times)) > 0.1 * wall:
        problems.append(f"the clock says {wall:.2f} ms: events do not enclose all of the work")
    third = max(1, len(times) // 3)
    if len(times) >= 6 and math.fsum(times[-third:]) > 1.15 * math.fsum(times[:third]):
        problems.append("the last third is 15 % slower than the first: heat, or memory that grows")
    if predicted is not None and middle > 2 * predicted:
        problems.append("more than twice the roofline: profile it")
    if predicted is not None and middle < 0.4 * predicted:
        problems.append("far faster than the roofline: is all of the work done?")
    return Verdict("look" if problems else "ok", what, figure, expected, "; ".join(problems))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


# setting, beside which one, at least so many times as fast
GAINS = (("tf32", "fp32", 1.3), ("bf16", "fp32", 1.5), ("compile", "bf16", 1.0), ("channels_last", "bf16", 0.9))


def judge_settings(ms: Mapping[str, float], peaks: Mapping[str, float], tensor_cores: bool) -> Iterator[Verdict]:
    """Settings beside each other: geometric means over methods of milliseconds a step, peaks of memory in MiB."""
    for setting, beside, least in GAINS:
        if setting not in ms or beside not in ms or (not tensor_cores and setting != "channels_last"):
            continue
        gain = ms[beside] / ms[setting]
        level: Level = "ok" if gain >= least else "look"
        advice = "" if gain >= least else "this setting does not pay here, or is not on"
        yield Verdict(level, f"{setting} beside {beside}", f"{gain:.2f} times as fast", f"{least:g} or more", advice)
    if "recompute" in peaks and "bf16" in peaks:
        share = peaks["recompute"] / peaks["bf16"]
        level = "ok" if share < 0.9 else "look"
        advice = "" if share < 0.9 else "recompute=true saves no memory here"
        yield Verdict(level, "recompute beside bf16", f"{share:.0%} of the peak of memory", "below 90 %", advice)


def judge_ratio(what: str, value: float, low: float, high: float, allowed: float = 1.03) -> Verdict:
    """Seconds of the harness over those of a bare loop, with an interval."""
    figure, expected = f"{value:.3f} ({low:.3f} to {high:.3f})", f"at most {allowed:g}"
    if low > allowed:
        return Verdict("look", what, figure, expected, "the harness costs more than it may at this size: profile it")
    return Verdict("ok", what, figure, expected)


# --- sampling, memory, energy ----------------------------------------------------------------------------------------


def judge_captures(captures: int, shapes: int) -> Verdict:
    what, figure = "CUDA graphs of three rows", f"{captures} captures"
    level: Level = "ok" if captures <= shapes else "look"
    return Verdict(
        level, what, figure, f"at most {shapes}, one a shape", "" if level == "ok" else "captured anew for every row"
    )


def judge_equal(what: str, apart: float, allowed: float) -> Verdict:
    figure, expected = f"{apart:.1e} apart", "equal" if not allowed else f"at most {allowed:.0e}"
    level: Level = "ok" if apart <= allowed else "wrong"
    return Verdict(
        level, what, figure, expected, "" if level == "ok" else "the same work gives other numbers: report it"
    )


def judge_allocation(what: str, asked: float, seen: float, slack: float) -> Verdict:
    """MiB that were taken, and by how much a gauge rose; what the allocator had kept before may be a little of it."""
    least = 0.96 * asked - 1
    figure, expected = f"{seen:,.1f} MiB", f"{asked:,.0f} MiB, {slack:,.0f} more at most"
    if least <= seen <= asked + slack:
        return Verdict("ok", what, figure, expected)
    advice = "another process, or the gauge of another GPU: NVML's handle may not be torch's device"
    return Verdict("wrong" if seen < least else "look", what, figure, expected, advice)


def judge_energy(what: str, counter: float, integral: float, limit: float | None, seconds: float) -> Verdict:
    """Joules by the counter and by power that was read over and over, in `seconds`; `limit` in watts."""
    off = abs(counter - integral) / max(integral, 1e-9)
    figure = f"{counter:,.0f} J by the counter, {integral:,.0f} J by power ({counter / seconds:,.0f} W)"
    expected = "within 10 % of each other"
    if limit is not None and counter / seconds > 1.2 * limit:
        return Verdict("wrong", what, figure, f"below the limit of {limit:,.0f} W", "the counter is not this GPU's")
    if off > 0.1:
        advice = "power of some GPUs is a mean over a second; beyond 30 % do not use train_joules"
        return Verdict("wrong" if off > 0.3 else "look", what, figure, expected, advice)
    return Verdict("ok", what, figure, expected)


def judge_load(idle: float, load: float) -> Verdict:
    """Watts at rest and under load."""
    what, figure, expected = "power under load", f"{load:,.0f} W, {idle:,.0f} W at rest", "at least 1.5 times"
    if load < 1.5 * idle:
        return Verdict("wrong", what, figure, expected, "the counter does not see this GPU's work")
    return Verdict("ok", what, figure, expected)
