"""Write a new plugin as a small installable package, from the template in ``plugin_template``."""

from __future__ import annotations

import builtins
import datetime
import importlib.util
import json
import keyword
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import distillbench
from distillbench.errors import UserError, quoted, unknown

TEMPLATE = Path(__file__).parent / "plugin_template"
KINDS = ("method", "teacher", "dataset", "metric")
LONGEST_NAME = 32


def new_plugin(name: str, kind: str, output: Path | None = None, taken: Collection[str] = ()) -> Path:
    """Write a plugin with a `kind` called `name` into the folder `output`; returns the folder.

    `output` is ``distillbench-NAME`` by default; it must be empty or not exist. `taken` are the names that are already
    registered. Raises UserError for a name or a folder that cannot be used, and then leaves no files behind.
    """
    if kind not in KINDS:
        raise unknown("kind of plugin", kind, KINDS)
    _check_name(name, kind, taken)
    answers = _answers(name, kind)
    target = (Path(answers["distribution"]) if output is None else output).absolute()
    try:
        _check_free(target)
        parent = next(folder for folder in target.parents if folder.exists())
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}.") as scratch:
            _move(_rendered(answers, Path(scratch) / "package"), target)
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        raise UserError(f"cannot write to {str(target)!r}: {getattr(error, 'strerror', None) or error}") from error
    return target


def _check_name(name: str, kind: str, taken: Collection[str]) -> None:
    from distillbench.records.table import FIRST, LAST
    from distillbench.registry import NAME, RESERVED

    if not NAME.fullmatch(name):
        near = _snake_case(name)
        meant = f" Did you mean '{near}'?" if NAME.fullmatch(near) else ""
        raise UserError(f"a name has lower-case letters, digits and underscores, got {quoted(name)}.{meant}")
    if len(name) > LONGEST_NAME:
        raise UserError(f"a name has at most {LONGEST_NAME} characters, got {len(name)}: {quoted(name)}")
    other = f"Choose another, such as 'my_{name}'"
    if name in RESERVED:
        raise UserError(f"the command line reads '{name}' as a value: it cannot be a name. {other}")
    if name in taken:
        raise UserError(f"a {kind} called '{name}' is already registered. {other}")
    if kind == "metric" and name in (*FIRST, *LAST, "fraction"):
        raise UserError(f"every table has a column '{name}': no metric can have this name. {other}")
    if importlib.util.find_spec(f"distillbench_{name}") is not None:
        raise UserError(f"a module distillbench_{name} is already installed. {other}")


def _check_free(target: Path) -> None:
    """Raise UserError unless `target` is absent or an empty folder."""
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"the folder {str(target)!r} is not empty. Name one that does not exist, with -o FOLDER")
    if not target.is_dir() and (target.exists() or target.is_symlink()):
        raise UserError(f"{str(target)!r} is not a folder. Name one that does not exist, with -o FOLDER")


# --- values for the template -----------------------------------------------------------------------------------------


def _answers(name: str, kind: str) -> dict[str, Any]:
    """The values of the questions in copier.yml."""
    from packaging.version import Version

    from distillbench.hookspecs import API

    major, minor = Version(distillbench.__version__).release[:2]
    too_new = (
        f"{major + 1}" if major else f"0.{minor + 1}"
    )  # before version 1, any minor version may break compatibility
    author, email = _git("user.name"), _git("user.email")
    return {
        "name": name,
        "kind": kind,
        "class_name": _class_name(name, kind),
        "distribution": f"distillbench-{re.sub('_+', '-', name).strip('-')}",
        "year": datetime.date.today().year,
        "author": author,
        "authors": _authors(author, email),
        "requirement": f"distillbench>={major}.{minor},<{too_new}",
        "version": distillbench.__version__,
        "api": API,
    }


def _class_name(name: str, kind: str) -> str:
    """my_method: MyMethod; with the kind appended if Python or the template already uses this name."""
    camel = "".join(part.capitalize() for part in name.split("_"))
    words = {word for file in (TEMPLATE / "kinds" / kind).iterdir() for word in re.findall(r"\w+", file.read_text())}
    used = camel in words or camel in vars(builtins) or keyword.iskeyword(camel)
    return f"{camel}{kind.capitalize()}" if used else camel


def _snake_case(name: str) -> str:
    """MyMethod, my-method: my_method."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", parted.lower()).strip("_")


def _git(setting: str) -> str:
    """The value of a git setting; "" without git or without the setting."""
    command = ["git", "config", "--get", setting]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _authors(name: str, email: str) -> str:
    """The inside of pyproject's ``authors = [...]``: JSON's strings are TOML's."""
    known = {"name": name, "email": email if re.fullmatch(r"[^@\s]+@[^@\s]+", email) else ""}
    parts = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in known.items() if value]
    return f"{{ {', '.join(parts)} }}" if parts else ""


# --- writing ---------------------------------------------------------------------------------------------------------


def _rendered(answers: dict[str, Any], folder: Path) -> Path:
    """Render the template into `folder` by copier; the user's own settings of copier are not used."""
    import copier

    settings = copier.Settings()
    copier.run_copy(str(TEMPLATE), folder, answers, defaults=True, quiet=True, unsafe=False, settings=settings)
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)  # the template may be installed read-only
    return folder


def _move(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`. An existing, empty `target` is filled: it may be the user's working directory."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return
    moved: list[Path] = []
    try:
        for path in sorted(folder.iterdir()):
            moved.append(target / path.name)
            path.rename(moved[-1])
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
