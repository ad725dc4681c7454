"""Words become typed settings, and whatever does not fit is one message that names the full setting."""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

import hydra
import pytest
import yaml
from omegaconf import MISSING

from distillbench.builtin.trained import Trained
from distillbench.errors import UserError
from distillbench.options import option, require_between, require_fraction, require_one_of, require_positive
from distillbench.registry import Entry, Plugin, load_registry
from distillbench.runs import config, overrides
from distillbench.runs.config import compose_runs, describe_options, to_yaml
from distillbench.runs.overrides import config_folder
from distillbench.training.method import MethodConfig
from shipped import METHODS as SHIPPED

GIVEN = ["methods=[boot]", "dataset=digits"]


@functools.cache
def compose_cached(name, *choices):
    return hydra.compose(name, list(choices))


@pytest.fixture
def composed_once(monkeypatch):
    """Cache what Hydra composes, which takes a tenth of a second each time."""
    monkeypatch.setattr(config, "compose", lambda name, choices: compose_cached(name, *choices))


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def with_method(registry, config_class):
    """`registry` with a method more, called "mine"."""
    cls = type("Mine", (), {"name": "mine", "Config": config_class})
    return dataclasses.replace(registry, methods=registry.methods | {"mine": Entry(cls, Plugin("mine", "x", "1"))})


def message(registry, *words):
    with pytest.raises(UserError) as caught:
        compose_runs(list(words), registry)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


# --- what is understood ----------------------------------------------------------------------------------------------


def test_settings_are_typed_and_have_defaults(registry):
    words = ["methods=[boot,cm]", "dataset=digits", "methods.boot.lr=3e-4", "budget.images=1_000", "teacher.width=32"]
    (run,) = compose_runs(words, registry)
    assert list(run.methods) == ["boot", "cm"]
    assert type(run.methods["boot"]) is registry.get("methods", "boot").cls.Config
    assert (run.methods["boot"].lr, run.budget.images, run.teacher.width) == (3e-4, 1000, 32)
    (plain,) = compose_runs(["methods=[boot,cm]", "dataset=digits"], registry)
    assert run.methods["cm"] == plain.methods["cm"] == registry.get("methods", "cm").cls.Config(kind="cm")
    assert (run.dataset.kind, run.teacher.kind) == ("digits", "trained")


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        (["seed=7"], [7]),
        (["seed=0,1,2"], [0, 1, 2]),
        (["seed=range(0,3)"], [0, 1, 2]),
        (["seed=choice(2,5)"], [2, 5]),
        (["seed=${batch_size}", "batch_size=9"], [9]),
        (["seed=1", "seed=2"], [2]),
    ],
)
def test_sweeps_become_a_grid(registry, words, seeds):
    assert [run.seed for run in compose_runs(GIVEN + words, registry)] == seeds


def test_a_grid_has_every_combination(registry):
    runs = compose_runs([*GIVEN, "seed=0,1", "methods.boot.lr=1e-3,2e-3", "budget.images=10,20"], registry)
    points = [(run.seed, run.methods["boot"].lr, run.budget.images) for run in runs]
    assert points == list(itertools.product([0, 1], [1e-3, 2e-3], [10, 20]))


@pytest.mark.parametrize(
    ("words", "methods"),
    [
        (["methods=[boot,cm]"], [["boot", "cm"]]),
        (["methods=[boot, cm]"], [["boot", "cm"]]),
        (["methods=boot"], [["boot"]]),
        (["methods=boot,cm"], [["boot"], ["cm"]]),
        (["methods=[boot],[cm,pd]"], [["boot"], ["cm", "pd"]]),
        (["methods=[boot,boot]"], [["boot"]]),
        (["methods=glob(*)"], [["boot"], ["cm"], ["direct"], ["pd"]]),
    ],
)
def test_methods_can_be_listed_and_swept(registry, words, methods):
    known = dataclasses.replace(registry, methods={n: registry.methods[n] for n in ("boot", "cm", "direct", "pd")})
    assert [list(run.methods) for run in compose_runs([*words, "dataset=digits"], known)] == methods


