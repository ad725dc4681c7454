"""The steps of benchmarks/gpu.py: measurements, and separately the verdicts on them."""
