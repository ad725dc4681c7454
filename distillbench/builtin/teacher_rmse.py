"""Distance to the teacher's many-step answer to the same noise."""

from __future__ import annotations

from distillbench import Metric, Samples, Unavailable, hookimpl


class TeacherRmse(Metric):
    """Root of the mean squared difference over all images, channels and pixels, images clipped to [-1, 1]."""

    name = "teacher_rmse"
    unit = "pixel values in [-1, 1]"
    direction = "lower"
    protocol = "teacher_rmse/1: root mean square over images and pixels, both clipped to [-1, 1], not quantised"

    def score(self, samples: Samples) -> float:
        if not samples.keeps_noise:
            raise Unavailable("these samples add fresh noise, so they are not answers to the teacher's noise")
        return (samples.x_0 - samples.teacher_x_0).double().square().mean().sqrt().item()


@hookimpl
def register_metrics(register) -> None:
    register(TeacherRmse)
