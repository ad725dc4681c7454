"""How busy other processes keep the machine while something is timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

IDLE = ("idle", "iowait")
IN_OTHERS = ("guest", "guest_nice")  # Linux counts them in user and nice, too


@dataclass
class MachineLoad:
    """Processor time that other processes used in a block, over the time of all cores; None before its end."""

    fraction: float | None = None
    begin: tuple[float, float, float] = field(default_factory=lambda: _clocks())

    def end(self) -> None:
        busy, own, now = (after - before for after, before in zip(_clocks(), self.begin, strict=True))
        if now > 0:
            self.fraction = min(max((busy - own) / (now * (psutil.cpu_count() or 1)), 0.0), 1.0)


@contextmanager
def machine_load() -> Iterator[MachineLoad]:
    """The load by other processes during the block; what this process and its finished children use does not count.

    Time that a hypervisor gave to other machines counts (Linux). The system counts in steps of 10 ms.
    """
    load = MachineLoad()
    yield load
    load.end()


def _clocks() -> tuple[float, float, float]:
    """Seconds that all cores were busy, that this process used, and the time."""
    cores = psutil.cpu_times()._asdict()
    busy = sum(seconds for name, seconds in cores.items() if name not in (*IDLE, *IN_OTHERS))
    return busy, sum(psutil.Process().cpu_times()[:4]), time.perf_counter()
