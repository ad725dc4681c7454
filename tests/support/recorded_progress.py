"""Progress that tests read."""

from __future__ import annotations

from distillbench.system.progress import Progress


class RecordingProgress(Progress):
    """Keeps the lines that it is given in ``lines`` and prints nothing."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)
