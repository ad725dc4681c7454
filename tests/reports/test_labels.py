"""Names for people: every score, method and sampler has one, a run keeps them, and an older run has raw names."""

import json

import pytest

from distillbench.diffusion.samplers import SAMPLERS, Solver
from distillbench.records.table import FIRST, LAST
from distillbench.registry import PluginError, check_class, load_registry
from distillbench.reports.labels import COLUMNS, Label, Labels
from distillbench.reports.runs import read_run

SCORE = {"unit": "u", "direction": "lower", "network": "", "needs": "", "protocol": "p/1"}


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def test_every_score_and_method_has_a_name_of_its_own(registry):
    for names in (
        [entry.cls.describe()["label"] for entry in registry.metrics.values()],
        [entry.cls.describe()["title"] for entry in registry.metrics.values()],
        [entry.cls.names()[0] for entry in registry.methods.values()],
    ):
        assert len(set(names)) == len(names) and not any("_" in name or "{" in name for name in names)
    facts = registry.metrics["fd_efficientnet_lite0"].cls.describe()
    assert facts["label"] == "FD (EffNet-Lite0)"
    assert facts["title"] == "Fréchet distance of EfficientNet-Lite0 features"
    assert registry.methods["pd"].cls.names() == ("PD", "progressive distillation")


def test_every_column_and_sampler_has_a_name():
    assert {*FIRST, *LAST} <= COLUMNS.keys()
    assert all(one.label for one in SAMPLERS.values())
    assert Solver.parse("heun/uniform").label == "Heun, uniform grid" and Solver.parse("ddim").label == "DDIM"


def test_what_declares_no_name_has_its_own_without_underscores(registry):
    method = type("Mine", (registry.methods["direct"].cls,), {"name": "my_method", "label": "", "title": ""})
    assert method.names() == ("my method", "my method")
    metric = type("Mine", (registry.metrics["spread"].cls,), {"name": "my_score", "label": "", "title": ""})
    assert metric.describe()["label"] == metric.describe()["title"] == "my score"
    with pytest.raises(PluginError, match=r"Mine does not declare label \(str\)"):
        check_class("methods", type("Mine", (registry.methods["direct"].cls,), {"name": "mine", "label": 3}))


def test_a_run_keeps_its_names_and_an_older_one_has_raw_names(tmp_path):
    declared = {"fid": SCORE | {"label": "FID", "title": "in full"}, "old": SCORE | {"direction": "higher"}}
    names = {"boot": {"label": "BOOT", "title": "BOOT in full"}}
    (tmp_path / "columns.json").write_text(json.dumps(declared | {"method": names}))
    labels = read_run(tmp_path).labels
    assert labels.label("fid") == Label("FID", "in full", "u", "↓")
    assert labels.label("old") == Label("old", "old", "u", "↑")
    assert labels.label("train_seconds").heading == "training time (s) ↓"
    assert labels.method_label("boot") == Label("BOOT", "BOOT in full")
    assert labels.method_label("teacher:ddim") == Label("teacher:ddim", "teacher:ddim")
    older = Labels({"fid": SCORE}, {})
    assert Labels.of([older, labels]).label("fid").short == "FID"
    assert Labels.of([older]).method_label("boot").short == "boot"
