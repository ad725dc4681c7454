"""Noise-image pairs made ahead by the teacher: kept as seeds and targets, with a manifest that says how they were made.

The noise of pair i is the i-th of a stream (:mod:`distillbench.noise`), so a pair costs one image on disk. Targets are
float32 and are never quantised. Whoever uses pairs pays for them, whether they were made now or found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillbench.budget import Meter
from distillbench.claims import waiting
from distillbench.conditions import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.energy import Energy, energy
from distillbench.environment import device_name
from distillbench.files import canonical_json, sha256_file, signed, write_atomically
from distillbench.host_copies import fits_on, to_device
from distillbench.noise import Noise, stream_key
from distillbench.progress import Progress
from distillbench.teachers import Teacher

__all__ = ["PairStore", "Workspace"]

BATCH = 1024
HELD = 2**30  # bytes of noise and targets
FORMAT = 2
Solve = Callable[[Tensor, Condition], Tensor]  # (eps, c) -> x_0


class PairStore:
    """`count` pairs (eps, x_0). Up to HELD bytes of them are on the device, noise included, from the first read on; on
    a GPU also more, up to an eighth of its free memory. Texts are looked up by their labels.

    Where they are more, noise and condition are made from their seed whenever they are asked for.
    """

    def __init__(self, stream: int, targets: Tensor, device: str, conditioning: Conditioning = WITHOUT_CLASSES) -> None:
        self.stream, self.targets, self.device, self.conditioning = stream, targets, device, conditioning
        size = 2 * targets.nbytes
        self._holds = conditioning.small is None and (size <= HELD or fits_on(device, size))  # else the images are more
        self._held: tuple[Tensor, Tensor, Condition] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """The pairs at `indices` (any shape with B elements): eps and x_0, each (B,C,H,W), and what was asked for."""
        indices = indices.flatten()
        if not self._holds:
            return self._made(indices.cpu(), self.conditioning)
        if self._held is None:
            self._held = self._made(torch.arange(len(self)), dataclasses.replace(self.conditioning, texts=None))
        eps, x_0, c = self._held
        indices = to_device(indices, eps.device)
        c = c[indices]
        if self.conditioning.texts is not None and c.labels is not None:
            c = dataclasses.replace(c, text=self.conditioning.texts(c.labels, eps.device))
        return eps.index_select(0, indices), x_0.index_select(0, indices), c

    def _made(self, indices: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor, Condition]:
        names = indices.tolist()
        channels, height, width = self.targets.shape[1:]
        eps = Noise(self.stream, names, (channels, height, width), self.device)(0)
        x_0 = to_device(self.targets[indices], self.device).to(eps.dtype)
        return eps, x_0, conditioning.of_pairs(self.stream, names, self.device)


class Workspace:
    """What a method may use while it prepares: the teacher, and pairs made by a solver.

    The energy that making pairs takes is read from `energy_source`, so that whoever finds them later can be charged.
    """

    def __init__(
        self,
        teacher: Teacher,
        meter: Meter,
        cache: Path,
        device: str,
        seed: int,
        progress: Progress,
        dry: bool = False,
        energy_source: str = "nvml",
    ) -> None:
        self.teacher, self.meter, self.cache, self.device = teacher, meter, cache, device
        self.seed, self.progress, self.dry, self.energy_source = seed, progress, dry, energy_source

    def pairs(self, solve: Solve, count: int, recipe: dict[str, Any]) -> PairStore:
        """`count` pairs eps -> solve(eps, c), found in the cache or made now and kept there.

        `recipe` says in plain values how `solve` works (solver, steps, ...); with the teacher's hash, the seed and the
        count it names the pairs. The price is charged to the method's meter either way.
        """
        stream = stream_key("pairs", self.seed)
        if self.dry:
            return self._priced_only(solve, count, stream)
        ours = {
            "format": FORMAT,
            "teacher_sha256": self.teacher.sha256,
            "seed": self.seed,
            "count": count,
            "device": device_name(self.device),  # whose price in seconds and joules it is
            "threads": torch.get_num_threads(),
        }
        if computed := self.teacher.teacher_rows.call.plain:
            ours["compute"] = dict(computed)
        recipe = ours | self.teacher.conditioning.plain() | recipe
        folder = self.cache / hashlib.sha256(canonical_json(recipe).encode()).hexdigest()[:16]
        there = (folder / "manifest.json").exists()
        targets = self._find(folder, recipe)
        if targets is None:
            with ExitStack() as stack:
                with self.meter.pause():  # another process may be making them: to wait for it costs nothing
                    stack.enter_context(waiting(folder, "noise-image pairs", self.progress))
                targets = None if there else self._find(folder, recipe)  # it may have come meanwhile
                if targets is None:
                    targets = self._make(solve, count, stream)
                    self._keep(folder, recipe, targets)
        return PairStore(stream, targets, self.device, self.teacher.conditioning)

    def _answers(self, solve: Solve, stream: int, indices: Sequence[int]) -> Tensor:
        c = self.teacher.conditioning.of_pairs(stream, indices, self.device)
        return solve(Noise(stream, indices, self.teacher.shape, self.device)(0), c).float().cpu()

    def _priced_only(self, solve: Solve, count: int, stream: int) -> PairStore:
        before = self.meter.teacher_nfe
        with torch.no_grad():
            targets = self._answers(solve, stream, range(2))
        spent = self.meter.teacher_nfe - before
        self.meter.charge(0.0, spent * count // 2 - spent)
        targets = targets.expand(2, *self.teacher.shape)
        return PairStore(stream, targets, self.device, self.teacher.conditioning)

    def _make(self, solve: Solve, count: int, stream: int) -> Tensor:
        before, chunks = self.meter.price(), []
        measured = energy(self.device, self.energy_source)
        with measured as watch, torch.no_grad(), self.progress.step("making noise-image pairs") as step:
            for first in range(0, count, BATCH):
                indices = range(first, min(first + BATCH, count))
                chunks.append(self._answers(solve, stream, indices))
                step.advance((first + len(indices)) / count)
        after, used = self.meter.price(), watch.used
        self._made = {
            "seconds": after.seconds - before.seconds,
            "teacher_seconds": after.teacher_seconds - before.teacher_seconds,
            "compile_seconds": (after.compile_seconds or 0.0) - (before.compile_seconds or 0.0),
            "teacher_nfe": after.teacher_nfe - before.teacher_nfe,
            "joules": used.joules,
            "no_joules": used.reason,
        }
        return torch.cat(chunks)

    def _keep(self, folder: Path, recipe: dict[str, Any], targets: Tensor) -> None:
        write_atomically(folder / "targets.safetensors", lambda path: save_file({"x_0": targets}, path))
        manifest = signed(
            {"recipe": recipe, "targets_sha256": sha256_file(folder / "targets.safetensors"), **self._made}
        )
        text = json.dumps(manifest, indent=2)
        write_atomically(folder / "manifest.json", lambda path: Path(path).write_text(text, encoding="utf-8"))

    def _find(self, folder: Path, recipe: dict[str, Any]) -> Tensor | None:
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["recipe"] != recipe:
                return None
            if manifest != signed(manifest):
                raise ValueError("the manifest's checksum is wrong")
            if manifest["targets_sha256"] != sha256_file(folder / "targets.safetensors"):
                raise ValueError("checksum")
            targets = load_file(folder / "targets.safetensors")["x_0"]
            if targets.shape != (recipe["count"], *self.teacher.shape) or targets.dtype != torch.float32:
                raise ValueError(f"targets {tuple(targets.shape)}")
            seconds, teacher_seconds = float(manifest["seconds"]), float(manifest["teacher_seconds"])
            joules = None if manifest["joules"] is None else float(manifest["joules"])
            used = Energy(joules, f"the pairs that were found: {manifest['no_joules']}" if joules is None else "")
            compiler = float(manifest.get("compile_seconds", 0.0))  # not there before networks could be compiled
            self.meter.charge(seconds, int(manifest["teacher_nfe"]), teacher_seconds, used, compiler)
            return targets
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, SafetensorError, OSError) as error:
            self.progress.say(f"the pairs in {folder} are damaged ({error}); they are made again")
            return None
