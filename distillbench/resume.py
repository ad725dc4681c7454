"""States of a training: one that was cut off goes on from its last state, and ends as if it had not been.

Its weights are the same to the bit wherever one seed gives the same weights twice: on a CPU, and on a GPU with
`compute.deterministic`. Without it a GPU may add up in another order each time.

A state is one safetensors file, whole or absent, with its plain values in the header. The first digits of its SHA-256
are part of its name, so that a damaged one is known: it is set aside, and the one before is used.
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

from distillbench.files import sha256_file, write_named
from distillbench.memory import MIB, Peak
from distillbench.progress import Progress
from distillbench.signals import Stop

FORMAT = 1  # of a state
DIGITS = 16  # of the SHA-256 in a state's name


@dataclass(frozen=True)
class State:
    """What decides the future of a training: tensors, and values that JSON can hold."""

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
    """The last `keep` states of one training, in a folder of their own."""

    def __init__(self, folder: Path, keep: int, progress: Progress) -> None:
        self.folder, self.keep, self.progress = folder, keep, progress

    def save(self, images: int, state: State) -> None:
        """Keep `state`, reached after so many images. A disk that is full costs the state and not the training."""
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.tensors.items()}
        header = {"format": str(FORMAT), "values": json.dumps(state.values)}
        try:
            write_named(
                self.folder,
                lambda temporary: save_file(tensors, temporary, metadata=header),
                lambda temporary: f"state-{images:012d}-{sha256_file(temporary)[:DIGITS]}.safetensors",
            )
        except OSError as error:
            self.progress.say(f"the state after {images:,} images could not be kept: {error}")
            return
        for old in self._files()[self.keep :]:
            old.unlink(missing_ok=True)

    def newest(self) -> State | None:
        """The last state that is whole; those that are damaged, or of another format, are set aside."""
        for path in self._files():
            try:
                return _read(path)
            except ValueError as error:
                aside = path.with_name(f"aside-{path.name}")
                path.replace(aside)
                self.progress.say(f"{error}; it is set aside as {aside.name}")
        return None

    def clear(self) -> None:
        """Remove every state: the training is done."""
        for path in self._files():
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"), reverse=True)


class Followed(States):
    """The same states, in a process that only reads them: another one keeps them, and has set aside the damaged."""

    def save(self, images: int, state: State) -> None:
        pass

    def newest(self) -> State | None:
        return next((_read(path) for path in self._files()), None)

    def clear(self) -> None:
        pass


def _read(path: Path) -> State:
    """Raise ValueError, in words, for a state that cannot be used."""
    try:
        digits = sha256_file(path)[:DIGITS]
        if path.stem.rpartition("-")[2] != digits:
            raise ValueError("its checksum is wrong")
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != str(FORMAT):
                raise ValueError(f"its format is {header.get('format')}, this version reads {FORMAT}")
            return State({name: file.get_tensor(name) for name in file.keys()}, json.loads(header["values"]))  # noqa: SIM118
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"the state {path.name} cannot be used: {error}") from error


class Source(Protocol):
    """A generator of random numbers, or what reads its numbers ahead."""

    def get_state(self) -> Tensor: ...

    def set_state(self, state: Tensor) -> object: ...


@dataclass
class Resume:
    """How a training keeps states. `generators` and `peaks` are what the training does not know of, by name.

    `devices` are the names of those that it ran on, in their order; what it cost is that of all of them together.
    """

    states: States
    seconds: float  # between two states
    generators: Mapping[str, Source] = field(default_factory=dict)
    peaks: Mapping[str, Peak] = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)  # whether to keep a state and leave now
    devices: list[str] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether a state is to be kept now."""
        return time.monotonic() - self.last >= self.seconds or self.stop()

    def save(self, images: int, state: State) -> None:
        """Keep a state."""
        state.values["peaks"] = {name: peak.mib for name, peak in self.peaks.items()}
        state.values["devices"] = self.devices
        self.states.save(images, state)
        self.last = time.monotonic()

    def restore_peaks(self, state: State) -> None:
        """The peaks until `state`, and the devices."""
        before = state.values.get("devices", [])  # older states do not name them
        self.devices = before + [name for name in self.devices if name not in before[-1:]]
        for name, mib in state.values["peaks"].items():
            if mib is not None and name in self.peaks:
                self.peaks[name].raise_to(mib * MIB)


# --- generators ------------------------------------------------------------------------------------------------------


def generators_state(generators: Mapping[str, Source], device: str) -> State:
    """The states of `generators` and of the global ones of torch, numpy and Python."""
    tensors = {f"given/{name}": generator.get_state() for name, generator in generators.items()}
    tensors |= masks_state(device)
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return State(
        tensors,
        {"python": [version, list(numbers), gauss], "numpy": [kind, int(position), int(has_gauss), float(cached)]},
    )


def restore_generators(state: State, generators: Mapping[str, Source], device: str) -> None:
    """Set what :func:`generators_state` has read."""
    for name, generator in generators.items():
        generator.set_state(state.tensors[f"given/{name}"])
    restore_masks(state.tensors, device)
    version, numbers, gauss = state.values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, position, has_gauss, cached = state.values["numpy"]
    np.random.set_state((kind, state.tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))


def masks_state(device: str) -> dict[str, Tensor]:
    """The states of torch's own generators, which dropout draws from: in each of several processes another."""
    return {"torch": torch.get_rng_state()} | ({} if device == "cpu" else {"cuda": torch.cuda.get_rng_state(device)})


def restore_masks(states: Mapping[str, Tensor], device: str) -> None:
    """Set what :func:`masks_state` has read."""
    torch.set_rng_state(states["torch"])
    if device != "cpu":
        torch.cuda.set_rng_state(states["cuda"], device)
