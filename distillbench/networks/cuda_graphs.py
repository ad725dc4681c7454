"""CUDA graphs: a network's call is captured once for each shape of its inputs, then replayed by one launch.

Python launches each of a network's hundreds of kernels by itself, which for one image takes longer than the kernels
do. A replay launches all of them at once, on the same memory: inputs are copied in, the output is copied out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.denoiser import NetworkCall

WARM_UP_CALLS = 3  # before a capture: libraries choose algorithms and allocate workspace in their first calls
Inputs = tuple[Tensor | None, ...]  # x, time, embedding, and the tensors of the condition


@dataclass(frozen=True)
class _Graph:
    """A captured graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    output: Tensor

    def replay(self, inputs: Inputs) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        self.graph.replay()
        return self.output.clone()


class Captured(NetworkCall):
    """Replays `call` from CUDA graphs, for calls without gradient. Weights may change in place between calls.

    A graph reads weights at the addresses that they had during its capture. So :meth:`begin` must be called wherever
    weights may have been replaced by other tensors: a network with new addresses is captured again at its next call.

    Its graphs share one memory pool, as they never run at the same time and outputs are copied out. The graphs of a
    network are freed with it.
    """

    def __init__(self, call: NetworkCall, device: str) -> None:
        super().__init__(call.plain)
        self.call, self.device = call, device
        self.graphs: WeakKeyDictionary[nn.Module, dict[Any, _Graph]] = WeakKeyDictionary()
        self.pool: Any = None
        self._addresses: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()  # of weights and buffers
        self._compared: WeakSet[nn.Module] = WeakSet()  # since the last begin()

    def in_float32(self) -> NetworkCall:
        """The call without autocast, and without graphs."""
        return self.call.in_float32()

    def observing(self, modules: Collection[nn.Module]) -> NetworkCall:
        """The call without graphs: a replay runs no hooks."""
        return self.call.observing(modules)

    def begin(self) -> None:
        self._compared = WeakSet()

    def __call__(self, network: nn.Module, x: Tensor, time: Tensor, embedding: Tensor | None, c: Condition) -> Tensor:
        if torch.is_grad_enabled():
            return self.call(network, x, time, embedding, c)
        if network not in self._compared:
            self._compare(network)
        inputs = (x, time, embedding, *_tensors(c))
        graphs = self.graphs.setdefault(network, {})
        signature = (c.guides, *(None if i is None else (i.shape, i.dtype) for i in inputs))
        if signature not in graphs:
            graphs[signature] = self._capture(network, inputs, c)
        return graphs[signature].replay(inputs)

    def _compare(self, network: nn.Module) -> None:
        """Forget the graphs of `network` if its weights are no longer where they were."""
        addresses = tuple(tensor.data_ptr() for tensor in [*network.parameters(), *network.buffers()])
        if self._addresses.get(network) != addresses:
            self.graphs.pop(network, None)
        self._addresses[network] = addresses
        self._compared.add(network)

    def _capture(self, network: nn.Module, inputs: Inputs, c: Condition) -> _Graph:
        inputs = tuple(None if i is None else i.contiguous().clone() for i in inputs)
        x, time, embedding, *rest = inputs
        assert x is not None and time is not None
        tensors: dict[str, Any] = dict(zip(_names(c), rest, strict=True))
        c = dataclasses.replace(c, **tensors)
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_CALLS):
                    self.call(network, x, time, embedding, c)
            torch.cuda.current_stream().wait_stream(side)
            alive = [graph for graphs in self.graphs.values() for graph in graphs.values()]
            if not alive:  # torch may refuse a pool of which all graphs are freed: cuBLAS keeps its workspace there
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Another thread pins the noise of the next batch meanwhile, which a capture forbids all threads by default.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = self.call(network, x, time, embedding, c)
            del alive  # no garbage collection could free them before the capture held the pool
        return _Graph(graph, inputs, output)


def _names(c: Condition) -> list[str]:
    """The fields of a condition that are tensors or None."""
    return [field.name for field in dataclasses.fields(c) if field.name != "guides"]


def _tensors(c: Condition) -> tuple[Tensor | None, ...]:
    return tuple(getattr(c, name) for name in _names(c))