def test_datasets_can_be_swept(registry):
    runs = compose_runs(["methods=[boot]", "dataset=digits,folder"], registry)
    assert [run.dataset.kind for run in runs] == ["digits", "folder"]


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("text", ["a b/c", "ü/日本", "a=b", "it's", "#1", "[x]", "a,b"])
def test_any_path_can_be_quoted(registry, text):
    (run,) = compose_runs([*GIVEN, f'results_dir="{text}"'], registry)
    assert run.results_dir == text


def test_the_yaml_has_every_setting_and_is_plain(registry):
    (run,) = compose_runs([*GIVEN, "methods.boot.lr=0.5"], registry)
    assert yaml.safe_load(to_yaml(run)) == dataclasses.asdict(run) | {
        "budget": dataclasses.asdict(run.budget) | {"limit": "images"},
        "teacher": yaml.safe_load(to_yaml(run))["teacher"],
    }
    assert yaml.safe_load(to_yaml(run))["methods"]["boot"]["lr"] == 0.5


def test_the_defaults_of_every_registered_class_are_valid(registry):
    compose_runs([f"methods=[{','.join(registry.methods)}]", "dataset=digits"], registry)
    for name in registry.datasets:
        compose_runs(["methods=[boot]", f"dataset={name}"], registry)


def test_a_registry_does_not_affect_the_next(registry):
    compose_runs(["methods=[mine]", "dataset=digits"], with_method(registry, MethodConfig))
    assert message(registry, "methods=[mine]", "dataset=digits").startswith("no method 'mine'.")


# --- what is not -----------------------------------------------------------------------------------------------------

