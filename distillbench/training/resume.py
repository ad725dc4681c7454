"""Saved states of a training, from which an interrupted one continues.

The final weights are bit-identical to those of an uninterrupted training wherever the same seed gives the same weights
twice: on a CPU, and on a GPU with `compute.deterministic`. Otherwise a GPU may sum in another order each time.

A state is one safetensors file, written atomically, with its plain values in the header. Its name has the first digits
of its SHA-256, which tell a damaged file: it is renamed, and the state before is used.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distillbench.metering.memory import MIB, Peak
from distillbench.storage.files import sha256_file, write_named
from distillbench.system.progress import Progress
from distillbench.system.signals import Stop

FORMAT = 2  # version of the file format
DIGITS = 16  # of the SHA-256 in the file name


@dataclass(frozen=True)
class State:
    """All that the rest of a training depends on: tensors, and values that JSON can hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> State:
        """What was added as `name`."""
        prefix = f"{name}/"
        tensors = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return State(tensors, self.values[name])

    def add(self, name: str, part: State) -> None:
        """Put `part` into this state as `name`."""
        self.tensors.update({f"{name}/{key}": value for key, value in part.tensors.items()})
        self.values[name] = part.values


class States:
    """The last `keep` states of one training, in one folder."""

    def __init__(self, folder: Path, keep: int, progress: Progress) -> None:
        self.folder, self.keep, self.progress = folder, keep, progress

    def save(self, images: int, state: State) -> None:
        """Save `state`, reached after `images`. If the disk is full, the training continues without it."""
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.tensors.items()}
        header = {"format": str(FORMAT), "values": json.dumps(state.values)}
        try:
            write_named(
                self.folder,
                lambda temporary: save_file(tensors, temporary, metadata=header),
                lambda temporary: f"state-{images:012d}-{sha256_file(temporary)[:DIGITS]}.safetensors",
            )
        except OSError as error:
            self.progress.say(f"the state after {images:,} images could not be saved: {error}")
            return
        for old in self._files()[self.keep :]:
            old.unlink(missing_ok=True)

    def newest(self) -> State | None:
        """The last valid state. Files that are damaged or of another format are renamed to ``aside-...``."""
        for path in self._files():
            try:
                return _read(path)
            except ValueError as error:
                aside = path.with_name(f"aside-{path.name}")
                path.replace(aside)
                self.progress.say(f"{error}; it was renamed to {aside.name}")
        return None

    def clear(self) -> None:
        """Delete all states: the training is done."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"), reverse=True)


class FollowerStates(States):
    """The states on a rank other than 0, which only reads them: rank 0 writes them and renames damaged ones."""

    def save(self, images: int, state: State) -> None:
        pass

    def newest(self) -> State | None:
        return next((_read(path) for path in self._files()), None)

    def clear(self) -> None:
        pass


def _read(path: Path) -> State:
    """The state in `path`. Raises ValueError if it is damaged or of another format."""
    try:
        digits = sha256_file(path)[:DIGITS]
        if path.stem.rpartition("-")[2] != digits:
            raise ValueError("its checksum is wrong")
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != str(FORMAT):
                raise ValueError(f"its format is {header.get('format')}, this version reads format {FORMAT}")
            return State({name: file.get_tensor(name) for name in file.keys()}, json.loads(header["values"]))  # noqa: SIM118
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"the state {path.name} cannot be used: {error}") from error


class Source(Protocol):
    """A random generator, or a :class:`distillbench.training.data_stream.DataStream`."""

    def get_state(self) -> Tensor: ...

    def set_state(self, state: Tensor) -> object: ...


@dataclass
class Resume:
    """How a training saves states. `generators` and `peaks` of memory, by name, are saved with the training's own.

    `devices` are the names of all devices that it ran on, in order; its cost is the sum over them.
    """

    states: States
    seconds: float  # between two states
    generators: Mapping[str, Source] = field(default_factory=dict)
    peaks: Mapping[str, Peak] = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)  # whether to save a state and stop now
    devices: list[str] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether to save a state now."""
        return time.monotonic() - self.last >= self.seconds or self.stop()

    def save(self, images: int, state: State) -> None:
        """Save a state."""
        state.values["peaks"] = {name: peak.mib for name, peak in self.peaks.items()}
        state.values["devices"] = self.devices
        self.states.save(images, state)
        self.last = time.monotonic()

    def restore_peaks(self, state: State) -> None:
        """Restore peaks of memory and device names from `state`."""
        before = state.values.get("devices", [])  # older states do not name them
        self.devices = before + [name for name in self.devices if name not in before[-1:]]
        for name, mib in state.values["peaks"].items():
            if mib is not None and name in self.peaks:
                self.peaks[name].raise_to(mib * MIB)


# --- generators ------------------------------------------------------------------------------------------------------


def generators_state(generators: Mapping[str, Source], device: str) -> State:
    """The states of `generators` and of the global generators of torch, numpy and Python."""
    tensors = {f"given/{name}": generator.get_state() for name, generator in generators.items()}
    tensors |= torch_generators_state(device)
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return State(
        tensors,
        {"python": [version, list(words), gauss], "numpy": [kind, int(position), int(has_gauss), float(cached)]},
    )


def restore_generators(state: State, generators: Mapping[str, Source], device: str) -> None:
    """Restore the result of :func:`generators_state`."""
    for name, generator in generators.items():
        generator.set_state(state.tensors[f"given/{name}"])
    restore_torch_generators(state.tensors, device)
    version, words, gauss = state.values["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = state.values["numpy"]
    np.random.set_state((kind, state.tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))


def torch_generators_state(device: str) -> dict[str, Tensor]:
    """The states of torch's global generators, which dropout draws from; they differ between ranks."""
    return {"torch": torch.get_rng_state()} | ({} if device == "cpu" else {"cuda": torch.cuda.get_rng_state(device)})


def restore_torch_generators(states: Mapping[str, Tensor], device: str) -> None:
    """Restore the result of :func:`torch_generators_state`."""
    torch.set_rng_state(states["torch"])
    if device != "cpu":
        torch.cuda.set_rng_state(states["cuda"], device)
