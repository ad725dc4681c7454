"""Noise-image pairs made ahead by the teacher: kept as seeds and targets, with a manifest that says how they were made.

The noise of pair i is the i-th of a stream (:mod:`distillbench.noise`), so a pair costs one image on disk. Targets are
float32 and are never quantised. Whoever uses pairs pays for them, whether they were made now or found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
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
from distillbench.ranks import SINGLE_RANK, Ranks
from distillbench.teachers import Teacher
from distillbench.turns import in_turns

__all__ = ["PairStore", "Workspace"]

TARGETS = "targets.safetensors"
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

    Where several processes train together, all prepare at the same time, and each makes its share of the pairs.

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
        ranks: Ranks = SINGLE_RANK,
    ) -> None:
        self.teacher, self.meter, self.cache, self.device = teacher, meter, cache, device
        self.seed, self.progress, self.dry, self.energy_source = seed, progress, dry, energy_source
        self.ranks = ranks

    def pairs(self, solve: Solve, count: int, recipe: dict[str, Any]) -> PairStore:
        """`count` pairs eps -> solve(eps, c), found in the cache or made now and kept there.

        `recipe` says in plain values how `solve` works (solver, steps, ...); with the teacher's hash, the seed and the
        count it names the pairs. The price is charged to the method's meter either way. Processes that train together
        must all ask for the same pairs.
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
        if self.ranks.count > 1:
            ours["processes"] = self.ranks.count  # the same pairs, but in fewer seconds
        recipe = ours | self.teacher.conditioning.plain() | recipe
        folder = self.cache / hashlib.sha256(canonical_json(recipe).encode()).hexdigest()[:16]
        with ExitStack() as claim:
            targets = self._found(folder, recipe, claim) if self.ranks.main else None
            with nullcontext() if self.ranks.main else self.meter.pause():  # the main process may wait for another run
                found = self.ranks.broadcast_flag(targets is not None)
            if not found:
                targets = self._make(solve, count, stream)
                if self.ranks.main:
                    self._keep(folder, recipe, targets)
        if self.ranks.count > 1:
            targets = self._read_together(folder, targets)
        assert targets is not None
        return PairStore(stream, targets, self.device, self.teacher.conditioning)

    def _found(self, folder: Path, recipe: dict[str, Any], claim: ExitStack) -> Tensor | None:
        """The pairs that are there, or are made by another run meanwhile; where there are none, with the `claim`."""
        there = (folder / "manifest.json").exists()
        targets = self._find(folder, recipe)
        if targets is None:
            with self.meter.pause():  # to wait for another run costs nothing
                claim.enter_context(waiting(folder, "noise-image pairs", self.progress))
            targets = None if there else self._find(folder, recipe)
        return targets

    def _read_together(self, folder: Path, targets: Tensor | None) -> Tensor:
        """The pairs in every process: those that do not have them yet read what the main one has kept or found."""
        self.ranks.broadcast_flag(True)  # they are there
        return targets if self.ranks.main and targets is not None else load_file(folder / TARGETS)["x_0"]

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
        """All pairs, in the main process; the others make their share of them. [] where a process has nothing else."""
        before = self.meter.price()
        measured = energy(self.device, self.energy_source)
        with measured as watch, torch.no_grad(), self.progress.step("making noise-image pairs") as step:

            def chunk(index: int) -> Tensor:
                indices = range(index * BATCH, min((index + 1) * BATCH, count))
                answers = self._answers(solve, stream, indices)
                step.advance(indices.stop / count)
                return answers

            chunks, error = in_turns(math.ceil(count / BATCH), chunk, self.ranks)
            if error is not None:
                raise error
        after, used = self.meter.price(), self.ranks.sum_energy(watch.used)
        evaluations = self.ranks.all_gather(after.teacher_nfe - before.teacher_nfe)
        self._made = {
            "seconds": after.seconds - before.seconds,
            "teacher_seconds": after.teacher_seconds - before.teacher_seconds,
            "compile_seconds": (after.compile_seconds or 0.0) - (before.compile_seconds or 0.0),
            "teacher_nfe": sum(evaluations),
            "joules": used.joules,
            "no_joules": used.reason,
        }
        return torch.cat(chunks) if chunks else torch.empty(0)

    def _keep(self, folder: Path, recipe: dict[str, Any], targets: Tensor) -> None:
        write_atomically(folder / TARGETS, lambda path: save_file({"x_0": targets}, path))
        manifest = signed({"recipe": recipe, "targets_sha256": sha256_file(folder / TARGETS), **self._made})
        text = json.dumps(manifest, indent=2)
        write_atomically(folder / "manifest.json", lambda path: Path(path).write_text(text, encoding="utf-8"))

    def _find(self, folder: Path, recipe: dict[str, Any]) -> Tensor | None:
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["recipe"] != recipe:
                return None
            if manifest != signed(manifest):
                raise ValueError("the manifest's checksum is wrong")
            if manifest["targets_sha256"] != sha256_file(folder / TARGETS):
                raise ValueError("checksum")
            targets = load_file(folder / TARGETS)["x_0"]
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