DATASETS = (
    "afhqv2, celebahq, cifar10, digits, fashion_mnist, ffhq, folder, gmm, imagenet64, lsun_bedroom, mnist, prompts"
)
TEACHERS = "consistency, deepfloyd, diffusers, edm, gaussian, gmm, stable_diffusion, trained"
METHODS = f"Possible: {', '.join(SHIPPED)}"
TOP = (
    "Possible: augment, batch_size, budget, cell_seconds, compute, conditional, dataset, device, energy, "
    "estimate_seconds, evaluation, executor, guidance, guidance_range, isolate, methods, microbatch, on_oom, "
    "results_dir, run_name, seed, states, student, teacher, threads"
)
NAMES = {
    "methods=[bot]": f"no method 'bot'. Did you mean 'boot'? {METHODS}",
    "methods=[boot,cmm]": f"no method 'cmm'. Did you mean 'cm'? {METHODS}",
    "methods=[Boot]": f"no method 'Boot'. Did you mean 'boot'? {METHODS}",
    "accumulate=4": "no setting 'accumulate': write microbatch=N, the most images that a process computes at once, ",
    "microbatch=-1": "microbatch must lie between 0 and 9223372036854775807, got -1",
    "methods=null": f"no method 'null'. {METHODS}",
    "methods=": f"no method ''. {METHODS}",
    "methods=[]": f"no method given. Write methods=[NAME,...]; p{METHODS[1:]}",
    "methods=[[boot]]": "no method \"['boot']\". Did you mean 'boot'? Possible: ",
    "dataset=digit": f"no dataset 'digit'. Did you mean 'digits'? Possible: {DATASETS}",
    "dataset=null": f"no dataset 'null'. Possible: {DATASETS}",
    "dataset=[digits,folder]": "dataset takes one name, got [digits,folder]. To sweep over several write dataset=",
    "teacher=traned": f"no teacher 'traned'. Did you mean 'trained'? Possible: {TEACHERS}",
    "experiment=smoek": "no experiment 'smoek'. Did you mean 'smoke'? Possible: boot_celebahq, ",
    "experiment=null": "no experiment 'null'. Possible: boot_celebahq, ",
    "experiment=../config": "no experiment '../config'. Possible: boot_celebahq, ",
    "sead=1": f"no setting 'sead'. Did you mean 'seed'? {TOP}, experiment",
    "experimnt=smoke": "no setting 'experimnt'. Did you mean 'experiment'? Possible: ",
    "hydra.run.dir=x": "no setting 'hydra'. Possible: ",
    "methods.boot.lrr=1": "no setting 'lrr' in 'methods.boot'. Did you mean 'lr'? Possible: ",
    "methods.cm.lr=1": "no setting 'methods.cm.lr': 'cm' is not among methods=[boot]",
    "methods.bot.lr=1": "no setting 'methods.bot.lr': 'bot' is not among methods=[boot]. Did you mean 'boot'?",
    "budget.image=1": "no setting 'image' in 'budget'. Did you mean 'images'? Possible: images, limit, nfe, seconds",
    "budget={image:1}": "no setting 'image' in 'budget'. Did you mean 'images'? Possible: images, limit, nfe, seconds",
    "evaluation.nfee=[1]": "no setting 'nfee' in 'evaluation'. Did you mean 'nfe'? Possible: ",
    "teacher.budget.image=1": "no setting 'image' in 'teacher.budget'. Did you mean 'images'? Possible: ",
    "teacher.optimizer.lrr=1": "no setting 'lrr' in 'teacher.optimizer'. Did you mean 'lr'? Possible: ",
    "dataset.path=x": "no setting 'path' in 'dataset' (dataset=digits). Possible: none",
    "seed.x=1": "no setting 'seed.x': 'seed' is a value, it has no settings below it",
    "evaluation.nfe.0=1": "no setting 'evaluation.nfe.0': 'evaluation.nfe' is a value, it has no settings below it",
    "dataset@x=digits": "no setting 'dataset@x': '@' has no meaning here",
}
GROUP = "a group of settings, to be changed one by one"
VALUES = {
    "seed=abc": "seed must be a whole number, got 'abc'",
    "seed=1.0": "seed must be a whole number, got '1.0'",
    "seed=": "seed must be a whole number, got ''",
    "seed=null": "seed must be a whole number, got 'null'",
    "seed=true": "seed must be a whole number, got 'true'",
    "seed=[0,1]": "seed must be a whole number, got '[0,1]'",
    "seed=0,abc": "seed must be a whole number, got 'abc'",
    "seed=-1": "seed must lie between 0 and 9223372036854775807, got -1",
    "seed=${nope}": "seed must be a whole number: Interpolation key 'nope' not found",
    "seed=${seed}": "seed must be a whole number: Recursive interpolation detected",
    "batch_size=0": "batch_size must be positive, got 0",
    "threads=0": "threads must lie between 1 and ",
    "threads=100000": "threads must lie between 1 and ",
    "device=null": "device must be text, got 'null'",
    "results_dir=": "results_dir must name a folder, got ''",
    "results_dir=[a]": "results_dir must be text, got '[a]'",
    "run_name=a/b": "run_name must be a plain folder name other than cells and cache, got 'a/b'",
    "run_name=..": "run_name must be a plain folder name other than cells and cache, got '..'",
    "run_name=cells": "run_name must be a plain folder name other than cells and cache, got 'cells'",
    "run_name=" + 300 * "x": "run_name must be a plain folder name other than cells and cache, got 'xxx",
    "budget.images=1.5": "budget.images must be a whole number, got '1.5'",
    "budget.images=0": "budget.images must be positive, got 0",
    "budget.images=-3": "budget.images must be positive, got -3",
    "budget.images=nan": "budget.images must be a whole number, got 'nan'",
    "budget.images=1" + 30 * "0": "budget.images must be below 2^63, got '1000",
    "budget.seconds=nan": "budget.seconds must be positive, got nan",
    "budget.seconds=inf": "budget.seconds must be positive, got inf",
    "budget.limit=second": "budget.limit must be one of images, seconds, nfe, got 'second'. Did you mean 'seconds'?",
    "budget=3": f"budget must be {GROUP} (budget.limit=...), got '3'",
    "budget=null": f"budget must be {GROUP} (budget.limit=...), got 'null'",
    "evaluation.nfe=3": "evaluation.nfe must be a list of whole numbers, got '3'",
    "evaluation.nfe=[a]": "evaluation.nfe must be a list of whole numbers, got '[a]'",
    "evaluation.nfe=[1.5]": "evaluation.nfe must be a list of whole numbers, got '[1.5]'",
    "evaluation.nfe=null": "evaluation.nfe must be a list of whole numbers, got 'null'",
    "evaluation.nfe=[0]": "evaluation.nfe must list different positive numbers, got [0]",
    "evaluation.nfe=[1,1]": "evaluation.nfe must list different positive numbers, got [1, 1]",
    "evaluation.images=0": "evaluation.images must be positive, got 0",
    "evaluation.metrics=fid": "evaluation.metrics must be a list of names, got 'fid'",
    "evaluation.metrics=[[fid]]": "evaluation.metrics must be a list of names, got '[[fid]]'",
    "augment.transforms=[[xflip]]": "augment.transforms must be a list of names, got '[[xflip]]'",
    "guidance_range=[[1]]": "guidance_range must be a list of numbers, got '[[1]]'",
    "augment.flip=7": "augment.flip must be true or false, got '7'",
    "augment.flip=0.5": "augment.flip must be true or false, got '0.5'",
    "methods.boot.lr=-1": "methods.boot.lr must be positive, got -1.0",
    "methods.boot.lr=nan": "methods.boot.lr must be positive, got nan",
    "methods.boot.lr=1e400": "methods.boot.lr must be positive, got inf",
    "methods.boot.lr=abc": "methods.boot.lr must be a number, got 'abc'",
    "methods.boot.lr=true": "methods.boot.lr must be a number, got 'true'",
    "methods.boot.lr={a:1}": "methods.boot.lr must be a number, got '{a:1}'",
    "methods.boot={lr:-1}": "methods.boot.lr must be positive, got -1.0",
    "methods.boot=3": f"methods.boot must be {GROUP} (methods.boot.lr=...), got '3'",
    "methods.boot=null": f"methods.boot must be {GROUP} (methods.boot.lr=...), got 'null'",
    "methods.boot=${methods}": "cannot use methods.boot='${methods}': ",
    "methods.boot.kind=cm": "methods.boot.kind is 'boot' by choice and cannot be changed, got 'cm'",
    "methods.boot.ema_halflife_kimg=inf": "methods.boot.ema_halflife_kimg must be finite, got inf",
    "teacher.prediction=epsi": "teacher.prediction must be one of eps, x0, v, flow, edm, got 'epsi'. Did you mean "
    "'eps'?",
    "dataset.kind=folder": "dataset.kind is 'digits' by choice and cannot be changed, got 'folder'",
    "teacher.budget.images=0": "teacher.budget.images must be positive, got 0",
    "teacher.optimizer.lr=-1": "teacher.optimizer.lr must be positive, got -1.0",
    "teacher.optimizer={lr:-1}": "teacher.optimizer.lr must be positive, got -1.0",
    "teacher.optimizer.lr=abc": "teacher.optimizer.lr must be a number, got 'abc'",
    "teacher.network=cnn": "teacher.network must be one of auto, mlp, unet, dit, got 'cnn'",
    "teacher.kind=x": "teacher.kind is 'trained' by choice and cannot be changed, got 'x'",
}
QUOTES = "a value with unusual characters needs quotes inside the shell's quotes: "
FORMS = {
    "": "an empty setting. A setting reads name=value",
    "  ": "an empty setting. A setting reads name=value",
    "seed": "'seed' is not a setting. A setting reads name=value, such as budget.images=400000",
    "boot": "'boot' is not a setting. A setting reads name=value. Did you mean methods=[boot]?",
    "folder": "'folder' is not a setting. A setting reads name=value. Did you mean dataset=folder?",
    "methods=[boot,": "cannot read the setting 'methods=[boot,': [ and ] do not match. Quote what ",
    "+x=1": "cannot use '+x=1': settings are changed with name=value, none is added or deleted",
    "++seed=1": "cannot use '++seed=1': settings are changed with name=value, none is added or deleted",
    "~methods": "cannot use '~methods': settings are changed with name=value, none is added or deleted",
    "se ed=1": "cannot read the setting 'se ed=1': a setting reads name=value",
    "séed=1": "cannot read the setting 'séed=1': a setting reads name=value",
    "seed=1=2": f"cannot read the setting 'seed=1=2': {QUOTES}'seed=\"VALUE\"'",
    "results_dir=ü": f"cannot read the setting 'results_dir=ü': {QUOTES}'results_dir=\"VALUE\"'",
    "results_dir='": f'cannot read the setting "results_dir=\'": {QUOTES}',
    "seed=🙂": f"cannot read the setting 'seed=🙂': {QUOTES}",
    "run_name=a\nb": f"cannot read the setting 'run_name=a\\nb': {QUOTES}",
    "seed=" + 5000 * "9": "cannot read the setting 'seed=9999",
    "x" * 20000: "'xxx",
    "x" * 20000 + "=1": "no setting 'xxx",
    "seed=" + 3000 * "[" + 3000 * "]": "cannot read the setting 'seed=[[[",
    "seed=range(0,0)": "'seed=range(0,0)' spans no value",
    "seed=glob(*)": "'seed=glob(*)' spans no value",
    "seed=interval(0,1)": "cannot sweep 'seed=interval(0,1)'. List the values, or use range(START,STOP)",
    "seed=range(0,100000000)": "the sweeps span more than 100,000 runs",
}


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("word", [*NAMES, *VALUES, *FORMS], ids=lambda word: word[:40])
def test_invalid_settings_are_one_message(registry, word):
    assert message(registry, *GIVEN, word).startswith((NAMES | VALUES | FORMS)[word])


