"""The folder of the user's cache."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path

from distillbench.errors import UserError


def user_cache() -> Path:
    """distillbench's folder in the user's cache. Raises UserError for a user without a home."""
    try:
        found = user_cache_path("distillbench")
    except RuntimeError:  # newer versions of platformdirs raise it, older ones return ~/.cache
        found = Path("~")
    if not found.is_absolute():
        raise UserError("this user has no home folder for a cache: set HOME or XDG_CACHE_HOME to an absolute path")
    return found
