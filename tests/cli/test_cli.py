"""The command line: --help is fast, output fits the terminal, and errors are one line."""

import io
import json
import re
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from command_line import exit_code
from distillbench.builtin.trained import METADATA, Trained
from distillbench.cli import command_options, commands, plugin_table, terminal
from distillbench.errors import DivergedError
from distillbench.records.statistics import summarise
from distillbench.records.table import make_table
from distillbench.registry import load_registry
from distillbench.reports.labels import Labels
from distillbench.system.progress import Progress, Times
from shipped import METHODS as SHIPPED

GIVEN = ["methods=[boot]", "dataset=digits"]
HEAVY = (
    "torch",
    "numpy",
    "pandas",
    "hydra",
    "omegaconf",
    "pydantic",
    "rich",
    "PIL",
    "sklearn",
    "pluggy",
    "safetensors",
)


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture
def call(tmp_path, monkeypatch, capfd, registry):
    """``call(*words)``: exit code, output and errors of distillbench in an empty folder, 80 columns wide.

    The plugins are loaded once for all calls.
    """
    for module in (command_options, plugin_table):
        monkeypatch.setattr(module, "load_plugins", lambda folders: registry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        return exit_code(*words), *capfd.readouterr()

    return run


def below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- fast help -----------------------------------------------------------------------------------------------------


def loaded_by(words):
    """Modules that `distillbench WORDS` imports, in a process of its own."""
    code = f"try: main({words!r})\nexcept SystemExit: pass\nprint(*sys.modules)"
    code = f"import sys\nfrom distillbench.cli.commands import main\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["--version"], ["teacher", "train", "-h"]], ids=" ".join
)
def test_help_imports_nothing_heavy(words):
    modules = loaded_by(words)
    assert "distillbench.cli.commands" in modules
    assert not modules.intersection(HEAVY)


def test_help_shows_the_commands(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for command in ("run", "list", "describe", "plugins", "teacher"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


# --- listing plugins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("methods", ["boot", "cm", "direct", "pd"]),
        ("teachers", ["trained"]),
        ("datasets", ["digits", "folder"]),
        ("metrics", ["fd_efficientnet_lite0", "teacher_rmse", "fid", "kid", "fd_dinov2"]),
    ],
)
def test_list(call, kind, names):
    code, out, _ = call("list", kind)
    assert code == 0
    assert set(names) <= set(re.findall(r"^  (\w+)  ", out, re.MULTILINE))
    assert max(map(len, out.splitlines())) <= 80
    assert "distillbench" in out


def test_methods_are_listed_by_what_they_learn(call):
    _, out, _ = call("list", "methods")
    places = [
        out.index(f"\n{kind}: " if kind != "trajectory" else "trajectory: ")
        for kind in ("trajectory", "distribution", "from data")
    ]
    assert places == sorted(places)
    assert places[0] < out.index("\n  boot ") < places[1] < out.index("\n  sid ") < places[2] < out.index("\n  ct ")
    text = " ".join(out.split())
    assert "(no real images; NFE 1)" in text and "(real images; NFE any number)" in text


def test_describe_a_method(call):
    code, out, _ = call("describe", "boot")
    assert code == 0
    assert out.startswith("boot: method from plugin boot (distillbench ")
    for line in (r"  paper +Gu et al\. 2023", r"  needs data +no", r"  methods\.boot\.lr=0\.\d+ +peak learning rate"):
        assert re.search(line, out)
    assert max(map(len, out.splitlines())) <= 80


def test_described_settings_can_be_pasted(call):
    _, out, _ = call("describe", "trained")
    settings = re.findall(r"^  (teacher\.[\w.]+=\S*)", out, re.MULTILINE)
    assert f"teacher.budget.images={Trained.Config().budget.images}" in settings
    code, _, err = call("run", *GIVEN, *settings, "--show-config")
    assert (code, err) == (0, "")


def test_describe_a_dataset_without_settings_and_a_metric(call):
    assert "no settings" in call("describe", "digits")[1]
    _, out, _ = call("describe", "teacher_rmse")
    assert re.search(r"  direction +lower", out)
    assert "setting" not in out


