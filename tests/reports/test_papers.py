"""Tables and figures for papers: what they say, what they must not, and that other programs read them."""

import ast
import csv
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from distillbench.errors import UserError
from distillbench.records.numbers import decimals
from distillbench.records.statistics import summarise
from distillbench.records.table import make_along, make_table
from distillbench.reports import figures, papers, published
from distillbench.reports.figures import write_figures
from distillbench.reports.papers import paper_table
from distillbench.reports.runs import RunData

FID = {"fid": {"unit": "", "direction": "lower", "network": "", "needs": "", "protocol": ""}}
HOSTILE = r"a_b & 50% #1 ${x}^2~\input{/etc/passwd} <script>alert('1')</script> | `c` *d* [e](f) é → 模 " + '"q"'


def row(method="boot", fid=1.0, training_seed=0, **names):
    base = {"dataset": "cifar10", "teacher": "edm-1", "sampling_seed": 0, "nfe": 1, "images": 2048, "protocol": "p"}
    base |= {"budget": "300 images, batch 4", "status": "ok", "reason": "", "settings": "", "device": "cpu"}
    base |= {"train_seconds": 100.0, "train_teacher_nfe": 5000, "sample_latency_p50_ms": 2.5, "key": f"{method}-1"}
    return base | {"method": method, "fid": fid, "training_seed": training_seed} | names


def teacher(**names):
    nothing = {"training_seed": None, "budget": "", "train_seconds": None, "train_teacher_nfe": None}
    return row("teacher:ddim", **(nothing | names))


def run_of(rows, columns=FID, along=(), problems=(), folder=Path("run"), summary=True):
    table = make_table(rows, list(columns))
    directions = {name: told["direction"] for name, told in columns.items()}
    told = summarise(table, directions) if len(table) and summary else table
    return RunData(folder, table, told, make_along(list(along), list(columns)), dict(columns), [], {}, list(problems))


@pytest.fixture
def clear():
    """a leads at one evaluation; at two, intervals overlap, but pairs of seeds tell it apart."""
    rows = [teacher(fid=4.0, nfe=8)]
    for seed in range(3):
        rows += [row("a", 10.0 + 0.1 * seed, seed), row("b", 20.0 + 0.1 * seed, seed)]
        rows += [row("a", 5.0 + seed, seed, nfe=2), row("b", 5.1 + seed, seed, nfe=2)]
    return run_of(rows)


def lines(table):
    """Cells of a Markdown table, the headings first."""
    found = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in [found[0], *found[2:]]]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "half_width", "digits"),
    [
        (1.234, 0.04, 2),  # 1.23 ± 0.04
        (1.234, 0.12, 2),  # 1.23 ± 0.12
        (1.234, 0.0354, 3),
        (1.234, 0.0356, 2),
        (1.234, 0.097, 2),  # ± 0.10
        (338.4, 60.9, 0),
        (338.4, 3.3, 1),
        (1234.5, 400, 0),
        (0.00012345, 0.000001, 7),
        (1.234, None, 3),
        (84.41, None, 2),
        (0.0, None, 0),
        (1.234, 0.0, 3),
        (2e-9, None, 12),
    ],
)
def test_digits_follow_the_interval(value, half_width, digits):
    assert decimals(value, half_width) == digits


def test_means_intervals_and_the_leader(clear):
    """At n = 3, t(0.975, 2) = 4.3027: the half width is 4.3027 x 0.1 / sqrt(3) = 0.2484."""
    headings, *body = lines(paper_table([clear]))
    assert headings == ["method", "NFE", "fid ↓", "teacher evaluations ↓", "training time (s) ↓", "latency p50 (ms) ↓"]
    cells = {(line[0], line[1]): line[2] for line in body}
    assert cells["a", "1"] == "**10.10 ± 0.25**"
    assert cells["b", "1"] == "20.10 ± 0.25"
    assert cells["a", "2"] == "**6.0 ± 2.5**"
    assert cells["teacher:ddim", "8"] == "4"
    assert body[0] == ["teacher:ddim", "8", "4", "–", "–", "2.500"]
    assert body[1][3:] == ["5,000", "100", "2.500"]


