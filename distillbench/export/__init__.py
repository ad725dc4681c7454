"""A trained student as a diffusers pipeline or as a network without distillbench.

It may import `runs` and below.
"""
