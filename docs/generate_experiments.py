"""Writes the differences from published setups into docs/experiments.md: ``python docs/generate_experiments.py``.

They are read from the tables in the comments on top of configs/experiment/*.yaml. A row that several experiments have
word for word is written once, with their names.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "experiments.md"
FOLDER = DOCS.parent / "configs" / "experiment"
MARKS = "<!-- differences -->\n", "<!-- end of differences -->\n"
COLUMNS = ["setting", "published", "here", "why"]
NOTHING = "# Published: nothing"  # the header of an experiment that follows no publication


def differences(file: Path) -> list[list[str]]:
    """The rows of the table in the header of `file`, four cells each; none if it says that nothing is published.

    SystemExit, with file and line, if there is neither, if the table does not begin with the names of its columns, or
    if a row has another number of cells or an empty one.
    """
    header = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    found = [(number, _cells(line)) for number, line in enumerate(header, 1) if line.startswith("# |")]
    if not found:
        if any(line.startswith(NOTHING) for line in header):
            return []
        raise SystemExit(f"{file}:1: the header has neither a table of differences nor a line '{NOTHING}'")
    for number, cells in found:
        if len(cells) != len(COLUMNS) or not all(cells):
            raise SystemExit(f"{file}:{number}: a row has {len(COLUMNS)} cells ({', '.join(COLUMNS)}), got {cells}")
    (first, names), *rest = found
    if names != COLUMNS or not rest or rest[0][1] != ["---"] * len(COLUMNS) or len(rest) == 1:
        wanted = f"| {' | '.join(COLUMNS)} |, {'|---' * len(COLUMNS)}|"
        raise SystemExit(f"{file}:{first}: the table of differences begins with the lines {wanted}, and has rows")
    if [number for number, _ in found] != list(range(first, first + len(found))):
        raise SystemExit(f"{file}:{first}: the lines of the table of differences do not follow each other")
    return [cells for _, cells in rest[1:]]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.removeprefix("#").strip().removeprefix("|").removesuffix("|").split("|")]


def table() -> str:
    """The differences of all experiments; a row is where the first of its experiments has it."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        for row in differences(file):
            shared.setdefault(tuple(row), []).append(f"`{file.stem}`")
    head = f"| {' | '.join(['experiment', *COLUMNS])} |\n{'|---' * (1 + len(COLUMNS))}|\n"
    return head + "".join(f"| {', '.join(names)} | {' | '.join(row)} |\n" for row, names in shared.items())


def page(text: str) -> str:
    """`text`, the page, with the table of today's headers."""
    before, after = MARKS
    return re.sub(f"{before}.*?{after}", lambda _: before + "\n" + table() + "\n" + after, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