def test_plugins(call):
    code, out, _ = call("plugins")
    assert code == 0
    line = r"^  boot +distillbench \S+; register_methods: boot;\s+\S*distillbench_boot.py$"
    assert re.search(line, out, re.MULTILINE)


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_with_its_cost_and_writes_nothing(call, tmp_path):
    words = ["seed=0,1", "budget.images=1000", "evaluation.metrics=[teacher_rmse]", "estimate_seconds=1"]
    code, out, err = call("run", "methods=[boot,direct]", "dataset=digits", *words, "--dry-run")
    assert (code, err) == (0, "")
    assert below(tmp_path) == []
    assert max(map(len, out.splitlines())) <= 80
    times = re.findall(r"^(?:\w+ \(seed \d\)|sum) .* (\d+ (?:s|min|h))", out, re.MULTILINE)
    assert len(times) == 5
    assert re.search(r"^time: about \d+ (s|min|h)", out, re.MULTILINE) and "  noise-image pairs " in out
    cells = dict(re.findall(r"^(\w+ \(seed \d\)) +(1 .*)$", out, re.MULTILINE))
    assert list(cells) == ["boot (seed 0)", "direct (seed 0)", "boot (seed 1)", "direct (seed 1)"]
    numbers = [int(word.replace(",", "")) for word in cells["boot (seed 1)"].split()[:-2]]  # then a time
    assert numbers[:2] == [1, 1000]  # one row, at one evaluation; images
    assert re.search(r"^sum +4,000 ", out, re.MULTILINE)
    assert "nothing was run or written" in out


def test_a_dry_run_of_a_dataset_without_a_teacher_says_so(call):
    words = ["teacher.seed=12345", "teacher.budget.images=70000", "estimate_seconds=0"]
    code, out, _ = call("run", *GIVEN, *words, "--dry-run")
    assert code == 0
    assert "teacher trained: to be trained, 70,000 images" in out


def test_a_dry_run_by_time_predicts_no_images(call):
    _, out, _ = call("run", *GIVEN, "budget.limit=seconds", "budget.seconds=5", "estimate_seconds=0", "--dry-run")
    assert "time: no estimate (estimate_seconds=0)" in out
    assert "Each method trains 5 s" in out


def test_show_config_is_yaml_and_nothing_else(call, tmp_path):
    code, out, err = call("run", *GIVEN, "seed=3,4", "methods.boot.lr=0.25", "--show-config")
    assert (code, err) == (0, "")
    assert [(run["seed"], run["methods"]["boot"]["lr"]) for run in yaml.safe_load_all(out)] == [(3, 0.25), (4, 0.25)]
    assert below(tmp_path) == []


# --- bad input -------------------------------------------------------------------------------------------------------


def test_unknown_commands_and_options(call):
    for words, near in [(["rum"], "run"), (["list", "method"], "methods"), (["run", "--dry-rum"], "--dry-run")]:
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        assert near in err
        assert "Traceback" not in err


@pytest.fixture
def refused(call, tmp_path):
    """``refused(*words)``: the message with which distillbench refuses them, having done nothing."""

    def refuse(*words):
        before = below(tmp_path)
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert below(tmp_path) == before
        return err.removeprefix("error: ").rstrip()

    return refuse


def weights(path, shape, tensors):
    """A teacher's file for images of `shape` with these tensors."""
    recipe = {"shape": shape, "network": {"name": "mlp"}, "schedule": "vp_cosine", "prediction": "v"}
    save_file(tensors, path, metadata={METADATA: json.dumps({"recipe": recipe})})


