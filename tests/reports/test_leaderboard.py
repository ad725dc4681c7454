"""The site of several runs: what its boards compare, which run counts, its links, and how it works in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from distillbench.cli.commands import cli
from distillbench.reports.html import html_report
from distillbench.reports.leaderboard import GENERATOR
from distillbench.reports.runs import read_run
from tables_of_runs import TEACHER, row, run_folder, seeds

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OLD = {"date": "2026-01-02", "distillbench": "0.1.0", "git": {"commit": "aaaaaaaa1", "dirty": False}}
NEW = {"date": "2026-03-04", "distillbench": "0.1.0", "git": {"commit": "bbbbbbbb2", "dirty": False}}


@pytest.fixture
def folders(tmp_path):
    return two_runs(tmp_path)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of the two runs, to read only."""
    folder = tmp_path_factory.mktemp("leaderboard")
    done = written(two_runs(folder), "-o", folder / "site")
    assert done.exit_code == 0, done.output
    return folder / "site"


def two_runs(tmp_path):
    """results/old and results/new: both have boot, of which new is the newer; old has cm, new another dataset, too."""
    results = tmp_path / "results"
    rows = [row(fid=3.0, nfe=8, **TEACHER), *seeds([10.0, 10.2, 10.1], inputs="noise")]
    old = [*rows, *seeds([30.0, 30.2, 30.1], method="cm", inputs="data"), *seeds([8.0, 8.2, 8.1], method="cm", nfe=4)]
    old += seeds([25.0, 25.4, 25.2], method="direct", inputs="pairs")
    run_folder(results / "old", old, environment=OLD)
    new = [*seeds([20.0, 20.4, 20.2], inputs="noise"), *seeds([5.0, 6.0, 5.5], method="pd", dataset="rings")]
    run_folder(results / "new", new, environment=NEW)
    return results


def written(*words):
    return CliRunner().invoke(cli, ["leaderboard", *map(str, words)])


def cells(page: str, table: str) -> list[dict[str, str]]:
    """The rows of a table of a page: texts by the columns' headings."""
    body = re.search(rf'<table[^>]*id="{table}">(.*?)</table>', page, re.DOTALL)[1]
    found = []
    for line in re.findall(r"<tr.*?</tr>", body.partition("<tbody>")[2], re.DOTALL):
        parts = re.findall(r'<(?:th scope=row|td) data-label="([^"]*)"[^>]*>(.*?)</t[hd]>', line, re.DOTALL)
        found.append({html.unescape(name): " ".join(re.sub("<[^>]+>", " ", text).split()) for name, text in parts})
    return found


def test_boards_show_the_newest_run_and_pages_of_methods_show_all(site):
    index = (site / "index.html").read_text()
    assert index.count('class="board"') == 2
    digits = cells(index, "b1-table") if "digits" in index.split('id="b1"')[1][:80] else cells(index, "b2-table")
    of = {(line["method"], line["NFE"]): line for line in digits}
    assert of["boot", "1"]["fid ↓"].startswith("20.2 ±") and of["boot", "1"]["run"] == "new"
    assert of["cm", "1"]["fid ↓"].startswith("30.10 ±") and of["cm", "1"]["run"] == "old"
    boot = cells((site / "methods" / "boot.html").read_text(), "h1")
    assert [(line["run"], line["date"], line["version"], line["fid ↓"][:7]) for line in boot] == [
        ("new", "2026-03-04", "commit bbbbbbbb", "20.2 ± "), ("old", "2026-01-02", "commit aaaaaaaa", "10.10 ±"),
    ]  # fmt: skip


def test_leading_groups_and_numbers_are_those_of_the_report(site):
    """boot (20.2 ± 0.5: t = 4.303, sd = 0.2) leads at one evaluation; its cell is as in the report of its run."""
    index = (site / "index.html").read_text()
    assert "At one evaluation, boot leads (fid 20.2 ± 0.5); direct (25.2) and cm (30.1) trail." in index
    report = html_report([read_run(site.parent / "results" / "new")])
    assert "20.2 ± 0.5" in report
    (leader,) = re.findall(r'class="num group"[^>]*title="([^"]*)"[^>]*>\s*20\.2 ', index)
    assert leader.startswith("in the leading group")
    assert not re.findall(r'class="num group"[^>]*>\s*30\.1 ', index)


