"""The derivative of a network along a trajectory, which continuous-time methods train on.

Along the probability-flow ODE, with x^ = x_t / alpha_t, lam = log(sigma_t / alpha_t) and a data prediction f:

    dx^/dlam = x^ - f                                          (Karras et al. 2022, arXiv:2206.00364, eq. 3, in lam)
    x' = dx_t/dlam = (1 + dlog alpha/dlam) x_t - alpha_t f,    t' = dt/dlam
    dF = dF/dx x' + dF/dt t'                                   (:func:`derivative` along :func:`tangent`)

lam is the time to differentiate in: x' and dF stay bounded at both ends of a schedule, which derivatives in t do not.

| symbol | meaning                                                        | shape             |
|--------|----------------------------------------------------------------|-------------------|
| x_t, t | noisy image and its time                                       | (B,C,H,W), (B,1,1,1) |
| x', t' | their derivatives along the path, of the shapes of x_t and t   |                   |
| F, dF  | output of the function, and its derivative along the path      | (B,C,H,W)         |
| h      | step of the finite differences, in lam where x', t' are        | float             |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from distillbench.diffusion.denoiser import CountedNetwork, Counter, NetworkCall
from distillbench.diffusion.dropout import one_mask
from distillbench.diffusion.schedules import NoiseSchedule
from distillbench.system.precision import tf32

__all__ = ["derivative", "tangent"]


def tangent(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """(x', t'): how x_t (B,C,H,W) and t (B,1,1,1) change with lam where the data prediction is `x_0` (B,C,H,W).

    With the denoiser's f for `x_0` this is the probability-flow ODE; with real images it is the path of x_t at constant
    noise, whose mean given x_t is the ODE.
    """

    with torch.enable_grad():
        time = t.detach().double().requires_grad_()
        lam = schedule.lam(time)
        log_sigma = lam + schedule._log_alpha(lam)
        (dlog_sigma,) = torch.autograd.grad(log_sigma.sum(), lam, retain_graph=True)  # = 1 + dlog alpha/dlam
        (dlam,) = torch.autograd.grad(lam.sum(), time)
    return torch.addcmul(dlog_sigma.to(x_t.dtype) * x_t, -schedule.alpha(t), x_0), 1 / dlam


def derivative(
    f: Callable[..., Tensor],
    at: Sequence[Tensor],
    along: Sequence[Tensor],
    *constant: Any,
    exact: bool = False,
    step: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """(F, dF): ``F = f(*at, *constant)``, and its derivative where `at` changes by `along`. Both have F's shape.

    F has gradients where they are enabled; dF has none. By default dF is a central finite difference,

        dF = (f(at + h along) - f(at - h along)) / 2h,    h = `step`,

    which costs two more evaluations without gradient and has an error of order h^2. With `exact` it is a forward-mode
    product (``torch.func.jvp``): one evaluation of about 2 to 5 times the cost, since fused attention has no such
    product and the slower "math" backend is used. Then F is evaluated once more if gradients are enabled.

    A network sees time through sines: h must be small against the shortest period. With frequencies of 1000 in t, as
    in this package's networks, a step of .01 leaves out what changes faster, and `exact` does not. Neither says much
    about the path then: :func:`distillbench.networks.smooth_times` gives a network low frequencies instead.

    If `f` is a module (a Denoiser, or a module that has some), all evaluations drop the same features, and those of dF
    are in float32, also where the network otherwise runs in bf16, fp16 or TF32. Other functions are called as they are.

    Raises ValueError unless `along` has the number and the shapes of `at`.
    """
    if [x.shape for x in at] != [d.shape for d in along]:
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (at, along)]
        raise ValueError(f"`along` must have the shapes of `at`, {shapes[0]}, got {shapes[1]}")
    if step <= 0:
        raise ValueError(f"step must be above 0, got {step}")
    modules = [f] if isinstance(f, nn.Module) else []
    points, directions = tuple(x.detach() for x in at), tuple(d.detach() for d in along)
    gradients, counters = torch.is_grad_enabled(), _counters(modules)
    with one_mask(*modules):
        rows = [counter.rows for counter in counters]
        with torch.no_grad(), _in_float32(counters, at[0].device.type, exact):
            if exact:
                with sdpa_kernel(SDPBackend.MATH):
                    F, dF = cast(Any, jvp)(lambda *moved: f(*moved, *constant), points, directions)
            else:
                ahead, behind = (
                    f(*(x + h * d for x, d in zip(points, directions, strict=True)), *constant) for h in (step, -step)
                )
                dF = (ahead - behind) / (2 * step)
                for counter, before in zip(counters, rows, strict=True):
                    counter.rows_of_differences += counter.rows - before
        if gradients or not exact:  # last: until its backward pass it keeps its activations
            F = f(*at, *constant)
    return F, dF


def _counters(modules: Sequence[nn.Module]) -> list[Counter]:
    """The counters of the networks below `modules`, each once."""
    networks = (found for module in modules for found in module.modules() if isinstance(found, CountedNetwork))
    return list({id(network.counter): network.counter for network in networks}.values())


@contextmanager
def _in_float32(counters: Sequence[Counter], device: str, uncompiled: bool) -> Iterator[None]:
    """A block in which the networks of `counters` run in float32, and with `uncompiled` as they are written."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(tf32(False, device))
        for counter in counters:
            stack.enter_context(counter.calling(NetworkCall() if uncompiled else counter.call.in_float32()))
        yield
