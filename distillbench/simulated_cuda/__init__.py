"""Simulated CUDA devices on a CPU, to find code that would fail or wait on a GPU.

    from distillbench.simulated_cuda import install, recording

    install()  # patches torch for the rest of the process
    x = torch.randn(8, device="cuda")
    with recording() as record:
        x.sum().item()
    print(record.waits)

Tensors are computed on the CPU; in Python their device is ``cuda:N``. An operator that mixes devices raises the
RuntimeError of CUDA, and so do a generator of another device and a copy or wait while a CUDA graph is captured. Copies
between host and device, waits of the host for the device, and launches of operators are recorded with their lines.

Autocast has the CPU's lists of operators, results are bit-identical to the CPU's, and times mean nothing. Streams and
events are always finished, so a missing wait between streams is not found. torch.compile, NCCL and FSDP are not
simulated.
"""

from distillbench.simulated_cuda.installation import install, installed
from distillbench.simulated_cuda.record import Copy, Launch, Place, Record, Wait, by_place, recording

__all__ = ["Copy", "Launch", "Place", "Record", "Wait", "by_place", "install", "installed", "recording"]
