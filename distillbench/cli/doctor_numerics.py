"""Check of ``distillbench doctor``: float32 on every device against float64, and whether results repeat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distillbench.cli.doctor_findings import Finding, Installation

MATMUL_ERROR = 1e-5  # largest error of float32 against float64; TF32 gives 1e-3
STEP_ERROR = 1e-4


def judge_numerics(device: str, matmul_error: float, step_error: float, repeats: bool) -> Iterator[Finding]:
    """Both errors are those of float32 against float64, relative to the largest value."""
    if not matmul_error <= MATMUL_ERROR:
        line = f"{device}: a float32 matrix product differs from float64 by {matmul_error:.1e}"
        advice = "turn reduced precision (TF32) off: unset NVIDIA_TF32_OVERRIDE, and check plugins that turn it on"
        yield Finding("wrong", line, advice)
    if not step_error <= STEP_ERROR:
        line = f"{device}: training steps in float32 differ from float64 by {step_error:.1e}"
        yield Finding("wrong", line, "reinstall torch; if that does not help, suspect the device")
    if not repeats:
        line = f"{device}: the same training steps give other bits when repeated; results will not be bit-identical"
        yield Finding("warning", line, "set compute.deterministic=true where they must be")
    if matmul_error <= MATMUL_ERROR and step_error <= STEP_ERROR:
        line = f"{device}: float32 agrees with float64 to {matmul_error:.0e} in a product, {step_error:.0e} in training"
        yield Finding("ok", line)


def check_numerics(installation: Installation) -> Iterator[Finding]:
    """A matrix product and three training steps in float32 on every device, against float64 on the CPU."""
    import torch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in runs; more threads wait for each other on a busy machine
    try:
        products, steps = _product("cpu", torch.float64), _step("cpu", torch.float64)
        for device in devices:
            product, step = _product(device, torch.float32), _step(device, torch.float32)
            errors = _relative_error(product, products), _relative_error(step, steps)
            yield from judge_numerics(device, *errors, _repeats(device))
    finally:
        torch.set_num_threads(threads)


def _product(device: str, dtype: Any) -> Any:
    """The product of two matrices (128,128) computed on `device` in `dtype`; returned on the CPU in float64."""
    import torch

    a, b = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return (a @ b).double().cpu()


def _step(device: str, dtype: Any) -> Any:
    """The weights of a small convolutional network after three training steps, on the CPU in float64."""
    from torch import nn

    first, last = (nn.utils.skip_init(nn.Conv2d, i, o, kernel_size=3, padding=1) for i, o in ((3, 8), (8, 3)))
    return _trained(nn.Sequential(first, nn.SiLU(), last), 8, device, dtype)


def _repeats(device: str) -> bool:
    """Whether a network like a teacher's (convolutions, attention) is bit-identical after the same three steps."""
    import torch
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    class Attention(nn.Module):
        def forward(self, x: Any) -> Any:  # (B,C,H,W)
            tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)  # (B,1,HW,C)
            return x + scaled_dot_product_attention(tokens, tokens, tokens).squeeze(1).transpose(1, 2).view_as(x)

    def conv(channels_in: int, channels: int, stride: int = 1) -> nn.Module:
        return nn.utils.skip_init(nn.Conv2d, channels_in, channels, kernel_size=3, padding=1, stride=stride)

    def weights() -> Any:
        down = (conv(3, 64), nn.GroupNorm(8, 64), nn.SiLU(), conv(64, 64, 2), Attention())
        network = nn.Sequential(*down, nn.Upsample(scale_factor=2), nn.GroupNorm(8, 64), nn.SiLU(), conv(64, 3))
        return _trained(network, 16, device, torch.float32)

    return torch.equal(weights(), weights())


def _trained(network: Any, side: int, device: str, dtype: Any) -> Any:
    """The network's weights after three steps with the default compute settings: a vector on the CPU in float64."""
    import torch

    from distillbench.training.compute import ComputeConfig, algorithms, tf32

    generator, default = torch.Generator().manual_seed(0), ComputeConfig()
    with torch.no_grad():
        for weights in network.parameters():
            weights.copy_(0.3 * torch.randn(weights.shape, generator=generator))
    x, y = torch.randn(2, 4, 3, side, side, generator=generator).to(device, dtype)
    network.to(device, dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, eps=1e-2)  # eps: small steps for gradients near 0
    with tf32(default.tf32, device), algorithms(default, device):
        for _ in range(3):
            optimizer.zero_grad()
            (network(x) - y).square().mean().backward()
            optimizer.step()
    return torch.cat([weights.detach().double().cpu().flatten() for weights in network.parameters()])


def _relative_error(got: Any, wanted: Any) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())
