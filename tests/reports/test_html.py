"""The HTML report: what it says about good and bad runs, that it escapes names, and that it works in a browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from distillbench.records.statistics import summarise
from distillbench.records.table import make_along, make_table
from distillbench.reports import charts, pictures, words
from distillbench.reports import html as report_html
from distillbench.reports.html import html_report, write_html
from distillbench.reports.published import LABEL, published
from distillbench.reports.reproduce import commands
from distillbench.reports.runs import RunData, read_run

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\"' onmouseover='alert(3)",
    "{{ 7 * 7 }}",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COLUMNS = {
    "fd_pixels": {"unit": "u", "direction": "lower", "network": "pixels", "needs": "real", "protocol": "frechet/2"},
    "recall": {"unit": "", "direction": "higher", "network": "pixels", "needs": "real", "protocol": "recall/1"},
}
CONFIG = {
    "methods": {"boot": {"kind": "boot", "lr": 0.002}, "pd": {"kind": "pd", "schedule": ""}},
    "dataset": {"kind": "digits", "path": "a b/it's=1"},
    "budget": {"limit": "images", "images": 1000},
    "evaluation": {"images": 64, "nfe": [1, 2]},
    "seed": 0,
}


PLOTLY = report_html.PLOTLY


@pytest.fixture
def real_plotly(monkeypatch, small_plotly):
    monkeypatch.setattr(report_html, "PLOTLY", PLOTLY)


def row(method: str, nfe: int = 1, seed: int | None = 0, **more) -> dict:
    """A row of the table; scores and costs follow from nfe and seed unless they are given."""
    student = not method.startswith("teacher:")
    base = {
        "dataset": "digits", "teacher": "trained-1", "method": method, "training_seed": seed if student else None,
        "sampling_seed": 0, "nfe": nfe, "images": 64, "budget": "1000 images" if student else "", "protocol": "abcd",
        "status": "ok", "reason": "train_joules empty: no GPU in use",
        "fd_pixels": 50 / (nfe or 1) + (seed or 0), "recall": 0.5,
        "train_images": 1000 if student else None, "train_seconds": 10.0 + len(method) if student else None,
        "train_peak_rss_mib": 300.0 if student else None, "sample_latency_p50_ms": 1.5 * (nfe or 1),
        "settings": "", "device": "cpu",
        "key": f"key-{len(method)}-{seed}",
    }  # fmt: skip
    return base | more


class MadeUp(RunData):
    """A run with made-up samples."""

    def shown(self, key: str) -> list[tuple[int, int, torch.Tensor]]:
        return [(nfe, 0, torch.full((20, 1, 8, 8), 20 * nfe, dtype=torch.uint8)) for nfe in (1, 2, 4, 8)]


def run_of(rows: list[dict], along: list[dict] | None = None, name: str = "a-run", **more) -> RunData:
    table = make_table(rows, list(COLUMNS))
    summary = summarise(table, {k: v["direction"] for k, v in COLUMNS.items()}) if rows else table
    made = MadeUp(
        Path("/nowhere") / name,
        table,
        summary,
        make_along(along or [], list(COLUMNS)),
        COLUMNS,
        [CONFIG],
        {"python": "3"},
        [],
    )
    return replace(made, **more)


def seeds(method: str, values: list[float], nfe: int = 1, **more) -> list[dict]:
    return [row(method, nfe, seed, fd_pixels=value, **more) for seed, value in enumerate(values)]


def good_run() -> RunData:
    rows = [
        row("teacher:ddim", 1),
        row("teacher:ddim", 2),
        *seeds("boot", [10.0, 10.1, 10.2]),
        *seeds("pd", [20.0, 20.3, 20.4]),
    ]
    rows += seeds("pd", [9.0, 9.5, 9.1], 2)
    along = [{**row("boot", 1, s, fd_pixels=40.0 - 20 * f), "fraction": f} for s in (0, 1) for f in (0.3, 0.6)]
    return run_of(rows, along)


class Page(HTMLParser):
    """Tags with their attributes, the text that is shown, and tables as rows of cells' texts."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.data: dict[str, dict] = {}
        self.tables: dict[str, list[list[tuple[str, str, str]]]] = {}
        self.table = ""
        self.reading = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = attributes.get("id") or ""
            self.tables[self.table] = []
        if tag == "tr":
            self.tables[self.table].append([])
        if tag in ("td", "th"):
            self.tables[self.table][-1].append(("", attributes.get("class") or "", attributes.get("title") or ""))
        if tag == "script" and attributes.get("type") == "application/json":
            self.reading = attributes["id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.reading = ""

    def handle_data(self, data):
        if self.reading:
            self.data[self.reading] = json.loads(data)
        elif "script" not in self.open and "style" not in self.open:
            self.text.append(data)
            if "table" in self.open and set(self.open) & {"td", "th"}:
                cell = self.tables[self.table][-1]
                cell[-1] = (cell[-1][0] + data.strip() + " ", *cell[-1][1:])

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def column(page: Page, table: str, heading: str) -> list[tuple[str, str, str]]:
    rows = page.tables[table]
    at = next(i for i, cell in enumerate(rows[0]) if cell[0].strip() == heading)
    return [line[at] for line in rows[1:]]


# --- contents -------------------------------------------------------------------------------------------------------


def test_a_leader_is_marked_only_where_intervals_allow():
    page = Page(html_report([good_run()]))
    assert "At one evaluation, boot leads (fd_pixels 10.10 ± 0.25); pd (20.2) trails." in page.words
    assert "At 2 evaluations, only pd has this score" in page.words
    marked = [text for text, kind, _ in column(page, "s1-table", "fd_pixels ↓") if "best" in kind]
    assert marked == ["10.10 ± 0.25 "]
    near = run_of([*seeds("boot", [10.0, 14.0]), *seeds("pd", [15.0, 11.0])])
    page = Page(html_report([near]))
    assert "boot and pd cannot be told apart (fd_pixels 12.0 to 13.0)" in page.words
    assert not any("best" in kind for _, kind, _ in column(page, "s1-table", "fd_pixels ↓"))
    page = Page(html_report([run_of([row("boot", fd_pixels=1.0), row("pd", fd_pixels=9.0)])]))
    assert "boot has the best fd_pixels (1.00), then pd (9.00); the order is not certain" in page.words


def test_every_row_has_the_key_of_its_record_and_failed_cells_have_reasons():
    rows = [
        row("boot"),
        row("pd", status="failed", reason="RuntimeError: out of memory", fd_pixels=None, recall=None, key="lost"),
    ]
    page = Page(html_report([run_of(rows)]))
    assert {text.strip() for text, _, _ in column(page, "s1-rows", "record")} == {r["key"] for r in rows}
    text, kind, title = column(page, "s1-table", "fd_pixels ↓")[1]
    assert text.strip() == "failed" and "failed" in kind and "RuntimeError: out of memory" in title
    assert "out of memory" in column(page, "s1-table", "status")[1][0]
    assert "1 row failed" in page.words and "pd at NFE 1: 0 of 1 ok" in page.words
    assert (
        "failed: RuntimeError: out of memory" in page.words.partition("Samples from the same noise")[2]
    )  # in the grid


def test_a_note_names_its_rows():
    noted = [row("teacher:heun", 7, note="unstable in 4 steps"), row("boot"), row("pd", note="unstable in 4 steps")]
    page = Page(html_report([run_of(noted)]))
    assert "Note on teacher:heun at NFE 7 and pd at NFE 1: unstable in 4 steps" in page.words


def test_groups_that_cannot_be_compared_are_separate_and_each_has_the_teacher():
    rows = [row("teacher:ddim"), row("boot"), row("boot", budget="9 images"), row("boot", protocol="other", key="z")]
    page = Page(html_report([run_of(rows)]))
    assert "3 groups" in page.words
    methods = [[c[0].strip() for c in column(page, f"s{i}-table", "method")] for i in (1, 2, 3)]
    assert sorted(map(len, methods)) == [1, 2, 2] and methods[0] == ["teacher:ddim", "boot"]


def test_a_failed_row_without_images_is_in_the_section_of_its_budget():
    rows = [
        row("teacher:ddim"),
        row("boot"),
        row("pd", images=None, status="failed", reason="boom", fd_pixels=None, recall=None),
    ]
    page = Page(html_report([run_of(rows)]))
    assert "s2-table" not in page.tables and "boom" in page.words
    alone = Page(html_report([run_of([rows[0], rows[2]])]))
    assert "s2-table" not in alone.tables and len(alone.tables["s1-table"]) == 3


def test_several_runs_are_named_and_a_shared_cell_is_one_row():
    first, second = run_of([row("boot")], name="one"), run_of([row("boot"), row("pd")], name="two")
    page = Page(html_report([first, second]))
    assert [text.strip() for text, _, _ in column(page, "s1-table", "run")] == ["one, two", "two"]
    other = run_of([row("boot", fd_pixels=3.0)], name="other")
    page = Page(html_report([first, other]))
    assert len(page.tables["s1-table"]) == 3 and "boot [one]" in page.words and "boot [other]" in page.words
    assert "s2-table" not in Page(html_report([first, first])).tables


def test_charts_have_the_pareto_front_and_intervals():
    page = Page(html_report([good_run()]))
    chart = page.data["s1-quality-1"]
    assert chart["choices"]["x"].keys() >= {"train_seconds", "train_images"} and "train_seconds" not in chart["fronts"]
    counted = page.data["s1-small-1"]  # recall over NFE: teacher, boot and pd at 1, pd at 2, all 0.5
    assert counted["fronts"]["nfe"] == {"x": [1.0], "y": [0.5]}
    [trace] = [trace for trace in chart["figure"]["data"] if trace["name"] == "boot"]
    assert trace["error_y"]["array"] == pytest.approx([0.1 * 4.302653 / np.sqrt(3)], rel=1e-5)  # t with 2 degrees
    along = page.data["s1-along"]
    band, line = along["choices"]["y"]["fd_pixels"]["traces"]  # of seeds 0 and 1; the last point is the table's
    assert line["y"] == pytest.approx([34.0, 28.0, 10.1]) and band["y"][2:4] == [10.2, 10.0]
    assert "no GPU in use" in page.words.partition("Memory and energy")[2]


@pytest.mark.parametrize("values", [(1.0, 5.0), (5.0, 1.0)])
def test_the_pareto_front_depends_on_the_direction(values):
    points = [
        charts.Point("m", "m", False, n, {"nfe": float(n), "train_seconds": float(n)}, {"s": (v, None, None)})
        for n, v in zip((1, 2), values, strict=True)
    ]
    sizes = {arrow: len(charts._front(points, "nfe", "s", arrow)["x"]) for arrow in "↓↑"}
    assert sizes == ({"↓": 1, "↑": 2} if values[0] < values[1] else {"↓": 2, "↑": 1})
    assert charts._front(points, "nfe", "s", "") is None
    assert charts._front(points, "train_seconds", "s", "↓") is None, "seconds are noisy"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((176.83, 169.1, 184.6), "177"), ((338.2, 278, 399), "338"), ((0.10801, 0.0994, 0.1166), "0.108"),
     ((1870.51,), "1,871"),
     ((300000,), "300,000"), ((None,), ""), ((float("inf"),), "∞"), ((-2.0, -3, -1), "−2.0"),
     ((1234.5, 34, 2434), "1,234"),
     ((0.0, -0.01, 0.01), "0.000"), ((1.5e-7,), "1.500e−7")],
)  # fmt: skip
def test_numbers_are_rounded_by_their_interval(arguments, text):
    assert words.number(*arguments).replace("e−07", "e−7") == text