def test_the_caption_says_what_is_compared(clear):
    caption = paper_table([clear]).split("\n\n")[0]
    for part in ("cifar10", "edm-1", "300 images, batch 4", "2,048 samples per row", "3 training seeds"):
        assert part in caption
    assert "±: half the 95 % interval of the mean over training seeds (Student's t)" in caption
    assert "Bold" in caption


def test_nobody_is_best_with_one_seed():
    for form in ("markdown", "latex"):
        text = paper_table([run_of([row("a", 1.0), row("b", 99.0)])], form=form)
        assert "**" not in text and "mathbf" not in text and "Bold" not in text
        assert "None is marked as best" in text


def test_higher_is_better_and_no_direction():
    up = {"score": FID["fid"] | {"direction": "higher", "unit": "x_1"}, "spread": FID["fid"] | {"direction": "none"}}
    rows = [row(m, None, s, score=v + s / 100, spread=v) for m, v in (("a", 1.0), ("b", 9.0)) for s in range(3)]
    run = run_of([{k: v for k, v in one.items() if k != "fid"} for one in rows], up)
    headings, *body = lines(paper_table([run], ["method", "score", "spread"], sort="score"))
    assert headings == ["method", r"score (x\_1) ↑", "spread"]
    assert [line[0] for line in body] == ["b", "a"]
    assert body[0][1].startswith("**")
    assert not any("**" in line[2] for line in body)
    assert [line[0] for line in lines(paper_table([run], ["method"], sort="-score"))[1:]] == ["a", "b"]


def test_columns_precision_and_order(clear):
    text = paper_table([clear], ["nfe", "method", "fid", "parameters"], {"fid": 4}, "fid")
    headings, *body = lines(text)
    assert [h.split()[0] for h in headings] == ["NFE", "method", "fid", "parameters"]
    assert [line[1] for line in body] == ["teacher:ddim", "a", "b", "a", "b"]
    assert body[3][2] == "**10.1000 ± 0.2484**"


@pytest.mark.parametrize("form", ["markdown", "latex", "csv"])
def test_unknown_names(clear, form):
    with pytest.raises(UserError, match=r"no column 'fd'\. Did you mean 'fid'\? Possible: run, dataset"):
        paper_table([clear], ["fd"], form=form)
    with pytest.raises(UserError, match=r"no column 'tran_seconds'\. Did you mean 'train_seconds'"):
        paper_table([clear], sort="-tran_seconds", form=form)
    with pytest.raises(UserError, match="no column 'x'"):
        paper_table([clear], precision={"x": 1}, form=form)
    with pytest.raises(UserError, match="precision of fid is -1"):
        paper_table([clear], precision={"fid": -1}, form=form)
    with pytest.raises(UserError, match="no columns"):
        paper_table([clear], [], form=form)


def test_unknown_form(clear):
    with pytest.raises(UserError, match=r"no form 'latx'\. Did you mean 'latex'"):
        paper_table([clear], form="latx")


# --- rows that failed, runs that are empty or several ----------------------------------------------------------------


def failing():
    rows = [row("a", 1.0, 0), row("a", None, 1, status="failed", reason="CUDA out of\nmemory"), row("b", 2.0, 0)]
    return run_of(
        [*rows, row("c", None, 0, status="diverged", reason="loss is nan", images=None)], problems=["half|done"]
    )


def test_failed_rows_stay_with_their_reasons():
    text = paper_table([failing()])
    headings, *body = lines(text)
    status = {line[0]: line[headings.index("status")] for line in body}
    assert status == {"a": "1 of 2 ok, else failed", "b": "ok", "c": "diverged"}
    assert "- a, 1 NFE: failed: CUDA out of memory\n" in text
    assert "- c, 1 NFE: diverged: loss is nan\n" in text
    assert r"half\|done" in text


def test_failed_rows_in_latex_and_csv():
    tex = paper_table([failing()], form="latex")
    assert "1 of 2 ok, else failed" in tex
    assert "% not ok: a, 1 NFE: failed: CUDA out of memory\n" in tex
    table = pd.read_csv(io.StringIO(paper_table([failing()], form="csv"))).set_index("method")
    assert table["status"].to_dict() == {"a": "1 of 2 ok, else failed", "b": "ok", "c": "diverged"}
    assert np.isnan(table["fid"]["c"])