def test_among_methods_without_data_others_do_not_count(site):
    index = (site / "index.html").read_text()
    free = index.split('class="answer-free"')[1].split("</div>")[0]
    assert "boot leads" in free and "direct (25.2) trails." in free and "cm (" not in free
    assert 'data-free="no"' in index and 'data-free="yes"' in index and 'data-free="teacher"' in index


def test_links_lead_to_pages_and_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        for target in re.findall(r'<a href="([^"#]+?)(?:#[^"]*)?"', text):
            assert target.startswith("data:") or (page.parent / target).is_file(), target
        assert "default-src 'none'" in html.unescape(text) and "http-equiv" in text
        assert not re.search(r'(src|href)="(https?:)?//', text)


def test_names_cannot_leave_the_site_or_run(tmp_path):
    hostile = "../../<script>alert(1)</script>"
    run_folder(
        tmp_path / "a", [*seeds([1.0, 2.0], method=hostile), *seeds([3.0, 4.0], method="A"), *seeds([1.0], method="a")]
    )
    assert written(tmp_path / "a", "-o", tmp_path / "site").exit_code == 0
    assert "<script>alert(1)" not in "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file() and "site" in path.parts} == {".html"}
    names = [page.name.lower() for page in (tmp_path / "site" / "methods").iterdir()]
    assert len(set(names)) == 3


def test_wrong_input_is_one_message(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    done = written(tmp_path / "empty", "-o", tmp_path / "site")
    assert done.exit_code != 0 and "is not a run and has none in it" in str(done.exception)
    done = written(folders / "ole", "-o", tmp_path / "site")
    assert "Did you mean 'old'?" in str(done.exception)
    run_folder(tmp_path / "none", [])
    assert "there is no row to show: none finished no cell" in str(
        written(tmp_path / "none", "-o", tmp_path / "s").exception
    )
    assert not (tmp_path / "site").exists()


def test_pages_of_others_stay_own_stale_ones_go_and_damage_is_a_note(folders, tmp_path):
    site = tmp_path / "site"
    for name in ("methods/mine.html", "methods/pd.html"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("<p>mine</p>" if "mine" in name else GENERATOR)  # of an earlier site
    shutil.rmtree(folders / "new")
    (folders / "old" / "environment.json").write_text("{")
    done = written(folders, "-o", site)
    assert done.exit_code == 0 and "old: environment.json is damaged" in done.stderr
    index = (site / "index.html").read_text()
    assert "environment.json is damaged" in index and "not recorded" in index
    assert (site / "methods" / "mine.html").is_file() and not (site / "methods" / "pd.html").exists()
    (site / "index.html").write_text("<p>mine</p>")
    done = written(folders, "-o", site)
    assert "is no page of a leaderboard" in str(done.exception) and (site / "index.html").read_text() == "<p>mine</p>"


DRIVE = """
<script>
addEventListener("load", () => {
  const said = {}, form = document.querySelector("form.filters");
  const seen = () => [...document.querySelectorAll(".board tr[data-free]")].filter(r => r.offsetParent)
    .map(r => [r.cells[0].textContent.trim(), r.dataset.nfe].join());
  const set = (name, value) => {
    const one = form.elements.namedItem(name);
    one.type === "checkbox" ? one.checked = value : one.value = value;
    one.dispatchEvent(new Event("change", { bubbles: true }));
  };
  said.all = seen().length;
  set("free", true); said.free = seen(); set("free", false);
  set("nfe", "4"); said.four = seen(); said.hash = location.hash; set("nfe", "");
  set("dataset", "rings"); said.rings = seen(); set("dataset", "");
  said.again = seen().length;
  said.labelled = [...form.querySelectorAll("select, input")].every(one => one.closest("label"));
  said.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const out = document.createElement("pre"); out.id = "said"; out.textContent = JSON.stringify(said);
  document.body.append(out);
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_filters_in_a_browser_of_a_phone(site, tmp_path):
    text, page = (site / "index.html").read_text(), tmp_path / "index.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it stops other scripts
    page.write_text(text.replace("</body>", DRIVE + "</body>"))
    answer = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
         "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not [line for line in answer.stderr.splitlines() if ":CONSOLE" in line]
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', answer.stdout)[1]))
    assert (
        said["free"] == ["teacher:ddim,8", "boot,1", "direct,1"]
        and said["four"] == ["cm,4"]
        and said["hash"] == "#nfe=4"
    )
    assert said["rings"] == ["pd,1"] and said["again"] == said["all"] == 6
    assert said["labelled"] and said["wide"] == 0
