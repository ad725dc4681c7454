"""The process of one step: ``python -m gpu_steps.child ORDER.json``."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gpu_steps.context import Context, NotRun, OutOfTime
from gpu_steps.verdicts import Verdict


def function_of(name: str) -> Callable[[Context], None]:
    """What a step does."""
    from gpu_steps import hardware, inference, runs, training, waits

    kind, _, setting = name.partition("-")
    if kind == "speed":
        return partial(training.step_times, setting=setting)
    functions: dict[str, Callable[[Context], None]] = {
        "environment": hardware.environment, "limits": hardware.limits, "precision": hardware.precision,
        "runs": runs.runs, "resume": runs.resume, "waits": waits.waits, "loop": training.loop,
        "graphs": inference.graphs, "sampling": inference.throughput, "scoring": inference.scoring,
        "memory": hardware.memory, "energy": hardware.energy_step, "oom": runs.out_of_memory,
        "together": runs.together, "bits": training.bits, "bits-deterministic": training.deterministic_bits,
    }  # fmt: skip
    return functions[name]


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text())
    name = order.pop("step")
    if order["simulated"]:
        from distillbench.simulated_cuda import install

        install()
    torch.set_num_threads(1)  # as in a run
    context = Context(**order | {"folder": Path(order["folder"]), "output": Path(order["output"])})
    try:
        function_of(name)(context)
    except NotRun as reason:
        context.say(Verdict("skipped", name, str(reason)))
    except OutOfTime as late:
        context.say(Verdict("look", name, str(late), "", "repeat this step alone"))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        figure = f"{type(error).__name__}: {lines[0] if lines else ''}"
        context.say(Verdict("wrong", name, figure, "", "the step broke off: see its log"))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