def test_a_setting_of_an_earlier_version_names_what_replaced_it(registry):
    found = message(registry, "methods=[ect]", "dataset=digits", "methods.ect.mid=0.8")
    assert found.startswith("no setting 'mid' in 'methods.ect'. It was replaced by sampling_levels=[[LEVEL]]. Poss")


def test_required_settings(registry):
    assert message(registry, "dataset=digits") == f"no method given. Write methods=[NAME,...]; {METHODS.lower()}"
    expected = f"no dataset given. Write dataset=NAME; possible: {DATASETS}"
    assert message(registry) == message(registry, "methods=[boot]") == expected


def test_the_largest_grid(registry):
    assert len(compose_runs(["methods=[boot]", "dataset=digits", "seed=range(0,20)"], registry)) == 20
    assert "100,000 runs" in message(registry, *GIVEN, "seed=range(0,400)", "batch_size=range(1,400)")


# --- settings of plugins ---------------------------------------------------------------------------------------------


@dataclass
class Fussy(MethodConfig):
    path: str = option(MISSING, "a file")
    low: float = option(0.0, "lowest")
    high: float = option(1.0, "highest")
    some: int | None = option(None, "how many")

    def __post_init__(self):
        super().__post_init__()
        if self.low > self.high:
            raise UserError(f"low must be below high, got {self.low} and {self.high}")
        if self.path == "cursed":
            raise ZeroDivisionError("a fault\nof the plugin")
        if self.path == "bad":
            raise UserError("this path will not do")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "methods.mine.path must be given: text"),
        (["methods.mine.path=x", "methods.mine.low=2"], "methods.mine.low must be below high, got 2.0 and 1.0"),
        (["methods.mine.path=x", "methods.mine.low=-inf"], "methods.mine.low must be finite, got -inf"),
        (["methods.mine.some=x"], "methods.mine.some must be a whole number or null, got 'x'"),
        (["methods.mine.path=bad"], "methods.mine: this path will not do"),
        (["methods.mine.path=cursed"], "methods.mine: ZeroDivisionError: a fault"),
    ],
)
def test_errors_of_a_third_party_config_have_their_path(registry, words, expected):
    assert message(with_method(registry, Fussy), "methods=[mine]", "dataset=digits", *words) == expected


