"""Several processes do the same run at the same time, in one results folder; all must end with the same table.

    python benchmarks/together.py [PROCESSES]

They are started at random times of the first second. Each cell must be trained by exactly one of them, the students'
initial weights must be fitted once, and all must end with the table of a single process.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import kills


class Trainings(kills.Diary):
    """A progress that writes only a line for every training."""

    def note(self, label: str) -> None:
        if (label.endswith(": training") and not label.startswith("after ")) or label.startswith(
            "students' initial weights"
        ):
            with self.file.open("a") as file:
                file.write(f"{label}\n")


def main(processes: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        whole, folder = Path(scratch) / "whole", Path(scratch) / "together"
        whole.mkdir(), folder.mkdir()
        kills.undisturbed(whole)
        expected = kills.left(whole)
        begin = time.monotonic()
        context = multiprocessing.get_context("fork")
        started = []
        for number in range(processes):
            time.sleep(random.uniform(0, 1 / processes))
            argument = (str(folder / "results"), str(folder / f"diary-{number}"), Trainings)
            started.append(context.Process(target=kills.go, args=argument))
            started[-1].start()
        for process in started:
            process.join()
        codes = [process.exitcode for process in started]
        lines = [line for file in folder.glob("diary-*") for line in file.read_text().splitlines()]
        seconds = time.monotonic() - begin
        told = kills.difference(kills.left(folder), expected)
        print(f"{processes} processes, {seconds:.0f} s; exit codes {sorted(set(codes))}; {len(lines)} trainings")
        if told or any(codes) or len(lines) != len(set(lines)):
            raise SystemExit(f"not as one process: {told or codes or sorted(lines)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
