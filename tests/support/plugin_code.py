"""Source code of plugins: IMPORTS with METHOD and METRIC, and three methods that end in different ways."""

IMPORTS = """
from dataclasses import dataclass
import numpy
from distillbench import Dataset, DatasetConfig, Method, MethodConfig, Metric, TeacherConfig, TeacherSource, hookimpl
"""
METHOD = """
class Mine(Method):
    "My method."
    name, paper, needs_data = "mine", "none", False
    Config = MethodConfig

    def train_step(self, batch):
        yield self.student, batch.noise().mean()

    def sample(self, noise, nfe, c):
        return noise(0)

@hookimpl(api=2)
def register_methods(register):
    register(Mine)
"""
METRIC = """
class Score(Metric):
    name, unit, direction, protocol = "score", "none", "lower", "score/1"

    def score(self, samples):
        return 0.0

@hookimpl(api=2)
def register_metrics(register):
    register(Score)
"""

FINE_DIES_SLOW = """
import os, time
import torch
from distillbench import Method, MethodConfig, hookimpl


class Fine(Method):
    "One step."
    name, paper, needs_data = "fine", "none", False
    Config = MethodConfig

    def at_T(self, eps):
        return torch.full((len(eps), 1, 1, 1), self.teacher.schedule.t_max, dtype=torch.float64)

    def train_step(self, batch):
        eps = batch.noise()
        yield self.student, (self.student(eps, self.at_T(eps)) - eps).square().mean()

    def sample(self, noise, nfe, c):
        return self.student(noise(0), self.at_T(noise(0)))


class Dies(Fine):
    "Aborts in its third step."
    name = "dies"
    steps = 0

    def after_step(self):
        self.steps += 1
        if self.steps == 3:
            print("so long", flush=True)
            os.abort()


class Slow(Fine):
    "Takes its time."
    name = "slow"

    def after_step(self):
        time.sleep(0.05)


@hookimpl(api=2)
def register_methods(register):
    for cls in (Fine, Dies, Slow):
        register(cls)
"""
