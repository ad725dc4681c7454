"""What a run leaves on disk: records, tables, image grids, and their statistics.

It may import `storage` and below.
"""