def test_what_may_not_be_compared_stands_in_tables_of_its_own():
    rows = [teacher(fid=0.5), row("a", 1.0), row("a", 2.0, budget="600 images, batch 4"), row("b", 3.0, protocol="q")]
    text = paper_table([run_of(rows)])
    parts = text.split("Dataset cifar10")[1:]
    methods = [[line[0] for line in lines(part)[1:]] for part in parts]
    assert methods == [["teacher:ddim", "a"], ["teacher:ddim", "a"], ["b"]]
    assert paper_table([run_of(rows)], form="latex").count(r"\begin{table}") == 3
    table = pd.read_csv(io.StringIO(paper_table([run_of(rows)], form="csv")), keep_default_na=False)
    assert list(table)[:2] == ["budget", "protocol"]
    assert len(table) == 4


def test_settings_tell_rows_apart():
    rows = [row("a", 1.0, settings="lr=1"), row("a", 2.0, settings="lr=2")]
    headings, *body = lines(paper_table([run_of(rows)]))
    assert headings[:2] == ["method", "settings"]
    assert [line[1] for line in body] == ["lr=1", "lr=2"]


def test_several_runs():
    one = run_of([row("a", 1.0, 0), row("b", 5.0, 0)], folder=Path("one"))
    two = run_of([row("a", 1.2, 1), row("b", 5.2, 1)], folder=Path("two"))
    body = lines(paper_table([one, two], ["method", "fid"]))[1:]
    assert [line[0] for line in body] == ["a", "b"]
    assert "±" in body[0][1], "seeds of two runs are seeds of one method"
    again = run_of([row("a", 3.0, 0)], folder=Path("again"))
    headings, *body = lines(paper_table([one, again]))
    assert headings[1] == "run", "the same seed measured twice: each run stands alone"
    assert {(line[0], line[1]) for line in body} == {("a", "one"), ("b", "one"), ("a", "again")}
    other = run_of([row("a")], {"fid": FID["fid"] | {"direction": "higher"}})
    with pytest.raises(UserError, match="disagree"):
        paper_table([one, other])


@pytest.mark.parametrize("runs", [[], [run_of([], problems=["there is no table"])], [run_of([], {})]])
def test_nothing_to_show_is_said(runs, tmp_path):
    assert "There are no rows to show" in paper_table(runs)
    assert "no rows to show" in paper_table(runs, form="latex")
    assert paper_table(runs, form="csv").startswith("method,nfe")
    assert write_figures(runs, tmp_path) == []


# --- hostile names ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile():
    columns = {"fid_%&": FID["fid"] | {"unit": "a_b^2 → ~{}\\"}}
    rows = [{k: v for k, v in row(HOSTILE, s, s).items() if k != "fid"} | {"fid_%&": 1.0 + s} for s in (0, 1)]
    rows += [rows[0] | {"method": "b", "status": "failed", "reason": HOSTILE + "\n\\end{document}", "fid_%&": None}]
    return run_of(rows, columns, problems=[HOSTILE + "\r\n\u2028x"])


