"""Optimisers and weight averages, the same for every method."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.networks.averaging import MovingAverage, power_exponent
from distillbench.system.dtensors import class_of, is_sharded, load_full, local_shards, shard_like
from distillbench.training.data_parallel import SINGLE_RANK, DataParallelRanks, Ranks
from distillbench.training.gradient_reduction import GradientReduction, NetworkGradients
from distillbench.training.method import Method
from distillbench.training.optimizer_config import NetworkConfig, OptimizerConfig, missing_library
from distillbench.training.resume import State
from distillbench.training.update_counts import UpdateCounts


def _adamw8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    try:
        import bitsandbytes  # seconds to import
    except ImportError as error:
        raise missing_library("optimizer", "adamw8bit") from error
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


# The classes of OptimizerConfig.optimizer.
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adam": functools.partial(torch.optim.Adam, fused=True),
    "radam": functools.partial(torch.optim.RAdam, decoupled_weight_decay=True),
    "adamw8bit": _adamw8bit,
}
LARGE = 4096  # elements of a weight whose moments have 8 bits


class Average:
    """Moving average of a network's weights, by the settings ``ema_...`` of :class:`OptimizerConfig`, in images.

    Without them the average is the network itself. A sharded network cannot be copied; `twin` is then a network of the
    same architecture that is sharded in the same way.
    """

    def __init__(self, network: nn.Module, config: OptimizerConfig, twin: nn.Module | None = None) -> None:
        self.network, self.config, self.halflife = network, config, 1000 * config.ema_halflife_kimg
        self.power = power_exponent(config.ema_sigma_rel) + 1 if config.ema_sigma_rel else 0.0
        self.module = network
        if config.averaged:
            self.module = copy.deepcopy(network).eval().requires_grad_(False) if twin is None else twin
        self.average = MovingAverage(self.module, network)
        self.images = 0
        if self.module is twin:
            self.average.move(1.0)

    def update(self, images: int) -> None:
        self.images += images
        if self.module is self.network:
            return
        self.average.move(self._share(images))

    def _share(self, images: int) -> float:
        """The weight of the network in the average after an update of `images`, the last ones of ``self.images``."""
        if self.power:
            return 1 - (1 - images / self.images) ** self.power
        if self.config.ema_start == "rampup":
            return 1 - 0.5 ** (images / min(self.halflife, 0.05 * self.images))
        share = 1 - 0.5 ** (images / self.halflife)
        return share if self.config.ema_start == "constant" else share / (1 - 0.5 ** (self.images / self.halflife))

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
    decay = {
        "constant": 1.0,
        "linear": 1 - past,
        "cosine": 0.5 * (1 + math.cos(math.pi * past)),
        "inverse_sqrt": max(progress / config.lr_decay_start, 1.0) ** -0.5,
    }
    return warmup * decay[config.lr_decay]


@dataclass
class Gradients:
    """The gradients of a network. `sharded` are local shards, whose norms are over the shards of all `ranks`."""

    plain: list[Tensor]
    sharded: list[Tensor]
    ranks: Ranks = SINGLE_RANK

    def norm(self, by: str = "norm") -> Tensor:
        """Their norm, (), on the device; by "value" the largest absolute value of an element. At least one is needed.

        The arithmetic of ``torch.nn.utils.clip_grad_norm_``, which groups tensors by device and dtype at every step.
        """
        order = 2.0 if by == "norm" else math.inf
        norms = list(torch._foreach_norm(self.plain, order)) if self.plain else []
        if self.sharded:
            norms.append(self._norm_of_shards(order))
        return torch.linalg.vector_norm(torch.stack(norms), order)

    def _norm_of_shards(self, order: float) -> Tensor:
        if order == 2.0:
            square = torch.stack(torch._foreach_norm(self.sharded)).square().sum()
            self.ranks.all_reduce([square])
            return square.sqrt()
        of_ranks = self.sharded[0].new_zeros(self.ranks.count)
        if own := [shard for shard in self.sharded if shard.numel()]:
            of_ranks[self.ranks.share.index] = torch.stack(torch._foreach_norm(own, order)).max()
        self.ranks.all_reduce([of_ranks])  # a sum of one number and zeros
        return of_ranks.max()

    def clip(self, largest: float, by: str, norm: Tensor) -> None:
        """Limit their `norm`, or by "value" each element, to `largest`, in place."""
        every = self.plain + self.sharded
        if by == "norm":
            torch._foreach_mul_(every, (largest / (norm + 1e-6)).clamp(max=1.0))
        else:
            torch._foreach_clamp_max_(every, largest)
            torch._foreach_clamp_min_(every, -largest)

    def nan_to_num(self) -> None:
        """Replace NaN by 0 and infinities by 1e5 or -1e5, in place, as EDM's code does."""
        for gradient in self.plain + self.sharded:
            torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)