def test_commands_compose_to_the_settings_of_the_run():
    from distillbench.registry import load_registry
    from distillbench.runs.config import compose_runs, to_yaml

    registry = load_registry()
    asked = [
        "methods=[boot,pd]",
        "dataset=folder",
        "methods.boot.lr=0.001",
        'dataset.path="a b/it\'s=1"',
        "budget.images=77",
    ]
    config = yaml.safe_load(to_yaml(compose_runs(asked, registry)[0]))
    [every] = commands([config, {**config, "seed": 3}])
    import shlex

    program, command, *settings = shlex.split(every)
    assert (program, command, settings[-1]) == ("distillbench", "run", "seed=0,3")
    assert [yaml.safe_load(to_yaml(c)) for c in compose_runs(settings, registry)] == [config, {**config, "seed": 3}]


def test_the_short_command_has_what_differs_from_defaults_and_nothing_else():
    import shlex

    from distillbench.registry import load_registry
    from distillbench.runs.config import compose_runs
    from distillbench.runs.run_command import run_commands

    registry = load_registry()
    asked = ["methods=[boot,pd]", "dataset=digits", "methods.boot.lr=0.001,0.002", "evaluation.teacher_steps=[1,4]"]
    runs = compose_runs([*asked, "seed=0,1", "results_dir=/elsewhere"], registry)
    usual = compose_runs(["methods=[boot]", "dataset=digits"], registry)[0].methods["boot"].lr
    found = [shlex.split(command)[2:] for command in run_commands(runs)]
    lrs = [f"methods.boot.lr={lr}" for lr in (0.001, 0.002) if lr != usual]
    same = ["methods=[boot,pd]", "dataset=digits", "teacher=trained", "evaluation.teacher_steps=[1,4]", "seed=0,1"]
    assert sorted(word for words in found for word in words) == sorted([*same * 2, *lrs])
    again = [config for words in found for config in compose_runs([*words, "results_dir=/elsewhere"], registry)]
    assert sorted(map(str, again)) == sorted(map(str, runs))


