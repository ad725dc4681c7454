"""Noise-image pairs computed by the teacher, or by a student that is done, with a manifest of how they were computed.

The noise of pair i is the i-th of a stream (:mod:`distillbench.diffusion.noise`), so only the image is stored. Targets
are float32 and never quantised. Every method that uses pairs is charged for them, whether they were computed now or
cached.
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
from torch import Tensor, nn

from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.errors import UserError
from distillbench.metering.energy import Energy, energy
from distillbench.storage.files import canonical_json, sha256_file, sha256_tensors, signed, write_atomically
from distillbench.storage.locks import wait_for_lock
from distillbench.system.environment import device_name
from distillbench.system.progress import Progress
from distillbench.system.transfers import fits_on, to_device
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import Meter, TrainingCost
from distillbench.training.data_parallel import SINGLE_RANK, Ranks
from distillbench.training.network_rows import NetworkRows, sum_of_rows
from distillbench.training.turns import in_turns

__all__ = ["PairStore", "Workspace"]

TARGETS = "targets.safetensors"
BATCH = 1024
HELD_BYTES = 2**30  # of noise and targets
FORMAT = 2
Solve = Callable[[Tensor, Condition], Tensor]  # (eps, c) -> x_0
Loss = Callable[[Tensor, Tensor, Condition], Tensor]  # (eps, x_0, c) -> a mean over the images


class PairStore:
    """`count` pairs (eps, x_0).

    Up to HELD_BYTES of them, noise included, stay on the device from the first read on; on a GPU also more, up to an
    eighth of its free memory. Otherwise noise and condition are drawn from their seed at each read. Texts are looked
    up by their labels.
    """

    def __init__(
        self,
        stream: int,
        targets: Tensor,
        device: str,
        conditioning: Conditioning = WITHOUT_CLASSES,
        stands_for: int | None = None,
    ) -> None:
        self.stream, self.targets, self.device, self.conditioning = stream, targets, device, conditioning
        self.stands_for = len(targets) if stands_for is None else stands_for  # more than there are in a dry run
        size = 2 * targets.nbytes  # smaller images of a conditioning would add to it
        self._holds = conditioning.small is None and (size <= HELD_BYTES or fits_on(device, size))
        self._held: tuple[Tensor, Tensor, Condition] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """The pairs at `indices` (any shape with B elements): eps and x_0, each (B,C,H,W), and the condition."""
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


def recipe_of(recipe: dict[str, Any], held_out: bool) -> dict[str, Any]:
    """A method's recipe of pairs as it is part of their key: that of held-out pairs differs."""
    return recipe | {"held_out": True} if held_out else recipe


