"""Small trainings: every method with settings that take seconds, and a toy method whose weight has a closed form."""

from __future__ import annotations

import torch
from torch import nn

import distillbench_boot
import distillbench_cm
import distillbench_ct
import distillbench_ctm
import distillbench_direct
import distillbench_dmd
import distillbench_ect
import distillbench_imm
import distillbench_lcm
import distillbench_meanflow
import distillbench_moment
import distillbench_pd
import distillbench_reflow
import distillbench_scm
import distillbench_sid
import distillbench_tract
from analytic import gaussian_teacher, mlp_teacher
from distillbench.system.progress import Step
from distillbench.training.method import Method, MethodConfig, Phase
from distillbench.training.optimizer_config import OptimizerConfig

SILENT = Step(lambda fraction, note: None)

# name of a case: its method and settings
METHODS = {
    "boot": (distillbench_boot.Boot, {"steps": 4}),
    "cm": (distillbench_cm.ConsistencyDistillation, {"steps": 9, "mu": 0.5}),
    "cm, mu 0": (distillbench_cm.ConsistencyDistillation, {"steps": 9, "mu": 0.0}),
    "ct": (distillbench_ct.ConsistencyTraining, {"start": "teacher"}),
    "ctm": (distillbench_ctm.ConsistencyTrajectory, {"steps": 9, "solver_steps": 2}),
    "direct": (distillbench_direct.Direct, {"steps": 4, "pairs": 12, "held_out": 6, "checks": 4}),
    "direct online": (distillbench_direct.Direct, {"steps": 4, "online": True}),
    "lcm": (distillbench_lcm.LatentConsistency, {"steps": 8, "mu": 0.5}),
    "ect": (distillbench_ect.EasyConsistencyTuning, {"stages": 2}),
    "ect from the teacher": (distillbench_ect.EasyConsistencyTuning, {"source": "teacher"}),
    "imm": (distillbench_imm.InductiveMomentMatching, {"group_size": 2}),
    "dmd": (distillbench_dmd.DistributionMatching, {"fake_updates": 2, "levels": [80.0, 1.0]}),
    "meanflow": (distillbench_meanflow.MeanFlow, {}),
    "moment": (distillbench_moment.MomentMatching, {"steps": 1}),  # these tests sample in one step
    "pd": (distillbench_pd.ProgressiveDistillation, {"steps": 4}),
    "reflow": (distillbench_reflow.Reflow, {"steps": 4, "pairs": 12, "distil_share": 0.5, "distil_pairs": "own"}),
    "scm": (distillbench_scm.ContinuousConsistency, {"warmup": 10}),
    "sid": (distillbench_sid.ScoreIdentityDistillation, {"fake_updates": 2}),
    "tract": (distillbench_tract.Tract, {"steps": [4, 2, 1]}),
}


class Weight(nn.Module):
    """A network with one weight."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value))


class Ramp(Method):
    """loss = -sign(step) w + extra_loss(step), in the given phases; `diary` lists the calls of hooks."""

    name, paper, needs_data, Config = "ramp", "", False, MethodConfig

    def __init__(self, phases=None, sign=lambda step: 1.0, extra_loss=lambda step: 0.0) -> None:
        super().__init__(MethodConfig(), gaussian_teacher())
        self.student = Weight()
        self.list, self.sign, self.extra_loss = phases or [Phase()], sign, extra_loss
        self.diary, self.sizes, self.path, self.averages = [], [], [], []

    def phases(self):
        return self.list

    def prepare(self, workspace):
        self.diary.append("prepare")

    def start_phase(self, index):
        self.diary.append(f"start {index}")

    def train_step(self, batch):
        step = len(self.sizes)
        self.sizes.append(batch.size)
        self.diary.append("step")
        yield self.student, -self.sign(step) * self.student.w + self.extra_loss(step)
        self.path.append(self.student.w.item())

    def after_step(self):
        self.diary.append("after")

    def end_phase(self, index, average):
        self.diary.append(f"end {index}")
        self.averages.append((average is self.student, average.w.item()))

    def sample(self, noise, nfe, c):
        raise NotImplementedError

    @property
    def moves(self) -> list[float]:
        return [b - a for a, b in zip([0.0, *self.path], self.path, strict=False)]


def optimizer(**changes) -> OptimizerConfig:
    plain = {"lr": 0.5, "lr_warmup": 0.0, "lr_decay": "constant", "ema_halflife_kimg": 0.0}
    return OptimizerConfig(**plain | changes)


# --- methods on mlp_teacher, with checkpoints ------------------------------------------------------------------------

IMAGES, BATCH = 480, 24  # of a training, of a step
FRACTIONS = (0.25, 0.5, 0.75)  # of the budget, after which there is a checkpoint
NFE = (1, 2, 4)
HALFLIFE = 0.05  # of the average, in 1000 images: long enough for it to differ from the student


def averaged_method(name: str) -> Method:
    """A method of METHODS on mlp_teacher, with random numbers of seed 3 and an average of weights."""
    cls, settings = METHODS[name]
    torch.manual_seed(3)
    return cls(cls.Config(**settings | {"ema_halflife_kimg": HALFLIFE}), mlp_teacher())
