"""The one model type of methods and samplers: ``f(x_t, t, c) = E[x_0 | x_t, c]``.

A network may predict eps, x_0, v, a flow velocity or EDM's F; :class:`Denoiser` turns each into the data prediction. It
also reads a network that was trained on one noise schedule on another, at equal signal-to-noise ratio.

| symbol   | meaning                                              | shape      |
|----------|------------------------------------------------------|------------|
| x_t      | noisy image, alpha_t x_0 + sigma_t eps               | (B,C,H,W)  |
| t        | time, float64                                        | (B,1,1,1)  |
| c        | condition                                            | of a batch |
| f, eps   | data and noise prediction, x_t = alpha f + sigma eps | (B,C,H,W)  |
| x^, tau  | EDM's x_t / alpha_t = x_0 + tau eps, noise level     |            |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distillbench.diffusion.autograd_levels import has_tangent, needs_gradient, reaches_weights
from distillbench.diffusion.conditioning import UNCONDITIONAL, WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.embeddings import AugmentedNetwork, GuidanceEmbedding
from distillbench.diffusion.modes import evaluating
from distillbench.diffusion.network_features import ROWS, FeatureRecorder, feature_shapes, last_weight
from distillbench.diffusion.schedules import VE, NoiseSchedule
from distillbench.errors import UserError
from distillbench.system.dtensors import class_of, is_sharded

__all__ = ["INPUTS", "PREDICTIONS", "SIGMA_DATA", "TARGETS", "Denoiser", "guided", "implied_eps"]

SIGMA_DATA = 0.5  # EDM's standard deviation of the data, of every network that predicts F (Karras et al. 2022, table 1)


def _edm(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip x^ + c_out F: c_skip x^ = alpha sd^2 x_t / n^2, c_out = sigma sd / n, n^2 = sigma^2 + alpha^2 sd^2."""
    square = sigma**2 + (alpha * SIGMA_DATA) ** 2
    return alpha * SIGMA_DATA**2 / square, sigma * SIGMA_DATA / square.sqrt()


def _edm_target(x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """F for which f = x_0: (sigma x_0 - alpha sd^2 eps) / (sd n)."""
    n = (sigma**2 + (alpha * SIGMA_DATA) ** 2).sqrt()
    return (sigma * x_0 - alpha * SIGMA_DATA**2 * eps) / (SIGMA_DATA * n)


# From alpha and sigma the a and b of f = a x_t + b out; empty where f = out. The row of v = alpha eps - sigma x_0
# keeps its denominator, which is 1 only where alpha^2 + sigma^2 = 1.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "eps": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "x0": lambda alpha, sigma: (),
    "v": lambda alpha, sigma: (alpha / (square := alpha**2 + sigma**2), -sigma / square),
    "flow": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),  # u = eps - x_0
    "edm": _edm,
}

# The training target of each of these networks, from x_0 and eps.
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "eps": lambda x_0, eps, alpha, sigma: eps,
    "x0": lambda x_0, eps, alpha, sigma: x_0,
    "v": lambda x_0, eps, alpha, sigma: alpha * eps - sigma * x_0,
    "flow": lambda x_0, eps, alpha, sigma: eps - x_0,
    "edm": _edm_target,
}

# The inputs of the network: (t, schedule) -> its time, preceded by the n of its input x_t / n where that is not x_t.
INPUTS: dict[str, Callable[[Tensor, NoiseSchedule], tuple[Tensor, ...]]] = dict.fromkeys(
    ("eps", "x0", "v", "flow"), lambda t, schedule: (t,)
)


