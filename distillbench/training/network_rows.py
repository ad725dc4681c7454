"""Evaluations of a training by kind of network: what its FLOPs are computed from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

SEPARATOR = ", "  # of the names of submodules


@dataclass(frozen=True)
class NetworkRows:
    """Rows (images) that networks of one kind evaluated in a training, and what was computed besides their outputs.

    Networks are of one kind if they have the same class and number of weights, the same number of them gets a gradient,
    and their backward passes start from the same outputs: a row then costs the same FLOPs.
    """

    counted: str  # by which counter: "teacher" or "student"; "distance": of LPIPS
    network: str  # its class, with its module
    weights: int  # numbers in all its weights
    trained: int  # in those that get a gradient; 0: these rows were evaluated without a gradient to weights
    forward: int = 0
    to_weights: int = 0  # with a backward pass to the weights
    to_input: int = 0  # with a backward pass to the input only
    along: int = 0  # with a derivative along a direction, computed in the same pass (forward mode, torch.func.jvp)
    features: str = ""  # submodules, joined by ", ", whose outputs alone have a backward pass; "": the network's output

    @property
    def kind(self) -> NetworkRows:
        """The same kind of network, without rows."""
        return NetworkRows(self.counted, self.network, self.weights, self.trained, features=self.features)

    def plus(self, other: NetworkRows, sign: int = 1) -> NetworkRows:
        """The sum of both, or the difference with ``sign=-1``."""
        total = {name: getattr(self, name) + sign * getattr(other, name) for name in KINDS_OF_ROWS}
        return replace(self.kind, **total)


KINDS_OF_ROWS = ("forward", "to_weights", "to_input", "along")


def sum_of_rows(rows: Iterable[NetworkRows], less: Iterable[NetworkRows] = ()) -> tuple[NetworkRows, ...]:
    """The sum of `rows` minus that of `less`, each kind of network once; kinds without rows are left out."""
    total: dict[NetworkRows, NetworkRows] = {}
    for sign, each in [*((1, one) for one in rows), *((-1, one) for one in less)]:
        total[each.kind] = total.get(each.kind, each.kind).plus(each, sign)
    return tuple(one for kind, one in total.items() if one != kind)


def name_of(network: type) -> str:
    """The name of a class of networks, with its module."""
    return f"{network.__module__}.{network.__qualname__}"
