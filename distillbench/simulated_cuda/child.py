"""Imported first by processes that a process with simulated GPUs has spawned, so that they have them too."""

from distillbench.simulated_cuda.installation import install

install()