# --- bad runs --------------------------------------------------------------------------------------------------------


def folder(tmp_path: Path, run: RunData) -> Path:
    """The run as files."""
    path = tmp_path / "results" / "run"
    path.mkdir(parents=True)
    run.table.to_parquet(path / "table.parquet")
    run.table.to_csv(path / "table.csv", index=False)
    (path / "columns.json").write_text(json.dumps(run.columns))
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (path / "environment.json").write_text("{}")
    return path


def test_reports_of_damaged_runs_list_the_problems(tmp_path):
    path = folder(tmp_path, good_run())
    said = Page(html_report([read_run(path)])).words  # its cells are gone
    assert said.count("Samples of these rows are not kept") == 1 and "Problems" not in said
    (path / "table.parquet").write_bytes(b"PAR1 not really")
    said = Page(html_report([read_run(path)])).words
    assert "Problems of this run" in said and "table.parquet is damaged" in said and "boot leads" in said
    frame = pd.read_csv(path / "table.csv").drop(columns=["train_tflops", "sample_gflops"]).assign(novel=1)
    frame[frame["method"] != "pd"].to_csv(path / "table.csv", index=False)
    said = Page(html_report([read_run(path)])).words
    assert "not finished: no rows of pd (seed 0)" in said
    assert "written by a version of distillbench that had no columns train_tflops, sample_gflops" in said
    assert "novel" in said
    (path / "table.csv").write_text("")
    (path / "columns.json").write_text("{")
    (path / "config.yaml").write_text("a: [")
    said = Page(html_report([read_run(path)])).words
    assert "There is nothing to compare" in said and "config.yaml is damaged" in said
    assert "No score is declared" in said and "settings are not known" in said


