"""What a process imports first that was spawned by one with simulated GPUs: it has them too."""

from distillbench.simulated_cuda.installation import install

install()
