"""Reports in tests have no chart library, unless a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distillbench.reports import html as report_html


@pytest.fixture(autouse=True, scope="module")
def small_plotly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plotly's script has 1 MB, which takes time to parse, and only a browser runs it."""
    script = tmp_path_factory.getbasetemp() / "plotly.js"
    script.write_text("/* plotly */")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_html, "PLOTLY", script)
        yield
