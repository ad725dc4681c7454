"""The contract of a method and how it is trained: loop, budget, optimizers, checkpoints, precision, ranks, FLOPs.

It may import `teachers` and below.
"""