def teacher_files(folder):
    save_file({"a": torch.zeros(3)}, folder / "plain.safetensors")
    weights(folder / "large.safetensors", [3, 32, 32], {"a": torch.zeros(3)})
    weights(folder / "other.safetensors", [1, 8, 8], {"a": torch.zeros(3)})
    whole = (folder / "large.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[:-7])
    (folder / "short.safetensors").write_bytes(whole[:5])
    (folder / "garbage.safetensors").write_bytes(bytes(range(256)) * 10)
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "folder.safetensors").mkdir()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent", "teacher.path: no file"),
        ("folder", "teacher.path: 'folder.safetensors' is a folder"),
        ("empty", "not a readable safetensors file"),
        ("short", "not a readable safetensors file"),
        ("garbage", "not a readable safetensors file"),
        ("truncated", "not a readable safetensors file"),
        ("plain", "was not written by `distillbench teacher train`"),
        (
            "large",
            "does not fit the dataset: its images are (C,H,W) = (3, 32, 32), the dataset's are (1, 8, 8)",
        ),
        ("other", "cannot be used"),
    ],
)
def test_a_teacher_that_cannot_be_used(refused, tmp_path, name, expected):
    teacher_files(tmp_path)
    assert expected in refused("run", *GIVEN, f"teacher.path={name}.safetensors", "--dry-run")


def test_a_teacher_that_cannot_be_used_ends_a_run_too(refused, tmp_path):
    teacher_files(tmp_path)
    assert "cannot be used" in refused("run", *GIVEN, "teacher.path=other.safetensors")


def image_folder(folder):
    (folder / "none").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "a.png").write_bytes(b"not a PNG")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "dataset=folder needs dataset.path=FOLDER, a folder of images"),
        (["dataset.path=absent"], "dataset.path: no file or folder 'absent'"),
        (["dataset.path=none"], "dataset.path: no image"),
        (["dataset.path=damaged"], "dataset.path: cannot read 'a.png' as an image"),
        (["dataset.path=none", "dataset.resolution=0"], "dataset.resolution must be positive, got 0"),
        (["dataset.path=none", "dataset.channels=2"], "dataset.channels must be one of 1, 3, got 2"),
    ],
)
def test_a_dataset_that_cannot_be_used(refused, tmp_path, words, expected):
    image_folder(tmp_path)
    assert refused("run", "methods=[boot]", "dataset=folder", *words).startswith(expected)


@pytest.mark.parametrize("place", ["/proc/results", "/dev/null", "file/results"])
def test_results_that_cannot_be_written(refused, tmp_path, place):
    (tmp_path / "file").write_text("")
    assert "results_dir: cannot write to" in refused("run", *GIVEN, f"results_dir={place}")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("device=gpu", "no device 'gpu'. Possible: auto, cpu, cuda, cuda:N"),
        ("device=CPU", "no device 'CPU'. Possible: auto, cpu, cuda, cuda:N"),
        (
            "evaluation.metrics=[fidd]",
            "no metric 'fidd' in evaluation.metrics. Did you mean 'fid'? Possible: clip_score_vit_l14, coverage_dinov2",
        ),
        ("evaluation.nfe=[3]", "boot cannot sample with evaluation.nfe=[3]. Possible: 1"),
        (
            "methods=[bot]",
            f"no method 'bot'. Did you mean 'boot'? Possible: {', '.join(SHIPPED)}",
        ),
        ("methods.boot.lr=-1", "methods.boot.lr must be positive, got -1.0"),
        ("seed=abc", "seed must be a whole number, got 'abc'"),
        ("methods=[boot,", "cannot read the setting 'methods=[boot,': [ and ] do not match."),
    ],
)
def test_settings_that_cannot_be_used(refused, word, expected):
    assert refused("run", *GIVEN, word).startswith(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:9"])
def test_no_cuda_here(refused, device):
    assert refused("run", *GIVEN, f"device={device}").startswith(f"device={device}: torch finds no CUDA device here.")


def test_a_name_that_does_not_exist(refused):
    expected = "no method, teacher, dataset or metric 'digit'. Did you mean 'digits'? Possible: afhqv2, boot, "
    assert refused("describe", "digit").startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output", "teacher.bin"], "--output must name a .safetensors file, got 'teacher.bin'"),
        (["--output", "a.safetensors", "seed=0,1"], "--output takes one teacher, the settings describe 2"),
        (["--output", "/proc/a.safetensors"], "cannot write to '/proc'"),
        (["results_dir=/proc/results"], "results_dir: cannot write to"),
        (["teacher.optimizer.lr=-1"], "teacher.optimizer.lr must be positive, got -1.0"),
        (["device=gpu"], "no device 'gpu'"),
    ],
)
def test_a_teacher_that_cannot_be_trained(refused, words, expected):
    assert expected in refused("teacher", "train", "dataset=digits", *words)


