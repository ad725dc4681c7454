"""The measure of the check `times`: the change of a network's output in time."""

import pytest

from distillbench.diffusion.schedules import SCHEDULES
from distillbench.networks import smooth_times
from distillbench.testing.bench_networks import USUALLY_COMPUTED, Computed
from distillbench.testing.method_bench import CONDITIONINGS, MethodBench
from distillbench.testing.methods_times import change_in_time
from distillbench_scm import ContinuousConsistency


def bench(computed: Computed = USUALLY_COMPUTED) -> MethodBench:
    return MethodBench("", ContinuousConsistency, None, CONDITIONINGS["unconditional"], 0, computed=computed)


def test_a_network_read_on_another_schedule_changes_as_on_its_own():
    denoiser = smooth_times(bench().teacher().student())
    own = change_in_time(denoiser, bench())
    assert change_in_time(denoiser.on(SCHEDULES["ve"]()), bench()) == pytest.approx(own, rel=0.5)  # other noise levels


def test_it_is_measured_in_float32_where_training_is_in_bf16():
    computed = bench(Computed("edm", "bf16"))
    measured = change_in_time(computed.method().student.denoiser, computed)
    plain = bench(Computed("edm"))
    assert measured == pytest.approx(change_in_time(plain.method().student.denoiser, plain), rel=1e-5)
