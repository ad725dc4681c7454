"""From settings to a plan of cells, and what one cell does: train, sample, measure, store.

It may import `registry`, `evaluation`, `reports` and below.
"""
