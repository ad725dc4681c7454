"""Take the README's picture of a report: python docs/screenshot.py results/digits docs/report.png (needs chromium)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from distillbench.reports.html import write_html
from distillbench.reports.runs import read_run

WIDTH, HEIGHT = 1400, 1110


def main(run: str, picture: str) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("error: no chromium on this machine")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_html([read_run(Path(run))], page)
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        words += [f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=8000"]
        subprocess.run(
            [*words, f"--screenshot={Path(picture).absolute()}", page.as_uri()], check=True, capture_output=True
        )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