class Optimizers:
    """One optimiser for each network that a method yields, with one learning-rate schedule.

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
        given: dict[str, Any] = {
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
        }
        weights = list(network.parameters())
        halves = [[w for w in weights if is_sharded(w) is sharded] for sharded in (False, True)]  # torch mixes no kinds
        groups = [{"params": half} for half in halves if half]
        return MAKERS[settings.optimizer](groups, lr=settings.lr, **given)

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
        if plain or sharded:
            self._limit(Gradients(plain, sharded, self.ranks), settings)
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)  # does nothing if a gradient overflowed
        self.scaler.update()

    def _limit(self, gradients: Gradients, settings: OptimizerConfig) -> None:
        """Count an update with these gradients, and clip them."""
        norm = gradients.norm(settings.grad_clip_by)
        if self.counts is not None:
            self.counts.add(norm, settings.grad_clip)
        if settings.grad_nan_to_num:
            gradients.nan_to_num()
            norm = gradients.norm(settings.grad_clip_by)
        if settings.grad_clip:
            gradients.clip(settings.grad_clip, settings.grad_clip_by, norm)

    def state(self, method: Method) -> State:
        """Adam's moments, by the names of the networks in `method`; RuntimeError for a network without a name."""
        names = {module: name for name, module in method.named_modules()}
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for network, optimizer in self.by_network.items():
            if network not in names:
                kind = class_of(network).__name__
                raise RuntimeError(
                    f"train_step yields a {kind} that is not an attribute of the method, so its state cannot be saved"
                )
            for index, weight in enumerate(network.parameters()):
                for key, value in optimizer.state[weight].items():
                    full = f"{names[network]}/{index}/{key}"
                    if isinstance(value, Tensor):
                        tensors[full] = value
                    else:  # bitsandbytes counts steps by plain numbers
                        numbers[full] = value
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        trained = [names[network] for network in self.by_network]
        return State(tensors, {"networks": trained, "scaler": scaler, "numbers": numbers})

    def restore(self, state: State, method: Method) -> None:
        networks = dict(method.named_modules())
        if self.scaler is not None:
            self.scaler.load_state_dict(state.values["scaler"])
        every = state.tensors | state.values.get("numbers", {})  # older states have no numbers
        for name in state.values["networks"]:
            optimizer = self.by_network[networks[name]] = self._make(networks[name])
            for index, weight in enumerate(networks[name].parameters()):
                found = {key.rpartition("/")[2]: key for key in every if key.startswith(f"{name}/{index}/")}
                if found:
                    kept = {key: every[full] for key, full in found.items()}
                    step = kept.pop("step")  # fused optimisers count on the device, torch.optim.RAdam on the CPU
                    if isinstance(step, Tensor):
                        step = step.to(weight.device if optimizer.defaults.get("fused") else "cpu")
                    optimizer.state[weight] = {"step": step} | {key: _like(weight, own) for key, own in kept.items()}


def _like(weight: Tensor, buffer: Tensor) -> Tensor:
    """`buffer` with the memory format of `weight`: fused optimisers need the same strides.

    One of another shape, such as the scales of moments of 8 bits, is only moved to its device.
    """
    if buffer.shape != weight.shape:
        return buffer.to(weight.device)
    if is_sharded(weight):
        return shard_like(weight, buffer)
    return torch.empty_like(weight, dtype=buffer.dtype).copy_(buffer)


@functools.cache
def warm_up(device: str, optimizer: str = "adamw") -> None:
    """Update one weight before the clock starts: libraries import modules for seconds at their first optimiser step."""
    network = nn.ParameterList([torch.zeros(LARGE, device=device)])
    Optimizers(OptimizerConfig(optimizer=optimizer)).update(network, network[0].square().sum(), 1.0)
