"""What is allowed in tests/methods/test_level3.py, and shown in docs/validation.md."""

# method: RMSE and median of the distance to DDIM with 16 steps (specification 9.4: measured by prototypes, times 1.5)
TOLERANCES = {
    "direct": (0.035, 0.004),
    "pd": (0.06, 0.007),
    "cm": (0.07, 0.02),
    "cm_4_segments": (0.07, 0.02),
    "tract": (0.07, 0.015),
    "boot": (0.13, 0.02),
}

# method and setting: RMSE to the exact map, over the distribution's std (specification 40.2, times 1.5)
CONTINUOUS_TOLERANCES = {
    "ctm": 0.107,
    "ctm, local": 0.105,
    "ect": 0.326,
    "ect from the teacher": 0.22,
    "meanflow": 0.132,
    "meanflow from data": 0.28,
    "reflow": 0.1425,
    "reflow, uniform times": 0.1515,
    "scm": 0.336,
}

# the same in several steps, by NFE
SEVERAL_STEPS_TOLERANCES = {
    "ctm": {2: 0.16},
    "ctm, local": {2: 0.115},
    "reflow": {2: 0.096, 4: 0.0795, 16: 0.0735},
    "reflow, uniform times": {2: 0.1005, 4: 0.0825, 16: 0.0735},
}

# lcm, by segments and w: RMSE to the guided teacher's DDIM with 50 steps, over the distribution's std (specification
# 40.2: the worse of two classes, times 1.5)
GUIDED_TOLERANCES = {1: {1.0: 0.222, 2.0: 0.1, 3.0: 0.134}, 4: {1.0: 0.204, 2.0: 0.092, 3.0: 0.093}}

# method and setting: by NFE, the Kolmogorov-Smirnov distance to the data (specification 40.2, plus .03)
DISTRIBUTION_TOLERANCES: dict[str, dict[int, float]] = {
    "dmd": {1: 0.097},
    "dmd, four steps": {1: 0.062, 2: 0.066, 4: 0.073},
    "dmd, Diff-Instruct": {1: 0.102},
    "imm": {1: 0.236, 8: 0.25},  # the published estimator, which has an optimum of its own
    "imm, without i = j": {1: 0.116, 8: 0.096},
    "moment, K = 1": {1: 0.109},
    "moment, K = 4": {4: 0.147},
    "sid": {1: 0.078},
}
