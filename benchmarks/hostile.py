"""Bad inputs for every reader, at least 2,000. Prints the outcomes by reader, and each defect.

    python benchmarks/hostile.py [--inputs 80] [--seed 0] [--only NAME ...]

Each reader gets its own hostile inputs (bombs, links, code, absurd numbers) and `--inputs` random ones on top. The
outcomes are explained in tests/support/fuzz.py. The exit code is 1 if there is a defect.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from fuzz import DEFECTS, SUBJECTS, Outcome, fuzz, table


def main() -> int:
    parser = argparse.ArgumentParser(description="Bad inputs for every reader.")
    parser.add_argument("--inputs", type=int, default=80, help="random bad inputs of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--most", type=int, default=400, help="hostile inputs of a reader that are written down, at most"
    )
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), help="these readers")
    arguments = parser.parse_args()
    began = time.monotonic()

    def of(name: str) -> list[Outcome]:
        found = fuzz(name, arguments.most, arguments.inputs, arguments.seed)
        bad = [outcome for outcome in found if outcome.outcome in DEFECTS]
        print(f"{name}: {len(found)} inputs, {len(bad)} defects", file=sys.stderr)
        for outcome in bad:
            print(f"{outcome.outcome}: {name} {outcome.number}, {outcome.what}: {outcome.message}", file=sys.stderr)
        return found

    with ThreadPoolExecutor(arguments.processes) as pool:
        outcomes = [outcome for found in pool.map(of, arguments.only) for outcome in found]
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if outcome.outcome in DEFECTS]
    print(f"{len(outcomes):,} bad inputs, {len(bad)} defects, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
