"""Names of columns and methods for people: from the declarations that a run keeps in its columns.json.

Files and the command line have the raw names, such as ``fd_efficientnet_lite0``. Tables and figures have labels, which
metrics, feature networks, methods and samplers declare; a report has none of these at hand, so a run keeps them. What a
run does not name, such as a run of an earlier version, has its raw name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distillbench.records.statistics import ARROWS

NAMES = ("label", "title")  # declarations of a score or a method that only name it: they change no value
METHOD = "method"  # the entry of columns.json that names methods; no metric can have this name


@dataclass(frozen=True)
class Label:
    """The name of a column or a method. `unit` and `arrow` are "" if it has none."""

    short: str  # as in a table: "FD (EffNet-Lite0)"
    long: str = ""  # in full: "Fréchet distance of EfficientNet-Lite0 features"
    unit: str = ""  # "squared feature distance"
    arrow: str = ""  # "↓": lower is better, "↑": higher is better

    @property
    def heading(self) -> str:
        """In one line, such as "training time (s) ↓"."""
        return f"{self.short}{f' ({self.unit})' if self.unit else ''} {self.arrow}".rstrip()


# Columns other than scores: short name, what it is, unit. docs/columns.md defines them.
_COLUMNS: dict[str, tuple[str, str, str]] = {
    "run": ("run", "the run's folder", ""),
    "dataset": ("dataset", "the images", ""),
    "teacher": ("teacher", "the teacher's name and the first digits of its hash", ""),
    "guidance": ("guidance", "weight of the teacher's classifier-free guidance; 1 is without guidance", ""),
    "method": ("method", "the student's method; teacher:SAMPLER is the teacher itself", ""),
    "settings": ("settings", "the method's settings that differ from its defaults", ""),
    "inputs": ("trained on", "what the student was trained on: data, noise, rollout or pairs", ""),
    "training_seed": ("training seed", "seed of the student's training", ""),
    "sampling_seed": ("sampling seed", "seed of the noise that was sampled from", ""),
    "training_seeds": ("training seeds", "number of students that were trained", ""),
    "sampling_seeds": ("sampling seeds", "number of noise seeds that each student was sampled with", ""),
    "nfe": ("NFE", "network evaluations per image", ""),
    "images": ("images", "number of samples that were scored", ""),
    "budget": ("budget", "the limit of a training, and its batch size", ""),
    "protocol": ("protocol", "the first digits of a hash of how scores were computed", ""),
    "status": ("status", "whether all seeds have scores", ""),
    "reason": ("reason", "why a row is not ok; why a value is empty", ""),
    "note": ("note", "remark on a row that is ok, such as an unstable sampler", ""),
    "compute": ("computed in", "precision and other compute settings of training and of sampling", ""),
    "reference": ("reference", "the real images that scores compare with", ""),
    "device": ("device", "kind and model of the processor", ""),
    "key": ("record", "key of the row's record in cells/", ""),
    "parameters": ("parameters", "numbers in the weights of the student", ""),
    "trained_parameters": ("trained parameters", "numbers in the weights that were trained", ""),
    "student_lora_rank": ("LoRA rank", "rank of the student's adapters", ""),
    "student_architecture": ("architecture", "the student's network, if it is not the teacher's", ""),
    "clipped_steps": ("clipped updates", "updates whose gradients had a norm above grad_clip", ""),
    "nonfinite_steps": ("updates not finite", "updates whose gradients were not finite", ""),
    "machine_load_training": (
        "load while training",
        "processor time of other processes while training, as a fraction of all cores",
        "",
    ),
    "machine_load_sampling": (
        "load while timing",
        "processor time of other processes while sampling was timed, as a fraction of all cores",
        "",
    ),
    "tuning": ("tuning", "how the method's settings were found: equal_trials, self_tuned or defaults (no search)", ""),
    "tuning_trials": ("trials", "trials of the search for the method's settings, those that failed included", ""),
    "tuning_images": ("search: images", "images that all these trials trained on", ""),
    "tuning_seconds": ("search: time", "training time of all these trials", "s"),
    "tuning_joules": ("search: energy", "energy of all these trials", "J"),
    "tuning_sampling_nfe": ("search: sampling NFE", "evaluations in the search of settings of sampling", ""),
    "fraction": ("fraction of the budget", "progress of training", ""),
}
_COSTS: dict[str, tuple[str, str, str]] = {
    "sample_latency_p50_ms": ("latency p50", "median time to sample one image", "ms"),
    "sample_latency_p95_ms": ("latency p95", "95th percentile of the time to sample one image", "ms"),
    "sample_images_per_second": ("throughput", "highest throughput over batch sizes", "images/s"),
    "sample_best_batch": ("best batch", "batch size with the highest throughput", "images"),
    "sample_gflops": ("FLOPs per image", "floating-point operations to sample one image", "GFLOP"),
    "sample_decoder_latency_ms": (
        "decoder",
        "time of the teacher's latent decoder for one image; not part of the latency",
        "ms",
    ),
    "sample_text_encoder_latency_ms": ("text encoder", "time of the text encoder; not part of the latency", "ms"),
    "sample_peak_gpu_mib": ("sampling: GPU peak", "peak memory of tensors while sampling", "MiB"),
    "sample_peak_gpu_reserved_mib": (
        "sampling: GPU reserved",
        "peak memory of torch's allocator while sampling",
        "MiB",
    ),
    "sample_peak_device_mib": (
        "sampling: device peak",
        "peak memory in use on the device, minus that before sampling",
        "MiB",
    ),
    "sample_peak_rss_mib": ("sampling: resident peak", "peak resident memory of the sampling process", "MiB"),
    "train_images": ("training images", "images consumed by training steps", ""),
    "train_seconds": ("training time", "wall-clock time of training, without evaluation and writing files", "s"),
    "train_teacher_seconds": ("training: teacher", "part of it: forward passes of the teacher", "s"),
    "train_student_seconds": ("training: student", "part of it: the student's passes and optimizer steps", "s"),
    "train_compile_seconds": ("training: compiler", "part of it: torch's compiler", "s"),
    "train_other_seconds": ("training: rest", "part of it: data, noise, targets, averaging", "s"),
    "train_teacher_nfe": ("teacher evaluations", "images that the teacher evaluated in training", ""),
    "train_student_nfe": ("student evaluations", "images that the student evaluated in training", ""),
    "train_tflops": (
        "training FLOPs",
        "floating-point operations of the networks, forward and backward",
        "TFLOP",
    ),
    "train_joules": ("training energy", "energy of the whole GPU", "J"),
    "train_peak_gpu_mib": ("training: GPU peak", "peak memory of tensors while training", "MiB"),
    "train_peak_gpu_reserved_mib": (
        "training: GPU reserved",
        "peak memory of torch's allocator while training",
        "MiB",
    ),
    "train_peak_device_mib": (
        "training: device peak",
        "peak memory in use on the device by all processes",
        "MiB",
    ),
    "train_peak_rss_mib": ("training: resident peak", "peak resident memory of the training process", "MiB"),
}
_HIGHER = ("sample_images_per_second",)  # costs of which more is better
_NEITHER = ("sample_best_batch",)

COLUMNS: dict[str, Label] = {name: Label(*words) for name, words in _COLUMNS.items()} | {
    name: Label(*words, arrow="" if name in _NEITHER else ARROWS["higher" if name in _HIGHER else "lower"])
    for name, words in _COSTS.items()
}


@dataclass(frozen=True)
class Labels:
    """The labels of one or several runs."""

    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the declarations of each score
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # `label` and `title` of each method

    @classmethod
    def of(cls, every: Iterable[Labels]) -> Labels:
        """The labels of several runs. Where they name something differently, the first one counts."""
        columns: dict[str, Mapping[str, Any]] = {}
        methods: dict[str, Mapping[str, Any]] = {}
        for one in every:
            for known, new in ((columns, one.columns), (methods, one.methods)):
                for name, facts in new.items():
                    if name not in known or (facts.get("label") and not known[name].get("label")):
                        known[name] = facts
        return cls(columns, methods)

    @property
    def directions(self) -> dict[str, str]:
        """By score: lower, higher or none."""
        return {name: str(facts["direction"]) for name, facts in self.columns.items()}

    def label(self, column: str) -> Label:
        """The label of a column: a score, a cost, or what describes a row."""
        facts = self.columns.get(column)
        if facts is None:
            return COLUMNS.get(column, Label(column, column))
        short = str(facts.get("label") or column)
        arrow = ARROWS.get(str(facts.get("direction")), "")
        return Label(short, str(facts.get("title") or short), str(facts.get("unit") or ""), arrow)

    def method_label(self, name: str) -> Label:
        """The label of a value of the column `method`: a method, or ``teacher:SAMPLER``."""
        facts = self.methods.get(name, {})
        short = str(facts.get("label") or name)
        return Label(short, str(facts.get("title") or short))
