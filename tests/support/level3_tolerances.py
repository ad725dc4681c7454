"""What is allowed in tests/methods/test_level3.py, and shown in docs/validation.md."""

# method: RMSE and median of the distance to DDIM with 16 steps (specification 9.4: measured by prototypes, times 1.5)
TOLERANCES = {
    "direct": (0.035, 0.004),
    "pd": (0.06, 0.007),
    "cm": (0.07, 0.02),
    "tract": (0.07, 0.015),
    "boot": (0.13, 0.02),
}

# method and setting: RMSE to the exact map, over the distribution's std (specification 40.2, times 1.5)
CONTINUOUS_TOLERANCES = {"scm": 0.336, "meanflow": 0.132, "meanflow from data": 0.28}

# method and setting: by NFE, the Kolmogorov-Smirnov distance to the data (specification 40.2, plus .03)
DISTRIBUTION_TOLERANCES: dict[str, dict[int, float]] = {
    "dmd": {1: 0.097},
    "dmd, four steps": {1: 0.2, 2: 0.2, 4: 0.2},
    "dmd, Diff-Instruct": {1: 0.102},
}
