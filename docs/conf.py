"""The site: ``sphinx-build -W -b html docs docs/_build/html``. Nothing is fetched, then or by its pages."""

from __future__ import annotations

import re
from typing import Any

import distillbench

project, author = "distillbench", "the authors of distillbench"
copyright = "the authors of distillbench, Apache-2.0"
version = release = distillbench.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
highlight_language = "text"
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"distillbench {release}"
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["site.css"]
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fa8", "color-brand-content": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7fb4ec", "color-brand-content": "#7fb4ec"},
}

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
maximum_signature_line_length = 88

ROLE = re.compile(r"(``.+?``|:\w+:`.+?`)")


def as_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are text with tables and formulas: those stand as they are, the rest has no markup but roles."""
    paragraphs = re.split(r"\n[ \t]*\n", "\n".join(lines))
    lines[:] = "\n\n".join(map(_paragraph, paragraphs)).split("\n") if lines else []
    lines.append("")


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if all(line.startswith(("    ", "|", ">>>")) for line in lines if line.strip()):
        return "::\n\n" + "\n".join(f"    {line}" for line in lines)
    return "".join(part if ROLE.fullmatch(part) else _escaped(part) for part in ROLE.split(text))


def _escaped(text: str) -> str:
    return re.sub(r"([*|`]|_(?!\w))", r"\\\1", text).replace("::", ":")


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", as_text)
    return {"parallel_read_safe": True}