class Cells(HTMLParser):
    """Texts of table cells, and all tags."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags, self.inside = [], set(), False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.inside |= tag in ("td", "th")
        self.cells += [""] if tag in ("td", "th") else []

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")

    def handle_data(self, text):
        if self.inside:
            self.cells[-1] += text


def test_markdown_shows_names_as_they_are(hostile):
    """By another program, with HTML allowed."""
    page = Cells()
    page.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(paper_table([hostile])))
    assert page.cells[7] == HOSTILE
    assert page.cells[2] == "fid_%& (a_b^2 → ~{}\\) ↓"
    assert page.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong"}


def test_csv_keeps_names_as_they_are(hostile):
    found = list(csv.DictReader(io.StringIO(paper_table([hostile], form="csv"))))
    assert found[0]["method"] == HOSTILE
    assert (found[0]["fid_%&"], found[0]["fid_%&_plus_minus"], found[0]["fid_%&_leads"]) == ("2", "6", "")


def test_latex_is_balanced_and_holds_no_command_of_a_name(hostile):
    tex = "\n".join(line for line in paper_table([hostile], form="latex").splitlines() if not line.startswith("%"))
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 1
    for rule in ("toprule", "midrule", "bottomrule"):
        assert tex.count(f"\\{rule}") == 1
    bare = re.sub(r"\\[&%$#_{}\\]", "", tex)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search("[%#_~]", re.sub(r"\\label\{.*?\}", "", bare))
    assert r"\input" not in tex and r"\end{document}" not in tex
    rows = [line for line in bare.splitlines() if " & " in line]
    cells = {line.count("&") + line.count(r"\multicolumn{2}") for line in rows}
    assert cells == {7}, "as many cells in every row: six columns, one of them with half widths, and status"
    assert set(re.findall(r"\\([a-zA-Z]+)", bare)) <= {
        *("begin", "end", "centering", "caption", "label", "toprule", "midrule", "bottomrule", "pm", "mathbf"),
        *("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"),
        *(
            "rightarrow",
            "downarrow",
            "small",
            "footnotesize",
            "scriptsize",
            "setlength",
            "tabcolsep",
            "sisetup",
            "vskip",
        ),
        *("multicolumn", "addlinespace", "resizebox", "linewidth"),
    }


def compiled(tex, folder, setup=""):
    """The result of a LaTeX engine, with errors that stop it. `setup`: more of the preamble."""
    engines = {"pdflatex": ["-interaction=nonstopmode", "-halt-on-error"], "tectonic": []}
    name = next((name for name in engines if shutil.which(name)), None)
    if name is None:
        pytest.skip("neither pdflatex nor tectonic is installed")
    packages = f"\\usepackage{{booktabs,siunitx,graphicx}}\n{setup}"
    document = f"\\documentclass{{article}}\n{packages}\n\\begin{{document}}\n{tex}\n\\end{{document}}\n"
    (folder / "paper.tex").write_text(document, encoding="utf-8")
    return subprocess.run(
        [name, *engines[name], "paper.tex"], cwd=folder, capture_output=True, text=True, errors="replace", timeout=100
    )


def test_latex_compiles(clear, hostile, tmp_path):
    every = "".join(chr(code) for code in [*range(0x20, 0x17F), *range(0x3B1, 0x3CA), *range(0x2190, 0x2195), 0x1F600])
    odd = run_of(
        [row(every, 1.0), row("\ufeff\u202e", -1.5), row("[1ex] = \\", float("inf")), row("*", 1.0)], problems=[every]
    )
    text = "\n".join(paper_table([run], form="latex") for run in (clear, hostile, failing(), odd, run_of([])))
    done = compiled(text, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 1000
    assert "Missing character" not in done.stdout


WIDTHS = {"neurips": (5.5, 5.5), "icml": (3.25, 6.75)}  # inches of a column and of the text, in both styles' files


@pytest.fixture
def wide():
    """Sixteen methods with long labels, two scores with and without intervals, bold ones, and all costs."""
    named = {"label": "FD (EffNet-Lite0)", "unit": "squared feature distance"}
    columns = {"fd": FID["fid"] | named, "rmse": FID["fid"] | {"label": "RMSE to teacher"}}
    rows = [teacher(fid=None, nfe=n, fd=1870.52, rmse=0.50491) for n in (1, 2, 64)]
    for number in range(16):
        for seed in (0, 1):
            costs = {"train_tflops": 2.51, "train_teacher_nfe": 2204384, "fd": 100.0 * number + seed, "rmse": 0.1574}
            rows.append(row(f"method_{number}", None, seed, **costs))
    return run_of([{k: v for k, v in one.items() if k != "fid"} for one in rows], columns)


@pytest.mark.parametrize("style", WIDTHS)
def test_latex_is_no_wider_than_the_page(wide, clear, style, tmp_path):
    """By TeX itself; the plain table is not starred where it fits in a column."""
    column, text = WIDTHS[style]
    setup = f"\\usepackage[textwidth={text}in,textheight=9in]{{geometry}}\n"
    setup += f"\\twocolumn\\setlength{{\\columnsep}}{{{text - 2 * column}in}}\n" if text > column else ""
    every = paper_table([wide], form="latex", style=style) + paper_table([clear], form="latex", style=style)
    every += paper_table([wide], ["method", "nfe", "fd"], form="latex", style=style)
    assert every.count("{table*}") == (0 if style == "neurips" else 4)  # the last one fits in a column
    done = compiled(every, tmp_path, setup)
    assert done.returncode == 0 and "Overfull" not in done.stdout, done.stdout[-3000:]


def test_latex_s_widths_by_a_count(wide):
    """Without an engine, too: digits of Computer Modern are half as wide as the letters are high."""
    tex = paper_table([wide], form="latex")
    (size,) = re.findall(r"\\(small|footnotesize|scriptsize)", tex)
    points = {"small": 9, "footnotesize": 8, "scriptsize": 7}[size]
    (specification,) = re.findall(r"\\begin\{tabular\}\{(.*)\}", tex)
    formats = re.findall(r"table-format=-?(\d)(?:\.(\d))?", specification)
    digits = sum(int(whole) + int(part or 0) for whole, part in formats)
    halves = max(len(half) for half in re.findall(r"pm\\,(?:\\mathbf\{)?([\d.]+)", tex)) + 2
    columns = len(formats) + specification.count("l")
    names = len("teacher:ddim")
    assert (digits + halves + names) * 0.5 * points + columns * 2 * 3 <= 5.5 * 72.27
    assert r"\addlinespace" in tex and tex.count("teacher:ddim &") == 1, "a method is named once"
    assert r"(\si" not in tex and "squared feature distance" in tex.split(r"\label")[0], "a long unit is in the caption"


def test_a_table_that_is_wider_than_any_page_is_scaled(wide):
    tex = paper_table(
        [wide],
        [
            "method",
            "nfe",
            "fd",
            *["rmse"],
            "teacher",
            "budget",
            "dataset",
            "protocol",
            "device",
            "train_seconds",
            "train_teacher_nfe",
            "sample_latency_p50_ms",
            "status",
        ],
        form="latex",
        style="icml",
    )
    assert r"\resizebox{\linewidth}" in tex


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """A run of everything that can be drawn."""
    rows = [teacher(fid=50.0, nfe=1), teacher(fid=0.9, nfe=32, sample_latency_p50_ms=80.0, settings="")]
    along = []
    for seed in range(3):
        for method, fid in (("a", 5.0), ("_b<&$\\frac", 9.0)):
            rows += [row(method, fid + seed / 10, seed), row(method, fid - 3 + seed / 10, seed, nfe=2)]
            for fraction in (0.5, 1.0):
                there = {"fraction": fraction, "train_images": int(300 * fraction)}
                along.append(row(method, fid / fraction + seed / 10, seed) | there)
    run = run_of(rows, along=along)
    pictures = (torch.arange(4 * 3 * 8 * 8) % 256).reshape(4, 3, 8, 8).to(torch.uint8)
    monkeypatch.setattr(RunData, "shown", lambda self, key: [(1, 0, pictures), (2, 0, pictures[:, :2])])
    return run


NAMES = ["fid-nfe", "fid-latency", "fid-training", "fid-along", "samples"]


def test_every_figure_in_every_format_and_again_the_same_bytes(drawn, tmp_path, monkeypatch):
    before = dict(matplotlib.rcParams)
    written = write_figures([drawn], tmp_path / "new")
    assert [path.name for path in written] == [f"{name}.{form}" for name in NAMES for form in ("pdf", "svg", "png")]
    assert sorted(written) == sorted((tmp_path / "new").iterdir())
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert len(np.unique(np.asarray(image.convert("L")))) > 4, "empty"
        elif path.suffix == ".pdf":
            content = path.read_bytes()
            assert content.startswith(b"%PDF-") and b"/Type3" not in content and b"CreationDate" not in content
    assert dict(matplotlib.rcParams) == before, "the user's settings are changed"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):
        again = write_figures([drawn], tmp_path / "again")
    assert [one.name for one, two in zip(written, again, strict=True) if one.read_bytes() != two.read_bytes()] == []


def test_text_of_svg_is_text_and_names_are_escaped(drawn, tmp_path):
    write_figures([drawn], tmp_path, ["svg"])
    raw = (tmp_path / "fid-nfe.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(raw)
    texts = [" ".join("".join(node.itertext()).split()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"NFE", "fid ↓", "teacher:ddim", "a", "_b<&$\\frac"} <= set(texts)
    assert "<date" not in raw and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|rdf:\w+="[^"]*"', "", raw)


def caught(run, monkeypatch, folder):
    """The figures by name, before they are written."""
    found = {}
    monkeypatch.setattr(
        figures._Files, "write", lambda self, figure, name, number: found.update({(name, number): figure})
    )
    write_figures([run], folder)
    return found


def test_axes_bars_and_colours(drawn, monkeypatch, tmp_path):
    found = caught(drawn, monkeypatch, tmp_path)
    axes = found["fid-nfe", 0].axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log"), "1 to 32, 0.9 to 50"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "32"]
    training = found["fid-training", 0].axes[0]
    assert (training.get_xscale(), training.get_yscale()) == ("linear", "log"), "students alone, 2.1 to 9.1"
    bars = {b.get_label(): b for b in axes.containers}
    assert len(bars) == 3
    a = next(b for b in axes.containers if b.lines[0].get_color() == figures.PALETTE[1])
    assert list(a.lines[0].get_ydata()) == pytest.approx([5.1, 2.1])
    low, high = a.lines[2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-4)
    colours = {
        name: {line.get_color() for line in figure.axes[0].get_lines() if line.get_marker() == "s"}
        for (name, _), figure in found.items()
        if figure is not None and name != "samples"
    }
    assert all(found == {figures.PALETTE[1]} for found in colours.values()), "a method changes its colour"


@pytest.mark.parametrize("style", WIDTHS)
def test_figures_are_as_wide_as_columns_and_nothing_covers_the_rest(drawn, style, monkeypatch, tmp_path):
    found = {}
    monkeypatch.setattr(figures._Files, "write", lambda self, figure, name, number: found.update({name: figure}))
    write_figures([drawn], tmp_path, style=style)
    for name in ("fid-nfe", "fid-training"):
        figure = found[name]
        assert figure.get_figwidth() == WIDTHS[style][0]
        with matplotlib.rc_context({"text.parse_math": False}):
            figure.draw_without_rendering()
            renderer, (axes,) = figure.canvas.get_renderer(), figure.axes
            legend = figure.legends[0].get_window_extent(renderer)
            below = axes.xaxis.label.get_window_extent(renderer)
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width and legend.y0 >= 0
        assert legend.y1 <= below.y0 + 1
        texts = [text.get_window_extent(renderer).padded(-1) for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(texts) for b in texts[:i])
        assert axes.get_xlabel().endswith("NFE") and {text.get_text() for text in axes.texts} <= {"1", "2", "32"}
        assert axes.xaxis.label.get_fontname() == "STIXGeneral"


def test_sets_that_may_not_be_compared_have_figures_of_their_own(tmp_path):
    rows = [row("a", 1.0), row("a", 2.0, budget="more")]
    names = [path.name for path in write_figures([run_of(rows)], tmp_path, ["png"])]
    assert {"fid-nfe.png", "fid-nfe-2.png"} <= set(names)
    assert "samples.png" not in names and "fid-along.png" not in names


def test_values_that_cannot_be_drawn_are_left_out(tmp_path):
    rows = [row("a", float("inf")), row("b", None, status="failed"), row("\x00c\ufffe " * 30, 1.0)]
    written = write_figures([run_of(rows)], tmp_path, ["svg", "png"])
    assert len(written) == 6
    ElementTree.parse(written[0])
    assert write_figures([run_of(rows[:2])], tmp_path) == []


def test_a_damaged_table_along_training_is_left_out(tmp_path):
    run = run_of([row("a", 1.0)])
    for damaged in (pd.DataFrame({"a": [1]}), pd.DataFrame({"method": [1.5, None], "fid": ["x", 2]})):
        written = write_figures([replace(run, along=damaged)], tmp_path, ["svg"])
        assert [path.stem for path in written] == ["fid-nfe", "fid-latency", "fid-training"]


def test_a_score_s_name_is_no_path(tmp_path):
    columns = {"../../x": FID["fid"], "../_/x": FID["fid"]}
    run = run_of([row("a") | dict.fromkeys(columns, 1.0)], columns)
    written = write_figures([run], tmp_path / "deep", ["png"])
    assert {path.parent for path in written} == {tmp_path / "deep"}
    assert len(set(written)) == len(written) == 6


def test_unknown_format(drawn, tmp_path):
    with pytest.raises(UserError, match=r"no format 'pgn'\. Did you mean 'png'"):
        write_figures([drawn], tmp_path, ["pgn"])


@pytest.mark.parametrize("module", [figures, papers, published])
def test_no_global_state_and_no_plugin_is_imported(module):
    nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not [
        name for name in names if name.startswith(("matplotlib.pyplot", "distillbench.builtin", "distillbench_"))
    ]