class Workspace:
    """What a method may use to prepare its training, or a phase of it: the teacher, and pairs computed by a solver.

    All ranks prepare at the same time, and each computes its share of the pairs. `energy_source` measures the energy
    that pairs take, which is stored with them so that later users of the cache can be charged. `dry`: only count
    evaluations, with two pairs in place of all. `shard`: the networks will be sharded over the ranks.
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
        shard: bool = False,
    ) -> None:
        self.teacher, self.meter, self.cache, self.device = teacher, meter, cache, device
        self.seed, self.progress, self.dry, self.energy_source = seed, progress, dry, energy_source
        self.ranks, self.shard = ranks, shard

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return self  # a copy of a method that keeps its workspace shares it

    def pairs(
        self,
        solve: Solve,
        count: int,
        recipe: dict[str, Any],
        network: nn.Module | None = None,
        held_out: bool = False,
    ) -> PairStore:
        """`count` pairs eps -> solve(eps, c), from the cache or computed now and cached.

        `recipe` says in plain values how `solve` works (solver, steps, ...); with the teacher's hash, the seed and the
        count it is the cache key. The cost is charged to the method's meter either way. All ranks must ask for
        the same pairs.

        `network`: what `solve` evaluates in place of the teacher, a frozen network of the method. The hash of its
        weights is part of the key, and eps is other noise than that of the teacher's pairs. Raises RuntimeError if it
        is not frozen, or if `solve` evaluates a student without it; UserError with `shard`.

        `held_out`: pairs of other noise than those that are trained on.
        """
        purpose = ("held-out pairs" if held_out else "pairs") + (" of a student" if network is not None else "")
        stream = stream_key(purpose, self.seed)
        recipe = recipe_of(recipe, held_out)
        if network is not None:
            if self.shard:
                raise UserError("compute.shard=true does not go with noise-image pairs that a student computes")
            recipe = recipe | {"network_sha256": _identity(network)}
        if self.dry:
            return self._cost_only(solve, count, stream, network)
        recipe, folder = self._place(count, recipe)
        with ExitStack() as claim:
            targets = self._found(folder, recipe, claim) if self.ranks.main else None
            with nullcontext() if self.ranks.main else self.meter.pause():  # rank 0 may wait for another run
                found = self.ranks.broadcast_flag(targets is not None)
            if not found:
                targets = self._make(solve, count, stream, network)
                if self.ranks.main:
                    self._write(folder, recipe, targets)
        if self.ranks.count > 1:
            targets = self._read_on_all_ranks(folder, targets)
        assert targets is not None
        return PairStore(stream, targets, self.device, self.teacher.conditioning)

    def mean_loss(self, store: PairStore, loss: Loss) -> float:
        """The mean of loss(eps, x_0, c) over all pairs of `store`, without gradient; charged to the method.

        Each rank computes its share, and all get the same number. Then a method may decide by it, such as which of
        several students it keeps.
        """
        before, batches = self.meter.cost(), range(0, len(store), BATCH)
        if not self.shard:  # with FSDP all ranks evaluate a network together
            batches = batches[self.ranks.share.index :: self.ranks.count]
        total = 0.0
        with torch.no_grad():
            for first in batches:
                indices = torch.arange(first, min(first + BATCH, len(store)))
                total += loss(*store.read(indices)).item() * len(indices)
        if self.dry:
            self._charge_rest(before, store.stands_for)
        totals = self.ranks.all_gather(total)
        return (totals[0] if self.shard else sum(totals)) / len(store)

    def has_pairs(self, count: int, recipe: dict[str, Any]) -> bool:
        """Whether these pairs seem to be cached: their files are not checked."""
        _, folder = self._place(count, recipe)
        return (folder / "manifest.json").is_file()

    def _place(self, count: int, recipe: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        """All that determines the pairs and their cost, and the folder of their files."""
        key = {
            "format": FORMAT,
            "teacher_sha256": self.teacher.sha256,
            "seed": self.seed,
            "count": count,
            "device": device_name(self.device),  # seconds and joules depend on it
            "threads": torch.get_num_threads(),
        }
        if computed := self.teacher.teacher_rows.call.plain:
            key["compute"] = dict(computed)
        if self.ranks.count > 1:
            key["processes"] = self.ranks.count  # the pairs are the same, the seconds are not
        recipe = key | self.teacher.conditioning.plain() | recipe
        return recipe, self.cache / hashlib.sha256(canonical_json(recipe).encode()).hexdigest()[:16]

    def _found(self, folder: Path, recipe: dict[str, Any], claim: ExitStack) -> Tensor | None:
        """The cached pairs, also those that another run computes meanwhile. Without any, `claim` holds the lock."""
        existed = (folder / "manifest.json").exists()
        targets = self._read(folder, recipe)
        if targets is None:
            with self.meter.pause():  # waiting for another run is not charged
                claim.enter_context(wait_for_lock(folder, "noise-image pairs", self.progress))
            targets = None if existed else self._read(folder, recipe)
        return targets

    def _read_on_all_ranks(self, folder: Path, targets: Tensor | None) -> Tensor:
        """The pairs on every rank: those without them read the files that rank 0 has found or written."""
        self.ranks.broadcast_flag(True)  # wait until rank 0 has written them
        return targets if self.ranks.main and targets is not None else load_file(folder / TARGETS)["x_0"]

    def _solve(self, solve: Solve, stream: int, indices: Sequence[int]) -> Tensor:
        c = self.teacher.conditioning.of_pairs(stream, indices, self.device)
        return solve(Noise(stream, indices, self.teacher.shape, self.device)(0), c).float().cpu()

    def _cost_only(self, solve: Solve, count: int, stream: int, network: nn.Module | None) -> PairStore:
        before = self.meter.cost()
        with torch.no_grad():
            targets = self._solve(solve, stream, range(2))
        _check_solved(before, self.meter.cost(), network)
        self._charge_rest(before, count)
        targets = targets.expand(2, *self.teacher.shape)
        return PairStore(stream, targets, self.device, self.teacher.conditioning, count)

    def _charge_rest(self, before: TrainingCost, count: int) -> None:
        """Charge the evaluations since `before`, which were for two pairs, once more for all others of `count`."""
        after = self.meter.cost()
        rest = lambda spent: spent * count // 2 - spent
        rows = sum_of_rows(after.networks, before.networks)
        self.meter.charge(
            0.0,
            rest(after.teacher_nfe - before.teacher_nfe),
            student_nfe=rest(after.student_nfe - before.student_nfe),
            networks=[dataclasses.replace(each, forward=rest(each.forward)) for each in rows],
        )

    def _make(self, solve: Solve, count: int, stream: int, network: nn.Module | None) -> Tensor:
        """All targets on rank 0, after each rank has computed its share; an empty tensor on the others."""
        before = self.meter.cost()
        measured = energy(self.device, self.energy_source)
        with measured as watch, torch.no_grad(), self.progress.step("computing noise-image pairs") as step:

            def chunk(index: int) -> Tensor:
                indices = range(index * BATCH, min((index + 1) * BATCH, count))
                images = self._solve(solve, stream, indices)
                step.advance(indices.stop / count)
                return images

            chunks: list[Tensor] = []
            error = in_turns(math.ceil(count / BATCH), chunk, self.ranks, chunks.append)
            if error is not None:
                raise error
        after, used = self.meter.cost(), self.ranks.sum_energy(watch.used)
        _check_solved(before, after, network)
        evaluations = self.ranks.all_gather(after.teacher_nfe - before.teacher_nfe)
        self._cost = {
            "seconds": after.seconds - before.seconds,
            "teacher_seconds": after.teacher_seconds - before.teacher_seconds,
            "compile_seconds": (after.compile_seconds or 0.0) - (before.compile_seconds or 0.0),
            "teacher_nfe": sum(evaluations),
            "joules": used.joules,
            "no_joules": used.reason,
        }
        if network is not None:
            mine = after.student_nfe - before.student_nfe, sum_of_rows(after.networks, before.networks)
            of_ranks, rows = zip(*self.ranks.all_gather(mine), strict=True)
            self._cost |= {
                "student_nfe": sum(of_ranks),
                "student_seconds": after.student_seconds - before.student_seconds,
                "networks": [dataclasses.asdict(each) for each in sum_of_rows(each for own in rows for each in own)],
            }
        return torch.cat(chunks) if chunks else torch.empty(0)

    def _write(self, folder: Path, recipe: dict[str, Any], targets: Tensor) -> None:
        write_atomically(folder / TARGETS, lambda path: save_file({"x_0": targets}, path))
        manifest = signed({"recipe": recipe, "targets_sha256": sha256_file(folder / TARGETS), **self._cost})
        text = json.dumps(manifest, indent=2)
        write_atomically(folder / "manifest.json", lambda path: Path(path).write_text(text, encoding="utf-8"))

    def _read(self, folder: Path, recipe: dict[str, Any]) -> Tensor | None:
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
            used = Energy(joules, f"the cached pairs: {manifest['no_joules']}" if joules is None else "")
            compiler = float(manifest.get("compile_seconds", 0.0))  # older manifests do not have it
            evaluations = int(manifest["teacher_nfe"]), int(manifest.get("student_nfe", 0))
            student_seconds = float(manifest.get("student_seconds", 0.0))  # those of the teacher's pairs do not have it
            rows = [NetworkRows(**each) for each in manifest["networks"]] if "networks" in manifest else None
            self.meter.charge(
                seconds, evaluations[0], teacher_seconds, used, compiler, evaluations[1], student_seconds, rows
            )
            return targets
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, SafetensorError, OSError) as error:
            self.progress.say(f"the pairs in {folder} are damaged ({error}) and are computed again")
            return None


def _identity(network: nn.Module) -> str:
    """The hash of the weights of `network`, which must not change any more."""
    if any(weight.requires_grad for weight in network.parameters()):
        raise RuntimeError(
            "pairs are computed from a network that is being trained: after an interruption they would be others. Give "
            "a frozen copy, such as teacher.student().freeze() with the weights that end_phase() is given"
        )
    return sha256_tensors(network.state_dict())


def _check_solved(before: TrainingCost, after: TrainingCost, network: nn.Module | None) -> None:
    """Raise RuntimeError if pairs said to be the teacher's were computed with a student: their key would not tell."""
    if network is None and after.student_nfe > before.student_nfe:
        raise RuntimeError(
            "pairs were computed with a network of the method that pairs(..., network=...) was not told: cached pairs "
            "of other weights would be taken for them"
        )