def test_debug_shows_where_an_error_comes_from(call):
    code, _, err = call("run", "methods=[bot]", "dataset=digits", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("error: no method 'bot'.")


# --- while it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; progress is saved: run the same command again to resume"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
        (DivergedError("the loss is nan"), 1, "error: the loss is nan"),
    ],
)
def test_what_stops_a_run_is_one_line(call, monkeypatch, error, code, message):
    def stop(*arguments, **options):
        raise error

    monkeypatch.setattr("distillbench.execution.run.run", stop)
    assert call("run", *GIVEN)[::2] == (code, f"\n{message}\n" if code == 130 else f"{message}\n")


def test_a_teacher_is_trained_and_used(call, tmp_path):
    small = ["teacher.budget.images=512", "teacher.width=16", "teacher.depth=1"]
    code, out, _ = call("teacher", "train", "dataset=digits", *small, "-o", "new/mine.safetensors")
    assert code == 0
    assert out.rstrip().splitlines()[-1] == "written: new/mine.safetensors"
    assert below(tmp_path) == ["new", "new/mine.safetensors"]
    code, out, _ = call("run", *GIVEN, "teacher.path=new/mine.safetensors", "--dry-run")
    assert code == 0
    assert "teacher trained: mine.safetensors" in out


# --- tables ----------------------------------------------------------------------------------------------------------

METRICS = {
    "fd_efficientnet_lite0": {"label": "FD (EffNet-Lite0)", "title": "the distance in full", "unit": "squared"},
    "teacher_rmse": {"label": "RMSE to teacher"},
}
METHODS = {name: {"label": label} for name, label in {"boot": "BOOT", "teacher:ddim": "teacher, DDIM"}.items()}
COSTS = {
    "train_seconds": 61.25,
    "train_images": 400_000,
    "train_teacher_nfe": 1_048_576,
    "train_student_nfe": 1_200_000,
    "sample_latency_p50_ms": 0.987,
    "sample_images_per_second": 123_456.7,
    "parameters": 12,
    "device": "cpu (a model)",
}


def table(*changes):
    row = {"dataset": "digits", "teacher": "trained-0354d7c4", "method": "boot", "nfe": 1, "status": "ok"}
    row |= {"training_seed": 0, "sampling_seed": 0, "images": 64, "budget": "b", "protocol": "p"}
    row |= {
        "reason": "",
        "settings": "",
        "fd_efficientnet_lite0": 640.8,
        "teacher_rmse": 0.123456,
        "key": "0123456789abcdef",
    } | COSTS
    return make_table([row | change for change in changes], list(METRICS))


def printed(content, width):
    console = Console(width=width, file=io.StringIO())
    labels = Labels({name: {"direction": "lower"} | facts for name, facts in METRICS.items()}, METHODS)
    terminal.print_table(console, content, summarise(content, labels.directions), labels)
    return console.file.getvalue()


TEACHER = {"method": "teacher:ddim", "training_seed": None, "train_images": None, "train_seconds": None, "nfe": 64}


