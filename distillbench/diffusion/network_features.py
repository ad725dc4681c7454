"""Features of a network: the outputs of some of its submodules, in one evaluation.

Forward hooks record them. They are registered for one call and removed after it, also after an error. A call whose
parts are compiled would not run them: :meth:`distillbench.diffusion.denoiser.NetworkCall.observing` leaves these parts
uncompiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.modes import evaluating
from distillbench.errors import UserError, quoted
from distillbench.system.dtensors import class_of

LISTED = 5  # names in an error
ROWS = 2  # images in the evaluation that finds shapes: not one, to tell a batch dimension from any other


@dataclass(frozen=True)
class _Output:
    """What a submodule returned: one tensor, or anything else."""

    value: Any
    version: int  # of the tensor at that time: torch counts changes in place


class FeatureRecorder:
    """Records the outputs of the submodules `names` of `network` in one evaluation.

    With ``output_gradient=False`` the network's own output gets no gradient. Raises UserError for a name that is not
    among ``network.named_modules()``, and TypeError if `names` is one text.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], output_gradient: bool = True) -> None:
        if isinstance(names, str):
            raise TypeError(f"names must be a list of names of submodules, got the text {quoted(names)}")
        known = {name: module for name, module in network.named_modules() if name}
        for name in names:
            if name not in known:
                raise _no_submodule(network, name, known)
        self.network, self.output_gradient = network, output_gradient
        self.modules = {name: known[name] for name in names}
        # A sharded module gathers its weights for a backward pass when a gradient reaches one of its outputs.
        self._sharded = {
            module: name
            for name, module in network.named_modules()
            if class_of(module) is not type(module) and any(_is_within(feature, name) for feature in names)
        }
        self.found: dict[str, Tensor] = {}
        self._seen: dict[str, list[_Output]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A block in which the network is evaluated once."""
        self._seen = {name: [] for name in self.modules}
        with ExitStack() as hooks:
            for module in self._sharded:  # its own hook, between these two, sees the features within it as outputs too
                hooks.callback(module.register_forward_hook(self._with_features, prepend=True).remove)
                hooks.callback(module.register_forward_hook(_without_features).remove)
            for name, module in self.modules.items():

                def note(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                    self._seen[name].append(_Output(output, _version(output)))

                hooks.callback(module.register_forward_hook(note).remove)
            yield

    def _with_features(self, module: nn.Module, inputs: Any, output: Any) -> tuple[Any, list[Any]]:
        within = self._sharded[module]
        outputs = [each.value for name, seen in self._seen.items() if _is_within(name, within) for each in seen]
        return output, outputs

    def take(self, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the evaluation of `rows` images recorded, by name: contiguous tensors (rows, ...) of `dtype`.

        Raises UserError for a submodule whose output is not one tensor for each image.
        """
        if self.found:
            raise RuntimeError("features are of one evaluation, and this denoiser evaluates its network several times")
        seen, self._seen = self._seen, {}
        outputs = {name: self._only(name, calls, rows) for name, calls in seen.items()}
        self.found = {name: output.to(dtype).contiguous() for name, output in outputs.items()}
        return self.found

    def _only(self, name: str, outputs: list[_Output], rows: int) -> Tensor:
        """The one tensor in `outputs`, those of all calls of the submodule `name`."""
        feature = f"the submodule {quoted(name)} of {class_of(self.network).__name__}"
        if not outputs:
            raise UserError(f"{feature} is not called, so it has no output.{self._children(name)}")
        if len(outputs) > 1:
            raise UserError(f"{feature} is called {len(outputs)} times in one evaluation, so it has several outputs")
        output = outputs[0].value
        if isinstance(output, tuple | list) and len(output) == 1:
            (output,) = output
        if not isinstance(output, Tensor):
            many = f" of {len(output)}" if isinstance(output, tuple | list) else ""
            kind = f"{type(output).__name__}{many}"
            raise UserError(f"the output of {feature} must be one tensor, got a {kind}.{self._children(name)}")
        if not output.ndim or len(output) != rows:
            raise UserError(
                f"the output of {feature} must have a row for each of {rows} images, got {tuple(output.shape)}"
            )
        if _version(output) != outputs[0].version:
            raise UserError(f"the output of {feature} is changed in place by what follows it: name what changes it")
        return output

    def _children(self, name: str) -> str:
        """`` Possible within it: ...``, or nothing."""
        children = [f"{name}.{child}" for child, _ in self.modules[name].named_children()]
        return f" Possible within it: {_listed(children)}" if children else ""


def feature_shapes(
    network: nn.Module, names: Sequence[str], shape: tuple[int, int, int], c: Condition
) -> dict[str, tuple[int, ...]]:
    """The shapes of features without their batch dimension, of images (C,H,W) of `shape` under a condition like `c`.

    Nothing is computed: the network runs in evaluation mode on tensors without numbers (torch's FakeTensorMode), which
    also replace its weights and buffers. Raises the errors of :class:`FeatureRecorder`.
    """
    recorder = FeatureRecorder(network, names)
    with recorder.recording(), _without_numbers(network, shape, c):
        features = recorder.take(ROWS, torch.get_default_dtype())
    return {name: tuple(feature.shape[1:]) for name, feature in features.items()}


def last_weight(network: nn.Module, shape: tuple[int, int, int], c: Condition) -> str:
    """The name of the weight of the layer that `network` calls last: a parameter of two or more dimensions.

    Of those with `requires_grad`, so with adapters it is one of theirs. Nothing is computed, as by
    :func:`feature_shapes`. Raises UserError for a network without such a weight.
    """
    weights = {
        module: f"{name}.{own}" if name else own
        for name, module in network.named_modules()
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1 and weight.requires_grad
    }
    called: list[str] = []
    with ExitStack() as hooks:
        for module, name in weights.items():
            hooks.callback(module.register_forward_hook(lambda *_, name=name: called.append(name)).remove)
        with _without_numbers(network, shape, c):
            pass
    if not called:
        raise UserError(f"{class_of(network).__name__} has no last layer: it calls none with a weight to train")
    return called[-1]


@contextmanager
def _without_numbers(network: nn.Module, shape: tuple[int, int, int], c: Condition) -> Iterator[None]:
    """A block after an evaluation on tensors without numbers, and in their mode."""
    dtype = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), evaluating(network):
        weights = {name: _like(given) for name, given in [*network.named_parameters(), *network.named_buffers()]}
        parts = (None if given is None else _like(given) for given in (c.labels, c.text, c.image))
        labels, text, image = parts
        x, time = torch.empty(ROWS, *shape, dtype=dtype), torch.empty(ROWS, dtype=dtype)
        functional_call(network, weights, (x, time, None, Condition(labels, text=text, image=image)))
        yield


def _version(output: Any) -> int:
    (tensor,) = output if isinstance(output, tuple | list) and len(output) == 1 else (output,)
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else 0


def _like(given: Tensor) -> Tensor:
    return torch.empty(given.shape, dtype=given.dtype)


def _is_within(name: str, module: str) -> bool:
    """Whether the submodule `name` is in `module`, the name of a submodule or "" for the network itself."""
    return not module or name == module or name.startswith(f"{module}.")


def _without_features(module: nn.Module, inputs: Any, output: tuple[Any, list[Any]]) -> Any:
    return output[0]


def _no_submodule(network: nn.Module, name: str, known: Iterable[str]) -> UserError:
    near = get_close_matches(name, known, n=LISTED) or [child for child, _ in network.named_children()]
    listed = f"Possible, for example: {_listed(near)}" if near else "It has none"
    return UserError(f"{class_of(network).__name__} has no submodule {quoted(name)}. {listed}")


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names):,} in all)" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
