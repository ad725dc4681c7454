"""Simulated CUDA devices on a CPU: to find, without a GPU, what would fail or wait on one.

    from distillbench.simulated_cuda import install, recording

    install()  # changes torch for good: in a process of its own
    x = torch.randn(8, device="cuda")
    with recording() as record:
        x.sum().item()
    print(record.waits)

Tensors are computed on the CPU and say ``cuda:N`` to Python. An operator that mixes devices raises RuntimeError as CUDA
does, and so do a generator of another device and a copy or wait while a CUDA graph is captured. What is recorded are
copies between host and device, waits of the host for the device, and launches of operators, each with its line.

Autocast has the CPU's lists of operators, numbers are a CPU's to the bit, and times mean nothing. Streams and events
have nothing to wait for, so a wait between streams that is missing is not found. torch.compile, NCCL and FSDP are not
simulated.
"""

from distillbench.simulated_cuda.installation import install, installed
from distillbench.simulated_cuda.record import Copy, Launch, Place, Record, Wait, by_place, recording

__all__ = ["Copy", "Launch", "Place", "Record", "Wait", "by_place", "install", "installed", "recording"]