def test_a_student_that_is_worse_than_the_teacher_at_as_many_evaluations_is_named():
    name = "fd_efficientnet_lite0"
    content = table({name: 700.0}, {"method": "cm", name: 300.0}, TEACHER | {"nfe": 1, name: 500.0}, TEACHER)
    content.loc[content["method"] == "teacher:ddim", "budget"] = None  # as in the table of a run
    lines = [line for line in printed(content, 120).splitlines() if "worse than the teacher" in line]
    assert lines == [
        "FD (EffNet-Lite0) worse than the teacher's own DDIM at as many evaluations: BOOT at 1 NFE (700 against 500)"
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width):
    text = printed(table(TEACHER, {}, {"method": "cm", "nfe": 2, "teacher_rmse": None}), width)
    assert max(map(len, text.partition("\nFD (EffNet-Lite0): ")[0].splitlines()[1:])) <= width
    assert "…" not in text
    boot = next(line for line in text.splitlines() if line.startswith("BOOT"))
    assert boot.split()[:4] == ["BOOT", "1", "640.8", "0.1235"]
    assert ("400,000" in boot) == (width == 120)
    left_out = [line for line in text.splitlines() if line.startswith("not shown, as too wide: ")]
    assert bool(left_out) == (width == 80)
    assert "FD (EffNet-Lite0): the distance in full, in squared (fd_efficientnet_lite0)" in text
    assert "dataset digits, teacher trained-0354d7c4, budget b, device cpu (a model)" in text
    assert "status" not in text and "no method is marked as best" in text


def test_scores_have_arrows_intervals_and_a_star_only_for_a_significant_lead():
    """Three training seeds each: boot is far better on one score, and no different on the other."""
    rows = []
    for seed in range(3):
        rows.append({"training_seed": seed, "fd_efficientnet_lite0": 100 + seed, "teacher_rmse": 0.1 + seed})
        rows.append(rows[-1] | {"method": "cm", "fd_efficientnet_lite0": 300 + seed, "teacher_rmse": 2.2 - seed})
    text = printed(table(*rows), 120)
    boot = next(line for line in text.splitlines() if line.startswith("BOOT"))
    cm = next(line for line in text.splitlines() if line.startswith("cm "))
    assert "101.0 ± 2.5*" in boot and boot.count("*") == 1 and "*" not in cm  # t of two degrees over sqrt(3) is 2.48
    assert "↓" in text and "3 training seeds\n" in text
    assert "±: half of the 95 % interval of the mean over training seeds" in text
    assert "RMSE to teacher, 1 NFE: BOOT 1.100, cm 1.200 cannot be told apart" in text
    assert "FD (EffNet-Lite0), 1 NFE: BOOT 101 leads\n" in text and "*: the only leader by pairwise comparison" in text


def test_columns_that_differ_are_shown():
    text = printed(table({}, {"dataset": "folder"}), 120)
    assert re.search(r"^dataset +method", text, re.MULTILINE)
    text = printed(table({}, {"settings": "lr=0.5"}), 120)
    assert re.search(r"^BOOT +1 +lr=0\.5 ", text, re.MULTILINE)
    text = printed(table({}, {"budget": "other"}), 120)
    assert re.search(r"^BOOT +1 +other ", text, re.MULTILINE)


def test_failed_rows_are_shown_with_their_reasons():
    failed = {"status": "failed", "reason": "ValueError: a [b] c", "teacher_rmse": None, "fd_efficientnet_lite0": None}
    text = printed(table({}, failed | {"training_seed": 1}), 80)
    assert "BOOT, seed 1, 1 NFE, noise 0: failed: ValueError: a [b] c" in text
    assert "1 of 2 ok" in text


# --- progress --------------------------------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_plain_lines(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("distillbench.system.progress.time.perf_counter", lambda: now)
    progress = Progress(Console(width=80))
    with progress.step("a step") as step:
        for now in (0.0, 5.0, 11.0, 12.0, 22.0, 44.0):
            step.advance(now / 44, "a note")
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        "a step: 25%, elapsed 0:11, about 0:33 left  a note",
        "a step: 50%, elapsed 0:22, about 0:22 left  a note",
    ]
    with progress.overall(3, 0, Times()) as show:
        show(1, "cell 2 of 3: cm")
    assert capsys.readouterr().out.endswith(" cell 2 of 3: cm, elapsed 0:00\n")