@dataclass
class Bounds:
    a: float = 0.5
    name: str = "x"


@pytest.mark.parametrize(
    ("check", "good", "bad", "expected"),
    [
        (require_positive, [1e-9, 5], [0, -1, math.nan, math.inf], "a must be positive, got "),
        (lambda c, n: require_between(c, 0, 1, n), [0, 1, 0.5], [-1, 2, math.nan], "a must lie between 0 and 1, got "),
        (lambda c, n: require_between(c, 0, math.inf, n), [0, 9.0], [-1, math.nan], "a must be at least 0, got "),
        (require_fraction, [0, 0.999], [1, -0.1, math.nan], "a must be at least 0 and below 1, got "),
    ],
)
def test_checks_of_numbers(check, good, bad, expected):
    for value in good:
        check(Bounds(value), "a")
    for value in bad:
        with pytest.raises(UserError) as caught:
            check(Bounds(value), "a")
        assert str(caught.value) == f"{expected}{value}"


def test_check_of_a_choice():
    require_one_of(Bounds(name="b"), "name", iter(("a", "b")))
    with pytest.raises(UserError) as caught:
        require_one_of(Bounds(name="grd"), "name", ("grid", "uniform"))
    assert str(caught.value) == "name must be one of grid, uniform, got 'grd'. Did you mean 'grid'?"