def _edm_input(t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """c_in x^ = x_t / n and c_noise = log(tau) / 4 (Karras et al. 2022, table 1)."""
    n = (schedule.sigma(t) ** 2 + (schedule.alpha(t) * SIGMA_DATA) ** 2).sqrt()
    return n, schedule.lam(t) / 4


INPUTS["edm"] = _edm_input

SCALED_AT_EVERY_LEVEL = frozenset(["edm"])  # predictions of networks whose inputs and outputs have a unit variance


class NetworkCall:
    """How the networks of a counter are called. The base class calls them unchanged.

    `plain` has, in plain values, the settings that can change results.
    """

    def __init__(self, plain: Mapping[str, Any] | None = None) -> None:
        self.plain: Mapping[str, Any] = plain or {}

    def begin(self) -> None:
        """Called before networks whose weights may be other tensors than at earlier calls."""

    def prepare(self, network: nn.Module) -> None:
        """Called before the first call of `network` and before it is copied."""

    def undo(self) -> None:
        """Undo what :meth:`prepare` did."""

    def in_float32(self) -> NetworkCall:
        """The same call without autocast."""
        return self

    def observing(self, modules: Collection[nn.Module]) -> NetworkCall:
        """The same call, which runs forward hooks of `modules`: no module around one of them runs compiled."""
        return self

    def __call__(self, network: nn.Module, x: Tensor, time: Tensor, embedding: Tensor | None, c: Condition) -> Tensor:
        return network(x, time, embedding, c)


class Kind(NamedTuple):
    """What rows of networks are counted apart by, as a row of another kind may cost other FLOPs."""

    network: type[nn.Module]
    weights: int  # numbers in all its weights
    trained: int  # in those that get a gradient; 0: evaluated without a gradient to weights
    features: tuple[str, ...] = ()  # submodules from whose outputs alone a backward pass starts; (): from the output


@dataclass
class Rows:
    """Rows (images) that networks of one kind evaluated, and what was computed besides the output."""

    forward: int = 0
    to_weights: int = 0  # a backward pass to the weights is expected
    to_input: int = 0  # a backward pass to the input only is expected
    along: int = 0  # a derivative along a direction was computed in the same pass (forward mode, torch.func.jvp)


class Counter:
    """Rows (images) that the networks of this counter evaluated. Copies of a network share its counter.

    A row is expected to have a backward pass if its output needs a gradient: gradients stopped later are not seen.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.rows_with_gradient = 0  # whose output needs a gradient: a backward pass is expected
        self.rows_to_input = 0  # of these, those of networks with constant weights: the gradient reaches the input only
        self.rows_along = 0  # of `rows`, those with a derivative along a direction (forward mode)
        self.rows_of_differences = 0  # of `rows`, those whose difference is a derivative (diffusion.derivatives)
        self.kinds: dict[Kind, Rows] = {}  # the same, by kind of network
        self.timed: Callable[[], AbstractContextManager[None]] = nullcontext  # in which a meter times every forward
        self.call = NetworkCall()
        self._sizes: WeakKeyDictionary[nn.Module, dict[bool, Kind]] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict) -> Counter:
        return self

    def add(
        self,
        network: nn.Module,
        outputs: Sequence[Tensor],
        inputs: Iterable[Tensor | None],
        rows: int,
        features: Sequence[str] = (),
    ) -> None:
        """Note that `network` has computed `outputs`, each of `rows` images, from `inputs`.

        `features`: the names of the submodules whose outputs they are; (): the first is the network's own output.
        """
        gradient = any(needs_gradient(output) for output in outputs)
        to_weights = gradient and any(reaches_weights(output, network) for output in outputs)
        whole = self.kind(network, to_weights)
        kind = self.kinds.setdefault(whole._replace(features=tuple(sorted(features))) if gradient else whole, Rows())
        self.rows += rows
        kind.forward += rows
        if gradient:
            self.rows_with_gradient += rows
            kind.to_weights += rows if to_weights else 0
            kind.to_input += 0 if to_weights else rows
            if not to_weights and any(given is not None and needs_gradient(given) for given in inputs):
                self.rows_to_input += rows
        if any(has_tangent(output) for output in outputs):
            self.rows_along += rows
            kind.along += rows

    def kind(self, network: nn.Module, trained: bool) -> Kind:
        """The kind of a row of `network`, with a gradient to weights or without. Kept until :meth:`forget_kinds`."""
        known = self._sizes.setdefault(network, {})
        if trained not in known:
            weights = list(network.parameters())
            sizes = (sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad and trained))
            known[trained] = Kind(class_of(network), *sizes)
        return known[trained]

    def forget_kinds(self) -> None:
        """Look again which weights each network has, and which of them get a gradient, at its next evaluation."""
        self._sizes.clear()

    @contextmanager
    def calling(self, call: NetworkCall) -> Iterator[None]:
        """In the block the networks are called by `call`."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before


class CountedNetwork(nn.Module):
    """A network whose evaluated rows are always counted.

    In training mode dropout acts only where gradients reach the network's weights: a frozen network, one under
    ``torch.no_grad()`` and one that is held (:func:`distillbench.diffusion.modes.frozen_weights`) run in evaluation
    mode. The exception is a block of :func:`distillbench.diffusion.dropout.one_mask`, which sets `mask`.
    """

    def __init__(self, network: nn.Module, counter: Counter) -> None:
        super().__init__()
        self.network = network
        self.counter = counter
        self.mask: Callable[[], None] | None = None  # called before an evaluation: sets the random generator
        self.recorder: FeatureRecorder | None = None  # of the features of the next evaluation

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None, c: Condition) -> Tensor:
        recorder = self.recorder
        if recorder is not None:
            return self._recorded(recorder, x, time, embedding, c)
        with self.counter.timed(), self._mode():
            out = self.counter.call(self.network, x, time, embedding, c)
        self.counter.add(self.network, [out], (x, embedding), len(x))
        return out

    def _recorded(
        self, recorder: FeatureRecorder, x: Tensor, time: Tensor, embedding: Tensor | None, c: Condition
    ) -> Tensor:
        """The same evaluation, whose features `recorder` takes."""
        call = self.counter.call.observing(recorder.modules.values())
        with self.counter.timed(), self._mode(), recorder.recording():
            out = call(self.network, x, time, embedding, c)
        found = recorder.take(len(x), x.dtype)
        if recorder.output_gradient:
            self.counter.add(self.network, [out, *found.values()], (x, embedding), len(x))
            return out
        self.counter.add(self.network, [*found.values()], (x, embedding), len(x), [*found])
        return out.detach()

    def _mode(self) -> AbstractContextManager[None]:
        """A block with the dropout mode of this evaluation."""
        if self.mask is not None:
            self.mask()
            return nullcontext()
        if not self.network.training or self._differentiated():
            return nullcontext()
        return evaluating(self.network)

    def _differentiated(self) -> bool:
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self.network.parameters())