@pytest.mark.parametrize("rows", [
    [], [row("boot", status="failed", reason="x", fd_pixels=None, recall=None)], [row("teacher:ddim")],
    [row("boot", protocol=None, teacher=None, dataset=None, budget=None, fd_pixels=float("inf"), recall=None)],
    [row("boot", nfe=None, images=None, status="diverged", reason=None,
          fd_pixels=None, recall=None, key=None, device=None)],
])  # fmt: skip
def test_a_report_of_any_rows(rows):
    page = Page(html_report([run_of(rows)]))
    assert len(page.tables.get("s1-table", [[]])) == len(rows) + 1


def test_damaged_samples_are_left_out(tmp_path):
    path = folder(tmp_path, run_of([row("boot", key="k")]))
    cell = tmp_path / "results" / "cells" / "c"
    cell.mkdir(parents=True)
    (cell / "evaluation-k.json").write_text(json.dumps({"rows": [{"nfe": 1, "sampling_seed": 0, "status": "ok"}]}))
    save_file({"unlike": torch.zeros(1)}, cell / "evaluation-k.safetensors")
    assert "Samples of these rows are not kept" in html_report([read_run(path)])


# --- foreign text ----------------------------------------------------------------------------------------------------


def test_hostile_names_are_escaped():
    rows = [row(name, seed=s, settings=name, reason=name, key=name, device=name) for name in HOSTILE for s in (0, 1)]
    rows += [row(name, 2, status="failed", reason=name, fd_pixels=None, recall=None) for name in HOSTILE]
    along = [{**row(name), "fraction": 0.5} for name in HOSTILE]
    columns = {
        **COLUMNS,
        "fd_pixels": dict.fromkeys(("unit", "network", "needs", "protocol"), HOSTILE[1]) | {"direction": "lower"},
    }
    config = {"methods": {HOSTILE[0]: {"x": HOSTILE[1]}}, "dataset": {"kind": HOSTILE[0]}, "seed": 0}
    run = run_of(
        rows,
        along,
        columns=columns,
        configs=[config],
        environment={HOSTILE[0]: HOSTILE[1]},
        problems=list(HOSTILE),
        folder=Path("/x/<b>n"),
    )
    text = html_report([run])
    page = Page(text)
    plain = Page(html_report([good_run()]))
    harmless = {"json": "application/json"}
    executed = [a for t, a in page.tags if t == "script" and a.get("type") != harmless["json"]]
    assert executed == [{}, {}, {}]  # plotly's, those of tables and of charts
    assert {t for t, _ in page.tags} <= {t for t, _ in plain.tags} | {"nav", "li"}
    assert not [k for _, a in page.tags for k in a if k.startswith("on")]
    assert all(name in page.words for name in HOSTILE)
    for chart in page.data.values():  # plotly reads HTML in these
        assert not re.search(r"<(script|img|/script)", json.dumps(chart))


