"""Processes, signals, devices, precision and progress: what any project on PyTorch could use.

It may import `options`, `hookspecs` and `errors`, no other part of distillbench.
"""
