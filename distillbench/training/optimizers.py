"""Optimisers and weight averages, the same for every method."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from distillbench.networks.averaging import MovingAverage
from distillbench.system.dtensors import class_of, is_sharded, load_full, local_shards, shard_like
from distillbench.training.data_parallel import SINGLE_RANK, DataParallelRanks, Ranks
from distillbench.training.gradient_reduction import GradientReduction, NetworkGradients
from distillbench.training.method import Method, NetworkConfig, OptimizerConfig
from distillbench.training.resume import State
from distillbench.training.update_counts import UpdateCounts


class Average:
    """Exponential moving average of a network's weights, by half-life in images.

    At the start the half-life is at most 5 % of the images seen, so that the initial weights are forgotten (Karras et
    al. 2022, `ema_rampup_ratio`). With half-life 0 the average is the network itself. A sharded network cannot be
    copied; `twin` is then a network of the same architecture that is sharded in the same way.
    """

    def __init__(self, network: nn.Module, halflife_kimg: float, twin: nn.Module | None = None) -> None:
        self.network, self.halflife = network, 1000 * halflife_kimg
        self.module = network
        if self.halflife:
            self.module = copy.deepcopy(network).eval().requires_grad_(False) if twin is None else twin
        self.average = MovingAverage(self.module, network)
        self.images = 0
        if self.module is twin:
            self.average.move(1.0)

    def update(self, images: int) -> None:
        self.images += images
        if self.module is self.network:
            return
        halflife = min(self.halflife, 0.05 * self.images)
        self.average.move(1 - 0.5 ** (images / halflife))

    def state(self) -> State:
        own = self.module.state_dict() if self.module is not self.network else {}
        return State(own, {"images": self.images})

    def restore(self, state: State) -> None:
        self.images = state.values["images"]
        if self.module is not self.network:
            load_full(self.module, state.tensors)


def learning_rate_factor(config: OptimizerConfig, progress: float) -> float:
    """Warm-up times decay, as a share of the peak learning rate; `progress` of the phase is in [0, 1]."""
    warmup = min(1.0, progress / config.lr_warmup) if config.lr_warmup else 1.0
    past = max(0.0, (progress - config.lr_warmup) / max(1 - config.lr_warmup, 1e-12))
    decay = {"constant": 1.0, "linear": 1 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}
    return warmup * decay[config.lr_decay]


def clip(plain: list[Tensor], sharded: list[Tensor], largest: float, ranks: Ranks = SINGLE_RANK) -> Tensor | None:
    """Scale the gradients of a network, in place, so that their norm is at most `largest`; 0: leave them.

    Returns the norm before, (), on the device; None without gradients. The arithmetic of
    ``torch.nn.utils.clip_grad_norm_``, which groups tensors by device and dtype at every step. `sharded` are local
    shards of gradients; the norm is over the shards of all `ranks`.
    """
    if not (plain or sharded):
        return None
    norms = list(torch._foreach_norm(plain)) if plain else []
    if sharded:
        square = torch.stack(torch._foreach_norm(sharded)).square().sum()
        ranks.all_reduce([square])
        norms.append(square.sqrt())
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if largest:
        torch._foreach_mul_(plain + sharded, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Optimizers:
    """One Adam for each network that a method yields, with one learning-rate schedule.

    `settings_of` gives the settings of a network that replace those of `config`. `scaler` scales losses in fp16.
    Gradients are summed over `ranks`. `counts`: where updates are counted.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        scaler: torch.amp.GradScaler | None = None,
        ranks: Ranks = SINGLE_RANK,
        settings_of: Callable[[nn.Module], NetworkConfig] | None = None,
        counts: UpdateCounts | None = None,
    ) -> None:
        self.counts = counts
        self.config, self.scaler, self.ranks, self.settings_of = config, scaler, ranks, settings_of
        self.by_network: dict[nn.Module, torch.optim.Optimizer] = {}
        self.settings: dict[nn.Module, OptimizerConfig] = {}
        self.reduction = GradientReduction(ranks) if isinstance(ranks, DataParallelRanks) else None
        self.summed: dict[nn.Module, NetworkGradients] = {}  # with several ranks

    def _make(self, network: nn.Module) -> torch.optim.Optimizer:
        settings = self.config if self.settings_of is None else self.settings_of(network).over(self.config)
        self.settings[network] = settings
        betas, decay = (settings.beta1, settings.beta2), settings.weight_decay
        weights = list(network.parameters())
        halves = [[w for w in weights if is_sharded(w) is sharded] for sharded in (False, True)]  # torch mixes no kinds
        groups = [{"params": half} for half in halves if half]
        return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, weight_decay=decay, fused=True)

    def update(self, network: nn.Module, loss: Tensor, factor: float) -> None:
        """One step down the gradient of `loss` in the weights of `network`."""
        self.differentiate(network, loss, first=True)
        self.step(network, factor)

    def differentiate(self, network: nn.Module, loss: Tensor, first: bool, last: bool = True) -> None:
        """Add the gradient of `loss`, of the `first` to the `last` part of a step.

        Only the backward pass of the last part sends gradients to other ranks.
        """
        if network not in self.by_network:
            self.by_network[network] = self._make(network)
        if self.reduction is not None and network not in self.summed:
            self.summed[network] = self.reduction.of([w for w in network.parameters() if not is_sharded(w)])
        if first:
            for group in self.by_network[network].param_groups:
                for weight in group["params"]:
                    weight.grad = None
        with self.summed[network].during_backward() if last and network in self.summed else nullcontext():
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, network: nn.Module, factor: float) -> None:
        """One step down the accumulated gradient, which is clipped."""
        if network in self.summed:
            self.summed[network].finish()
        optimizer, plain, sharded = self.by_network[network], list[Tensor](), list[Tensor]()
        settings = self.settings[network]
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
            gradients = [weight.grad for weight in group["params"] if weight.grad is not None]
            if gradients and is_sharded(gradients[0]):  # and so is its whole group
                sharded = local_shards(gradients)
            else:
                plain = gradients
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = clip(plain, sharded, settings.grad_clip, self.ranks)
        if norm is not None and self.counts is not None:
            self.counts.add(norm, settings.grad_clip)
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)  # does nothing if a gradient overflowed
        self.scaler.update()

    def state(self, method: Method) -> State:
        """Adam's moments, by the names of the networks in `method`; RuntimeError for a network without a name."""
        names = {module: name for name, module in method.named_modules()}
        tensors = {}
        for network, optimizer in self.by_network.items():
            if network not in names:
                kind = class_of(network).__name__
                raise RuntimeError(
                    f"train_step yields a {kind} that is not an attribute of the method, so its state cannot be saved"
                )
            for index, weight in enumerate(network.parameters()):
                for key, value in optimizer.state[weight].items():
                    tensors[f"{names[network]}/{index}/{key}"] = value
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        return State(tensors, {"networks": [names[network] for network in self.by_network], "scaler": scaler})

    def restore(self, state: State, method: Method) -> None:
        networks = dict(method.named_modules())
        if self.scaler is not None:
            self.scaler.load_state_dict(state.values["scaler"])
        for name in state.values["networks"]:
            optimizer = self.by_network[networks[name]] = self._make(networks[name])
            for index, weight in enumerate(networks[name].parameters()):
                found = {key.rpartition("/")[2]: key for key in state.tensors if key.startswith(f"{name}/{index}/")}
                if found:
                    optimizer.state[weight] = {key: _like(weight, state.tensors[full]) for key, full in found.items()}


def _like(weight: Tensor, buffer: Tensor) -> Tensor:
    """`buffer` with the memory format of `weight`: fused optimisers need the same strides."""
    same = buffer.shape == weight.shape
    if same and is_sharded(weight):
        return shard_like(weight, buffer)
    return torch.empty_like(weight).copy_(buffer) if same else buffer.to(weight.device)


@functools.cache
def warm_up(device: str) -> None:
    """Update one weight before the clock starts: torch imports modules for seconds at its first optimiser step."""
    network = nn.ParameterList([torch.zeros(1, device=device)])
    Optimizers(OptimizerConfig()).update(network, network[0].square().sum(), 1.0)
