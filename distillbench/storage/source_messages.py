"""What a user is told whose dataset or teacher has no files yet: every way to get them, a download first.

Neither torch nor plugins are imported here, so that the command line can say it at once.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path

from distillbench.storage.downloads import located
from distillbench.storage.sources import Source, known, of_dataset, of_teacher, size_in_words

SOME_LINE = "distillbench run 'methods=[boot,cm]' dataset=NAME"
HUB_EXTRA = "pip install 'distillbench[hub]'"
ACCEPTED = (
    "EDM's dataset zip or any zip of images, a folder of images, .npz, .npy, idx or .parquet files, tars of images, "
    "CIFAR's python batches, or a hub dataset as hub:OWNER/NAME with dataset.download=true"
)


def without_files(command: str, words: Sequence[str]) -> str:
    """The message if the settings `words` of ``distillbench command`` name a dataset whose files are missing, or "".

    It sees only what can be told from the words: an experiment, or a list of values, is left to the full check.
    """
    given: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        given[name] = value.strip("'\"")
    dataset, path = given.get("dataset", ""), given.get("dataset.path", "")
    if "experiment" in given or not dataset.isidentifier():
        return ""
    permitted = given.get("dataset.download", "false").lower() in ("true", "yes", "on", "1")
    if path.startswith("hub:"):
        others = [word for word in words if not word.startswith("dataset.path=")]
        return hub_needs(path.removeprefix("hub:"), permitted, user_line(command, others))
    source = of_dataset(dataset, {k.removeprefix("dataset."): v for k, v in given.items() if k != "dataset"})
    if path or permitted or source is None or located(source) is not None:
        return ""
    teacher = known().get(source.teacher)
    chosen = given.get("teacher", teacher.plugin if teacher else "")
    if teacher is None or chosen != teacher.plugin or "teacher.path" in given:
        return missing_dataset(source, user_line(command, words), None)
    return missing_dataset(source, user_line(command, words), teacher)


def user_line(command: str, words: Sequence[str]) -> str:
    """The command line of the user, to be continued. What a message adds itself is left out."""
    added = ("dataset.download=", "teacher.download=")
    return shlex.join(["distillbench", command, *(word for word in words if not word.startswith(added))])


def usual_line(source: Source) -> str:
    """A command line that uses a dataset, for where that of the user is not known."""
    is_default = of_dataset(source.plugin, {}) == source
    chosen = [] if is_default else [f"dataset.{name}={value}" for name, value in source.settings.items()]
    return user_line("run", ["methods=[boot,cm]", f"dataset={source.plugin}", *chosen])


def missing_dataset(source: Source, command: str, teacher: Source | None) -> str:
    """What a user can do without the files of a published dataset, `command` with a download first.

    `teacher` is the released one that `command` uses, or would use by teacher.download=true.
    """
    asked, lines = "", []
    if teacher is not None:
        conditional = teacher.settings.get("conditional") and "conditional=true" not in command
        asked = " teacher.download=true" + (" conditional=true" if conditional else "")
        lines.append(f"               teacher: {teacher.title}, by {teacher.publisher}, {teacher.licence}")
        if "teacher=" not in command and "experiment=" not in command:
            lines.append("               (without teacher.download=true, the default teacher=trained first trains one)")
    return "\n".join(
        [
            f"dataset={source.plugin} has no files yet: {source.title} (licence: {source.licence})",
            f"  download:    {command} dataset.download=true{asked}",
            f"               images: {source.origin}, by {source.publisher}, {size_in_words(source)}",
            *([f"               {source.note}"] if source.note else []),
            *lines,
            f"  your files:  {command} dataset.path={source.example}",
            f"               dataset.path may be {ACCEPTED}",
            f"  by hand:     {source.by_hand}",
            "  no download: dataset=digits",
        ]
    )


def missing_teacher(source: Source) -> str:
    """What a user can do without the file of a released teacher."""
    own = "" if _is_found(source) else f" teacher.release={source.name}"
    dataset = source.settings.get("dataset", "NAME")
    run = f"distillbench run 'methods=[boot,cm]' dataset={dataset} teacher={source.plugin}"
    names = [*(file.name for file in source.files), *source.patterns]
    return "\n".join(
        [
            f"teacher={source.plugin} has no file yet: {source.title} (licence: {source.licence})",
            f"  download:    {run}{own} teacher.download=true",
            f"               {source.origin}, by {source.publisher}, {size_in_words(source)}",
            f"  your file:   {run} teacher.path=FOLDER/{names[0]}",
        ]
    )


def _is_found(source: Source) -> bool:
    """Whether the settings alone choose this entry of a teacher, without its name."""
    own = source.settings
    dataset, side, conditional = own.get("dataset", ""), own.get("resolution", 0), own.get("conditional", False)
    return of_teacher(dataset, side, conditional, source.plugin) == source


def hub_needs(name: str, permitted: bool, command: str = "") -> str:
    """The message if the hub dataset `name` cannot be loaded: all that is missing at once, or "" if nothing is.

    `command` is the user's line without the settings that the message adds.
    """
    if Path(name).is_dir():
        permitted = True
    library = importlib.util.find_spec("datasets")
    is_installed = library is not None and library.origin is not None  # a folder of that name has no origin
    steps = [] if is_installed else [f"the package 'datasets' ({HUB_EXTRA})"]
    steps += [] if permitted else ["dataset.download=true"]
    if not steps:
        return ""
    line = f"{command or SOME_LINE} dataset.path=hub:{name} dataset.download=true"
    return f"dataset.path=hub:{name} needs {' and '.join(steps)}. The whole line: {line}"
