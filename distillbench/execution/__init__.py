"""Where cells run: in this process, in worker processes, on Slurm or on Ray.

It may import `runs` and below.
"""