class Denoiser(nn.Module):
    """A network, its schedule and its parameterisation, read as f(x_t, t, c) = E[x_0 | x_t, c].

    The network is called as ``network(x, time, embedding, c)`` with x (B,C,H,W), time (B,), an optional embedding
    (B, network.embedding_channels) that is added to its embedding of time, and the condition c.

    `schedule` is that of x_t and t, `native` that of the network. They differ after :meth:`on`. A student with the
    guidance weight as an input has its embedding in `guidance`, or its network reads c.w itself (`projects_guidance`).
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, prediction: str, counter: Counter | None = None
    ) -> None:
        super().__init__()
        self.counted = CountedNetwork(network, counter or Counter())
        self.native = self.schedule = schedule
        self.prediction = prediction
        self.guidance: GuidanceEmbedding | None = None
        self.projects_guidance = False
        self._last_weight: str | None = None

    @property
    def network(self) -> nn.Module:
        return self.counted.network

    @property
    def embedding_channels(self) -> int:
        """Width of the embedding that the network adds to that of the time."""
        return cast(int, self.network.embedding_channels)

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL, embedding: Tensor | None = None) -> Tensor:
        """f(x_t, t, c), shape (B,C,H,W)."""
        if self.schedule is not self.native:
            x_t, t = self._at_equal_snr(x_t, t)
        coefficients = PREDICTIONS[self.prediction](self.native.alpha(t), self.native.sigma(t))
        output = self.output(x_t, t, c, embedding)
        if not coefficients:
            return output
        a, b = coefficients
        return torch.addcmul(a * x_t, b, output)

    def _at_equal_snr(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t of the native schedule with the same x^ and noise level."""
        s = self.native.t_of_lam(self.schedule.lam(t))
        return x_t * (self.native.alpha(s) / self.schedule.alpha(t)), s

    def network_time(self, t: Tensor) -> Tensor:
        """The time that the network is given at t (B,1,1,1), (B,)."""
        t = t if self.schedule is self.native else self.native.t_of_lam(self.schedule.lam(t))
        return INPUTS[self.prediction](t, self.native)[-1].flatten()

    def output(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL, embedding: Tensor | None = None) -> Tensor:
        """What the network itself predicts (eps, x_0, v, ...) on its native schedule, shape (B,C,H,W)."""
        if c.augmentation is not None:
            _check_labels(self.network, c.augmentation)
        if self.guidance is not None:
            e = self.guidance(c.w)
            embedding = e if embedding is None else embedding + e
        *n, time = INPUTS[self.prediction](t, self.native)
        return self.counted(x_t / n[0] if n else x_t, time.to(x_t.dtype).flatten(), embedding, c)

    def features(
        self,
        names: Sequence[str],
        x_t: Tensor,
        t: Tensor,
        c: Condition = UNCONDITIONAL,
        embedding: Tensor | None = None,
        f_gradient: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """f(x_t, t, c), and the outputs of the submodules `names` of the network in the same, counted evaluation.

        Names are those of ``network.named_modules()``. Features are (B, ...) as :meth:`feature_shapes` tells, by name,
        in the dtype of x_t also where the network runs in bf16 or fp16, and they have gradients like f. A loss that
        does not use f sets ``f_gradient=False``: f gets no gradient, and the backward pass is counted from the features
        on. A submodule that contains one of `names` is not compiled in this evaluation.

        Raises UserError for a name that there is not, and for a submodule that is not called exactly once or whose
        output is not one tensor with a row for each image.
        """
        recorder = FeatureRecorder(self.network, names, f_gradient)
        before, self.counted.recorder = self.counted.recorder, recorder
        try:
            f = self(x_t, t, c, embedding)
        finally:
            self.counted.recorder = before
        return (f if f_gradient else f.detach()), recorder.found

    def feature_shapes(
        self, names: Sequence[str], shape: tuple[int, int, int], conditioning: Conditioning = WITHOUT_CLASSES
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of features, without the batch dimension, for images (C,H,W) of `shape`.

        For the layers that a method puts on them, in its ``__init__``: ``shape`` and ``conditioning`` are the
        teacher's. Nothing is evaluated, counted, drawn or changed. Raises UserError like :meth:`features`.
        """
        return feature_shapes(self.network, names, shape, self._example(conditioning))

    def last_weight(self, shape: tuple[int, int, int], conditioning: Conditioning = WITHOUT_CLASSES) -> nn.Parameter:
        """The weight of the layer that the network calls last, which has two or more dimensions and is trained.

        The first call finds it, by an evaluation of images (C,H,W) of `shape` in which nothing is computed: ``shape``
        and ``conditioning`` are the teacher's. Of adapters it is one of theirs. Raises UserError if there is none, and
        if the network is sharded over ranks.
        """
        if any(is_sharded(weight) for weight in self.network.parameters()):
            raise UserError(
                "the last layer of a network alone has no gradient if the network is sharded. Possible: "
                "compute.shard=false, or settings that need no such gradient"
            )
        if self._last_weight is None:
            self._last_weight = last_weight(self.network, shape, self._example(conditioning))
        return self.network.get_parameter(self._last_weight)

    def _example(self, conditioning: Conditioning) -> Condition:
        device = next((weight.device for weight in self.network.parameters()), torch.device("cpu"))
        return conditioning.example(ROWS, device)

    def on(self, schedule: NoiseSchedule) -> Denoiser:
        """The same network, read on another schedule at equal signal-to-noise ratio (it is not copied).

        The schedule is restricted to the noise levels of the native one.
        """
        twin = copy.copy(self)
        twin.schedule = schedule if schedule is self.native else schedule.restricted(*self.native.lam_range)
        return twin

    @property
    def every_level(self) -> NoiseSchedule:
        """Its schedule with all noise levels that the network takes: its own, but for EDM's networks any level.

        Those are scaled for every level (Karras et al. 2022, table 1), and trained on draws without bounds.
        """
        schedule = self.schedule
        free = self.prediction in SCALED_AT_EVERY_LEVEL and schedule is self.native
        return schedule.unbounded() if free and isinstance(schedule, VE) else schedule

    def copy(self, counter: Counter) -> Denoiser:
        """An independent copy with its own weights, counted by `counter`."""
        twin = copy.deepcopy(self)
        twin.counted.counter = counter
        return twin

    def freeze(self) -> Denoiser:
        """In evaluation mode and without gradients to its weights (gradients to its input still flow)."""
        return self.eval().requires_grad_(False)


def _check_labels(network: nn.Module, labels: Tensor) -> None:
    """Raise UserError unless `network` takes these labels; without them students would generate augmented images."""
    taken = network.augment_dim if isinstance(network, AugmentedNetwork) else 0
    if taken != labels.shape[1]:
        raise UserError(
            f"augmented images have {labels.shape[1]} labels, and this {class_of(network).__name__} takes "
            f"{taken or 'none'}. EDM's networks for CIFAR-10, FFHQ and AFHQv2 take 9. Possible: augment.probability=0, "
            "and 0 for a method's own augment; augment.flip=true needs no labels"
        )


def guided(denoiser: Denoiser, conditioning: Conditioning, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
    """f_w = f_0 + w (f_c - f_0), both evaluated in one batch; f itself where `c` has no w. Shape (B,C,H,W).

    A denoiser that has w as an input, such as a fake score, gets it in both.
    """
    if c.w is None or c.labels is None or not c.guides:
        return denoiser(x_t, t, c)
    both = joined(c, conditioning.none(c))
    if denoiser.guidance is not None or denoiser.projects_guidance:
        both = replace(both, w=torch.cat([c.w, c.w]))
    f_c, f_0 = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return f_0 + c.w * (f_c - f_0)


def joined(a: Condition, b: Condition) -> Condition:
    """The conditions of two batches as one of both, without guidance."""
    pairs = ((a.labels, b.labels), (a.text, b.text), (a.image, b.image), (a.augmentation, b.augmentation))
    labels, text, image, augmentation = (None if x is None or y is None else torch.cat([x, y]) for x, y in pairs)
    return Condition(labels, text=text, image=image, augmentation=augmentation)


def implied_eps(x_t: Tensor, x_0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that x_t contains if its data is x_0: (x_t - alpha x_0) / sigma."""
    return (x_t - alpha * x_0) / sigma
