"""``python -m distillbench.simulated_cuda run ...``: the command line on simulated GPUs, for developers."""

from distillbench.simulated_cuda import install

install()

from distillbench.cli.commands import main  # noqa: E402 - after torch has its GPUs

if __name__ == "__main__":
    main()