def test_nothing_is_loaded_from_outside():
    text = html_report([good_run()])
    page = Page(text)
    addresses = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "action", "data")]
    assert addresses and all(v.startswith(("data:", "#")) for v in addresses)
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", own) and "@import" not in own and "url(" not in own
    [policy] = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert "form-action 'none'" in policy and "base-uri 'none'" in policy
    offered = {a["download"]: a["href"] for _, a in page.tags if "download" in a}
    rows = base64.b64decode(offered["rows.csv"].partition("base64,")[2]).decode().splitlines()
    assert len(rows) == 1 + len(good_run().table) and "fd_pixels" in rows[0]
    assert "tabular" in base64.b64decode(offered["table.tex"].partition("base64,")[2]).decode()


# --- size ------------------------------------------------------------------------------------------------------------


def test_a_thousand_rows_and_two_hundred_pictures():
    rows = [
        row(f"method_{m % 20}", nfe, settings=f"lr={m}", key=f"k{m}", fd_pixels=1.0 + m + nfe)
        for m in range(250)
        for nfe in (1, 2, 4, 8)
    ]
    run, start = run_of(rows), time.monotonic()
    text = html_report([run])
    assert time.monotonic() - start < 30 and len(text) < 30 * 2**20
    page = Page(text)
    assert len(page.tables["s1-table"]) == 1001
    assert (
        sum(t == "img" for t, _ in page.tags) == pictures.MOST_ROWS
        and "The first 200 of 1,000 rows are shown" in page.words
    )


def test_large_pictures_have_fewer_columns(monkeypatch):
    run = good_run()
    rows = [(run, "boot", pd.Series(row("boot"))), (run, "pd", pd.Series(row("pd")))]
    whole = pictures.grid(rows)
    assert whole.columns == 16
    monkeypatch.setattr(pictures, "MOST_BYTES", 10)
    few = pictures.grid(rows)
    assert few.columns == 1 and any("1 column of 16" in note for note in few.notes)


# --- in a browser ----------------------------------------------------------------------------------------------------

DRIVE = """
<script>
window.addEventListener("load", async () => {
  const said = {}, wait = ms => new Promise(done => setTimeout(done, ms));
  const heading = n => [...document.querySelectorAll("#s1-table thead th")].find(h => h.textContent.startsWith(n));
  const cells = h => [...document.querySelectorAll("#s1-table tbody tr")]
    .map(r => r.cells[h.cellIndex].dataset.v ?? null);
  const fd = heading("fd_pixels");
  fd.querySelector("button").click(); said.up = cells(fd); said.aria = fd.getAttribute("aria-sort");
  fd.querySelector("button").click(); said.down = cells(fd);
  fd.querySelector("button").click(); said.original = cells(fd).join() !== said.up.join();
  const filter = document.querySelector('input[data-filter="s1-table"]');
  const rows = [...document.querySelectorAll("#s1-table tbody tr")];
  filter.value = "pd"; filter.dispatchEvent(new Event("input"));
  said.filtered = rows.filter(r => !r.hidden).map(r => r.cells[0].textContent.trim());
  filter.value = ""; filter.dispatchEvent(new Event("input"));
  const nfe = heading("NFE"), box = document.querySelector(`.choose input[value="${nfe.cellIndex + 1}"]`);
  said.before = getComputedStyle(nfe).display; box.click(); said.after = getComputedStyle(nfe).display;
  const grid = [...document.querySelectorAll(".grid")].at(-1), [reference, , shown] = grid.querySelectorAll(".strip");
  said.reference = reference.dataset.label;
  document.querySelector("[data-difference]").click();
  const pixelOf = canvas => [...canvas.getContext("2d").getImageData(5, 5, 1, 1).data];
  said.difference = pixelOf(shown.querySelector("canvas"));
  document.querySelector("[data-difference]").click(); said.hidden = shown.querySelector("canvas") === null;
  const first = shown.querySelector("button"); first.click();
  const dialog = document.querySelector("dialog"), canvas = dialog.querySelector("canvas");
  said.open = dialog.open; said.width = canvas.width; said.told = dialog.querySelector("p").textContent;
  said.pixels = [...dialog.querySelectorAll("canvas")].map(pixelOf);
  dialog.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  said.moved = dialog.querySelector("p").textContent;
  dialog.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
  said.below = dialog.querySelector("p").textContent;
  dialog.close(); said.closed = !dialog.open;
  for (const chart of document.querySelectorAll(".chart")) chart.scrollIntoView(), await wait(150);
  said.plots = document.querySelectorAll(".chart .main-svg").length > 0;
  said.drawn = [...document.querySelectorAll(".chart")].map(c => c.querySelectorAll(".trace").length);
  const plot = document.querySelector('[data-chart="s1-along"]');
  const select = plot.closest("figure").querySelector("select[data-axis=y]");
  said.title = plot.layout.yaxis.title.text; select.value = "recall"; select.dispatchEvent(new Event("change"));
  await wait(150); said.retitled = plot.layout.yaxis.title.text;
  said.named = [...document.querySelectorAll('[data-chart="s1-quality-1"] .annotation-text')].map(t => t.textContent);
  said.described = [...document.querySelectorAll(".chart")].every(c => c.role === "img" && c.ariaLabel.length > 20);
  said.buttons = document.querySelectorAll(".modebar-btn").length;
  const trace = document.querySelector('.legend button[data-trace="boot"]'), before = said.drawn[0];
  trace.click(); await wait(150);
  said.off = document.querySelectorAll(".chart")[0].querySelectorAll(".trace").length < before;
  said.alerts = window.alerts ?? 0;
  said.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const out = document.createElement("pre"); out.id = "said"; out.textContent = JSON.stringify(said);
  document.body.append(out);
});
</script>"""


def browse(page: Path, profile: Path, *words_: str) -> subprocess.CompletedProcess:
    """Chromium's answer for a file, with the network cut."""
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--disable-dev-shm-usage",
         f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=15000",
         *words_, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def console(answer: subprocess.CompletedProcess) -> list[str]:
    return [line for line in answer.stderr.splitlines() if ":CONSOLE" in line]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@needs_chromium
def test_the_page_has_no_console_message_without_a_network(real_plotly, tmp_path):
    rows = [row(name, seed=s) for name in ["boot", *HOSTILE] for s in (0, 1)]
    write_html([run_of(rows)], tmp_path / "report.html")
    answer = browse(tmp_path / "report.html", tmp_path / "profile", "--dump-dom")
    assert console(answer) == [] and 'class="main-svg"' in answer.stdout  # plots are drawn under the page's own policy
    assert "<script>alert(1)</script>" not in answer.stdout


@needs_chromium
def test_tables_sort_charts_are_drawn_and_pictures_enlarge(real_plotly, tmp_path):
    text = html_report([good_run()])
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it would stop the test's own script
    (tmp_path / "report.html").write_text(text.replace("</body>", DRIVE + "</body>"), encoding="utf-8")
    answer = browse(tmp_path / "report.html", tmp_path / "profile", "--dump-dom", "--window-size=1280,900")
    assert console(answer) == []
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', answer.stdout)[1]))
    values = [float(v) for v in said["up"]]
    assert values == sorted(values) and said["aria"] == "ascending" and [float(v) for v in said["down"]] == values[::-1]
    assert said["original"] and said["filtered"] == ["pd", "pd"]
    assert (said["before"], said["after"]) == ("table-cell", "none")
    assert said["open"] and said["closed"] and said["width"] >= 64 and said["width"] % 8 == 0
    assert said["reference"] == "teacher:ddim, NFE 2"  # all images have 20 times their NFE
    assert said["pixels"] == [[20, 20, 20, 255], [40, 40, 40, 255], [20, 20, 20, 255]]  # boot, teacher, difference
    assert said["difference"] == [20, 20, 20, 255] and said["hidden"]
    assert "noise 1" in said["told"] and "noise 2" in said["moved"]
    assert said["told"].split(",")[:2] != said["below"].split(",")[:2]
    assert said["plots"] and all(count > 0 for count in said["drawn"]) and len(said["drawn"]) >= 4
    assert said["title"] == "fd_pixels ↓" and said["retitled"] == "recall ↑"
    assert {"boot", "pd"} <= set(said["named"]) and said["described"] and said["off"]
    assert said["buttons"] == 0, "such as one that sends the chart to an address"


WIDTHS = (390, 800, 1400)
FRAMES = """<body><script>
addEventListener("load", () => setTimeout(() => {
  const said = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, wide = root.clientWidth;
    const cut = [...page.querySelectorAll("th, td, .chip, .name, figcaption, p, pre, dd")].filter(e => {
      const at = e.getBoundingClientRect();
      return at.width > 1 && at.right > wide + 1 && !e.closest("details:not([open]), thead");
    });
    const texts = cut.map(e => e.textContent.trim().slice(0, 40));
    return [root.scrollWidth - wide, texts, page.querySelectorAll(".annotation").length];
  });
  const out = document.createElement("pre"); out.id = "said"; out.textContent = JSON.stringify(said);
  document.body.append(out);
}, 3000));
</script>"""


@needs_chromium
def test_nothing_is_cut_off_on_phones_tablets_and_desks(real_plotly, tmp_path):
    write_html([good_run()], tmp_path / "report.html")
    frames = [f'<iframe src="report.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in WIDTHS]
    (tmp_path / "frames.html").write_text(FRAMES + "".join(frames), encoding="utf-8")
    answer = browse(
        tmp_path / "frames.html", tmp_path / "profile", "--dump-dom", "--allow-file-access-from-files",
        "--window-size=1500,2900",
    )  # fmt: skip
    assert console(answer) == []
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', answer.stdout)[1]))
    assert len(said) == len(WIDTHS)
    for width, (over, cut, labels) in zip(WIDTHS, said, strict=True):
        assert over == 0 and cut == [] and labels > 0, (width, over, cut, labels)


def test_published_numbers_are_separate_and_of_the_same_data():
    """CIFAR-10 at its resolution has some, digits have none."""

    def of(kind, resolution):
        config = {"dataset": {"kind": kind, "resolution": resolution}, "methods": {"boot": {}}, "seed": 0}
        return html_report([replace(good_run(), configs=[config])])

    some = of("cifar10", 32)
    apart = some[some.index('id="published"') : some.index('id="protocol"')]
    assert LABEL[1:] in apart and apart.count("<tr>") == len(published("cifar10", 32)) + 1
    assert 'id="published"' not in of("digits", 8) and 'id="published"' not in of("cifar10", 64)