def test_without_a_terminal_a_step_that_lasts_has_a_line_for_its_start(monkeypatch, capsys):
    monkeypatch.setattr("distillbench.system.progress.SECONDS_BEFORE_LINE", 0.02)
    progress = Progress(Console(width=80))
    begin = time.time()
    with progress.step("long"):
        deadline = time.monotonic() + 10
        while not (said := capsys.readouterr().out) and time.monotonic() < deadline:
            time.sleep(0.01)
    when, _, label = said.strip().partition(" ")
    assert label == "long" and when in {time.strftime("%H:%M:%S", time.localtime(begin + k)) for k in (0, 1)}
    monkeypatch.setattr("distillbench.system.progress.SECONDS_BEFORE_LINE", 60.0)
    with progress.step("short"):
        pass
    assert capsys.readouterr().out == ""


def test_in_a_terminal_progress_is_bars_that_vanish_and_steps_can_be_nested(capsys):
    console = Console(force_terminal=True, width=100)
    progress = Progress(console)
    for _ in range(2):
        with progress.step("outer") as outer, progress.step("inner") as inner:
            outer.advance(0.5)
            inner.advance(0.25, "[not markup]")
            progress.say("a line that stays [x]")
            progress._bars.refresh()
    out = capsys.readouterr().out
    assert "a line that stays [x]" in out
    assert "[not markup]" in out
    assert progress._bars is None


def test_a_bar_shows_the_time_elapsed_and_the_time_left(monkeypatch, capsys):
    """0.15 of it in 20 s: 0.6 takes 80 s, which count down between two reports."""
    now = 0.0
    monkeypatch.setattr("distillbench.system.progress.time.perf_counter", lambda: now)
    progress = Progress(Console(force_terminal=True, width=120, color_system=None))
    with progress.step("timing") as step:

        def shown(at: float) -> str:
            nonlocal now
            now = at
            capsys.readouterr()
            progress._bars.refresh()
            return capsys.readouterr().out

        assert "elapsed 0:05" in (line := shown(5.0)) and "left" not in line
        step.advance(0.25, "a note")
        assert "left" not in shown(6.0)
        now = 25.0
        step.advance(0.40)
        assert "elapsed 0:25, about 1:20 left" in shown(25.0)
        assert "elapsed 0:35, about 1:10 left" in shown(35.0)
        assert "elapsed 1:02:03, about 0:00 left" in shown(3723.0)


def test_the_times_of_a_bar_are_whole_in_80_columns_and_the_note_is_cut_off(capsys):
    progress = Progress(Console(force_terminal=True, width=80, color_system=None))
    with progress.overall(5, 1, Times()) as show, progress.step("a method lr=0.0003 (seed 0): training") as step:
        show(1, "cell 2 of 5: a method")
        step.advance(0.1)
        time.sleep(0.01)
        step.advance(0.3, "a note that is far too long for what is left of a line of a terminal")
        capsys.readouterr()
        progress._bars.refresh()
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", capsys.readouterr().out).splitlines()
    overall, inner = (line for line in lines if "elapsed" in line)
    assert "cell 2 of 5: a method" in overall and "20% elapsed 0:00" in overall
    assert "30% elapsed 0:00, about 0:00 left" in inner and "…" in inner and max(len(overall), len(inner)) <= 80


def test_without_a_console_nothing_is_printed(capsys):
    with Progress(None).step("a step") as step:
        step.advance(0.5)
        Progress(None).say("a line")
    assert capsys.readouterr().out == ""


SCORED = ["dataset=digits", "experiment=smoke", "evaluation.images=16", "evaluation.metrics=[teacher_rmse]"]


def test_score_samples_the_teacher_alone(tmp_path, capsys):
    words = [*SCORED, "evaluation.timing=off", "run_name=here", f"results_dir={tmp_path}"]
    commands.main(["score", *words, "evaluation.teacher_samplers=[ddim,renoise]"])
    table = pd.read_csv(tmp_path / "here" / "table.csv")
    assert set(table["method"]) == {"teacher:ddim", "teacher:renoise"} and (table["status"] == "ok").all()
    assert table["train_images"].isna().all() and "budget" not in capsys.readouterr().out


def test_score_takes_no_method(capsys):
    with pytest.raises(SystemExit) as done:
        commands.main(["score", *SCORED, "methods=[boot]"])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: score takes no method, got 'methods=[boot]'")
