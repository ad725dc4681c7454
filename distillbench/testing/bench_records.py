"""What a bench records of a method's training."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from distillbench.training.method import Batch, Method


class Learning:
    """Records which networks a training updates, and which of their weights get a gradient other than zero."""

    def __init__(self, method: Method) -> None:
        self.networks: dict[nn.Module, None] = {}
        self.weights: set[nn.Parameter] = set()
        train_step = method.train_step

        def recorded(batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
            for item in train_step(batch):
                yield item
                self.networks[item[0]] = None
                new = (weight for weight in item[0].parameters() if weight not in self.weights)
                self.weights |= {weight for weight in new if weight.grad is not None and weight.grad.any()}

        method.__dict__["train_step"] = recorded
