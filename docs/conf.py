"""Sphinx configuration: ``sphinx-build -W -b html docs docs/_build/html``. Build and pages work offline."""

from __future__ import annotations

import distillbench

project, author = "distillbench", "the authors of distillbench"
copyright = "the authors of distillbench, Apache-2.0"
version = release = distillbench.__version__

extensions = ["myst_parser", "sphinx_copybutton"]
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
