"""Names and shapes of the tensors in safetensors files, from their headers, compared with those of a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from distillbench.errors import LONGEST_REASON
from distillbench.storage.files import git_lfs_pointer

Shape = tuple[int, ...]

# Names in attention layers before diffusers 0.12, whose loader renames them.
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def tensor_shapes(files: Iterable[Path]) -> dict[str, Shape]:
    """The shape of every tensor in `files`, by name, without reading tensors.

    Raises ValueError for a file that is truncated or not in safetensors' format.
    """
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            with open(file, "rb") as start:
                if why := git_lfs_pointer(start.read(64)):
                    raise ValueError(f"{file.name}: {why}")
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:LONGEST_REASON]
            raise ValueError(f"{file.name} is not a complete safetensors file: {why}") from error
    return shapes


def missing_tensors(network: nn.Module, shapes: dict[str, Shape], prefixed: bool) -> list[str]:
    """The tensors of `network` that `shapes` lacks or has with another shape.

    `prefixed`: the names in `shapes` may have an additional prefix, or lack one, as in a model that contains the
    network.
    """
    by_tensor: dict[int, list[tuple[str, Shape]]] = {}  # one tensor may have several names
    for name, tensor in network.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append((name, tuple(tensor.shape)))
    return [names[0][0] for names in by_tensor.values() if not any(_there(*name, shapes, prefixed) for name in names)]


def unread_tensors(network: nn.Module, shapes: dict[str, Shape]) -> list[str]:
    """The names in `shapes` that are not tensors of `network`."""
    own = network.state_dict(keep_vars=True)
    renamed = lambda name: [name.replace(old, new) for new, old in OLD_NAMES.items() if old in name]
    return sorted(name for name in shapes if name not in own and not any(new in own for new in renamed(name)))


def _there(name: str, shape: Shape, shapes: dict[str, Shape], prefixed: bool) -> bool:
    if name in shapes:
        return shapes[name] == shape
    if any(name.replace(new, old) in shapes for new, old in OLD_NAMES.items() if new in name):
        return True
    return prefixed and _other_prefix(name, list(shapes))


def _other_prefix(name: str, known: Sequence[str]) -> bool:
    return any(other.endswith(f".{name}") or name.endswith(f".{other}") for other in known)