def test_default_lists_are_not_shared():
    @dataclass
    class WithList:
        values: list[int] = option([1], "some")

    WithList().values.append(2)
    assert WithList().values == [1]


def test_settings_are_described_with_their_defaults(registry):
    described = {name: (default, text) for name, default, text in describe_options(Trained.Config)}
    assert "kind" not in described
    assert ("some", "null", "how many") in describe_options(Fussy)
    assert described["prediction"] == ("v", "what the network predicts: eps, x0, v, flow, edm")
    assert described["budget.limit"][0] == "images"
    assert described["budget.images"][0] == str(Trained.Config().budget.images)  # not the default of BudgetConfig
    for kind in ("methods", "teachers", "datasets"):
        for entry in registry.of_kind(kind).values():
            assert all(text for _, _, text in describe_options(entry.cls.Config)), entry.cls


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """``experiment(text)``: a configs folder with the experiment "mine"."""

    def write(text):
        (tmp_path / "experiment").mkdir()
        (tmp_path / "config.yaml").write_text((config_folder() / "config.yaml").read_text())
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
        monkeypatch.setattr(config, "config_folder", lambda: tmp_path)

    return write


def test_an_experiment_can_choose_and_set_everything(registry, experiment):
    experiment("defaults:\n  - override /methods: [cm]\n  - override /dataset: digits\nmethods:\n  cm:\n    lr: 0.5\n")
    (run,) = compose_runs(["experiment=mine"], registry)
    assert (list(run.methods), run.methods["cm"].lr, run.dataset.kind) == (["cm"], 0.5, "digits")
    (run,) = compose_runs(["experiment=mine", "methods.cm.lr=0.25"], registry)
    assert run.methods["cm"].lr == 0.25


def test_experiment_settings_of_other_methods_are_ignored(registry, experiment):
    experiment("methods:\n  cm:\n    lr: 0.5\n  boot:\n    lr: 0.75\n")
    (run,) = compose_runs(["experiment=mine", *GIVEN], registry)
    assert {name: method.lr for name, method in run.methods.items()} == {"boot": 0.75}
    assert "'cm' is not among methods=[boot]" in message(registry, "experiment=mine", *GIVEN, "methods.cm.lr=1")


def test_a_broken_plugin_does_not_break_experiments(registry, experiment):
    experiment("methods:\n  lost:\n    lr: 0.5\n")
    assert "no method 'lost'" in message(registry, "experiment=mine", *GIVEN)
    broken = dataclasses.replace(registry, plugins=[*registry.plugins, Plugin("lost", "x", "1", error="no luck")])
    (run,) = compose_runs(["experiment=mine", *GIVEN], broken)
    assert list(run.methods) == ["boot"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("methods:\n  bot:\n    lr: 1\n", "no method 'bot' in an experiment. Did you mean 'boot'?"),
        ("methods:\n  cm:\n    lrr: 1\n", "'lrr'"),
        ("methods:\n  boot:\n    lr: abc\n", "abc"),
        ("methods:\n  boot:\n    lr: -1\n", "methods.boot.lr must be positive, got -1.0"),
        ("budget:\n  image: 1\n", "image"),
        ("sead: 1\n", "sead"),
        ("seed: [\n", "an experiment is not YAML: "),
    ],
)
def test_a_faulty_experiment_is_an_error(registry, experiment, text, expected):
    experiment(text)
    assert expected in message(registry, "experiment=mine", *GIVEN)


