"""The steps of benchmarks/gpu.py: what is measured, and apart from it what is said about what was measured."""
