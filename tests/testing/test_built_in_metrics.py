"""The built-in metrics pass the conformance checks."""

import pytest

from distillbench.builtin.efficientnet_lite0 import EfficientNetLite0
from distillbench.registry import load_registry
from distillbench.testing import check_class, metrics
from distillbench.testing.conformance import SUITES
from faults import failed

METRICS = load_registry().metrics
CHECKS = [check.name for check in SUITES["metrics"].checks]
HERE = sorted(name for name in METRICS if not METRICS[name].cls.network or name.endswith("efficientnet_lite0"))
NEED_MORE_IMAGES = ("fd_infinity_efficientnet_lite0", "kd_efficientnet_lite0")


@pytest.fixture(scope="module")
def few_images():
    """A quarter of the images, and of the time, for all metrics."""
    caches = [metrics.images, metrics.extracted]
    for cache in caches:
        cache.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "IMAGES", 32)
        patch.setattr(EfficientNetLite0, "batch", 32)
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("name", HERE)
def test_built_in_metrics_conform(few_images, name):
    found = check_class(METRICS[name].cls)
    assert not failed(found) and [finding.check for finding in found] == CHECKS
    applies = {finding.check: finding.ok for finding in found}
    assert applies["scores"] is (None if name in NEED_MORE_IMAGES else True)