def test_an_experiment_cannot_choose_what_does_not_exist(registry, experiment):
    experiment("defaults:\n  - override /methods: [bot]\n")
    assert "methods/bot" in message(registry, "experiment=mine", "dataset=digits")


@pytest.mark.nightly  # tests/runs/test_experiments.py composes each with its own methods
def test_every_shipped_experiment_is_valid(registry):
    """With every method; those that choose no dataset with digits."""
    files = sorted((config_folder() / "experiment").glob("*.yaml"))
    assert len(files) > 1
    for file in files:
        chosen = [] if "override /dataset" in file.read_text() else ["dataset=digits"]
        compose_runs([f"experiment={file.stem}", f"methods=[{','.join(registry.methods)}]", *chosen], registry)


def test_an_incomplete_installation_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(overrides, "HERE", tmp_path / "distillbench")
    with pytest.raises(UserError, match=r"no config\.yaml in .* not completely installed"):
        config_folder()
    (tmp_path / "distillbench" / "configs").mkdir(parents=True)
    (tmp_path / "distillbench" / "configs" / "config.yaml").write_text("")  # where a wheel has them
    assert config_folder() == tmp_path / "distillbench" / "configs"


# --- values as they were written -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize("text", ["2024_01_01", "1e3", "true", "007", "1_0", "0x10", "inf"])
def test_a_text_setting_keeps_its_text(registry, text):
    (run,) = compose_runs([*GIVEN, f"run_name={text}"], registry)
    assert run.run_name == text
    (quoted,) = compose_runs([*GIVEN, f"run_name='{text}'"], registry)
    assert quoted.run_name == text
    swept = compose_runs([*GIVEN, f"run_name={text},other", "seed=0,1"], registry)
    assert [run.run_name for run in swept] == [text, text, "other", "other"]
    (listed,) = compose_runs([*GIVEN, f"evaluation.references=[{text}, 'a,b', c]"], registry)
    assert listed.evaluation.references == [text, "a,b", "c"]


def test_numbers_stay_numbers(registry):
    (run,) = compose_runs([*GIVEN, "budget.images=1_000", "evaluation.seeds=[1_0,2]", "guidance=1e0"], registry)
    assert (run.budget.images, run.evaluation.seeds, run.guidance) == (1000, [10, 2], 1.0)


def test_a_leading_tilde_is_expanded_in_every_path(registry, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["methods=[boot]", "dataset=folder", "dataset.path=~/images", "results_dir=~/my results"]
    words += ["evaluation.references=[~/a.npz,'~/b.npz','c~.npz']", "run_name=~x"]
    (run,) = compose_runs(words, registry)
    assert run.dataset.path == f"{tmp_path}/images"
    assert run.results_dir == f"{tmp_path}/my results"
    assert run.evaluation.references == [f"{tmp_path}/a.npz", f"{tmp_path}/b.npz", "c~.npz"]
    assert run.run_name == "~x", "not a path"
    quoted = compose_runs(["methods=[boot]", "dataset=folder", 'dataset.path="~/a",~/b'], registry)
    assert [run.dataset.path for run in quoted] == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_every_setting_that_names_files_is_declared_as_a_path(registry):
    """Their names and help texts say which those are."""
    kinds = [config.RunConfig, config.EvaluationConfig]
    kinds += [entry.cls.Config for kind in ("datasets", "teachers") for entry in registry.of_kind(kind).values()]
    for field in itertools.chain.from_iterable(map(dataclasses.fields, kinds)):
        named = field.name.endswith(("path", "_dir", "references"))
        assert bool(field.metadata.get("path")) >= named, field.name
